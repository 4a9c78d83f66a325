"""The CLD score of every training sample.

M. Nagaraj, D. Ravikumar and K. Roy define the score in "Coresets from Trajectories: Selecting Data via Correlation of
Loss Differences", TMLR 2025.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_cld.functional.arrays import IntegersLike
from lightning_cld.functional.checks import (
    MIN_CHECKPOINTS,
    check_checkpoints,
    check_class_pair,
    check_differences,
    check_losses,
    check_reference,
    distinct,
)

_SLICE_SAMPLES = 2**17
"""Samples scored at a time, row by row. The seven float64 temporaries of 1 MiB stay in the CPU cache."""

_SLICE_ELEMENTS = 2**17
"""Losses scored at a time if some are missing: about twenty float64 temporaries of 1 MiB."""

_CANCELLED = 1e-6
"""If subtracting the mean leaves less than this share of a sum of squares, the sum is computed again about the mean."""

FLAT = 1e-13
"""Differences that vary by less than this share of their size vary only by float64 rounding."""


def cld_scores(
    train_losses: Tensor,
    val_losses: Tensor,
    train_classes: IntegersLike | None = None,
    val_classes: IntegersLike | None = None,
) -> Tensor:
    """Scores every training sample by the Correlation of Loss Differences (CLD).

    The score of sample `z` of class `c` is the Pearson correlation, over checkpoints `t`, of its loss differences
    `l(t, z) - l(t-1, z)` with the class reference `m_t(c) - m_{t-1}(c)`. Here `m_t(c)` is the mean loss of the
    validation samples of class `c` (Nagaraj et al., TMLR 2025, the definition of CLD). Row 0 should be theta_0, the
    model before its first step.

    NaN means *not logged*: differences with a NaN are left out. Infinity means *not finite*: the sample is unscored.

    The computation uses float64, in slices, on the device of `train_losses` (on the CPU if the device has no float64).
    A large offset shared by all losses therefore does no harm, and temporaries stay small.

    Args:
        train_losses: Losses of the training samples, floating point, `[T, N]`, one row per checkpoint, `T >= 4`.
        val_losses: Losses of the validation samples at the same checkpoints, floating point, `[T, M]`.
        train_classes: The training samples' classes, `[N]`: integers of any type, in a tensor, an array, a pandas
            Series or a list. None puts all samples into one class.
        val_classes: The validation samples' classes, `[M]`, likewise; None if `train_classes` is None.

    Returns:
        Scores in [-1, 1], float32, `[N]`, on the device of `train_losses`. NaN marks an unscored sample: one of its
        losses is not finite, it has fewer than 3 logged differences, or its differences or its class reference do not
        vary.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes don't match, there are fewer than 4 checkpoints or 3 usable differences, a class has
            training but no validation samples, or a validation loss is not finite.

    Example:
        >>> import torch
        >>> from lightning_cld import cld_scores
        >>> val = torch.tensor([[2.0, 2.2], [1.0, 1.2], [0.7, 0.9], [0.6, 0.8]])
        >>> falls_with_it = torch.tensor([3.0, 2.0, 1.7, 1.6])
        >>> rises = torch.tensor([1.0, 2.0, 2.3, 2.4])
        >>> cld_scores(torch.stack([falls_with_it, rises], dim=1), val)
        tensor([ 1., -1.])
    """
    check_losses(train_losses, "train_losses")
    [(scores, differences)] = scores_at([len(train_losses)], train_losses, val_losses, train_classes, val_classes)
    check_differences(differences)
    return scores


def scores_at(
    rows: Sequence[int],
    train_losses: Tensor,
    val_losses: Tensor,
    train_classes: IntegersLike | None = None,
    val_classes: IntegersLike | None = None,
) -> list[tuple[Tensor, int]]:
    """The scores of `cld_scores` from the first rows alone, for several numbers of rows, in one pass over the losses.

    Args:
        rows: How many rows to use, increasing, each at least 4. The last is all of them.
        train_losses: As for `cld_scores`.
        val_losses: As for `cld_scores`.
        train_classes: As for `cld_scores`.
        val_classes: As for `cld_scores`.

    Returns:
        For each number of rows the scores, and the most usable differences that any sample has. Fewer than 3 give no
        scores.

    Raises:
        TypeError: As for `cld_scores`.
        ValueError: As for `cld_scores`, but not for too few differences.
    """
    check_losses(train_losses, "train_losses")
    check_losses(val_losses, "val_losses")
    train_losses, val_losses = train_losses.detach(), val_losses.detach()
    steps, samples = train_losses.shape
    if val_losses.shape[0] != steps:
        raise ValueError(
            f"train_losses and val_losses must have a row for each checkpoint, got {steps} and "
            f"{val_losses.shape[0]} rows."
        )
    check_checkpoints(steps)
    of_train, of_val = check_class_pair(train_classes, val_classes, samples, val_losses.shape[1])
    work_device = torch.device("cpu") if train_losses.device.type == "mps" else train_losses.device
    classes, groups = distinct(of_train.to(work_device))
    check_reference(val_losses, of_val, classes, [f"row {row}" for row in range(steps)])
    reference = class_reference(val_losses.to(work_device), of_val.to(work_device), classes)
    scores = torch.empty(len(rows), samples, dtype=torch.float32, device=work_device)
    doubtful = torch.empty(len(rows), samples, dtype=torch.bool, device=work_device)
    unit_reference = _unit_columns(reference)
    early = [(count, *_early_reference(unit_reference[: count - 1])) for count in rows[:-1]]
    for start in range(0, samples, _SLICE_SAMPLES):
        part = slice(start, start + _SLICE_SAMPLES)
        losses = train_losses[:, part].to(work_device)
        for place, found in enumerate(_correlate_complete(losses, unit_reference, groups[part], early)):
            scores[place, part], doubtful[place, part] = found

    most_differences = []
    for place, count in enumerate(rows):
        again = doubtful[place].nonzero().flatten()
        most_differences.append(count - 1 if len(again) < samples else 0)
        width = max(1, _SLICE_ELEMENTS // count)
        for start in range(0, len(again), width):
            columns = again[start : start + width]
            losses = train_losses[:count, columns.to(train_losses.device)].to(work_device)
            values, differences = correlate(losses, reference[: count - 1, groups[columns]])
            scores[place, columns] = values.float()
            most_differences[place] = max(most_differences[place], int(differences.max()))
    return list(zip(scores.to(train_losses.device), most_differences, strict=True))


def class_reference(val_losses: Tensor, val_classes: Tensor, classes: Tensor) -> Tensor:
    """The mean validation loss difference of each of the sorted `classes`, float64, `[T-1, C]`.

    If all samples were logged, this is the difference of the class means. It is NaN where no sample was logged.
    """
    wanted = torch.isin(val_classes, classes)
    if not wanted.all():
        val_losses, val_classes = val_losses[:, wanted], val_classes[wanted]
    return reference_of_groups(val_losses, torch.searchsorted(classes, val_classes.contiguous()), len(classes))


def reference_of_groups(val_losses: Tensor, groups: Tensor, count: int) -> Tensor:
    """`class_reference` of groups of samples.

    Args:
        val_losses: Floating point, `[T, M]`.
        groups: The group of each sample, int64, `[M]`; or several groupings, `[S, M]`, whose groups all differ.
        count: The number of groups.
    """
    reference = torch.empty(val_losses.shape[0] - 1, count, dtype=torch.float64, device=val_losses.device)
    flat = groups.flatten()
    whole = torch.bincount(flat, minlength=count).double()
    holes = bool(val_losses.isnan().any())
    for row in range(len(reference)):
        difference = val_losses[row + 1].double() - val_losses[row].double()
        counts = whole
        if holes:
            logged = ~difference.isnan()
            difference = difference.where(logged, 0.0)
            each = logged.double().expand_as(groups).flatten()
            counts = reference.new_zeros(count).scatter_add_(0, flat, each)
        each = difference.expand_as(groups).flatten()
        reference[row] = reference.new_zeros(count).scatter_add_(0, flat, each) / counts
    return reference


def correlate(losses: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Pearson correlation of each column of `losses.diff()` with the same column of `reference`, both `[T-1, n]`.

    Returns:
        The correlations, float64 `[n]`, NaN where undefined; and the number of differences used, `[n]`.
    """
    difference = losses.double().diff(dim=0)
    missing = losses.isnan()
    logged = ~(missing[1:] | missing[:-1] | reference.isnan())
    count = logged.sum(dim=0)
    scores = (standardised(difference, logged, count) * standardised(reference, logged, count)).sum(dim=0)
    defined = (count >= MIN_CHECKPOINTS - 1) & ~losses.isinf().any(dim=0)
    return scores.clamp(-1.0, 1.0).where(defined, torch.nan), count


