"""Runs are interrupted and resumed, from every kind of checkpoint that Lightning writes."""

import logging
import multiprocessing
import pickle
import random
import signal
import sys
import time
import warnings
from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from toys import Blobs, Classifier, blobs, fit, plain_losses

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule, IndexedDataset, LossTrajectories
from lightning_cld.data.fingerprint import probe_positions
from lightning_cld.storage.rows import Rows

STEPS = 6  # per epoch of `Blobs`

pytestmark = [
    # Lightning warns about checkpoints with other callbacks, in another folder, or from mid-epoch.
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    pytest.mark.filterwarnings("ignore:.*The dirpath has changed from.*"),
    pytest.mark.filterwarnings(r"ignore:.*fit\(ckpt_path=.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended.*"),
]


class Steady(Classifier):
    """Has no dropout, so that a run resumed at an epoch's end trains the same bit for bit."""

    def __init__(self):
        super().__init__()
        self.net[3] = nn.Identity()

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


class PowerCutError(RuntimeError):
    pass


def dies(hook, epoch, error=PowerCutError, call=1):
    """A module class whose `hook` raises at its `call`-th call in `epoch`."""

    class Dies(Steady):
        calls = 0

    def raises(self, *args, **kwargs):
        self.calls += self.current_epoch == epoch
        if self.calls == call:
            raise error("power cut")

    setattr(Dies, hook, raises)
    return Dies


def run(root, cld, *savers, module=Steady, datamodule=None, **arguments):
    """Trains for five epochs on an unshuffled loader."""
    data = Blobs(shuffle=False) if datamodule is None else datamodule
    keeps = any(isinstance(saver, Checkpoint) for saver in savers)
    arguments = {"max_epochs": 5, "enable_checkpointing": keeps, **arguments}
    return fit(root, cld, module, data, callbacks=list(savers), **arguments)


def checkpoints(root, **options):
    return ModelCheckpoint(root, "{step}", save_top_k=-1, **options)


def by_step(root):
    """The checkpoints in a folder, by number of completed steps."""
    return {int(path.stem.removeprefix("step=").partition("-")[0]): path for path in sorted(root.glob("step=*.ckpt"))}


def assert_resumed(resumed, whole, completed=None):
    """Checks for equal epochs, no hole, and equal rows: all rows, or those up to `completed` epochs."""
    assert resumed.epochs == whole.epochs
    assert not resumed.train_losses.isnan().any()
    assert not resumed.val_losses.isnan().any()
    rows = [row for row, epoch in enumerate(whole.epochs) if completed is None or epoch <= completed]
    assert torch.equal(resumed.train_losses[rows], whole.train_losses[rows])
    assert torch.equal(resumed.val_losses[rows], whole.val_losses[rows])


def files(root):
    return sorted(path.name for path in root.iterdir() if path.suffix != ".ckpt")


# From each kind of checkpoint


EPOCH_END = {"save_on_train_epoch_end": True}
VALIDATION_END = {"save_on_train_epoch_end": False}
LAST_BATCH = {"every_n_train_steps": STEPS}
MID_EPOCH = {"every_n_train_steps": 4}  # steps 12 and 24 are last batches
BY_STEPS = {"max_epochs": -1, "max_steps": 28}  # ends in the middle of the fifth epoch


