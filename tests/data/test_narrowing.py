"""Train loaders of many kinds, made again over a coreset."""

import copy
import types

import lightning as L
import pytest
import timm.data.loader
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from toys import Classifier, blobs, quiet_trainer

from lightning_cld import CLDCallback, CoresetDataModule
from lightning_cld.data.samplers import FullLengthSampler

SAMPLES = 60
KEPT = list(range(1, 60, 3))  # 20 of them


class Positions(Dataset):
    """Points that carry their position."""

    def __init__(self):
        self.points = blobs(SAMPLES)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, position):
        return (*self.points[position], position)


class Serves(L.LightningDataModule):
    """Serves the loader that `make` makes of the train set."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def train_dataloader(self):
        return self.make(Positions())


def narrowed(make, positions=KEPT, **arguments):
    return CoresetDataModule(Serves(make), positions, **arguments).train_dataloader()


def batches_of(loader) -> list[list[int]]:
    """The positions in the batches of one epoch."""
    return [batch[2].tolist() for batch in loader]


def flat(batches) -> list[int]:
    return [position for batch in batches for position in batch]


def two_devices(**arguments) -> L.Trainer:
    """A Trainer for two processes that starts none."""
    return L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, barebones=True, **arguments)


# torchdata, or classes that look like torchdata's where it is not installed


def stand_ins() -> types.SimpleNamespace:
    """Classes of torchdata's names and signatures, as far as this library looks at them."""

    class RandomSampler(Sampler):
        def __init__(self, data_source, replacement=False, num_samples=None, generator=None):
            self.data_source, self.replacement, self._num_samples = data_source, replacement, num_samples
            self.generator = generator or torch.Generator().manual_seed(int(torch.empty((), dtype=int).random_()))

        @property
        def num_samples(self):
            return self._num_samples or len(self.data_source)

        def __len__(self):
            return self.num_samples

        def __iter__(self):
            return iter(torch.utils.data.RandomSampler(self.data_source, *self._settings()))

        def _settings(self):
            return self.replacement, self.num_samples, self.generator

    class StatefulDistributedSampler(DistributedSampler):
        pass

    class BatchSampler(torch.utils.data.BatchSampler):
        pass

    class StatefulDataLoader(DataLoader):
        def __init__(self, dataset, batch_size=1, shuffle=None, sampler=None, *, snapshot_every_n_steps=1, **others):
            if shuffle:
                sampler = RandomSampler(dataset, generator=others.get("generator"))
            super().__init__(dataset, batch_size, sampler=sampler, **others)
            self.snapshot_every_n_steps = snapshot_every_n_steps

        def __iter__(self):
            return super().__iter__()

    found = [RandomSampler, StatefulDistributedSampler, BatchSampler, StatefulDataLoader]
    for kind in found:
        kind.__module__ = kind.__iter__.__module__ = "torchdata.stateful_dataloader"
    return types.SimpleNamespace(**{kind.__name__: kind for kind in found})


@pytest.fixture(params=["stand-ins", "torchdata"])
def torchdata(request):
    if request.param == "stand-ins":
        return stand_ins()
    pytest.importorskip("torchdata.stateful_dataloader")
    from torchdata.stateful_dataloader import StatefulDataLoader, sampler

    return types.SimpleNamespace(StatefulDataLoader=StatefulDataLoader, **vars(sampler))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("epoch_length", ["coreset", "full"])
def test_a_stateful_loader_that_shuffles_is_served(torchdata, epoch_length, workers):
    def make(train):
        return torchdata.StatefulDataLoader(train, 8, shuffle=True, num_workers=workers, snapshot_every_n_steps=2)

    torch.manual_seed(1)
    loader = narrowed(make, epoch_length=epoch_length)
    assert type(loader) is torchdata.StatefulDataLoader
    assert loader.snapshot_every_n_steps == 2
    drawn = flat(batches_of(loader))
    passes = 1 if epoch_length == "coreset" else 3
    for start in range(0, 20 * passes, 20):
        assert sorted(drawn[start : start + 20]) == KEPT
        assert drawn[start : start + 20] != KEPT
    assert len(drawn) == 20 * passes
    assert flat(batches_of(loader)) != drawn


