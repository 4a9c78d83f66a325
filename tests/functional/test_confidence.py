from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import assert_scores, confidence_oracle, losses

from lightning_cld.functional import confidence, early_confidence
from lightning_cld.functional.confidence import mean_loss, with_row

NAN, INF = float("nan"), float("inf")


def case(rows=12, lowest=8):
    """Losses of 30 train and 8 validation samples; the mean validation loss is lowest in one row."""
    val = losses(rows, 8, seed=1) + 0.5 * (torch.arange(rows) - lowest)[:, None].abs()
    return losses(rows, 30), val


def assert_early(train, val):
    for found, expected in zip(early_confidence(train, val), confidence_oracle(train, val), strict=True):
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 12, 1000])
@pytest.mark.parametrize("lowest", [0, 0.6, 1.0])
def test_agrees_with_its_definition(rows, lowest):
    assert_early(*case(rows, int(lowest * (rows - 1))))


def test_what_comes_after_the_lowest_validation_loss_does_not_count():
    train, val = case()
    before = early_confidence(train, val)
    train[9:], val[9:] = 1e-3, val[9:] + 5
    train[10, 3] = val[10, 1] = INF
    val[9:, 2] = NAN
    for found, expected in zip(early_confidence(train, val), before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("rows", "least"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 2), (8, 4), (15, 4), (16, 8), (20, 8)])
def test_more_than_a_quarter_of_the_rows_count(rows, least):
    train, val = losses(rows, 30), torch.arange(1.0, rows + 1)[:, None].expand(rows, 8)  # lowest at first
    np.testing.assert_allclose(
        early_confidence(train, val)[0].numpy(), np.exp(-train[:least].double().numpy()).mean(axis=0), atol=1e-6
    )


def test_of_equally_low_rows_the_first_decides():
    train, val = case()
    val[10] = val[8]
    expected = confidence_oracle(train[:9], val[:9])[0]
    np.testing.assert_allclose(early_confidence(train, val)[0].numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("train_holes", [[], [0], [2, 3], [8], [11]], ids=str)
@pytest.mark.parametrize("val_holes", [[], [0], [3, 5], [8], [11]], ids=str)
def test_only_rows_that_both_sides_have_count(train_holes, val_holes):
    train, val = case()
    train[train_holes], val[val_holes] = NAN, NAN
    assert_early(train, val)


def test_single_losses_that_were_not_logged_are_left_out_and_infinite_ones_unknown():
    train, val = case()
    train[2, 4] = train[3, 4] = train[8, 5] = val[1, 2] = NAN
    train[:, 6] = val[:, 7] = NAN
    train[4, 7], train[5, 8], val[0, 3] = INF, -INF, INF
    train[5, 9], train[6, 9] = NAN, INF
    assert_early(train, val)
    assert early_confidence(train, val)[0].isnan().nonzero().flatten().tolist() == [6, 7, 8, 9]


def test_a_row_with_an_infinite_validation_loss_is_never_the_lowest():
    for infinite in (INF, -INF):
        train, val = case()
        val[8, 0] = infinite  # the lowest otherwise
        rest = torch.cat([val[:8], val[9:]])
        rows = int(torch.tensor([r if r < 8 else r + 1 for r in [int(rest.double().mean(dim=1).argmin())]])) + 1
        expected = np.exp(-train[:rows].double().numpy()).mean(axis=0)
        np.testing.assert_allclose(early_confidence(train, val)[0].numpy(), expected, rtol=0, atol=1e-6)


def test_if_no_mean_is_finite_the_first_rows_count_and_without_rows_nothing_is_known():
    train, val = case()
    expected = (-train[:4]).exp().mean(dim=0)  # of twelve rows four count at least
    torch.testing.assert_close(early_confidence(train, val.where(torch.arange(8) > 0, INF))[0], expected)
    assert all(found.isnan().all() for found in early_confidence(train, torch.full_like(val, NAN)))


def test_losses_below_zero_give_what_the_definition_says():
    train, val = case()
    found, expected = early_confidence(train - 3, val)[0], confidence_oracle(train - 3, val)[0]
    assert found.max() > 1
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_losses_with_gradients_are_taken(dtype):
    train, val = (part.to(dtype) for part in case())
    expected = confidence_oracle(train, val)[0]
    found, of_val = early_confidence(train.requires_grad_(), val.requires_grad_())
    assert not found.requires_grad
    assert not of_val.requires_grad
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-6)


def test_slices_change_nothing(monkeypatch):
    train, val = case()
    train[2, 4], train[5, 8] = NAN, INF
    expected = early_confidence(train, val)
    monkeypatch.setattr(confidence, "_SLICE", 7)
    for found, whole in zip(early_confidence(train, val), expected, strict=True):
        torch.testing.assert_close(found, whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((case()[0].tolist(), case()[1]), TypeError, "train_losses must be a floating point tensor"),
        ((case()[0], case()[1].long()), TypeError, "val_losses must be a floating point tensor"),
        ((case()[0][0], case()[1]), ValueError, "train_losses must have shape"),
        ((case()[0], case()[1][:, :0]), ValueError, "val_losses must have shape"),
        ((case()[0][1:], case()[1]), ValueError, "row for each checkpoint, got 11 and 12 rows"),
        ((case()[0][:0], case()[1][:0]), ValueError, "row for each checkpoint, got 0 and 0 rows"),
    ],
)
def test_bad_losses_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        early_confidence(*arguments)


# One row at a time


@pytest.mark.parametrize("rows", [1, 12, 1000])
def test_the_mean_goes_on_row_by_row(rows):
    train, _ = case(rows)
    mean = torch.zeros(30)
    for number, row in enumerate(train):
        before = mean.clone()
        updated = with_row(mean, torch.tensor(number), row)
        assert torch.equal(mean, before)
        mean = updated
    assert_scores(mean, np.exp(-train.double().numpy()).mean(axis=0))


@pytest.mark.parametrize("loss", [INF, -INF, NAN])
def test_a_loss_that_is_missing_or_not_finite_is_not_forgotten(loss):
    train, _ = case()
    train[3, 7] = loss
    mean = torch.zeros(30)
    for number, row in enumerate(train):
        mean = with_row(mean, torch.tensor(number), row)
    assert mean.isnan().nonzero().flatten().tolist() == [7]


def test_the_mean_loss_of_a_row_is_infinite_if_it_is_not_finite():
    assert mean_loss(torch.tensor([1.0, NAN, 2.0])) == 1.5
    for row in ([NAN, NAN], [INF, 1.0], [-INF, 1.0], [INF, -INF]):
        assert mean_loss(torch.tensor(row)) == INF
