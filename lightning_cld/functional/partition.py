"""The best scores of each group, without a sort of everything."""

from __future__ import annotations

import torch
from torch import Tensor

_BUCKETS = 64
"""Scores are counted in so many ranges, to find the range in which the cut of a class lies."""

_FEW = 2**12
"""So few scores near the cuts are sorted."""

_NARROWINGS = 3
"""How often the range of the cut is divided, before the scores that are still near it are sorted, however many."""


def best_of_each(scores: Tensor, groups: Tensor, budgets: Tensor) -> Tensor:
    """The places of the best scores of each group, in any order; the lower place if scores are equal.

    The cut of a group is found by counting, in time linear in the scores. Only the scores near a cut are sorted.

    Args:
        scores: Without NaN, floating point, `[N]`.
        groups: The group of each score, int64, `[N]`.
        budgets: How many to take of each group, no more than it has, int64, `[C]`.
    """
    places, taken = torch.arange(len(scores), device=scores.device), []
    count = len(budgets)
    buckets = max(2, min(_BUCKETS, len(scores) // count))  # no more counters than scores
    for _ in range(_NARROWINGS):
        if len(places) <= _FEW:
            break
        bucket = _buckets(scores, groups, count, buckets)
        counts = torch.bincount(groups * buckets + bucket, minlength=count * buckets).view(count, buckets)
        so_far = counts.flip(1).cumsum(1).flip(1)  # in each bucket and those above
        cut = (so_far >= budgets[:, None]).sum(1, keepdim=True) - 1  # the bucket that the last one to take is in
        above = (so_far - counts).gather(1, cut).flatten()
        cut_of_each = cut.flatten().index_select(0, groups)
        taken.append(places[bucket > cut_of_each])
        budgets = budgets - above
        near = torch.nonzero(bucket == cut_of_each).flatten()
        places, scores, groups = (part.index_select(0, near) for part in (places, scores, groups))
    order = torch.argsort(-scores, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    sizes = torch.bincount(groups, minlength=count)
    rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[groups[order]]
    return torch.cat([*taken, places[order[rank < budgets[groups[order]]]]])


def _buckets(scores: Tensor, groups: Tensor, count: int, buckets: int) -> Tensor:
    """A number in `range(buckets)` for each score, int64. In a group it never falls where the scores rise."""
    zeros = scores.new_zeros(count)  # stay where a group is empty
    lowest = zeros.scatter_reduce(0, groups, scores, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, groups, scores, "amax", include_self=False)
    scale = buckets / (highest - lowest)
    scale = scale.where(scale.isfinite(), 0.0)  # equal or infinite scores share a bucket
    shares = (scores - lowest.index_select(0, groups)).mul_(scale.index_select(0, groups))
    return shares.nan_to_num_(0.0, 0.0, 0.0).clamp_(0, buckets - 1).long()
