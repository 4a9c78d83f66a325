"""Which dataset a loader reads: the same one is known again, another one is not taken for it."""

import functools
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset, get_worker_info
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lightning_cld import CLDScores
from lightning_cld.data.identity import compare, look_at

LABELS = [position * 4 // 80 for position in range(80)]
PIXELS = np.random.default_rng(0).integers(0, 255, (80, 24, 20, 3), dtype=np.uint8)
SMALL = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
LARGE = transforms.Compose([transforms.RandomResizedCrop(16), transforms.RandomHorizontalFlip(), transforms.ToTensor()])


def split(seed):
    """A draw of other samples for each seed, in an order that gives the same labels: class after class."""
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.permutation(80)[:10] // 4 + 20 * label for label in range(4)]).tolist()


class Images(Dataset):
    """Images in memory, transformed in one of the ways that people write."""

    def __init__(self, order, transform=None):
        self.order, self.transform = order, transform

    def __len__(self):
        return len(self.order)

    def image(self, index):
        return Image.fromarray(PIXELS[self.order[index]])

    def transformed(self, index):
        return self.image(index) if self.transform is None else self.transform(self.image(index))

    def __getitem__(self, index):
        return self.transformed(index), LABELS[self.order[index]]


class Required(Images):
    def transformed(self, index):
        return self.transform(self.image(index))


class ByName(Images):
    """As with albumentations."""

    def transformed(self, index):
        return self.transform(image=self.image(index))["image"]


class Both(Images):
    """As with torchvision's `transforms`."""

    def __init__(self, order, transform=None):
        super().__init__(order)
        self.transforms = (lambda image, label: (transform(image), label)) if transform else None

    def __getitem__(self, index):
        image, label = self.image(index), LABELS[self.order[index]]
        return self.transforms(image, label) if self.transforms else (image, label)


class Underscore(Images):
    """As torchio's."""

    def __init__(self, order, transform=None):
        super().__init__(order)
        self._transform = transform

    def transformed(self, index):
        return self._transform(self.image(index)) if self._transform else self.image(index)


class Wrapper(Dataset):
    """Transforms what another dataset gives, and forwards all else to it."""

    def __init__(self, order, transform=None):
        self.base, self.transform = Subset(Images(range(80)), order), transform

    def __getattr__(self, name):
        return getattr(self.base, name)

    def __len__(self):
        return len(self.base)

    def __getitem__(self, index):
        image, label = self.base[index]
        return self.transform(image) if self.transform else image, label


class Sealed(Images):
    """Can't be copied, pickled or changed."""

    def __init__(self, order, transform=None):
        vars(self).update(order=order, transform=transform)

    def __setattr__(self, name, value):
        raise AttributeError("read-only")

    def __reduce_ex__(self, protocol):
        raise TypeError("can't be copied")


def by_name(transform):
    return None if transform is None else lambda image: {"image": transform(image)}


REMOVABLE = {
    "optional": Images,
    "required": Required,
    "named": lambda order, transform: ByName(order, by_name(transform)),
    "both": Both,
    "underscore": Underscore,
    "wrapper": Wrapper,
    "sealed": Sealed,
    "subset": lambda order, transform: Subset(Images(range(80), transform), order),
}


def looked_at(dataset, **loader):
    return look_at(DataLoader(dataset, batch_size=4, **loader), "train")


def compared(one, other, **loader):
    """What tells two datasets apart, and what was compared."""
    one, other = (looked_at(dataset, **loader).fingerprint for dataset in (one, other))
    assert (one.mismatch(other) is None) == (other.mismatch(one) is None)
    return one.mismatch(other), set(one.compared(other))


@pytest.mark.parametrize("make", REMOVABLE.values(), ids=REMOVABLE)
def test_samples_are_compared_without_their_transforms(make):
    """A small proxy and a large target with random augmentation, from the same datamodule."""
    problem, known = compared(make(split(0), SMALL), make(split(0), LARGE))
    assert problem is None
    assert {"samples", "labels"} <= known
    problem, _ = compared(make(split(0), SMALL), make(split(1), LARGE))
    assert "other ones" in problem or "other positions" in problem


@pytest.mark.parametrize("make", [make for name, make in REMOVABLE.items() if name not in ("required", "named")])
def test_a_set_without_transforms_is_compared_with_one_that_has_them(make):
    problem, known = compared(make(split(0), None), make(split(0), LARGE))
    assert problem is None
    assert "samples" in known


@pytest.mark.parametrize("make", REMOVABLE.values(), ids=REMOVABLE)
def test_a_look_leaves_the_dataset_as_it_was(make):
    dataset = make(split(0), LARGE)
    before = dict(vars(dataset))
    looked_at(dataset)
    assert vars(dataset) == before


class Hidden(Images):
    """Has its transform where nobody looks for it."""

    def __init__(self, order, transform):
        super().__init__(order)
        self.settings = {"transform": transform}

    def transformed(self, index):
        return self.settings["transform"](self.image(index))


def test_a_transform_that_reads_the_sample_by_its_number_is_a_part_of_it():
    # As with monai.data.Dataset(range(n), transform).
    class Numbers(Dataset):
        def __init__(self, order):
            self.data, self.transform = range(len(order)), lambda number: SMALL(Image.fromarray(PIXELS[order[number]]))

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            return self.transform(self.data[index])

    assert compared(Numbers(split(0)), Numbers(split(0))) == (None, {"samples"})
    problem, _ = compared(Numbers(split(0)), Numbers(split(1)))
    assert problem is not None
    assert problem.startswith("some of its samples are other ones")


def test_samples_of_other_sizes_may_be_the_same_ones():
    larger = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
    problem, known = compared(Hidden(split(0), SMALL), Hidden(split(0), larger))
    assert problem is None
    assert known == {"labels"}
    doubt = compared_with(scores_of(Hidden(split(0), SMALL)), Hidden(split(0), larger)).doubt
    assert "not its samples. These have other shapes or types" in doubt


def test_samples_of_one_size_are_compared_with_their_transforms_if_need_be():
    assert compared(Hidden(split(0), SMALL), Hidden(split(0), SMALL)) == (None, {"labels", "samples"})
    assert "other ones" in compared(Hidden(split(0), SMALL), Hidden(split(1), SMALL))[0]


def test_samples_that_change_are_not_compared():
    assert compared(Hidden(split(0), LARGE), Hidden(split(0), LARGE)) == (None, {"labels"})
    assert looked_at(Hidden(split(0), LARGE)).changes == "yes"


class Cached(Images):
    def __init__(self, order, transform):
        super().__init__(order, transform)
        self.cache = {}

    def transformed(self, index):
        if index not in self.cache:
            self.cache[index] = super().transformed(index)
        return self.cache[index]


def test_a_cache_keeps_what_the_dataset_itself_put_there():
    dataset = Cached(split(0), SMALL)
    larger = Cached(split(0), transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()]))
    assert compared(dataset, larger)[0] is None
    assert dataset.cache
    assert all(isinstance(image, torch.Tensor) for image in dataset.cache.values())


