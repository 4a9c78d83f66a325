"""Streams under the callback: the losses of the right samples, whatever the order and whoever reads them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info
from toys import CLASSES, Classifier, blobs, plain_losses, quiet_trainer

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule, LossTrajectories, trajectories_from_checkpoints

TRAIN, VAL = 70, 30
POOL = blobs(TRAIN + VAL)

pytestmark = pytest.mark.filterwarnings("ignore:.*trying to infer the `batch_size`.*")


class Stream(IterableDataset[Any]):
    """Shows samples with their positions or names, in another order each time, each worker its own share."""

    def __init__(self, start: int, stop: int, *, named: bool = False, split: bool = True, noise: float = 0.0) -> None:
        self.places = range(start, stop)
        self.named, self.split, self.noise = named, split, noise
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        places = list(self.places)
        worker = get_worker_info()
        if worker is not None and self.split:
            places = places[worker.id :: worker.num_workers]
        random.shuffle(places)
        for place in places:
            inputs, label = POOL[place]
            position = place - self.places.start
            yield inputs + self.noise * torch.randn(4), label, f"sample {position}" if self.named else position


class Ready:
    """An iterable of ready batches that is no DataLoader."""

    def __init__(self, stream: Stream, batch_size: int = 8) -> None:
        self.stream, self.batch_size = stream, batch_size

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.stream, self.batch_size))


class Endless(Stream):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()


class Tells(Classifier):
    """Says which samples a batch holds."""

    def cld_step(self, batch: Any) -> tuple[Tensor, Tensor, Any]:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none"), batch[1], batch[2]


class Idle(Tells):
    """Trains nothing, and has no BatchNorm, so that its losses stay."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, CLASSES)

    def configure_optimizers(self) -> None:
        return None


class Streams(L.LightningDataModule):
    """The streams of a run. `train_dataloader` makes a new loader over the same stream, as most do."""

    def __init__(self, wrap: Any = None, *, train: Any = None, val: Any = None, **how: Any) -> None:
        super().__init__()
        self.wrap = wrap or (lambda stream: DataLoader(stream, 8))
        self.train_set = train or Stream(0, TRAIN, **how)
        self.val_set = val or Stream(TRAIN, TRAIN + VAL, **how)

    def train_dataloader(self) -> Any:
        return self.wrap(self.train_set)

    def val_dataloader(self) -> Any:
        return self.wrap(self.val_set)


def fit(root: Any, cld: CLDCallback | None, data: Any, module: Any = Tells, **how: Any) -> Any:
    L.seed_everything(3, verbose=False)
    module = module()
    callbacks = [*how.pop("callbacks", []), *([] if cld is None else [cld])]
    quiet_trainer(root, *callbacks, **how).fit(module, datamodule=data)
    return module


def in_order(trajectories: LossTrajectories) -> Tensor:
    """The last row by the numbers in the names, or by position."""
    row = trajectories.train_losses[-1]
    if trajectories.names is None:
        return row
    return row[torch.tensor([int(name.split()[1]) for name in trajectories.names]).argsort()]


@pytest.mark.parametrize("named", [False, True], ids=["positions", "names"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda stream: DataLoader(stream, 8),
        lambda stream: DataLoader(stream, 8, num_workers=3),
        lambda stream: DataLoader(stream, 8, num_workers=2, persistent_workers=True),
        Ready,
    ],
    ids=["loader", "workers", "persistent", "iterable"],
)
def test_each_sample_gets_its_own_loss(tmp_path, wrap, named):
    cld = CLDCallback(dirpath=tmp_path, num_samples=None if named else TRAIN)
    module = fit(tmp_path, cld, Streams(wrap, named=named))
    expected = plain_losses(module, TensorDataset(*POOL[:TRAIN]))
    torch.testing.assert_close(in_order(cld.trajectories), expected, rtol=1e-5, atol=1e-6)
    assert not cld.trajectories.train_losses.isnan().any()
    by_name = None if cld.scores.names is None else [cld.scores.names[0], len(cld.scores.names)]
    assert by_name is None if not named else by_name[1] == TRAIN
    labels = POOL.tensors[1][:TRAIN]
    if not named:
        assert torch.equal(cld.scores.classes, labels)


