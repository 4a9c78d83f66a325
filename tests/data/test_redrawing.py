"""A coreset that is drawn anew each epoch, over train loaders of many kinds."""

import copy
import pickle
from collections import Counter

import lightning as L
import pytest
import timm.data.loader
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_narrowing import OwnLoader, Pairs, SavesAt, SeesPositions, Serves, batches_of, flat, two_devices
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from toys import blobs, fit, quiet_trainer

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule
from lightning_cld.data.loaders import sampled_positions
from lightning_cld.data.redrawing import Draws, RedrawingSampler

SAMPLES, SIZE, SEED = 60, 20, 7

pytestmark = [
    pytest.mark.filterwarnings("ignore:CLD could compare only"),  # made-up scores know no samples
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]


class Points(Dataset):
    """Points that carry their position and are read in batches, as tables are."""

    def __init__(self):
        self.points = blobs(SAMPLES)
        self.targets = self.points.tensors[1]

    def __len__(self):
        return SAMPLES

    def __getitem__(self, position):
        return (*self.points[position], position)

    def __getitems__(self, positions):
        assert all(type(position) is int for position in positions)
        return [self[position] for position in positions]


def made_up_scores(classes=None) -> CLDScores:
    """Scores of which a draw can take all but the last ten, which are unscored."""
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(SAMPLES, generator=generator).where(torch.arange(SAMPLES) < 50, torch.nan)
    plausibility = torch.rand(SAMPLES, generator=generator)
    return CLDScores(values, Points().targets if classes is None else classes, plausibility=plausibility)


SCORES = made_up_scores()


def draw(number, scores=SCORES, **budget) -> list[int]:
    """What is served in pass `number`."""
    return scores.select(**budget or {"size": SIZE}, rule="draw", seed=SEED + number).tolist()


def redrawn(make, scores=SCORES, **arguments) -> CoresetDataModule:
    arguments = {"size": SIZE, "rule": "draw", "seed": SEED, "redraw": True, **arguments}
    return CoresetDataModule(Serves(lambda _: make(Points())), scores, **arguments)


def epochs_of(loader, count=3) -> list[list[int]]:
    """The positions in each of the first epochs, in order."""
    epochs = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        epochs.append(flat(batches_of(loader)))
    return epochs


class SeesEpochs(SeesPositions):
    """Lists the positions that each epoch trains on."""

    def __init__(self):
        super().__init__()
        self.by_epoch = {}

    def training_step(self, batch, batch_idx):
        self.by_epoch.setdefault(self.current_epoch, []).extend(batch[2].tolist())
        return super().training_step(batch, batch_idx)


def trained(root, data, *callbacks, ckpt_path=None, seed=0, **arguments) -> dict[int, list[int]]:
    torch.manual_seed(seed)
    module = SeesEpochs()
    arguments = {
        "max_epochs": 3,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    } | arguments
    quiet_trainer(root, *callbacks, **arguments).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.by_epoch


# Which coresets


def test_the_draws_differ_and_the_first_is_that_of_a_fixed_coreset():
    data = redrawn(lambda train: DataLoader(train, 8))
    fixed = CoresetDataModule(data.datamodule, SCORES, size=SIZE, rule="draw", seed=SEED)
    assert data.indices == fixed.indices == draw(0)
    assert len({tuple(draw(number)) for number in range(3)}) == 3