def test_a_stateful_loader_keeps_its_order_and_generator(torchdata):
    assert flat(batches_of(narrowed(lambda train: torchdata.StatefulDataLoader(train, 8)))) == KEPT
    generator = torch.Generator().manual_seed(3)
    loader = narrowed(lambda train: torchdata.StatefulDataLoader(train, 8, shuffle=True, generator=generator))
    assert loader.generator is generator
    assert loader.sampler.generator is generator


@pytest.mark.parametrize("plain", [True, False])
def test_samplers_of_torchdata_are_carried_over(torchdata, plain):
    kind = DataLoader if plain else torchdata.StatefulDataLoader
    random = narrowed(lambda train: kind(train, 8, sampler=torchdata.RandomSampler(train)))
    assert type(random.sampler) is torchdata.RandomSampler
    assert sorted(flat(batches_of(random))) == KEPT
    repeats = narrowed(lambda train: kind(train, 8, sampler=torchdata.RandomSampler(train, True, 30)))
    assert repeats.sampler.replacement
    assert len(flat(batches_of(repeats))) == 10  # half of the coreset, as 30 are half of the full set
    share = narrowed(lambda train: kind(train, 8, sampler=torchdata.StatefulDistributedSampler(train, 2, 1, False)))
    assert type(share.sampler) is torchdata.StatefulDistributedSampler
    assert flat(batches_of(share)) == KEPT[1::2]
    by_hand = narrowed(
        lambda train: kind(train, batch_sampler=torchdata.BatchSampler(torchdata.RandomSampler(train), 8, True))
    )
    assert [len(batch) for batch in batches_of(by_hand)] == [8, 8]


def test_a_run_on_a_stateful_loader_is_swept_without_a_warning(torchdata, tmp_path, recwarn):
    cld = CLDCallback(dirpath=tmp_path)
    train = torchdata.StatefulDataLoader(blobs(SAMPLES), 8, shuffle=True)
    val = torchdata.StatefulDataLoader(blobs(20, seed=1), 8)
    quiet_trainer(tmp_path, cld, max_epochs=3).fit(Classifier(), train, val)
    assert cld.trajectories.train_losses.shape == (4, SAMPLES)
    assert [str(warning.message) for warning in recwarn if "CLD" in str(warning.message)] == []


class SeesPositions(Classifier):
    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[2].tolist())
        return super().training_step(batch, batch_idx)


class SavesAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def trained(root, data, *callbacks, seed, ckpt_path=None):
    """The batches that a run of three epochs sees."""
    torch.manual_seed(seed)
    module = SeesPositions()
    quiet_trainer(root, *callbacks, max_epochs=3).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


def stateful_data(**settings):
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    sampler = settings.pop("sampler", None)
    return Serves(lambda train: loader(train, 8, sampler=sampler and sampler(train), **settings))


def stateful_distributed(train):
    return pytest.importorskip("torchdata.stateful_dataloader.sampler").StatefulDistributedSampler(train, 1, 0)


RESUMED = [
    ({"shuffle": True}, "coreset"),
    ({"shuffle": True}, "full"),
    ({"shuffle": True, "num_workers": 2}, "coreset"),
    ({"shuffle": True, "num_workers": 2}, "full"),
    ({}, "coreset"),
    ({"num_workers": 2}, "full"),
    ({"sampler": stateful_distributed}, "coreset"),
    ({"sampler": stateful_distributed}, "full"),
    ({"sampler": stateful_distributed, "num_workers": 2}, "full"),
]


@pytest.mark.parametrize(("settings", "epoch_length"), RESUMED)
def test_a_stateful_loader_resumes_within_an_epoch_over_the_coreset(tmp_path, settings, epoch_length):
    def data():
        return CoresetDataModule(stateful_data(**settings), KEPT, epoch_length=epoch_length)

    step = {"coreset": 4, "full": 12}[epoch_length]  # in the middle of the second epoch
    whole = trained(tmp_path, data(), SavesAt(step, tmp_path / "mid.ckpt"), seed=1)
    rest = trained(tmp_path, data(), seed=2, ckpt_path=tmp_path / "mid.ckpt")
    assert rest == whole[step:]
    assert len(rest) > 4