def test_last_digits_may_differ_between_machines():
    class Standardized(Dataset):
        def __init__(self, error):
            self.error = error

        def __len__(self):
            return 80

        def __getitem__(self, index):
            return torch.from_numpy(PIXELS[index]).double().sub(99).div(66).mul(1 + self.error), LABELS[index]

    assert compared(Standardized(0.0), Standardized(1e-6)) == (None, {"labels", "samples"})
    assert compared(Standardized(0.0), Standardized(0.1))[0] is not None


class Texts(Dataset):
    """Tokens, masked at random in the dataset."""

    def __init__(self, order, masked):
        self.order, self.masked = order, masked

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        tokens = [int(token) for token in PIXELS[self.order[index]].ravel()[:12]]
        if self.masked:
            tokens = [0 if random.random() < 0.5 else token for token in tokens]
        return {"input_ids": tokens, "sentiment": LABELS[self.order[index]], "labels": tokens}


def masking(batch):
    tokens = torch.tensor([sample["input_ids"] for sample in batch])
    return {"input_ids": tokens.masked_fill(torch.rand(tokens.shape) < 0.5, 0)}


def test_texts_are_compared_before_a_collate_function_masks_them():
    plain = functools.partial(Texts, masked=False)
    assert compared(plain(split(0)), plain(split(0)), collate_fn=masking)[0] is None
    assert compared(plain(split(0)), plain(split(1)), collate_fn=masking)[0] is not None
    assert looked_at(plain(split(0)), collate_fn=masking).changes == "yes"


