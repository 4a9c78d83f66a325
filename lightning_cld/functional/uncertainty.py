"""How uncertain the model was about each sample's label."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cld.functional.checks import check_losses

_SLICE_ELEMENTS = 2**17
"""Losses processed at a time, so that temporaries stay in the CPU cache."""


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
    width = max(1, _SLICE_ELEMENTS // max(1, len(losses)))
    for start in range(0, losses.shape[1], width):
        part = losses[:, start : start + width].float()
        values[start : start + width] = _spread(part).nanmean(dim=0).where(~part.isinf().any(dim=0), torch.nan)
    return values


def with_row(mean: Tensor, rows: Tensor, row: Tensor) -> Tensor:
    """The uncertainty after one row of losses more, in a new tensor.

    The mean is computed in float64 and kept in float32. It lies in [0, 0.25], where rounding moves it by at most 2^-27.
    After `n` rows that makes at most `n * 2^-28`: below 1e-5 for 2,600 rows even if all roundings went one way.

    Args:
        mean: `aleatoric_uncertainty` of the rows so far, float32, `[N]`.
        rows: The number of rows so far, integer, `[]`.
        row: The losses of the new row, float32, `[N]`.

    Returns:
        Float32, `[N]`; NaN, for good, where the loss of any row was NaN or infinite.

    Example:
        >>> import torch
        >>> from lightning_cld.functional.uncertainty import with_row
        >>> first = with_row(torch.zeros(1), torch.tensor(0), -torch.tensor([0.5]).log())
        >>> with_row(first, torch.tensor(1), -torch.tensor([0.9]).log())
        tensor([0.1700])
    """
    updated = torch.empty_like(mean)
    for start in range(0, len(mean), _SLICE_ELEMENTS):
        part = slice(start, start + _SLICE_ELEMENTS)
        spread = _spread(row[part]).where(~row[part].isinf(), torch.nan)
        updated[part] = (mean[part].double() * rows + spread) / (rows + 1)
    return updated


def _spread(losses: Tensor) -> Tensor:
    chances = (-losses).exp()
    return chances * (1 - chances)
