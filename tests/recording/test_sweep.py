"""What a sweep costs besides evaluating samples: worker processes, waits for the device, pinned memory."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import BatchSampler, DataLoader, Dataset, SubsetRandomSampler

from lightning_cld import CLDCallback
from lightning_cld.data.identity import look_at
from lightning_cld.recording import sources
from lightning_cld.recording.batch_hooks import BatchHooks
from lightning_cld.recording.sweep import Sweep
from tests.toys import Blobs, Classifier, blobs, fit, quiet_trainer


class ReadBy(Dataset):
    """Points, each with the id of the process that read it; `augments` adds noise."""

    def __init__(self, augments=False, samples=80):
        self.points, self.targets = blobs(samples).tensors
        self.augments = augments

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        point = self.points[index] + (torch.randn(4) if self.augments else 0)
        return point, self.targets[index], os.getpid()


class Tells(Classifier):
    """Logs as losses the process that read each sample, or the sum of the point."""

    asks = "process"

    def cld_step(self, batch):
        points, targets, readers = batch
        return (readers.double() if self.asks == "process" else points.sum(1)), targets


def watched(tmp_path, asks="process", augments=False, callbacks=(), plan=None, **loader):
    class Asking(Tells):
        pass

    Asking.asks = asks
    data = Blobs()
    data.train_set, data.val_set = ReadBy(augments), ReadBy(augments, 40)
    data.loader = {"batch_size": 8, **loader}
    data.val_dataloader = lambda: DataLoader(data.val_set, batch_size=8, **loader)
    cld = CLDCallback(**(plan or {}))
    fit(tmp_path, cld, Asking, datamodule=data, max_epochs=6, callbacks=list(callbacks))
    return cld


@pytest.fixture(autouse=True)
def readers_may_change(monkeypatch):
    """Samples here say which process read them. Another one in a later sweep is no sign of other data."""
    monkeypatch.setattr(Sweep, "_check_same", lambda self, batch: None)


def rows(*arguments, **named):
    return watched(*arguments, **named).trajectories


def readers(losses):
    return [set(row.unique().tolist()) for row in losses]


def test_persistent_workers_are_kept_between_sweeps(tmp_path):
    kept = rows(tmp_path, num_workers=2, persistent_workers=True)
    for losses in (kept.train_losses, kept.val_losses):
        first, *later = readers(losses)
        assert len(first) == 2
        assert all(row == first for row in later)
    assert readers(kept.train_losses)[0] != readers(kept.val_losses)[0]


def test_other_workers_are_started_anew(tmp_path):
    first, second, *_ = readers(rows(tmp_path, num_workers=2).train_losses)
    assert len(first) == len(second) == 2
    assert not first & second


@pytest.mark.filterwarnings("ignore:.*shows the same sample differently.*")
def test_workers_that_draw_are_started_anew_so_that_each_sweep_shows_the_same(tmp_path):
    workers = {"num_workers": 2, "persistent_workers": True}
    first, second, *_ = readers(rows(tmp_path, augments=True, **workers).train_losses)
    assert not first & second
    shown = rows(tmp_path, "points", augments=True, **workers).train_losses
    assert torch.equal(shown, shown[:1].expand_as(shown))


def test_kept_workers_are_gone_after_the_fit(tmp_path):
    before = len(multiprocessing.active_children())
    cld = watched(tmp_path, num_workers=1, persistent_workers=True)
    assert len(multiprocessing.active_children()) == before
    assert len(cld.trajectories) == 7


def test_kept_workers_are_gone_after_the_cutoff(tmp_path):
    class Counts(Callback):
        def __init__(self):
            self.alive = []

        def on_train_epoch_start(self, trainer, module):
            self.alive.append(len(multiprocessing.active_children()))

    before, counts = len(multiprocessing.active_children()), Counts()
    watched(tmp_path, callbacks=[counts], plan={"cutoff_epoch": 4}, num_workers=1, persistent_workers=True)
    # Two workers of the sweeps, one of training, and later one of validation.
    assert [alive - before for alive in counts.alive] == [
        3,
        4,
        4,
        4,
        2,
        2,
    ]


def test_a_rare_augmentation_is_found_before_workers_are_kept():
    class Rarely(ReadBy):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            point, target, reader = super().__getitem__(index)
            return point + (self.reads % 23 == 0), target, reader

    assert look_at(DataLoader(Rarely(), num_workers=1, persistent_workers=True), "train").changes == "yes"


def test_a_sweep_that_failed_starts_its_workers_anew(tmp_path):
    class FailsOnce(Tells):
        calls = 0

        def cld_step(self, batch):
            FailsOnce.calls += 1
            if FailsOnce.calls == 7:  # in the train sweep after the first epoch
                raise RuntimeError("once")
            return super().cld_step(batch)

    data = Blobs()
    data.train_set, data.val_set = ReadBy(), ReadBy(samples=8)
    data.loader = {"batch_size": 20, "num_workers": 2, "persistent_workers": True}
    data.val_dataloader = lambda: DataLoader(data.val_set, batch_size=20)
    cld = CLDCallback()
    with pytest.warns(UserWarning, match="could not be logged: once"):
        fit(tmp_path, cld, FailsOnce, datamodule=data, max_epochs=4)
    theta_0, hole, *later = cld.trajectories.train_losses
    assert hole.isnan().all()
    assert [len(row.unique()) for row in (theta_0, *later)] == [2, 2, 2, 2]
    assert not set(theta_0.tolist()) & set(later[0].tolist())
    assert set(later[0].tolist()) == set(later[1].tolist())


class Waits(TorchDispatchMode):
    """Counts all operations. The ones that turn a tensor into a number wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss(reduction="none")])