def test_masked_tokens_are_no_labels():
    assert compared(Texts(split(0), masked=True), Texts(split(0), masked=False))[0] is None
    numbers = dict(looked_at(Texts(split(0), masked=True)).fingerprint.numbers)
    assert numbers.keys() == {".sentiment"}


# Where classes stand


@pytest.mark.parametrize(
    "sample",
    [
        lambda label: (torch.zeros(2), label),
        lambda label: {"x": torch.zeros(2), "gt_label": torch.tensor([label])},
        lambda label: {"x": torch.zeros(2), "meta": {"class": np.uint8(label)}},
        lambda label: ("text", 1.5, float(label)),
    ],
)
def test_classes_that_the_run_logged_are_found_wherever_they_stand(sample):
    class Samples(Dataset):
        def __init__(self, labels):
            self.own = labels

        def __len__(self):
            return len(self.own)

        def __getitem__(self, index):
            return sample(self.own[index])

    def fingerprint(labels):
        return looked_at(Samples(labels), collate_fn=list).fingerprint

    scored = fingerprint(LABELS).of_classes(torch.tensor(LABELS))
    assert len(scored.numbers) == 1
    assert scored.mismatch(fingerprint(LABELS)) is None
    assert scored.mismatch(fingerprint(LABELS[::-1])) == "it has other labels, or the same in another order"


def test_classes_in_another_form_are_not_compared():
    class Samples(Images):
        def __getitem__(self, index):
            label = torch.tensor(LABELS[self.order[index]])
            return {"gt": torch.nn.functional.one_hot(label, 4) if self.transform else label}

    scored = looked_at(Samples(range(80))).fingerprint.of_classes(torch.tensor(LABELS))
    served = looked_at(Samples(range(80), transform=True)).fingerprint
    assert len(scored.numbers) == 1
    assert scored.mismatch(served) is None


# Reading


class Reads(Images):
    """Says where it is read, and how often."""

    def __init__(self, order=tuple(range(80)), length=None):
        super().__init__(order if length is None else order[:length])
        self.reads = []

    def __getitem__(self, index):
        self.reads.append(index)
        return torch.full((2,), float(index)), LABELS[index]


def test_few_samples_are_read_where_labels_are_offered():
    dataset = Reads()
    dataset.targets = LABELS
    looked_at(dataset)
    assert 5 < len(set(dataset.reads)) < 10
    assert len(dataset.reads) < 30


def test_workers_can_be_kept_only_if_no_probe_changes():
    class Rarely(Reads):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + (torch.rand(1) if index == 1 else 0), label

    assert looked_at(Rarely()).changes == "no"
    assert looked_at(Rarely(), num_workers=1, persistent_workers=True).changes == "yes"


@pytest.mark.parametrize("length", [0, 1, 2])
def test_very_small_sets_are_known(length):
    def part(value, label=0):
        return TensorDataset(torch.full((length, 2), value), torch.full((length,), label))

    assert compared(part(1.0), part(1.0))[0] is None
    if length:
        assert "other ones" in compared(part(1.0), part(2.0))[0]
        assert "other labels" in compared(part(1.0), part(1.0, label=1))[0]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_random_states_are_left_as_they_are(workers):
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    class Draws(Images):
        def __getitem__(self, index):
            return torch.rand(1) + random.random() + np.random.rand(), LABELS[index]

    before = states()
    looked_at(Draws(range(80)), num_workers=workers)
    assert states() == before


