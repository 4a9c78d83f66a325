"""Timelines that end, begin anew, or stand side by side in one Trainer."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from toys import Blobs, Classifier, fit, plain_losses, quiet_trainer

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule, LossTrajectories, callback
from lightning_cld.storage import rows as storage_rows


class Untrained(Callback):
    """Notes the losses of the train set before the first step of each fit."""

    def __init__(self, data):
        self.data, self.losses = data, []

    def on_train_start(self, trainer, pl_module):
        self.losses.append(plain_losses(pl_module, self.data.train_set))


def go_on(trainer, module, data, max_epochs):
    trainer.fit_loop.max_epochs = max_epochs
    trainer.should_stop = False
    trainer.fit(module, datamodule=data)


# Another module


def test_another_module_begins_a_new_timeline(tmp_path):
    data = Blobs()
    cld, untrained = CLDCallback(dirpath=tmp_path), Untrained(data)
    trainer, _ = fit(tmp_path, cld, datamodule=data, callbacks=[untrained])
    of_first = cld.scores
    second = Classifier()
    go_on(trainer, second, data, 9)
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4, 5]
    assert torch.allclose(cld.trajectories.train_losses[0], untrained.losses[1], atol=1e-5)
    assert torch.allclose(cld.trajectories.train_losses[-1], plain_losses(second, data.train_set), atol=1e-5)
    assert not torch.equal(cld.scores.values, of_first.values)
    assert torch.equal(CLDScores.load(cld.scores_path).values, cld.scores.values)


def test_the_cutoff_counts_the_epochs_of_the_module(tmp_path):
    data = Blobs()
    cld = CLDCallback(cutoff_epoch=3, stop_at_cutoff=True)
    trainer, _ = fit(tmp_path, cld, datamodule=data, max_epochs=9)
    assert trainer.current_epoch == 3
    go_on(trainer, Classifier(), data, 12)
    assert trainer.current_epoch == 6
    assert cld.scores.epochs == [0, 1, 2, 3]


def test_too_few_epochs_for_another_module_are_refused(tmp_path):
    data, cld = Blobs(), CLDCallback()
    trainer, _ = fit(tmp_path, cld, datamodule=data)
    with pytest.raises(
        ValueError, match=r"max_epochs=6, of which 4 were completed with another module, .* 3 checkpoints"
    ):
        go_on(trainer, Classifier(), data, 6)


def test_the_same_module_goes_on(tmp_path):
    data, cld = Blobs(), CLDCallback()
    trainer, module = fit(tmp_path, cld, datamodule=data)
    rows = cld.trajectories.train_losses.clone()
    go_on(trainer, module, data, 7)
    assert cld.trajectories.epochs == list(range(8))
    assert torch.equal(cld.trajectories.train_losses[:5], rows)


def test_another_module_is_resumed_in_its_own_timeline(tmp_path):
    data, cld = Blobs(), CLDCallback()
    trainer, _ = fit(tmp_path, cld, datamodule=data)
    second = Classifier()
    go_on(trainer, second, data, 8)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    again = CLDCallback()
    fit(tmp_path, again, datamodule=data, ckpt_path=tmp_path / "second.ckpt", max_epochs=10)
    assert again.trajectories.epochs == [0, 1, 2, 3, 4, 5, 6]
    assert torch.equal(again.trajectories.train_losses[:5], cld.trajectories.train_losses)


def test_another_module_that_is_restored_is_not_taken_for_untrained(tmp_path):
    data, cld = Blobs(), CLDCallback()
    trainer, _ = fit(tmp_path, cld, datamodule=data)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    again = CLDCallback()
    second = quiet_trainer(tmp_path, again, max_epochs=6)
    second.fit(Classifier(), datamodule=data, ckpt_path=tmp_path / "first.ckpt")
    assert again.trajectories.epochs == list(range(7))
    assert torch.equal(again.trajectories.train_losses[:5], cld.trajectories.train_losses)


# Several callbacks


def test_two_callbacks_have_files_states_and_keys_of_their_own(tmp_path):
    def squared(outputs, targets):
        return (outputs.softmax(1) - torch.nn.functional.one_hot(targets, 3)).square().sum(1)

    def callbacks(where):
        return [
            CLDCallback(dirpath=where, cutoff_epoch=3),
            CLDCallback(dirpath=where, loss_fn=squared, filename="brier"),
        ]

    whole = callbacks(tmp_path / "whole")
    fit(tmp_path, None, callbacks=whole, max_epochs=6, logger=CSVLogger(tmp_path))
    names = {path.name for path in (tmp_path / "whole").glob("*.npz")}
    assert names == {"cld-scores.npz", "cld-trajectories.npz", "brier.npz", "brier-trajectories.npz"}
    assert CLDScores.load(tmp_path / "whole" / "brier.npz").epochs == list(range(7))
    assert CLDScores.load(tmp_path / "whole" / "cld-scores.npz").epochs == list(range(4))
    assert CLDScores.load(tmp_path / "whole" / "brier.npz").metadata["run"] != whole[0].scores.metadata["run"]
    logged = next((tmp_path / "lightning_logs").rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"cld/val_loss", "cld/brier/val_loss", "cld/brier/scores/median"} <= set(logged)

    half = callbacks(tmp_path / "half")
    trainer, _ = fit(tmp_path, None, callbacks=half, max_epochs=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = callbacks(tmp_path / "rest")
    fit(tmp_path, None, callbacks=rest, max_epochs=6, ckpt_path=tmp_path / "half.ckpt")
    for resumed, interrupted in zip(rest, half, strict=True):
        rows = len(interrupted.trajectories)
        assert torch.equal(resumed.trajectories.train_losses[:rows], interrupted.trajectories.train_losses)
    assert rest[1].trajectories.epochs == list(range(7))


def test_two_callbacks_with_one_filename_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `CLDCallback`"):
        quiet_trainer(tmp_path, CLDCallback(), CLDCallback(cutoff_epoch=3))


# Checkpoints of exceptions and signals


class Fails(Callback):
    def __init__(self, hook, epoch, error):
        self.epoch, self.error = epoch, error
        setattr(self, hook, self.fail)

    def fail(self, trainer, *arguments):
        if trainer.current_epoch == self.epoch:
            raise self.error


def resumed_after(tmp_path, hook, epoch=3):
    """The trajectories of a run that failed in a hook and was resumed from what Lightning saved then."""
    first = CLDCallback(dirpath=tmp_path)
    broken = [Fails(hook, epoch, RuntimeError("power cut")), OnExceptionCheckpoint(tmp_path)]
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, first, callbacks=broken, max_epochs=7, enable_checkpointing=True)
    cld = CLDCallback(dirpath=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, cld, max_epochs=7, ckpt_path=tmp_path / "on_exception.ckpt")
    return cld.trajectories


@pytest.mark.parametrize("epoch", [0, 2, 3])
def test_an_epoch_that_lightning_skips_is_a_hole(tmp_path, epoch):
    found = resumed_after(tmp_path, "on_train_epoch_start", epoch)
    assert found.epochs == list(range(8))
    holes = found.train_losses.isnan()
    # It skips none before the first step.
    assert holes.any(dim=1).nonzero().flatten().tolist() == ([epoch + 1] if epoch else [])
    assert holes.any(dim=1).equal(holes.all(dim=1))
    assert found.score().values.isfinite().all()


class CutOff(Classifier):
    """Is interrupted in the sweep after the third epoch, as by a signal."""

    def cld_step(self, batch):
        if (
            self.trainer.current_epoch == 2
            and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            and self.cut
        ):
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none"), batch[1]


def test_a_sweep_that_a_signal_cut_off_is_made_up_for(tmp_path):
    CutOff.cut = True
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(
            tmp_path,
            CLDCallback(dirpath=tmp_path),
            CutOff,
            callbacks=[OnExceptionCheckpoint(tmp_path)],
            max_epochs=6,
            enable_checkpointing=True,
        )
    CutOff.cut = False
    whole, cld = CLDCallback(), CLDCallback()
    fit(tmp_path / "whole", whole, CutOff, max_epochs=6)
    fit(tmp_path, cld, CutOff, max_epochs=6, ckpt_path=tmp_path / "on_exception.ckpt")
    assert cld.trajectories.epochs == list(range(7))
    assert not cld.trajectories.train_losses.isnan().any()
    assert torch.equal(cld.trajectories.train_losses[:4], whole.trajectories.train_losses[:4])


# Data that change


class Replacing(Blobs):
    """A dataset that replaces its data between epochs, as MONAI's SmartCacheDataset does."""

    def replace(self):
        inputs, labels = self.train_set.dataset.tensors
        self.train_set.dataset.tensors = (inputs.flip(0), labels)


