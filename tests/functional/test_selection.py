from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_cld.functional.selection import above_threshold, proportional_holdout, select_drawn, select_top

NAN, INF = float("nan"), float("inf")
LABELS = [0, 3, 17, 700, 701]
quick = settings(deadline=None, max_examples=200)


def apportioned(sizes, total):
    """Shares by largest remainder, found by trying all roundings of the quotas; at least 1 each if `total` allows."""
    quotas = [Fraction(total * size, sum(sizes)) for size in sizes]
    ways = itertools.product(*({math.floor(quota), math.floor(quota) + 1} for quota in quotas))
    exact = [way for way in ways if sum(way) == total]
    closest = min(sum((s - q) ** 2 for s, q in zip(way, quotas, strict=True)) for way in exact)
    # among equally close roundings the first classes get more
    shares = max(way for way in exact if sum((s - q) ** 2 for s, q in zip(way, quotas, strict=True)) == closest)
    if total < len(sizes) or 0 not in shares:
        return list(shares)
    others = iter(apportioned([n for n, s in zip(sizes, shares, strict=True) if s], total - shares.count(0)))
    return [next(others) if share else 1 for share in shares]


def best(scores, classes, budgets):
    """The best indices within each class's budget: highest score first, then lowest index."""
    chosen = []
    for label, budget in budgets.items():
        members = [i for i, c in enumerate(classes) if c == label and not math.isnan(scores[i])]
        chosen += sorted(members, key=lambda i: (-scores[i], i))[:budget]
    return sorted(chosen)


def budgets_of(classes, total):
    sizes = dict(sorted(Counter(classes).items()))
    return dict(zip(sizes, apportioned(list(sizes.values()), total), strict=True))


@st.composite
def pools(draw, values=(-1.0, -0.25, -0.0, 0.0, 0.25, 1.0, INF, -INF), max_size=60):
    """Scores with many ties, and classes of uneven sizes."""
    classes = draw(st.lists(st.sampled_from(LABELS[: draw(st.integers(1, 5))]), min_size=1, max_size=max_size))
    scores = draw(st.lists(st.sampled_from(values), min_size=len(classes), max_size=len(classes)))
    return scores, classes


# The rule "top"


@quick
@given(pools(), st.data())
def test_the_best_of_each_class_are_chosen_to_the_exact_size(pool, data):
    scores, classes = pool
    size = data.draw(st.integers(1, len(scores)))
    chosen = select_top(torch.tensor(scores), torch.tensor(classes), size=size)
    assert chosen.dtype == torch.int64
    assert len(chosen) == size
    assert chosen.tolist() == best(scores, classes, budgets_of(classes, size))


@quick
@given(pools(values=(-1.0, 0.0, 0.5, NAN)), st.data())
def test_nan_is_never_chosen_and_too_little_else_raises(pool, data):
    scores, classes = pool
    budgets = budgets_of(classes, data.draw(st.integers(1, len(scores))))
    size = sum(budgets.values())
    scorable = Counter(c for c, s in zip(classes, scores, strict=True) if not math.isnan(s))
    if any(budget > scorable[label] for label, budget in budgets.items()):
        with pytest.raises(ValueError, match="more scored samples than there are"):
            select_top(torch.tensor(scores), torch.tensor(classes), size=size)
    else:
        chosen = select_top(torch.tensor(scores), torch.tensor(classes), size=size)
        assert chosen.tolist() == best(scores, classes, budgets)


@quick
@given(pools(), st.data())
def test_per_class_takes_the_same_number_of_every_class(pool, data):
    scores, classes = pool
    per_class = data.draw(st.integers(1, min(Counter(classes).values())))
    chosen = select_top(torch.tensor(scores), torch.tensor(classes), per_class=per_class)
    assert chosen.tolist() == best(scores, classes, dict.fromkeys(classes, per_class))


@quick
@given(st.lists(st.sampled_from(LABELS), min_size=1, max_size=300), st.data())
def test_a_fraction_is_rounded_to_the_nearest_number_of_samples_halves_up(classes, data):
    fraction = data.draw(st.floats(0.51 / len(classes), 1))
    total = int(fraction * len(classes) + 0.5)
    assert len(select_top(torch.rand(len(classes)), torch.tensor(classes), fraction=fraction)) == total


