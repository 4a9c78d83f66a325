"""What goes to the Trainer's loggers, under `cld/`: every checkpoint, and in the end the scores.

Straight to them and not through `LightningModule.log`, whose values would show among those that the user monitors. All
keys begin with `cld/`, the epoch too, so that what the training itself logs stays as it is.
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
from lightning_cld.scores import CLDScores
from lightning_cld.trajectories import LossTrajectories

_QUANTILES = {"min": 0.0, "q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9, "max": 1.0}


def log_checkpoint(
    trainer: Trainer, checkpoint: Checkpoint, history: LossTrajectories | RunningHistory, settling: Settling
) -> None:
    """Logs the mean losses of a checkpoint, the seconds that it took, and how settled the coreset is, on rank 0.

    Args:
        trainer: The Trainer of the fit.
        checkpoint: The newest one.
        history: All of them.
        settling: What has looked at the same history before.
    """
    loggers = _loggers(trainer)
    if not loggers:
        return
    overlaps = Overlaps(None, None)
    if _ranks(history):
        with _watching("how settled the coreset is could not be found out"):
            settling.look(history)
            overlaps = settling.overlaps
    metrics = {"train_loss": checkpoint.train_loss, "val_loss": checkpoint.val_loss, "seconds": checkpoint.seconds}
    metrics |= {f"overlap_{name}": value for name, value in overlaps._asdict().items() if value is not None}
    for logger in loggers:
        with _watching(f"a checkpoint could not be sent to {type(logger).__name__}"):
            _send(trainer, logger, checkpoint.epoch, metrics)


def log_scores(trainer: Trainer, scores: CLDScores, history: LossTrajectories | RunningHistory) -> None:
    """Logs how the scores are distributed, on rank 0; to TensorBoard also as a histogram and in figures.

    Args:
        trainer: The Trainer of the fit.
        scores: The scores.
        history: What they were made from.
    """
    pool = scores.values[scores.positions()]
    scored = pool[~pool.isnan()].double().numpy()
    metrics = {"scores/unscored": 1 - len(scored) / len(pool)}
    if len(scored):
        metrics["scores/negative"] = float((scored < 0).mean())
        for name, quantile in zip(_QUANTILES, np.quantile(scored, list(_QUANTILES.values())), strict=True):
            metrics[f"scores/{name}"] = float(quantile)
    for logger in _loggers(trainer):
        with _watching(f"the scores could not be sent to {type(logger).__name__}"):
            _send(trainer, logger, scores.epochs[-1], metrics)
    boards = [logger for logger in _loggers(trainer) if is_a(logger, "TensorBoardLogger")]
    if not boards or len(scored) == 0:
        return
    for board in boards:
        with _watching("the histogram of the scores could not be made"):
            board.experiment.add_histogram("cld/scores", scored, _step(trainer))
    for name, draw in _figures(scores, history).items():
        with _watching(f"the figure {name} could not be drawn"):
            figure = draw()
            for board in boards:
                board.experiment.add_figure(f"cld/{name}", figure, _step(trainer))


def _figures(scores: CLDScores, history: LossTrajectories | RunningHistory) -> dict[str, Callable[[], Any]]:
    """What draws each figure; none without matplotlib, which is optional.

    None has images, since training may go on: reading the train set here could open files that its workers, forked
    later, would share.
    """
    if find_spec("matplotlib") is None:
        return {}
    cut = SHARE if _ranks(history) else None
    figures: dict[str, Callable[[], Any]] = {"scores_by_class": lambda: plotting.plot_scores(scores, fraction=cut)[0]}
    if isinstance(history, LossTrajectories):
        if _ranks(history):
            figures["agreement"] = lambda: plotting.plot_agreement(history, fraction=SHARE)[0]
        figures["trajectories"] = lambda: plotting.plot_trajectories(history, scores=scores)[0]
    return figures


def _ranks(history: LossTrajectories | RunningHistory) -> bool:
    """Whether the scores are fit to choose the best tenth by; those from training steps are not."""
    return not (isinstance(history, LossTrajectories) and history.from_steps)


def _loggers(trainer: Trainer) -> list[Any]:
    """The loggers of this process; only on rank 0 do they write."""
    return list(trainer.loggers) if trainer.is_global_zero else []


@contextmanager
def _watching(what_failed: str) -> Iterator[None]:
    """Runs its body so that a training that is watched goes on as before: random states are put back, errors warn."""
    with isolate_rng():  # which restores nothing if its body raises
        try:
            yield
        except Exception as error:  # noqa: BLE001  # watching must not end a training that runs
            rank_zero_warn(f"CLD: {what_failed}: {error}")


def _send(trainer: Trainer, logger: Any, epoch: int, metrics: dict[str, float]) -> None:
    named = {f"cld/{name}": value for name, value in {"epoch": epoch, **metrics}.items()}
    logger.log_metrics(named, step=_step(trainer))
    logger.save()  # as the Trainer does after each of its own


def _step(trainer: Trainer) -> int:
    # Private, but the x axis of everything that the Trainer itself logs. It is `global_step` unless a batch takes
    # several optimizer steps, or, with manual optimization, none that are counted.
    return trainer.fit_loop.epoch_loop._batches_that_stepped
