from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import assert_scores, held_out_oracle, losses

from lightning_cld.functional import held_out
from lightning_cld.functional.held_out import held_out_scores, no_moments, scores_from, with_difference

NAN, INF = float("nan"), float("inf")
CLASSES = torch.tensor([0, 3, 700, 0])[torch.arange(24) % 4]


def case(rows=10, seed=0):
    return losses(rows, 24, seed)


def from_moments(val, classes):
    """The same from moments, whose references are computed here."""
    val, size = val.double(), torch.stack([(classes == c).sum() for c in classes])
    reference = torch.stack([val[:, classes == c].mean(dim=1) for c in classes], dim=1).diff(dim=0)
    moments = no_moments(len(classes))
    for count, difference in enumerate(val.diff(dim=0)):
        offset = reference[count] - (reference[:count].mean(dim=0) if count else 0)
        everywhere = torch.ones(len(classes), dtype=torch.bool)
        moments = with_difference(moments, difference, offset, torch.full((len(classes),), count), everywhere)
    norm = (reference - reference.mean(dim=0)).square().sum(dim=0).sqrt()
    return scores_from(moments, norm, size.double(), torch.full((len(classes),), len(reference)))


@pytest.mark.parametrize("make", [held_out_scores, from_moments])
@pytest.mark.parametrize("rows", [4, 10, 200])
def test_agrees_with_leaving_out_one_after_another(rows, make):
    val = case(rows)
    found = make(val, CLASSES)
    assert_scores(found, held_out_oracle(val, CLASSES))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("make", [held_out_scores, from_moments])
@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_a_large_offset_does_no_harm(offset, make):
    val = case(60) + offset
    assert_scores(make(val, CLASSES), held_out_oracle(val, CLASSES))


@pytest.mark.parametrize("make", [held_out_scores, from_moments])
def test_two_samples_are_scored_against_each_other_and_one_is_not(make):
    val, classes = case(), torch.tensor([0] + [1] * 2 + [2] * 21)
    found = make(val, classes)
    pair = np.corrcoef(np.diff(val[:, 1:3].double().numpy(), axis=0).T)[0, 1]
    assert found[0].isnan()
    np.testing.assert_allclose(found[1:3].numpy(), pair, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [held_out_scores, from_moments])
def test_samples_or_others_that_do_not_vary_are_unscored(make):
    val = case(40)
    val[:, 0] = 0.7  # constant
    val[:, 1] = torch.arange(40) * 0.25  # changes by the same each time, the only other of class 9
    val[0, 1] = 1e-15  # varies by less than float64 can tell from rounding
    classes = CLASSES.clone()
    classes[[1, 2]] = 9
    found = make(val, classes)
    assert_scores(found, held_out_oracle(val, classes))
    assert found.isnan().nonzero().flatten().tolist() == [0, 1, 2]


def test_it_is_not_what_a_reference_with_the_sample_gives():
    val, classes = case(), torch.arange(24) % 12  # two of each
    own = np.array(
        [np.corrcoef(val[:, i].diff(), val[:, classes == i % 12].mean(dim=1).diff())[0, 1] for i in range(24)]
    )
    assert (own > held_out_scores(val, classes).numpy() + 0.01).mean() > 0.8


@pytest.mark.parametrize("holes", [[0], [9], [4, 5], [2, 6]], ids=str)
def test_no_difference_spans_a_row_that_was_not_logged(holes):
    val = case()
    val[holes] = NAN
    assert_scores(held_out_scores(val, CLASSES), held_out_oracle(val, CLASSES))


def test_the_others_are_those_that_were_logged():
    val = case(12)
    val[3, [0, 4]] = val[5, 1] = val[8, 8] = NAN
    val[6, CLASSES == 3] = NAN
    val[6, 1] = 0.5
    assert_scores(held_out_scores(val, CLASSES), held_out_oracle(val, CLASSES))


def test_an_infinite_loss_makes_its_class_unscored():
    val = case()
    val[4, 1] = INF
    assert torch.equal(held_out_scores(val, CLASSES).isnan(), CLASSES == 3)


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("make", [held_out_scores, from_moments])
def test_fewer_than_3_differences_give_no_score(rows, make):
    assert make(case(rows), CLASSES).isnan().all()


def test_slices_and_gradients_change_nothing(monkeypatch):
    val = case()
    val[3, 0] = NAN
    expected = held_out_scores(val, CLASSES)
    monkeypatch.setattr(held_out, "_SLICE_ELEMENTS", 30)
    assert torch.equal(held_out_scores(val.clone().requires_grad_(), CLASSES), expected)


def test_moments_stay_where_a_difference_does_not_count():
    moments = with_difference(no_moments(2), *torch.rand(3, 2).double(), torch.tensor([True, True]))
    before = moments.clone()
    later = with_difference(moments, *torch.rand(3, 2).double(), torch.tensor([True, False]))
    assert torch.equal(moments, before)
    assert torch.equal(later[:, 1], moments[:, 1])
    assert not torch.equal(later[:, 0], moments[:, 0])


@pytest.mark.parametrize("make", [held_out_scores, from_moments])
@pytest.mark.parametrize("others", [2, 5, 13, 36, 97])
def test_where_the_others_never_change_there_is_nothing_to_follow(make, others):
    val = torch.full((10, others + 1), 0.5)
    val[:, 0] = case(10)[:, 0]
    assert make(val, torch.zeros(others + 1, dtype=torch.int64)).isnan().all()
