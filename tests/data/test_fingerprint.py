from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_cld.data.fingerprint import PROBES, Fingerprint, Sketch, hash_of, probe_positions
from lightning_cld.data.labels import labels_of
from lightning_cld.data.nesting import flat

LABELS = [5, 6, 7, 8]


class Labelled(Dataset):
    """A dataset of four samples that can't be read, with the given attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise AssertionError("samples are not to be read")


def read_only(values):
    array = np.array(values)
    array.setflags(write=False)
    return array


def tensors(*labels):
    return TensorDataset(torch.rand(len(labels), 2), torch.tensor(labels))


# labels_of


@pytest.mark.parametrize("name", ["targets", "labels"])
@pytest.mark.parametrize(
    "values",
    [
        LABELS,
        tuple(LABELS),
        torch.tensor(LABELS),
        torch.tensor(LABELS, dtype=torch.uint8),
        np.array(LABELS),
        np.array(LABELS, dtype=np.int32),
        np.array(LABELS, dtype=np.uint16),
        np.array(LABELS, dtype=">i4"),
        np.array(LABELS[::-1])[::-1],
        read_only(LABELS),
        np.array(LABELS, dtype=object),
        [np.int64(label) for label in LABELS],
        [torch.tensor(label) for label in LABELS],
    ],
    ids=["list", "tuple", "tensor", "uint8", "ndarray", "int32", "uint16", "big end first", "reversed", "read-only",
         "objects", "numpy ints", "tensors"],
)  # fmt: skip
def test_labels_are_read_from_attributes_as_int64(name, values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = labels_of(flat(Labelled(**{name: values})))
    assert labels.dtype == torch.int64
    assert labels.tolist() == LABELS


@pytest.mark.parametrize(
    "values",
    [
        [5, 6, 7],
        [5, 6, 7, 8, 9],
        ["cat", "dog", "cat", None],
        [[1], [2, 3], [4], [5]],
        [None] * 4,
        [2**70] * 4,
        lambda: LABELS,
        torch.tensor(4),
    ],
)
def test_attributes_that_are_no_label_for_each_sample_are_ignored(values):
    assert labels_of(flat(Labelled(targets=values))) is None


def test_labels_stand_in_for_targets_that_are_none():
    assert labels_of(flat(Labelled(targets=None, labels=LABELS))).tolist() == LABELS


@pytest.mark.parametrize(
    "values",
    [[0.5, 1.5, 2.5, 3.5], torch.eye(4).tolist(), [True, False, True, False], [[1, 0], [0, 1], [1, 1], [0, 0]]],
)
def test_targets_that_are_no_classes_tell_datasets_apart(values):
    labels = labels_of(flat(Labelled(targets=values)))
    assert labels.tolist() == values
    known = Fingerprint.of_labels(labels)
    assert known.mismatch(Fingerprint.of_labels(labels_of(flat(Labelled(targets=values))))) is None
    assert "another order" in known.mismatch(Fingerprint.of_labels(labels.flip(0)))


def test_targets_come_before_labels():
    assert labels_of(flat(Labelled(targets=LABELS, labels=[0, 0, 0, 0]))).tolist() == LABELS


def test_a_dataset_without_labels_has_none():
    assert labels_of(flat(Labelled())) is None


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (tensors(5, 6, 7, 8), [5, 6, 7, 8]),
        (Subset(tensors(5, 6, 7, 8), [3, 0]), [8, 5]),
        (Subset(tensors(5, 6, 7, 8), torch.tensor([3, 0])), [8, 5]),
        (Subset(tensors(5, 6, 7, 8), range(1, 4)), [6, 7, 8]),
        (Subset(tensors(5, 6, 7, 8), []), []),
        (Subset(Subset(tensors(5, 6, 7, 8), [3, 0, 2]), [2, 1]), [7, 5]),
        (ConcatDataset([tensors(5, 6), Labelled(targets=LABELS)]), [5, 6, 5, 6, 7, 8]),
        (Subset(ConcatDataset([tensors(5, 6), Subset(tensors(7, 8), [1])]), [2, 0]), [8, 5]),
        (Subset(Labelled(targets=LABELS), [3, 0]), [8, 5]),
        (Subset(tensors(5, 6, 7, 8), np.array([3, -4])), [8, 5]),
        (Subset(ConcatDataset([Subset(tensors(1, 2, 3), [2]), tensors(5, 6)]), [-1, 0]), [6, 3]),
    ],
    ids=["tensors", "subset", "subset by tensor", "subset by range", "nothing", "nested", "concat", "both", "targets",
         "subset by array", "from the end"],
)  # fmt: skip
def test_labels_are_read_through_torch_datasets(dataset, expected):
    assert labels_of(flat(dataset)).tolist() == expected


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.rand(4, 2)),
        Subset(Labelled(), [0, 1]),
        ConcatDataset([tensors(5, 6), Labelled()]),
        Subset(Labelled(targets=LABELS), ["a", "b"]),
    ],
    ids=["one tensor", "subset", "concat", "subset by names"],
)
def test_torch_datasets_without_labels_have_none(dataset):
    assert labels_of(flat(dataset)) is None


# Fingerprint

POOL = torch.arange(300) % 7
FULL = Fingerprint.of_labels(POOL)


def probe(labels):
    return Fingerprint(len(labels), probe=hash_of(labels[probe_positions(len(labels))]))


def changed(position):
    labels = POOL.clone()
    labels[position] += 1
    return labels


UNPROBED = next(position for position in range(300) if position not in probe_positions(300))


@pytest.mark.parametrize(
    "other",
    [
        Fingerprint.of_labels(POOL.clone()),
        Fingerprint.of_labels(POOL.int()),
        probe(POOL),
        probe(changed(UNPROBED)),
        Fingerprint(300),
    ],
    ids=["equal", "int32", "probe", "a change out of the probe's sight", "length only"],
)
def test_nothing_tells_datasets_apart_that_agree_in_all_that_is_known(other):
    assert FULL.mismatch(other) is None
    assert other.mismatch(FULL) is None


@pytest.mark.parametrize(
    "other",
    [
        Fingerprint.of_labels(POOL.flip(0)),
        Fingerprint.of_labels(changed(UNPROBED)),
        Fingerprint.of_labels(changed(299)),
        probe(POOL.flip(0)),
        probe(changed(int(probe_positions(300)[-1]))),
        probe(changed(0)),
    ],
    ids=["order", "one label", "last label", "probe: order", "probe: last", "probe: first"],
)
def test_other_labels_or_another_order_are_a_mismatch(other):
    assert FULL.mismatch(other) == "it has other labels, or the same in another order"
    assert other.mismatch(FULL) == "it has other labels, or the same in another order"


@pytest.mark.parametrize("other", [Fingerprint.of_labels(torch.zeros(1200)), probe(POOL.repeat(4)), Fingerprint(1200)])
def test_another_length_is_a_mismatch(other):
    assert FULL.mismatch(other) == "it has 1,200 samples, not 300"


def test_two_probes_are_compared():
    assert probe(POOL).mismatch(probe(POOL)) is None
    assert probe(POOL).mismatch(probe(POOL.flip(0))) is not None


@pytest.mark.parametrize("length", [0, 1, PROBES - 1, PROBES, PROBES + 1, 1000, 10**9])
def test_probes_are_distinct_positions_spread_over_the_dataset(length):
    positions = probe_positions(length)
    gaps = positions.diff()
    assert positions.dtype == torch.int64
    assert len(positions) == min(PROBES, length)
    assert ((positions >= 0) & (positions < length)).all()
    assert length < 2 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


SKETCHES = (Sketch("01", "ef", (0.5, -2.0), (1.0, 2.0)), Sketch("01", "ff"))
WHOLE = replace(FULL, positions="900:ab", files="cd", samples=SKETCHES, read="raw", numbers=((".y", "23"),))


@pytest.mark.parametrize("fingerprint", [FULL, Fingerprint(3), WHOLE])
def test_a_fingerprint_survives_json(fingerprint):
    assert Fingerprint.from_dict(json.loads(json.dumps(fingerprint.to_dict()))) == fingerprint


def test_a_fingerprint_of_a_former_version_is_read():
    saved = {"length": 300, "labels": FULL.labels, "probe": FULL.probe}
    read = Fingerprint.from_dict(saved)
    assert read == replace(FULL, former=True)
    assert read.mismatch(WHOLE) is None
    assert read.compared(WHOLE) == ["labels"]


@pytest.mark.parametrize(
    "change",
    [
        *({"samples": value} for value in (3, "ab", [3], [["a"]], [["a", "b", [1.0], []]], [["a", 3, [], []]])),
        *({"samples": [["a", "b", ["1"], [1.0]]]}, {"samples": [["a", "b", [1], [1]]]}),
        *({"numbers": value} for value in (3, [["a"]], [["a", 3]])),
        *({"read": 1}, {"former": "no"}, {"files": None}, {"length": "3"}, {"more": 1}),
    ],
    ids=str,
)
def test_changed_values_are_refused(change):
    with pytest.raises((TypeError, ValueError)):
        Fingerprint.from_dict({**WHOLE.to_dict(), **change})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"positions": "900:ba"}, "it takes other positions"),
        ({"files": "dc"}, "it has files of other names"),
        ({"samples": (SKETCHES[0], Sketch("01", "fe"))}, "some of its samples are other ones"),
        ({"samples": (Sketch("01", "ef", (0.5, 2.0), (1.0, 2.0)), SKETCHES[1])}, "some of its samples are other ones"),
        ({"labels": "", "probe": "", "numbers": ((".y", "24"),)}, "it has other labels"),
    ],
)
def test_whatever_both_know_is_compared(change, problem):
    other = replace(WHOLE, **change)
    assert WHOLE.mismatch(other).startswith(problem)
    assert other.mismatch(WHOLE).startswith(problem)


@pytest.mark.parametrize(
    "change",
    [
        {"positions": "901:ba"},  # of another dataset, of which this one may be a part
        {"positions": ""},
        {"files": ""},
        {"samples": ()},
        {"samples": (SKETCHES[1],) * 2, "read": "given"},  # with transforms, which the other look left out
        {"samples": (SKETCHES[1],)},
        {"numbers": ((".z", "24"),)},
    ],
    ids=str,
)
def test_what_one_of_them_does_not_know_is_not_compared(change):
    other = replace(WHOLE, **change)
    assert WHOLE.mismatch(other) is None
    assert other.mismatch(WHOLE) is None


def test_samples_of_another_form_are_compared_only_where_the_same_code_prepares_them():
    other = replace(WHOLE, samples=(SKETCHES[0], Sketch("02", "ff")))
    assert WHOLE.mismatch(other) is None
    assert "samples" not in WHOLE.compared(other)
    assert WHOLE.mismatch(other, same_code=True).startswith("some of its samples are other ones")


def test_only_numbers_that_are_the_logged_classes_are_kept():
    classes = torch.arange(300) % 3
    probed = classes[probe_positions(300)]
    numbers = ((".a", hash_of(probed)), (".b", hash_of(probed + 1)))
    assert dict(replace(FULL, numbers=numbers).of_classes(classes).numbers).keys() == {".a"}
    assert replace(FULL, numbers=numbers).of_classes(None).numbers == ()


@pytest.mark.parametrize(
    ("fingerprint", "known"),
    [
        (Fingerprint(3), []),
        (FULL, ["labels"]),
        (probe(POOL), ["some labels"]),
        (Fingerprint(300, numbers=((".y", "23"),)), ["some labels"]),
        (WHOLE, ["labels", "positions", "files", "samples"]),
    ],
)
def test_what_is_known_can_be_listed(fingerprint, known):
    assert fingerprint.known() == known


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (7,), (7, 2)])
def test_hashes_are_those_that_former_versions_saved(dtype, shape):
    values = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    array = values.numpy().astype("<f4" if dtype.is_floating_point else "<i8")
    assert hash_of(values) == hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()
    assert hash_of(torch.stack([values, values], dim=-1)[..., 0]) == hash_of(values)