def test_a_generator_of_its_own_goes_on_as_it_would_have():
    class Own(Images):
        def __init__(self):
            super().__init__(range(80))
            self.generator = np.random.default_rng(0)

        def __getitem__(self, index):
            return self.generator.random(), LABELS[index]

    looked, other = Own(), Own()
    assert looked_at(looked).changes == "yes"
    assert [looked[0] for _ in range(3)] == [other[0] for _ in range(3)]


class OpenedLazily(Images):
    file = None

    def image(self, index):
        self.file = self.file or (os.getpid(), "open")
        return super().image(index)


@pytest.mark.parametrize("workers", [1, 2])
def test_files_are_opened_in_a_worker(workers):
    dataset = OpenedLazily(split(0), LARGE)
    looked_at(dataset, num_workers=workers)
    assert dataset.file is None


class OpenedByWorker(Images):
    file = None

    def __getitem__(self, index):
        if self.file != "open":
            raise RuntimeError("not opened")
        return super().__getitem__(index)


def open_file(worker):
    get_worker_info().dataset.dataset.file = "open"


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_init_fn_meets_the_users_own_dataset(context):
    def part(order):
        return Subset(OpenedByWorker(order, SMALL), range(0, 40, 2))

    settings = {"num_workers": 1, "worker_init_fn": open_file, "multiprocessing_context": context}
    assert looked_at(part(split(0)), **settings).fingerprint.read == "raw"


def test_many_numbers_come_from_a_worker_without_a_file_handle_for_each():
    class Many(Images):
        def __getitem__(self, index):
            return {f"number {key}": index * key for key in range(40)}

    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        assert len(looked_at(Many(range(80)), num_workers=1).fingerprint.numbers) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class Broken(Images):
    def __init__(self, order, broken):
        super().__init__(order, SMALL)
        self.broken = broken

    def image(self, index):
        if index in self.broken:
            raise OSError(f"sample {index} is truncated")
        return super().image(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_nobody_draws_need_not_be_readable(workers):
    def loader(order):
        drawn = SubsetRandomSampler([position for position in range(40) if position not in (0, 12)])
        return DataLoader(Broken(order, {0, 12}), 4, sampler=drawn, num_workers=workers)

    one, same, other = (look_at(loader(split(seed)), "train").fingerprint for seed in (0, 0, 1))
    assert one.mismatch(same) is None
    assert "samples" in one.compared(same)
    assert one.mismatch(other) is not None


def test_labels_are_compared_only_if_all_probes_can_be_read():
    assert compared(Broken(split(0), {0, 12}), Broken(split(0), set()), sampler=range(1, 10)) == (None, set())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_cannot_be_read_says_why(workers):
    with pytest.raises(OSError, match="sample 0 is truncated"):
        looked_at(Broken(split(0), range(40)), num_workers=workers)


def test_a_batch_that_the_dataset_makes_itself_is_read_as_in_training():
    class Batched(Images):
        def __getitems__(self, indices):
            return [super(Batched, self).__getitem__(index) for index in indices]

        def __getitem__(self, index):
            raise AssertionError("a DataLoader reads batches of this")

    assert compared(Batched(split(0), SMALL), Batched(split(0), LARGE)) == (None, {"labels", "samples"})
    assert "other ones" in compared(Batched(split(0), SMALL), Batched(split(1), SMALL))[0]


# Positions that mean nothing


class Queue(Dataset):
    """Ignores its index."""

    def __init__(self, step=7, noise=0.0, size=60):
        self.step, self.noise, self.at, self.size = step, noise, 0, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.at += self.step
        place = self.at % self.size
        return torch.full((2,), float(place)) + self.noise * torch.rand(2), place % 5


class Bare(Queue):
    """Has no labels."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0]


class Any(Queue):
    """Draws any sample, from the global random state."""

    def __getitem__(self, index):
        place = random.randrange(60)
        return torch.full((2,), float(place)), place % 5


class OwnDraw(Queue):
    """Draws any sample, from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index):
        place = int(self.generator.integers(60))
        return torch.full((2,), float(place)), place % 5


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Queue(), r"the (label of the )?sample at position \d+ was"),
        (Queue(noise=1.0, step=1), r"the label of the sample at position \d+ was \d and then \d"),
        (Bare(), r"the sample at position \d+ was the one at position \d+ before"),
        (Any(), r"position 0 gave the samples of others"),
        (OwnDraw(), r"position 0 gave the samples of others"),
    ],
    ids=["queue", "augmented queue", "without labels", "at random", "at random by itself"],
)
def test_a_dataset_that_ignores_its_index_is_refused(dataset, message, workers):
    with pytest.raises(ValueError, match=f"^{type(dataset).__name__}, the train dataset, does not give .*: {message}"):
        looked_at(dataset, num_workers=workers)


