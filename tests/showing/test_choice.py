from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import cld_oracle, losses
from scipy.stats import spearmanr

from lightning_cld import CLDScores, LossTrajectories
from lightning_cld.showing import choice
from lightning_cld.showing.choice import (
    agreement,
    by_mean_score,
    check_same_run,
    counted,
    extremes,
    positions_of,
    sampled,
    shown_classes,
)

NAN = float("nan")


def test_classes_are_ordered_by_the_mean_of_what_is_scored():
    made = CLDScores([0.9, 0.1, NAN, 0.4, NAN, -1.0, 0.6], [2, 0, 0, 7, 3, -1, 7])
    assert by_mean_score(made) == [0, 7, 2, 3]
    assert by_mean_score(CLDScores([0.1, 0.2])) == [0]


def test_of_many_classes_those_with_the_lowest_means_are_shown():
    made = CLDScores(torch.linspace(1, -1, 12), torch.arange(12))
    assert shown_classes(made, None) == (list(range(2, 12)), 2)
    assert shown_classes(made, [5, 1]) == ([5, 1], 0)
    assert shown_classes(CLDScores([0.1, 0.2], [4, 9]), None) == ([4, 9], 0)


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([0, 3, 12], ValueError, r"Can't show classes 3, 12: the scores are of classes 0, 1\."),
        ([], ValueError, r"There is no class to show: the scores are of classes 0, 1\."),
        ([0.5], TypeError, "float"),
    ],
)
def test_classes_that_there_are_not_raise(classes, error, message):
    with pytest.raises(error, match=message):
        shown_classes(CLDScores([0.1, 0.2], [0, 1]), classes)


def test_extremes_are_the_best_and_worst_of_a_class_and_no_sample_is_both():
    made = CLDScores([0.3, 0.9, NAN, -0.5, 0.1, 0.9, 0.0], [1, 1, 1, 1, 1, 0, -1])
    assert positions_of(made, 1).tolist() == [0, 1, 2, 3, 4]
    assert [part.tolist() for part in extremes(made, 1, 2)] == [[1, 0], [3, 4]]
    assert [part.tolist() for part in extremes(made, 1, 9)] == [[1, 0], [3, 4]]
    assert [part.tolist() for part in extremes(made, 0, 3)] == [[5], []]
    assert [part.tolist() for part in extremes(CLDScores([NAN, 0.2], [0, 1]), 0, 3)] == [[], []]


CLASSES, VAL_CLASSES = torch.arange(60) % 3, torch.arange(12) % 3


def walks(rows=9, samples=60, seed=3):
    generator = np.random.default_rng(seed)
    return (np.cumsum(generator.normal(size=(rows, n)), axis=0).astype(np.float32) for n in (samples, 12))


@pytest.mark.parametrize("one_class", [False, True])
def test_agreement_is_that_of_scores_of_every_cutoff_with_the_last(one_class):
    train, val = walks()
    groups, val_groups = (CLASSES * 0, VAL_CLASSES * 0) if one_class else (CLASSES, VAL_CLASSES)
    classes = (None, None) if one_class else (CLASSES, VAL_CLASSES)
    epochs, correlations, overlaps = agreement(LossTrajectories(train, val, *classes), 0.2)
    assert epochs == [3, 4, 5, 6, 7, 8]
    labels = groups.unique().tolist()
    final = cld_oracle(train, val, groups, val_groups)

    def coreset(values):
        kept = 12 // len(labels)
        own = ([i for i in np.argsort(-values) if groups[i] == c][:kept] for c in labels)
        return {int(i) for part in own for i in part}

    for epoch, correlation, overlap in zip(epochs, correlations, overlaps, strict=True):
        values = cld_oracle(train[: epoch + 1], val[: epoch + 1], groups, val_groups)
        of_classes = [spearmanr(values[groups == c], final[groups == c]).statistic for c in labels]
        assert correlation == pytest.approx(np.mean(of_classes), abs=1e-3)  # float32 may swap close scores
        assert overlap == pytest.approx(len(coreset(values) & coreset(final)) / 12)
    assert (correlations[-1], overlaps[-1]) == (pytest.approx(1), 1)


def test_agreement_leaves_out_positions_that_are_not_in_use():
    train, val = walks()
    classes = CLASSES.where(torch.arange(60) < 30, -1)
    expected = agreement(LossTrajectories(train[:, :30], val, CLASSES[:30], VAL_CLASSES), 0.2)
    assert agreement(LossTrajectories(train, val, classes, VAL_CLASSES), 0.2) == expected


