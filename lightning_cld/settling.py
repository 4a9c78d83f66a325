"""`Settling`: since when the coreset that the scores choose has stayed the same, for `cutoff_epoch="auto"`."""

from __future__ import annotations

from torch import Tensor

from lightning_cld.diagnostics import OVERLAP, best_tenth, half_of, overlap
from lightning_cld.history import RunningHistory
from lightning_cld.trajectories import LossTrajectories

PATIENCE = 3
"""How many checkpoints in a row must have an overlap of `OVERLAP`. Two may be compared with the same earlier one."""


class Settling:
    """Compares the coreset of each checkpoint with that of the newest one at no more than half its epochs.

    Neighbouring checkpoints always agree, since they share nearly all of their losses; those of half as many epochs
    need not. A checkpoint is scored once, from running moments, at a cost that does not grow with the epochs: some
    hundredths of a second for 50,000 samples. What was seen follows from the losses alone, so that a resumed run has
    only to look at them again.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories
        >>> from lightning_cld.settling import Settling
        >>> falling = torch.linspace(3, 0, 13)[:, None].square()
        >>> train = falling * torch.linspace(0.5, 1, 40) + torch.linspace(0, 20, 13 * 40).view(13, 40).sin()
        >>> Settling().epoch(LossTrajectories(train, falling))
        8
    """

    def __init__(self) -> None:
        self._rows = 0
        self._history: RunningHistory | None = None
        self._chosen: dict[int, Tensor] = {}
        self._agreeing = 0

    def epoch(self, trajectories: LossTrajectories) -> int | None:
        """The first epoch at which the coreset has settled, None if it has not.

        Args:
            trajectories: The same ones at every call, longer by the checkpoints recorded since the last.
        """
        for row in range(self._rows, len(trajectories)):
            self._rows = row + 1
            if self._look(trajectories, row):
                return trajectories.epochs[row]
        return None

    def _look(self, trajectories: LossTrajectories, row: int) -> bool:
        epoch, train_row = trajectories.epochs[row], trajectories.train_losses[row]
        if self._history is None:
            self._history = RunningHistory.of_losses(
                trajectories.train_losses[:0],
                trajectories.val_losses[:0],
                trajectories.train_classes,
                trajectories.val_classes,
                [],
            )
        self._history.record(epoch, train_row, trajectories.val_losses[row])
        if train_row.isnan().all():  # not logged: the scores are still those of the checkpoint before
            return False
        try:
            chosen = best_tenth(self._history.values(), trajectories.train_classes).int()  # to take less memory
        except ValueError:  # too few checkpoints yet, or a reference or too many samples that diverged
            return False
        self._chosen[epoch] = chosen
        earlier = half_of(self._chosen, epoch)
        if earlier is None:
            return False
        self._chosen = {other: kept for other, kept in self._chosen.items() if other >= earlier}
        settled = overlap(chosen, self._chosen[earlier]) >= OVERLAP
        self._agreeing = self._agreeing + 1 if settled else 0
        return self._agreeing >= PATIENCE