class Rotated(Images):
    """Labels are drawn at random, as in self-supervised learning."""

    generator = random

    def __getitem__(self, index):
        turns = self.generator.randrange(4)
        return np.rot90(PIXELS[self.order[index]], turns).copy(), turns


class RotatedByItself(Rotated):
    def __init__(self, order):
        super().__init__(order)
        self.generator = random.Random(0)


class Masked(Images):
    """Masks tokens, and what is to be said of them, by a count of its own."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        tokens = [int(token) for token in PIXELS[self.order[index]].ravel()[:12]]
        masked = [0 if (place + self.reads) % 3 else token for place, token in enumerate(tokens)]
        return masked, [token if mask == 0 else -100 for token, mask in zip(tokens, masked, strict=True)]


class Counted(Images):
    """Says how often it was read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return torch.full((2,), float(index)), LABELS[index], self.reads


class Coarse(Images):
    """Augmentation makes one sample equal to another."""

    def __getitem__(self, index):
        return (index + random.randrange(3)) % 40, LABELS[index]


@pytest.mark.parametrize("kind", [Rotated, RotatedByItself, Masked, Counted, Coarse])
def test_random_samples_at_their_own_positions_are_no_queue(kind):
    assert looked_at(kind(split(0))).changes == "yes"


def test_labels_that_change_are_not_compared():
    fingerprint = looked_at(Rotated(split(0))).fingerprint
    assert (fingerprint.numbers, fingerprint.probe) == ((), "")


def test_samples_that_are_all_alike_are_no_queue():
    alike = TensorDataset(torch.zeros(30, 2), torch.zeros(30))
    assert looked_at(alike).changes == "no"
    assert looked_at(alike, collate_fn=lambda batch: torch.rand(len(batch))).changes == "yes"


# What batches are made of


class Slots:
    """Holds what can't be seen."""

    __slots__ = ("x",)

    def __init__(self, batch):
        self.x = torch.stack([x for x, _ in batch])


def as_object(batch):
    return SimpleNamespace(x=torch.stack([x for x, _ in batch]), y=[y for _, y in batch])


def as_arrays(batch):
    return [[x.numpy() for x, _ in batch], {"y": np.array([y for _, y in batch])}]


@dataclass
class Pair:
    x: torch.Tensor
    y: list


def as_dataclass(batch):
    return Pair(torch.stack([x for x, _ in batch]), [y for _, y in batch])


def in_pairs(batch):
    first, second = batch
    return first, second


@pytest.mark.parametrize(
    ("collate", "fixed"),
    [(None, "no"), (list, "no"), (as_object, "no"), (as_arrays, "no"), (as_dataclass, "no"), (Slots, "unknown"),
     (in_pairs, "unknown")],
)  # fmt: skip
def test_augmentation_is_noticed_whatever_a_batch_is_made_of(collate, fixed):
    class Points(Images):
        noise = 0.0

        def __getitem__(self, index):
            return torch.full((2,), float(index)) + self.noise * torch.rand(2), LABELS[index]

    dataset = Points(range(80))
    assert looked_at(dataset, collate_fn=collate).changes == fixed
    dataset.noise = 1.0
    assert looked_at(dataset, collate_fn=collate).changes in ("yes", "unknown")
    assert (looked_at(dataset, collate_fn=collate).changes == "yes") == (collate is not Slots)


