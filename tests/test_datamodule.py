import copy
import pickle
import warnings
from collections import Counter, OrderedDict
from functools import partial
from typing import NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
    random_split,
)
from torchvision.datasets import FakeData
from toys import CLASSES, Blobs, Classifier, blobs, fit, quiet_trainer

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule, IndexedDataset, select_top
from lightning_cld.data.identity import look_at
from lightning_cld.data.samplers import FullLengthSampler


def scores_of(dataset: Dataset) -> CLDScores:
    """Random scores with the labels of `dataset`, as if from a run on it."""
    labels = torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])
    return CLDScores(torch.rand(len(labels), generator=torch.Generator().manual_seed(1)), labels)


def served(datamodule: L.LightningDataModule) -> list[tuple[tuple[float, ...], int]]:
    """All samples from one pass over the train dataloader, sorted."""
    return sorted(
        (tuple(inputs.tolist()), int(label))
        for batch in datamodule.train_dataloader()
        for inputs, label in zip(*batch[:2], strict=True)
    )


def samples(dataset: Dataset, indices) -> list[tuple[tuple[float, ...], int]]:
    return sorted((tuple(dataset[i][0].tolist()), int(dataset[i][1])) for i in indices)


# The right samples, end to end


class Indexed(Dataset):
    """Samples that carry their position."""

    def __init__(self, length=150):
        self.labels = torch.randint(3, (length,), generator=torch.Generator().manual_seed(3))
        self.points = blobs(length, seed=4).tensors[0]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.points[index], int(self.labels[index]), index


class Unlabelled(Dataset):
    """Hides the labels of the wrapped dataset, and may add noise as augmentation does."""

    def __init__(self, inner, noise=0.0):
        self.inner = inner
        self.noise = noise

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        inputs, *rest = self.inner[index]
        return (inputs + self.noise * torch.randn_like(inputs), *rest)


class RandomlySplit(L.LightningDataModule):
    def setup(self, stage):
        seeded = torch.Generator().manual_seed(5)
        self.train, self.val = random_split(Indexed(), [110, 40], generator=seeded)

    def train_dataloader(self):
        return DataLoader(self.train, 16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 16)


class NestedSubsets(RandomlySplit):
    def setup(self, stage):
        super().setup(stage)
        self.train = Subset(Subset(self.train, list(range(100, 4, -1))), list(range(0, 90, 2)) + list(range(1, 91, 2)))


class UnaugmentedView(RandomlySplit):
    def train_dataloader(self):
        return DataLoader(Unlabelled(self.train, noise=1.0), 16, shuffle=True, num_workers=2)

    def cld_train_dataloader(self):
        return DataLoader(self.train, 32)


class Hidden(RandomlySplit):
    def train_dataloader(self):
        return DataLoader(Unlabelled(self.train), 16, shuffle=True)


class Concatenated(RandomlySplit):
    def setup(self, stage):
        super().setup(stage)
        self.train = ConcatDataset([self.train, Indexed(30)])


@pytest.mark.parametrize("datamodule", [RandomlySplit, NestedSubsets, UnaugmentedView, Hidden, Concatenated])
def test_labels_of_the_served_coreset_are_those_of_the_chosen_positions(tmp_path, datamodule):
    cld = CLDCallback(dirpath=tmp_path)
    fit(tmp_path, cld, datamodule=datamodule(), max_epochs=3)

    coreset = CoresetDataModule(datamodule(), cld.scores_path, fraction=0.3)
    coreset.setup("fit")
    origin = {position: int(coreset.train[position][2]) for position in coreset.indices}
    batches = list(coreset.train_dataloader())
    ids, labels = torch.cat([b[2] for b in batches]).tolist(), torch.cat([b[1] for b in batches]).tolist()

    assert len(ids) == round(0.3 * len(coreset.train))
    assert Counter(ids) == Counter(origin.values())
    assert labels == Indexed().labels[ids].tolist() or datamodule is Concatenated
    assert [int(cld.scores.classes[p]) for p in coreset.indices] == [coreset.train[p][1] for p in coreset.indices]


def test_the_best_of_each_class_are_served(tmp_path):
    data = Blobs()
    scores = scores_of(data.train_set)
    coreset = CoresetDataModule(data, scores, per_class=4)
    best = [
        position
        for label in range(CLASSES)
        for position in sorted(
            (i for i in range(len(scores)) if scores.classes[i] == label), key=lambda i: -scores.values[i].item()
        )[:4]
    ]
    assert coreset.indices == sorted(best)
    assert served(coreset) == samples(data.train_set, best)


def test_a_target_trains_on_the_coreset(tmp_path):
    data = Blobs()
    trainer, _ = fit(tmp_path, None, datamodule=CoresetDataModule(data, scores_of(data.train_set), size=32))
    assert trainer.global_step == 2 * 4


# Forms of a coreset


def reversed_view(positions):
    return np.array(positions[::-1])[::-1]


def frozen(positions):
    array = np.array(positions)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        reversed_view,
        frozen,
        partial(np.array, dtype=">i8"),
        partial(np.array, dtype=object),
    ],
)
def test_bare_positions_are_served_as_they_are(kind):
    data = Blobs(shuffle=False)
    coreset = CoresetDataModule(data, kind([7, 3, 50]))
    assert coreset.indices == [7, 3, 50]
    assert torch.cat([b[1] for b in coreset.train_dataloader()]).tolist() == [
        int(data.train_set[i][1]) for i in (7, 3, 50)
    ]


def test_a_random_baseline_is_balanced_like_the_coreset():
    data = Blobs()
    scores = scores_of(data.train_set)
    random = CoresetDataModule(data, select_top(torch.rand(len(scores)), scores.classes, fraction=0.2))
    chosen = CoresetDataModule(data, scores, fraction=0.2)
    assert Counter(scores.classes[random.indices].tolist()) == Counter(scores.classes[chosen.indices].tolist())


@pytest.mark.parametrize(
    ("coreset", "budget", "error", "message"),
    [
        ([1, 2], {"fraction": 0.1}, TypeError, "take no budget"),
        ([1, 2, 2], {}, ValueError, r"must not repeat, but 1 do \(\[2\]\)"),
        ([-1, 2], {}, ValueError, "negative, got -1"),
        ([], {}, (ValueError, TypeError), "empty|whole numbers"),
        ([1.5], {}, TypeError, "whole numbers"),
        ([[1, 2]], {}, TypeError, r"shape \[1, 2\]"),
        ([True, False], {}, TypeError, "nonzero"),
        (np.ma.array([1, 2, 3], mask=[0, 1, 0]), {}, TypeError, "whole numbers, got a masked array"),
        ("nowhere.npz", {"fraction": 0.1}, FileNotFoundError, "nowhere.npz"),
        (None, {}, TypeError, "exactly one budget"),
        (None, {"fraction": 0.1, "size": 3}, TypeError, "exactly one budget"),
        (None, {"fraction": 1.5}, ValueError, r"\(0, 1\]"),
        (None, {"size": 91}, ValueError, "more than the 90 samples"),
        (None, {"per_class": 89}, ValueError, "needs 89"),
        (None, {"size": 5, "epoch_length": "half"}, ValueError, '"coreset" or "full"'),
    ],
)
def test_bad_coresets_raise_when_they_are_given(coreset, budget, error, message):
    data = Blobs()
    with pytest.raises(error, match=message):
        CoresetDataModule(data, scores_of(data.train_set) if coreset is None else coreset, **budget)


