"""`Settling`: since when the coreset that the scores choose has stayed the same, for `cutoff_epoch="auto"`."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cld.history import RunningHistory
from lightning_cld.scores import OUTSIDE
from lightning_cld.selection import select_top
from lightning_cld.trajectories import LossTrajectories

SHARE = 0.1
"""The share of the train set that the compared coresets keep. Small coresets change most, so that larger ones that
are chosen afterwards have settled too."""

OVERLAP = 0.85
"""The share of its samples that a coreset must have in common with that at half the epochs. With it, the coreset of
scikit-learn's digits (30 epochs, five seeds) settled after 12 to 16 epochs, on one that had at least 96 % of its
samples in common with that of all 30. With a fifth of the labels wrong the overlap stayed below 0.75 to the end, as it
should: the coreset of half the epochs had no more in common with the last."""

PATIENCE = 3
"""How many checkpoints in a row must have that overlap. Two neighbours may be compared with the same earlier one."""


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
            chosen = _choose(self._history.values(), trajectories.train_classes)
        except ValueError:  # too few checkpoints yet, or a reference or too many samples that diverged
            return False
        self._chosen[epoch] = chosen
        earlier = max((other for other in self._chosen if 2 * other <= epoch), default=None)
        if earlier is None:
            return False
        self._chosen = {other: kept for other, kept in self._chosen.items() if other >= earlier}
        overlap = torch.isin(chosen, self._chosen[earlier]).float().mean()
        self._agreeing = self._agreeing + 1 if overlap >= OVERLAP else 0
        return self._agreeing >= PATIENCE


def _choose(values: Tensor, classes: Tensor | None) -> Tensor:
    """The coreset, sorted positions, int32 to take less memory."""
    if classes is None:
        return select_top(values, fraction=SHARE).int()
    used = torch.nonzero(classes != OUTSIDE).flatten().to(values.device)
    return used[select_top(values[used], classes.to(values.device)[used], fraction=SHARE)].int()
