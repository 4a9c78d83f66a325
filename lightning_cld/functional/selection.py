"""Choosing samples: budgets, the rules "top", "draw" and "random", and the train/validation split."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from lightning_cld.functional.arrays import IntegersLike, names_in
from lightning_cld.functional.checks import as_classes, check_classes, check_count, distinct, kind_of, listed
from lightning_cld.functional.partition import best_of_each

RULES = ("top", "draw", "random")
"""How a coreset is chosen: "top" takes the best-scored samples, "draw" draws by weight, "random" draws all alike."""

_LEAST = 1e-6
"""Confidence is kept so far from 0 and 1: a sample that was never in doubt may be drawn too."""


def select_top(
    scores: Tensor,
    classes: IntegersLike | None = None,
    *,
    fraction: float | None = None,
    size: int | None = None,
    per_class: int | None = None,
) -> Tensor:
    """Chooses the best-scored samples of each class: the coreset.

    Give exactly one budget. `fraction` and `size` are divided among the classes in proportion to class size, by largest
    remainder: the total is exact, and each class gets at least one sample if the budget allows. If scores are equal,
    the lower index is chosen. Unscored samples (NaN) count towards the size of their class but are never chosen.

    Args:
        scores: A score for each sample, floating point, `[N]`; higher is better.
        classes: The samples' classes, `[N]`: integers of any type, in a tensor, an array, a pandas Series or a list.
            None puts all samples into one class.
        fraction: The share of all samples to keep, in (0, 1]: `fraction * N` samples, rounded half up.
        size: The number of samples to keep.
        per_class: The number of samples to keep in each class.

    Returns:
        Sorted indices of the chosen samples, int64, on the device of `scores`.

    Raises:
        TypeError: If an argument has the wrong type or dtype, or not exactly one budget is given.
        ValueError: If shapes don't match, the budget is less than one sample or more than there are, or a class has
            fewer scored samples than its part of the budget.

    Example:
        >>> import torch
        >>> from lightning_cld import select_top
        >>> scores = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.3, 0.2])
        >>> classes = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> select_top(scores, classes, fraction=0.5)
        tensor([0, 2, 4])
        >>> select_top(torch.rand(6), classes, per_class=1).shape  # a random baseline with the same class balance
        torch.Size([2])
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(f"scores must be a floating point tensor, got {kind_of(scores)}.")
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must have shape [N] with N >= 1, got {list(scores.shape)}.")
    if classes is None:
        classes = torch.zeros(len(scores), dtype=torch.int64)
    of_sample = check_classes(classes, len(scores), "classes").to(scores.device)
    labels, groups = distinct(of_sample)
    sizes = torch.bincount(groups, minlength=len(labels)).tolist()
    budgets = _class_budgets(sizes, fraction=fraction, size=size, per_class=per_class)

    places = torch.nonzero(~scores.isnan()).flatten()
    of_scored = groups.index_select(0, places)
    scored = torch.bincount(of_scored, minlength=len(labels)).tolist()
    short = [c for c in range(len(labels)) if budgets[c] > scored[c]]
    if short:
        lacking = "; ".join(f"class {int(labels[c])} needs {budgets[c]} but has {scored[c]}" for c in short[:5])
        more = f" (and {len(short) - 5} more classes)" if len(short) > 5 else ""
        raise ValueError(
            f"The budget needs more scored samples than there are: {lacking}{more}. Lower it, leave such classes out, "
            'or choose at random (rule="random" of CLDScores.select), which needs no scores.'
        )

    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    best = best_of_each(scores.index_select(0, places), of_scored, torch.tensor(budgets, device=scores.device))
    kept[places[best]] = True
    return torch.nonzero(kept).flatten()


