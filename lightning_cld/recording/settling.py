"""`Settling`: since when the coreset that the scores choose has stayed the same, for `cutoff_epoch="auto"`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_cld.functional.diagnostics import OVERLAP, best_tenth, half_of, overlap
from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.trajectories import LossTrajectories

PATIENCE = 3
"""How many checkpoints in a row must have an overlap of `OVERLAP`. Two may be compared with the same earlier one."""


class Overlaps(NamedTuple):
    """The share of its samples that a checkpoint's coreset has in common with earlier ones; None if there is none.

    Attributes:
        previous: With that of the checkpoint before.
        half: With that of the newest checkpoint at no more than half the epochs.
    """

    previous: float | None
    half: float | None


class Settling:
    """Compares the coreset of each checkpoint with that of the newest one at no more than half its epochs.

    Neighbouring checkpoints always agree, since they share nearly all of their losses; those of half as many epochs
    need not. A checkpoint is scored once, from running moments, at a cost that does not grow with the epochs: some
    hundredths of a second for 50,000 samples. What was seen follows from the losses alone, so that a resumed run has
    only to look at them again.

    Attributes:
        overlaps: Those of the newest checkpoint.
        half_epoch: The earlier checkpoint that the newest is compared with; None if there is none.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories
        >>> from lightning_cld.recording.settling import Settling
        >>> falling = torch.linspace(3, 0, 13)[:, None].square()
        >>> train = falling * torch.linspace(0.5, 1, 40) + torch.linspace(0, 20, 13 * 40).view(13, 40).sin()
        >>> Settling().epoch(LossTrajectories(train, falling))
        8
    """

    def __init__(self) -> None:
        self.overlaps = Overlaps(None, None)
        self.half_epoch: int | None = None
        self._rows = 0
        self._history: RunningHistory | None = None
        self._chosen: dict[int, Tensor] = {}
        self._agreeing = 0
        self._settled: int | None = None

    def epoch(self, trajectories: LossTrajectories) -> int | None:
        """The first epoch at which the coreset has settled, None if it has not.

        Args:
            trajectories: The same ones at every call, longer by the checkpoints recorded since the last.
        """
        self.look(trajectories)
        return self._settled

    def look(self, history: LossTrajectories | RunningHistory) -> None:
        """Compares the coresets of the checkpoints recorded since the last look.

        Args:
            history: The same one at every call. Of a `RunningHistory` only the newest checkpoint can be looked at.
        """
        if isinstance(history, RunningHistory):
            if history.epochs[-1] not in self._chosen:
                self._compare(history.epochs[-1], history, history.train_classes)
            return
        for row in range(self._rows, len(history)):
            self._rows = row + 1
            train_row = history.train_losses[row]
            if self._history is None:
                self._history = RunningHistory.of_losses(
                    history.train_losses[:0], history.val_losses[:0], history.train_classes, history.val_classes, []
                )
            self._history.record(history.epochs[row], train_row, history.val_losses[row])
            if not train_row.isnan().all():  # else not logged: the scores are still those of the checkpoint before
                self._compare(history.epochs[row], self._history, history.train_classes)

    def _compare(self, epoch: int, history: RunningHistory, classes: Tensor | None) -> None:
        self.overlaps, self.half_epoch = Overlaps(None, None), None
        try:
            chosen = best_tenth(history.values(), classes).int()  # to take less memory
        except ValueError:  # too few checkpoints yet, or a reference or too many samples that diverged
            return
        previous, self.half_epoch = max(self._chosen, default=None), half_of(self._chosen, epoch)
        half = self.half_epoch
        self.overlaps = Overlaps(
            *(None if earlier is None else overlap(chosen, self._chosen[earlier]) for earlier in (previous, half))
        )
        self._chosen[epoch] = chosen
        if half is None or self.overlaps.half is None:
            return
        self._chosen = {other: kept for other, kept in self._chosen.items() if other >= half}
        self._agreeing = self._agreeing + 1 if self.overlaps.half >= OVERLAP else 0
        if self._agreeing >= PATIENCE and self._settled is None:
            self._settled = epoch