@pytest.mark.parametrize("budget", [{"fraction": 0.3}, {"size": 13}, {"per_class": 5}])
def test_each_epoch_is_a_draw_of_its_own_with_the_classes_of_a_fixed_one(budget):
    loader = redrawn(lambda train: DataLoader(train, 8, shuffle=True), **{"size": None} | budget).train_dataloader()
    classes = [Counter(SCORES.classes[SCORES.select(**budget, rule="top")].tolist())] * 3
    length, epochs = len(loader), epochs_of(loader)
    assert [sorted(epoch) for epoch in epochs] == [draw(number, **budget) for number in range(3)]
    assert [Counter(SCORES.classes[epoch].tolist()) for epoch in epochs] == classes
    assert len(loader) == length == -(-len(epochs[0]) // 8)


@pytest.mark.parametrize(
    "settings",
    [
        {"shuffle": True},
        {"shuffle": True, "num_workers": 2},
        {"shuffle": True, "num_workers": 2, "persistent_workers": True},
        {},
    ],
    ids=str,
)
def test_lightning_trains_each_epoch_on_its_draw(tmp_path, settings):
    epochs = trained(tmp_path, redrawn(lambda train: DataLoader(train, 5, **settings)))
    assert {epoch: sorted(seen) for epoch, seen in epochs.items()} == {epoch: draw(epoch) for epoch in range(3)}
    assert all((seen == sorted(seen)) == (not settings) for seen in epochs.values())


def test_a_random_subset_is_drawn_anew_from_all_samples():
    loader = redrawn(lambda data: DataLoader(data, 4, shuffle=True), rule="random").train_dataloader()
    expected = [SCORES.select(size=SIZE, rule="random", seed=SEED + number).tolist() for number in range(8)]
    assert [sorted(epoch) for epoch in epochs_of(loader, 8)] == expected
    assert SCORES.values[torch.tensor(expected).flatten()].isnan().any()  # unscored ones too
    assert sampled_positions(loader).tolist() == list(range(SAMPLES))


def test_each_pass_of_a_long_epoch_is_a_draw_of_its_own(tmp_path):
    data = redrawn(lambda train: DataLoader(train, 5, shuffle=True), size=25, epoch_length="full")
    epochs = trained(tmp_path, data)
    for epoch, seen in epochs.items():
        assert len(seen) == SAMPLES
        passes = [draw(3 * epoch + number, size=25) for number in range(3)]
        assert [sorted(seen[:25]), sorted(seen[25:50])] == passes[:2]
        assert set(seen[50:]) < set(passes[2])
        assert len(set(seen[50:])) == 10


def test_a_part_of_a_pass_in_order_is_a_random_part():
    loader = redrawn(lambda train: DataLoader(train, 5), size=25, epoch_length="full").train_dataloader()
    for epoch, seen in enumerate(epochs_of(loader)):
        last = draw(3 * epoch + 2, size=25)
        assert seen[50:] == sorted(seen[50:])
        assert set(seen[50:]) < set(last)
        assert seen[50:] != last[:10]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_a_copy_draws_the_same(copied):
    loader = copied(
        CoresetDataModule(Held(), SCORES, size=SIZE, rule="draw", seed=SEED, redraw=True)
    ).train_dataloader()
    assert [sorted(epoch) for epoch in epochs_of(loader)] == [draw(number) for number in range(3)]


class Held(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Points(), 8, shuffle=True)


def test_one_that_an_earlier_version_pickled_serves_its_coreset():
    data = CoresetDataModule(Held(), SCORES, size=SIZE, rule="draw", seed=SEED)
    del vars(data)["_redrawn"]
    assert sorted(flat(batches_of(data.train_dataloader()))) == draw(0)


# What can't be drawn anew


@pytest.mark.parametrize(
    ("coreset", "arguments", "error", "message"),
    [
        ([1, 2], {}, TypeError, "Positions are the same coreset each time: leave redraw out, or give the scores"),
        ([1, 2], {"rule": "draw"}, TypeError, "Positions are the same coreset each time"),
        (SCORES, {"size": 5}, ValueError, 'rule="top" chooses the same one each time. Use rule="draw"'),
        ({0: SCORES, 1: None}, {"size": 5}, ValueError, 'Train loader 0: .*rule="top" chooses the same'),
        ({0: None, 1: [3]}, {}, TypeError, "Train loader 1: .*Positions are the same coreset"),
    ],
)
def test_what_is_the_same_each_time_is_refused(coreset, arguments, error, message):
    with pytest.raises(error, match=message):
        CoresetDataModule(Held(), coreset, redraw=True, **arguments)


class Repeats(DataLoader):
    """Reads ahead of the epoch, as timm's MultiEpochsDataLoader does."""

    def __iter__(self):
        return super().__iter__()


class OnDevice:
    """A device loader that hides the sampler."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return len(self.loader)


class OnDeviceWithSampler(OnDevice):
    @property
    def sampler(self):
        return self.loader.sampler


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda train: timm.data.loader.MultiEpochsDataLoader(train, 8, shuffle=True),
            "MultiEpochs.* of its own.*persist",
        ),
        (lambda train: Repeats(train, 8, shuffle=True), "Repeats is iterated in a way of its own"),
        (lambda train: OnDevice(DataLoader(train, 8)), "OnDevice does not give the sampler.*Give it that property"),
        (lambda train: DataLoader(train, batch_size=None), "batch_size=None"),
        (
            lambda train: DataLoader(train, batch_sampler=Pairs(RandomSampler(train), 8, False)),
            "batch sampler of its own",
        ),
        (
            lambda train: DataLoader(train, 8, sampler=type("Odd", (SequentialSampler,), {})(train)),
            "Odd, and it is unknown",
        ),
    ],
)
def test_a_loader_whose_epochs_are_unknown_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        redrawn(make).train_dataloader()


def test_the_same_batches_in_every_epoch_and_others_in_each_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"overfit_batches=2\) trains on the same samples.*Leave one of them out"):
        trained(tmp_path, redrawn(lambda train: DataLoader(train, 8)), overfit_batches=2)


def test_scores_of_another_set_are_refused():
    other = made_up_scores(Points().targets.flip(0))
    with pytest.raises(ValueError, match="not of this train set"):
        redrawn(lambda train: DataLoader(train, 8), other).train_dataloader()


def test_a_draw_smaller_than_a_dropped_batch_is_refused():
    with pytest.raises(ValueError, match="draws 20 of the coreset's 20 samples"):
        redrawn(lambda train: DataLoader(train, 32, drop_last=True)).train_dataloader()


# Samplers and loaders


def served(make, **arguments):
    return redrawn(make, **arguments).train_dataloader()


def test_a_device_loader_that_gives_its_sampler_is_served(tmp_path):
    epochs = trained(tmp_path, redrawn(lambda train: OnDeviceWithSampler(DataLoader(train, 5, shuffle=True))))
    assert {epoch: sorted(seen) for epoch, seen in epochs.items()} == {epoch: draw(epoch) for epoch in range(3)}


@pytest.mark.parametrize(
    "make",
    [
        lambda train: DataLoader(train, batch_sampler=BatchSampler(RandomSampler(train), 8, False)),
        lambda train: OwnLoader(train, 8, shuffle=True),
        lambda train: DataLoader(train, 8, sampler=SubsetRandomSampler(range(-SAMPLES, -9))),
        lambda train: DataLoader(train, 8, sampler=DistributedSampler(train, 1, 0)),
    ],
)
def test_other_loaders_that_shuffle_are_served(make):
    loader = served(make)
    assert [len(batch) for batch in batches_of(loader)] == [8, 8, 4]
    epochs = epochs_of(loader)
    assert [sorted(epoch) for epoch in epochs] == [draw(number) for number in range(3)]
    assert all(epoch != sorted(epoch) for epoch in epochs)
    assert type(loader) is type(make(Points()))


def test_a_sampler_of_fewer_samples_draws_a_part_of_each():
    loader = served(lambda train: DataLoader(train, 8, sampler=RandomSampler(train, num_samples=30)))
    epochs = epochs_of(loader)
    assert [len(set(epoch)) for epoch in epochs] == [10] * 3
    assert all(set(epoch) < set(draw(number)) for number, epoch in enumerate(epochs))


@pytest.mark.parametrize("epoch_length", ["coreset", "full"])
def test_weights_are_those_of_the_positions(epoch_length):
    weights = torch.ones(SAMPLES)
    heavy = SCORES.classes == 0
    weights[heavy] = 1e6
    loader = served(
        lambda train: DataLoader(train, 8, sampler=WeightedRandomSampler(weights, 90)), epoch_length=epoch_length
    )
    epochs = epochs_of(loader)
    size = {"coreset": 30, "full": 90}[epoch_length]
    passes = size // 30
    assert [len(epoch) for epoch in epochs] == [size] * 3
    for epoch, seen in enumerate(epochs):
        for number in range(passes):
            coreset = {position for position in draw(passes * epoch + number) if heavy[position]}
            assert set(seen[30 * number : 30 * number + 30]) == coreset
    assert epochs[0] != epochs[1]


def test_draws_by_weight_without_replacement_hold_no_position_twice():
    sampler = WeightedRandomSampler(torch.arange(1.0, 61.0), 60, replacement=False)
    epochs = epochs_of(served(lambda train: DataLoader(train, 8, sampler=sampler)))
    assert [sorted(epoch) for epoch in epochs] == [draw(number) for number in range(3)]


def test_draws_with_replacement_hold_some_positions_twice():
    loader = served(lambda train: DataLoader(train, 8, sampler=RandomSampler(train, replacement=True)))
    for number, epoch in enumerate(epochs_of(loader)):
        assert len(epoch) == SIZE
        assert set(epoch) < set(draw(number))


def few_weights(count, **arguments):
    weights = (torch.arange(SAMPLES) < count).double()
    return lambda train: DataLoader(train, 8, sampler=WeightedRandomSampler(weights, SAMPLES, **arguments))


def test_weights_that_may_leave_nothing_to_draw_are_refused():
    served(few_weights(31))  # 19 of the 50 scored samples have no weight
    with pytest.raises(
        ValueError, match=r"draws 20 samples with replacement.*only 0 are sure.*every sample a positive"
    ):
        served(few_weights(30))
    served(few_weights(50, replacement=False))
    with pytest.raises(ValueError, match=r"without replacement.*only 19 are sure.*replacement=True"):
        served(few_weights(49, replacement=False))


def test_a_subset_sampler_must_draw_all_that_may_be_drawn():
    with pytest.raises(ValueError, match=r"leaves out 1 of the positions.*\(\[49\]\).*validation samples"):
        served(lambda train: DataLoader(train, 8, sampler=SubsetRandomSampler(range(49))))
    full = served(lambda train: DataLoader(train, 8, sampler=SubsetRandomSampler(range(50))), epoch_length="full")
    assert len(epochs_of(full)[0]) == 50


@pytest.mark.parametrize(("drop_last", "length"), [(True, 6), (False, 7)])
def test_a_distributed_sampler_keeps_its_share(drop_last, length):
    def make(rank):
        def loader(train):
            return DataLoader(train, 8, sampler=DistributedSampler(train, 3, rank, drop_last=drop_last, seed=4))

        return served(loader)

    shares = [epochs_of(make(rank)) for rank in range(3)]
    for number in range(3):
        together = Counter(position for share in shares for position in share[number])
        assert [len(share[number]) for share in shares] == [length] * 3
        assert set(together) <= set(draw(number))
        assert len(together) == (18 if drop_last else SIZE)


def test_where_lightning_splits_the_loader_all_processes_share_one_draw():
    data = redrawn(lambda train: DataLoader(train, 8, shuffle=True))
    data.trainer = two_devices()
    data.trainer.strategy.broadcast = lambda seed: 77  # what the first process has drawn
    sampler = data.train_dataloader().sampler
    assert isinstance(sampler, DistributedSampler)  # which Lightning leaves in place
    assert (sampler.num_replicas, sampler.seed, len(sampler)) == (2, 77, 10)


def test_processes_that_draw_for_themselves_have_the_same_coresets_in_orders_of_their_own():
    data = redrawn(lambda train: DataLoader(train, 8, shuffle=True))
    data.trainer = two_devices(use_distributed_sampler=False)
    ranks = []
    for seed in range(2):
        torch.manual_seed(seed)
        ranks.append(epochs_of(data.train_dataloader()))
    assert ranks[0] != ranks[1]
    for rank in ranks:
        assert [sorted(epoch) for epoch in rank] == [draw(number) for number in range(3)]


def test_each_of_several_loaders_is_drawn_anew(tmp_path):
    class Several(L.LightningDataModule):
        def train_dataloader(self):
            return {name: DataLoader(Points(), 5, shuffle=True) for name in ("drawn", "given", "whole")}

    class Sees(SeesEpochs):
        def training_step(self, batch, batch_idx):
            names = batch.keys()
            for name in names:
                seen[self.current_epoch, name] = seen.get((self.current_epoch, name), []) + batch[name][2].tolist()
            return super().training_step(batch["drawn"], batch_idx)

    seen = {}
    coreset = {"drawn": SCORES, "given": [3, 1, 8, 7, 9], "whole": None}
    data = CoresetDataModule(Several(), coreset, size=SIZE, rule="draw", seed=SEED, redraw=True)
    assert data.indices == {"drawn": draw(0), "given": [3, 1, 8, 7, 9], "whole": None}
    fit(tmp_path, None, Sees, data, max_epochs=3)
    for epoch in range(3):
        assert sorted(seen[epoch, "drawn"][:SIZE]) == draw(epoch)
        assert set(seen[epoch, "given"]) == {3, 1, 8, 7, 9}
        assert sorted(seen[epoch, "whole"]) == list(range(SAMPLES))


def test_the_loader_reads_the_full_set_at_the_positions_of_a_draw():
    loader = served(lambda train: DataLoader(train, 8, shuffle=True))
    assert type(loader.dataset) is Points  # in batches, as the assertion there sees
    assert len(loader.dataset) == SAMPLES
    assert len(loader) == 3


def test_a_proxy_on_a_redrawn_coreset_scores_what_may_be_drawn(tmp_path):
    data = redrawn(lambda train: DataLoader(train, 8, shuffle=True))
    assert sampled_positions(data.train_dataloader()).tolist() == list(range(50))
    cld = CLDCallback(dirpath=tmp_path, val_dataloader=DataLoader(Points(), 20))
    fit(tmp_path, cld, datamodule=data)
    assert cld.scores.positions().tolist() == list(range(50))


# Resumed


KINDS = {
    "epoch end": {"save_on_train_epoch_end": True},
    "validation end": {"save_on_train_epoch_end": False},
    "last batch": {"every_n_train_steps": 4},
    "within an epoch": {"every_n_train_steps": 3},
}


@pytest.mark.filterwarnings("ignore:.*The dirpath has changed from.*")
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended.*")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_goes_on_with_the_draw_of_its_epoch(tmp_path, kind, workers):
    def data():
        made = redrawn(lambda train: DataLoader(train, 5, shuffle=True, num_workers=workers))
        made.datamodule.val_dataloader = lambda: DataLoader(Points(), 20)
        return made

    trained(tmp_path, data(), ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **KINDS[kind]))
    step = 2 * KINDS[kind].get("every_n_train_steps", 4)
    epochs = trained(tmp_path, data(), ckpt_path=tmp_path / f"step={step}.ckpt", seed=step)
    assert list(epochs) == list(range(step // 4, 3))
    for epoch, seen in epochs.items():
        left = SIZE - 5 * (step % 4) if epoch == step // 4 else SIZE
        assert len(seen) == len(set(seen)) == left
        assert set(seen) <= set(draw(epoch))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("epoch_length", ["coreset", "full"])
def test_a_stateful_loader_goes_on_within_the_epoch(tmp_path, epoch_length, workers):
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def data():
        return redrawn(lambda train: loader(train, 5, shuffle=True, num_workers=workers), epoch_length=epoch_length)

    steps = {"coreset": 4, "full": 12}[epoch_length]
    for step in (steps + 1, 2 * steps):
        whole = trained(tmp_path, data(), SavesAt(step, tmp_path / "mid.ckpt"))
        rest = trained(tmp_path, data(), ckpt_path=tmp_path / "mid.ckpt", seed=5)
        assert flat(rest.values()) == flat(whole.values())[5 * step :]


@pytest.mark.parametrize("first", ["full set", "fixed"])
def test_a_stateful_loaders_run_goes_on_over_the_draws(tmp_path, first):
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    class Saves(L.Callback):
        def on_train_epoch_end(self, trainer, *_):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    data = redrawn(lambda train: loader(train, 5, shuffle=True, num_workers=1))
    fixed = CoresetDataModule(data.datamodule, SCORES, size=SIZE, rule="draw", seed=SEED)
    trained(tmp_path, data.datamodule if first == "full set" else fixed, Saves())
    epochs = trained(tmp_path, data, ckpt_path=tmp_path / "one.ckpt", seed=5)
    assert {epoch: sorted(seen) for epoch, seen in epochs.items()} == {epoch: draw(epoch) for epoch in (1, 2)}


def test_a_loader_that_is_made_again_begins_at_its_epoch(tmp_path):
    data = redrawn(lambda train: DataLoader(train, 5, shuffle=True, num_workers=1))
    epochs = trained(tmp_path, data, reload_dataloaders_every_n_epochs=1)
    assert {epoch: sorted(seen) for epoch, seen in epochs.items()} == {epoch: draw(epoch) for epoch in range(3)}


def test_a_sampler_goes_on_where_its_state_says():
    def sampler(seed):
        draws = Draws(lambda number: torch.tensor(draw(number)), SIZE, torch.arange(50))
        return RedrawingSampler(draws, 50, shuffle=True, seed=seed)

    started, resumed = sampler(5), sampler(6)
    started.set_epoch(2)
    drawing = iter(started)
    seen = [next(drawing) for _ in range(30)]
    assert sorted(seen[:SIZE]) == draw(6)
    resumed.load_state_dict(started.state_dict())
    assert list(resumed) == list(drawing)
    resumed.set_epoch(3)
    resumed.load_state_dict({"yielded": 60})  # as the full set's sampler says it at the end of an epoch
    assert resumed.epoch == 3


def test_draws_with_replacement_work_for_more_samples_than_multinomial_takes():
    size = 2**24 + 1
    draws = Draws(lambda number: torch.arange(size), size, torch.arange(1))
    sampler = RedrawingSampler(draws, 8, shuffle=True, replacement=True, pass_size=8, seed=0)
    assert len(set(sampler)) == 8
