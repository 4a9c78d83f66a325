"""Ways to choose a coreset from one proxy's logged losses, through the library's public API only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_cld import CLDScores, LossTrajectories, baselines

Choice = Callable[[LossTrajectories, float, int], Tensor]
"""From the losses, the fraction to keep and a seed to positions in the train set."""


@dataclass(frozen=True)
class Method:
    """A way to choose, and the share of the proxy's run that it needs."""

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


# Candidates for a rule beside top-k. Each gives priorities, of which the best of every class are kept.


def _rule(priorities: Callable[[LossTrajectories, CLDScores, float, Tensor], Tensor]) -> Choice:
    def choose(losses: LossTrajectories, fraction: float, seed: int) -> Tensor:
        scores = losses.score()
        draw = torch.rand(len(scores), generator=torch.Generator().manual_seed(2000 + seed))
        values = priorities(losses, scores, fraction, draw)
        return CLDScores(values, scores.classes).select(fraction=fraction)

    return choose


def _ranks(scores: CLDScores) -> Tensor:
    """Each sample's rank in its class, from 0 for the lowest score to 1."""
    ranks = torch.empty(len(scores))
    for label in torch.unique(scores.classes).tolist():
        members = torch.nonzero(scores.classes == label).flatten()
        ranks[members] = scores.values[members].argsort().argsort() / len(members)
    return ranks


def _drop_negative(losses: LossTrajectories, scores: CLDScores, fraction: float, draw: Tensor) -> Tensor:
    return torch.where(scores.values >= 0, draw, scores.values)


def _drop_share(share: float) -> Callable[..., Tensor]:
    def priorities(losses: LossTrajectories, scores: CLDScores, fraction: float, draw: Tensor) -> Tensor:
        ranks = _ranks(scores)
        return torch.where(ranks >= share, draw, ranks - 1)

    return priorities


def _otsu(values: Tensor) -> float:
    """The threshold that leaves the least variance within the two parts."""
    ordered = np.sort(values.double().numpy())
    counts = np.arange(1, len(ordered))
    below = np.cumsum(ordered)[:-1]
    above = ordered.sum() - below
    between = below**2 / counts + above**2 / (len(ordered) - counts)
    return float(ordered[between.argmax()])


def _drop_otsu(losses: LossTrajectories, scores: CLDScores, fraction: float, draw: Tensor) -> Tensor:
    return torch.where(scores.values > _otsu(scores.values), draw, scores.values - 2)


def _drawn(keep: Tensor, weights: Tensor, draw: Tensor, scores: CLDScores) -> Tensor:
    """Priorities whose best are a draw by weight among those to keep; the others come last, the best score first.

    The largest of log(w) + Gumbel noise are a draw by weight without replacement (Yellott, 1977).
    """
    gumbel = -(-draw.double().log()).log()
    return torch.where(keep & (weights > 0), weights.double().log() + gumbel, scores.values - 1000.0)


def _weighted(losses: LossTrajectories, scores: CLDScores, fraction: float, draw: Tensor) -> Tensor:
    return _drawn(scores.values > 0, scores.values, draw, scores)


def _tent(losses: LossTrajectories, scores: CLDScores, fraction: float, draw: Tensor) -> Tensor:
    return _drawn(scores.values > 0, scores.values * (1 - scores.values), draw, scores)


def _variable(
    power: float, *, filtered: bool = True, by_score: bool = False, otsu: bool = False
) -> Callable[..., Tensor]:
    def priorities(losses: LossTrajectories, scores: CLDScores, fraction: float, draw: Tensor) -> Tensor:
        weights = baselines.variability(losses) ** power
        if by_score:
            weights = weights * scores.values.clamp(min=0)
        threshold = _otsu(scores.values) if otsu else 0.0
        return _drawn((scores.values > threshold) | (not filtered), weights, draw, scores)

    return priorities


def _ambiguous(power: float, *, by_score: float = 0, otsu: bool = False) -> Callable[..., Tensor]:
    def priorities(losses: LossTrajectories, scores: CLDScores, fraction: float, draw: Tensor) -> Tensor:
        chances = (-losses.train_losses[1:].double()).exp()
        weights = (chances * (1 - chances)).mean(dim=0) ** power
        weights = weights * scores.values.clamp(min=0) ** by_score
        return _drawn(scores.values > (_otsu(scores.values) if otsu else 0.0), weights, draw, scores)

    return priorities


METHODS: dict[str, Method] = {
    "random": Method(_seeded(baselines.random_values), share=0.0),
    "CLD": Method(_cld()),
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
    "DUAL": Method(_by(baselines.dual)),
    "drop negative": Method(_rule(_drop_negative)),
    "drop 30 %": Method(_rule(_drop_share(0.3))),
    "drop Otsu": Method(_rule(_drop_otsu)),
    "by CLD": Method(_rule(_weighted)),
    "by CLD x (1 - CLD)": Method(_rule(_tent)),
    "by variability": Method(_rule(_variable(1))),
    "by sqrt variability": Method(_rule(_variable(0.5))),
    "by variability squared": Method(_rule(_variable(2))),
    "by variability x CLD": Method(_rule(_variable(1, by_score=True))),
    "by variability above Otsu": Method(_rule(_variable(1, otsu=True))),
    "by variability, no filter": Method(_rule(_variable(1, filtered=False))),
    "by ambiguity": Method(_rule(_ambiguous(1))),
    "by sqrt ambiguity": Method(_rule(_ambiguous(0.5))),
    "by ambiguity x CLD": Method(_rule(_ambiguous(1, by_score=1))),
    "by ambiguity x CLD^2": Method(_rule(_ambiguous(1, by_score=2))),
    "by ambiguity x CLD^4": Method(_rule(_ambiguous(1, by_score=4))),
    "by ambiguity x CLD, Otsu": Method(_rule(_ambiguous(1, by_score=1, otsu=True))),
}
EVERYTHING = "everything"
