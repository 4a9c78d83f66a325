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
"""A difference of the densities counts if it is larger than so many standard errors; chance alone makes small ones.

Each class is tested by itself, and of many classes chance makes larger ones in some. See `_least_errors`."""

_CHOSEN_BINS = 10
"""Chance exceeds a number of standard errors so many times as often as a normal distribution does, because isotonic
regression chooses the bins: 5 to 14 times at 2.5 to 3.5, on random numbers, 100 to 500 validation samples a class."""

_FEW_CLASSES = 20
_FALSE = 0.25
"""Of the classes that differ clearly no more may do so by chance than this share, or than in so many classes."""

_BINS = 20
_PER_BIN = 10
"""At most so many bins, and at least so many validation samples for each."""

_STEPS = (16, 8, 4, 2, 1)
"""The steps of a search among 31 edges, which is room for those of the bins."""

_SAMPLED = 2**18
_SAMPLED_OF_GROUP = 2**8
"""The edges are those of so many training samples, and so many times the number of groups; what lies between them is
counted in all."""

_COUNTED = 2**20
"""Training samples are counted in each class and pair of bins if that makes no more numbers than this, or than there
are samples. Otherwise, with very many classes, each resample goes over all samples."""

_RESAMPLES = 100
_SEED = 0

_SLICE = 2**17
"""Samples processed at a time, so that temporaries stay small."""