@quick
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.data())
def test_class_counts_are_exact_quotas_rounded_and_at_least_one(sizes, data):
    classes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    total = data.draw(st.integers(1, len(classes)))
    chosen = select_top(torch.rand(len(classes)), classes, size=total)
    counts = torch.bincount(classes[chosen], minlength=len(sizes)).tolist()
    quotas = [Fraction(total * size, sum(sizes)) for size in sizes]
    assert total < len(sizes) or min(counts) >= 1
    assert all(count <= max(1, math.ceil(quota)) for count, quota in zip(counts, quotas, strict=True))
    if min(quotas) >= 1 or total < len(sizes):  # no class is raised to 1
        assert all(count >= math.floor(quota) for count, quota in zip(counts, quotas, strict=True))


@pytest.mark.parametrize(
    ("sizes", "total", "shares"),
    [
        ([4, 2], 3, [2, 1]),
        ([5, 5, 5], 4, [2, 1, 1]),  # equal remainders: the first class wins
        ([7, 5, 3], 7, [3, 2, 2]),  # quotas 3.27, 2.33, 1.4
        ([98, 1, 1], 10, [8, 1, 1]),  # quotas 9.8, 0.1, 0.1
        ([98, 1, 1], 2, [2, 0, 0]),  # too few for one per class
        ([50, 30, 1, 1], 5, [2, 1, 1, 1]),  # two classes get 1, which leaves 3 for quotas 1.875 and 1.125
        ([1, 1, 1], 3, [1, 1, 1]),
    ],
)
def test_budgets_are_shared_out_by_largest_remainder(sizes, total, shares):
    classes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    chosen = select_top(torch.rand(len(classes)), classes, size=total)
    assert torch.bincount(classes[chosen], minlength=len(sizes)).tolist() == shares
    assert apportioned(sizes, total) == shares


def test_of_equal_scores_the_lower_index_is_taken_in_large_pools_too():
    classes = torch.arange(20_000) % 2
    assert torch.equal(select_top(torch.zeros(20_000), classes, size=500), torch.arange(500))


def test_unscored_samples_count_towards_the_budget():
    scores = torch.tensor([NAN, NAN, 0.1, 0.2, 0.3, 0.4])
    assert select_top(scores, fraction=0.5).tolist() == [3, 4, 5]


def test_no_classes_are_one_class():
    assert select_top(torch.tensor([0.1, 0.9, 0.5]), size=2).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_every_floating_dtype_are_ranked(dtype):
    assert select_top(torch.tensor([0.1, 0.9, NAN, 0.5], dtype=dtype), size=2).tolist() == [1, 3]


@pytest.mark.parametrize(
    "budget",
    [
        {"size": np.int64(2)},
        {"per_class": np.int32(2)},
        {"fraction": np.float64(0.5)},
        {"fraction": np.float32(0.5)},
        {"fraction": Fraction(1, 2)},
    ],
    ids=str,
)
def test_numbers_of_other_libraries_are_budgets(budget):
    assert select_top(torch.tensor([0.1, 0.9, 0.2, 0.5]), **budget).tolist() == [1, 3]


@pytest.mark.parametrize("budget", [{"fraction": 1}, {"fraction": 1.0}, {"size": 4}, {"per_class": 4}], ids=str)
def test_everything_can_be_chosen(budget):
    assert select_top(torch.rand(4), **budget).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("fraction", "total"), [(0.125, 1), (0.375, 2), (0.625, 3), (0.6, 2)])
def test_halves_of_a_sample_are_rounded_up(fraction, total):
    assert len(select_top(torch.rand(4), fraction=fraction)) == total


# Errors

