"""Scores of the validation samples themselves, each against the reference that the others make.

They are what the scores of rightly labelled training samples look like. With `d` the difference of a validation sample
and `m` the reference of its class of `n` samples, the others' reference is `(n m - d) / (n - 1)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cld.functional.checks import MIN_CHECKPOINTS, distinct
from lightning_cld.functional.cld import FLAT, correlate, reference_of_groups

_SLICE_ELEMENTS = 2**17
"""Losses processed at a time: about twenty float64 temporaries of 1 MiB."""

_CANCELLED = 1e-10
"""If leaving out a sample leaves less than this share of a sum of squares, it is rounding that is left."""


def held_out_scores(val_losses: Tensor, val_classes: Tensor) -> Tensor:
    """CLD of each validation sample against the mean of the other validation samples of its class.

    Args:
        val_losses: Losses of the validation samples, floating point, `[T, M]`.
        val_classes: Their classes, int64, `[M]`.

    Returns:
        Float32, `[M]`, on the device of `val_losses`; NaN for the only sample of a class, and as in `cld_scores`.

    Example:
        >>> import torch
        >>> from lightning_cld.functional.held_out import held_out_scores
        >>> losses = torch.tensor([[2.0, 3.0, 1.0], [1.0, 2.0, 2.0], [0.7, 1.7, 2.3], [0.6, 1.6, 2.4]])
        >>> held_out_scores(losses[:, :2], torch.tensor([0, 0]))
        tensor([1., 1.])
    """
    val_losses = val_losses.detach()
    if val_losses.device.type == "mps":  # which has no float64
        return held_out_scores(val_losses.cpu(), val_classes).to(val_losses.device)
    labels, groups = distinct(val_classes.to(val_losses.device))
    reference = reference_of_groups(val_losses, groups, len(labels))
    sizes = _logged(val_losses, groups, len(labels))
    values = torch.empty(val_losses.shape[1], dtype=torch.float32, device=val_losses.device)
    width = max(1, _SLICE_ELEMENTS // len(val_losses))
    for start in range(0, len(values), width):
        part = slice(start, start + width)
        losses, size = val_losses[:, part].double(), sizes[:, groups[part]]
        whole, own = size * reference[:, groups[part]], losses.diff(dim=0)
        others = (whole - own) / (size - 1)  # NaN where there are none
        known = _squares(whole - own) > _CANCELLED * torch.maximum(_squares(whole), _squares(own))
        values[part] = correlate(losses, others)[0].where(known, torch.nan).float()
    return values


def _squares(values: Tensor) -> Tensor:
    """The sum of squares of each column about its mean, without NaN."""
    return (values - values.nanmean(dim=0)).square().nansum(dim=0)


def _logged(losses: Tensor, groups: Tensor, count: int) -> Tensor:
    """The number of differences of each group that were logged, float64 `[T-1, C]`, or `[1, C]` if all were."""
    missing = losses.isnan()
    logged = ~(missing[1:] | missing[:-1]) if missing.any() else ~missing[:1]
    counts = torch.zeros(len(logged), count, dtype=torch.float64, device=losses.device)
    return counts.index_add_(1, groups, logged.double())


def no_moments(references: int, device: torch.device | str | None = None) -> Tensor:
    """The moments of the validation samples before the first difference, float64 `[3, M]`."""
    return torch.zeros(3, references, dtype=torch.float64, device=device)


def with_difference(moments: Tensor, difference: Tensor, offset: Tensor, count: Tensor, counted: Tensor) -> Tensor:
    """The moments after one more difference, in a new tensor. `moments.py` names the formulas.

    Args:
        moments: For each validation sample the sum of its differences, the sum of their squares about their mean, and
            the sum of their products with the reference about the means; float64 `[3, M]`.
        difference: The new difference of each sample, float64 `[M]`.
        offset: How far the new difference of each sample's reference is from its mean so far, float64 `[M]`.
        count: The number of differences so far, `[M]`.
        counted: Where this one counts, bool `[M]`.
    """
    total, squares, products = moments
    own_offset = difference - total / count.clamp(min=1)
    weight = count.double() / (count + 1)
    updated = torch.stack(
        [total + difference, squares + weight * own_offset.square(), products + weight * own_offset * offset]
    )
    return updated.where(counted, moments)


def scores_from(moments: Tensor, reference_norm: Tensor, sizes: Tensor, count: Tensor) -> Tensor:
    """`held_out_scores` from moments. If only some losses of a row were logged, it is an approximation.

    Args:
        moments: As `with_difference` gives them.
        reference_norm: The norm of each sample's reference about its mean, float64 `[M]`.
        sizes: The number of validation samples of each sample's class, `[M]`.
        count: The number of differences, `[M]`.

    Returns:
        Float32, `[M]`; NaN where it is not defined.
    """
    total, squares, products = moments
    whole = sizes.square() * reference_norm.square()
    of_others = whole - 2 * sizes * products + squares
    values: Tensor = (sizes * products - squares) / (squares * of_others).sqrt()
    defined = (sizes > 1) & (count >= MIN_CHECKPOINTS - 1) & values.isfinite()
    defined &= squares.sqrt() > FLAT * total.abs() / count.sqrt()
    defined &= of_others > _CANCELLED * torch.maximum(whole, squares)
    return values.clamp(-1.0, 1.0).where(defined, torch.nan).float()
