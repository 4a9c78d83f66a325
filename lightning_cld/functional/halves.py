"""The reliability of class references from moments instead of losses: constant memory, one checkpoint at a time.

For each split of `reference_reliability` and each class, the moments are those of the reference differences of the two
halves: their number, two means, two sums of squares and the sum of products about the means, in float64. `moments.py`
names the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cld.functional.checks import MIN_CHECKPOINTS
from lightning_cld.functional.cld import FLAT
from lightning_cld.functional.diagnostics import SPLITS, split_in_halves


def no_halves(classes: int, device: torch.device | str | None = None) -> Tensor:
    """The moments before the first difference, float64 `[6, SPLITS, C]`: 480 bytes a class."""
    return torch.zeros(6, SPLITS, classes, dtype=torch.float64, device=device)


def with_difference(halves: Tensor, before: Tensor, now: Tensor, val_classes: Tensor, labels: Tensor) -> Tensor:
    """The moments after the difference of two rows, in a new tensor. A difference with a NaN end is left out.

    Args:
        halves: The moments so far, float64 `[6, SPLITS, C]`.
        before: Validation losses of the row before, `[M]`.
        now: Validation losses of the new row, `[M]`.
        val_classes: Classes of the validation samples, int64 `[M]`.
        labels: The classes to report, sorted, int64 `[C]`.
    """
    wanted = torch.isin(val_classes, labels)
    groups = torch.searchsorted(labels, val_classes[wanted])
    # One index for all splits: the halves of the second split follow those of the first.
    places = split_in_halves(groups, len(labels)) + 2 * len(labels) * torch.arange(SPLITS)[:, None]
    places = places.flatten().to(halves.device)
    difference = (now.double() - before.double())[wanted]
    logged = ~difference.isnan()
    sums = halves.new_zeros(SPLITS * len(labels) * 2)
    counts = sums.index_add(0, places, logged.double().repeat(SPLITS))
    sums.index_add_(0, places, difference.where(logged, 0.0).repeat(SPLITS))
    a, b = (sums / counts).view(SPLITS, len(labels), 2).unbind(2)

    count, mean_a, mean_b, squares_a, squares_b, products = halves.unbind()
    weight = count / (count + 1)
    from_a, from_b = a - mean_a, b - mean_b
    updated = torch.stack(
        [
            count + 1,
            mean_a + from_a / (count + 1),
            mean_b + from_b / (count + 1),
            squares_a + weight * from_a.square(),
            squares_b + weight * from_b.square(),
            products + weight * from_a * from_b,
        ]
    )
    return updated.where(a.isfinite() & b.isfinite(), halves)


def reliability(halves: Tensor) -> Tensor:
    """`reference_reliability` of the rows so far, float64 `[C]`."""
    count, mean_a, mean_b, squares_a, squares_b, products = halves.unbind()
    defined = count >= MIN_CHECKPOINTS - 1
    for squares, mean in ((squares_a, mean_a), (squares_b, mean_b)):
        defined &= squares.sqrt() > FLAT * count.sqrt() * mean.abs()
    correlations = (products / (squares_a * squares_b).sqrt()).clamp(-1.0, 1.0)
    return correlations.where(defined, torch.nan).nanmean(dim=0)
