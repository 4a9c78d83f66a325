"""Hooks that prepare a batch for evaluation, in sweeps."""

import threading
from typing import NamedTuple

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback, DeviceStatsMonitor
from lightning.pytorch.loggers import CSVLogger
from toys import Blobs, Classifier, fit, plain_losses, quiet_trainer

from lightning_cld import CLDCallback, trajectories_from_checkpoints
from lightning_cld.recording.batch_hooks import _moved


class Scaled(Blobs):
    """Inputs that are a hundred times too large for the module."""

    def __init__(self, **loader):
        super().__init__(**loader)
        pool = self.train_set.dataset
        self.plain = pool.tensors[0].clone()
        pool.tensors = (100 * pool.tensors[0], pool.tensors[1])


class Rescale(Callback):
    """Prepares batches in place, and counts how often."""

    def __init__(self):
        self.prepared = 0
        self.kept = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[0] /= 100

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.prepared += 1
        self.kept.append(batch_idx)
        batch[0] = batch[0] / 100


class RescalingClassifier(Classifier):
    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.prepared = getattr(self, "prepared", 0) + 1
        batch[0] = batch[0] / 100

    def on_train_batch_start(self, batch, batch_idx):
        batch[0] /= 100


def last_losses(data, module):
    """The losses of the train and validation samples as the module sees them once they are prepared."""
    pool = data.train_set.dataset
    pool.tensors = (data.plain, pool.tensors[1])
    return plain_losses(module, data.train_set), plain_losses(module, data.val_set)


def assert_prepared(cld, data, module):
    for row, expected in zip(
        (cld.trajectories.train_losses[-1], cld.trajectories.val_losses[-1]), last_losses(data, module), strict=True
    ):
        assert torch.allclose(row, expected, atol=1e-4)


def test_a_callback_prepares_the_batches_of_sweeps(tmp_path):
    data, cld, rescale = Scaled(), CLDCallback(), Rescale()
    _, module = fit(tmp_path, cld, datamodule=data, callbacks=[rescale])
    assert_prepared(cld, data, module)
    # The run's own validations only: two batches in each of four epochs.
    assert rescale.prepared == len(rescale.kept) == 8


def test_a_module_prepares_the_batches_of_sweeps(tmp_path):
    data, cld = Scaled(), CLDCallback()
    _, module = fit(tmp_path, cld, RescalingClassifier, data)
    assert_prepared(cld, data, module)


