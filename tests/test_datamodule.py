import copy
import pickle
from collections import Counter

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
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
    random_split,
)
from torchvision.datasets import FakeData
from toys import CLASSES, Blobs, Classifier, blobs, fit, quiet_trainer

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule, select_top
from lightning_cld.data.identity import look_at
from lightning_cld.data.narrowing import FullLengthSampler


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


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
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
    with pytest.raises(TypeError, match=r"CLDCallback give `\.scores`"):
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


# The user's loader settings are kept


def collate(batch):
    return torch.utils.data.default_collate(batch)


def start_worker(worker):
    pass


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
    assert {name: getattr(loader, name) for name in settings} == settings
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
    with pytest.raises(ValueError, match=r"1 positions .*\(\[50\]\) .* may be validation samples"):
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
        (lambda train: [DataLoader(train), DataLoader(train)], "list"),
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
    with pytest.raises(TypeError, match="Incompatible can't be made again"):
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
    with pytest.raises(ValueError, match="draws 2 on each device, gives no batch of 16 with drop_last=True"):
        CoresetDataModule(data, [0, 1]).train_dataloader()


def test_what_the_sampler_draws_decides_whether_a_dropped_batch_is_all():
    few = Blobs(drop_last=True, shuffle=None, sampler=RandomSampler(range(90), num_samples=18))
    with pytest.raises(ValueError, match="coreset of 40 samples, of which an epoch draws 8"):
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


def test_views_of_the_full_train_set_do_not_leak():
    coreset = CoresetDataModule(UnaugmentedView(), range(16))
    assert not hasattr(coreset, "cld_train_dataloader")
    assert not hasattr(coreset, "cld_val_dataloader")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_serve_their_own_inner_datamodule(clone):
    data = Blobs()
    coreset = clone(CoresetDataModule(data, scores_of(data.train_set), size=10))
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
    known.uncertainty = torch.rand(60, generator=torch.Generator().manual_seed(2))
    chosen = [CoresetDataModule(inner, known, size=20, rule="draw", seed=seed).indices for seed in (1, 2)]
    assert chosen == [known.select(size=20, rule="draw", seed=seed).tolist() for seed in (1, 2)]
    assert chosen[0] != chosen[1]
    with pytest.raises(TypeError, match=r"take no budget or rule, got \{'rule': 'draw'\}"):
        CoresetDataModule(inner, [0, 1], rule="draw")