def test_a_list_that_the_dataset_keeps_is_left_as_it_is():
    class Kept(Images):
        def __init__(self):
            super().__init__(range(80))
            self.kept = {}

        def __getitems__(self, indices):
            return self.kept.setdefault(tuple(indices), [(torch.zeros(2), index) for index in indices])

    dataset = Kept()
    looked_at(dataset)
    assert all(len(batch) == 1 for batch in dataset.kept.values())


# The comparison


def scores_of(dataset, **loader):
    fingerprint = looked_at(dataset, **loader).fingerprint
    return CLDScores(torch.linspace(1, -1, len(dataset)), fingerprint=fingerprint)


def compared_with(scores, dataset, make_view=None):
    return compare(scores.fingerprint, DataLoader(dataset, batch_size=4), make_view)


def test_a_view_stands_in_where_transforms_cannot_be_left_out():
    def view(order):
        return lambda: DataLoader(Hidden(order, SMALL), batch_size=4)

    scores = scores_of(Hidden(split(0), SMALL))
    assert compared_with(scores, Hidden(split(0), LARGE), view(split(0))) == (None, None)
    assert "other ones" in compared_with(scores, Hidden(split(0), LARGE), view(split(1))).problem
    assert "not its samples" in compared_with(scores, Hidden(split(0), LARGE)).doubt


def test_a_view_is_made_only_where_it_is_needed():
    def view():
        raise AssertionError("not needed")

    assert compared_with(scores_of(Images(split(0), SMALL)), Images(split(0), LARGE), view) == (None, None)


@pytest.mark.parametrize(("positions", "said"), [(range(40), True), (list(range(39, -1, -1)), False)])
def test_positions_in_a_row_alone_do_not_tell_samples(positions, said):
    """A pool may be shuffled anew in each run before its first part is taken."""
    dataset = Subset(Hidden(split(0), LARGE), positions)
    comparison = compared_with(scores_of(dataset), dataset)
    assert comparison.problem is None
    assert (comparison.doubt is not None) == said


POINTS = TensorDataset(torch.arange(24.0).reshape(12, 2), torch.arange(12) % 3)


