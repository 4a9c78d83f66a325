"""Where samples come from: positions below all subsets, and names of files."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

from lightning_cld import IndexedDataset
from lightning_cld.data.nesting import all_datasets, flat
from lightning_cld.data.origin import hash_of_files, hash_of_positions


class Numbered(Dataset):
    """Samples that no other dataset has."""

    made = 0

    def __init__(self, length):
        self.first, self.length = Numbered.made, length
        Numbered.made += length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.first + range(self.length)[index]


def nested(inner):
    """Subsets and concatenations of datasets."""

    def part_of(dataset):
        places = st.integers(-len(dataset), len(dataset) - 1)
        listed = st.lists(places, max_size=5) if len(dataset) else st.just([])
        return st.one_of(listed, listed.map(np.array), listed.map(torch.tensor)).map(
            lambda positions: Subset(dataset, positions)
        )

    return (
        inner.flatmap(part_of) | st.lists(inner, min_size=1, max_size=3).map(ConcatDataset) | inner.map(IndexedDataset)
    )


def plain(sample):
    return sample[0] if isinstance(sample, tuple) else sample


DATASETS = st.recursive(st.integers(0, 4).map(Numbered), nested, max_leaves=5)


@given(DATASETS)
def test_flat_positions_are_those_of_the_samples(dataset):
    roots, positions = flat(dataset)
    below = [plain(root[index]) for root in roots for index in range(len(root))]
    expected = [plain(dataset[index]) for index in range(len(dataset))]
    assert [below[place] for place in (range(len(below)) if positions is None else positions)] == expected


POOL = TensorDataset(torch.rand(50, 2))


def split(seed, dataset=POOL, share=0.5):
    return random_split(dataset, [share, 1 - share], torch.Generator().manual_seed(seed))[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (split(0), split(1)),
        (split(0, split(0)), split(1, split(0))),
        (split(0, split(0)), split(0, split(1))),
        (ConcatDataset([split(0), POOL]), ConcatDataset([split(1), POOL])),
        (ConcatDataset([split(0), split(1)]), ConcatDataset([split(1), split(0)])),
        (Subset(POOL, range(9)), Subset(POOL, range(1, 10))),
        (Subset(POOL, [0, 1, 2, 4]), Subset(POOL, [0, 1, 3, 4])),
    ],
)
def test_other_positions_have_another_hash(one, other):
    assert hash_of_positions(flat(one)) != hash_of_positions(flat(other)) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (split(0), split(0)),
        (Subset(Subset(POOL, range(9, -1, -1)), [1, 3]), Subset(POOL, torch.tensor([8, 6]))),
        (Subset(POOL, [-1, 3]), Subset(POOL, np.array([49, 3]))),
        (Subset(POOL, np.array([3, 1, 2], dtype=np.uint32)), Subset(POOL, (3, 1, 2))),
        (Subset(POOL, np.array([3, 1, 2], dtype=">i4")), Subset(POOL, [3, 1, 2])),
        (Subset(POOL, np.arange(0, 9, 2)[::-1]), Subset(POOL, range(8, -1, -2))),
        (Subset(POOL, np.broadcast_to(3, 2)), Subset(POOL, [3, 3])),
        (IndexedDataset(split(0)), split(0)),
        (Subset(POOL, range(4)), Subset(POOL, [0, 1, 2, 3])),
    ],
)
def test_the_same_positions_have_the_same_hash(one, other):
    warnings.simplefilter("error")
    assert hash_of_positions(flat(one)) == hash_of_positions(flat(other)) != ""


@pytest.mark.parametrize("dataset", [POOL, ConcatDataset([POOL, POOL]), Subset(POOL, ["a", "b"])])
def test_without_a_subset_by_position_there_is_no_hash(dataset):
    assert hash_of_positions(flat(dataset)) == ""


@pytest.mark.parametrize(("positions", "expected"), [(range(3, 9), "50:3-8"), ([7], "50:7-7")])
def test_positions_without_a_gap_are_said(positions, expected):
    assert hash_of_positions(flat(Subset(POOL, positions))) == expected


# Files


class Files(Dataset):
    def __init__(self, names, attribute="samples", entry=lambda name: (name, 0)):
        setattr(self, attribute, [entry(name) for name in names])
        self.length = len(names)

    def __len__(self):
        return self.length


NAMES = ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]


def below(root, names=NAMES):
    return [root + name for name in names]


def hashed(dataset):
    return hash_of_files(flat(dataset))


@pytest.mark.parametrize("root", ["", "./", "/data/", "data/train/", "./data//train/", "../data/", "/a-b/", "/a/b-c/"])
def test_the_folder_may_stand_elsewhere(root):
    assert hashed(Files(below(root))) == hashed(Files(below("/elsewhere/"))) != ""


@pytest.mark.parametrize(
    ("attribute", "entry"),
    [
        ("samples", lambda name: (name, 3)),
        ("samples", lambda name: [Path(name), 3]),
        ("imgs", lambda name: (name, 3)),
        ("files", lambda name: name),
        ("files", Path),
    ],
)
def test_names_are_found_as_torchvision_keeps_them(attribute, entry):
    assert hashed(Files(below("/data/"), attribute, entry)) == hashed(Files(NAMES))


@pytest.mark.parametrize(
    "names",
    [
        ["cat/1.png", "cat/3.png", "dog/1.png", "dog/2.png"],
        ["cat/2.png", "cat/1.png", "dog/1.png", "dog/2.png"],
        ["cat/1.png", "cat/2.png", "dog/1.png", "cow/2.png"],
        ["cat/1.pn", "gcat/2.png", "dog/1.png", "dog/2.png"],
    ],
)
def test_other_names_or_another_order_have_another_hash(names):
    assert hashed(Files(names)) != hashed(Files(NAMES))


def test_names_follow_subsets_and_concatenations():
    here, there = Files(below("/here/")), Files(below("/there/"))
    assert hashed(Subset(here, [3, 0])) == hashed(Files(below("/x/", ["dog/2.png", "cat/1.png"])))
    assert hashed(ConcatDataset([here, there])) == hashed(ConcatDataset([there, here]))
    assert hashed(Subset(ConcatDataset([here, there]), [5, 0])) == hashed(Files(["cat/2.png", "cat/1.png"]))


@pytest.mark.parametrize(
    "dataset",
    [
        POOL,
        Files([]),
        Files([1, 2, 3]),
        Files(NAMES, entry=lambda name: ()),
        Files(NAMES, entry=lambda name: {"path": name}),
        Files(["/a", 3]),
        ConcatDataset([Files(NAMES), POOL]),
    ],
)
def test_without_names_for_all_samples_there_is_no_hash(dataset):
    assert hashed(dataset) == ""


def test_a_property_that_cannot_be_read_offers_no_names():
    class Closed(Files):
        @property
        def samples(self):
            raise OSError("closed")

    assert hashed(Closed(NAMES, "files", str)) == hashed(Files(NAMES))


def test_names_that_are_no_unicode_have_a_hash():
    assert hashed(Files([os.fsdecode(b"a/\xff.png"), "a/b.png"])) != ""


def test_of_very_many_names_a_change_of_the_order_is_seen():
    names = [f"{position:07}.png" for position in range(100_000)]
    moved = [*names[1:50_000], names[0], *names[50_000:]]
    assert hashed(Files(names)) != hashed(Files(moved))


# Datasets within datasets


def test_datasets_are_found_under_any_name_each_once():
    class Wrapper(Dataset):
        def __init__(self, **attributes):
            vars(self).update(attributes)

    parts = [TensorDataset(torch.zeros(1)) for _ in range(3)]
    whole = Wrapper(base=Wrapper(parts=parts[:2], base=parts[0]), others=(parts[2],), names=["a"], empty=[], n=3)
    whole.base.parent = whole
    found = all_datasets(whole)
    assert {id(dataset) for dataset in found} == {id(dataset) for dataset in (whole, whole.base, *parts)}
    assert len(found) == 5