def test_hooks_prepare_in_the_order_of_callbacks(tmp_path):
    class Halve(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            seen.append(float(batch[0].abs().max()) < 50)
            batch[0] = batch[0] / 2

    seen = []
    fit(tmp_path, CLDCallback(), datamodule=Scaled(), callbacks=[Rescale(), Halve()])
    assert all(seen)


def test_a_hook_that_changes_no_batch_runs_once_a_sweep(tmp_path):
    class Watch(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            calls.append(trainer.state.stage)

    calls = []
    cld = CLDCallback()
    fit(tmp_path, cld, callbacks=[Watch()], limit_val_batches=0)
    assert len(calls) == 2 * len(cld.trajectories)  # of the train and of the validation set


def test_a_hook_sees_what_its_callback_has_learned(tmp_path):
    class Centre(Callback):
        """Subtracts the mean of the inputs that training has seen so far."""

        def __init__(self):
            self.mean = torch.zeros(4)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(0)

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            batch[0] = batch[0] - self.mean  # which is zero before training

    data, cld, centre = Blobs(), CLDCallback(), Centre()
    _, module = fit(tmp_path, cld, datamodule=data, callbacks=[centre])
    inputs, labels = data.train_set.dataset.tensors
    data.train_set.dataset.tensors = (inputs - centre.mean, labels)
    assert torch.allclose(cld.trajectories.train_losses[-1], plain_losses(module, data.train_set), atol=1e-4)


def test_a_callback_that_cannot_be_copied_is_refused_at_the_start(tmp_path):
    class Locked(Rescale):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(TypeError, match=r"Locked\.on_validation_batch_start .* on_after_batch_transfer"):
        fit(tmp_path, CLDCallback(), callbacks=[Locked()])


def test_a_copied_callback_shares_trainer_and_module(tmp_path):
    class Knows(Rescale):
        def setup(self, trainer, pl_module, stage):
            self.trainer, self.module = trainer, pl_module

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            seen.append((self.trainer is trainer, self.module is pl_module))
            super().on_validation_batch_start(trainer, pl_module, batch, batch_idx)

    seen = []
    fit(tmp_path, CLDCallback(), callbacks=[Knows()])
    assert set(seen) == {(True, True)}


def test_hooks_of_lightning_are_not_called(tmp_path, monkeypatch):
    def run(cld):
        calls = []
        monkeypatch.setattr(DeviceStatsMonitor, "_get_and_log_device_stats", lambda *arguments: calls.append(arguments))
        fit(tmp_path, cld, callbacks=[DeviceStatsMonitor(cpu_stats=True)], logger=CSVLogger(tmp_path))
        return len(calls)

    assert run(CLDCallback()) == run(None) > 0


class BringsHooks(Classifier):
    def configure_callbacks(self):
        return [Rescale()]


@pytest.mark.parametrize(("module", "callbacks"), [(Classifier, [Rescale()]), (BringsHooks, [])])
def test_checkpoints_are_swept_with_the_hooks_of_their_run(tmp_path, module, callbacks):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    data, cld = Scaled(), CLDCallback()
    fit(tmp_path, cld, module, datamodule=data, callbacks=[*callbacks, Save()])
    files = [tmp_path / f"{epoch}.ckpt" for epoch in range(4)]
    trainer = quiet_trainer(tmp_path, *callbacks)
    found = trajectories_from_checkpoints(trainer, module(), files, datamodule=data)
    assert torch.equal(found.train_losses, cld.trajectories.train_losses[1:])
    assert found.train_losses.max() < 50


class Pair(NamedTuple):
    inputs: torch.Tensor
    name: str


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_batch_comes_to_the_device_as_lightning_brings_it(device):
    pairs = [Pair(torch.ones(2), "a"), (torch.ones(1), [3, None], [])]
    batch = {"inputs": torch.ones(2), "names": ["a", "b"], "pairs": pairs, "number": 2.5, 7: None}
    moved = _moved(batch, torch.device(device))
    assert repr(moved) == repr(move_data_to_device(batch, torch.device(device)))
    assert moved["pairs"][0].inputs.device.type == moved["pairs"][1][0].device.type == device
    moved["names"].append("c")
    moved["pairs"].append("c")
    assert len(batch["names"]) == len(batch["pairs"]) == 2


def test_a_modules_hook_sees_every_batch_though_it_changes_none(tmp_path):
    class Shifting(Classifier):
        def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
            self.shift = batch[0].sum(0)

        def on_train_batch_start(self, batch, batch_idx):
            self.shift = 0.0

        def forward(self, inputs):
            return super().forward(inputs - self.shift)

    cld = CLDCallback(batch_size=1)  # so that each sample is shifted by itself
    fit(tmp_path, cld, Shifting())
    assert cld.trajectories.train_losses[-1].unique().numel() == Blobs.num_classes


@pytest.mark.parametrize("required", [True, False])
def test_hooks_that_log_and_want_the_number_of_the_dataloader_run(tmp_path, required):
    class Logs(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            self.log("seen", float(batch_idx), on_step=True)
            numbers.append(dataloader_idx)

    if required:
        hook = Logs.on_validation_batch_start
        Logs.on_validation_batch_start = lambda self, trainer, module, batch, batch_idx, dataloader_idx: hook(
            self, trainer, module, batch, batch_idx, dataloader_idx
        )
    numbers = []
    fit(tmp_path, CLDCallback(), callbacks=[Logs()], **({"limit_val_batches": 0} if required else {}))
    assert set(numbers) == {0}