SCORES, CLASSES = torch.tensor([0.5, NAN, NAN, 0.4, 0.3, 0.2]), torch.tensor([3, 3, 3, 3, 700, 700])


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        ({}, TypeError, r"exactly one budget: fraction=, size= or per_class=; got none"),
        ({"size": 2, "per_class": 1}, TypeError, r"exactly one budget.*got size=2, per_class=1"),
        ({"size": 2, "fraction": 0.5}, TypeError, r"exactly one budget.*got fraction=0\.5, size=2"),
        ({"size": 0}, ValueError, r"size must be at least 1, got 0"),
        ({"size": -1}, ValueError, r"size must be at least 1, got -1"),
        ({"size": 7}, ValueError, r"size=7 is more than the 6 samples"),
        ({"size": 2.0}, TypeError, r"size must be a whole number, got 2\.0"),
        ({"size": "2"}, TypeError, r"size must be a whole number, got '2'"),
        ({"size": True}, TypeError, r"size must be a whole number, got True"),
        ({"per_class": 0}, ValueError, r"per_class must be at least 1, got 0"),
        ({"per_class": -2}, ValueError, r"per_class must be at least 1, got -2"),
        ({"per_class": 1.5}, TypeError, r"per_class must be a whole number, got 1\.5"),
        ({"per_class": True}, TypeError, r"per_class must be a whole number, got True"),
        ({"per_class": 3}, ValueError, r"class 3 needs 3 but has 2; class 700 needs 3 but has 2"),
        (
            {"size": 5},
            ValueError,
            r"are: class 3 needs 3 but has 2\. Lower it, leave such classes out, or choose at random",
        ),
        ({"fraction": 0}, ValueError, r"fraction must be in \(0, 1\], got 0"),
        ({"fraction": -0.5}, ValueError, r"fraction must be in \(0, 1\], got -0\.5"),
        ({"fraction": 1.01}, ValueError, r"fraction must be in \(0, 1\], got 1\.01"),
        ({"fraction": 10}, ValueError, r"fraction must be in \(0, 1\], got 10"),
        ({"fraction": NAN}, ValueError, r"fraction must be in \(0, 1\], got nan"),
        ({"fraction": INF}, ValueError, r"fraction must be in \(0, 1\], got inf"),
        ({"fraction": 0.08}, ValueError, r"fraction=0\.08 of 6 samples is less than one sample"),
        ({"fraction": True}, TypeError, r"fraction must be a number in \(0, 1\], got True"),
        ({"fraction": "0.5"}, TypeError, r"fraction must be a number in \(0, 1\], got '0\.5'"),
    ],
    ids=str,
)
def test_bad_budgets_raise(budget, error, message):
    with pytest.raises(error, match=message):
        select_top(SCORES, CLASSES, **budget)


@pytest.mark.parametrize(
    ("scores", "classes", "error", "message"),
    [
        ([0.1, 0.2], None, TypeError, r"scores must be a floating point tensor, got list"),
        (torch.tensor([1, 2]), None, TypeError, r"scores must be a floating point tensor, got torch\.int64"),
        (torch.rand(2, 2), None, ValueError, r"scores must have shape \[N\].*got \[2, 2\]"),
        (torch.rand(0), None, ValueError, r"scores must have shape \[N\] with N >= 1, got \[0\]"),
        (torch.rand(2), torch.tensor([0]), ValueError, r"classes must have shape \[2\].*got \[1\]"),
        (torch.rand(2), torch.tensor([[0, 1]]), ValueError, r"classes must have shape \[2\].*got \[1, 2\]"),
        (torch.rand(2), torch.tensor([0.0, 1.0]), TypeError, r"classes must be integers.*torch\.float32"),
        (torch.rand(2), torch.tensor([True, False]), TypeError, r"classes must be integers.*torch\.bool"),
        (torch.rand(2), ["a", "b"], TypeError, r"classes must be integers.*got 'a' at position 0"),
        (torch.rand(2), torch.tensor([0, -2]), ValueError, r"classes must not be negative, got -2"),
    ],
)
def test_bad_scores_and_classes_raise(scores, classes, error, message):
    with pytest.raises(error, match=message):
        select_top(scores, classes, size=1)


def test_only_the_first_classes_that_are_short_are_named():
    with pytest.raises(ValueError, match=r"class 4 needs 2 but has 1 \(and 15 more classes\)"):
        select_top(torch.rand(20), torch.arange(20), per_class=2)


# The validation holdout


