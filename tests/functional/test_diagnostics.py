from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import losses
from scipy.stats import pearsonr, spearmanr

from lightning_cld import select_top
from lightning_cld.functional.diagnostics import (
    RELIABLE,
    alignment,
    best_tenth,
    chance_alignment,
    half_of,
    overlap,
    rank_agreement,
    reference_reliability,
)

NAN = float("nan")
LABELS = np.array([0, 3, 700])


def scored(samples=90, seed=0):
    """Scores with unscored samples, and classes with unused positions."""
    generator = np.random.default_rng(seed)
    values = generator.uniform(-1, 1, samples).astype(np.float32)
    values[generator.choice(samples, 5, replace=False)] = NAN
    classes = LABELS[generator.integers(0, 3, samples)]
    classes[:7] = -1
    return values, classes


# Alignment


def test_alignment_is_the_mean_of_the_best_and_of_all():
    values, classes = scored()
    found = alignment(torch.from_numpy(values), torch.from_numpy(classes))
    used = classes >= 0
    budget = {c: [] for c in LABELS}
    chosen = best_tenth(torch.from_numpy(values), torch.from_numpy(classes)).numpy()
    for position in chosen:
        budget[classes[position]].append(values[position])
    assert len(chosen) == round(0.1 * used.sum())
    for place, c in enumerate(LABELS):
        own = values[classes == c].astype(np.float64)
        best = np.sort(own[~np.isnan(own)])[::-1][: len(budget[c])]
        assert sorted(budget[c]) == sorted(best.tolist())
        assert found.classes[place] == c
        assert found.kept_of_class[place].item() == pytest.approx(best.mean())
        assert found.everything_of_class[place].item() == pytest.approx(np.nanmean(own))
    assert found.kept == pytest.approx(values[chosen].astype(np.float64).mean())
    assert found.everything == pytest.approx(np.nanmean(values[used].astype(np.float64)))


def test_alignment_of_a_class_without_a_share_of_the_tenth_is_not_known():
    values = torch.linspace(0, 1, 20)
    classes = torch.tensor([0] * 18 + [1, 2])
    found = alignment(values, classes)  # a tenth is two samples, for three classes
    assert found.kept_of_class.isnan().tolist() == [False, True, True]
    assert not found.everything_of_class.isnan().any()


@pytest.mark.parametrize("values", [[0.5] * 4, [NAN] * 20], ids=["few", "unscored"])
def test_alignment_of_less_than_a_tenth_raises(values):
    with pytest.raises(ValueError, match=r"too few samples are scored for a tenth"):
        alignment(torch.tensor(values), None)


@pytest.mark.parametrize("differences", [3, 8, 30])
def test_chance_is_what_unrelated_samples_reach(differences):
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(2, differences, 40_000))
    correlations = np.sort(pearsonr(x, y, axis=0).statistic)
    assert chance_alignment(differences) == pytest.approx(correlations[-4_000:].mean(), abs=0.01)


def test_chance_is_the_same_every_time_and_draws_nothing_from_the_global_state():
    state = torch.get_rng_state()
    assert chance_alignment(5) == chance_alignment(5)
    assert torch.equal(torch.get_rng_state(), state)


# Settling


def test_overlap_is_a_share_of_what_was_chosen():
    assert overlap(torch.tensor([1, 2, 3, 4]), torch.tensor([4, 2, 9, 8])) == 0.5


@pytest.mark.parametrize(("epochs", "epoch", "expected"), [([0, 2, 4, 5], 10, 5), ([0, 2, 4], 7, 2), ([3, 4], 5, None)])
def test_half_is_the_newest_checkpoint_that_is_not_past_it(epochs, epoch, expected):
    assert half_of(epochs, epoch) == expected


# Reliability of the references


def val_losses(samples, noise, rows=13, seed=0):
    generator = np.random.default_rng(seed)
    falling = 2.0 * np.exp(-np.arange(rows) / 4.0)[:, None]
    return torch.from_numpy((falling + noise * generator.normal(size=(rows, samples))).astype(np.float32))


def test_reliability_is_the_correlation_of_references_of_halves():
    val, classes = val_losses(400, 1.0), torch.from_numpy(LABELS)[torch.arange(400) % 3]
    found = reference_reliability(val, classes, torch.from_numpy(LABELS))
    generator = np.random.default_rng(5)
    for place, c in enumerate(LABELS):
        own = val[:, classes == int(c)].double().numpy()
        expected = []
        for _ in range(400):  # many random halves, different from the library's
            order = generator.permutation(own.shape[1])
            half = own.shape[1] // 2
            expected.append(
                pearsonr(
                    np.diff(own[:, order[:half]].mean(axis=1)), np.diff(own[:, order[half:]].mean(axis=1))
                ).statistic
            )
        assert found[place].item() == pytest.approx(np.mean(expected), abs=4 * np.std(expected) / np.sqrt(10))