def test_scores_are_bit_for_bit_those_of_the_same_samples_as_a_map_style_set(tmp_path):
    class InOrder(Stream):
        def __iter__(self) -> Iterator[Any]:
            return ((*POOL[place], place - self.places.start) for place in self.places)

    train, val = TensorDataset(*POOL[:TRAIN]), TensorDataset(*POOL[TRAIN:])
    data = L.LightningDataModule.from_datasets(train, val, batch_size=8)
    map_style = CLDCallback(dirpath=tmp_path / "map", batch_size=8)
    streamed = CLDCallback(
        dirpath=tmp_path / "stream",
        num_samples=TRAIN,
        train_dataloader=DataLoader(InOrder(0, TRAIN), 8),
        val_dataloader=DataLoader(InOrder(TRAIN, TRAIN + VAL), 8),
    )
    fit(tmp_path, map_style, data, Classifier)
    fit(tmp_path, streamed, data)
    for name in ("train_losses", "val_losses", "train_classes", "val_classes"):
        assert torch.equal(getattr(streamed.trajectories, name), getattr(map_style.trajectories, name))
    assert torch.equal(streamed.scores.values, map_style.scores.values)
    assert torch.equal(streamed.scores.plausibility, map_style.scores.plausibility)


@pytest.mark.parametrize("workers", [0, 2])
def test_watching_a_stream_changes_nothing(tmp_path, workers):
    def wrap(stream):
        return DataLoader(stream, 8, num_workers=workers)

    weights = []
    for cld in (None, CLDCallback(dirpath=tmp_path, num_samples=TRAIN)):
        data = Streams(wrap, noise=0.1)
        module = fit(tmp_path, cld, data)
        weights.append([*module.state_dict().values(), torch.get_rng_state()])
        weights[-1].append(torch.tensor(random.random()))
        weights[-1].append(torch.tensor([data.train_set.passes, data.val_set.passes]))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_loader_given_to_the_trainer_is_read_as_a_copy(tmp_path):
    loaders = [DataLoader(Stream(0, TRAIN), 8), DataLoader(Stream(TRAIN, TRAIN + VAL), 8)]
    cld = CLDCallback(dirpath=tmp_path, num_samples=TRAIN)
    L.seed_everything(3, verbose=False)
    quiet_trainer(tmp_path, cld).fit(module := Tells(), *loaders)
    torch.testing.assert_close(
        cld.trajectories.train_losses[-1], plain_losses(module, TensorDataset(*POOL[:TRAIN])), rtol=1e-5, atol=1e-6
    )
    assert loaders[0].dataset.passes == loaders[1].dataset.passes == 4  # the training's, one an epoch


def test_a_stream_that_cannot_be_copied_asks_for_one_of_its_own(tmp_path):
    class Locked(Stream):
        def __init__(self, *places: int) -> None:
            super().__init__(*places)
            self.open = (place for place in range(3))

    loaders = [DataLoader(Locked(0, TRAIN), 8), DataLoader(Stream(TRAIN, TRAIN + VAL), 8)]
    with pytest.raises(TypeError, match=r"can't be copied.*train_dataloader=\.\.\. of CLDCallback"):
        quiet_trainer(tmp_path, CLDCallback(num_samples=TRAIN)).fit(Tells(), *loaders)
    own = CLDCallback(dirpath=tmp_path, num_samples=TRAIN, train_dataloader=DataLoader(Locked(0, TRAIN), 8))
    quiet_trainer(tmp_path, own).fit(Tells(), *loaders)
    assert len(own.scores) == TRAIN


def test_a_sample_that_comes_twice_gets_the_mean_of_its_losses_and_one_that_does_not_come_none(tmp_path):
    class Uneven(Stream):
        def __iter__(self) -> Iterator[Any]:
            shown = [*range(TRAIN), 5, 5] if self.passes < 3 else [place for place in range(TRAIN) if place != 9]
            self.passes += 1
            return ((*POOL[place], place) for place in shown)

    view = DataLoader(Uneven(0, TRAIN), 8)
    cld = CLDCallback(dirpath=tmp_path, num_samples=TRAIN, train_dataloader=Holds(view))
    with pytest.warns(UserWarning, match="1 of the 70 samples of the first sweep did not come in a later one"):
        module = fit(tmp_path, cld, Streams())
    rows = cld.trajectories.train_losses
    assert rows[-1].isnan().nonzero().flatten().tolist() == [9]
    assert not rows[0].isnan().any()
    expected = plain_losses(module, TensorDataset(*POOL[:TRAIN]))
    kept = torch.arange(TRAIN) != 9
    torch.testing.assert_close(rows[-1][kept], expected[kept], rtol=1e-5, atol=1e-6)