def select_drawn(
    scores: Tensor,
    plausibility: Tensor,
    classes: IntegersLike | None = None,
    *,
    confidence: Tensor | None = None,
    fraction: float | None = None,
    size: int | None = None,
    per_class: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Draws samples of each class at random, implausible labels seldom and, if little is kept, typical samples rather.

    Samples of a class are drawn one after another, without replacement. With `f` the kept share of the class and `c`
    the confidence of a sample, its probability is proportional to the weight

        plausibility^2 * c^(2 (1 - sqrt(f))^2) * (c (1 - c))^f

    If little is kept, this prefers typical samples, and if much is kept, those that the model found neither easy nor
    hopeless. Without confidence the last two factors are 1, and where all labels are plausible as well the choice is
    random. If a class has fewer samples of positive weight than it is to keep, these are taken, and then the
    best-scored of the rest.

    The rule is this library's own, not the paper's; `examples/benchmarks/RESULTS.md` says which data it was chosen by.
    Easy samples are worth more the fewer samples are kept: B. Sorscher et al., "Beyond Neural Scaling Laws: Beating
    Power Law Scaling via Data Pruning", NeurIPS 2022.

    Args:
        scores: A score for each sample, floating point, `[N]`. NaN marks a sample that is never chosen.
        plausibility: The plausibility of each sample's label, floating point, `[N]`, brought to [0, 1]; NaN counts as
            0.
        classes: As for `select_top`.
        confidence: The confidence of each sample, floating point, `[N]`, brought to [0, 1]; NaN counts as 0.
        fraction: As for `select_top`.
        size: As for `select_top`.
        per_class: As for `select_top`.
        seed: Seed of the draw; the global random state is neither used nor changed.

    Returns:
        Sorted indices of the chosen samples, int64, on the device of `scores`; as many of each class as `select_top`
        chooses.

    Raises:
        TypeError: As for `select_top`, or if `seed` is not a whole number.
        ValueError: As for `select_top`, or if shapes differ.

    Example:
        >>> import torch
        >>> from lightning_cld.functional.selection import select_drawn
        >>> select_drawn(torch.tensor([0.9, 0.8, 0.7, 0.1, -0.3]), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]), size=3)
        tensor([0, 1, 2])
    """
    check_rule("draw", seed)
    top = select_top(scores, classes, fraction=fraction, size=size, per_class=per_class).cpu()  # checks the arguments
    for name, given in (("plausibility", plausibility), ("confidence", confidence)):
        if name == "confidence" and given is None:
            continue
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {kind_of(given)}.")
        if given.shape != scores.shape:
            raise ValueError(f"{name} must have the shape of scores, {list(scores.shape)}, got {list(given.shape)}.")
    values = scores.cpu()
    if classes is None:
        classes = torch.zeros(len(values), dtype=torch.int64)
    of_sample = check_classes(classes, len(values), "classes").cpu()
    labels, groups = distinct(of_sample)
    sizes = torch.bincount(groups, minlength=len(labels))
    share = (torch.bincount(groups[top], minlength=len(sizes)).double() / sizes)[groups]
    weights = plausibility.cpu().double().nan_to_num(0.0).clamp(0, 1).square()
    if confidence is not None:
        sure = confidence.cpu().double().nan_to_num(0.0).clamp(_LEAST, 1 - _LEAST)
        weights = weights * sure ** (2 * (1 - share.sqrt()).square() + share) * (1 - sure) ** share
    generator = torch.Generator().manual_seed(operator.index(seed))
    draw = torch.rand(len(values), generator=generator, dtype=torch.float64)
    # Taking the largest values of log(weight) plus Gumbel noise draws by weight without replacement (Yellott, J. Math.
    # Psychol. 1977). These values stay far above -1000, where the other samples follow in the order of their scores.
    keys = weights.log() - (-draw.log()).log()
    after_drawn = -1000.0 - torch.argsort(torch.argsort(-values, stable=True)).double()
    priorities = torch.where(weights > 0, keys, after_drawn).where(~values.isnan(), torch.nan)
    drawn = select_top(priorities, of_sample, fraction=fraction, size=size, per_class=per_class)
    return drawn.to(scores.device)


def above_threshold(scores: Tensor) -> Tensor:
    """Which scores are above a threshold between low and high ones, float32, `[N]`: 1 or 0, and NaN for NaN.

    It stands in for plausibility where the losses of train and validation samples can't be compared, as those of
    training steps. The threshold is `max(0, otsu * min(1, 10 * negative))`. `negative` is the share of negative scores:
    few with right labels, many with wrong ones. `otsu` is the threshold of N. Otsu, "A Threshold Selection Method from
    Gray-Level Histograms", IEEE Transactions on Systems, Man, and Cybernetics, 1979.

    Args:
        scores: CLD of each sample, floating point, `[N]`.

    Example:
        >>> import torch
        >>> from lightning_cld.functional.selection import above_threshold
        >>> above_threshold(torch.tensor([0.9, 0.8, 0.7, 0.1, -0.3]))
        tensor([1., 1., 1., 0., 0.])
    """
    known = scores.detach().double().cpu()
    above = (known > _threshold(known[~known.isnan()])).float()
    return above.where(~known.isnan(), torch.nan).to(scores.device)


def _threshold(scores: Tensor) -> float:
    """The threshold of `above_threshold`."""
    negative = float((scores < 0).double().mean())
    if not negative > 0:  # or there are no scores
        return 0.0
    ordered = scores.sort().values
    counts = torch.arange(1, len(ordered), dtype=torch.float64)
    below = ordered.cumsum(0)[:-1]
    # Otsu's threshold has the most variance between its two sides, and so the least within them.
    between = below.square() / counts + (ordered.sum() - below).square() / (len(ordered) - counts)
    otsu = float(ordered[between.argmax()]) if len(between) else 0.0
    return max(0.0, otsu * min(1.0, 10 * negative))


def _class_budgets(sizes: list[int], *, fraction: float | None, size: int | None, per_class: int | None) -> list[int]:
    """The number of samples to choose from each class, given the class sizes."""
    check_budget(fraction=fraction, size=size, per_class=per_class)
    samples = sum(sizes)
    if per_class is not None:
        return [operator.index(per_class)] * len(sizes)
    total = int(float(fraction) * samples + 0.5) if fraction is not None else operator.index(size or 0)
    if total == 0:
        raise ValueError(f"fraction={fraction} of {samples} samples is less than one sample. Raise it.")
    if total > samples:
        raise ValueError(f"size={size} is more than the {samples} samples there are. Lower it.")
    return _apportion(sizes, total)


def check_budget(*, fraction: float | None, size: int | None, per_class: int | None) -> None:
    """Raises unless exactly one budget is given, with a valid type and value."""
    given = {
        name: value
        for name, value in (("fraction", fraction), ("size", size), ("per_class", per_class))
        if value is not None
    }
    if len(given) != 1:
        what = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
        raise TypeError(f"Give exactly one budget: fraction=, size= or per_class=; got {what}.")
    name, value = next(iter(given.items()))
    if name == "fraction":
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"fraction must be a number in (0, 1], got {value!r}.")
        if not 0 < value <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {value!r}.")
        return
    check_count(name, value)


def check_rule(rule: object, seed: object) -> None:
    """Raises unless `rule` is one of `RULES` and `seed` a whole number."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}.")
    if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
        raise TypeError(f"seed must be a whole number, got {seed!r}.")
    if not -(2**63) <= operator.index(seed) < 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed!r}.")


