"""From the losses of training steps to losses at epoch ends."""

from __future__ import annotations

import torch
from torch import Tensor


def at_epoch_ends(losses: Tensor) -> Tensor:
    """Estimates the losses at epoch ends from the losses of training steps.

    A step sees a sample somewhere in its epoch, on average in the middle. The mean of two consecutive epochs therefore
    estimates the checkpoint between them. It matches the reference there better than either epoch alone, as measured in
    `examples/benchmarks/RESULTS.md`.

    Args:
        losses: Floating point `[T, N]`: the row of a sweep, then one row for each following epoch.

    Returns:
        `[T, N]`. The first and last rows are unchanged, and so are losses with no logged loss in the next row.

    Example:
        >>> import torch
        >>> at_epoch_ends(torch.tensor([[3.0], [2.0], [1.0], [0.5]])).flatten()
        tensor([3.0000, 1.5000, 0.7500, 0.5000])
    """
    means = (losses[1:-1] + losses[2:]) / 2
    means = torch.where(means.isnan(), losses[1:-1], means)
    return torch.cat([losses[:1], means, losses[-1:]]) if len(losses) > 1 else losses