class Holds:
    """A loader that can't be copied, so that it sees all sweeps."""

    def __init__(self, loader: Any) -> None:
        self.loader = [loader]
        self.open = (each for each in [])

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader[0])


def test_positions_that_never_come_are_outside_and_said(tmp_path):
    cld = CLDCallback(dirpath=tmp_path, num_samples=TRAIN + 10)
    with pytest.warns(UserWarning, match=r"10 of num_samples=80 train samples did not come.*12%"):
        fit(tmp_path, cld, Streams())
    assert cld.scores.classes[TRAIN:].tolist() == [-1] * 10
    assert cld.scores.values[TRAIN:].isnan().all()
    assert cld.scores.select(fraction=0.5).max() < TRAIN
    assert len(cld.scores.select(fraction=0.5)) == TRAIN // 2


def test_random_augmentation_is_noticed_by_its_losses(tmp_path):
    cld = CLDCallback(dirpath=tmp_path, num_samples=TRAIN)
    with pytest.warns(UserWarning, match="shows the same sample differently when read twice"):
        fit(tmp_path, cld, Streams(train=Stream(0, TRAIN, noise=0.5)))
    assert cld.scores.metadata["augmented"] is True
    steady = CLDCallback(dirpath=tmp_path, num_samples=TRAIN)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*differently")
        fit(tmp_path, steady, Streams())
    assert steady.scores.metadata["augmented"] is False


def test_a_sample_that_is_augmented_at_random_looks_the_same_at_every_checkpoint(tmp_path):
    cld = CLDCallback(dirpath=tmp_path, num_samples=TRAIN)
    fit(tmp_path, cld, Streams(train=Stream(0, TRAIN, noise=0.5)), Idle)
    rows = cld.trajectories.train_losses
    assert torch.equal(rows[0], rows[-1])


def test_workers_that_read_the_same_samples_are_said(tmp_path):
    cld = CLDCallback(dirpath=tmp_path, num_samples=TRAIN)
    with pytest.warns(UserWarning, match=r"showed 70 different samples, but read 140\. .*Split the stream by worker"):
        fit(
            tmp_path,
            cld,
            Streams(lambda stream: DataLoader(stream, 8, num_workers=2), train=Stream(0, TRAIN, split=False)),
        )
    assert len(cld.scores) == TRAIN


@pytest.mark.parametrize("history", ["full", "running"])
def test_names_are_saved_with_the_scores(tmp_path, history):
    cld = CLDCallback(dirpath=tmp_path, history=history)
    fit(tmp_path, cld, Streams(named=True))
    scores = CLDScores.load(tmp_path / "cld-scores.npz")
    assert sorted(scores.names) == sorted(f"sample {position}" for position in range(TRAIN))
    numbers = torch.tensor([int(name.split()[1]) for name in scores.names])
    assert torch.equal(scores.classes, POOL.tensors[1][:TRAIN][numbers])
    assert scores.metadata["identity"] == ["names"]


@pytest.mark.parametrize("named", [False, True], ids=["positions", "names"])
@pytest.mark.parametrize("history", ["full", "running"])
def test_a_resumed_run_has_the_same_scores(tmp_path, history, named):
    class Steady(Tells):
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = torch.nn.Identity()

    class Halts(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 2:
                raise InterruptedError

    def steady(stream):
        return DataLoader(Sorted(stream), 8)

    def run(folder, *callbacks, **how):
        cld = CLDCallback(dirpath=folder, history=history, num_samples=None if named else TRAIN)
        L.seed_everything(3, verbose=False)
        trainer = quiet_trainer(folder, *callbacks, cld, enable_checkpointing=True)
        trainer.fit(Steady(), datamodule=Streams(steady, named=named), **how)
        return cld.scores

    whole = run(tmp_path / "whole")
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "part", "{epoch}", save_on_train_epoch_end=True)
    with pytest.raises(InterruptedError):
        run(tmp_path / "part", Halts(), saver)
    resumed = run(tmp_path / "part", ckpt_path=tmp_path / "part" / "epoch=1.ckpt", weights_only=True)
    assert torch.equal(resumed.values, whole.values)
    assert torch.equal(resumed.classes, whole.classes)
    assert resumed.epochs == whole.epochs == [0, 1, 2, 3, 4]
    assert resumed.names == whole.names


