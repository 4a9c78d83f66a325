"""`Settling`: finds the epoch at which the coreset has settled, for `cutoff_epoch="auto"`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_cld.functional.diagnostics import OVERLAP, best_tenth, half_of, overlap
from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.trajectories import LossTrajectories

PATIENCE = 3
"""Checkpoints in a row whose overlap must reach `OVERLAP`. Two of them may be compared with the same earlier one."""


class Overlaps(NamedTuple):
    """The shares of a checkpoint's coreset that earlier coresets also hold; None if there is no earlier one.

    Attributes:
        previous: Overlap with the coreset of the previous checkpoint.
        half: Overlap with the coreset at half the epochs: the newest checkpoint at no more than half of them.
    """

    previous: float | None
    half: float | None


class Settling:
    """Compares the coreset of each checkpoint with the coreset at half its epochs.

    Neighbouring checkpoints always agree, because they share nearly all of their losses. Checkpoints at half the epochs
    need not. Each checkpoint is scored once, from running moments. That takes some hundredths of a second for 50,000
    samples and does not grow with the epochs. The result depends only on the losses, so a resumed run can compute it
    again.

    Attributes:
        overlaps: The overlaps of the newest checkpoint.
        half_epoch: The checkpoint at half the epochs that the newest is compared with; None if there is none.

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
        """The first epoch at which the coreset has settled; None if it has not.

        Args:
            trajectories: The same object at every call; checkpoints recorded since the last call are compared.
        """
        self.look(trajectories)
        return self._settled

    def look(self, history: LossTrajectories | RunningHistory) -> None:
        """Compares the coresets of the checkpoints recorded since the last call.

        Args:
            history: The same object at every call. A `RunningHistory` can give only its newest checkpoint.
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
                    history.train_losses[:0],
                    history.val_losses[:0],
                    history.train_classes,
                    history.val_classes,
                    [],
                    scores_only=True,
                )
            self._history.record(history.epochs[row], train_row, history.val_losses[row])
            if not train_row.isnan().all():  # a row of NaN was not logged and leaves the scores as they were
                self._compare(history.epochs[row], self._history, history.train_classes)

    def _compare(self, epoch: int, history: RunningHistory, classes: Tensor | None) -> None:
        self.overlaps, self.half_epoch = Overlaps(None, None), None
        try:
            chosen = best_tenth(history.values(), classes).int()  # int32 halves the memory
        except ValueError:  # too few checkpoints so far, or losses that diverged
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
