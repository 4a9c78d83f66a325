"""Methods that choose a coreset from one proxy's logged losses, with only the library's public API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_cld import CLDScores, LossTrajectories, baselines
from lightning_cld.functional import aleatoric_uncertainty
from lightning_cld.functional.selection import above_threshold

Choice = Callable[[LossTrajectories, float, int], Tensor]
"""Takes the losses, the fraction to keep and a seed; returns positions in the train set."""


@dataclass(frozen=True)
class Method:
    """A function that chooses, and the share of the proxy's run that it needs."""

    choose: Choice
    share: float = 1.0


def _by(function: Callable[[LossTrajectories], Tensor]) -> Choice:
    return lambda losses, fraction, seed: losses.score(by=function).select(fraction=fraction)


def _seeded(function: Callable[..., Tensor]) -> Choice:
    return lambda losses, fraction, seed: losses.score(by=partial(function, seed=2000 + seed)).select(fraction=fraction)


def _cld(share: float = 1.0, every: int = 1) -> Choice:
    def choose(losses: LossTrajectories, fraction: float, seed: int) -> Tensor:
        scores = losses.score(cutoff_epoch=round(share * losses.epochs[-1]), every_n_epochs=every)
        return scores.select(fraction=fraction)

    return choose


def _draw(losses: LossTrajectories, fraction: float, seed: int) -> Tensor:
    return losses.score().select(fraction=fraction, rule="draw", seed=2000 + seed)


# Rules that were tried before that one. Each gives priorities; the highest ones of every class are kept.

Priorities = Callable[[LossTrajectories, CLDScores, Tensor], Tensor]
"""Takes the losses, their scores and a uniform random number per sample."""


def _rule(priorities: Priorities) -> Choice:
    def choose(losses: LossTrajectories, fraction: float, seed: int) -> Tensor:
        scores = losses.score()
        draw = torch.rand(len(scores), generator=torch.Generator().manual_seed(2000 + seed), dtype=torch.float64)
        return CLDScores(priorities(losses, scores, draw), scores.classes).select(fraction=fraction)

    return choose


def _drop_share(share: float) -> Priorities:
    """Random, without the lowest-scored share of each class."""

    def priorities(losses: LossTrajectories, scores: CLDScores, draw: Tensor) -> Tensor:
        ranks = torch.empty(len(scores), dtype=torch.float64)
        for label in torch.unique(scores.classes).tolist():
            members = torch.nonzero(scores.classes == label).flatten()
            ranks[members] = scores.values[members].argsort().argsort().double() / len(members)
        return torch.where(ranks >= share, draw, ranks - 1)

    return priorities


def _drop_negative(losses: LossTrajectories, scores: CLDScores, draw: Tensor) -> Tensor:
    return torch.where(scores.values > 0, draw, scores.values - 1)


def _drop_otsu(losses: LossTrajectories, scores: CLDScores, draw: Tensor) -> Tensor:
    """Random, without the scores below Otsu's threshold, which minimises the variance within the two parts."""
    ordered = np.sort(scores.values.double().numpy())
    counts = np.arange(1, len(ordered))
    below = np.cumsum(ordered)[:-1]
    between = below**2 / counts + (ordered.sum() - below) ** 2 / (len(ordered) - counts)
    return torch.where(scores.values > ordered[between.argmax()], draw, scores.values - 2)


def _by_weight(weigh: Callable[[LossTrajectories, CLDScores], Tensor]) -> Priorities:
    """A weighted draw among the positive scores."""

    def priorities(losses: LossTrajectories, scores: CLDScores, draw: Tensor) -> Tensor:
        weights = weigh(losses, scores).double()
        keys = weights.log() - (-draw.log()).log()
        return torch.where((scores.values > 0) & (weights > 0), keys, scores.values - 1000)

    return priorities


def _former_draw(*, threshold: bool = True, by_cld: bool = True) -> Choice:
    """The rule "draw" as it was until 2026-11-28, in whole or without a part.

    Among the scores above a threshold it drew with weights `CLD * uncertainty ** (share ** (1/4))`. The best-scored of
    the others followed.
    """

    def choose(losses: LossTrajectories, fraction: float, seed: int) -> Tensor:
        scores = losses.score()
        values = scores.values.double() if by_cld else torch.ones(len(scores), dtype=torch.float64)
        above = above_threshold(values) > 0 if threshold else values > 0
        share = _kept_share(scores, fraction)
        weights = values * aleatoric_uncertainty(losses.train_losses[1:]).double() ** share**0.25
        draw = torch.rand(len(scores), generator=torch.Generator().manual_seed(2000 + seed), dtype=torch.float64)
        keys = weights.log() - (-draw.log()).log()
        after = -1000 - torch.argsort(torch.argsort(-values, stable=True)).double()
        priorities = torch.where(above & (weights > 0), keys, after)
        return CLDScores(priorities, scores.classes).select(fraction=fraction)

    return choose


def _kept_share(scores: CLDScores, fraction: float) -> Tensor:
    """The kept share of each sample's class."""
    if scores.classes is None:
        return torch.tensor(fraction, dtype=torch.float64)
    kept = torch.bincount(scores.classes[scores.select(fraction=fraction)], minlength=int(scores.classes.max()) + 1)
    return (kept.double() / torch.bincount(scores.classes))[scores.classes]


METHODS: dict[str, Method] = {
    "random": Method(_seeded(baselines.random_values), share=0.0),
    "CLD": Method(_cld()),
    "CLD, drawn": Method(_draw),
    "CLD, first half": Method(_cld(1 / 2), share=1 / 2),
    "CLD, first third": Method(_cld(1 / 3), share=1 / 3),
    "CLD, every 2nd": Method(_cld(every=2)),
    "CLD, every 3rd": Method(_cld(every=3)),
    "CLD near zero": Method(_by(baselines.near_zero_cld)),
    "lowest CLD": Method(_by(baselines.lowest_cld)),
    "stratified CLD": Method(_seeded(baselines.stratified_cld)),
    "lowest mean loss": Method(_by(baselines.lowest_mean_loss)),
    "highest mean loss": Method(_by(baselines.highest_mean_loss)),
    "area under loss": Method(_by(baselines.area_under_loss)),
    "confidence": Method(_by(baselines.confidence)),
    "variability": Method(_by(baselines.variability)),
    "uncertainty": Method(_by(baselines.uncertainty)),
    "DUAL": Method(_by(baselines.dual)),
    "drop negative": Method(_rule(_drop_negative)),
    "drop 10 %": Method(_rule(_drop_share(0.1))),
    "drop 30 %": Method(_rule(_drop_share(0.3))),
    "drop Otsu": Method(_rule(_drop_otsu)),
    "former draw": Method(_former_draw()),
    "former draw above zero": Method(_former_draw(threshold=False)),
    "former draw, but without CLD": Method(_former_draw(by_cld=False)),
    "draw by CLD": Method(_rule(_by_weight(lambda losses, scores: scores.values))),
    "draw by uncertainty": Method(_rule(_by_weight(lambda losses, scores: baselines.uncertainty(losses)))),
    "draw by uncertainty x CLD": Method(
        _rule(_by_weight(lambda losses, scores: baselines.uncertainty(losses) * scores.values))
    ),
    "draw by variability x CLD": Method(
        _rule(_by_weight(lambda losses, scores: baselines.variability(losses) * scores.values))
    ),
}
EVERYTHING = "everything"
HELD_OUT = "the validation split"
"""What the methods are compared with: training on all samples, or only on the validation samples that CLD uses."""