class Sorted(IterableDataset[Any]):
    """The samples of a stream in order: Lightning does not restore the random states of a resumed run."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(self.stream, key=lambda sample: str(sample[2])))


@pytest.mark.parametrize("named", [False, True], ids=["positions", "names"])
def test_training_steps_may_say_positions_or_names(tmp_path, named):
    class Returns(Tells):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
            for sample, loss in zip(batch[2], losses.tolist(), strict=True):
                logged[self.current_epoch, str(sample) if named else int(sample)] = loss
            return {"loss": losses.mean(), "sample_losses": losses, "sample_index": batch[2]}

    logged: dict[Any, float] = {}
    cld = CLDCallback(dirpath=tmp_path, record="step", num_samples=None if named else TRAIN)
    fit(tmp_path, cld, Streams(named=named), Returns)
    for epoch in range(4):
        row = cld.trajectories.train_losses[epoch + 1]
        for position in range(TRAIN):
            sample = cld.trajectories.names[position] if named else position
            assert row[position].item() == pytest.approx(logged[epoch, sample], rel=1e-6)


class Says(Tells):
    """Says in a training step what `index` makes of the names of a batch."""

    index: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return {"loss": losses.mean(), "sample_losses": losses, "sample_index": type(self).index(batch[2])}


def test_training_steps_of_a_stream_with_names_must_say_names(tmp_path):
    class Numbers(Says):
        index = staticmethod(lambda names: torch.tensor([int(name.split()[1]) for name in names]))

    with pytest.raises(TypeError, match="sample_index must be names, by which the samples of this stream are known"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path, record="step"), Streams(named=True), Numbers)


def test_a_name_that_the_first_sweep_did_not_show_is_said_wherever_it_comes(tmp_path):
    class Some(Says):
        index = staticmethod(lambda names: [name if int(name.split()[1]) > 3 else f"new {name}" for name in names])

    class Others(Says):
        index = staticmethod(lambda names: [f"new {name}" for name in names])

    cld = CLDCallback(dirpath=tmp_path, record="step")
    with pytest.warns(UserWarning, match="CLD: 4 losses had a sample_index that the first sweep did not show"):
        fit(tmp_path, cld, Streams(lambda stream: DataLoader(Sorted(stream), 8), named=True), Some)
    assert cld.trajectories.train_losses[1:].isnan().sum() == 4 * 4
    with pytest.raises(ValueError, match="names that are not among the 70 of the first sweep, such as 'new sample"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path, record="step"), Streams(named=True), Others)


def test_a_name_of_two_samples_is_noticed_though_the_first_losses_are_all_equal(tmp_path):
    class Zero(Tells):
        def __init__(self) -> None:
            super().__init__()
            torch.nn.init.zeros_(self.net[-1].weight), torch.nn.init.zeros_(self.net[-1].bias)

    class Twice(Stream):
        def __iter__(self) -> Iterator[Any]:
            for place in self.places:
                inputs, label = POOL[place]
                same = [other for other in self.places if POOL[other][1] == label]
                yield inputs, label, f"{int(label)}-{same.index(place) % 15}"

    data = Streams(train=Twice(0, TRAIN), val=Stream(TRAIN, TRAIN + VAL, named=True))
    with pytest.warns(UserWarning, match="came several times in one sweep, with losses that differ"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path), data, Zero)


def test_a_view_of_the_data_that_the_training_reads_is_read_as_a_copy(tmp_path):
    class Counting(Stream):
        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            generator = torch.Generator().manual_seed(self.passes)
            for place in torch.randperm(len(self.places), generator=generator).tolist():
                yield *POOL[self.places[place]], f"sample {place}"

    class Viewed(Streams):
        def cld_train_dataloader(self) -> Any:
            return DataLoader(self.train_set, 16)

        def cld_val_dataloader(self) -> Any:
            return DataLoader(self.val_set, 16)

    seen: list[Any] = []

    class Notes(Tells):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch[2])
            return super().training_step(batch, batch_idx)

    for cld in (None, CLDCallback(dirpath=tmp_path)):
        fit(tmp_path, cld, Viewed(train=Counting(0, TRAIN), val=Counting(TRAIN, TRAIN + VAL)), Notes)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


def test_a_bad_validation_sample_is_called_by_its_name(tmp_path):
    class Bad(Stream):
        def __iter__(self) -> Iterator[Any]:
            for inputs, label, name in super().__iter__():
                yield inputs if name != "sample 7" else inputs * torch.inf, label, name

    data = Streams(train=Stream(0, TRAIN, named=True), val=Bad(TRAIN, TRAIN + VAL, named=True))
    with pytest.raises(ValueError, match=r"are not finite \('sample 7' of the validation set, say\)"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path), data)


def test_a_run_on_a_stream_is_not_resumed_on_a_map_style_set(tmp_path):
    class One(Tells):
        def cld_step(self, batch: Any) -> Any:
            return super().cld_step(batch)[0], None, *batch[2:]

    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True)
    data = Streams(named=True)
    fit(tmp_path, CLDCallback(dirpath=tmp_path), data, One, callbacks=[saver], enable_checkpointing=True)
    map_style = Streams(train=Stream(0, TRAIN), val=data.val_set)
    map_style.train_dataloader = lambda: DataLoader(TensorDataset(*POOL[:TRAIN]), 8)
    trainer = quiet_trainer(tmp_path, CLDCallback(dirpath=tmp_path), max_epochs=6)
    with pytest.raises(ValueError, match="not the one whose losses were logged so far: one is a stream, and the other"):
        trainer.fit(One(), datamodule=map_style, ckpt_path=tmp_path / "epoch=3.ckpt", weights_only=True)


def test_the_checkpoints_of_a_finished_run_are_read_over_streams(tmp_path):
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    cld = CLDCallback(dirpath=tmp_path, num_samples=TRAIN)
    L.seed_everything(3, verbose=False)
    trainer = quiet_trainer(tmp_path, saver, cld, enable_checkpointing=True)
    trainer.fit(module := Tells(), datamodule=Streams())
    found = trajectories_from_checkpoints(
        trainer, module, sorted(tmp_path.glob("epoch*.ckpt")), Streams(), num_samples=TRAIN
    )
    assert torch.equal(found.train_losses, cld.trajectories.train_losses[1:])


class Wrong(Tells):
    """Returns something else in place of positions."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def cld_step(self, batch: Any) -> Any:
        losses, classes, positions = super().cld_step(batch)
        return self.change(losses, classes, positions)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda losses, classes, at: (losses, classes), TypeError, r"is a stream.*\(losses, classes, positions\)"),
        (lambda losses, classes, at: (losses, classes, None), TypeError, "is a stream"),
        (
            lambda losses, classes, at: (losses, classes, at.float()),
            TypeError,
            "positions as an integer tensor.*float32",
        ),
        (lambda losses, classes, at: (losses, classes, at[:, None]), TypeError, r"shape \[8, 1\]"),
        (lambda losses, classes, at: (losses, classes, at.tolist()), TypeError, "a list of 8"),
        (lambda losses, classes, at: (losses, classes, at[:3]), ValueError, "8 losses, but 3 positions"),
        (lambda losses, classes, at: (losses, classes, ["a", "b"]), ValueError, "8 losses, but 2 names"),
        (lambda losses, classes, at: (losses, classes, at + 1), ValueError, "num_samples=70 .*from 1 to 70"),
        (lambda losses, classes, at: (losses, classes, at - 1), ValueError, "num_samples=70 .*from -1 to 68"),
        (lambda losses, classes, at: (losses, classes, at // 2), ValueError, "belong to several samples.*the classes"),
        (lambda losses, classes, at: (losses, None, at), ValueError, "None"),
    ],
    ids=["pair", "none", "float", "shape", "list", "few", "few names", "high", "low", "shared", "classes"],
)
def test_bad_positions_raise_before_the_first_step(tmp_path, change, error, message):
    module = Wrong(change)
    if message == "None":  # from one of the batches only
        first = module.change
        module.change = lambda losses, classes, at: first(losses, classes, at) if 0 in at else (losses, classes, at)
    with pytest.raises(error, match=message):
        quiet_trainer(tmp_path, CLDCallback(num_samples=TRAIN)).fit(module, datamodule=Streams())
    assert module.trainer.global_step == 0