def test_reliability_of_two_samples_is_their_correlation():
    val = losses(8, 4)
    found = reference_reliability(val, torch.tensor([0, 5, 5, 0]), torch.tensor([0, 5]))
    x = np.diff(val.double().numpy(), axis=0)
    expected = [pearsonr(x[:, 0], x[:, 3]).statistic, pearsonr(x[:, 1], x[:, 2]).statistic]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


def test_reliability_grows_with_the_samples_and_falls_with_the_noise():
    one = torch.zeros(1, dtype=torch.int64)

    def found(samples, noise):
        return reference_reliability(val_losses(samples, noise), one.expand(samples), one).item()

    assert found(4, 1.0) < found(40, 1.0) < found(4000, 1.0)
    assert found(40, 0.01) > RELIABLE > found(40, 3.0)


def test_reliability_is_not_known_where_there_is_no_half_or_no_change():
    val = val_losses(8, 0.1)
    val[:, 1:3] = 0.5
    val[:4, 3:5] = torch.inf
    classes = torch.tensor([0, 1, 1, 2, 2, 3, 3, 3])
    found = reference_reliability(val, classes, torch.arange(4))
    assert found.isnan().tolist() == [True, True, True, False]


def test_reliability_leaves_out_what_was_not_logged_and_classes_not_asked_for():
    val = val_losses(6, 0.3)
    classes = torch.tensor([0, 0, 1, 1, 9, 9])
    holed = torch.cat([val[:5], torch.full((1, 6), NAN), val[5:]])
    found = reference_reliability(holed, classes, torch.tensor([1]))
    x = np.diff(holed.double().numpy(), axis=0)
    logged = ~np.isnan(x[:, 2])
    assert found.tolist() == [pytest.approx(pearsonr(x[logged, 2], x[logged, 3]).statistic, abs=1e-6)]


def test_reliability_is_the_same_every_time_and_draws_nothing_from_the_global_state():
    state = torch.get_rng_state()
    arguments = val_losses(40, 1.0), torch.arange(40) % 4, torch.arange(4)
    assert torch.equal(reference_reliability(*arguments), reference_reliability(*arguments))
    assert torch.equal(torch.get_rng_state(), state)


# Rank agreement


@pytest.mark.parametrize("decimals", [8, 1], ids=["distinct", "ties"])
def test_agreement_is_spearmans_within_classes(decimals):
    values, classes = scored()
    others = np.clip(values + np.random.default_rng(9).normal(size=len(values)) / 3, -1, 1).astype(np.float32)
    others[20] = NAN
    values, others = values.round(decimals), others.round(decimals)
    both = ~np.isnan(values) & ~np.isnan(others)
    expected, weights = [], []
    for c in LABELS:
        own = both & (classes == c)
        expected.append(spearmanr(values[own], others[own]).statistic)
        weights.append(own.sum())
    found = rank_agreement(*map(torch.from_numpy, (values, others, classes)))
    assert found == pytest.approx(np.average(expected, weights=weights), abs=1e-9)
    everything = rank_agreement(torch.from_numpy(values), torch.from_numpy(others), None)
    assert everything == pytest.approx(spearmanr(values[both], others[both]).statistic, abs=1e-9)


def test_agreement_tells_scores_apart_that_differ_in_the_last_bit_of_a_late_class():
    above = np.nextafter(np.float32(0.9), np.float32(1))
    values = torch.tensor([0.9, float(above)] * 1000)
    classes = torch.arange(2000) // 2
    assert rank_agreement(values, values, classes) == 1.0
    assert rank_agreement(values, values.flip(0), classes) == -1.0
    tiny = torch.tensor([0.5, 1e-16, 2e-16, 3e-16])
    assert rank_agreement(tiny, tiny, torch.tensor([0, 1, 1, 1])) == 1.0


def test_agreement_of_nothing_is_not_known():
    assert np.isnan(rank_agreement(torch.tensor([NAN, 0.2]), torch.tensor([0.1, NAN]), None))
    assert np.isnan(rank_agreement(torch.tensor([0.2, 0.2]), torch.tensor([0.1, 0.3]), None))


def test_the_best_tenth_is_that_of_select_top_among_positions_in_use():
    values, classes = scored()
    used = np.flatnonzero(classes >= 0)
    expected = used[select_top(torch.from_numpy(values[used]), torch.from_numpy(classes[used]), fraction=0.1)]
    assert best_tenth(torch.from_numpy(values), torch.from_numpy(classes)).tolist() == expected.tolist()
