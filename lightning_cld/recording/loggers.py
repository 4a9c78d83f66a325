"""Logging to the Trainer's loggers: metrics at every checkpoint, and the scores at the end.

Values go to the loggers directly. `LightningModule.log` would mix them with the metrics that the user monitors. All
keys begin with `cld/`, so they never collide with what the training itself logs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_cld import plotting
from lightning_cld.functional.diagnostics import SHARE
from lightning_cld.guards import is_a
from lightning_cld.recording.recorder import Checkpoint
from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.recording.settling import Overlaps, Settling
from lightning_cld.scores import CLDScores, why_no_tenth
from lightning_cld.trajectories import LossTrajectories

_QUANTILES = {"min": 0.0, "q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9, "max": 1.0}


def log_checkpoint(
    trainer: Trainer,
    checkpoint: Checkpoint,
    history: LossTrajectories | RunningHistory,
    settling: Settling,
    prefix: str = "cld",
) -> None:
    """Logs a checkpoint's mean losses, its duration in seconds and the coreset's overlaps, on rank 0.

    Args:
        trainer: The Trainer of the fit.
        checkpoint: The newest checkpoint.
        history: All checkpoints so far.
        settling: The `Settling` that has followed this history.
        prefix: What all keys begin with.
    """
    loggers = _loggers(trainer)
    if not loggers:
        return
    overlaps = Overlaps(None, None)
    if _can_rank(history):
        with _warn_on_error("the coreset's overlaps could not be computed"):
            settling.look(history)
            overlaps = settling.overlaps
    metrics = {"train_loss": checkpoint.train_loss, "val_loss": checkpoint.val_loss, "seconds": checkpoint.seconds}
    metrics |= {f"overlap_{name}": value for name, value in overlaps._asdict().items() if value is not None}
    for logger in loggers:
        with _warn_on_error(f"a checkpoint could not be sent to {type(logger).__name__}"):
            _send(trainer, logger, prefix, checkpoint.epoch, metrics)


def log_scores(
    trainer: Trainer, scores: CLDScores, history: LossTrajectories | RunningHistory, prefix: str = "cld"
) -> None:
    """Logs the distribution of the scores, on rank 0. TensorBoard also gets a histogram and figures.

    Args:
        trainer: The Trainer of the fit.
        scores: The scores.
        history: The history that the scores were computed from.
        prefix: What all keys begin with.
    """
    pool = scores.values[scores.positions()]
    scored = pool[~pool.isnan()].double().numpy()
    metrics = {"scores/unscored": 1 - len(scored) / len(pool)}
    if len(scored):
        metrics["scores/negative"] = float((scored < 0).mean())
        found = scores.metadata.get("implausible")
        if found and found["share"]:
            metrics["scores/implausible"] = found["share"][0]
        for name, quantile in zip(_QUANTILES, np.quantile(scored, list(_QUANTILES.values())), strict=True):
            metrics[f"scores/{name}"] = float(quantile)
    for logger in _loggers(trainer):
        with _warn_on_error(f"the scores could not be sent to {type(logger).__name__}"):
            _send(trainer, logger, prefix, scores.epochs[-1], metrics)
    boards = [logger for logger in _loggers(trainer) if is_a(logger, "TensorBoardLogger")]
    if not boards or len(scored) == 0:
        return
    for board in boards:
        with _warn_on_error("the histogram of the scores could not be made"):
            board.experiment.add_histogram(f"{prefix}/scores", scored, _step(trainer))
    for name, draw in _figures(scores, history).items():
        with _warn_on_error(f"the figure {name} could not be drawn"):
            figure = draw()
            for board in boards:
                board.experiment.add_figure(f"{prefix}/{name}", figure, _step(trainer))


def _figures(scores: CLDScores, history: LossTrajectories | RunningHistory) -> dict[str, Callable[[], Any]]:
    """Returns a function for each figure that draws it; empty without matplotlib, which is optional.

    No figure shows images. Training may go on, and reading the train set here could open files that workers forked
    later would share.
    """
    if find_spec("matplotlib") is None:
        return {}
    cut = None if why_no_tenth(scores) else SHARE
    figures: dict[str, Callable[[], Any]] = {"scores_by_class": lambda: plotting.plot_scores(scores, fraction=cut)[0]}
    if isinstance(history, LossTrajectories):
        if cut is not None:
            figures["agreement"] = lambda: plotting.plot_agreement(history, fraction=SHARE)[0]
        figures["trajectories"] = lambda: plotting.plot_trajectories(history, scores=scores)[0]
    return figures


def _can_rank(history: LossTrajectories | RunningHistory) -> bool:
    """Whether the scores can choose the best-scored 10 %. Scores from training steps can't."""
    return not (isinstance(history, LossTrajectories) and history.from_steps)


def _loggers(trainer: Trainer) -> list[Any]:
    """The Trainer's loggers on rank 0, none on other ranks."""
    return list(trainer.loggers) if trainer.is_global_zero else []


@contextmanager
def _warn_on_error(what_failed: str) -> Iterator[None]:
    """Turns an error in its body into a warning and restores the RNG states, so that training goes on unchanged."""
    with isolate_rng():  # restores nothing if its body raises, so the error is caught inside
        try:
            yield
        except Exception as error:  # noqa: BLE001  # watching must not stop a run
            rank_zero_warn(f"CLD: {what_failed}: {error}")


def _send(trainer: Trainer, logger: Any, prefix: str, epoch: int, metrics: dict[str, float]) -> None:
    named = {f"{prefix}/{name}": value for name, value in {"epoch": epoch, **metrics}.items()}
    logger.log_metrics(named, step=_step(trainer))
    logger.save()  # the Trainer does the same after each of its own writes


def _step(trainer: Trainer) -> int:
    # Private, but the Trainer uses it as the x axis of everything it logs. It differs from `global_step` where a batch
    # takes several optimizer steps, or where manual optimization takes none that are counted.
    return trainer.fit_loop.epoch_loop._batches_that_stepped