def test_the_default_loss_says_that_a_stream_needs_a_step(tmp_path):
    with pytest.raises(
        TypeError, match=r"The train loader, a DataLoader, is a stream.*step=.*\(losses, classes, positions\)"
    ):
        fit(tmp_path, CLDCallback(num_samples=TRAIN), Streams(), Classifier)


def test_positions_need_to_know_how_many_there_are_and_names_do_not(tmp_path):
    with pytest.raises(ValueError, match=r"say how many samples there are: CLDCallback\(num_samples=\.\.\.\)"):
        fit(tmp_path, CLDCallback(), Streams())
    with pytest.raises(ValueError, match="70 different names, more than num_samples=50"):
        fit(tmp_path, CLDCallback(num_samples=50), Streams(named=True))
    with pytest.raises(ValueError, match="num_samples must be"):
        CLDCallback(num_samples=0)
    data = L.LightningDataModule.from_datasets(TensorDataset(*POOL[:TRAIN]), TensorDataset(*POOL[TRAIN:]))
    with pytest.raises(ValueError, match="num_samples=50, but the train set has 70 samples"):
        fit(tmp_path, CLDCallback(num_samples=50), data, Classifier)


@pytest.mark.parametrize("named", [False, True], ids=["positions", "names"])
def test_an_endless_stream_asks_for_a_limit_and_keeps_it(tmp_path, monkeypatch, named):
    monkeypatch.setattr("lightning_cld.recording.stream_reading.READ", 500)
    data = Streams(train=Endless(0, TRAIN, named=named), named=named)
    with pytest.raises(ValueError, match=r"does not seem to end.*only 70 .*limit_train_batches=\.\.\."):
        fit(tmp_path, CLDCallback(num_samples=None if named else TRAIN), data, max_steps=20)
    cld = CLDCallback(dirpath=tmp_path, num_samples=None if named else TRAIN)
    fit(tmp_path, cld, Streams(train=Endless(0, TRAIN, named=named), named=named), limit_train_batches=10)
    assert len(cld.scores) == TRAIN  # 10 batches of 8 reach into the second pass
    assert not cld.scores.values.isnan().any()


