"""CLD and its diagnostics from moments instead of losses: constant memory, updated with one checkpoint at a time.

`update` is the co-moment form of Welford's algorithm (B. P. Welford, "Note on a Method for Calculating Corrected Sums
of Squares and Products", Technometrics 1962; for co-moments P. Pébay, "Formulas for Robust, One-Pass Parallel
Computation of Covariances and Arbitrary-Order Statistical Moments", Sandia report SAND2008-6212). `D` is the loss
difference of a sample, `R` the reference of its class, and means are over the `n` differences so far:

    M2' = M2 + n/(n+1) (D - mean D)^2        C' = C + n/(n+1) (D - mean D) (R - mean R)

The score is `C / sqrt(M2(D) M2(R))`. Every sum is computed in float64. The state kept between checkpoints is rounded;
after a thousand roundings the scores are still within 1e-5 of a float64 reference:

- The mean of `D` is not kept. Differences telescope: their sum is the newest loss minus the first, and both are exact
  in float32.
- `sqrt(M2)` is kept as a float32 and a bfloat16 remainder: 32 bits, relative error below 2^-32. Unlike `M2`, it has
  the range of the losses themselves.
- `C` is kept as the correlation so far, a fixed-point int32, absolute error below 2^-31.

The norms never shrink, so neither error grows.

The state also holds what plausibility and `reference_reliability` need; `confidence.py`, `held_out.py` and `halves.py`
update it. These are empty tensors where they are not kept: in states of earlier versions, and where only scores are
wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_cld.functional.checks import MIN_CHECKPOINTS, check_checkpoints, check_differences, divergence_message
from lightning_cld.functional.cld import FLAT, class_reference
from lightning_cld.functional.confidence import least_rows, mean_loss, with_row
from lightning_cld.functional.diagnostics import by_label
from lightning_cld.functional.halves import no_halves, reliability, with_difference
from lightning_cld.functional.held_out import no_moments, scores_from
from lightning_cld.functional.held_out import with_difference as with_held_out
from lightning_cld.functional.plausibility import judged

_SLICE = 2**15
"""Samples processed at a time: about ten float64 temporaries of 256 KiB, which stay in the CPU cache."""

_ONE = 2**31 - 1
"""The correlation 1 in fixed point."""


_NOT_KEPT, _NO_ROWS = torch.empty(0, device="cpu"), torch.tensor(0, device="cpu")
_HIGHEST = torch.tensor(torch.inf, dtype=torch.float64, device="cpu")
"""What a state of an earlier version lacks."""


class Classes(NamedTuple):
    """The classes of the samples: each sample is scored against the reference of its class.

    Attributes:
        labels: The classes of the training samples, int64 `[C]`, sorted.
        groups: The index of each training sample's class in `labels`, int16 (int32 for over 32,767 classes) `[N]`; -1
            for positions that are not in use.
        val_classes: Classes of the validation samples, int64 `[M]`.
    """

    labels: Tensor
    groups: Tensor
    val_classes: Tensor

    @classmethod
    def of(cls, train_classes: Tensor, val_classes: Tensor) -> Classes:
        """Builds them from int64 classes; negative classes mark positions that are not in use."""
        labels = torch.unique(train_classes[train_classes >= 0])
        groups = torch.searchsorted(labels, train_classes).masked_fill(train_classes < 0, -1)
        small = len(labels) <= torch.iinfo(torch.int16).max
        return cls(labels, groups.to(torch.int16 if small else torch.int32), val_classes)

    def to(self, device: torch.device | str) -> Classes:
        """Returns these tensors on `device`."""
        return Classes(*(tensor.to(device) for tensor in self))


class Moments(NamedTuple):
    """The state after the checkpoints so far: 34 bytes per training sample, 44 per validation sample, 512 per class.

    Attributes:
        last: The newest loss, float32 `[N]`. A loss that is not finite leaves `first` or `norm` not finite for good.
        first: The newest loss minus the sum of all differences, float32 `[N]`: exactly the first loss, until a missing
            row moves it.
        norm: `sqrt(M2)` of the differences, float32 `[N]`.
        norm_rest: The part of `sqrt(M2)` that float32 can't hold, bfloat16 `[N]`.
        correlation: The correlation so far, int32 `[N]`, in units of 1 / (2^31 - 1).
        val_last: The newest validation losses, float32 `[M]`; NaN after a missing row.
        reference_sum: Sum of each class's reference differences, float64 `[C]`.
        reference_norm: `sqrt(M2)` of each class's reference differences, float64 `[C]`.
        differences: The number of reference differences of each class, int64 `[C]`.
        diverged: The first row in which a class's validation losses were not finite, int64 `[C]`; -1 if there is none.
        rows: The number of rows, int64 `[]`.
        hole: Whether the newest row is missing, so that the next row gives no difference, bool `[]`.
        confidence: The mean of `exp(-loss)` so far, float32 `[N + M]`, validation samples last; `[0]` if not kept.
        confidence_rows: The number of rows it was computed from, int64 `[]`: neither theta_0 nor missing ones.
        halves: Moments of the references of the validation samples' halves, float64 `[6, SPLITS, C]`; `[0]` if they are
            not kept.
        early: The confidence at the row with the lowest mean validation loss so far, float32 `[N + M]`; `[0]` if not
            kept.
        lowest: That mean, over the samples of classes that are trained on, float64 `[]`.
        held_out: Moments of the validation samples' own differences, float64 `[3, M]`; `[0]` if not kept.
        early_rows: The number of rows that `early` was computed from, int64 `[]`.
        marks: The confidence at the latest two numbers of rows that are powers of two, float32 `[2, N + M]`.
    """

    last: Tensor
    first: Tensor
    norm: Tensor
    norm_rest: Tensor
    correlation: Tensor
    val_last: Tensor
    reference_sum: Tensor
    reference_norm: Tensor
    differences: Tensor
    diverged: Tensor
    rows: Tensor
    hole: Tensor
    confidence: Tensor = _NOT_KEPT
    confidence_rows: Tensor = _NO_ROWS
    halves: Tensor = _NOT_KEPT  # pickles of an earlier version hold these 15 in this order, and then no `early`
    early: Tensor = _NOT_KEPT
    lowest: Tensor = _HIGHEST
    held_out: Tensor = _NOT_KEPT
    early_rows: Tensor = _NO_ROWS
    marks: Tensor = _NOT_KEPT

    @classmethod
    def empty(
        cls,
        samples: int,
        references: int,
        classes: int,
        device: torch.device | str | None = None,
        *,
        scores_only: bool = False,
    ) -> Moments:
        """The state before the first row, with `scores_only` without what only diagnostics need."""

        def zeros(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        return cls(
            last=zeros(samples, torch.float32),
            first=zeros(samples, torch.float32),
            norm=zeros(samples, torch.float32),
            norm_rest=zeros(samples, torch.bfloat16),
            correlation=zeros(samples, torch.int32),
            val_last=zeros(references, torch.float32) + torch.nan,
            reference_sum=zeros(classes, torch.float64),
            reference_norm=zeros(classes, torch.float64),
            differences=zeros(classes, torch.int64),
            diverged=zeros(classes, torch.int64) - 1,
            rows=torch.tensor(0, device=device),
            hole=torch.tensor(True, device=device),
            confidence=zeros(0 if scores_only else samples + references, torch.float32),
            confidence_rows=torch.tensor(0, device=device),
            early=zeros(0 if scores_only else samples + references, torch.float32) + torch.nan,
            lowest=torch.tensor(torch.inf, dtype=torch.float64, device=device),
            held_out=zeros(0, torch.float64) if scores_only else no_moments(references, device),
            early_rows=torch.tensor(0, device=device),
            marks=torch.zeros(2, 0 if scores_only else samples + references, device=device),
            halves=zeros(0, torch.float64) if scores_only else no_halves(classes, device),
        )

    def to(self, device: torch.device | str) -> Moments:
        """Returns these tensors on `device`."""
        return Moments(*(tensor.to(device) for tensor in self))


def skip(moments: Moments) -> Moments:
    """Returns the moments after a checkpoint that was not logged. No difference spans it."""
    return moments._replace(
        val_last=torch.full_like(moments.val_last, torch.nan),
        rows=moments.rows + 1,
        hole=torch.ones_like(moments.hole),
    )


def update(moments: Moments, train_row: Tensor, val_row: Tensor, classes: Classes, *, theta_0: bool = False) -> Moments:
    """Returns the moments after one more checkpoint. `moments` is not changed, so an interruption does no damage.

    A row of NaN only is a checkpoint that was not logged: the differences on both sides of it are left out. If only
    some samples of a row are NaN, these are unscored from then on, like samples with an infinite loss: the moments of
    their class would cover checkpoints that these samples lack.

    Args:
        moments: The moments so far.
        train_row: Losses of the training samples, floating point `[N]`, taken as float32.
        val_row: Losses of the validation samples, floating point `[M]`, taken as float32.
        classes: The classes, on the device of the moments.
        theta_0: Whether the losses are those before the first step, which the confidence leaves out.
    """
    device = moments.last.device
    train_row, val_row = (row.detach().to(device, torch.float32) for row in (train_row, val_row))
    moments = _note_divergence(moments, val_row, classes)
    if moments.halves.numel():
        halves = with_difference(moments.halves, moments.val_last, val_row, classes.val_classes, classes.labels)
        moments = moments._replace(halves=halves)
    if train_row.isnan().all():
        return skip(moments)._replace(val_last=val_row.clone())
    of_val, wanted = _val_groups(classes)
    if moments.early.numel() and not theta_0 and not val_row.isnan().all():
        confidence = with_row(moments.confidence, moments.confidence_rows, torch.cat([train_row, val_row]))
        lowest, rows = mean_loss(val_row.where(wanted, torch.nan)), moments.confidence_rows + 1
        is_lowest = (lowest < moments.lowest) | (rows == 1)
        moments = moments._replace(
            confidence=confidence,
            confidence_rows=rows,
            early=confidence.where(is_lowest, moments.early),
            lowest=torch.minimum(lowest, moments.lowest),
            early_rows=rows.where(is_lowest, moments.early_rows),
            # `least_rows` is the power of two before the latest one.
            marks=torch.stack([moments.marks[1], confidence]).where((rows & (rows - 1)) == 0, moments.marks),
        )

    difference = class_reference(torch.stack([moments.val_last, val_row]), classes.val_classes, classes.labels)[0]
    counted = difference.isfinite() & ~moments.hole
    weight = moments.differences.double() / (moments.differences + 1)
    offset = (difference - moments.reference_sum / moments.differences.clamp(min=1)).where(counted, 0.0)
    reference_norm = (moments.reference_norm.square() + weight * offset.square()).sqrt()

    held_out = moments.held_out
    if held_out.numel():
        held_out = with_held_out(
            held_out,
            val_row.double() - moments.val_last.double(),
            offset[of_val],
            moments.differences[of_val],
            counted[of_val] & wanted,
        )
    updated = moments._replace(
        held_out=held_out,
        last=train_row.clone(),  # the caller may overwrite its tensor
        first=torch.empty_like(moments.first),
        norm=torch.empty_like(moments.norm),
        norm_rest=torch.empty_like(moments.norm_rest),
        correlation=torch.empty_like(moments.correlation),
        val_last=val_row.clone(),
        reference_sum=moments.reference_sum + difference.where(counted, 0.0),
        reference_norm=reference_norm,
        differences=moments.differences + counted,
        rows=moments.rows + 1,
        hole=torch.zeros_like(moments.hole),
    )
    for start in range(0, len(train_row), _SLICE):
        part = slice(start, start + _SLICE)
        group = classes.groups[part].long().clamp(min=0)  # positions not in use are never scored: any class will do
        row, last, first = (losses[part].double() for losses in (train_row, moments.last, moments.first))
        total = last - first
        old_norm = _norm(moments, part)
        own_offset = row - last - total / moments.differences[group].clamp(min=1)
        norm = (old_norm.square() + weight[group] * own_offset.square()).sqrt()
        product = _correlation(moments, part) * old_norm * moments.reference_norm[group]
        product = product + weight[group] * own_offset * offset[group]
        correlation = (product / (norm * reference_norm[group])).nan_to_num(0.0).clamp(-1.0, 1.0)

        counts = counted[group]
        norm = norm.where(counts, old_norm)
        updated.first[part] = first.where(counts, row - total)
        updated.norm[part] = norm
        updated.norm_rest[part] = (norm - updated.norm[part].double()).bfloat16()
        updated.correlation[part] = torch.where(counts, (correlation * _ONE).round().int(), moments.correlation[part])
    return updated


def scores(moments: Moments, classes: Classes, checkpoints: Sequence[str] | None = None) -> Tensor:
    """The scores of the checkpoints so far, within 1e-5 of those of `cld_scores`.

    Args:
        moments: The moments so far.
        classes: The classes, on the device of the moments.
        checkpoints: The name of each row in messages; None numbers the rows.

    Returns:
        Scores in [-1, 1], float32 `[N]`, on the device of the moments; NaN where a sample is unscored.

    Raises:
        ValueError: If there are fewer than 4 checkpoints or 3 usable differences, or a validation loss was not finite.
    """
    check_checkpoints(int(moments.rows))
    diverged = moments.diverged[moments.diverged >= 0]
    if len(diverged):
        row = int(diverged.min())
        named = f"row {row}" if checkpoints is None else checkpoints[row]
        raise ValueError(
            f"{divergence_message(classes.labels[moments.diverged == row].tolist(), named)} Losses are not kept, so "
            "earlier checkpoints can't be scored either: train the proxy with a lower learning rate, or for fewer "
            "epochs."
        )
    check_differences(int(moments.differences.max()))

    count = moments.differences
    enough = count >= MIN_CHECKPOINTS - 1
    enough &= moments.reference_norm > FLAT * count.sqrt() * (moments.reference_sum / count).abs()
    values = torch.empty_like(moments.last)
    for start in range(0, len(values), _SLICE):
        part = slice(start, start + _SLICE)
        group = classes.groups[part].long().clamp(min=0)
        mean = (moments.last[part].double() - moments.first[part].double()) / count[group]
        varies = _norm(moments, part) > FLAT * count[group].sqrt() * mean.abs()  # False where either side is NaN
        defined = varies & enough[group] & (classes.groups[part] >= 0)
        values[part] = _correlation(moments, part).where(defined, torch.nan)
    return values


def judged_by(moments: Moments, classes: Classes, values: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
    """The early confidence and the plausibility of the training samples, and the shares of implausible labels.

    None if the moments for them were not kept. A sample with a loss that was NaN in a row that others have is NaN,
    because it is unscored as well.

    Args:
        moments: The moments so far.
        classes: The classes.
        values: The scores.
    """
    if not moments.early.numel():
        return None
    of_val, wanted = _val_groups(classes)
    sizes = torch.bincount(of_val[wanted], minlength=len(classes.labels)).double()
    held_out = scores_from(
        moments.held_out, moments.reference_norm[of_val], sizes[of_val], moments.differences[of_val]
    ).where(wanted, torch.nan)
    confidence = early_confidence_of(moments)
    train, val = confidence[: len(moments.last)], confidence[len(moments.last) :]
    groups = classes.groups.long()
    of_train = classes.labels[groups.clamp(min=0)].where(groups >= 0, groups)
    plausible, shares = judged((values, held_out), (train, val), (of_train, classes.val_classes))
    return train.cpu(), plausible, shares


def early_confidence_of(moments: Moments) -> Tensor:
    """`early_confidence` of the checkpoints so far, within 1e-5, float32 `[N + M]`, validation samples last."""
    enough = int(moments.early_rows) >= least_rows(int(moments.confidence_rows))
    return moments.early if enough else moments.marks[0]


def _val_groups(classes: Classes) -> tuple[Tensor, Tensor]:
    """The index of each validation sample's class in `labels`, and whether it is one of them."""
    groups = torch.searchsorted(classes.labels, classes.val_classes.contiguous()).clamp(max=len(classes.labels) - 1)
    return groups, classes.labels[groups] == classes.val_classes


def reliability_by_class(moments: Moments, classes: Classes) -> dict[str, float | None] | None:
    """What `diagnostics.reliability_by_class` gives for the losses so far; None if the moments for it were not kept."""
    return by_label(classes.labels, reliability(moments.halves)) if moments.halves.numel() else None


def _note_divergence(moments: Moments, val_row: Tensor, classes: Classes) -> Moments:
    now = torch.isin(classes.labels, classes.val_classes[val_row.isinf()])
    return moments._replace(diverged=moments.diverged.where(~now | (moments.diverged >= 0), moments.rows))


def _norm(moments: Moments, part: slice) -> Tensor:
    return moments.norm[part].double() + moments.norm_rest[part].double()


def _correlation(moments: Moments, part: slice) -> Tensor:
    return moments.correlation[part].double() / _ONE
