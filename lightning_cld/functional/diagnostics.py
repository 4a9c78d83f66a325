"""Pure tensor functions that judge how reliable scores are: alignment, reference reliability, agreement of rankings.

The error bound of the paper (Nagaraj et al., TMLR 2025) is small if the chosen samples are well aligned with the
validation samples (its kappa) and the validation samples represent the data (its delta). `alignment` relates to
kappa, `reference_reliability` to delta. Neither computes the bound, which needs gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cld.functional.arrays import IntegersLike
from lightning_cld.functional.checks import MIN_CHECKPOINTS, as_classes, distinct, labels_in
from lightning_cld.functional.cld import reference_of_groups, standardised
from lightning_cld.functional.selection import select_top

SHARE = 0.1
"""The share of the train set that compared coresets keep. Small coresets change most: once this one has settled,
larger ones have too."""

OVERLAP = 0.85
"""The share of its samples that a settled coreset has in common with the coreset at half the epochs. On
scikit-learn's digits (30 epochs, five seeds) it settled after 12 to 16 epochs, and then shared at least 96 % of its
samples with the coreset of all 30 epochs. With 20 % of the labels wrong the overlap stayed below 0.75 to the end, and
rightly so: the coreset at half the epochs shared no more than that with the last one."""

RELIABLE = 0.9
"""The reliability (see `reference_reliability`) that a class reference should have. We compared scores with those from
all validation samples, on Fashion-MNIST and digits (8 and 15 epochs, 4 to 64 validation samples per class). Above this
value, the rank correlation within the class was 0.9 and the best tenths overlapped by 0.6. Below it, 0.8 and 0.4, and
less the lower the reliability."""

SPLITS = 10
"""Random splits to average a reliability over. For a small class, a single split depends too much on the draw."""

_REFERENCES = 2**21
"""Losses of references that are made at a time: splits are computed together if that is not too many."""

_CHANCE_DRAWS = 10_000


class Alignment(NamedTuple):
    """Mean scores of a coreset and of all samples, without the unscored ones.

    Attributes:
        kept: Mean score of the coreset.
        everything: Mean score of all samples.
        classes: The classes, int64 `[C]`, sorted.
        kept_of_class: Mean score of each class in the coreset, float64 `[C]`; NaN if the coreset has no sample of it.
        everything_of_class: Mean score of each class, float64 `[C]`.
    """

    kept: float
    everything: float
    classes: Tensor
    kept_of_class: Tensor
    everything_of_class: Tensor


def best_tenth(values: Tensor, classes: IntegersLike | None) -> Tensor:
    """Chooses the best-scored tenth, the coreset that settling and alignment are judged by.

    Args:
        values: Scores, floating point, `[N]`.
        classes: Classes, integer, `[N]`, negative for positions that are not in use; None for one class.

    Returns:
        Sorted positions, int64, on the device of `values`.

    Raises:
        ValueError: If a tenth is less than one sample, or a class has too few scored samples.
    """
    of_sample = None if classes is None else as_classes(classes, "classes").to(values.device)
    used = torch.arange(len(values)) if of_sample is None else torch.nonzero(of_sample >= 0).flatten()
    used = used.to(values.device)
    try:
        return used[select_top(values[used], None if of_sample is None else of_sample[used], fraction=SHARE)]
    except ValueError:  # which gives advice for budgets of the user's own
        raise ValueError("too few samples are scored for a tenth, in a class or overall") from None


def overlap(chosen: Tensor, others: Tensor) -> float:
    """The share of the positions in `chosen` that are also in `others`."""
    marked = torch.zeros(int(max(chosen.max(), others.max())) + 1, dtype=torch.bool, device=chosen.device)
    marked[others.long()] = True
    return float(marked[chosen.long()].float().mean())


def half_of(epochs: Iterable[int], epoch: int) -> int | None:
    """The latest of `epochs` that is at most half of `epoch`; None if there is none."""
    return max((earlier for earlier in epochs if 2 * earlier <= epoch), default=None)


def alignment(values: Tensor, classes: IntegersLike | None) -> Alignment:
    """The mean score of the best tenth and of all samples, overall and per class.

    Args:
        values: Scores, floating point, `[N]`; NaN where a sample is unscored.
        classes: As for `best_tenth`.

    Raises:
        ValueError: As `best_tenth`.

    Example:
        >>> import torch
        >>> from lightning_cld.functional.diagnostics import alignment
        >>> means = alignment(torch.linspace(-0.8, 1.0, 10), None)
        >>> round(means.kept, 2), round(means.everything, 2)
        (1.0, 0.1)
    """
    chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    chosen[best_tenth(values, classes)] = True
    of_sample = _of_each(classes, values)
    counted = (of_sample >= 0) & ~values.isnan()
    labels, groups = distinct(of_sample[counted])
    scored, chosen = values[counted].double(), chosen[counted]
    return Alignment(
        float(scored[chosen].mean()),
        float(scored.mean()),
        labels,
        _means(scored[chosen], groups[chosen], len(labels)),
        _means(scored, groups, len(labels)),
    )


def chance_alignment(differences: int) -> float:
    """The mean score that the best tenth of many samples would have if all losses were unrelated to their references.

    With few differences, high correlations arise by chance: the best tenth has a mean of 0.98 with 3 differences, and
    of 0.47 with 15. The value is simulated for independent, normal differences. The correlation of two such vectors is
    distributed like one coordinate of a random unit vector in a space of one dimension less.

    Args:
        differences: The number of differences between consecutive checkpoints; at least 2.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(_CHANCE_DRAWS, differences - 1, generator=generator, dtype=torch.float64)
    correlations = directions[:, 0] / directions.norm(dim=1)
    return float(correlations.topk(int(SHARE * _CHANCE_DRAWS)).values.mean())