def test_an_empty_stream_raises(tmp_path):
    with pytest.raises(ValueError, match="The validation stream is empty"):
        fit(tmp_path, CLDCallback(num_samples=TRAIN), Streams(val=Stream(0, 0)), limit_val_batches=0)


class Changes(Tells):
    """From the second epoch on its stream has other classes, names or samples."""

    what = ""

    def cld_step(self, batch: Any) -> Any:
        losses, classes, samples = super().cld_step(batch)
        if self.current_epoch == 0 and self.trainer.global_step == 0:
            return losses, classes, samples
        if self.what == "classes":
            classes = (classes + 1) % CLASSES
        elif self.what == "positions":
            samples = samples.flip(0)
        elif self.what == "names":
            samples = [f"other {sample}" for sample in samples]
        elif self.what == "fewer":
            losses, classes, samples = losses[:4], classes[:4], samples[:4]
        return losses, classes, samples


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("classes", "70 samples of the train stream have other classes than in the first sweep, such as position"),
        ("names", "no sample of the train stream was in the first sweep"),
        ("fewer", "the validation stream showed only 16 of the 30 samples"),
    ],
)
def test_a_stream_that_changes_is_said_and_stops_nothing(tmp_path, what, message):
    named = what == "names"
    cld = CLDCallback(dirpath=tmp_path, num_samples=None if named else TRAIN)
    with pytest.warns(UserWarning, match=message):
        module = fit(tmp_path, cld, Streams(named=named), type("Other", (Changes,), {"what": what}))
    assert module.trainer.current_epoch == 4