@quick
@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=5),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.integers(0, 2**32),
)
def test_a_holdout_splits_each_class_in_proportion(sizes, fraction, seed):
    classes = [label for label, size in zip(LABELS, sizes, strict=False) for _ in range(size)]
    random.Random(seed).shuffle(classes)
    train, val = proportional_holdout(classes, fraction, seed=seed)
    assert train.dtype == val.dtype == torch.int64
    assert sorted(train.tolist() + val.tolist()) == list(range(len(classes)))
    assert train.tolist() == sorted(train.tolist())
    assert val.tolist() == sorted(val.tolist())
    total = max(len(sizes), int(fraction * len(classes) + 0.5))
    shares = [min(share, size - 1) for share, size in zip(apportioned(sizes, total), sizes, strict=True)]
    held_out = Counter(classes[i] for i in val)
    assert [held_out[label] for label in LABELS[: len(sizes)]] == shares
    assert min(shares) >= 1


CLASS_LIST = [0, 1] * 50


@pytest.mark.parametrize(
    "classes",
    [CLASS_LIST, np.array(CLASS_LIST), torch.tensor(CLASS_LIST), torch.tensor(CLASS_LIST, dtype=torch.uint8)],
    ids=["list", "ndarray", "tensor", "uint8"],
)
def test_a_holdout_is_the_same_whatever_holds_the_classes(classes):
    train, val = proportional_holdout(classes, 0.2, seed=5)
    expected_train, expected_val = proportional_holdout(CLASS_LIST, 0.2, seed=5)
    assert torch.equal(train, expected_train)
    assert torch.equal(val, expected_val)


def test_other_seeds_hold_out_other_samples():
    draws = {tuple(proportional_holdout(CLASS_LIST, 0.2, seed=seed)[1].tolist()) for seed in range(10)}
    assert len(draws) == 10


def test_every_sample_of_a_class_is_as_likely_to_be_held_out():
    counts = sum(
        torch.bincount(proportional_holdout([0] * 4 + [1] * 6, 0.5, seed=seed)[1], minlength=10) for seed in range(400)
    )
    assert ((counts - 200).abs() < 50).all()  # 5 standard deviations


def test_a_holdout_leaves_the_global_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = proportional_holdout(CLASS_LIST, 0.2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(proportional_holdout(CLASS_LIST, 0.2)[1], first[1])


@pytest.mark.parametrize(
    ("classes", "fraction", "error", "message"),
    [
        ([3, 3, 700], 0.5, ValueError, r"at least 2 samples of each class, but class 700 has only 1"),
        ([3, 5, 5, 700], 0.5, ValueError, r"at least 2 samples of each class, but classes 3, 700 have only 1"),
        ([0, 0], 0.0, ValueError, r"fraction must be in \(0, 1\), got 0\.0"),
        ([0, 0], 1.0, ValueError, r"fraction must be in \(0, 1\), got 1\.0"),
        ([0, 0], -0.1, ValueError, r"fraction must be in \(0, 1\), got -0\.1"),
        ([0, 0], NAN, ValueError, r"fraction must be in \(0, 1\), got nan"),
        ([0, 0], True, TypeError, r"fraction must be a number in \(0, 1\), got True"),
        ([0, 0], "0.5", TypeError, r"fraction must be a number in \(0, 1\), got '0\.5'"),
        ([0.0, 0.0], 0.5, TypeError, r"classes must be integers.*torch\.float32"),
        ([True, True], 0.5, TypeError, r"classes must be integers.*torch\.bool"),
        ([0, 0, -1, -1], 0.5, ValueError, r"classes must not be negative, got -1"),
        ([[0, 0], [1, 1]], 0.5, ValueError, r"classes must have shape \[2\].*got \[2, 2\]"),
    ],
    ids=str,
)
def test_bad_holdouts_raise(classes, fraction, error, message):
    with pytest.raises(error, match=message):
        proportional_holdout(classes, fraction)


# The rule "draw": a weighted draw


def inclusion(weights, size):
    """The exact chance of each sample to be among `size` samples drawn one by one, by weight."""
    chances = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), size):
        chance, left = 1.0, sum(weights)
        for place in order:
            chance, left = chance * weights[place] / left, left - weights[place]
        chances[list(order)] += chance
    return chances