def _apportion(sizes: Sequence[int], total: int) -> list[int]:
    """Divides `total <= sum(sizes)` in proportion to `sizes` by largest remainder.

    If `total` allows, classes whose share would be 0 get 1, and the others divide the rest. Of equal remainders, the
    first class wins. All arithmetic uses integers, so rounding never decides.
    """
    shares = [0] * len(sizes)
    open_classes = list(range(len(sizes)))
    while True:
        pool = sum(sizes[c] for c in open_classes)
        for c in open_classes:
            shares[c] = total * sizes[c] // pool
        left_over = total - sum(shares[c] for c in open_classes)
        by_remainder = sorted(open_classes, key=lambda c: total * sizes[c] % pool, reverse=True)
        for c in by_remainder[:left_over]:
            shares[c] += 1
        empty = [c for c in open_classes if shares[c] == 0]
        if not empty or total < len(open_classes):
            return shares
        open_classes = [c for c in open_classes if shares[c] > 0]
        for c in empty:
            shares[c] = 1
        total -= len(empty)


def proportional_holdout(
    classes: IntegersLike | Sequence[str], fraction: float, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Splits a pool into training and validation samples, stratified by class.

    The validation part is the reference that CLD scores against. A reference sampled in proportion to the pool works
    best (Nagaraj et al., TMLR 2025). Never use the test set: the test accuracy of a coreset would mean nothing.

    Args:
        classes: The samples' classes, `[N]`, such as a dataset's `targets`: integers as for `select_top`, or names.
        fraction: The share of the samples to hold out, in (0, 1), divided among the classes by largest remainder. Each
            class has at least one sample on each side.
        seed: Seed of the draw; the global random state is neither used nor changed.

    Returns:
        `(train_indices, val_indices)`: sorted, disjoint, together all of `range(N)`; int64, on the CPU.

    Raises:
        TypeError: If classes are neither integers nor names, `fraction` is not a number, or `seed` not a whole one.
        ValueError: If `fraction` is outside (0, 1), or a class has fewer than 2 samples.

    Example:
        >>> from lightning_cld import proportional_holdout
        >>> train, val = proportional_holdout([0] * 8 + [1] * 4, 0.25)
        >>> len(train), len(val)
        (9, 3)
        >>> (val < 8).sum().item()  # 2 of 8 in class 0, and 1 of 4 in class 1
        2
    """
    if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real):
        raise TypeError(f"fraction must be a number in (0, 1), got {fraction!r}.")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be in (0, 1), got {fraction!r}.")
    check_rule("random", seed)
    names = names_in(classes)
    distinct_names = sorted(set(names or ()))
    if names is not None:
        number_of = {name: number for number, name in enumerate(distinct_names)}
        classes = [number_of[name] for name in names]
    pool = as_classes(classes, "classes").cpu()
    pool = check_classes(pool, len(pool) if pool.ndim else 0, "classes")
    labels, groups, sizes = torch.unique(pool, return_inverse=True, return_counts=True)
    if sizes.min() < 2:
        single = [label if names is None else distinct_names[label] for label in labels[sizes < 2].tolist()]
        raise ValueError(
            f"A holdout needs at least 2 samples of each class, but {listed(single, 'class', 'classes')} "
            f"{'has' if len(single) == 1 else 'have'} only 1. Drop or merge them."
        )
    total = max(len(labels), int(float(fraction) * len(pool) + 0.5))
    shares = [
        min(share, size - 1) for share, size in zip(_apportion(sizes.tolist(), total), sizes.tolist(), strict=True)
    ]
    draw = torch.rand(len(pool), generator=torch.Generator().manual_seed(operator.index(seed)), dtype=torch.float64)
    order = torch.argsort(draw, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    rank = torch.arange(len(pool)) - (sizes.cumsum(0) - sizes)[groups[order]]
    held_out = rank < torch.tensor(shares)[groups[order]]
    return order[~held_out].sort().values, order[held_out].sort().values
