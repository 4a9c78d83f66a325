"""How uncertain the model was about each sample's label."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cld.functional.checks import check_losses

_SLICE = 2**15
"""Samples processed at a time, row by row, so that temporaries stay in the CPU cache."""


def aleatoric_uncertainty(losses: Tensor) -> Tensor:
    """The mean over checkpoints of `p (1 - p)`, where `p = exp(-loss)` is the probability of the sample's label.

    It is high for samples that stay ambiguous (`p` near 0.5). It is low for easy samples (`p` near 1) and for samples
    whose label the model never learns, such as mislabeled ones (`p` near 0). This is the aleatoric uncertainty of
    Seedat et al., "Data-IQ: Characterizing Subgroups with Heterogeneous Outcomes in Tabular Data", NeurIPS 2022.

    Args:
        losses: Losses, floating point, `[T, N]`. `p` is a probability if they are cross-entropy. NaN (not logged) is
            left out.

    Returns:
        Float32, `[N]`, on the device of `losses`; in [0, 0.25] if no loss is negative. NaN marks samples without a
        logged loss or with an infinite one (not finite).

    Raises:
        TypeError: If `losses` is not a floating point tensor.
        ValueError: If the shape is not `[T, N]` with at least one column.

    Example:
        >>> import torch
        >>> from lightning_cld.functional import aleatoric_uncertainty
        >>> aleatoric_uncertainty(-torch.tensor([[0.5, 0.9], [0.5, 1.0]]).log())
        tensor([0.2500, 0.0450])
    """
    check_losses(losses, "losses")
    values = torch.empty(losses.shape[1], dtype=torch.float32, device=losses.device)
    for start in range(0, losses.shape[1], _SLICE):
        part = slice(start, start + _SLICE)
        values[part] = _mean_of_complete(losses[:, part])
    again = values.isnan().nonzero().flatten()
    width = max(1, _SLICE // max(1, len(losses)))
    for start in range(0, len(again), width):
        columns = again[start : start + width]
        doubtful = losses[:, columns].float()
        mean = _spread(doubtful).nanmean(dim=0)
        values[columns] = mean.where(~doubtful.isinf().any(dim=0), torch.nan)
    return values


def _mean_of_complete(losses: Tensor) -> Tensor:
    """The mean of columns of which every loss was logged and is finite; NaN for all other columns."""
    sums = torch.zeros(losses.shape[1], dtype=torch.float32, device=losses.device)
    total, chances = torch.zeros_like(sums), torch.empty_like(sums)
    for row in losses:
        chances.copy_(row)
        total += chances  # stays infinite or NaN once it is
        chances.neg_().exp_()
        sums.add_(chances).addcmul_(chances, chances, value=-1)
    return (sums / len(losses)).where(total.isfinite(), torch.nan)


def _spread(losses: Tensor) -> Tensor:
    chances = (-losses).exp()
    return chances * (1 - chances)