class Noisy(Positions):
    """Adds noise from a generator of its own, which is its state."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def __getitem__(self, position):
        inputs, *rest = super().__getitem__(position)
        return (inputs + torch.randn(inputs.shape, generator=self.generator), *rest)

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def test_the_state_of_a_dataset_is_kept_over_the_coreset():
    loader_class = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def make():
        return CoresetDataModule(Serves(lambda _: loader_class(Noisy(), 4)), KEPT).train_dataloader()

    first, again = make(), make()
    batches = iter(first)
    next(batches)
    state = copy.deepcopy(first.state_dict())
    expected = [batch[0] for batch in batches]
    again.load_state_dict(state)
    assert torch.equal(torch.cat([batch[0] for batch in again]), torch.cat(expected))


def test_a_state_of_the_dataset_can_be_asked_of_the_subset():
    subset = CoresetDataModule(Serves(lambda _: DataLoader(Noisy(), 4)), KEPT).train_dataloader().dataset
    assert torch.equal(subset.state_dict()["generator"], Noisy().generator.get_state())
    subset.load_state_dict({"generator": torch.Generator().manual_seed(6).get_state()})
    assert torch.equal(subset.state_dict()["generator"], torch.Generator().manual_seed(6).get_state())
    plain = narrowed(lambda train: DataLoader(train, 4)).dataset
    assert not hasattr(plain, "state_dict")


@pytest.mark.parametrize("epoch_length", ["coreset", "full"])
@pytest.mark.parametrize("settings", [{"shuffle": True}, {}, {"sampler": stateful_distributed}])
@pytest.mark.parametrize("first", ["full set", "coreset"])
def test_a_stateful_loaders_run_passes_between_full_set_and_coreset(tmp_path, settings, epoch_length, first):
    class Saves(L.Callback):
        def on_train_epoch_end(self, trainer, *_):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    full, core = (
        stateful_data(**settings),
        CoresetDataModule(stateful_data(**settings), KEPT, epoch_length=epoch_length),
    )
    data = {"full set": (full, core), "coreset": (core, full)}[first]
    trained(tmp_path, data[0], Saves(), seed=1)
    rest = flat(trained(tmp_path, data[1], seed=2, ckpt_path=tmp_path / "two.ckpt"))
    if data[1] is full:
        assert sorted(rest) == list(range(SAMPLES))
    else:
        assert set(rest) == set(KEPT)
        assert len(rest) == (20 if epoch_length == "coreset" else 60)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (3, 2)])
def test_a_full_length_sampler_goes_on_where_its_state_says(shuffle, ranks, rank):
    def sampler(seed):
        return FullLengthSampler(20, 70, shuffle=shuffle, num_replicas=ranks, rank=rank, seed=seed)

    started, resumed, next_one = sampler(5), sampler(6), sampler(6)
    epochs = []
    for epoch in range(3):
        started.set_epoch(epoch)
        epochs.append(list(started))
    started.set_epoch(1)
    drawing = iter(started)
    assert [next(drawing) for _ in range(9)] == epochs[1][:9]
    resumed.load_state_dict(started.state_dict())
    assert list(resumed) == epochs[1][9:]
    list(drawing)
    next_one.load_state_dict(started.state_dict())
    assert list(next_one) == epochs[2]
    next_one.set_epoch(0)
    assert list(next_one) == epochs[0]


# Loaders that shuffle in their own way


class OwnOrder(Sampler):
    """What a loader class puts in place of torch's RandomSampler."""

    def __init__(self, length, generator=None):
        self.length, self.generator = length, generator

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(torch.randperm(self.length, generator=self.generator).tolist())


class DerivedOwnOrder(OwnOrder):
    pass


class OwnLoader(DataLoader):
    def __init__(self, dataset, batch_size=1, shuffle=False, sampler=None, *, extra=0, **others):
        if shuffle and sampler is None:
            torch.rand(1)
            sampler = OwnOrder(len(dataset), torch.Generator().manual_seed(4))
        super().__init__(dataset, batch_size, sampler=sampler, **others)
        self.extra = extra