class Plausibility(NamedTuple):
    """What `plausibility` finds.

    Attributes:
        values: The plausibility of each training sample's label, in [0, 1], float32 `[N]`; NaN where a statistic is.
        shares: The share of each class that validation does not explain: an estimate, and the ends of an interval by
            resampling the validation samples; float64 `[3, C]`.
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
    fewer validation samples than `CLEAR` standard errors of that number, all ratios count as 1. With more than
    `_FEW_CLASSES` classes it may take more standard errors, so that chance alone is no evidence in some of them. The
    plausibility of a sample is the smaller of the ratios of its two statistics. Isotonic regression: R. Barlow et al.,
    "Statistical Inference under Order Restrictions", Wiley 1972; the ratio of densities as weight for training samples:
    H. Shimodaira, Journal of Statistical Planning and Inference, 2000; many classes: Y. Benjamini and Y. Hochberg,
    Journal of the Royal Statistical Society B, 1995.

    For a class with fewer than `ENOUGH` validation samples the ratios are those of all classes together, in which the
    validation samples of each class have the weight of its training samples.

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
    of_train, of_val = (torch.stack([_finite(values.to(device)) for values in part]) for part in (train, val))
    usable = (val_groups >= 0) & ~of_val.isnan().any(dim=0)
    order = torch.argsort(val_groups, stable=True)  # so that a resample keeps the class at each place
    order = order[usable[order]]
    of_val, val_groups = of_val[:, order], val_groups[order]
    enough = torch.bincount(val_groups, minlength=classes) >= ENOUGH
    values = torch.full((len(train_groups),), torch.nan, dtype=torch.float32, device=device)
    lacking = torch.zeros(1 + _RESAMPLES, classes, dtype=torch.float64, device=device)
    totals = torch.zeros(classes, dtype=torch.float64, device=device)
    together = torch.zeros(classes, dtype=torch.int64, device=device)
    for judged_here, group_of in ((enough, _numbered(enough)), (~enough, together)):
        if not judged_here.any():
            continue
        comparison = _Comparison(of_train, of_val, train_groups, val_groups, group_of)
        found = comparison.ratios()
        comparison.put_values(found, judged_here, values)
        totals[judged_here] = comparison.totals[judged_here]
        for number, chosen in enumerate([None, *_resamples(val_groups, classes)]):
            ratios = found if chosen is None else comparison.ratios(chosen)
            lacking[number, judged_here] = comparison.lacking(ratios, judged_here)
    if not len(val_groups):
        lacking[:] = torch.nan
    resampled = lacking[1:]
    of_each = _interval(lacking[0] / totals, resampled / totals)
    return Plausibility(values, of_each, _interval(lacking[0].sum() / totals.sum(), resampled.sum(1) / totals.sum()))


def _finite(values: Tensor) -> Tensor:
    """The values in float32, the largest number for infinity; NaN stays."""
    return values.detach().float().nan_to_num(torch.nan)


def _numbered(enough: Tensor) -> Tensor:
    """The number of the group of each class, int64 `[C]`: one for each with enough samples, the last for the others."""
    return (enough.cumsum(0) - 1).where(enough, enough.sum())


class _Comparison:
    """The two statistics in bins, of the training and the validation samples of each group of classes.

    Attributes:
        totals: The number of training samples of each class whose statistics are known, float64 `[C]`.
    """

    def __init__(
        self, train: Tensor, val: Tensor, train_classes: Tensor, val_classes: Tensor, group_of: Tensor
    ) -> None:
        self._train_classes, self._group_of = train_classes, group_of
        self._count = int(group_of.max()) + 1
        val_groups = group_of[val_classes]
        bins = (torch.bincount(val_groups, minlength=self._count) // _PER_BIN).clamp(2, _BINS)
        self._width = int(bins.max())
        edges = _edges(train, train_classes, group_of, bins)
        self._places = self._joint_bins(train, edges)
        self._val_keys = [val_groups * self._width + _bins(v, val_groups, e) for v, e in zip(val, edges, strict=True)]

        count, cells = len(group_of), self._width**2
        sizes = torch.bincount(val_classes, minlength=count)
        row_of = group_of.where(sizes > 0, self._count)  # the last row is for classes without validation samples
        self.totals, joint, counts = (
            torch.zeros(size, dtype=torch.float64, device=self._places.device)
            for size in (count, (self._count + 1) * cells, count * cells if self._counts_fit(count * cells) else 0)
        )
        for classes, places in self._known():
            one = joint.new_ones(1).expand(len(places))
            self.totals.index_add_(0, classes, one)
            joint.index_add_(0, row_of[classes] * cells + places, one)
            if len(counts):
                counts.index_add_(0, classes * cells + places, one)
        self._counts = counts.view(count, cells) if len(counts) else None
        self._of_train = [joint.view(-1, self._width, self._width)[: self._count].sum(dim) for dim in (2, 1)]
        self._weights = _weights(self.totals.where(sizes > 0, 0.0), sizes, group_of)[val_classes]

    def _counts_fit(self, numbers: int) -> bool:
        return numbers <= max(len(self._places), _COUNTED)

    def _joint_bins(self, train: Tensor, edges: Sequence[Tensor]) -> Tensor:
        """The number of the pair of bins of each training sample, int16 `[N]`; -1 where a statistic is NaN."""
        places = torch.empty_like(self._train_classes, dtype=torch.int16)
        for part in _slices(len(places)):
            groups = self._group_of[self._train_classes[part]]
            first, second = (_bins(values[part], groups, e) for values, e in zip(train, edges, strict=True))
            places[part] = (first * self._width + second).masked_fill(train[:, part].isnan().any(dim=0), -1)
        return places

    def _known(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The classes and the places of training samples whose statistics are known, some at a time, int64."""
        for part in _slices(len(self._places)):
            known = self._places[part] >= 0
            yield self._train_classes[part][known], self._places[part][known].long()

    def ratios(self, chosen: Tensor | None = None) -> Tensor:
        """The smaller ratio of both statistics for each pair of bins, float64 `[groups, bins ** 2]`.

        Args:
            chosen: The validation samples of a resample. None takes all of them, and only differences that are clear.
        """
        both = []
        for keys, of_train in zip(self._val_keys, self._of_train, strict=True):
            drawn = keys if chosen is None else keys[chosen]
            found = torch.bincount(drawn, self._weights, minlength=of_train.numel()).view_as(of_train)
            ratios = _rising_ratios(found, of_train).clamp(max=1.0)
            both.append(ratios if chosen is not None else ratios.where(_is_clear(ratios, found, of_train), 1.0))
        return torch.minimum(both[0][:, :, None], both[1][:, None, :]).flatten(1)

    def lacking(self, ratios: Tensor, of: Tensor) -> Tensor:
        """The number of training samples of some classes, bool `[C]`, that `ratios` do not explain, float64."""
        lacking = 1 - ratios
        if self._counts is not None:
            counts = self._counts[of]
            return counts @ lacking[0] if self._count == 1 else (counts * lacking[self._group_of[of]]).sum(1)
        sums = torch.zeros_like(self.totals)
        for classes, places in self._known():
            sums.index_add_(0, classes, lacking[self._group_of[classes], places])
        return sums[of]

    def put_values(self, ratios: Tensor, of: Tensor, values: Tensor) -> None:
        """Writes the plausibility of the training samples of some classes, bool `[C]`, into `values`."""
        ratios = torch.nn.functional.pad(ratios.float(), (0, 1), value=torch.nan).flatten()  # NaN for the place -1
        for part in _slices(len(values)):
            classes = self._train_classes[part]
            place = self._places[part] % (self._width**2 + 1)
            found = ratios[self._group_of[classes] * (self._width**2 + 1) + place]
            values[part] = found.where(of[classes], values[part])


def _weights(train_sizes: Tensor, val_sizes: Tensor, group_of: Tensor) -> Tensor:
    """The weight of a validation sample of each class, float64 `[C]`.

    They give each class of a group the share that it has of the training samples. Their sum over the samples of a group
    is the number of samples that have the same standard error without weights.
    """
    weights = (train_sizes / val_sizes).where(val_sizes > 0, 0.0)
    sums = weights.new_zeros(2, int(group_of.max()) + 1)
    sums.index_add_(1, group_of, torch.stack([weights * val_sizes, weights.square() * val_sizes]))
    return weights * (sums[0] / sums[1])[group_of]