def test_nothing_waits_for_the_device_batch_by_batch(tmp_path, loss_fn):
    from lightning_cld.recording.batch_losses import make_step

    module, loader = Classifier(), DataLoader(blobs(120), batch_size=120)
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.connect(module)
    waits = []
    for batch_size in (120, 4):
        sweep = Sweep(loader, torch.arange(120), batch_size=batch_size, kind="train")
        with Waits() as counted:
            sweep.run(trainer, module, make_step(module, loss_fn), BatchHooks([], module), lambda: False)
        assert counted.seen["aten.addmm.default"] == 2 * 120 / batch_size  # proves that it counts
        waits.append(counted.seen["aten._local_scalar_dense.default"])
    assert waits[0] == waits[1]


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_for_a_gpu_are_pinned(device, pinned):
    sweep = Sweep(DataLoader(blobs(), batch_size=8), torch.arange(120), batch_size=None, kind="train")
    assert sweep._make_reader(torch.arange(120), torch.device(device)).pin_memory is pinned


class Elsewhere(ReadBy):
    """Its points are on another device."""

    def __getitem__(self, index):
        point, target, _ = super().__getitem__(index)
        return point.to("meta"), target


def moved(samples):
    points, targets = zip(*samples, strict=True)
    return torch.stack([point[:4] for point in points]).to("meta"), torch.stack(targets)


@pytest.mark.parametrize("pin_memory", [True, False])
@pytest.mark.parametrize(
    ("dataset", "collate_fn", "pinned"),
    [(blobs(), None, True), (Elsewhere(), None, False), (blobs(), moved, False)],
    ids=["on the cpu", "samples on a device", "batches on a device"],
)
def test_what_is_on_a_device_already_is_not_pinned(dataset, collate_fn, pinned, pin_memory):
    loader = DataLoader(dataset, 8, collate_fn=collate_fn, pin_memory=pin_memory)
    sweep = sources._sweep(loader, torch.arange(40), look_at(loader, "train"), None, "train")
    assert sweep._make_reader(torch.arange(40), torch.device("cuda")).pin_memory is pinned


class Wrapped(DataLoader):
    """Iterates in a way of its own, below `__iter__`, as PyG's NodeLoader does."""

    def _get_iterator(self):
        return iter(super()._get_iterator())


def test_a_loader_with_an_iterator_of_its_own_is_warned_of(tmp_path):
    data = Blobs()
    data.cld_train_dataloader = lambda: Wrapped(data.train_set, 32)
    with pytest.warns(UserWarning, match="Wrapped iterates in a way of its own"):
        fit(tmp_path, CLDCallback(), datamodule=data)


class Repeats:
    """A batch sampler around another one, as in timm's MultiEpochsDataLoader."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        return iter(self.sampler)

    def __len__(self):
        return len(self.sampler)


def test_a_wrapped_batch_sampler_is_looked_through(tmp_path, recwarn):
    data = Blobs()
    batches = Repeats(BatchSampler(SubsetRandomSampler(range(60)), 16, False))
    data.train_dataloader = lambda: DataLoader(data.train_set, batch_sampler=batches)
    cld = CLDCallback(batch_size=30)
    fit(tmp_path, cld, datamodule=data)
    assert cld.trajectories.train_classes[60:].eq(-1).all()
    assert not any("is unknown" in str(warning.message) for warning in recwarn)