def _correlate_complete(
    losses: Tensor, unit_reference: Tensor, groups: Tensor, early: Sequence[tuple[int, Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """A faster `correlate` for losses that are all logged, finite and of an ordinary size.

    One pass over the rows computes all sums, with `sum (D - mean D)^2` as `sum D^2 - (sum D)^2 / n`. This fails if a
    loss is missing or not finite, if squares leave the range of float64, or if subtracting the mean leaves almost
    nothing. The sums reveal each failure, so the losses need no separate check.

    Args:
        losses: `[T, n]`.
        unit_reference: The references of all classes, with mean 0 and norm 1, float64 `[T-1, C]`.
        groups: The column of each sample's class in `unit_reference`, int64 `[n]`.
        early: Smaller numbers of rows to correlate as well, increasing, each with its `_early_reference`.

    Returns:
        For each number of rows, the last of which is all: the correlations, float64 `[n]`, and which of them
        `correlate` must compute instead, bool `[n]`.
    """
    found: list[tuple[Tensor, Tensor]] = []
    first = losses[0].double()
    before, now = first.clone(), torch.empty_like(first)
    difference, unit = torch.empty_like(first), torch.empty_like(first)
    squares, products = torch.zeros_like(first), torch.zeros_like(first)
    for count, (row, unit_row) in enumerate(zip(losses[1:], unit_reference, strict=True), start=1):
        now.copy_(row)
        torch.sub(now, before, out=difference)
        squares.addcmul_(difference, difference)
        torch.index_select(unit_row, 0, groups, out=unit)
        products.addcmul_(difference, unit)
        before, now = now, before
        if len(found) < len(early) and early[len(found)][0] == count + 1:
            _, mean, norm = early[len(found)]
            total = before - first
            centred_products = (products - mean.index_select(0, groups).mul_(total)).div_(norm.index_select(0, groups))
            found.append(_quotient(centred_products, squares, total, count))
    return [*found, _quotient(products, squares, before - first, len(unit_reference))]


def _quotient(products: Tensor, squares: Tensor, total: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The correlations from sums over `count` differences, and which of them are in doubt."""
    centred = squares - total.square_().div_(count)
    values = (products / centred.sqrt()).clamp_(-1.0, 1.0)
    sure = (centred > _CANCELLED * squares) & (squares > torch.finfo(squares.dtype).tiny / FLAT) & values.isfinite()
    return values, ~sure


def _early_reference(unit_reference: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the first rows of a `unit_reference`, and their norm about it, both float64 `[C]`.

    With these, products with the reference of all rows give those with the reference of the first. The norm is NaN
    where subtracting the mean leaves almost nothing.
    """
    mean = unit_reference.mean(dim=0)
    squares = (unit_reference - mean).square().sum(dim=0)
    return mean, squares.where(squares > _CANCELLED * unit_reference.square().sum(dim=0), torch.nan).sqrt()


def _unit_columns(values: Tensor) -> Tensor:
    """Scales columns to mean 0 and norm 1. A column becomes NaN if it has a NaN or does not vary."""
    everywhere = torch.ones_like(values, dtype=torch.bool)
    return standardised(values, everywhere, everywhere.sum(dim=0))


def standardised(values: Tensor, logged: Tensor, count: Tensor) -> Tensor:
    """Scales columns to mean 0 and norm 1 over their logged entries. A column becomes NaN if these do not vary."""
    values = values.where(logged, 0.0)
    values = values / values.abs().amax(dim=0)  # so that squares neither overflow nor vanish
    values = (values - values.sum(dim=0) / count).where(logged, 0.0)
    norm = values.square().sum(dim=0).sqrt()
    return values / norm.where(norm > FLAT * count.sqrt(), torch.nan)