def _slices(length: int) -> Iterator[slice]:
    return (slice(start, start + _SLICE) for start in range(0, length, _SLICE))


def _edges(values: Tensor, classes: Tensor, group_of: Tensor, bins: Tensor) -> list[Tensor]:
    """The lower edges of all bins but the first, float32 `[groups, 31]` for each statistic.

    The bins have equal counts. Edges are infinite where there are fewer than 31.
    """
    wanted = max(_SAMPLED, _SAMPLED_OF_GROUP * len(bins))
    if len(classes) > wanted:  # their sort would take most of the time
        some = torch.randint(len(classes), (wanted,), generator=torch.Generator().manual_seed(_SEED)).to(classes.device)
        values, classes = values[:, some], classes[some]
    known = ~values.isnan().any(dim=0)
    values, groups = values[:, known], group_of[classes[known]]
    sizes = torch.bincount(groups, minlength=len(bins))
    number = torch.arange(1, 2 * _STEPS[0], device=values.device)
    place = (sizes[:, None] * number).div(bins[:, None], rounding_mode="floor")
    inside = (number < bins[:, None]) & (sizes[:, None] > 0)
    place = ((sizes.cumsum(0) - sizes)[:, None] + place).where(inside, 0)
    if not len(groups):
        return [torch.full(place.shape, torch.inf, device=values.device)] * len(values)
    edges = []
    for statistic in values:
        order = torch.argsort(statistic)
        order = order[torch.argsort(groups[order].int(), stable=True)]
        edges.append(statistic[order][place].where(inside, torch.inf))
    return edges


def _bins(values: Tensor, groups: Tensor, edges: Tensor) -> Tensor:
    """The number of the bin of each value, int64 `[N]`; 0 for NaN."""
    found = torch.zeros_like(groups)
    flat = edges.flatten()
    for step in _STEPS:
        found += step * (values >= flat[groups * edges.shape[1] + found + step - 1])
    return found


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
    variance = size * share * (1 - share) * (1 + size / of_train.sum(1, keepdim=True))  # of both sets of samples
    errors = (lacking / variance.sqrt()).nan_to_num(0.0).where(share < 1, 0.0)
    return (errors > CLEAR) & (errors >= _least_errors(errors))


def _least_errors(errors: Tensor) -> Tensor:
    """How many standard errors a difference must have at least, given those of all classes, float64 `[C, 1]`."""
    ranked = errors.flatten().sort(descending=True).values
    as_large = torch.arange(1, len(ranked) + 1, dtype=torch.float64, device=ranked.device)
    by_chance = _CHOSEN_BINS * len(ranked) * torch.special.ndtr(-ranked)
    in_few = _CHOSEN_BINS * _FEW_CLASSES * torch.special.ndtr(-ranked.new_tensor(CLEAR))
    accepted = ranked[by_chance <= (_FALSE * as_large).maximum(in_few)]
    return accepted.amin() if len(accepted) else ranked.new_tensor(torch.inf)


def _resamples(groups: Tensor, count: int) -> Iterator[Tensor]:
    """Draws of as many samples of each group as there are, with replacement, int64 `[M]`, always the same ones.

    `groups` is sorted.
    """
    sizes = torch.bincount(groups, minlength=count)
    size, start = (part[groups] for part in (sizes.double(), sizes.cumsum(0) - sizes))
    generator = torch.Generator().manual_seed(_SEED)
    for _ in range(_RESAMPLES):
        draw = torch.rand(len(groups), generator=generator, dtype=torch.float64).to(groups.device)
        yield start + draw.mul_(size).long()


def _interval(best: Tensor, resampled: Tensor) -> Tensor:
    """The estimate and the ends of its interval, `[3, ...]`.

    The ends are as far away as the farther end of the interval that holds 95 % of the estimates from resamples. These
    differ from the estimate not only by chance: isotonic regression follows the noise of both draws.
    """
    ends = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64, device=best.device), dim=0)
    reach = (ends - best).abs().amax(dim=0)
    return torch.stack([best, (best - reach).clamp(min=0), (best + reach).clamp(max=1)])


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
    statistics = [[part.cpu() for part in both] for both in (scores, confidence)]
    used = torch.nonzero(train >= 0).flatten() if (train < 0).any() else slice(None)
    labels, groups = distinct(train[used])
    of_val = torch.searchsorted(labels, val.contiguous()).clamp(max=len(labels) - 1)
    of_val = of_val.where(labels[of_val] == val, -1)
    found = plausibility([s[0][used] for s in statistics], [s[1] for s in statistics], groups, of_val, len(labels))
    values = torch.full((len(train),), torch.nan, dtype=torch.float32)
    values[used] = found.values
    shares = {str(label): _rounded(share) for label, share in zip(labels.tolist(), found.shares.T, strict=True)}
    return values, {"share": _rounded(found.share), "classes": shares}


def _rounded(shares: Tensor) -> list[float] | None:
    return None if shares.isnan().any() else [round(share, 4) for share in shares.tolist()]