def test_a_loader_class_that_shuffles_in_its_own_way_does_so_over_the_coreset():
    loader = narrowed(lambda train: OwnLoader(train, 8, shuffle=True, extra=3))
    assert (type(loader), type(loader.sampler), loader.extra) == (OwnLoader, OwnOrder, 3)
    assert sorted(flat(batches_of(loader))) == KEPT
    full = narrowed(lambda train: OwnLoader(train, 8, shuffle=True), epoch_length="full")
    assert len(flat(batches_of(full))) == SAMPLES
    torch.manual_seed(1)
    narrowed(lambda train: OwnLoader(train, 8, shuffle=True))
    after = torch.rand(1)
    torch.manual_seed(1)
    for _ in range(2):  # the full set's and the coreset's; what is made to compare with leaves no trace
        OwnLoader(Positions(), 8, shuffle=True)
    assert torch.rand(1) == after
    with pytest.raises(ValueError, match="An epoch draws 3 of the coreset's 3 samples"):
        narrowed(lambda train: OwnLoader(train, 8, shuffle=True, drop_last=True), [1, 2, 3])


@pytest.mark.parametrize(
    "make",
    [
        lambda train: OwnLoader(train, 8, sampler=OwnOrder(30)),
        lambda train: OwnLoader(train, 8, sampler=DerivedOwnOrder(SAMPLES, torch.Generator())),
        lambda train: DataLoader(train, 8, sampler=OwnOrder(SAMPLES)),
        lambda train: DataLoader(train, batch_sampler=BatchSampler(OwnOrder(SAMPLES), 8, False)),
    ],
)
def test_a_sampler_that_the_loader_did_not_make_is_refused(make):
    with pytest.raises(TypeError, match=r"OwnOrder, and it is unknown what that would draw.*shuffle=True"):
        narrowed(make)


class Shifted(DistributedSampler):
    """A sampler of somebody's, which may draw anything."""


def test_a_sampler_derived_from_a_known_one_is_refused():
    with pytest.raises(TypeError, match="Shifted, and it is unknown"):
        narrowed(lambda train: DataLoader(train, 8, sampler=Shifted(train, 2, 1)))


def test_the_generator_of_a_sampler_of_fewer_samples_is_kept():
    generator = torch.Generator().manual_seed(2)
    sampler = narrowed(lambda train: DataLoader(train, 8, sampler=RandomSampler(train, False, 30, generator))).sampler
    assert (sampler.num_samples, sampler.generator) == (10, generator)


# Batch samplers


def test_a_batch_sampler_made_by_hand_is_served():
    loader = narrowed(lambda train: DataLoader(train, batch_sampler=BatchSampler(SequentialSampler(train), 8, False)))
    assert batches_of(loader) == [KEPT[:8], KEPT[8:16], KEPT[16:]]
    loader = narrowed(lambda train: DataLoader(train, batch_sampler=BatchSampler(RandomSampler(train), 8, True)))
    batches = batches_of(loader)
    assert [len(batch) for batch in batches] == [8, 8]
    assert set(flat(batches)) < set(KEPT)
    assert flat(batches) != sorted(flat(batches))


@pytest.mark.parametrize(
    "sampler",
    [
        lambda train: SequentialSampler(train),
        lambda train: RandomSampler(train, num_samples=30),
        lambda train: WeightedRandomSampler(torch.ones(SAMPLES), 90),
        lambda train: SubsetRandomSampler(KEPT),
        lambda train: DistributedSampler(train, 2, 1),
    ],
)
@pytest.mark.parametrize("epoch_length", ["coreset", "full"])
def test_by_hand_or_not_the_same_number_of_batches_is_drawn(sampler, epoch_length):
    by_hand = narrowed(
        lambda train: DataLoader(train, batch_sampler=BatchSampler(sampler(train), 8, False)), epoch_length=epoch_length
    )
    plain = narrowed(lambda train: DataLoader(train, 8, sampler=sampler(train)), epoch_length=epoch_length)
    assert type(by_hand.sampler) is type(plain.sampler)
    assert len(by_hand) == len(plain)
    assert [len(batch) for batch in batches_of(by_hand)] == [len(batch) for batch in batches_of(plain)]


def test_a_coreset_smaller_than_a_batch_that_is_dropped_by_hand_is_refused():
    with pytest.raises(ValueError, match="With drop_last=True that gives no batch of 8"):
        narrowed(lambda train: DataLoader(train, batch_sampler=BatchSampler(RandomSampler(train), 8, True)), [1, 2])