def test_what_is_not_a_datamodule_is_refused():
    with pytest.raises(TypeError, match="Subset"):
        CoresetDataModule(Blobs().train_dataloader(), [1])
    with pytest.raises(TypeError, match=r"Give the `\.scores` of a CLDCallback"):
        CoresetDataModule(Blobs(), CLDCallback())
    with pytest.raises(TypeError, match="no train_dataloader"):
        CoresetDataModule(L.LightningDataModule(), [1])


def test_positions_beyond_the_train_set_are_refused():
    with pytest.raises(ValueError, match="Position 90 is outside of the train set of 90 samples"):
        CoresetDataModule(Blobs(), [3, 90]).train_dataloader()


# The dataset of the scores, or an error


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (lambda train: Subset(train, range(89)), "it has 89 samples, not 90"),
        (lambda train: Subset(train, range(89, -1, -1)), "another order"),
        (lambda train: TensorDataset(torch.rand(90, 4), torch.randint(3, (90,))), "other labels"),
    ],
)
def test_scores_of_another_dataset_are_refused(other, problem, hide):
    data = Blobs()
    scores = scores_of(data.train_set)
    data.train_set = Unlabelled(other(data.train_set)) if hide else other(data.train_set)
    with pytest.raises(ValueError, match=rf"not of this train set: .*{problem}.*generator"):
        CoresetDataModule(data, scores, fraction=0.1).train_dataloader()


def test_an_unseeded_split_is_noticed():
    class Unseeded(RandomlySplit):
        def setup(self, stage):
            self.train, self.val = random_split(Indexed(), [110, 40])

    first = Unseeded()
    first.setup("fit")
    scores = scores_of(first.train)
    second = CoresetDataModule(Unseeded(), scores, fraction=0.1)
    second.setup("fit")
    with pytest.raises(ValueError, match="generator"):
        second.train_dataloader()


@pytest.mark.parametrize("hide", [False, True])
def test_the_numbers_of_a_regression_tell_datasets_apart(hide):
    class Regression(Blobs):
        def __init__(self, seed):
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            points = TensorDataset(torch.rand(120, 4, generator=generator), torch.rand(120, generator=generator))
            self.train_set = Unlabelled(points) if hide else points

    scored = Regression(0)
    fingerprint = look_at(scored.train_dataloader(), "train").fingerprint
    scores = CLDScores(torch.rand(120), fingerprint=fingerprint)
    assert len(CoresetDataModule(Regression(0), scores, size=16).train_dataloader()) == 1
    with pytest.raises(ValueError, match="not of this train set"):
        CoresetDataModule(Regression(1), scores, size=16).train_dataloader()


def test_a_dataset_that_tells_no_labels_is_served_with_a_warning():
    class Inputs(Blobs):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.rand(90, 4)), 16)

    with pytest.warns(UserWarning, match="could compare only the length of the train set"):
        CoresetDataModule(Inputs(), CLDScores(torch.rand(90)), size=16).train_dataloader()


def test_scores_that_know_no_labels_are_served_with_a_warning():
    with pytest.warns(UserWarning, match="could compare only the length of the train set"):
        CoresetDataModule(Blobs(), CLDScores(torch.rand(90)), size=16).train_dataloader()


def mixing(batch):
    """Mixes the labels of a batch as MixUp does, so that they no longer belong to single samples."""
    inputs, labels = torch.utils.data.default_collate(batch)
    mixed = torch.nn.functional.one_hot(labels, CLASSES).float()
    return inputs, 0.7 * mixed + 0.3 * mixed.roll(1, dims=0)


@pytest.mark.parametrize("hide", [False, True])
def test_labels_are_those_of_samples_whatever_the_batches_make_of_them(hide):
    data = Blobs(collate_fn=mixing)
    scores = scores_of(data.train_set)
    if hide:
        data.train_set = Unlabelled(data.train_set)
    assert len(CoresetDataModule(data, scores, size=16).train_dataloader().dataset) == 16


class Batched(Unlabelled):
    def __getitems__(self, indices):
        return self.inner[indices]


def test_labels_of_batches_that_the_dataset_makes_itself_are_known():
    points = blobs()
    known, read = (look_at(DataLoader(part), "train").fingerprint for part in (points, Batched(points)))
    assert "labels" in known.compared(read)
    assert known.mismatch(read) is None


def test_numbers_that_differ_in_their_precision_alone_are_the_same():
    numbers = torch.rand(40, dtype=torch.float64)
    points = TensorDataset(torch.rand(40, 4), numbers.float())
    points.targets = numbers.tolist()
    known, read = (look_at(DataLoader(part), "train").fingerprint for part in (points, Unlabelled(points)))
    assert known.mismatch(read) is None
    assert "labels" in known.compared(read)


def test_checking_the_dataset_draws_no_random_numbers():
    data = Blobs()
    scores = scores_of(data.train_set)
    data.train_set = Unlabelled(data.train_set, noise=1.0)
    coreset = CoresetDataModule(data, scores, fraction=0.1)
    before = torch.get_rng_state()
    coreset.train_dataloader()
    assert torch.equal(before, torch.get_rng_state())


def test_torchvision_datasets_are_known_by_their_targets():
    class Images(L.LightningDataModule):
        images = FakeData(40, (3, 8, 8), 4, transform=lambda image: torch.zeros(3))

        def train_dataloader(self):
            return DataLoader(self.images, 8)

    scores = scores_of(Images.images)
    assert len(CoresetDataModule(Images(), scores, fraction=0.5).train_dataloader().dataset) == 20