def test_agreement_at_a_cutoff_without_scores_is_not_known():
    train, val = walks()
    train[2] = val[2] = NAN
    epochs, correlations, overlaps = agreement(LossTrajectories(train, val, CLASSES, VAL_CLASSES), 0.2)
    assert epochs == [3, 4, 5, 6, 7, 8]
    known = [epoch >= 5 for epoch in epochs]  # from epoch 5 on there are three differences: 0-1, 3-4, 4-5
    assert (~np.isnan(correlations)).tolist() == (~np.isnan(overlaps)).tolist() == known


def test_agreement_where_a_coreset_alone_is_missing_keeps_the_correlation():
    train, val = walks()
    # Up to epoch 4 only one sample per class has enough differences, later all have.
    train[1, 3:] = NAN
    epochs, correlations, overlaps = agreement(LossTrajectories(train, val, CLASSES, VAL_CLASSES), 0.2)
    assert np.isnan(overlaps).tolist() == [epoch < 5 for epoch in epochs]
    assert len(correlations) == len(overlaps) == len(epochs)


def test_agreement_of_a_long_timeline_is_computed_at_twenty_cutoffs():
    train, val = walks(rows=100)
    epochs = agreement(LossTrajectories(train, val), 0.2)[0]
    assert len(epochs) == len(set(epochs)) == 20
    assert (epochs[0], epochs[-1]) == (3, 99)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (CLDScores(torch.rand(59), CLASSES[:59]), r"59 scores, but losses of 60 samples"),
        (CLDScores(torch.rand(60), CLASSES.flip(0)), "their classes differ"),
        (CLDScores(torch.rand(60)), "their classes differ"),
    ],
)
def test_scores_of_another_train_set_are_refused(scores, message):
    trajectories = LossTrajectories(*walks(), CLASSES, VAL_CLASSES)
    check_same_run(trajectories.score(), trajectories)
    with pytest.raises(ValueError, match=message):
        check_same_run(scores, trajectories)


# Agreement from samples


def large(samples=9_000, classes=7):
    of_train = torch.arange(samples) % classes
    of_train[: samples // 2] = 0  # one class is larger than the others together
    of_train[::10] = -1
    return LossTrajectories(losses(12, samples), losses(12, 70, seed=1), of_train, torch.arange(70) % classes)


def test_samples_are_drawn_from_each_class_in_proportion_and_are_always_the_same(monkeypatch):
    monkeypatch.setattr(choice, "MOST_SAMPLES", 1_500)
    whole = large()
    part, words = sampled(whole, 0.1)
    assert words == "from 1,500 of 8,100 samples"
    shares = torch.bincount(whole.train_classes[whole.train_classes >= 0]) * 1_500 / 8_100
    assert ((torch.bincount(part.train_classes) - shares).abs() < 1).all()
    again, _ = sampled(large(), 0.1)
    assert torch.equal(part.train_losses, again.train_losses)
    columns = {tuple(column) for column in whole.train_losses.T.tolist()}
    assert {tuple(column) for column in part.train_losses.T.tolist()} < columns
    assert (part.epochs, part.references) == (whole.epochs, whole.references)


@pytest.mark.parametrize(("most", "fraction"), [(8_100, 0.1), (1_500, 0.01)], ids=["few samples", "few are kept"])
def test_what_is_small_is_not_sampled(monkeypatch, most, fraction):
    monkeypatch.setattr(choice, "MOST_SAMPLES", most)
    whole = large()
    assert sampled(whole, fraction) == (whole, "")


def test_agreement_from_samples_is_near_that_of_all(monkeypatch):
    whole = large(40_000, 4)
    _, correlations, overlaps = agreement(whole, 0.1)
    monkeypatch.setattr(choice, "MOST_SAMPLES", 8_000)
    _, of_some, overlaps_of_some = agreement(sampled(whole, 0.1)[0], 0.1)
    assert of_some == pytest.approx(correlations, abs=0.02)
    assert overlaps_of_some == pytest.approx(overlaps, abs=0.06)


def test_classes_are_counted_with_their_scores():
    scores = CLDScores([0.5, -0.25, float("nan"), float("nan"), 0.9], [3, 3, 3, 7, -1])
    first, second = counted(scores)
    assert first == (3, 3, 0.125, 1, 1)
    assert second[:2] == (7, 1)
    assert math.isnan(second.mean)
    assert second[3:] == (0, 1)
