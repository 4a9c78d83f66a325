"""How plausible the label of each training sample is: a comparison with validation samples of its class.

Validation samples show how rightly labelled samples of a class behave in the losses. Where training samples of the
class are denser than they are, on the side of poor scores, something is in the train set that is not in the validation
split: wrong labels, or samples of another kind. The ratio of the two densities is the share of the training samples
there that validation explains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_cld.functional.checks import distinct

ENOUGH = 100
"""A class with fewer validation samples than this is judged by a comparison of all samples of all classes."""

CLEAR = 2.5
"""A difference of the densities counts if it is larger than so many standard errors; chance alone makes small ones."""

_BINS = 20
_PER_BIN = 10
"""At most so many bins, and at least so many validation samples for each."""

_STEPS = (16, 8, 4, 2, 1)
"""The steps of a search among 31 edges, which is room for those of the bins."""

_SAMPLED = 2**21
"""The edges are those of about so many training samples; what lies between them is counted in all."""

_RESAMPLES = 100
_SEED = 0

_SLICE = 2**17


class Plausibility(NamedTuple):
    """What `plausibility` finds.

    Attributes:
        values: The plausibility of each training sample's label, in [0, 1], float32 `[N]`; NaN where a statistic is.
        shares: The share of each class that validation does not explain, in its three estimates: the best one, and the
            ends of the interval that holds 95 % of those from resampled validation samples; float64 `[3, C]`.
        share: The same for all samples together, float64 `[3]`.
    """

    values: Tensor
    shares: Tensor
    share: Tensor


def plausibility(
    train: Sequence[Tensor], val: Sequence[Tensor], train_groups: Tensor, val_groups: Tensor, classes: int
) -> Plausibility:
    """Compares statistics of training samples with those of validation samples of the same class.

    A statistic is a number for each sample, higher for better ones. For each statistic and class, training samples are
    divided into bins of equal count, and the ratio of densities, validation to train, is fitted by a curve that never
    falls (isotonic regression). Ratios above 1 count as 1. If the part of a class where the ratio is below 1 lacks
    fewer validation samples than `CLEAR` standard errors, chance explains it, and all ratios count as 1. The
    plausibility of a sample is the smaller of the ratios of its two statistics. Isotonic regression: R. Barlow et al.,
    "Statistical Inference under Order Restrictions", Wiley 1972; the ratio of densities as weight for training samples:
    H. Shimodaira, Journal of Statistical Planning and Inference, 2000.

    For a class with fewer than `ENOUGH` validation samples the ratios are those of all classes together.

    Args:
        train: Two statistics of the training samples, floating point, `[N]` each; NaN leaves a sample out.
        val: The same two of the validation samples, `[M]` each.
        train_groups: The number of each training sample's class, int64, `[N]`, in `range(classes)`.
        val_groups: The number of each validation sample's class, int64, `[M]`; -1 for other classes.
        classes: The number of classes, C.

    Example:
        >>> import torch
        >>> from lightning_cld.functional.plausibility import plausibility
        >>> right, wrong = torch.linspace(0.5, 1, 800), torch.linspace(-1, 0, 200)
        >>> train, val = torch.cat([right, wrong]), torch.linspace(0.5, 1, 100)
        >>> one_class = torch.zeros(1000, dtype=torch.int64), torch.zeros(100, dtype=torch.int64)
        >>> found = plausibility([train, train], [val, val], *one_class, classes=1)
        >>> found.values[:800].mean().round(decimals=2), found.values[800:].max()
        (tensor(1.), tensor(0.))
        >>> found.share[0].round(decimals=2)
        tensor(0.2000, dtype=torch.float64)
    """
    device = train_groups.device
    of_train = torch.stack([values.to(device).float() for values in train])
    of_val = torch.stack([values.to(device).float() for values in val])
    usable = (val_groups >= 0) & ~of_val.isnan().any(dim=0)
    of_val, val_groups = of_val[:, usable], val_groups[usable]
    enough = torch.bincount(val_groups, minlength=classes) >= ENOUGH
    of_class = _Comparison(of_train, of_val, train_groups, val_groups, classes)
    of_all = _Comparison(of_train, of_val, torch.zeros_like(train_groups), torch.zeros_like(val_groups), 1)
    counts = of_class.counts(train_groups, classes).where(enough[:, None], of_all.counts(train_groups, classes))

    def explained(chosen: Tensor | None) -> Tensor:
        """The plausibility of each class and bin, `[C, bins]`."""
        return of_class.ratios(chosen).where(enough[:, None], of_all.ratios(chosen))

    best = explained(None)
    resampled = torch.stack([(counts * (1 - explained(chosen))).sum(1) for chosen in _resamples(val_groups, classes)])
    lacking, totals = (counts * (1 - best)).sum(1), counts.sum(1)
    values = torch.empty(len(train_groups), dtype=torch.float32, device=device)
    for start in range(0, len(values), _SLICE):
        part = slice(start, start + _SLICE)
        group = train_groups[part]
        place = of_class.places[part].where(enough[group], of_all.places[part])
        known = ~of_train[:, part].isnan().any(dim=0)
        values[part] = best[group, place].float().where(known, torch.nan)
    of_each = _interval(lacking / totals, resampled / totals)
    return Plausibility(values, of_each, _interval(lacking.sum() / totals.sum(), resampled.sum(1) / totals.sum()))


class _Comparison:
    """The two statistics in bins, of the training and the validation samples of each group."""

    def __init__(self, train: Tensor, val: Tensor, train_groups: Tensor, val_groups: Tensor, count: int) -> None:
        self._count, self._val_groups = count, val_groups
        bins = (torch.bincount(val_groups, minlength=count) // _PER_BIN).clamp(2, _BINS)
        edges = [_edges(values, train_groups, bins) for values in train]
        self.places = _joint_bins(train, train_groups, edges)
        self._val_bins = [_bins(values, val_groups, edge) for values, edge in zip(val, edges, strict=True)]
        self._known = ~train.isnan().any(dim=0)
        joint = self.counts(train_groups, count).view(count, _BINS, _BINS)
        self._of_train = joint.sum(2), joint.sum(1)

    def counts(self, groups: Tensor, count: int) -> Tensor:
        """The number of training samples of each group in each pair of bins, float64 `[count, _BINS ** 2]`."""
        flat = torch.zeros(count * _BINS**2, dtype=torch.float64, device=groups.device)
        for start in range(0, len(groups), _SLICE):
            part = slice(start, start + _SLICE)
            keys = (groups[part] * _BINS**2 + self.places[part])[self._known[part]]
            flat.index_add_(0, keys, torch.ones(len(keys), dtype=torch.float64, device=flat.device))
        return flat.view(count, _BINS**2)

    def ratios(self, chosen: Tensor | None) -> Tensor:
        """The smaller ratio of both statistics for each pair of bins, float64 `[count, _BINS ** 2]`.

        Args:
            chosen: The validation samples of a resample. None takes all of them, and only differences that are clear.
        """
        both = []
        for of_val, of_train in zip(self._val_bins, self._of_train, strict=True):
            keys = self._val_groups * _BINS + of_val
            keys = keys if chosen is None else keys[chosen]
            found = torch.bincount(keys, minlength=self._count * _BINS).view(-1, _BINS).double()
            ratios = _rising_ratios(found, of_train).clamp(max=1.0)
            both.append(ratios if chosen is not None else ratios.where(_is_clear(ratios, found, of_train), 1.0))
        return torch.minimum(both[0][:, :, None], both[1][:, None, :]).flatten(1)


def _edges(values: Tensor, groups: Tensor, bins: Tensor) -> Tensor:
    """The lower edges of all bins but the first of each group, float32 `[C, 31]`, infinite where there are fewer."""
    some = slice(None, None, max(1, len(values) // _SAMPLED))
    values, groups = values[some], groups[some]
    known = ~values.isnan()
    values, groups = values[known], groups[known]
    order = torch.argsort(values)
    order = order[torch.argsort(groups[order], stable=True)]
    sizes = torch.bincount(groups, minlength=len(bins))
    number = torch.arange(1, 2 * _STEPS[0], device=values.device)
    place = (sizes[:, None] * number).div(bins[:, None], rounding_mode="floor")
    inside = (number < bins[:, None]) & (sizes[:, None] > 0)
    place = ((sizes.cumsum(0) - sizes)[:, None] + place).where(inside, 0)
    if not len(values):
        return torch.full(place.shape, torch.inf, device=values.device)
    return values[order[place]].where(inside, torch.inf)


def _bins(values: Tensor, groups: Tensor, edges: Tensor) -> Tensor:
    """The number of the bin of each value, int64 `[N]`; 0 for NaN."""
    found = torch.zeros_like(groups)
    flat = edges.flatten()
    for step in _STEPS:
        found += step * (values >= flat[groups * edges.shape[1] + found + step - 1])
    return found


def _joint_bins(values: Tensor, groups: Tensor, edges: Sequence[Tensor]) -> Tensor:
    """The number of the pair of bins of each sample, int64 `[N]`, in `range(_BINS ** 2)`."""
    places = torch.empty_like(groups)
    for start in range(0, len(groups), _SLICE):
        part = slice(start, start + _SLICE)
        first, second = (_bins(values[s, part], groups[part], edges[s]) for s in (0, 1))
        places[part] = first * _BINS + second
    return places


def _rising_ratios(of_val: Tensor, of_train: Tensor) -> Tensor:
    """The ratio of densities in each bin, validation to train, by isotonic regression, float64 `[C, bins]`.

    The value in bin k is the largest over i <= k of the smallest over j >= k of the ratio in the bins i to j together.
    """
    ends = torch.nn.functional.pad(torch.stack([of_val, of_train]).cumsum(2), (1, 0))  # [2, C, bins + 1]
    val, train = ends[:, :, None, 1:] - ends[:, :, :-1, None]  # [C, i, j]
    size, train_size = of_val.sum(1)[:, None, None], of_train.sum(1)[:, None, None]
    ratio = (val / size) / (train / train_size)
    ratio = ratio.where(train > 0, torch.inf)  # without training samples: in no sample's value
    smallest = ratio.flip(2).cummin(dim=2).values.flip(2)  # over the bins j from k on
    upper = torch.ones(of_val.shape[1], of_val.shape[1], dtype=torch.bool, device=of_val.device).triu()
    rising: Tensor = smallest.where(upper, -torch.inf).amax(dim=1)
    return rising


def _is_clear(ratios: Tensor, of_val: Tensor, of_train: Tensor) -> Tensor:
    """Whether the bins with a ratio below 1 lack clearly more validation samples than by chance, bool `[C, 1]`."""
    low = (ratios < 1).double()
    share = (of_train * low).sum(1, keepdim=True) / of_train.sum(1, keepdim=True)
    size = of_val.sum(1, keepdim=True)
    lacking = size * share - (of_val * low).sum(1, keepdim=True)
    return (lacking > CLEAR * (size * share * (1 - share)).sqrt()) & (share < 1)


def _resamples(groups: Tensor, count: int) -> Iterator[Tensor]:
    """Draws of as many samples of each group as there are, with replacement, int64 `[M]`, always the same ones."""
    order = torch.argsort(groups, stable=True)
    sizes = torch.bincount(groups, minlength=count)
    size, start = (part[groups[order]] for part in (sizes, sizes.cumsum(0) - sizes))
    generator = torch.Generator().manual_seed(_SEED)
    for _ in range(_RESAMPLES):
        draw = torch.rand(len(order), generator=generator, dtype=torch.float64).to(groups.device)
        yield order[start + (draw * size).long()]


def _interval(best: Tensor, resampled: Tensor) -> Tensor:
    """The estimate and the ends of the interval that holds 95 % of those from resamples, `[3, ...]`."""
    ends = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64, device=best.device), dim=0)
    return torch.stack([best, torch.minimum(ends[0], best), torch.maximum(ends[1], best)])


def judged(
    scores: tuple[Tensor, Tensor], confidence: tuple[Tensor, Tensor], classes: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, dict[str, Any]]:
    """The plausibility of all samples, and the shares of implausible labels as plain JSON values.

    Args:
        scores: CLD of the training samples, `[N]`, and of the held-out validation samples, `[M]`.
        confidence: The early confidence of both.
        classes: The classes of both, int64; negative for positions that are not in use; None for one class.

    Returns:
        Float32 `[N]`, on the CPU, NaN where a sample is unscored or not in use; and the `share` of all samples and of
        each of the `classes` whose label is implausible: an estimate and the ends of its interval.
    """
    train, val = (
        torch.zeros(len(s), dtype=torch.int64) if c is None else c.cpu() for s, c in zip(scores, classes, strict=True)
    )
    used = torch.nonzero(train >= 0).flatten()
    labels, groups = distinct(train[used])
    of_val = torch.searchsorted(labels, val).clamp(max=len(labels) - 1)
    of_val = of_val.where(labels[of_val] == val, -1)
    statistics = [[part.cpu() for part in both] for both in (scores, confidence)]
    found = plausibility([s[0][used] for s in statistics], [s[1] for s in statistics], groups, of_val, len(labels))
    values = torch.full((len(train),), torch.nan, dtype=torch.float32)
    values[used] = found.values
    shares = {str(label): _rounded(share) for label, share in zip(labels.tolist(), found.shares.T, strict=True)}
    return values, {"share": _rounded(found.share), "classes": shares}


def _rounded(shares: Tensor) -> list[float] | None:
    return None if shares.isnan().any() else [round(share, 4) for share in shares.tolist()]
