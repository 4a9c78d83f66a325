"""What the losses of training steps stand for."""

from __future__ import annotations

import torch
from torch import Tensor


def at_epoch_ends(losses: Tensor) -> Tensor:
    """Losses at the ends of epochs, estimated from those that training steps saw within the epochs.

    A step sees a sample somewhere in its epoch, in the middle on average; so the mean of what two epochs saw stands for
    the checkpoint between them. That it pairs better with the reference there than either by itself was measured:
    `examples/benchmarks/RESULTS.md`.

    Args:
        losses: Floating point `[T, N]`: a sweep's row, then one for each following epoch.

    Returns:
        `[T, N]`; the first row and what no mean is known of, the last row say, as they are.

    Example:
        >>> import torch
        >>> at_epoch_ends(torch.tensor([[3.0], [2.0], [1.0], [0.5]])).flatten()
        tensor([3.0000, 1.5000, 0.7500, 0.5000])
    """
    means = (losses[1:-1] + losses[2:]) / 2
    means = torch.where(means.isnan(), losses[1:-1], means)
    return torch.cat([losses[:1], means, losses[-1:]]) if len(losses) > 1 else losses