@pytest.mark.parametrize(
    ("saver", "arguments", "steps"),
    [
        (EPOCH_END, {}, [6, 12, 18, 24, 30]),
        (VALIDATION_END, {}, [6, 12, 18, 24, 30]),
        (VALIDATION_END, {"check_val_every_n_epoch": 2}, [12, 24]),
        (VALIDATION_END, {"val_check_interval": 0.5}, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]),
        (LAST_BATCH, {}, [6, 12, 18, 24, 30]),
        (LAST_BATCH, {"limit_val_batches": 0}, [6, 12, 18, 24, 30]),
        (MID_EPOCH, {}, [4, 8, 12, 16, 20, 24, 28]),
        ({"every_n_train_steps": 1}, {"max_epochs": 3}, list(range(1, 19))),
        (EPOCH_END, BY_STEPS, [6, 12, 18, 24, 28]),
        (VALIDATION_END, BY_STEPS, [6, 12, 18, 24]),
        (MID_EPOCH, BY_STEPS, [4, 8, 12, 16, 20, 24, 28]),
        (LAST_BATCH, {**BY_STEPS, "max_steps": 24}, [6, 12, 18, 24]),
    ],
    ids=str,
)
def test_a_run_resumed_from_any_checkpoint_has_the_rows_of_the_uninterrupted_one(tmp_path, saver, arguments, steps):
    whole = CLDCallback()
    run(tmp_path, whole, checkpoints(tmp_path, **saver), **arguments)
    found = by_step(tmp_path)
    assert sorted(found) == steps
    for step, path in found.items():
        resumed = CLDCallback()
        run(tmp_path, resumed, ckpt_path=path, **arguments)
        # In mid-epoch Lightning restarts the loader, so training goes on differently.
        is_same = step % STEPS == 0 or step == arguments.get("max_steps")
        assert_resumed(resumed.trajectories, whole.trajectories, None if is_same else step // STEPS)
        if is_same:
            assert torch.equal(resumed.scores.values, whole.scores.values)


@pytest.mark.parametrize("saver", [EPOCH_END, VALIDATION_END, LAST_BATCH, MID_EPOCH], ids=str)
def test_a_running_history_resumed_from_any_checkpoint_gives_the_scores_of_a_full_one(tmp_path, saver):
    whole = CLDCallback(history="running")
    run(tmp_path, whole, checkpoints(tmp_path / "running", **saver))
    run(tmp_path, CLDCallback(), checkpoints(tmp_path / "full", **saver))
    found = by_step(tmp_path / "running")
    assert found
    for step, path in found.items():
        resumed, full = CLDCallback(history="running"), CLDCallback()
        run(tmp_path, resumed, ckpt_path=path)
        run(tmp_path, full, ckpt_path=by_step(tmp_path / "full")[step])
        assert resumed.scores.epochs == full.scores.epochs == [0, 1, 2, 3, 4, 5]
        torch.testing.assert_close(resumed.scores.values, full.scores.values, rtol=0, atol=1e-5)
        if step % STEPS == 0:
            assert torch.equal(resumed.scores.values, whole.scores.values)


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_start", "on_validation_end", "on_train_epoch_end"])
def test_a_running_history_resumed_from_an_exceptions_checkpoint_has_no_row_twice(tmp_path, hook):
    # At some of these hooks the next due row has already been recorded.
    whole, resumed = CLDCallback(history="running"), CLDCallback(history="running")
    run(tmp_path, whole)
    epoch = 0 if hook == "on_train_start" else 2
    with pytest.raises(PowerCutError):
        run(tmp_path, CLDCallback(history="running"), OnExceptionCheckpoint(tmp_path), module=dies(hook, epoch))
    run(tmp_path, resumed, ckpt_path=tmp_path / "on_exception.ckpt")
    assert resumed.scores.epochs == whole.scores.epochs
    assert torch.equal(resumed.scores.values, whole.scores.values)


@pytest.mark.parametrize("saver", [EPOCH_END, VALIDATION_END, LAST_BATCH, MID_EPOCH], ids=str)
def test_save_last_serves_like_the_checkpoint_it_follows(tmp_path, saver):
    whole, resumed = CLDCallback(), CLDCallback()
    run(tmp_path, whole)
    with pytest.raises(PowerCutError):
        run(
            tmp_path,
            CLDCallback(),
            ModelCheckpoint(tmp_path / "cut", save_last=True, **saver),
            module=dies("on_train_batch_start", epoch=3, call=2),
        )
    run(tmp_path, resumed, ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert_resumed(resumed.trajectories, whole.trajectories, 2 if saver is MID_EPOCH else None)


@pytest.mark.parametrize(
    ("hook", "call", "same"),
    [
        ("on_train_batch_start", 1, True),
        ("on_train_batch_start", 3, False),
        ("on_before_optimizer_step", 4, False),
        ("on_train_batch_end", 1, False),
        ("on_train_batch_end", STEPS, True),
        ("on_validation_start", 1, True),
        ("on_validation_batch_end", 1, True),
        ("on_validation_end", 1, True),
        ("on_train_epoch_end", 1, True),
    ],
)
@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_a_run_resumed_from_an_exceptions_checkpoint_has_every_row(tmp_path, hook, call, same, epoch):
    whole, resumed = CLDCallback(), CLDCallback()
    run(tmp_path, whole)
    with pytest.raises(PowerCutError):
        run(tmp_path, CLDCallback(), OnExceptionCheckpoint(tmp_path), module=dies(hook, epoch, call=call))
    run(tmp_path, resumed, ckpt_path=tmp_path / "on_exception.ckpt")
    assert_resumed(resumed.trajectories, whole.trajectories, None if same else epoch)


def test_a_checkpoint_from_before_the_first_step_gives_theta_0_once(tmp_path):
    whole, resumed = CLDCallback(), CLDCallback()
    run(tmp_path, whole)
    with pytest.raises(PowerCutError):
        run(tmp_path, CLDCallback(), OnExceptionCheckpoint(tmp_path), module=dies("on_train_start", 0))
    run(tmp_path, resumed, ckpt_path=tmp_path / "on_exception.ckpt")
    assert_resumed(resumed.trajectories, whole.trajectories)


@pytest.mark.parametrize(
    ("saver", "hook"), [(EPOCH_END, "on_train_batch_start"), (VALIDATION_END, "on_train_epoch_end")], ids=str
)
def test_a_run_interrupted_in_every_epoch_has_the_rows_of_the_uninterrupted_one(tmp_path, saver, hook):
    whole, resumed = CLDCallback(), CLDCallback()
    run(tmp_path, whole)
    newest, last = None, tmp_path / "last.ckpt"
    for epoch in range(5):
        keeps = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False, **saver)
        with pytest.raises(PowerCutError):
            run(tmp_path, CLDCallback(), keeps, module=dies(hook, epoch), ckpt_path=newest)
        newest = last if last.exists() else None
    run(tmp_path, resumed, ckpt_path=newest)
    assert_resumed(resumed.trajectories, whole.trajectories)


class PlainRows(Callback):
    """The losses after each epoch that it sees, one sample at a time."""

    def __init__(self):
        self.rows = {}

    def on_train_epoch_end(self, trainer, pl_module):
        self.rows[trainer.current_epoch + 1] = plain_losses(pl_module, trainer.train_dataloader.dataset)


@pytest.mark.parametrize("saver", [VALIDATION_END, LAST_BATCH, MID_EPOCH], ids=str)
def test_rows_logged_after_a_resume_are_the_losses_of_their_epochs(tmp_path, saver):
    run(tmp_path, CLDCallback(), checkpoints(tmp_path, **saver))
    for path in by_step(tmp_path).values():
        resumed, plain = CLDCallback(), PlainRows()
        run(tmp_path, resumed, plain, ckpt_path=path)
        for epoch, row in plain.rows.items():
            torch.testing.assert_close(resumed.trajectories.train_losses[epoch], row, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("saver", [EPOCH_END, VALIDATION_END, LAST_BATCH, MID_EPOCH], ids=str)
@pytest.mark.parametrize(
    ("plan", "epochs"),
    [
        ({"every_n_epochs": 2}, [0, 2, 4, 6, 8]),
        ({"cutoff_epoch": 4}, [0, 1, 2, 3, 4]),
        ({"cutoff_epoch": 6, "every_n_epochs": 2}, [0, 2, 4, 6]),
        ({"cutoff_epoch": 4, "stop_at_cutoff": True}, [0, 1, 2, 3, 4]),
    ],
    ids=str,
)
def test_cadence_and_cutoff_hold_across_an_interruption(tmp_path, plan, epochs, saver):
    whole = CLDCallback(**plan)
    run(tmp_path, whole, checkpoints(tmp_path, **saver), max_epochs=8)
    assert whole.trajectories.epochs == epochs
    for step, path in by_step(tmp_path).items():
        resumed = CLDCallback(**plan)
        trainer, _ = run(tmp_path, resumed, ckpt_path=path, max_epochs=8)
        assert_resumed(resumed.trajectories, whole.trajectories, None if step % STEPS == 0 else step // STEPS)
        assert resumed.scores.epochs == epochs
        assert trainer.current_epoch == (4 if "stop_at_cutoff" in plan else 8)


@pytest.mark.parametrize("saver", [EPOCH_END, VALIDATION_END, LAST_BATCH], ids=str)
def test_resuming_at_the_cutoff_where_training_stops_takes_no_step(tmp_path, saver):
    plan = {"cutoff_epoch": 4, "stop_at_cutoff": True}
    whole, resumed = CLDCallback(dirpath=tmp_path, **plan), CLDCallback(dirpath=tmp_path / "again", **plan)
    run(tmp_path, whole, checkpoints(tmp_path, **saver), max_epochs=8)
    trainer, module = run(tmp_path, resumed, ckpt_path=by_step(tmp_path)[24], max_epochs=8)
    weights = torch.load(by_step(tmp_path)[24], weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert (trainer.current_epoch, trainer.global_step) == (4, 24)
    assert torch.equal(CLDScores.load(tmp_path / "again" / "cld-scores.npz").values, whole.scores.values)
    assert_resumed(LossTrajectories.load(tmp_path / "again" / "cld-trajectories.npz"), whole.trajectories)


@pytest.mark.parametrize("saver", [EPOCH_END, VALIDATION_END, LAST_BATCH], ids=str)
@pytest.mark.parametrize("stop", [False, True])
def test_a_coreset_settles_where_it_would_have_without_the_interruption(tmp_path, saver, stop):
    plan = {"cutoff_epoch": "auto", "stop_at_cutoff": stop}
    whole = CLDCallback(**plan)
    run(tmp_path, whole, checkpoints(tmp_path, **saver), max_epochs=10)
    assert whole.scores.epochs == list(range(9))
    for path in by_step(tmp_path).values():
        resumed = CLDCallback(dirpath=tmp_path / "again", **plan)
        trainer, _ = run(tmp_path, resumed, ckpt_path=path, max_epochs=10)
        assert_resumed(resumed.trajectories, whole.trajectories)
        assert trainer.current_epoch == (8 if stop else 10)
        saved = CLDScores.load(tmp_path / "again" / "cld-scores.npz")
        assert torch.equal(saved.values, whole.scores.values)
        assert saved.metadata["settled_epoch"] == 8


def test_resuming_past_the_cutoff_with_stop_at_cutoff_takes_no_step(tmp_path):
    # The interrupted run had gone on after the cutoff.
    run(tmp_path, CLDCallback(cutoff_epoch=4), checkpoints(tmp_path, **EPOCH_END), max_epochs=8)
    resumed = CLDCallback(cutoff_epoch=4, stop_at_cutoff=True, dirpath=tmp_path / "again")
    trainer, _ = run(tmp_path, resumed, ckpt_path=by_step(tmp_path)[36], max_epochs=8)
    assert trainer.global_step == 36
    assert resumed.trajectories.epochs == [0, 1, 2, 3, 4]
    assert files(tmp_path / "again") == ["cld-scores.npz", "cld-trajectories.npz"]


@pytest.mark.parametrize("saver", [EPOCH_END, VALIDATION_END, LAST_BATCH], ids=str)
def test_a_finished_run_gives_its_scores_when_it_is_resumed(tmp_path, saver):
    whole, resumed = CLDCallback(), CLDCallback()
    run(tmp_path, whole, checkpoints(tmp_path, **saver))
    run(tmp_path, resumed, ckpt_path=by_step(tmp_path)[5 * STEPS])
    assert_resumed(resumed.trajectories, whole.trajectories)
    assert torch.equal(resumed.scores.values, whole.scores.values)


@pytest.mark.parametrize("saver", [EPOCH_END, VALIDATION_END, LAST_BATCH], ids=str)
def test_a_finished_run_whose_files_were_not_written_writes_them_when_it_is_resumed(tmp_path, saver):
    # As if killed between its last checkpoint and the files.
    whole = CLDCallback()
    run(tmp_path, whole, checkpoints(tmp_path, **saver))
    run(tmp_path, CLDCallback(dirpath=tmp_path / "again"), ckpt_path=by_step(tmp_path)[5 * STEPS])
    assert torch.equal(CLDScores.load(tmp_path / "again" / "cld-scores.npz").values, whole.scores.values)


# Lightning's checkpoint


def test_the_checkpoint_is_read_without_unpickling_code(tmp_path):
    cld = CLDCallback(cutoff_epoch=5)
    run(tmp_path, cld, checkpoints(tmp_path, **EPOCH_END))
    for step, path in by_step(tmp_path).items():
        (state,) = (
            state
            for name, state in torch.load(path, weights_only=True)["callbacks"].items()
            if name.startswith("CLDCallback")
        )
        recorded = LossTrajectories.from_state_dict(state["trajectories"])
        assert recorded.epochs == list(range(step // STEPS + 1))
        assert torch.equal(recorded.train_losses, cld.trajectories.train_losses[: len(recorded)])


def test_the_checkpoint_grows_by_no_more_than_the_losses_and_classes(tmp_path):
    data = Blobs(blobs(8000), shuffle=False, batch_size=1000)
    cld = CLDCallback()
    for name, callback in (("plain", None), ("watched", cld)):
        run(tmp_path, callback, checkpoints(tmp_path / name, **EPOCH_END), datamodule=data, max_epochs=8)
    share = max(path.stat().st_size for path in (tmp_path / "watched").iterdir())
    share -= max(path.stat().st_size for path in (tmp_path / "plain").iterdir())
    recorded = cld.trajectories
    losses = 4 * (recorded.train_losses.numel() + recorded.val_losses.numel())
    classes = 8 * (recorded.train_classes.numel() + recorded.val_classes.numel())
    assert len(recorded) == 9  # the ninth row grows the buffer to sixteen
    assert losses < share <= losses + classes + 64_000


@pytest.mark.parametrize("epochs", [4, 24])
def test_with_a_running_history_the_checkpoint_grows_by_36_bytes_a_training_sample(tmp_path, epochs):
    data = Blobs(blobs(8000), shuffle=False, batch_size=1000)
    for name, callback in (("plain", None), ("watched", CLDCallback(history="running"))):
        run(tmp_path, callback, checkpoints(tmp_path / name, **EPOCH_END), datamodule=data, max_epochs=epochs)
    share = max(path.stat().st_size for path in (tmp_path / "watched").iterdir())
    share -= max(path.stat().st_size for path in (tmp_path / "plain").iterdir())
    assert share <= 36.4 * len(data.train_set) + (44 + 8) * len(data.val_set) + 20_000


# Checkpoints that don't fit


@pytest.fixture
def half(tmp_path):
    """A checkpoint after three epochs, each of them logged."""
    trainer, _ = run(tmp_path, CLDCallback(), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    return tmp_path / "half.ckpt"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"every_n_epochs": 2}, {}),
        ({}, {"every_n_epochs": 2}),
        ({"cutoff_epoch": 6}, {}),
        ({}, {"cutoff_epoch": 6}),
        ({"cutoff_epoch": 6}, {"cutoff_epoch": 8}),
        ({"cutoff_epoch": 6}, {"cutoff_epoch": 6, "every_n_epochs": 2}),
    ],
    ids=str,
)
def test_another_cadence_or_cutoff_is_refused_before_anything_is_written(tmp_path, first, second):
    run(tmp_path, CLDCallback(**first), checkpoints(tmp_path, **EPOCH_END), max_epochs=8)
    with pytest.raises(ValueError, match=r"CLDCallback\((every_n_epochs|cutoff_epoch)=.*Use the former value"):
        run(tmp_path, CLDCallback(dirpath=tmp_path / "again", **second), ckpt_path=by_step(tmp_path)[18], max_epochs=8)
    assert not (tmp_path / "again").exists()


def other_labels():
    pool = blobs()
    pool.tensors[1][:2] = pool.tensors[1][:2].flip(0) if pool.tensors[1][0] != pool.tensors[1][1] else 2
    return Blobs(pool, shuffle=False)


def fewer_samples():
    data = Blobs(shuffle=False)
    data.train_set = Subset(data.train_set, range(len(data.train_set) - 1))
    return data


def another_order():
    data = Blobs(shuffle=False)
    data.train_set = Subset(data.train_set, list(reversed(range(len(data.train_set)))))
    return data


def fewer_references():
    data = Blobs(shuffle=False)
    data.val_set = Subset(data.val_set, range(len(data.val_set) - 1))
    return data


@pytest.mark.parametrize("other", [other_labels, fewer_samples, another_order, fewer_references])
def test_another_dataset_is_refused_before_the_first_step(tmp_path, half, other):
    module = Steady()
    with pytest.raises(ValueError, match="not the one whose losses were logged so far"):
        run(tmp_path, CLDCallback(), module=module, datamodule=other(), ckpt_path=half)
    weights = torch.load(half, weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


class WithoutLabels(Dataset):
    """Shows its labels only in its samples."""

    def __init__(self, inner, swapped=()):
        self.order = list(range(len(inner)))
        if swapped:
            first, second = swapped
            self.order[first], self.order[second] = second, first
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, position):
        return self.inner[self.order[position]]


def test_another_order_of_a_dataset_whose_labels_are_not_probed_is_noticed_at_the_first_sweep(tmp_path):
    data, other = Blobs(shuffle=False), Blobs(shuffle=False)
    labels = [int(label) for _, label in data.train_set]
    unprobed = sorted(set(range(len(labels))) - set(probe_positions(len(labels)).tolist()))
    swapped = next(pair for pair in pairwise(unprobed) if labels[pair[0]] != labels[pair[1]])
    data.train_set, other.train_set = WithoutLabels(data.train_set), WithoutLabels(other.train_set, swapped)
    trainer, _ = run(tmp_path, CLDCallback(), datamodule=data, max_epochs=3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = CLDCallback()
    with pytest.warns(UserWarning, match="gave its classes in another order than before"):
        run(tmp_path, resumed, datamodule=other, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.trajectories.epochs == [0, 1, 2, 3]


@pytest.mark.parametrize("saver", [EPOCH_END, LAST_BATCH, MID_EPOCH], ids=str)
def test_a_run_without_the_callback_gives_no_theta_0(tmp_path, saver):
    run(tmp_path, None, checkpoints(tmp_path, **saver))
    cld = CLDCallback()
    with pytest.warns(UserWarning, match="theta_0 is missing"):
        run(tmp_path, cld, ckpt_path=by_step(tmp_path)[12], max_epochs=8)
    assert cld.trajectories.epochs == [3, 4, 5, 6, 7, 8]


def test_a_checkpoint_without_losses_ends_the_timeline_of_the_trainers_earlier_fit(tmp_path):
    run(tmp_path, None, checkpoints(tmp_path, **EPOCH_END))
    cld = CLDCallback()
    trainer, module = run(tmp_path, cld, max_epochs=5)
    trainer.fit_loop.max_epochs = 8
    with pytest.warns(UserWarning, match="theta_0 is missing"):
        trainer.fit(module, datamodule=Blobs(shuffle=False), ckpt_path=by_step(tmp_path)[12])
    assert cld.trajectories.epochs == [3, 4, 5, 6, 7, 8]


# Averaged weights


def averaging():
    return StochasticWeightAveraging(1e-2, swa_epoch_start=2)


def test_the_extra_epoch_on_averaged_weights_makes_no_row(tmp_path):
    cld, plain = CLDCallback(), PlainRows()
    run(tmp_path, cld, averaging(), plain)
    assert list(plain.rows) == [1, 2, 3, 4, 5, 6]
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("saver", [EPOCH_END, VALIDATION_END, LAST_BATCH, MID_EPOCH], ids=str)
@pytest.mark.filterwarnings("ignore:.*SWA is initializing after swa_start.*")
def test_a_resumed_run_that_averages_has_every_row_and_none_of_averaged_weights(tmp_path, saver):
    whole = CLDCallback()
    run(tmp_path, whole, averaging(), checkpoints(tmp_path, **saver))
    for step, path in by_step(tmp_path).items():
        if step >= 5 * STEPS and saver is not EPOCH_END:
            continue  # StochasticWeightAveraging can't be resumed in its extra epoch
        resumed = CLDCallback()
        run(tmp_path, resumed, averaging(), ckpt_path=path)
        # After a resume from a last batch, its learning rates differ.
        same = saver in (EPOCH_END, VALIDATION_END)
        assert_resumed(resumed.trajectories, whole.trajectories, None if same else step // STEPS)


# Other stages and repeated fits


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_another_stage_with_the_best_checkpoint_leaves_the_rows_alone(tmp_path, stage):
    cld = CLDCallback(dirpath=tmp_path)
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")  # "max" keeps the worst, one of the first epochs
    trainer, module = run(tmp_path, cld, saver)
    rows, scores = cld.trajectories.train_losses.clone(), cld.scores
    written = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert torch.load(saver.best_model_path, weights_only=True)["epoch"] < 4
    loader = {"dataloaders": DataLoader(Blobs().val_set, batch_size=16)}
    getattr(trainer, stage)(module, **loader, ckpt_path="best", **({} if stage == "predict" else {"verbose": False}))
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4, 5]
    assert torch.equal(cld.trajectories.train_losses, rows)
    assert cld.scores is scores
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == written


def test_a_fit_goes_on_after_a_test_of_an_earlier_checkpoint(tmp_path):
    cld = CLDCallback()
    trainer, module = run(tmp_path, cld, checkpoints(tmp_path, **EPOCH_END))
    rows = cld.trajectories.train_losses.clone()
    trainer.test(module, datamodule=Blobs(), ckpt_path=by_step(tmp_path)[12], verbose=False)
    trainer.fit_loop.max_epochs = 7
    trainer.fit(module, datamodule=Blobs(shuffle=False))
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(cld.trajectories.train_losses[:6], rows)


def test_a_second_fit_from_step_0_starts_clean(tmp_path):
    cld, other = CLDCallback(), CLDCallback()
    run(tmp_path, cld, max_epochs=8)
    assert len(cld.scores.epochs) == 9
    run(tmp_path, cld)
    run(tmp_path, other)
    assert_resumed(cld.trajectories, other.trajectories)
    assert torch.equal(cld.scores.values, other.scores.values)


def test_a_trainer_that_goes_on_continues_the_timeline(tmp_path):
    cld, whole = CLDCallback(), CLDCallback()
    run(tmp_path, whole, max_epochs=8)
    trainer, module = run(tmp_path, cld)
    trainer.fit_loop.max_epochs = 8
    trainer.fit(module, datamodule=Blobs(shuffle=False))
    assert_resumed(cld.trajectories, whole.trajectories, completed=5)
    assert cld.scores.epochs == whole.scores.epochs


def test_a_trainer_that_goes_on_from_an_earlier_checkpoint_takes_the_rows_from_there(tmp_path):
    cld, whole = CLDCallback(), CLDCallback()
    run(tmp_path, whole, max_epochs=8)
    trainer, module = run(tmp_path, cld, checkpoints(tmp_path, **EPOCH_END))
    trainer.fit_loop.max_epochs = 8
    trainer.fit(module, datamodule=Blobs(shuffle=False), ckpt_path=by_step(tmp_path)[12])
    assert_resumed(cld.trajectories, whole.trajectories)


def test_a_trainer_that_failed_and_goes_on_continues_the_timeline(tmp_path):
    cld = CLDCallback()
    module = dies("on_train_batch_start", epoch=3, call=3)()
    with pytest.raises(PowerCutError):
        run(tmp_path, cld, module=module)
    rows = cld.trajectories.train_losses.clone()
    trainer = module.trainer
    trainer.fit(module, datamodule=Blobs(shuffle=False))
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4, 5]
    assert torch.equal(cld.trajectories.train_losses[:4], rows)


# On disk after an exception


@pytest.fixture
def _interruptible():
    """Restores the handler of Ctrl-C, which Lightning ignores after the first."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize(
    ("error", "raised"), [(PowerCutError, PowerCutError), (KeyboardInterrupt, SystemExit), (SystemExit, SystemExit)]
)
@pytest.mark.parametrize(
    ("hook", "call", "epochs"),
    [
        ("on_train_epoch_start", 1, [0, 1, 2, 3, 4]),
        ("on_train_batch_start", 3, [0, 1, 2, 3, 4]),
        ("on_validation_end", 1, [0, 1, 2, 3, 4]),
        ("on_train_epoch_end", 1, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_an_exception_leaves_what_was_logged_on_disk(tmp_path, error, raised, hook, call, epochs):
    cld = CLDCallback(dirpath=tmp_path)
    with pytest.raises(raised):
        run(tmp_path, cld, module=dies(hook, 4, error, call), max_epochs=6)
    assert files(tmp_path) == ["cld-trajectories.npz"]
    saved = LossTrajectories.load(tmp_path / "cld-trajectories.npz")
    assert saved.epochs == epochs
    assert torch.equal(saved.train_losses, cld.trajectories.train_losses)
    assert saved.score().epochs == epochs


def test_an_exception_leaves_the_rows_of_an_interrupted_and_resumed_run(tmp_path, half):
    with pytest.raises(PowerCutError):
        run(tmp_path, CLDCallback(dirpath=tmp_path / "again"), module=dies("on_train_start", 3), ckpt_path=half)
    assert LossTrajectories.load(tmp_path / "again" / "cld-trajectories.npz").epochs == [0, 1, 2, 3]


def test_an_exception_in_the_first_sweep_leaves_no_file(tmp_path):
    data = Blobs(shuffle=False)
    data.train_set = WithoutLabels(data.train_set)
    data.train_set.order[80] = 10**6
    with pytest.raises(IndexError):
        run(tmp_path, CLDCallback(dirpath=tmp_path), datamodule=data)
    assert files(tmp_path) == []


@pytest.fixture
def no_third_row(monkeypatch):
    """A function that makes writing the third row, and those behind it, raise `error`, for `times` times."""
    whole, raised = Rows.write, []

    def fail(error, times):
        def write(rows, place, row):
            if rows.width == 90 and place >= 2 and len(raised) < times:
                raised.append(error)
                raise error("no memory")
            whole(rows, place, row)

        monkeypatch.setattr(Rows, "write", write)

    return fail


def test_a_row_without_memory_becomes_a_hole(tmp_path, no_third_row):
    cld, resumed = CLDCallback(), CLDCallback()
    no_third_row(torch.OutOfMemoryError, times=1)
    with pytest.warns(UserWarning, match="after 2 epochs could not be logged: no memory"):
        run(tmp_path, cld, checkpoints(tmp_path, **EPOCH_END))
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4, 5]
    assert cld.trajectories.train_losses.isnan().all(dim=1).tolist() == [False, False, True, False, False, False]
    run(tmp_path, resumed, ckpt_path=by_step(tmp_path)[12])
    assert resumed.trajectories.epochs == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("saver", "step"), [(MID_EPOCH, 2 * STEPS + 4), (VALIDATION_END, 3 * STEPS)], ids=str)
def test_a_hole_is_not_filled_from_weights_of_a_later_epoch(tmp_path, no_third_row, saver, step):
    no_third_row(torch.OutOfMemoryError, times=1)
    with pytest.warns(UserWarning, match="after 2 epochs could not be logged"):
        run(tmp_path, CLDCallback(), checkpoints(tmp_path, **saver))
    resumed = CLDCallback()
    run(tmp_path, resumed, ckpt_path=by_step(tmp_path)[step])
    assert resumed.trajectories.epochs == [0, 1, 2, 3, 4, 5]
    assert resumed.trajectories.train_losses.isnan().all(dim=1).tolist() == [False, False, True, False, False, False]


def test_training_stops_at_the_cutoff_even_if_the_losses_there_could_not_be_logged(tmp_path):
    data, cld = Blobs(shuffle=False), CLDCallback(cutoff_epoch=4, stop_at_cutoff=True)
    data.train_set = WithoutLabels(data.train_set)

    class Breaks(Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                data.train_set.order[80] = 10**6

    with pytest.warns(UserWarning, match="after 4 epochs could not be logged"):
        trainer, _ = run(tmp_path, cld, Breaks(), datamodule=data, max_epochs=8)
    assert trainer.current_epoch == 4


def test_training_goes_on_where_there_is_memory_for_no_more_rows(tmp_path, no_third_row):
    no_third_row(torch.OutOfMemoryError, times=1000)
    with pytest.warns(UserWarning, match="could not be logged: no memory"):
        trainer, _ = run(tmp_path, CLDCallback())
    assert trainer.global_step == 5 * STEPS


@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_while_a_row_is_stored_leaves_a_file_that_loads(tmp_path, no_third_row):
    no_third_row(KeyboardInterrupt, times=1)
    with pytest.raises(SystemExit):
        run(tmp_path, CLDCallback(dirpath=tmp_path))
    assert LossTrajectories.load(tmp_path / "cld-trajectories.npz").epochs == [0, 1]


# Killed processes


EPOCHS = 12
BATCH_SECONDS = 0.01
SHORT = EPOCHS * STEPS * BATCH_SECONDS / 5  # so short a life can do at most a fifth of the run


class Announces(Callback):
    """Reports the start of the fit and slows down each batch, so that a kill hits a running fit."""

    def __init__(self, started):
        self.started = started

    def on_fit_start(self, trainer, pl_module):
        self.started.send("fitting")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(BATCH_SECONDS)


def loads(checkpoint):
    try:
        torch.load(checkpoint, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        return False
    return True


def one_life(root, saver, started, **data):
    """One process of a run: resumes from the last checkpoint, if any, and writes a file when it is done."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cld = CLDCallback(dirpath=root)
    keeps = ModelCheckpoint(root, save_last=True, enable_version_counter=False, **saver)
    last = root / "last.ckpt"
    run(root, cld, Announces(started), keeps, max_epochs=EPOCHS, ckpt_path=last if loads(last) else None, **data)
    cld.trajectories.save(root / "done-trajectories.npz")
    cld.scores.save(root / "done-scores.npz")


class Named(IterableDataset):
    """A part of `Blobs` as a stream whose samples have names."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return ((inputs, label, f"sample {place}") for place, (inputs, label) in enumerate(self.samples))


class Streams(Blobs):
    def train_dataloader(self):
        return DataLoader(Named(self.train_set), batch_size=16)

    def val_dataloader(self):
        return DataLoader(Named(self.val_set), batch_size=16)


class Tells(Steady):
    """Says which samples a batch holds."""

    def cld_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none"), batch[1], batch[2]


def one_streamed_life(root, saver, started):
    """As `one_life`, over streams."""
    one_life(root, saver, started, module=Tells, datamodule=Streams())


class NotesEpochs(Steady):
    """Writes down the positions that it trains on, a line a batch, behind the epoch."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def training_step(self, batch, batch_idx):
        with self.path.open("a") as file:
            print(self.current_epoch, *batch[2].tolist(), file=file)
        return super().training_step(batch, batch_idx)


def redrawn_scores(data):
    """Scores of the train set of `Blobs`, with what a draw takes."""
    labels = torch.tensor([int(label) for _, label in data.train_set])
    values, plausibility = torch.rand(2, len(labels), generator=torch.Generator().manual_seed(2))
    return CLDScores(values, labels, plausibility=plausibility)


def one_redrawn_life(root, saver, started):
    """One process of a run on a coreset that is drawn anew each epoch."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = Blobs()
    scores, data.train_set = redrawn_scores(data), IndexedDataset(data.train_set)
    coreset = CoresetDataModule(data, scores, size=48, rule="draw", redraw=True)
    keeps = ModelCheckpoint(root, save_last=True, enable_version_counter=False, **saver)
    last, life = root / "last.ckpt", sum(1 for _ in root.glob("life-*.txt"))
    run(
        root,
        None,
        Announces(started),
        keeps,
        module=NotesEpochs(root / f"life-{life:03}.txt"),
        datamodule=coreset,
        max_epochs=EPOCHS,
        ckpt_path=last if loads(last) else None,
    )
    (root / "done").touch()


def replaces_for_ever(root, size, started):
    """Writes one scores file again and again."""
    for turn in range(10**9):
        CLDScores(torch.full((size,), float(turn % 7))).save(root / "scores.npz")
        if turn == 0:
            started.send("writing")


@pytest.fixture(scope="module")
def processes():
    """A context that forks processes from one that has imported Lightning, because each import takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "lightning_cld", "scipy.stats", "pytest"])
    return context


def start(processes, target, *arguments):
    """Starts `target` and waits until it reports that it works; returns the process."""
    heard, said = processes.Pipe(duplex=False)
    process = processes.Process(target=target, args=(*arguments, said))
    process.start()
    said.close()
    try:
        if not heard.poll(120):
            raise TimeoutError(f"{target.__name__} did not start in two minutes.")
        heard.recv()
    except (TimeoutError, EOFError):
        process.kill()
        process.join(60)
        raise
    return process


def killed_after(process, seconds):
    """Kills `process` after `seconds`; returns whether it was still running."""
    process.join(seconds)
    was_alive = process.is_alive()
    process.kill()
    process.join(60)
    return was_alive


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, which is safe with torch on Linux only")
@pytest.mark.parametrize(
    ("saver", "life"),
    [
        *((saver, one_life) for saver in (EPOCH_END, VALIDATION_END, LAST_BATCH, MID_EPOCH)),
        (EPOCH_END, one_streamed_life),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_a_run_killed_again_and_again_ends_with_the_scores_of_the_uninterrupted_one(tmp_path, processes, saver, life):
    whole, root = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(processes, life, whole, saver)
    uninterrupted.join(120)
    assert uninterrupted.exitcode == 0

    last, chance = root / "last.ckpt", random.Random(str(saver))
    kills, longest = 0, SHORT
    while not (root / "done-scores.npz").exists():
        before = last.stat().st_mtime_ns if last.exists() else None
        kills += killed_after(start(processes, life, root, saver), chance.uniform(0, longest))
        after = last.stat().st_mtime_ns if last.exists() else None
        longest = SHORT if after != before else 1.3 * longest  # a slow machine needs longer lives to make progress
        assert kills < 100, "the run makes no progress"
        for path in root.glob("*.npz"):
            (CLDScores if path.stem.endswith("scores") else LossTrajectories).load(path)
    assert kills >= 5  # at least 20 over the four cases

    killed, uninterrupted = (LossTrajectories.load(path / "done-trajectories.npz") for path in (root, whole))
    # From a step checkpoint of a resumed run, Lightning may repeat an epoch or shorten one.
    same = saver in (EPOCH_END, VALIDATION_END)
    assert_resumed(killed, uninterrupted, completed=None if same else 0)
    if same:
        killed, uninterrupted = (CLDScores.load(path / "done-scores.npz") for path in (root, whole))
        assert torch.equal(killed.values, uninterrupted.values)
        assert killed.names == uninterrupted.names
        assert (killed.names is None) == (life is one_life)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, which is safe with torch on Linux only")
@pytest.mark.parametrize("saver", [EPOCH_END, {"every_n_train_steps": 2}], ids=str)
def test_a_run_killed_again_and_again_trains_each_epoch_on_its_draw(tmp_path, processes, saver):
    chance, longest, kills = random.Random(str(saver)), SHORT, 0
    while not (tmp_path / "done").exists():
        kills += killed_after(start(processes, one_redrawn_life, tmp_path, saver), chance.uniform(0, longest))
        longest *= 1.3
        assert kills < 40, "the run makes no progress"
    assert kills >= 2
    scores = redrawn_scores(Blobs())
    draws = [set(scores.select(size=48, rule="draw", seed=epoch).tolist()) for epoch in range(EPOCHS)]
    seen = set()
    for life in tmp_path.glob("life-*.txt"):
        for line in life.read_text().splitlines():
            epoch, *positions = map(int, line.split())
            assert set(positions) <= draws[epoch]
            seen.add(epoch)
    assert seen == set(range(EPOCHS))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, which is safe with torch on Linux only")
def test_a_file_is_whole_whenever_the_process_that_writes_it_is_killed(tmp_path, processes):
    size, delays = 200_000, random.Random(0)
    for _ in range(20):
        process = start(processes, replaces_for_ever, tmp_path, size)
        until = time.monotonic() + delays.uniform(0, 0.2)
        while time.monotonic() < until:  # a reader sees a whole file even during a write
            assert CLDScores.load(tmp_path / "scores.npz").values.unique().numel() == 1
        assert killed_after(process, 0)
        scores = CLDScores.load(tmp_path / "scores.npz")
        assert len(scores) == size
        assert scores.values.unique().numel() == 1


# Another loss


def per_sample(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


def halved(outputs, targets):
    return per_sample(outputs, targets) / 2


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (None, halved, "were logged with the default loss, those from here on are with halved"),
        (per_sample, halved, "were logged with per_sample, those from here on are with halved"),
        (halved, halved, None),
        (None, None, None),
    ],
)
def test_a_run_that_goes_on_with_another_loss_is_told(tmp_path, before, after, told):
    trainer, _ = run(tmp_path, CLDCallback(loss_fn=before), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, CLDCallback(loss_fn=after), ckpt_path=tmp_path / "three.ckpt", max_epochs=5)
    texts = [str(warning.message) for warning in caught if "those from here on" in str(warning.message)]
    assert [told in text for text in texts] == ([] if told is None else [True])