class ReadOnly(Dataset):
    """Offers nothing without being read."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.inner[index]


@pytest.mark.parametrize("file", ["former-offered-labels.npz", "former-read-labels.npz"])
@pytest.mark.parametrize("wrap", [lambda dataset: dataset, ReadOnly])
def test_scores_of_the_former_version_are_compared_as_it_did_and_a_warning_says_so(file, wrap):
    scores = CLDScores.load(Path(__file__).parent / file)
    comparison = compared_with(scores, wrap(POINTS))
    assert comparison.problem is None
    assert "only the length and the labels" in comparison.doubt
    assert "earlier version" in comparison.doubt
    reordered = Subset(POINTS, range(11, -1, -1))
    assert "other labels" in compared_with(scores, wrap(reordered)).problem


def test_former_scores_are_saved_again_as_they_were(tmp_path):
    scores = CLDScores.load(Path(__file__).parent / "former-offered-labels.npz")
    scores.save(tmp_path / "scores.npz")
    assert CLDScores.load(tmp_path / "scores.npz").fingerprint == scores.fingerprint


# Folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    roots = [tmp_path_factory.mktemp("here") / "data", tmp_path_factory.mktemp("there") / "more" / "data"]
    for root in roots:
        for position, label in enumerate(LABELS):
            path = root / f"class {label}" / f"{position:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PIXELS[position]).save(path)
    return roots


def test_an_image_folder_is_known_wherever_it_stands(folders, monkeypatch):
    here, there = folders
    monkeypatch.chdir(here.parent)
    expected = (None, {"labels", "files", "samples"})
    assert compared(ImageFolder(here, SMALL), ImageFolder(there, LARGE)) == expected
    assert compared(ImageFolder("./data", SMALL), ImageFolder(str(there), LARGE)) == expected


def test_an_image_folder_with_a_renamed_file_in_each_class_is_another(folders, tmp_path):
    here, _ = folders
    before = looked_at(ImageFolder(here)).fingerprint
    for source in here.glob("*/*.png"):
        name = source.name if int(source.stem) % 20 else f"z{source.name}"
        target = tmp_path / source.parent.name / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    renamed = looked_at(ImageFolder(tmp_path)).fingerprint
    assert renamed.labels == before.labels
    assert before.mismatch(renamed) == "it has files of other names, or the same in another order"


# Memory

MEMORY = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
from lightning_cld.data.identity import look_at

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

class Volumes(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"image": torch.full((self.size,), float(index)), "label": torch.ones(self.size // 4, dtype=torch.uint8)}

collate = eval(sys.argv[1])
look_at(DataLoader(Volumes(1000), 4, collate_fn=collate), "train")
before = peak()
look_at(DataLoader(Volumes(2**22), 4, collate_fn=collate), "train")
print((peak() - before) / (2**24 + 2**20))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory that Linux tells")
@pytest.mark.parametrize(
    ("collate", "samples"),
    [
        ("None", 2.0),
        # Two samples make a batch, to see whether it keeps their order.
        ("list", 3.0),
        ("lambda batch: torch.utils.data.default_collate(batch)", 6.0),
    ],
    ids=["default", "list", "custom"],
)
def test_a_look_holds_few_samples_at_once(collate, samples):
    command = [sys.executable, "-c", MEMORY, collate]
    # Or glibc keeps some of what is freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert float(result.stdout) < samples


# Samples that are hard to tell apart


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def one_hot(place):
    """The same number of ones of each kind in each row of a piece, in another order."""
    generator = torch.Generator().manual_seed(place)
    return torch.eye(4).repeat(50, 1)[torch.randperm(200, generator=generator)]


def after_many(place):
    return {**{f"a{number}": 1.0 for number in range(80)}, "b": (-1.0) ** place}


MADE = {
    "one-hot": one_hot,
    "behind many floats": after_many,
    "paths": lambda place: f"/data/p{place:03}/scan.nii",
    "path objects": lambda place: Path(f"/data/p{place:03}/scan.nii"),
}


def dataset_of(make, order):
    return ReadOnly([(make(place), place // 20) for place in order])


def comparison(make, first, second):
    scored = look_at(DataLoader(dataset_of(make, first), 8), "train").fingerprint
    return compare(scored, DataLoader(dataset_of(make, second), 8))


@pytest.mark.parametrize("name", MADE)
def test_samples_that_differ_in_little_are_told_apart(name):
    order = range(80)
    assert comparison(MADE[name], order, order) == (None, None)
    within_classes = [place ^ 1 for place in order]
    assert "other ones, in another order" in comparison(MADE[name], order, within_classes).problem


def test_the_folder_that_all_paths_share_may_be_another_one():
    here, there = (lambda place, top=top: f"{top}/p{place:03}/scan.nii" for top in ("/data", "/mnt/of/others"))
    scored = look_at(DataLoader(dataset_of(here, range(80)), 8), "train").fingerprint
    assert compare(scored, DataLoader(dataset_of(there, range(80)), 8)) == (None, None)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Slotted, "Something in these is of a type that can't be compared"),
        (lambda place: torch.eye(3).to_sparse() * place, "Something in these is of a type that can't be compared"),
        (lambda place: "alike", "What can be compared of these is alike in all of them"),
    ],
    ids=["slots", "sparse", "alike"],
)
def test_samples_that_are_known_in_part_leave_a_doubt(make, why):
    order = range(80) if why.startswith("Some") else range(20)  # labels tell samples of several classes apart
    found = comparison(make, order, order)
    assert found.problem is None
    assert why in found.doubt