class Drawn(Blobs):
    """Trains on as many samples of each class as of any, class after class: for each seed other ones, equal labels.

    Args:
        seed: Of the draw.
        hide: Whether nothing is known of the train set without reading it.
        noise: Of the augmentation.
        key: Where samples have their labels; None for pairs.
    """

    def __init__(self, seed, hide=False, noise=0.0, key=None):
        super().__init__()
        pool, generator = blobs(300), torch.Generator().manual_seed(seed)
        places = [(pool.tensors[1] == label).nonzero().flatten() for label in range(CLASSES)]
        drawn = torch.cat([place[torch.randperm(len(place), generator=generator)[:30]] for place in places])
        self.train_set = Subset(pool, drawn.tolist())
        if hide:
            self.train_set = Unlabelled(TensorDataset(*pool[drawn]), noise)
        if key is not None:
            self.train_set, self.val_set = Named(self.train_set, key), Named(self.val_set, key)


class Named(Dataset):
    def __init__(self, inner, key):
        self.inner, self.key = inner, key

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        inputs, label = self.inner[index]
        return {"inputs": inputs, self.key: label}


class NamedStep(Classifier):
    def training_step(self, batch, batch_idx):
        return self.cld_step(batch)[0].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def cld_step(self, batch):
        key = next(key for key in batch if key != "inputs")
        return torch.nn.functional.cross_entropy(self(batch["inputs"]), batch[key], reduction="none"), batch[key]


def run_of(tmp_path, data, module=Classifier):
    cld = CLDCallback(dirpath=tmp_path)
    fit(tmp_path, cld, module, data)
    return tmp_path / "cld-scores.npz"


@pytest.mark.parametrize("hide", [False, True])
def test_other_samples_with_the_same_labels_are_refused(tmp_path, hide):
    scores = run_of(tmp_path, Drawn(0, hide))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(CoresetDataModule(Drawn(0, hide), scores, size=16).train_dataloader().dataset) == 16
    with pytest.raises(ValueError, match=r"not of this train set: .*scores\.select"):
        CoresetDataModule(Drawn(1, hide), scores, size=16).train_dataloader()


@pytest.mark.filterwarnings("ignore:.*shows the same sample differently.*")
def test_samples_that_cannot_be_compared_are_served_with_one_warning(tmp_path):
    coreset = CoresetDataModule(Drawn(0, hide=True, noise=1.0), run_of(tmp_path, Drawn(0, True, 1.0)), size=16)
    with pytest.warns(UserWarning, match="could compare only the length and the labels of the train set.*seed what"):
        coreset.train_dataloader()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coreset.train_dataloader()


@pytest.mark.parametrize("key", ["label", "sentiment"])
def test_labels_are_compared_under_whatever_name_the_run_found_them(tmp_path, key):
    scores = run_of(tmp_path, Drawn(0, hide=True, key=key), NamedStep)
    other = Drawn(0, hide=True, key=key)
    assert len(CoresetDataModule(other, scores, size=16).train_dataloader().dataset) == 16
    other.train_set = Subset(other.train_set, range(89, -1, -1))
    with pytest.raises(ValueError, match="it has other labels, or the same in another order"):
        CoresetDataModule(other, scores, size=16).train_dataloader()


def test_a_small_proxy_scores_for_a_large_target(tmp_path):
    """Both from one datamodule, each with its own size, the target with augmentation."""

    class Pictures(Dataset):
        def __init__(self, seed, transform):
            self.pixels = torch.randint(256, (90, 3, 12, 12), generator=torch.Generator().manual_seed(seed))
            self.transform = transform

        def __len__(self):
            return 90

        def __getitem__(self, index):
            return self.transform(self.pixels[index]), index % CLASSES

    class PicturesModule(L.LightningDataModule):
        def __init__(self, seed, transform):
            super().__init__()
            self.train_set = Pictures(seed, transform)

        def train_dataloader(self):
            return DataLoader(self.train_set, 16, shuffle=True)

        def val_dataloader(self):
            return DataLoader(self.train_set, 16)

    class Flat(Classifier):
        def forward(self, inputs):
            return self.net(inputs.flatten(1)[:, :4])

    def small(image):
        return image[:, ::4, ::4] / 255

    def large(image):
        return image / 255 + torch.rand(())

    scores = run_of(tmp_path, PicturesModule(0, small), Flat)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CoresetDataModule(PicturesModule(0, large), scores, size=16).train_dataloader()
    with pytest.raises(ValueError, match="some of its samples are other ones"):
        CoresetDataModule(PicturesModule(1, large), scores, size=16).train_dataloader()


def test_the_train_set_is_checked_whenever_its_loader_is_made(tmp_path):
    data = Drawn(0)
    coreset = CoresetDataModule(data, run_of(tmp_path, Drawn(0)), size=16)
    coreset.train_dataloader()
    data.train_set = Drawn(1).train_set
    with pytest.raises(ValueError, match="not of this train set"):
        coreset.train_dataloader()


# The user's loader settings are kept


def collate(batch):
    return torch.utils.data.default_collate(batch)


def start_worker(worker):
    get_worker_info().dataset.shard = 100 + worker


class Sharded(Dataset):
    """Each sample is what its worker was told at its start."""

    shard = 0

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return self.shard, index % 2


def test_workers_begin_with_the_users_own_dataset():
    data = Blobs(shuffle=False, num_workers=2, worker_init_fn=start_worker)
    data.train_set = Sharded()
    loader = CoresetDataModule(data, list(range(18))).train_dataloader()
    assert {int(shard) for shards, _ in loader for shard in shards} == {100, 101}


def test_settings_of_the_loader_are_kept():
    generator = torch.Generator().manual_seed(9)
    settings = {
        "batch_size": 7,
        "num_workers": 2,
        "collate_fn": collate,
        "pin_memory": False,
        "drop_last": True,
        "timeout": 30,
        "worker_init_fn": start_worker,
        "prefetch_factor": 3,
        "persistent_workers": True,
        "generator": generator,
    }
    data = Blobs(**settings)
    loader = CoresetDataModule(data, scores_of(data.train_set), size=30).train_dataloader()
    start = settings.pop("worker_init_fn")
    assert {name: getattr(loader, name) for name in settings} == settings
    assert loader.worker_init_fn.start is start
    assert isinstance(loader.sampler, RandomSampler)
    assert len(loader) == 4


def test_the_generator_of_a_sampler_is_kept():
    generator = torch.Generator().manual_seed(9)
    data = with_sampler(lambda train: RandomSampler(train, generator=generator))
    assert CoresetDataModule(data, range(16)).train_dataloader().sampler.generator is generator


def test_full_epochs_follow_the_seed():
    def first_pass(seed):
        torch.manual_seed(seed)
        return list(CoresetDataModule(Blobs(), range(20), epoch_length="full").train_dataloader().sampler)

    assert first_pass(1) == first_pass(1) != first_pass(2)


def test_order_is_kept():
    data = Blobs(shuffle=False)
    loader = CoresetDataModule(data, scores_of(data.train_set), size=30).train_dataloader()
    assert isinstance(loader.sampler, SequentialSampler)