def test_one_class_works_for_streams(tmp_path):
    class NoClasses(Tells):
        def cld_step(self, batch: Any) -> Any:
            losses, _, samples = super().cld_step(batch)
            return losses, None, samples

    cld = CLDCallback(dirpath=tmp_path, num_samples=TRAIN + 1)
    with pytest.warns(UserWarning, match="1 of num_samples"):
        fit(tmp_path, cld, Streams(), NoClasses)
    assert cld.scores.classes.tolist() == [0] * TRAIN + [-1]


def test_names_are_told_apart_from_positions_by_any_array(tmp_path):
    class Array(Tells):
        def cld_step(self, batch: Any) -> Any:
            losses, classes, samples = super().cld_step(batch)
            return losses, classes, np.array(samples)

    cld = CLDCallback(dirpath=tmp_path)
    fit(tmp_path, cld, Streams(named=True), Array)
    assert len(cld.scores.names) == TRAIN


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_a_sweep_of_unknown_length_suits_the_progress_bars(tmp_path, bar):
    cld = CLDCallback(dirpath=tmp_path, num_samples=TRAIN)
    fit(tmp_path, cld, Streams(Ready), callbacks=[bar()], enable_progress_bar=True)
    assert len(cld.scores) == TRAIN


def test_a_resumed_run_of_one_class_knows_what_its_first_sweep_saw(tmp_path):
    class NoClasses(Tells):
        def cld_step(self, batch: Any) -> Any:
            losses, _, samples = super().cld_step(batch)
            return losses, None, samples

    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True)
    first = CLDCallback(dirpath=tmp_path, num_samples=TRAIN + 2)
    with pytest.warns(UserWarning, match="2 of num_samples"):
        fit(tmp_path, first, Streams(), NoClasses, callbacks=[saver], enable_checkpointing=True)
    cld = CLDCallback(dirpath=tmp_path, num_samples=TRAIN + 2)
    trainer = quiet_trainer(tmp_path, cld, max_epochs=6)
    trainer.fit(NoClasses(), datamodule=Streams(), ckpt_path=tmp_path / "epoch=3.ckpt", weights_only=True)
    assert cld.scores.epochs == list(range(7))
    assert cld.scores.positions().tolist() == list(range(TRAIN))
    assert cld.trajectories.train_losses[-1, :TRAIN].isfinite().all()


def test_positions_of_a_validation_stream_that_leave_out_most_are_refused(tmp_path):
    class Global(Classifier):
        def cld_step(self, batch: Any) -> Any:
            losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
            return (losses, batch[1]) if len(batch) == 2 else (losses, batch[1], batch[2] * 10**9)

    data = L.LightningDataModule.from_datasets(TensorDataset(*POOL[:TRAIN]))
    data.val_dataloader = lambda: DataLoader(Stream(TRAIN, TRAIN + VAL), 8)
    with pytest.raises(ValueError, match=r"The validation stream has positions up to 29,000,000,000.*return names"):
        fit(tmp_path, CLDCallback(), data, Global)


def test_the_coreset_of_a_stream_is_not_scored(tmp_path):
    coreset = CoresetDataModule(Streams(), list(range(20)), identify=lambda sample: sample[2])
    with pytest.raises(TypeError, match="serves a coreset of a stream"):
        fit(tmp_path, CLDCallback(num_samples=TRAIN), coreset)


class Remembers(Stream):
    """Keeps what a pass changes in arrays and generators of its own."""

    def __init__(self, *places: int, **how: Any) -> None:
        super().__init__(*places, **how)
        self.order = torch.tensor(self.places)
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.random = np.random.default_rng(0)

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        self.order[:] = self.order[torch.from_numpy(self.random.permutation(len(self.order)))]
        for place in self.order.tolist()[int(self.epoch) % 3 :]:
            yield *POOL[place], place - self.places.start


@pytest.mark.parametrize("give", ["module", "loaders"])
def test_arrays_and_generators_of_a_stream_stay_as_the_training_left_them(tmp_path, give):
    class Notes(Tells):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch[2].tolist())
            return super().training_step(batch, batch_idx)

    noted = []
    for cld in (None, CLDCallback(dirpath=tmp_path, num_samples=TRAIN)):
        seen: list[Any] = []
        data = Streams(train=Remembers(0, TRAIN))
        L.seed_everything(3, verbose=False)
        trainer = quiet_trainer(tmp_path, *([] if cld is None else [cld]))
        if give == "module":
            trainer.fit(Notes(), datamodule=data)
        else:
            trainer.fit(Notes(), data.train_dataloader(), data.val_dataloader())
        noted.append(seen)
    assert noted[0] == noted[1]
    missing = cld.trajectories.train_losses.isnan()  # each sweep begins in the same state, and shows the same samples
    assert missing[0].any()
    assert (missing == missing[0]).all()


