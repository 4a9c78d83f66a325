"""`Timeline`: decides which epochs of a run have a checkpoint, and checks that they suffice for scores."""

from __future__ import annotations

import math
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from lightning_cld.functional.checks import MIN_CHECKPOINTS, check_count
from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.recording.settling import Settling
from lightning_cld.trajectories import LossTrajectories

LARGE_HISTORY = 2**30
"""Bytes of logged losses (1 GiB) above which a fit warns and names `history="running"`."""


class Timeline:
    """The checkpoints of a run: one before training, one after every n-th epoch, none after the cutoff.

    `CLDCallback` documents the arguments and errors.

    Attributes:
        settling: Compares the coresets of the checkpoints.
        settled: Epoch at which the coreset settled, for `cutoff_epoch="auto"`; None until then.
        epochs_before: Epochs that the Trainer had completed before it got this module.
    """

    def __init__(
        self,
        cutoff_epoch: int | Literal["auto"] | None,
        every_n_epochs: int,
        *,
        stop_at_cutoff: bool,
        history: str,
        record: str,
    ) -> None:
        self.every_n_epochs = check_count("every_n_epochs", every_n_epochs)
        if history not in ("full", "running"):
            raise ValueError(f"history must be 'full' or 'running', got {history!r}.")
        _check_record(record, history, self.every_n_epochs, cutoff_epoch)
        self.cutoff_epoch = _check_cutoff(cutoff_epoch, self.every_n_epochs, history, stop_at_cutoff=stop_at_cutoff)
        self._max_epochs: int | None = None
        self.forget()

    def forget(self) -> None:
        """Drops all state of a run."""
        self.settling = Settling()
        self.settled: int | None = None
        self.epochs_before = 0

    @property
    def cutoff(self) -> int | None:
        """The epoch after which nothing is logged; None if there is none, or none is known yet."""
        return self.settled if isinstance(self.cutoff_epoch, str) else self.cutoff_epoch

    @property
    def last_epoch(self) -> int | None:
        """The last epoch of the fit, if that is known."""
        return None if self._max_epochs is None else self._max_epochs - self.epochs_before

    @property
    def planned(self) -> range:
        """The epochs of all checkpoints, theta_0 included; empty if it is not known when the last one will be."""
        last = self.cutoff or self.last_epoch
        return range(0, -1 if last is None else last + 1, self.every_n_epochs)

    @property
    def half_epoch(self) -> int | None:
        """The checkpoint at half of the planned epochs; None if these are not known."""
        return self.planned[(len(self.planned) - 1) // 2] if self.planned else None

    def warn_of_size(self, train_samples: int, val_samples: int) -> None:
        """Warns if the losses of all checkpoints will take more than `LARGE_HISTORY`, and moments would take less."""
        size, running = 4 * (train_samples + val_samples) * len(self.planned), 36 * train_samples
        if size <= max(LARGE_HISTORY, running):
            return
        number = " and a number as cutoff_epoch" if self.cutoff_epoch == "auto" else ""
        rank_zero_warn(
            f"CLD: the losses of {train_samples:,} train and {val_samples:,} validation samples at {len(self.planned)} "
            f"checkpoints will take {size / 2**30:,.1f} GiB, in memory and on disk. With history='running'{number} it "
            f"would be 36 bytes per train sample, {running / 2**30:,.1f} GiB, for any number of epochs: the same "
            "scores, but no trajectories."
        )

    @property
    def max_epochs(self) -> int | None:
        """Those of the Trainer when the fit was set up; None if there is no limit."""
        return self._max_epochs

    def completed(self, trainer: Trainer) -> int:
        """How many epochs the module that is watched has completed, at the start of an epoch."""
        return trainer.current_epoch - self.epochs_before

    def begin(self, trainer: Trainer) -> None:
        """Reads `max_epochs` from the Trainer when a fit is set up.

        Raises:
            ValueError: If there are too few epochs for scores, or training ends before the cutoff.
        """
        # Read it now: SWA raises max_epochs later, for an extra epoch that ends on averaged weights.
        self._max_epochs = trainer.max_epochs if trainer.max_epochs != -1 else None
        last = self.last_epoch
        if last is None:
            return
        what = f"max_epochs={self._max_epochs}"
        if self.epochs_before:
            what += f", of which {self.epochs_before} were completed with another module,"
        _check_epochs(last, self.every_n_epochs, what)
        if self.cutoff is not None and self.cutoff > last:
            raise ValueError(f"cutoff_epoch={self.cutoff} is never reached with {what.rstrip(',')}.")

    def check_max_steps(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ValueError if `max_steps` ends training too early; skipped if the steps per epoch are unknown."""
        scheduled = any(
            isinstance(callback, GradientAccumulationScheduler) for callback in getattr(trainer, "callbacks", [])
        )
        batches = trainer.num_training_batches
        if trainer.max_steps < 0 or scheduled or not pl_module.automatic_optimization or math.isinf(batches):
            return
        epochs = math.ceil(trainer.max_steps / math.ceil(batches / trainer.accumulate_grad_batches))
        what = f"max_steps={trainer.max_steps} ends training in epoch {epochs}, which"
        _check_epochs(epochs, self.every_n_epochs, what)
        if self.cutoff is not None and self.cutoff > epochs:
            raise ValueError(
                f"cutoff_epoch={self.cutoff} is never reached: max_steps={trainer.max_steps} ends training before it."
            )

    def is_due(self, epoch: int) -> bool:
        """Whether there is a checkpoint after `epoch` completed epochs."""
        last = self.cutoff or self.last_epoch
        return epoch % self.every_n_epochs == 0 and (last is None or epoch <= last)

    def is_past_cutoff(self, epoch: int) -> bool:
        """Whether the scores are due after `epoch` completed epochs."""
        return self.cutoff is not None and epoch >= self.cutoff

    def look_whether_settled(self, trainer: Trainer, history: LossTrajectories | RunningHistory | None) -> None:
        """For `cutoff_epoch="auto"`, lets rank 0 decide for all ranks whether the coreset has settled."""
        if self.cutoff_epoch != "auto" or self.settled is not None or not isinstance(history, LossTrajectories):
            return
        epoch = None
        if trainer.is_global_zero:
            try:
                epoch = self.settling.epoch(history)
            except Exception as error:  # noqa: BLE001  # the other ranks wait, and watching must not stop a run
                rank_zero_warn(f"CLD: could not find out whether the coreset has settled: {error}")
        self.settled = trainer.strategy.broadcast(epoch)


def _check_cutoff(
    cutoff_epoch: object, every_n_epochs: int, history: str, *, stop_at_cutoff: bool
) -> int | Literal["auto"] | None:
    """Returns a valid `cutoff_epoch`, numbers as int; raises if it has no checkpoint or too few before it."""
    if cutoff_epoch is None:
        if stop_at_cutoff:
            raise ValueError("stop_at_cutoff=True needs a cutoff_epoch to stop at.")
        return None
    if isinstance(cutoff_epoch, str):
        if cutoff_epoch != "auto":
            raise ValueError(f"cutoff_epoch must be a number of epochs, 'auto' or None, got {cutoff_epoch!r}.")
        if history != "full":
            raise ValueError(
                f"cutoff_epoch='auto' compares the coresets of earlier checkpoints, which history={history!r} does not "
                "keep. Use history='full', or set cutoff_epoch to a number."
            )
        return "auto"
    cutoff_epoch = check_count("cutoff_epoch", cutoff_epoch)
    _check_epochs(cutoff_epoch, every_n_epochs, f"cutoff_epoch={cutoff_epoch}")
    if cutoff_epoch % every_n_epochs:
        raise ValueError(
            f"cutoff_epoch={cutoff_epoch} must be a multiple of every_n_epochs={every_n_epochs}: otherwise no "
            "checkpoint is logged at the cutoff."
        )
    return cutoff_epoch


def _check_record(record: object, history: str, every_n_epochs: int, cutoff_epoch: object) -> None:
    """Raises ValueError if `record` is unknown, or the other arguments don't go with it."""
    if record not in ("sweep", "step"):
        raise ValueError(f"record must be 'sweep' or 'step', got {record!r}.")
    if record == "sweep":
        return
    if history != "full":
        raise ValueError(
            f"record='step' has no loss for a sample that an epoch skips, and history={history!r} can't handle missing "
            "losses. Use history='full'."
        )
    if every_n_epochs != 1:
        raise ValueError(
            f"record='step' logs every epoch at no cost, so every_n_epochs={every_n_epochs} saves nothing. Leave it "
            "out. LossTrajectories.score(every_n_epochs=...) can thin the timeline later."
        )
    if cutoff_epoch == "auto":
        raise ValueError(
            "cutoff_epoch='auto' waits for the best-scored 10 % to settle, and step losses don't rank well enough for "
            "that. Set cutoff_epoch to a number, or use record='sweep'."
        )


def _check_epochs(epochs: int, every_n_epochs: int, what: str) -> None:
    """Raises ValueError if `epochs` epochs give too few checkpoints for a score."""
    checkpoints = 1 + epochs // every_n_epochs
    if checkpoints < MIN_CHECKPOINTS:
        raise ValueError(
            f"{what} with every_n_epochs={every_n_epochs} gives {checkpoints} checkpoints (theta_0 included), but CLD "
            f"needs at least {MIN_CHECKPOINTS}. Train longer, or log more often."
        )
