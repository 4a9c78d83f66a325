"""The best scores of each group are those that a sort of everything finds."""

import numpy as np
import pytest
import torch

from lightning_cld.functional.partition import best_of_each

KINDS = {
    "even": lambda generator, size: generator.random(size),
    "near 1": lambda generator, size: 1 - 1.9 * generator.random(size) ** 8,
    "ties": lambda generator, size: generator.integers(0, 4, size).astype(float),
    "equal": lambda generator, size: np.full(size, 0.5),
    "heavy tails": lambda generator, size: np.exp(generator.normal(size=size) ** 9 / 1e3),
    "infinite": lambda generator, size: np.where(generator.random(size) < 0.1, np.inf, generator.normal(size=size)),
    "both infinities": lambda generator, size: generator.choice([-np.inf, 0.0, 1.0, np.inf], size),
    "subnormal": lambda generator, size: generator.random(size) * 1e-44,
    "largest": lambda generator, size: generator.choice([-3e38, 0.0, 3e38], size),
}


def by_sorting(scores: np.ndarray, groups: np.ndarray, budgets: np.ndarray) -> list[int]:
    order = np.lexsort((np.arange(len(scores)), -scores, groups))
    first = np.searchsorted(groups[order], np.arange(len(budgets)))
    rank = np.arange(len(scores)) - first[groups[order]]
    return sorted(order[rank < budgets[groups[order]]].tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 7, 3_000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_are_those_that_sorting_finds(kind, count, dtype):
    generator = np.random.default_rng(count)
    scores = torch.tensor(KINDS[kind](generator, 20_000)).to(dtype)
    groups = generator.integers(0, count, len(scores))
    sizes = np.bincount(groups, minlength=count)
    for share in (0.0, 0.1, 0.9, 1.0):
        budgets = np.floor(share * sizes).astype(np.int64)
        budgets[:: max(2, count // 5)] = 0  # some groups take nothing
        found = best_of_each(scores, torch.tensor(groups), torch.tensor(budgets))
        assert sorted(found.tolist()) == by_sorting(scores.double().numpy(), groups, budgets)


def test_only_scores_near_the_cut_are_sorted(monkeypatch):
    sorted_sizes = []
    argsort = torch.argsort
    monkeypatch.setattr(
        torch, "argsort", lambda values, **kw: sorted_sizes.append(len(values)) or argsort(values, **kw)
    )
    generator = torch.Generator().manual_seed(0)
    scores = 1 - 1.9 * torch.rand(400_000, generator=generator) ** 3
    groups = torch.randint(10, (len(scores),), generator=generator)
    best_of_each(scores, groups, torch.full((10,), 4_000))
    assert max(sorted_sizes) < len(scores) / 10