def test_a_method_that_makes_another_loader_each_time_is_left_as_it_was(tmp_path):
    class Counts(Streams):
        calls = 0

        def train_dataloader(self) -> Any:
            self.calls += 1
            self.drawn = [*getattr(self, "drawn", []), self.calls]
            return DataLoader(Stream(0, TRAIN - self.calls), 8)

    calls = []
    for cld in (None, CLDCallback(dirpath=tmp_path, num_samples=TRAIN)):
        data = Counts()
        fit(tmp_path, cld, data, reload_dataloaders_every_n_epochs=1)
        calls.append((data.calls, data.drawn))
    assert calls[0] == calls[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_from_a_generator_of_the_stream_is_noticed_and_repeated(tmp_path, workers):
    class Noisy(Stream):
        def __init__(self, *places: int) -> None:
            super().__init__(*places)
            self.generator = torch.Generator().manual_seed(0)

        def __iter__(self) -> Iterator[Any]:
            for place in range(TRAIN) if get_worker_info() is None else range(TRAIN)[get_worker_info().id :: 2]:
                yield POOL[place][0] + 0.5 * torch.randn(4, generator=self.generator), POOL[place][1], place

    cld = CLDCallback(dirpath=tmp_path, num_samples=TRAIN)
    data = Streams(lambda stream: DataLoader(stream, 8, num_workers=workers), train=Noisy(0, TRAIN))
    with pytest.warns(UserWarning, match="shows the same sample differently"):
        fit(tmp_path, cld, data, Idle)
    assert torch.equal(cld.trajectories.train_losses[0], cld.trajectories.train_losses[-1])


def test_names_may_hold_any_letters(tmp_path):
    odd = ["a", "a\0", "\udcff.png", "\u00e4\u4e2d", ""]

    class Odd(Tells):
        def cld_step(self, batch: Any) -> Any:
            losses, classes, positions = super().cld_step(batch)
            return losses, classes, [odd[at] if at < len(odd) else str(at) for at in positions.tolist()]

    cld = CLDCallback(dirpath=tmp_path)
    fit(tmp_path, cld, Streams(), Odd)
    assert len(cld.scores) == TRAIN
    assert set(odd) < set(CLDScores.load(tmp_path / "cld-scores.npz").names)


def test_a_stream_that_can_be_read_only_once_raises_before_training(tmp_path):
    once = iter(DataLoader(Stream(0, TRAIN), 8))
    with pytest.raises(ValueError, match="The train stream can be read only once"):
        fit(tmp_path, CLDCallback(num_samples=TRAIN, train_dataloader=once), Streams())


def test_a_run_that_is_resumed_on_another_stream_is_told_so(tmp_path):
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True)
    fit(tmp_path, CLDCallback(dirpath=tmp_path), Streams(named=True), callbacks=[saver], enable_checkpointing=True)

    class Others(Tells):
        def cld_step(self, batch: Any) -> Any:
            losses, classes, names = super().cld_step(batch)
            return losses, classes, [f"other {name}" for name in names]

    trainer = quiet_trainer(tmp_path, CLDCallback(dirpath=tmp_path), max_epochs=6)
    with pytest.warns(
        UserWarning, match="no sample of the train stream was in the first sweep: this is another stream"
    ):
        trainer.fit(Others(), datamodule=Streams(named=True), ckpt_path=tmp_path / "epoch=3.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic.*")
def test_a_stream_that_goes_on_where_it_was_left_is_said(tmp_path):
    class Resumes(Stream):
        place = 0

        def __iter__(self) -> Iterator[Any]:
            while self.place < len(self.places):
                self.place += 1
                yield *POOL[self.place - 1], f"sample {self.place - 1}"
            self.place = 0

    data = Streams(train=Resumes(0, TRAIN), val=Stream(TRAIN, TRAIN + VAL, named=True))
    with pytest.warns(UserWarning, match="samples that had not come before. It goes on where it was left"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path), data)