def reference_reliability(val_losses: Tensor, val_classes: Tensor, classes: Tensor) -> Tensor:
    """How similar each class reference would be with other validation samples: its split-half reliability.

    The validation samples of a class are split at random into two halves (fixed seeds). The references of the two
    halves are correlated over the checkpoints (Pearson), and the result is averaged over ten splits. It is slightly
    pessimistic, because scores use the reference of both halves together.

    Args:
        val_losses: Losses of the validation samples, floating point, `[T, M]`; NaN where one was not logged.
        val_classes: Classes of the validation samples, int64, `[M]`.
        classes: The classes to report, sorted, int64, `[C]`.

    Returns:
        Correlations, float64, `[C]`, on the device of `val_losses`; NaN for a class with fewer than two samples or too
        few differences, or with losses that don't change or are not finite.

    Example:
        >>> import torch
        >>> from lightning_cld.functional.diagnostics import reference_reliability
        >>> falling = torch.tensor([2.0, 1.0, 0.7, 0.6, 0.4])[:, None]
        >>> losses = torch.cat([falling, falling / 2, falling, 3 - falling], dim=1)
        >>> reference_reliability(losses, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1])).float()
        tensor([ 1., -1.])
    """
    device = torch.device("cpu") if val_losses.device.type == "mps" else val_losses.device
    wanted = torch.isin(val_classes, classes)
    losses = val_losses[:, wanted.to(val_losses.device)].to(device)
    groups = torch.searchsorted(classes, val_classes[wanted])
    halves = split_in_halves(groups, len(classes))
    correlations = []
    together = max(1, _REFERENCES // max(1, 2 * len(classes) * len(losses)))
    for start in range(0, SPLITS, together):
        some = halves[start : start + together].to(device)
        shifts = 2 * len(classes) * torch.arange(len(some), device=device)[:, None]
        references = reference_of_groups(losses, some + shifts, 2 * len(classes) * len(some))
        correlations.append(_correlations(references[:, 0::2], references[:, 1::2]).view(len(some), len(classes)))
    return torch.cat(correlations).nanmean(dim=0)


def split_in_halves(groups: Tensor, classes: int) -> Tensor:
    """Splits the samples of each class at random into two halves, `SPLITS` times, from fixed seeds.

    Args:
        groups: The index of each sample's class, int64, `[M]`.
        classes: The number of classes.

    Returns:
        For each split and sample twice the index of its class, plus 0 or 1 for the half; int64, `[SPLITS, M]`, on the
        CPU.
    """
    groups = groups.cpu()
    seeds = [torch.Generator().manual_seed(split) for split in range(SPLITS)]
    order = torch.stack([torch.randperm(len(groups), generator=seed) for seed in seeds])
    order = order.gather(1, torch.argsort(groups[order], dim=1, stable=True))
    sizes = torch.bincount(groups, minlength=classes)
    rank = torch.arange(len(groups)) - (sizes.cumsum(0) - sizes)[groups[order]]
    return torch.empty_like(order).scatter_(1, order, 2 * groups[order] + rank % 2)


def reliability_by_class(
    val_losses: Tensor, val_classes: Tensor | None, train_classes: Tensor | None
) -> dict[str, float | None]:
    """`reference_reliability` of each class that is trained on, by its label; None where it is not known.

    Args:
        val_losses: Losses of the validation samples, floating point, `[T, M]`.
        val_classes: Their classes, int64, `[M]`; None for one class, which is class 0.
        train_classes: Classes of the training samples, int64, `[N]`, negative for positions that are not in use; None
            for one class.
    """
    references = torch.zeros(val_losses.shape[1], dtype=torch.int64) if val_classes is None else val_classes
    labels = torch.zeros(1, dtype=torch.int64)
    if train_classes is not None:
        labels = labels_in(train_classes[train_classes >= 0])
    return by_label(labels, reference_reliability(val_losses, references, labels))


def by_label(labels: Tensor, values: Tensor) -> dict[str, float | None]:
    """The values by the labels of their classes, as plain JSON values rounded to four places; None for NaN."""
    return {
        str(label): None if math.isnan(value) else round(value, 4)
        for label, value in zip(labels.tolist(), values.tolist(), strict=True)
    }


def rank_agreement(values: Tensor, others: Tensor, classes: IntegersLike | None) -> float:
    """Spearman's rank correlation of two scorings within each class, averaged over the classes.

    Classes are kept apart because samples are ranked within their class. A sample that is unscored in either scoring is
    left out. Equal scores share the mean of their ranks.

    Args:
        values: Scores in [-1, 1], float32, `[N]`.
        others: Other scores of the same samples, on the same device.
        classes: As for `best_tenth`.

    Returns:
        The mean of the class correlations, weighted by class size; NaN if no class has one.

    Example:
        >>> import torch
        >>> from lightning_cld.functional.diagnostics import rank_agreement
        >>> rank_agreement(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.7, 0.8]), None)
        1.0
    """
    of_sample = _of_each(classes, values)
    counted = (of_sample >= 0) & ~values.isnan() & ~others.isnan()
    if not counted.any():
        return float("nan")
    _, groups = distinct(of_sample[counted])
    sizes = torch.bincount(groups)
    ranks = [_ranks(scores[counted], groups) for scores in (values, others)]
    centred = [rank - _means(rank, groups, len(sizes))[groups] for rank in ranks]
    spreads = [_means(rank.square(), groups, len(sizes)) for rank in centred]
    correlations = _means(centred[0] * centred[1], groups, len(sizes)) / (spreads[0] * spreads[1]).sqrt()
    defined = ~correlations.isnan()
    return float((correlations[defined] * sizes[defined]).sum() / sizes[defined].sum())


def _of_each(classes: IntegersLike | None, values: Tensor) -> Tensor:
    """The class of each sample, int64, on the device of `values`; 0 for one class."""
    if classes is None:
        classes = torch.zeros(len(values), dtype=torch.int64)
    return as_classes(classes, "classes").to(values.device)


def _ranks(scores: Tensor, groups: Tensor) -> Tensor:
    """Ranks by class, then by score, float64; equal scores share the mean of their ranks."""
    order = torch.argsort(scores, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    scores, groups = scores[order], groups[order]
    begins = torch.ones_like(groups, dtype=torch.bool)
    begins[1:] = (scores[1:] != scores[:-1]) | (groups[1:] != groups[:-1])
    run = begins.cumsum(0) - 1  # the number of each sample's run of equal scores
    counts = torch.bincount(run)
    ranks = torch.empty(len(order), dtype=torch.float64, device=scores.device)
    ranks[order] = (counts.cumsum(0) - (counts - 1) / 2).double()[run]
    return ranks


def _means(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """The mean of each group, float64 `[count]`; NaN for an empty group."""
    sums = torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, groups, values.double())
    return sums / torch.bincount(groups, minlength=count)


def _correlations(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of each column of `a` with that column of `b`, both `[T, C]`, over rows without NaN."""
    logged = ~(a.isnan() | b.isnan())
    count = logged.sum(dim=0)
    values = (standardised(a, logged, count) * standardised(b, logged, count)).sum(dim=0).clamp(-1.0, 1.0)
    return values.where(count >= MIN_CHECKPOINTS - 1, torch.nan)
