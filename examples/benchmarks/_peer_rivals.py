"""The methods of `peers.py` that need no other package: those of the library, and others from the same runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from _methods import METHODS
from _peer_runs import Fixed, Proxy, Rival
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional import spearman_corrcoef

from lightning_cld import CLDScores


@dataclass(frozen=True)
class Entry:
    """A method, and what it needs beside the losses of the checkpoints.

    Attributes:
        make: Takes the proxy, the fraction to keep, the number of steps and a seed.
        needs: In words, for the table.
        sized: Whether it keeps a given fraction.
        agreement: The rank correlation of its score with what stands for it where there are losses alone.
    """

    make: Callable[[Proxy, float, int, int], Rival]
    needs: str = "losses"
    sized: bool = True
    agreement: Callable[[Proxy], float] | None = None


# Of the library


def _fixed(method: str) -> Callable[[Proxy, float, int, int], Rival]:
    def make(proxy: Proxy, fraction: float, steps: int, seed: int) -> Rival:
        return Fixed(METHODS[method].choose(proxy.trajectories, fraction, seed))

    return make


class Anew(Fixed):
    """A choice with another seed in each pass. The first pass is that of the fixed subset."""

    def __init__(self, choose: Callable[[int], Tensor], seed: int) -> None:
        self._choose, self._seed = choose, seed

    def draw(self, step: int) -> Tensor:
        positions = self._choose(self._seed)
        self._seed += 10_000
        return positions


def _anew(method: str) -> Callable[[Proxy, float, int, int], Rival]:
    def make(proxy: Proxy, fraction: float, steps: int, seed: int) -> Rival:
        return Anew(lambda seed: METHODS[method].choose(proxy.trajectories, fraction, seed), seed)

    return make


def _random_anew(proxy: Proxy, fraction: float, steps: int, seed: int) -> Rival:
    def choose(seed: int) -> Tensor:  # as METHODS["random"] does, without scoring in each pass
        values = torch.rand(len(proxy.data.wrong), generator=torch.Generator().manual_seed(2000 + seed))
        return CLDScores(values, proxy.data.train.classes).select(fraction=fraction)

    return Anew(choose, seed)


# From the logits of the same checkpoints


def _early(proxy: Proxy) -> slice:
    """The checkpoints of the first fifth of the epochs, without theta_0."""
    return slice(1, 1 + max(1, (len(proxy.train_logits) - 1) // 5))


def error_norms(proxy: Proxy) -> Tensor:
    """EL2N: the norm of (probabilities - label), averaged over the first fifth of the epochs of one proxy."""
    label = F.one_hot(proxy.data.train.classes, proxy.train_logits.shape[2])
    return torch.stack([(row.softmax(1) - label).norm(dim=1) for row in proxy.train_logits[_early(proxy)]]).mean(0)


def forgetting_events(right: Tensor) -> Tensor:
    """How often a sample was right at one checkpoint and wrong at the next; never right counts as most often.

    Args:
        right: Bool `[T + 1, N]`, theta_0 first.
    """
    after = right[1:]
    events = (after[:-1] & ~after[1:]).sum(0)
    return torch.where(after.any(0), events, len(after)).double()


def _is_right(proxy: Proxy) -> Tensor:
    return proxy.train_logits.argmax(2) == proxy.data.train.classes


def margins(proxy: Proxy) -> Tensor:
    """AUM: the logit of the label minus the largest other one, averaged over the epochs."""
    label = proxy.data.train.classes[:, None]
    found = []
    for row in proxy.train_logits[1:]:
        others = row.scatter(1, label, -torch.inf)
        found.append(row.gather(1, label)[:, 0] - others.amax(1))
    return torch.stack(found).mean(0)


def _ranked(score: Callable[[Proxy], Tensor]) -> Callable[[Proxy, float, int, int], Rival]:
    """The highest values of each class, ties at random."""

    def make(proxy: Proxy, fraction: float, steps: int, seed: int) -> Rival:
        values = score(proxy).double()
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(2000 + seed))
        ranks = torch.empty_like(values)
        ranks[order[values[order].argsort(stable=True)]] = torch.arange(len(values), dtype=torch.float64)
        return Fixed(CLDScores(ranks, proxy.data.train.classes).select(fraction=fraction))

    return make


# What stands for them where there are losses alone. A probability above a half is that of the largest logit, and with
# two classes all three are exact, but for samples between the two.


def _probabilities(proxy: Proxy) -> Tensor:
    return (-proxy.trajectories.train_losses.double()).exp()


def _agreement(score: Callable[[Proxy], Tensor], stand_in: Callable[[Proxy], Tensor]) -> Callable[[Proxy], float]:
    return lambda proxy: float(spearman_corrcoef(score(proxy).float(), stand_in(proxy).float()))


def _errors(proxy: Proxy) -> Tensor:
    return (1 - _probabilities(proxy)[_early(proxy)]).mean(0)


def _log_odds(proxy: Proxy) -> Tensor:
    losses = proxy.trajectories.train_losses[1:].double().clamp_min(1e-12)
    return -losses.expm1().log().mean(0)


# Dynamic


class InfoBatch(Fixed):
    """In each pass half of the samples below the mean loss, with twice the weight; all in the last eighth of steps.

    The losses are those of each sample's last batch.
    """

    ratio, annealed = 0.5, 0.875

    def __init__(self, samples: int, steps: int, seed: int) -> None:
        super().__init__(torch.arange(samples))
        self._losses, self._weights = torch.full((samples,), torch.inf), torch.ones(samples)
        self._until, self._generator = self.annealed * steps, torch.Generator().manual_seed(2000 + seed)

    def draw(self, step: int) -> Tensor:
        self._weights.fill_(1)
        if step >= self._until:
            return self.positions
        known = self._losses[self._losses.isfinite()]  # when a pass is drawn, a few of the one before are still to come
        easy = torch.nonzero(self._losses < known.mean()).flatten()
        easy = easy[torch.randperm(len(easy), generator=self._generator)]
        count = round((1 - self.ratio) * len(easy))
        self._weights[easy[:count]] = 1 / (1 - self.ratio)
        served = torch.ones(len(self.positions), dtype=torch.bool)
        served[easy[count:]] = False
        return torch.nonzero(served).flatten()

    def observe(self, positions: Tensor, losses: Tensor) -> None:
        self._losses[positions] = losses

    def weigh(self, positions: Tensor) -> Tensor:
        return self._weights[positions]


def _everything(proxy: Proxy, fraction: float, steps: int, seed: int) -> Rival:
    return Fixed(torch.arange(len(proxy.data.train.classes)))


EVERYTHING = "everything"
RANDOM = "random"
RANDOM_ANEW = "random, anew"
RIVALS: dict[str, Entry] = {
    EVERYTHING: Entry(_everything, "nothing", sized=False),
    RANDOM: Entry(_fixed("random"), "nothing"),
    RANDOM_ANEW: Entry(_random_anew, "nothing"),
    "CLD": Entry(_fixed("CLD")),
    "CLD, drawn": Entry(_fixed("CLD, drawn")),
    "CLD, drawn, anew": Entry(_anew("CLD, drawn")),
    "former draw": Entry(_fixed("former draw")),
    "former draw, anew": Entry(_anew("former draw")),
    "EL2N": Entry(_ranked(error_norms), "probabilities", agreement=_agreement(error_norms, _errors)),
    "forgetting": Entry(
        _ranked(lambda proxy: forgetting_events(_is_right(proxy))),
        "right or wrong",
        agreement=_agreement(
            lambda proxy: forgetting_events(_is_right(proxy)),
            lambda proxy: forgetting_events(_probabilities(proxy) > 0.5),
        ),
    ),
    "AUM": Entry(_ranked(margins), "margins", agreement=_agreement(margins, _log_odds)),
    "InfoBatch": Entry(
        lambda proxy, fraction, steps, seed: InfoBatch(len(proxy.data.train.classes), steps, seed),
        "losses while training",
        sized=False,
    ),
}