def with_sampler(make):
    class Sampled(Blobs):
        def train_dataloader(self):
            return DataLoader(self.train_set, 16, sampler=make(self.train_set))

    return Sampled()


def test_weights_follow_the_subset():
    weights = torch.arange(90, dtype=torch.double)
    data = with_sampler(lambda train: WeightedRandomSampler(weights, 180))
    sampler = CoresetDataModule(data, [80, 2, 40]).train_dataloader().sampler
    assert sampler.weights.tolist() == [80, 2, 40]
    assert sampler.num_samples == 6
    full = CoresetDataModule(data, [80, 2, 40], epoch_length="full").train_dataloader().sampler
    assert full.num_samples == 180


def test_a_subset_sampler_serves_only_its_own_positions():
    data = with_sampler(lambda train: SubsetRandomSampler(range(0, 50)))
    assert served(CoresetDataModule(data, [3, 49])) == samples(data.train_set, [3, 49])
    with pytest.raises(ValueError, match=r"does not draw 1 positions .*\(\[50\]\).* may be validation samples"):
        CoresetDataModule(data, [3, 50]).train_dataloader()


def test_a_distributed_sampler_is_made_anew():
    data = with_sampler(lambda train: DistributedSampler(train, 2, 1, shuffle=False))
    sampler = CoresetDataModule(data, [5, 6, 7, 8]).train_dataloader().sampler
    assert list(sampler) == [1, 3]


class Strange(SequentialSampler):
    pass


class Ready(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda train: DataLoader(train, sampler=Strange(train)), "Strange.*unknown"),
        (
            lambda train: DataLoader(train, batch_sampler=BatchSampler(Strange(train), 4, False)),
            "Strange|batch sampler",
        ),
        (lambda train: DataLoader(train, batch_sampler=[[0, 1]]), "batch sampler"),
        (lambda train: DataLoader(Ready()), "IterableDataset"),
        (lambda train: [DataLoader(train), DataLoader(train)], r"list.*\{0: \.\.\., 1: None\}"),
        (lambda train: DataLoader(train, batch_size=None), "batch_size=None"),
    ],
)
def test_loaders_that_cannot_be_narrowed_are_refused(loader, message):
    data = type("Custom", (Blobs,), {"train_dataloader": lambda self: loader(self.train_set)})()
    with pytest.raises(TypeError, match=message):
        CoresetDataModule(data, [0, 1]).train_dataloader()


class Compatible(DataLoader):
    pass


class Incompatible(DataLoader):
    def __init__(self, path):
        super().__init__(blobs(), 16)


def test_loader_subclasses_are_kept_or_refused():
    data = type("Custom", (Blobs,), {"train_dataloader": lambda self: Compatible(self.train_set, 16)})()
    assert type(CoresetDataModule(data, [0, 1]).train_dataloader()) is Compatible
    data = type("Custom", (Blobs,), {"train_dataloader": lambda self: Incompatible("x")})()
    with pytest.raises(TypeError, match="Incompatible is not made from a dataset"):
        CoresetDataModule(data, [0, 1]).train_dataloader()


class Halving(DataLoader):
    def __init__(self, dataset, batch_size=1, **others):
        super().__init__(dataset, batch_size // 2, **others)


class Wrapping(DataLoader):
    def __init__(self, dataset, *arguments, collate_fn=None, **others):
        inner = collate_fn or torch.utils.data.default_collate
        super().__init__(dataset, *arguments, collate_fn=lambda samples: inner(samples), **others)


class Numbering(DataLoader):
    def __init__(self, dataset, *arguments, **others):
        super().__init__(IndexedDataset(dataset), *arguments, **others)


@pytest.mark.parametrize(
    ("kind", "changed"), [(Halving, "batch size"), (Wrapping, "collate_fn"), (Numbering, "dataset")]
)
def test_a_loader_whose_constructor_changes_what_it_is_given_is_refused(kind, changed):
    data = type("Custom", (Blobs,), {"train_dataloader": lambda self: kind(self.train_set, 16)})()
    with pytest.raises(TypeError, match=f"{kind.__name__} can't be made again .*changes the {changed}.*Do that before"):
        CoresetDataModule(data, [0, 1]).train_dataloader()


@pytest.mark.parametrize("length", ["coreset", "full"])
@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (SequentialSampler(range(10)), "SequentialSampler draws from 10 samples, but its dataset has 90"),
        (RandomSampler(range(10)), "RandomSampler draws from 10 samples"),
        (DistributedSampler(range(10), 1, 0), "DistributedSampler draws from 10 samples"),
        (
            WeightedRandomSampler([1.0] * 10, 10),
            "has 10 weights, but its dataset has 90 samples. Give a weight for each",
        ),
        (SubsetRandomSampler([*range(90), 3, 4]), "repeats 2 positions.*WeightedRandomSampler"),
    ],
    ids=["in order", "random", "distributed", "weighted", "repeated"],
)
def test_samplers_of_something_else_than_the_dataset_are_refused(sampler, message, length):
    data = Blobs(shuffle=None, sampler=sampler)
    with pytest.raises(ValueError, match=message):
        CoresetDataModule(data, [3, 30, 35], epoch_length=length).train_dataloader()
    scores = CLDScores(torch.rand(90), plausibility=torch.ones(90))
    with pytest.raises(ValueError, match=message):
        CoresetDataModule(data, scores, size=20, rule="random", redraw=True, epoch_length=length).train_dataloader()


def test_a_train_set_without_a_length_is_refused():
    data = Blobs(shuffle=None, sampler=SequentialSampler(range(20)))
    data.train_set = type("Endless", (Dataset,), {"__getitem__": lambda self, index: (index, 0)})()
    with pytest.raises(TypeError, match=r"Endless has no __len__.*Give it one"):
        CoresetDataModule(data, [0, 1]).train_dataloader()


class Mixing(DataLoader):
    def __init__(self, dataset, batch_size=1, *, mixup=0.0, **others):
        super().__init__(dataset, batch_size, **others)
        self.mixup = mixup


class Forgetful(DataLoader):
    def __init__(self, dataset, batch_size=1, mixup=0.0, **others):
        super().__init__(dataset, batch_size, **others)


def test_a_loader_subclass_keeps_its_own_arguments_or_is_refused():
    data = type("Custom", (Blobs,), {"train_dataloader": lambda self: Mixing(self.train_set, 16, mixup=0.8)})()
    assert CoresetDataModule(data, [0, 1]).train_dataloader().mixup == 0.8
    data = type("Custom", (Blobs,), {"train_dataloader": lambda self: Forgetful(self.train_set, 16, 0.8)})()
    with pytest.raises(TypeError, match=r"Forgetful can't be made again .*mixup can't be read.*attributes"):
        CoresetDataModule(data, [0, 1]).train_dataloader()