class Pairs(BatchSampler):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda train: DataLoader(train, batch_sampler=Pairs(RandomSampler(train), 8, False)),
        lambda train: DataLoader(train, batch_sampler=[[0, 1], [2, 3]]),
        lambda train: DataLoader(train, batch_size=None, sampler=BatchSampler(RandomSampler(train), 8, False)),
    ],
)
def test_other_batch_samplers_are_refused(make):
    with pytest.raises(TypeError, match=r"batch sampler of its own kind.*Use torch's BatchSampler"):
        narrowed(make)


# Several processes of which each draws for itself


@pytest.mark.parametrize("batch_sampler", [True, False])
def test_without_lightnings_sampler_an_epoch_is_as_long_as_the_full_sets(batch_sampler):
    def make(train):
        if batch_sampler:
            return DataLoader(train, batch_sampler=BatchSampler(RandomSampler(train), 8, False))
        return DataLoader(train, 8, shuffle=True)

    data = CoresetDataModule(Serves(make), KEPT, epoch_length="full")
    data.trainer = two_devices(use_distributed_sampler=False)
    loader = data.train_dataloader()
    assert len(loader) == len(make(Positions())) == 8
    assert len(flat(batches_of(loader))) == SAMPLES


def test_without_lightnings_sampler_each_process_draws_the_whole_coreset():
    data = CoresetDataModule(Serves(lambda train: DataLoader(train, 16, shuffle=True, drop_last=True)), KEPT)
    data.trainer = two_devices()
    with pytest.raises(ValueError, match="draws 10 of the coreset's 20 samples on each device"):
        data.train_dataloader()
    data.trainer = two_devices(use_distributed_sampler=False)
    assert len(data.train_dataloader()) == 1


def test_where_lightning_splits_a_full_length_epoch_all_processes_share_one_draw(torchdata):
    data = CoresetDataModule(
        Serves(lambda train: torchdata.StatefulDataLoader(train, 8, shuffle=True)), KEPT, epoch_length="full"
    )
    data.trainer = two_devices()
    data.trainer.strategy.broadcast = lambda seed: 77  # what the first process has drawn
    sampler = data.train_dataloader().sampler
    assert (type(sampler), sampler.num_replicas, sampler.seed) == (FullLengthSampler, 2, 77)
    data.trainer = L.Trainer(accelerator="cpu", devices=1, strategy="ddp", logger=False, barebones=True)
    assert data.train_dataloader().sampler.num_replicas == 1  # though there is no process group yet


def test_processes_that_draw_for_themselves_have_seeds_of_their_own():
    data = CoresetDataModule(Serves(lambda train: DataLoader(train, 8, shuffle=True)), KEPT, epoch_length="full")
    data.trainer = two_devices(use_distributed_sampler=False)

    def drawn(seed):
        torch.manual_seed(seed)
        return list(data.train_dataloader().sampler)

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(("name", "value"), [("in_order", False), ("pin_memory_device", "cuda")])
def test_an_argument_that_few_loaders_have_is_carried_over(name, value):
    if name not in vars(DataLoader(Positions())):
        pytest.skip(f"DataLoader has no {name} in this torch")
    assert getattr(narrowed(lambda train: DataLoader(train, 8, num_workers=1, **{name: value})), name) == value


def test_a_loader_class_that_does_not_know_them_is_served():
    class Narrow(DataLoader):
        def __init__(
            self, dataset, batch_size, sampler, num_workers, collate_fn, pin_memory, drop_last, timeout, worker_init_fn,
            multiprocessing_context, generator, prefetch_factor, persistent_workers,
        ):  # fmt: skip
            settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
            super().__init__(**settings)

    def make(train):
        return Narrow(train, 8, RandomSampler(train), 0, None, False, False, 0, None, None, None, None, False)

    assert sorted(flat(batches_of(narrowed(make)))) == KEPT


def test_a_loader_of_timms_that_keeps_its_iterator_is_served():
    data = timm.data.loader.MultiEpochsDataLoader
    loader = narrowed(lambda train: data(train, 8, shuffle=True, num_workers=1))
    assert type(loader) is data
    first, second = (flat(batches_of(loader)) for _ in range(2))
    assert sorted(first) == sorted(second) == KEPT
    assert first != second