class Replace(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            trainer.datamodule.replace()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_are_replaced_between_epochs_leave_holes(tmp_path, workers):
    cld = CLDCallback()
    with pytest.warns(UserWarning, match="shows other samples at the same positions than in the first sweep"):
        fit(tmp_path, cld, datamodule=Replacing(num_workers=workers), callbacks=[Replace()], max_epochs=6)
    rows = cld.trajectories.train_losses
    assert cld.trajectories.epochs == [0, 1, 2]
    assert not rows.isnan().any()


def test_trajectories_and_coresets_know_their_validation_set(tmp_path):
    data, cld = Blobs(), CLDCallback(dirpath=tmp_path)
    trainer, _ = fit(tmp_path, cld, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = Blobs()
    other.val_set.indices = other.train_set.indices[: len(other.val_set)]
    with pytest.raises(ValueError, match="The validation set is not the one whose losses were logged so far"):
        fit(tmp_path, CLDCallback(), datamodule=other, ckpt_path=tmp_path / "last.ckpt", max_epochs=6)
    assert len(CoresetDataModule(other, cld.scores, size=9).train_dataloader().dataset) == 9
    assert LossTrajectories.load(tmp_path / "cld-trajectories.npz").metadata["validation_fingerprint"]["length"] == 30


# Room for all of it


@pytest.mark.parametrize(
    ("watching", "max_epochs", "rows"),
    [({}, 5, 6), ({"cutoff_epoch": 4}, 9, 5), ({"every_n_epochs": 2}, 7, 4)],
    ids=["max_epochs", "cutoff", "every second"],
)
def test_losses_of_a_run_of_known_length_are_never_copied(tmp_path, monkeypatch, watching, max_epochs, rows):
    widths, allocated = {}, storage_rows._empty

    def counted(count, width, device):
        widths.setdefault(width, []).append(count)
        return allocated(count, width, device)

    monkeypatch.setattr(storage_rows, "_empty", counted)
    data = Blobs()
    cld = CLDCallback(dirpath=tmp_path, **watching)
    fit(tmp_path, cld, datamodule=data, max_epochs=max_epochs)
    assert len(cld.trajectories) == rows
    assert widths == {len(data.train_set): [rows], cld.trajectories.references: [rows]}


def test_figures_are_drawn_when_the_scores_are_saved_and_the_other_ranks_go_on(tmp_path, monkeypatch):
    seen = []
    cld = CLDCallback(dirpath=tmp_path)
    monkeypatch.setattr(SingleDeviceStrategy, "barrier", lambda self, name=None: seen.append(name))
    monkeypatch.setattr(callback, "log_scores", lambda *_: seen.append(("drawn", cld.scores_path.exists())))
    fit(tmp_path, cld)
    start = seen.index("CLD scores are saved")
    assert seen[start + 1] == ("drawn", True)