def weight(plausibility, confidence, share):
    """The weight of a sample by its formula."""
    typical, doubtful = 2 * (1 - share**0.5) ** 2, share
    return plausibility**2 * confidence**typical * (confidence * (1 - confidence)) ** doubtful


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sure", [True, False])
def test_samples_are_drawn_by_weight(size, sure):
    plausibility, confidence = [0.5, 0.9, 0.3, 1.0, 0.6], [0.2, 0.95, 0.25, 0.6, 0.1]
    weights = [weight(p, c, size / 5) if sure else p**2 for p, c in zip(plausibility, confidence, strict=True)]
    counts, draws = np.zeros(5), 1500
    known = torch.tensor(confidence) if sure else None
    for seed in range(draws):
        drawn = select_drawn(torch.rand(5), torch.tensor(plausibility), confidence=known, size=size, seed=seed)
        counts[drawn] += 1
    expected = inclusion(weights, size)
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts / draws - expected) < 5 * error).all()


def test_each_class_has_the_exponents_of_its_own_share():
    # Class 0 keeps one of two samples, class 1 one of eight, of which the last six are implausible.
    plausibility = torch.tensor([1.0, 1.0] + [1.0, 1.0] + [0.0] * 6)
    confidence = torch.tensor([0.9, 0.3] * 5)
    classes = torch.tensor([0, 0] + [1] * 8)
    draws = 1500
    counts = np.zeros(10)
    for seed in range(draws):
        drawn = select_drawn(torch.ones(10), plausibility, classes, confidence=confidence, per_class=1, seed=seed)
        counts[drawn] += 1
    for first, share in ((0, 1 / 2), (2, 1 / 8)):
        odds = weight(1, 0.9, share) / weight(1, 0.3, share)
        expected = odds / (1 + odds)
        assert abs(counts[first] / draws - expected) < 5 * (expected * (1 - expected) / draws) ** 0.5


def test_where_all_labels_are_plausible_a_draw_is_random():
    counts, draws = np.zeros(20), 1000
    for seed in range(draws):
        counts[select_drawn(torch.linspace(-1, 1, 20), torch.ones(20), size=5, seed=seed)] += 1
    assert (np.abs(counts / draws - 1 / 4) < 5 * (1 / 4 * 3 / 4 / draws) ** 0.5).all()


@pytest.mark.parametrize("confidence", [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [-3.0, 7.0, 0.5, 1.0], [NAN] * 4])
def test_confidence_keeps_no_plausible_sample_out(confidence):
    plausibility = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for seed in range(20):
        drawn = select_drawn(torch.rand(4), plausibility, confidence=torch.tensor(confidence), size=3, seed=seed)
        assert drawn.tolist() == [0, 1, 2]


def threshold_of(scores):
    """The threshold from its definition; None if two are equally good, since rounding then decides."""
    negative = (scores < 0).mean()
    splits = {
        t: scores[scores <= t].var() * (scores <= t).sum() + scores[scores > t].var() * (scores > t).sum()
        for t in set(scores) - {scores.max()}
    }
    if negative == 0 or not splits:
        return 0.0
    best = sorted(splits, key=splits.get)
    if len(best) > 1 and splits[best[1]] - splits[best[0]] < 1e-9:
        return None
    return max(0.0, best[0] * min(1.0, 10 * negative))


@quick
@given(st.lists(st.one_of(st.floats(-1, 1, width=32), st.just(NAN)), min_size=1, max_size=40))
def test_a_threshold_follows_from_the_scores(values):
    scores = torch.tensor(values)
    known = scores[~scores.isnan()].double().numpy()
    threshold = threshold_of(known) if len(known) else 0.0
    assume(threshold is not None)
    above = above_threshold(scores)
    assert above.isnan().tolist() == scores.isnan().tolist()
    assert above.nan_to_num(9).tolist() == [9 if math.isnan(v) else float(v > threshold) for v in scores.tolist()]