def test_a_coreset_smaller_than_a_dropped_batch_is_refused():
    data = Blobs(drop_last=True)
    with pytest.raises(
        ValueError, match=r"draws 2 of .* 2 samples on each device. With drop_last=True that gives no batch of 16"
    ):
        CoresetDataModule(data, [0, 1]).train_dataloader()


def test_what_the_sampler_draws_decides_whether_a_dropped_batch_is_all():
    few = Blobs(drop_last=True, shuffle=None, sampler=RandomSampler(range(90), num_samples=18))
    with pytest.raises(ValueError, match="An epoch draws 8 of the coreset's 40 samples"):
        CoresetDataModule(few, range(40)).train_dataloader()
    many = Blobs(drop_last=True, shuffle=None, sampler=WeightedRandomSampler(torch.ones(90), 900))
    assert len(CoresetDataModule(many, range(10)).train_dataloader()) == 6


# epoch_length="full"


def test_full_epochs_take_as_many_steps_as_the_full_set(tmp_path):
    data = Blobs()
    whole, _ = fit(tmp_path, None, datamodule=Blobs())
    coreset, _ = fit(tmp_path, None, datamodule=CoresetDataModule(data, range(20), epoch_length="full"))
    assert coreset.global_step == whole.global_step


@pytest.mark.parametrize("shuffle", [True, False])
def test_full_epochs_are_whole_passes_and_a_fresh_draw(shuffle):
    sampler = FullLengthSampler(20, 90, shuffle=shuffle)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == 90
        for start in range(0, 80, 20):
            assert sorted(drawn[start : start + 20]) == list(range(20))
        assert len(set(drawn[80:])) == 10
        epochs.append(drawn)
    assert epochs[0] != epochs[1]
    assert set(epochs[0][80:]) != set(epochs[1][80:])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_one_draw(ranks):
    shares = [list(FullLengthSampler(20, 90, shuffle=True, num_replicas=ranks, rank=rank)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    together = [position for drawn in zip(*shares, strict=True) for position in drawn]
    assert together[:90] == list(FullLengthSampler(20, 90, shuffle=True))


def test_full_epochs_differ_in_training(tmp_path):
    class Sees(Classifier):
        def __init__(self):
            super().__init__()
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append((self.current_epoch, batch[1].tolist()))
            return super().training_step(batch, batch_idx)

    _, module = fit(tmp_path, None, Sees, CoresetDataModule(Blobs(), range(20), epoch_length="full"), max_epochs=2)
    first, second = ([labels for epoch, labels in module.seen if epoch == e] for e in (0, 1))
    assert first != second


# Everything else is passed on to the inner datamodule


class Full(Blobs):
    """Overrides every hook of a datamodule and records the calls."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 5})
        self.calls = []
        self.prepare_data_per_node = False

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(f"setup {type(self.trainer).__name__}")

    def teardown(self, stage):
        self.calls.append("teardown")

    def state_dict(self):
        return {"position": 3}

    def load_state_dict(self, state):
        self.calls.append(f"state {state['position']}")

    def on_exception(self, exception):
        self.calls.append(f"exception {exception}")

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.calls.append("transfer")
        return batch


def test_hooks_of_the_inner_datamodule_run(tmp_path):
    inner = Full()
    coreset = CoresetDataModule(inner, range(16))
    trainer, _ = fit(tmp_path, None, datamodule=coreset, max_epochs=1)
    assert inner.calls[:2] == ["prepare_data", "setup Trainer"]
    assert inner.calls[-1] == "teardown"
    assert inner.calls.count("transfer") == 1 + 2  # one train batch, two validation batches
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    fit(tmp_path, None, datamodule=coreset, ckpt_path=tmp_path / "one.ckpt", max_epochs=1)
    assert "state 3" in inner.calls


def test_exceptions_reach_the_inner_datamodule(tmp_path):
    class Dies(Classifier):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("stop")

    inner = Full()
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, None, Dies, CoresetDataModule(inner, range(16)))
    assert "exception stop" in inner.calls


def test_a_modules_own_transfer_hooks_still_run(tmp_path):
    class Transfers(Classifier):
        transfers = 0

        def on_after_batch_transfer(self, batch, dataloader_idx):
            Transfers.transfers += 1
            return batch

    fit(tmp_path, None, Transfers, CoresetDataModule(Blobs(), range(16)), max_epochs=1)
    assert Transfers.transfers == 1 + 2


def test_no_validation_stays_no_validation(tmp_path):
    class TrainOnly(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(blobs(), 16)

    with pytest.warns(UserWarning, match="no `val_dataloader`"):
        trainer, _ = fit(tmp_path, None, datamodule=CoresetDataModule(TrainOnly(), range(16)))
    assert trainer.val_dataloaders is None


def test_what_is_set_on_a_coreset_reaches_the_datamodule_within():
    data = Blobs()
    data.width, data.epoch_length = 3, "its own"
    coreset = CoresetDataModule(CoresetDataModule(data, range(40)), range(5), epoch_length="full")
    coreset.width, coreset.epoch_length, coreset.indices, coreset.mine = 4, "coreset", [1], 5
    assert data.width == 4
    assert (data.epoch_length, coreset.epoch_length) == ("its own", "coreset")
    assert (coreset.datamodule.indices, coreset.indices) == (list(range(40)), [1])
    assert not hasattr(data, "mine")


@pytest.mark.parametrize("logged", [False, True])
def test_hyperparameters_are_logged_where_the_datamodule_within_says_so(tmp_path, logged):
    class Saves(Blobs):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"width": 5}, logger=logged)

    logger = CSVLogger(tmp_path)
    fit(tmp_path, None, datamodule=CoresetDataModule(Saves(), range(40)), logger=logger, max_epochs=1)
    assert ("width" in logger.experiment.hparams) == logged


def test_attributes_and_hyperparameters_are_shared():
    inner = Full()
    coreset = CoresetDataModule(inner, range(16))
    assert coreset.num_classes == CLASSES
    assert coreset.hparams.width == 5
    assert coreset.prepare_data_per_node is False
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = coreset.nothing_such


INHERITED = sorted(
    {name for name in dir(L.LightningDataModule()) if not name.startswith("__")}
    - {"setup", "train_dataloader"}  # what CoresetDataModule is there for
)


@pytest.mark.parametrize("name", INHERITED)
def test_whatever_lightnings_base_class_has_is_the_inner_datamodules(name):
    on_class = type("Named", (Blobs,), {name: "of the class"})
    for coreset in (CoresetDataModule(Blobs(), [0]), CoresetDataModule(CoresetDataModule(Blobs(), [0, 1]), [0])):
        if name not in ("hparams", "hparams_initial"):  # which can't be set
            object.__setattr__(coreset.datamodule, name, "set later")
            assert getattr(coreset, name) == "set later"
    coreset = CoresetDataModule(Blobs(), [0])
    coreset.datamodule = object.__new__(on_class)
    assert getattr(coreset, name) == "of the class"


def test_a_name_that_is_set_in_setup_is_seen_and_one_that_is_set_here_arrives():
    class Named(Blobs):
        def setup(self, stage):
            self.name = "blobs"

    coreset = CoresetDataModule(Named(), [0])
    assert coreset.name is None
    coreset.setup("fit")
    assert coreset.name == "blobs"
    coreset.name = "others"
    assert coreset.datamodule.name == "others"
    coreset.prepare_data_per_node = False
    assert coreset.datamodule.prepare_data_per_node is False


def test_what_a_derived_class_defines_is_its_own(tmp_path):
    class WithOthers(CoresetDataModule):
        name = "derived"

        def __init__(self, *arguments):
            self.early = 1
            super().__init__(*arguments)
            self.late = 2

        def val_dataloader(self):
            return DataLoader(blobs(7), 7)

        def state_dict(self):
            return {"position": 9}

    inner = Full()
    inner.name = "inner"
    coreset = WithOthers(inner, range(16))
    assert (coreset.name, coreset.early, coreset.late, inner.name) == ("derived", 1, 2, "inner")
    assert not hasattr(inner, "late")
    trainer, _ = fit(tmp_path, None, datamodule=coreset, max_epochs=1)
    assert trainer.num_val_batches == [1]
    assert len(inner.val_dataloader()) == 2


def test_one_that_has_no_datamodule_yet_can_be_asked():
    blank = object.__new__(CoresetDataModule)
    assert not isinstance(blank, Blobs)
    with pytest.raises(AttributeError, match="datamodule"):
        _ = blank.name


def test_the_coreset_is_told_by_its_own_words():
    words = str(CoresetDataModule(Blobs(), range(16)))
    if "size" not in words:
        pytest.skip("this Lightning does not tell the sizes of datasets")
    assert "{Train dataloader: size=16}" in words
    assert "{Validation dataloader: size=30}" in words


def test_code_that_asks_for_the_users_class_finds_it():
    coreset = CoresetDataModule(CoresetDataModule(Blobs(), range(16)), range(8))
    assert isinstance(coreset, Blobs)
    assert isinstance(coreset, CoresetDataModule)
    assert isinstance(coreset, L.LightningDataModule)
    assert not isinstance(coreset, Full)
    assert type(coreset) is CoresetDataModule


# The inner datamodule's state


class Counting(Blobs):
    """Has a state, which says how often the train loader was asked for."""

    def __init__(self):
        super().__init__()
        self.asked, self.restored = 0, []

    def train_dataloader(self):
        self.asked += 1
        return super().train_dataloader()

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.restored.append(state["asked"])
        self.asked = state["asked"]


class Within:
    class Counting(Counting):
        """Its name in a checkpoint is Within.Counting."""


class LastOne(CoresetDataModule):
    pass


STATES = {
    "full set": lambda data: data,
    "coreset": lambda data: CoresetDataModule(data, range(48)),
    "long coreset": lambda data: CoresetDataModule(data, range(48), epoch_length="full"),
    "coreset of a coreset": lambda data: CoresetDataModule(CoresetDataModule(data, range(60)), range(32)),
    "derived": lambda data: LastOne(data, range(48)),
    "copied": lambda data: copy.deepcopy(CoresetDataModule(data, range(48))),
    "unpickled": lambda data: pickle.loads(pickle.dumps(CoresetDataModule(data, range(48)))),
}


def innermost(data):
    return innermost(data.datamodule) if type(data) in (CoresetDataModule, LastOne) else data


PASSED_ON = [
    *(("full set", name) for name in STATES),
    *((name, "full set") for name in STATES if name != "full set"),
    ("coreset", "coreset of a coreset"),
    ("derived", "coreset"),
]


@pytest.mark.parametrize("kind", [Counting, Within.Counting])
@pytest.mark.parametrize(("first", "second"), PASSED_ON)
def test_a_datamodules_state_passes_between_runs(tmp_path, first, second, kind):
    data = STATES[first](kind())
    trainer, _ = fit(tmp_path, None, datamodule=data, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = STATES[second](kind())
    fit(tmp_path, None, datamodule=again, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert innermost(again).restored == [1]
    assert innermost(again).asked == 2


def test_a_state_is_restored_where_a_checkpoint_is_tested(tmp_path):
    trainer, _ = fit(tmp_path, None, datamodule=CoresetDataModule(Counting(), range(48)), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    inner = Counting()
    coreset = CoresetDataModule(inner, range(48))
    quiet_trainer(tmp_path).test(Classifier(), datamodule=coreset, ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert inner.restored == [1]


def test_a_datamodule_without_a_state_leaves_none(tmp_path):
    trainer, _ = fit(tmp_path, None, datamodule=CoresetDataModule(Blobs(), range(48)), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert not {"Blobs", "CoresetDataModule"} & set(torch.load(tmp_path / "one.ckpt"))


def test_the_users_class_can_be_made_from_a_checkpoint_of_a_coreset(tmp_path):
    trainer, _ = fit(tmp_path, None, datamodule=CoresetDataModule(Wide(width=7), range(48)), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert Wide.load_from_checkpoint(tmp_path / "one.ckpt").hparams.width == 7


class Wide(Blobs):
    def __init__(self, width=5):
        super().__init__()
        self.save_hyperparameters()


# Schedules


@pytest.mark.parametrize("epoch_length", ["coreset", "full"])
def test_a_schedule_counts_the_batches_that_are_served(tmp_path, epoch_length):
    class Scheduled(Classifier):
        def configure_optimizers(self):
            self.expected = self.trainer.estimated_stepping_batches
            self.length = len(self.trainer.datamodule.train_set)
            return super().configure_optimizers()

    coreset = CoresetDataModule(Blobs(), range(20), epoch_length=epoch_length)
    trainer, module = fit(tmp_path, None, Scheduled, coreset, max_epochs=3)
    assert module.length == 90  # the full set's, as the docstring says
    assert module.expected == trainer.global_step == 3 * (2 if epoch_length == "coreset" else 6)


# Several train loaders


class Several(L.LightningDataModule):
    """Returns its loaders in the collection that `collect` makes of a dictionary of them."""

    def __init__(self, collect=dict):
        super().__init__()
        self.sets = {"labelled": blobs(60, seed=1), "other": blobs(40, seed=2)}
        self.loaders = {
            "labelled": DataLoader(self.sets["labelled"], 10, shuffle=True),
            "other": DataLoader(self.sets["other"], 5),
        }
        self.returned = collect(self.loaders)

    def train_dataloader(self):
        return self.returned


class Couple(NamedTuple):
    labelled: DataLoader
    other: DataLoader


def combined(loaders):
    return CombinedLoader(loaders, "max_size")


BY_NAME = ["labelled", "other"]
COLLECTIONS = {
    "dictionary": (dict, BY_NAME),
    "ordered dictionary": (OrderedDict, BY_NAME),
    "list": (lambda loaders: list(loaders.values()), [0, 1]),
    "tuple": (lambda loaders: tuple(loaders.values()), [0, 1]),
    "named tuple": (lambda loaders: Couple(**loaders), [0, 1]),
    "combined dictionary": (combined, BY_NAME),
    "combined list": (lambda loaders: combined(list(loaders.values())), [0, 1]),
}


def opened(loaders):
    return loaders.iterables if isinstance(loaders, CombinedLoader) else loaders


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_each_of_several_train_loaders_has_its_coreset(collection):
    collect, (first, second) = COLLECTIONS[collection]
    data = Several(collect)
    coreset = CoresetDataModule(data, {second: [3, 1], first: range(20)})
    assert coreset.indices == {first: list(range(20)), second: [3, 1]}
    assert coreset.scores == {first: None, second: None}
    for _ in range(2):  # the datamodule returns the same collection each time
        loaders = coreset.train_dataloader()
        assert type(loaders) is type(data.returned)
        assert type(opened(loaders)) is type(opened(data.returned))
        assert len(opened(loaders)) == 2
        if isinstance(loaders, CombinedLoader):
            assert loaders._mode == "max_size"
            assert [len(loader.dataset) for loader in loaders.flattened] == [20, 2]
        assert all(
            torch.equal(x, data.sets["labelled"][i][0]) for i, (x, _) in enumerate(opened(loaders)[first].dataset)
        )
        assert isinstance(opened(loaders)[first].sampler, RandomSampler)
        assert (
            torch.cat([y for _, y in opened(loaders)[second]]).tolist()
            == data.sets["other"].tensors[1][[3, 1]].tolist()
        )
    assert (
        [len(loader.dataset) for loader in opened(data.returned)] == [60, 40]
        if collection
        in (
            "list",
            "tuple",
            "named tuple",
        )
        else True
    )


@pytest.mark.parametrize("collection", COLLECTIONS)
@pytest.mark.parametrize("epoch_length", ["coreset", "full"])
def test_training_takes_batches_of_all_loaders(tmp_path, collection, epoch_length):
    collect, (first, second) = COLLECTIONS[collection]
    seen = []

    class Takes(Classifier):
        def training_step(self, batch, batch_idx):
            seen.append([None if batch[key] is None else len(batch[key][0]) for key in (first, second)])
            return super().training_step(batch[first] or batch[second], batch_idx)

    coreset = CoresetDataModule(Several(collect), {first: range(20), second: None}, epoch_length=epoch_length)
    trainer, _ = fit(tmp_path, None, Takes, coreset, max_epochs=1, limit_val_batches=0)
    assert trainer.global_step == 8
    labelled = {"coreset": 2, "full": 6}[epoch_length]
    after = None if collection.startswith("combined") else 10  # Lightning's own way is to begin the shorter one anew
    assert [sizes[0] for sizes in seen] == [10] * labelled + [after] * (8 - labelled)


def test_a_loader_without_a_coreset_stays_the_one_it_is():
    data = Several()
    loaders = CoresetDataModule(data, {"labelled": [1], "other": None}).train_dataloader()
    assert loaders["other"] is data.loaders["other"]
    data.loaders["other"] = data.returned["other"] = DataLoader(Ready())  # nor need it be one that can be narrowed
    loaders = CoresetDataModule(data, {"labelled": [1], "other": None}).train_dataloader()
    assert loaders["other"] is data.loaders["other"]


def test_one_budget_serves_the_scores_of_all_loaders(tmp_path):
    data = Several()
    first, second = (scores_of(data.sets[key]) for key in BY_NAME)
    path = second.save(tmp_path / "second.npz")
    coreset = CoresetDataModule(data, {"labelled": first, "other": path}, fraction=0.25)
    assert {key: len(kept) for key, kept in coreset.indices.items()} == {"labelled": 15, "other": 10}
    assert coreset.indices["labelled"] == first.select(fraction=0.25).tolist()
    assert coreset.indices["other"] == second.select(fraction=0.25).tolist()
    assert coreset.scores["labelled"] is first
    mixed = CoresetDataModule(data, {"labelled": first, "other": [4, 2]}, per_class=2, rule="top")
    assert {key: len(kept) for key, kept in mixed.indices.items()} == {"labelled": 6, "other": 2}
    assert served_labels(mixed.train_dataloader()["other"]) == data.sets["other"].tensors[1][[4, 2]].tolist()


def served_labels(loader):
    return torch.cat([batch[1] for batch in loader]).tolist()


@pytest.mark.parametrize(
    ("coreset", "budget", "error", "message"),
    [
        ({}, {}, ValueError, "none of its values is a coreset"),
        ({"labelled": None}, {}, ValueError, "none of its values is a coreset"),
        ({"labelled": [1, 2]}, {"size": 3}, TypeError, r"'labelled': .*take no budget.*'size': 3"),
        ({"labelled": [1, 1]}, {}, ValueError, "'labelled': Positions must not repeat"),
        ({"labelled": "scores"}, {}, TypeError, "'labelled': .*exactly one budget"),
        ({"labelled": "scores"}, {"size": 61}, ValueError, "'labelled': .*more than the 60 samples"),
        ({"labelled": "scores", "other": [-1]}, {"size": 6}, ValueError, "'other': .*negative"),
        ({"labelled": "nowhere.npz"}, {"size": 6}, FileNotFoundError, "nowhere.npz"),
        ({"labelled": CLDCallback()}, {}, TypeError, r"'labelled': .*Give the `\.scores` of a CLDCallback"),
    ],
)
def test_bad_coresets_of_several_loaders_name_the_loader(coreset, budget, error, message):
    data = Several()
    known = {"scores": scores_of(data.sets["labelled"])}
    coreset = {key: known.get(value, value) if isinstance(value, str) else value for key, value in coreset.items()}
    with pytest.raises(error, match=message):
        CoresetDataModule(data, coreset, **budget)


@pytest.mark.parametrize(
    ("collect", "coreset", "error", "message"),
    [
        (dict, {"labelled": [1]}, ValueError, r"keys \['labelled'\].*keys \['labelled', 'other'\].*None for a loader"),
        (dict, {"labelled": [1], "others": None}, ValueError, "'others'.*'other'"),
        (dict, {0: [1], 1: None}, ValueError, r"keys \[0, 1\]"),
        (lambda loaders: list(loaders.values()), {0: [1]}, ValueError, r"keys \[0, 1\]"),
        (lambda loaders: loaders["labelled"], {"labelled": [1]}, TypeError, "one DataLoader.*that loader alone"),
        (lambda loaders: combined(loaders["labelled"]), {"a": [1]}, TypeError, "one CombinedLoader"),
        (
            lambda loaders: {"a": loaders, "b": loaders},
            {"a": None, "b": [1]},
            TypeError,
            r"\['a', 'b'\] are collections",
        ),
        (lambda loaders: {"a": 5, "b": loaders["other"]}, {"a": [1], "b": None}, TypeError, "'a': .*a int"),
        (dict, {"labelled": [1], "other": [40]}, ValueError, "'other': Position 40 is outside"),
        (dict, [1], TypeError, r"dict.*\{'labelled': \.\.\., 'other': None\}"),
        (combined, [1], TypeError, r"CombinedLoader.*\{'labelled': \.\.\., 'other': None\}"),
    ],
)
def test_loaders_that_do_not_fit_the_coresets_are_refused(collect, coreset, error, message):
    with pytest.raises(error, match=message):
        CoresetDataModule(Several(collect), coreset).train_dataloader()


def test_scores_of_the_other_loader_are_refused():
    data = Several()
    data.sets["other"] = blobs(60, seed=9)
    data.loaders["other"] = data.returned["other"] = DataLoader(data.sets["other"], 5)
    first, second = (scores_of(data.sets[key]) for key in BY_NAME)
    swapped = CoresetDataModule(data, {"labelled": second, "other": first}, size=6)
    with pytest.raises(ValueError, match="'labelled': The scores are not of this train set"):
        swapped.train_dataloader()


def test_views_of_the_full_train_set_do_not_leak():
    coreset = CoresetDataModule(UnaugmentedView(), range(16))
    assert not hasattr(coreset, "cld_train_dataloader")
    assert not hasattr(coreset, "cld_val_dataloader")


CLONES = [copy.deepcopy, *(lambda v, p=protocol: pickle.loads(pickle.dumps(v, p)) for protocol in range(6))]


@pytest.mark.parametrize("clone", CLONES)
def test_copies_serve_their_own_inner_datamodule(clone):
    data = Blobs()
    coreset = clone(CoresetDataModule(data, scores_of(data.train_set), size=10))
    assert type(coreset) is CoresetDataModule
    assert coreset.datamodule is not data
    assert coreset.val_dataloader.__self__ is coreset.datamodule
    assert len(coreset.train_dataloader().dataset) == 10


def test_a_proxy_can_train_on_a_coreset(tmp_path):
    cld, data = CLDCallback(), Blobs()
    fit(tmp_path, cld, datamodule=CoresetDataModule(data, range(0, 90, 2)))
    assert len(cld.scores) == 45
    assert cld.scores.classes.tolist() == [int(data.train_set[i][1]) for i in range(0, 90, 2)]


def test_validating_needs_no_train_set(tmp_path):
    data = Blobs()
    coreset = CoresetDataModule(data, scores_of(data.train_set), size=10)
    assert len(quiet_trainer(tmp_path).validate(Classifier(), datamodule=coreset, verbose=False)) == 1


def test_the_rule_and_its_seed_reach_the_selection():
    inner = L.LightningDataModule.from_datasets(train_dataset=blobs(60, seed=1), batch_size=8)
    known = scores_of(blobs(60, seed=1))
    known.plausibility = torch.rand(60, generator=torch.Generator().manual_seed(2))
    chosen = [CoresetDataModule(inner, known, size=20, rule="draw", seed=seed).indices for seed in (1, 2)]
    assert chosen == [known.select(size=20, rule="draw", seed=seed).tolist() for seed in (1, 2)]
    assert chosen[0] != chosen[1]
    with pytest.raises(TypeError, match=r"take no budget or rule, got \{'rule': 'draw'\}"):
        CoresetDataModule(inner, [0, 1], rule="draw")


class ByClass(WeightedRandomSampler):
    """Only finds the weights, as PyG's ImbalancedSampler does."""

    def __init__(self, classes):
        counts = torch.bincount(classes)
        super().__init__((1 / counts)[classes].tolist(), len(classes))


def test_a_sampler_that_only_finds_weights_is_served():
    points = blobs(90)
    inner = Blobs()
    inner.train_dataloader = lambda: DataLoader(points, 16, sampler=ByClass(points.tensors[1]))
    served = CoresetDataModule(inner, list(range(30))).train_dataloader().sampler
    assert type(served) is WeightedRandomSampler
    assert served.weights.tolist() == (1 / torch.bincount(points.tensors[1]))[points.tensors[1]][:30].double().tolist()


def test_a_loader_that_is_not_made_from_a_dataset_is_refused():
    class NodeLoader(DataLoader):
        def __init__(self, data, input_nodes, **settings):
            super().__init__(input_nodes, **settings)

    inner = Blobs()
    inner.train_dataloader = lambda: NodeLoader(None, TensorDataset(torch.arange(90)), batch_size=9)
    with pytest.raises(TypeError, match="NodeLoader is not made from a dataset"):
        CoresetDataModule(inner, [3, 5]).train_dataloader()


def test_positions_in_a_dataset_that_ignores_them_are_refused():
    class Queue(Dataset):
        taken = 0

        def __len__(self):
            return 60

        def __getitem__(self, index):
            self.taken += 7
            return torch.full((3,), float(self.taken % 60)), self.taken % 2

    inner = Blobs()
    inner.train_dataloader = lambda: DataLoader(queue, 5, shuffle=True)
    queue = Queue()
    with pytest.raises(ValueError, match="does not give the same sample for the same position"):
        CoresetDataModule(inner, list(range(10))).train_dataloader()


def test_each_loader_that_cannot_be_compared_is_told_once_with_its_key():
    data = Several()
    scores = {name: CLDScores(torch.rand(len(samples))) for name, samples in data.sets.items()}
    coreset = CoresetDataModule(data, scores, fraction=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coreset.train_dataloader()
        coreset.train_dataloader()
    doubts = [str(warning.message) for warning in caught if "could compare only" in str(warning.message)]
    assert [doubt.partition(": ")[0] for doubt in doubts] == ["Train loader 'labelled'", "Train loader 'other'"]


def test_keys_of_identify_that_no_coreset_has_are_refused():
    coreset = CoresetDataModule(Several(), {"labelled": [1], "other": None}, identify={"others": lambda sample: 0})
    with pytest.raises(
        ValueError, match=r"identify has the keys \['others'\], but coreset has \['labelled', 'other'\]"
    ):
        coreset.train_dataloader()
