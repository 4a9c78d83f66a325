"""The plan of a run: whether its epochs, cadence and cutoff can give scores at all."""

from __future__ import annotations

import math
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_cld.functional.checks import MIN_CHECKPOINTS, check_count


def check_cutoff(
    cutoff_epoch: object, every_n_epochs: int, history: str, *, stop_at_cutoff: bool
) -> int | Literal["auto"] | None:
    """Returns `cutoff_epoch`, numbers as int, or raises unless the plan has a checkpoint there and enough before it."""
    if cutoff_epoch is None:
        if stop_at_cutoff:
            raise ValueError("stop_at_cutoff=True needs a cutoff_epoch to stop at.")
        return None
    if isinstance(cutoff_epoch, str):
        if cutoff_epoch != "auto":
            raise ValueError(f"cutoff_epoch must be a number of epochs, 'auto' or None, got {cutoff_epoch!r}.")
        if history != "full":
            raise ValueError(
                f"cutoff_epoch='auto' compares with what earlier checkpoints chose, which history={history!r} does not "
                "keep. Use history='full', or give the epoch."
            )
        return "auto"
    cutoff_epoch = check_count("cutoff_epoch", cutoff_epoch)
    check_plan(cutoff_epoch, every_n_epochs, f"cutoff_epoch={cutoff_epoch}")
    if cutoff_epoch % every_n_epochs:
        raise ValueError(
            f"cutoff_epoch={cutoff_epoch} must be a multiple of every_n_epochs={every_n_epochs}: the checkpoint there "
            "would not be logged."
        )
    return cutoff_epoch


def check_record(record: object, history: str, every_n_epochs: int, cutoff_epoch: object) -> None:
    """Raises unless `record` is one of its two values, and the other arguments go with it."""
    if record not in ("sweep", "step"):
        raise ValueError(f"record must be 'sweep' or 'step', got {record!r}.")
    if record == "sweep":
        return
    if history != "full":
        raise ValueError(
            f"record='step' leaves holes where an epoch misses a sample, which history={history!r} can't keep apart. "
            "Use history='full'."
        )
    if every_n_epochs != 1:
        raise ValueError(
            f"record='step' logs every epoch at no cost, so every_n_epochs={every_n_epochs} would save nothing. Leave "
            "it out; LossTrajectories.score(every_n_epochs=...) thins afterwards."
        )
    if cutoff_epoch == "auto":
        raise ValueError(
            "cutoff_epoch='auto' waits for the best-scored tenth to settle, which step losses do not rank well enough. "
            "Give the epoch, or use record='sweep'."
        )


def check_plan(epochs: int, every_n_epochs: int, what: str) -> None:
    """Raises unless `epochs` epochs give the checkpoints that a score needs."""
    checkpoints = 1 + epochs // every_n_epochs
    if checkpoints < MIN_CHECKPOINTS:
        raise ValueError(
            f"{what} with every_n_epochs={every_n_epochs} gives {checkpoints} checkpoints (theta_0 included), and CLD "
            f"needs at least {MIN_CHECKPOINTS}. Train longer, or log more often."
        )


def check_max_steps(
    trainer: Trainer, pl_module: LightningModule, every_n_epochs: int, cutoff_epoch: int | None
) -> None:
    """Raises if `max_steps` ends training too early, where it is known how many steps an epoch takes."""
    scheduled = any(
        isinstance(callback, GradientAccumulationScheduler) for callback in getattr(trainer, "callbacks", [])
    )
    batches = trainer.num_training_batches
    if trainer.max_steps < 0 or scheduled or not pl_module.automatic_optimization or math.isinf(batches):
        return
    epochs = math.ceil(trainer.max_steps / math.ceil(batches / trainer.accumulate_grad_batches))
    what = f"max_steps={trainer.max_steps} ends training in epoch {epochs}, which"
    check_plan(epochs, every_n_epochs, what)
    if cutoff_epoch is not None and cutoff_epoch > epochs:
        raise ValueError(f"cutoff_epoch={cutoff_epoch} is never reached: max_steps={trainer.max_steps} ends before.")