@quick
@given(
    st.lists(
        st.tuples(
            st.one_of(st.floats(-1, 1, width=32), st.just(NAN)),
            st.one_of(st.sampled_from([0.0, 1.0]), st.floats(2**-10, 1, width=32), st.just(NAN)),
            st.sampled_from(LABELS[:3]),
        ),
        min_size=1,
        max_size=30,
    ),
    st.floats(0.05, 1),
    st.integers(0, 5),
)
def test_of_each_class_the_drawn_come_first_and_then_the_best(samples, fraction, seed):
    scores, plausibility, classes = (torch.tensor(column) for column in zip(*samples, strict=True))
    size = max(1, int(fraction * int((~scores.isnan()).sum())))
    try:
        top = select_top(scores, classes, size=size)
    except ValueError:  # a class has too few scored samples, under any rule
        with pytest.raises(ValueError, match="scored samples than there are"):
            select_drawn(scores, plausibility, classes, size=size, seed=seed)
        return
    chosen = set(select_drawn(scores, plausibility, classes, size=size, seed=seed).tolist())
    assert Counter(classes[list(chosen)].tolist()) == Counter(classes[top].tolist())
    for label in set(classes.tolist()):
        members = [i for i in range(len(samples)) if classes[i] == label]
        eligible = {i for i in members if not math.isnan(scores[i]) and plausibility[i] > 0}
        kept = chosen & set(members)
        if len(kept) <= len(eligible):
            assert kept <= eligible
        else:
            others = [i for i in members if i not in eligible and not math.isnan(scores[i])]
            others.sort(key=lambda i: (-float(scores[i]), i))
            assert kept == eligible | set(others[: len(kept) - len(eligible)])


def test_a_draw_follows_its_seed_and_touches_no_other():
    scores, plausibility = torch.rand(200), torch.rand(200)
    state = torch.get_rng_state()
    first, again, other = (select_drawn(scores, plausibility, size=50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"plausibility": torch.ones(4)}, ValueError, r"must have the shape of scores, \[3\], got \[4\]"),
        ({"plausibility": [0.1, 0.2, 0.3]}, TypeError, "plausibility must be a floating point tensor, got list"),
        ({"confidence": torch.ones(4)}, ValueError, r"confidence must have the shape of scores, \[3\], got \[4\]"),
        (
            {"confidence": torch.ones(3).long()},
            TypeError,
            "confidence must be a floating point tensor, got torch.int64",
        ),
        ({"scores": [0.1, 0.2, 0.3]}, TypeError, "scores must be a floating point tensor, got list"),
        ({"seed": 0.5}, TypeError, "seed must be a whole number, got 0.5"),
        ({"seed": True}, TypeError, "seed must be a whole number, got True"),
        ({"size": 4}, ValueError, "more than the 3 samples"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_draw_raise(changes, error, message):
    arguments = {"scores": torch.rand(3), "plausibility": torch.rand(3), "size": 1, **changes}
    with pytest.raises(error, match=message):
        select_drawn(arguments.pop("scores"), arguments.pop("plausibility"), **arguments)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, float])
def test_fractions_of_any_precision_count_alike(kind):
    scores = torch.rand(100_001)
    assert len(select_top(scores, fraction=kind(0.5))) == 50_001  # half up
    assert [len(part) for part in proportional_holdout([0] * 100_001, kind(0.5))] == [50_000, 50_001]


def test_seeds_of_numpy_are_seeds_and_others_are_refused():
    classes = [0, 1] * 20
    for part, expected in zip(
        proportional_holdout(classes, 0.5, seed=np.int64(3)), proportional_holdout(classes, 0.5, seed=3), strict=True
    ):
        assert torch.equal(part, expected)
    for seed in (0.5, True, "3"):
        with pytest.raises(TypeError, match="seed must be a whole number"):
            proportional_holdout(classes, 0.5, seed=seed)
    with pytest.raises(ValueError, match="seed must fit into 64 bits"):
        select_drawn(torch.rand(4), torch.ones(4), size=2, seed=2**64)


@pytest.mark.parametrize("empty", [[], torch.empty(0, dtype=torch.int64)])
def test_a_holdout_of_nothing_is_refused(empty):
    with pytest.raises(ValueError, match="classes is empty"):
        proportional_holdout(empty, 0.5)
