"""Chooses the classes, samples and cutoffs that figures and reports show."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cld.functional.checks import MIN_CHECKPOINTS, distinct, listed
from lightning_cld.functional.diagnostics import overlap, rank_agreement
from lightning_cld.functional.selection import check_budget, select_top
from lightning_cld.scores import CLDScores
from lightning_cld.trajectories import LossTrajectories

MOST_CLASSES = 10
"""How many classes are shown if `classes` is None: those with the lowest mean scores."""

MOST_SAMPLES = 100_000
"""Agreement is computed from no more samples than this. On 256,000 made-up samples of 1,000 classes a sample of 100 a
class moved no overlap by more than 0.012, and one of 20 a class by up to 0.05."""

_LEAST_KEPT = 100
"""If the coreset of the sampled trajectories would be smaller than this, all of them are compared."""

MOST_CUTOFFS = 20
"""Agreement is computed at no more cutoffs than this, evenly spaced. Each costs one scoring."""


def check_kind(name: str, value: object, kind: type[CLDScores] | type[LossTrajectories]) -> None:
    """Raises unless `value` is of the given kind.

    Raises:
        TypeError: If it is not. The error says how to get such an object.
    """
    if isinstance(value, kind):
        return
    if isinstance(value, (str, PathLike)):
        remedy = f"Load the file first: {kind.__name__}.load(path)."
    elif kind is CLDScores:
        remedy = "Take .scores of the callback, or the result of LossTrajectories.score()."
    else:
        remedy = 'Take .trajectories of CLDCallback(history="full"), the logged losses.'
    raise TypeError(f"{name} must be {kind.__name__}, got {type(value).__name__}. {remedy}")


class Counted(NamedTuple):
    """What is known of the scores of a class.

    Attributes:
        label: The class.
        samples: How many samples it has.
        mean: Their mean score, without the unscored ones; NaN if all are.
        negative: How many scores are below zero.
        unscored: How many samples are unscored.
    """

    label: int
    samples: int
    mean: float
    negative: int
    unscored: int


def counted(scores: CLDScores) -> list[Counted]:
    """What is known of each class, by rising label. Without classes, all samples are class 0."""
    pool = scores.positions()
    of_pool = torch.zeros(len(pool), dtype=torch.int64) if scores.classes is None else scores.classes[pool]
    labels, groups = distinct(of_pool)
    values = scores.values[pool].double()
    scored = ~values.isnan()

    def of_each(chosen: Tensor) -> Tensor:
        return torch.bincount(groups[chosen], minlength=len(labels))

    sums = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, groups[scored], values[scored])
    columns = (labels, torch.bincount(groups), sums / of_each(scored), of_each(values < 0), of_each(~scored))
    return [Counted(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def by_mean_score(scores: CLDScores) -> list[int]:
    """The classes by rising mean score, unscored classes last. Without classes, all samples are class 0."""
    return [one.label for one in sorted(counted(scores), key=lambda one: (math.isnan(one.mean), one.mean))]


def shown_classes(scores: CLDScores, classes: Sequence[int] | None) -> tuple[list[int], int]:
    """The classes to show, and how many are left out. If `classes` is None, up to `MOST_CLASSES` are shown.

    Raises:
        TypeError: If `classes` is not a sequence of whole numbers.
        ValueError: If `classes` is empty or holds an unknown class.
    """
    known = by_mean_score(scores)
    if classes is None:
        return sorted(known[:MOST_CLASSES]), max(0, len(known) - MOST_CLASSES)
    try:
        named = [operator.index(label) for label in classes]
    except TypeError as error:
        raise TypeError(
            f"classes must be a sequence of whole numbers, such as [3], got {classes!r}: {error}."
        ) from None
    missing = sorted(set(named) - set(known))
    if missing or not named:
        problem = f"Can't show {listed(missing, 'class', 'classes')}" if missing else "There is no class to show"
        raise ValueError(f"{problem}: the scores are of {listed(sorted(known), 'class', 'classes')}.")
    return named, 0


def at_checkpoints(trajectories: LossTrajectories, epochs: Sequence[int]) -> LossTrajectories | None:
    """The trajectories at these checkpoints alone; None if they were not logged at one of them."""
    if trajectories.epochs == epochs:
        return trajectories
    rows = [trajectories.epochs.index(epoch) for epoch in epochs if epoch in trajectories.epochs]
    if not rows or len(rows) < len(epochs):
        return None
    return LossTrajectories(
        trajectories.train_losses[rows],
        trajectories.val_losses[rows],
        trajectories.train_classes,
        trajectories.val_classes,
        epochs,
        from_steps=trajectories.from_steps,
    )


def positions_of(scores: CLDScores, label: int) -> Tensor:
    """The positions of a class in the train dataset, sorted, int64."""
    return scores.positions() if scores.classes is None else torch.nonzero(scores.classes == label).flatten()


def extremes(scores: CLDScores, label: int, samples: int) -> tuple[Tensor, Tensor]:
    """Positions of up to `samples` best-scored and `samples` worst-scored samples of a class, most extreme first.

    No sample is in both. If a class has too few samples, they are halved, and the best get the odd one. Unscored
    samples are left out.
    """
    own = positions_of(scores, label)
    own = own[~scores.values[own].isnan()]
    ranked = own[torch.argsort(-scores.values[own], stable=True)]
    best = min(samples, (len(ranked) + 1) // 2)
    worst = min(samples, len(ranked) - best)
    return ranked[:best], ranked[len(ranked) - worst :].flip(0)


def sampled(trajectories: LossTrajectories, fraction: float) -> tuple[LossTrajectories, str]:
    """The trajectories of up to `MOST_SAMPLES` training samples, the same ones each time, to compute agreement from.

    They are drawn from each class in proportion to its size. If there are no more samples than that, or too few of them
    are kept, all are returned.

    Args:
        trajectories: The logged losses.
        fraction: The share of the train set that the compared coresets keep.

    Returns:
        The trajectories, and how many samples they are of, in words; empty if they are all.

    Raises:
        TypeError: If `fraction` is not a number.
        ValueError: If it is outside of (0, 1].
    """
    check_budget(fraction=fraction, size=None, per_class=None)
    classes = trajectories.train_classes
    samples = len(trajectories.row(0)[0])
    used = torch.arange(samples) if classes is None else torch.nonzero(classes >= 0).flatten()
    if len(used) <= MOST_SAMPLES or fraction * MOST_SAMPLES < _LEAST_KEPT:
        return trajectories, ""
    draw = torch.rand(len(used), generator=torch.Generator().manual_seed(0))
    drawn = used[select_top(draw, None if classes is None else classes[used], size=MOST_SAMPLES)]
    train = trajectories.train_losses
    part = LossTrajectories(
        train[:, drawn.to(train.device)],
        trajectories.val_losses,
        None if classes is None else classes[drawn],
        trajectories.val_classes,
        trajectories.epochs,
        from_steps=trajectories.from_steps,
    )
    return part, f"from {len(drawn):,} of {len(used):,} samples"


def agreement(
    trajectories: LossTrajectories, fraction: float, last: int | None = None
) -> tuple[list[int], list[float], list[float]]:
    """How far the scores at early cutoffs agree with the scores at the last cutoff.

    Args:
        trajectories: The logged losses.
        fraction: The share of the train set that the compared coresets keep.
        last: The last cutoff epoch; None takes the last checkpoint.

    Returns:
        The cutoff epochs; the rank correlation within the class at each (NaN where nothing can be scored); and the
        overlap of the coresets at each. The overlaps are empty for losses of training steps, whose scores choose no
        coreset.

    Raises:
        TypeError: If `fraction` is not a number.
        ValueError: If the losses give no scores, or no coreset of that size.
    """
    final = trajectories.values(last)
    classes = trajectories.train_classes
    used = torch.arange(len(final)) if classes is None else torch.nonzero(classes >= 0).flatten()
    of_used = None if classes is None else classes[used]
    chosen = None if trajectories.from_steps else select_top(final[used], of_used, fraction=fraction)
    due = [epoch for epoch in trajectories.epochs[MIN_CHECKPOINTS - 1 :] if last is None or epoch <= last]
    spaced = torch.linspace(0, len(due) - 1, min(len(due), MOST_CUTOFFS)).round().long().tolist()
    epochs = [due[place] for place in spaced]
    correlations, overlaps = [], []
    for epoch in epochs:
        correlation = shared = float("nan")
        with suppress(ValueError):  # too few differences were logged by then, or too few samples of a class scored
            values = trajectories.values(epoch)
            correlation = rank_agreement(values, final, classes)
            if chosen is not None:
                shared = overlap(chosen, select_top(values[used], of_used, fraction=fraction))
        correlations.append(correlation)
        overlaps.append(shared)
    return epochs, correlations, [] if chosen is None else overlaps


def check_same_run(scores: CLDScores, trajectories: LossTrajectories) -> None:
    """Raises unless the scores and the trajectories can be of the same run.

    Raises:
        ValueError: If they are of two runs, or their lengths, classes or names differ.
    """
    samples = trajectories.train_losses.shape[1]
    problem = None
    run, other = (thing.metadata.get("run") for thing in (scores, trajectories))
    if None not in (run, other) and run != other:
        problem = f"the scores are of run {run}, the losses of run {other}"
    elif len(scores) != samples:
        problem = f"there are {len(scores):,} scores, but losses of {samples:,} samples"
    elif (scores.classes is None) != (trajectories.train_classes is None) or (
        scores.classes is not None
        and trajectories.train_classes is not None
        and not torch.equal(scores.classes, trajectories.train_classes)
    ):
        problem = "their classes differ"
    elif None not in (scores.names, trajectories.names) and scores.names != trajectories.names:
        problem = "their names differ"
    if problem:
        raise ValueError(f"The scores don't belong to these trajectories: {problem}. Take both from the same run.")
