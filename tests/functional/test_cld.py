from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_scores, cld_oracle, losses

from lightning_cld.functional import cld
from lightning_cld.functional.checks import distinct
from lightning_cld.functional.cld import cld_scores, scores_at

NAN, INF = float("nan"), float("inf")
CLASSES, VAL_CLASSES = torch.arange(30) % 3, torch.arange(12) % 3


def case(rows=10, train_classes=CLASSES, val_classes=VAL_CLASSES):
    """Losses of 30 train and 12 validation samples, and their classes."""
    return losses(rows, len(train_classes)), losses(rows, len(val_classes), seed=1), train_classes, val_classes


# The score


@pytest.mark.parametrize("rows", [4, 5, 10, 60])
def test_agrees_with_the_definition(rows):
    arguments = case(rows)
    assert_scores(cld_scores(*arguments), cld_oracle(*arguments))


def test_an_offset_that_all_losses_share_does_no_harm():
    train, val, *classes = case()
    train, val = train + 1e3, val + 1e3
    assert_scores(cld_scores(train, val, *classes), cld_oracle(train, val, *classes))


@pytest.mark.parametrize("slope", [1e2, 1e4, 1e6])
def test_a_steady_fall_far_larger_than_what_varies_does_no_harm(slope):
    train, val, *classes = case()
    train = train.double() - slope * torch.arange(10)[:, None]
    assert_scores(cld_scores(train, val, *classes), cld_oracle(train, val, *classes))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_huge_and_tiny_losses_score_like_others(scale):
    train, val, *classes = case()
    train, val = train * scale, val * scale
    expected = cld_oracle(train, val, *classes)
    assert np.isfinite(expected).all()
    assert_scores(cld_scores(train, val, *classes), expected)


@pytest.mark.parametrize("scale", [1e200, 1e-160, 1e-200])
def test_float64_losses_whose_squares_leave_the_range_score_like_others(scale):
    train, val, *classes = case()
    expected = cld_oracle(train, val, *classes)
    assert_scores(cld_scores(train.double() * scale, val.double() * scale, *classes), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype_is_scored_at_its_own_values(dtype):
    train, val, *classes = case()
    train, val = train.to(dtype), val.to(dtype)
    assert_scores(cld_scores(train, val, *classes), cld_oracle(train, val, *classes))


def test_non_contiguous_losses_are_read_right():
    train, val, *classes = case(rows=20)
    train, val = train.T.contiguous().T[::2], val.T.contiguous().T[::2]
    assert not train.is_contiguous()
    assert_scores(cld_scores(train, val, *classes), cld_oracle(train, val, *classes))


def test_no_classes_are_one_class():
    train, val, *_ = case()
    assert_scores(cld_scores(train, val), cld_oracle(train, val))
    one = cld_scores(train, val, torch.full((30,), 5), torch.full((12,), 5))
    assert torch.equal(cld_scores(train, val), one)


def test_class_labels_need_not_be_consecutive():
    labels = torch.tensor([3, 700, 41])
    arguments = case(train_classes=labels[CLASSES], val_classes=labels[VAL_CLASSES.flip(0)])
    assert_scores(cld_scores(*arguments), cld_oracle(*arguments))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_classes_of_every_integer_dtype_are_accepted(dtype):
    train, val, train_classes, val_classes = case()
    scores = cld_scores(train, val, train_classes.to(dtype), val_classes.to(dtype))
    assert_scores(scores, cld_oracle(train, val, train_classes, val_classes))


def test_classes_with_only_validation_samples_are_ignored():
    arguments = case(train_classes=CLASSES.clamp(max=1) * 2)
    assert_scores(cld_scores(*arguments), cld_oracle(*arguments))


def test_an_infinite_loss_of_a_class_with_only_validation_samples_is_ignored():
    train, val, train_classes, val_classes = case(train_classes=CLASSES.clamp(max=1))
    expected = cld_oracle(train, val, train_classes, val_classes)
    val[3, 2] = INF
    assert_scores(cld_scores(train, val, train_classes, val_classes), expected)


def test_scores_are_float32_one_a_sample_within_bounds():
    val = losses(10, 1)
    scores = cld_scores(torch.cat([val * factor for factor in (1, -1, 3, 0.1, -7)], dim=1).double(), val)
    assert scores.dtype == torch.float32
    assert scores.shape == (5,)
    assert scores.device == val.device
    assert scores.tolist() == [1, -1, 1, 1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_takes_no_score_out_of_bounds(dtype):
    val = losses(60, 1, seed=3).to(dtype)
    factors = torch.linspace(-3, 3, 2000, dtype=dtype)
    scores = cld_scores(val * factors, val)
    assert scores.abs().max() <= 1


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(30)), st.permutations(range(12)))
def test_the_order_of_samples_is_of_no_account(train_order, val_order):
    train, val, train_classes, val_classes = case()
    train[2, 4], train[5, 7] = NAN, INF
    expected = cld_oracle(train, val, train_classes, val_classes)[train_order]
    scores = cld_scores(
        train[:, train_order], val[:, val_order], train_classes[train_order], val_classes[list(val_order)]
    )
    assert_scores(scores, expected)


def test_the_losses_given_are_left_as_they_are():
    train, val, *classes = case()
    before = train.clone(), val.clone()
    cld_scores(train, val, *classes)
    assert torch.equal(train, before[0])
    assert torch.equal(val, before[1])


def test_losses_that_still_have_their_graph_are_scored_without_it():
    train, val, *classes = case()
    scores = cld_scores(train.requires_grad_(), val.requires_grad_(), *classes)
    assert not scores.requires_grad
    assert_scores(scores, cld_oracle(train.detach(), val.detach(), *classes))


# Unscored samples


@pytest.mark.parametrize("level", [0.0, 0.1, 2.5, 1e3])
def test_a_constant_trajectory_is_unscored(level):
    train, val, *classes = case()
    train[:, 4] = level
    scores = cld_scores(train, val, *classes)
    assert scores.isnan().nonzero().flatten().tolist() == [4]


# No slope 0.1 in float32: rounding makes those differences vary, for the oracle too.
@pytest.mark.parametrize(("slope", "dtype"), [(0.125, torch.float32), (0.125, torch.float64), (0.1, torch.float64)])
def test_a_constant_difference_is_unscored(slope, dtype):
    train, val, *classes = case()
    train = train.to(dtype)
    train[:, 4] = 3 - slope * torch.arange(10, dtype=dtype)
    scores = cld_scores(train, val, *classes)
    assert scores.isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("slope", [0.0, 0.125])
def test_a_flat_reference_leaves_its_class_unscored_and_no_other(slope):
    train, val, *classes = case()
    val[:, 1::3] = 3 - slope * torch.arange(10.0)[:, None]
    scores = cld_scores(train, val, *classes)
    assert_scores(scores, cld_oracle(train, val, *classes))
    assert torch.equal(scores.isnan(), CLASSES == 1)


@pytest.mark.parametrize("rows", [[5], [0, 9], slice(None)])
def test_a_sample_with_an_infinite_loss_is_unscored(rows):
    train, val, *classes = case()
    train[rows, 4], train[rows, 8] = INF, -INF
    scores = cld_scores(train, val, *classes)
    assert_scores(scores, cld_oracle(train, val, *classes))
    assert scores.isnan().nonzero().flatten().tolist() == [4, 8]


def test_an_infinite_loss_counts_even_where_no_difference_touches_it():
    train, val, *classes = case()
    train[0, 4], train[1, 4] = INF, NAN
    train[5, 8], val[5] = INF, NAN
    scores = cld_scores(train, val, *classes)
    assert scores.isnan().nonzero().flatten().tolist() == [4, 8]


def test_where_all_samples_are_infinite_all_are_unscored():
    train, val, *classes = case()
    train[1:] = INF
    assert cld_scores(train, val, *classes).isnan().all()


@pytest.mark.parametrize(
    ("train_holes", "val_holes"),
    [
        pytest.param([(5, 4), (6, 4), (0, 9), (9, 10)], [], id="single train losses"),
        pytest.param([(5, slice(None))], [], id="a train row"),
        pytest.param([], [(5, slice(None))], id="a validation row"),
        pytest.param([], [(0, slice(None)), (5, 1), (6, 4), (5, 7)], id="validation samples"),
        pytest.param([], [(4, slice(0, None, 3))], id="a class's validation samples"),
        pytest.param([(3, slice(None)), (7, 2)], [(3, slice(None)), (6, 0)], id="both"),
    ],
)
def test_differences_that_touch_a_loss_that_was_not_logged_are_left_out(train_holes, val_holes):
    train, val, *classes = case()
    for hole in train_holes:
        train[hole] = NAN
    for hole in val_holes:
        val[hole] = NAN
    expected = cld_oracle(train, val, *classes)
    assert np.isfinite(expected).all()
    assert_scores(cld_scores(train, val, *classes), expected)


@pytest.mark.parametrize(("logged", "scored"), [(2, False), (3, False), (4, True)])
def test_a_sample_needs_three_differences(logged, scored):
    train, val, *classes = case()
    train[logged:, 4] = NAN
    scores = cld_scores(train, val, *classes)
    assert_scores(scores, cld_oracle(train, val, *classes))
    assert bool(scores[4].isfinite()) is scored


def test_fewer_than_three_differences_in_all_raise():
    train, val, *classes = case()
    train[3:] = NAN
    with pytest.raises(ValueError, match=r"at least 3 differences.*NaN \(not logged\).*more than 2"):
        cld_scores(train, val, *classes)


# Slices and memory


@pytest.mark.parametrize("samples", [1, 7, 2**17])
@pytest.mark.parametrize("elements", [1, 70, 2**17])
def test_the_size_of_slices_is_of_no_account(monkeypatch, samples, elements):
    train, val, *classes = case()
    train[2, 4], train[5, 7], train[:, 20:26] = NAN, INF, 1.0
    monkeypatch.setattr(cld, "_SLICE_SAMPLES", samples)
    monkeypatch.setattr(cld, "_SLICE_ELEMENTS", elements)
    assert_scores(cld_scores(train, val, *classes), cld_oracle(train, val, *classes))


@pytest.mark.parametrize("logged", [0, 3])
def test_one_sample_with_enough_differences_is_enough(monkeypatch, logged):
    train, val, *classes = case()
    train[logged:, :29] = NAN
    monkeypatch.setattr(cld, "_SLICE_SAMPLES", 10)
    monkeypatch.setattr(cld, "_SLICE_ELEMENTS", 100)
    assert cld_scores(train, val, *classes).isfinite().nonzero().flatten().tolist() == [29]
    train[5, 29] = NAN  # 7 of 9 differences are left
    assert cld_scores(train, val, *classes).isfinite().nonzero().flatten().tolist() == [29]


def test_samples_of_every_slice_are_scored_right():
    rows, samples = 8, 300_000
    width = cld._SLICE_SAMPLES
    assert samples > 2 * width
    train, val, classes = losses(rows, samples), losses(rows, 12), torch.arange(samples) % 3
    train[4, width // 2 : width] = NAN
    scores = cld_scores(train, val, classes, VAL_CLASSES)
    watched = [0, 1, 7, width // 2 - 1, width // 2, width - 1, width, width + 1, 2 * width - 1, 2 * width, samples - 1]
    expected = cld_oracle(train[:, watched], val, classes[watched], VAL_CLASSES)
    assert scores.shape == (samples,)
    assert_scores(scores[watched], expected)


@pytest.mark.parametrize("labels", [[0, 1, 2], [3, 8, 41], [10**12, 5, 70], [29, 28, 27]])
def test_distinct_classes_are_sorted_and_each_sample_finds_its_own(labels):
    classes = torch.tensor(labels)[CLASSES]
    labels_found, places = distinct(classes)
    expected, inverse = np.unique(classes.numpy(), return_inverse=True)
    assert labels_found.tolist() == expected.tolist()
    assert places.tolist() == inverse.tolist()


MEMORY = """
import torch
from lightning_cld import cld_scores

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

train, val = torch.rand(60, 600_000), torch.rand(60, 500)
classes, val_classes = torch.arange(600_000) % 10, torch.arange(500) % 10
before = peak()
cld_scores(train, val, classes, val_classes)
print((peak() - before) / (train.numel() * train.element_size()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory that Linux tells")
def test_scoring_takes_little_memory_beside_the_losses():
    # VmHWM, because ru_maxrss of a child process starts at its parent's value.
    command = [sys.executable, "-c", MEMORY]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.0


# Errors

TRAIN, VAL = losses(6, 4), losses(6, 3, seed=1)
FOUR, THREE = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((TRAIN.tolist(), VAL), TypeError, r"train_losses must be a floating point tensor .*got list"),
        ((TRAIN, VAL.numpy()), TypeError, r"val_losses must be a floating point tensor .*got ndarray"),
        ((TRAIN.long(), VAL), TypeError, r"train_losses must be a floating point tensor .*got torch\.int64"),
        ((TRAIN, VAL.bool()), TypeError, r"val_losses must be a floating point tensor .*got torch\.bool"),
        ((TRAIN[0], VAL), ValueError, r"train_losses must have shape \[checkpoints, samples\].*got \[4\]"),
        ((TRAIN, VAL[None]), ValueError, r"val_losses must have shape .*got \[1, 6, 3\]"),
        ((TRAIN[:, :0], VAL), ValueError, r"train_losses .*at least one sample, got \[6, 0\]"),
        ((TRAIN, VAL[:, :0]), ValueError, r"val_losses .*at least one sample, got \[6, 0\]"),
        ((TRAIN, VAL[:5]), ValueError, r"a row for each checkpoint, got 6 and 5 rows"),
        ((TRAIN[:3], VAL[:3]), ValueError, r"at least 4 checkpoints \(3 differences\), got 3"),
        ((TRAIN, VAL, FOUR), ValueError, r"train_classes and val_classes, or neither .*only train_classes"),
        ((TRAIN, VAL, None, THREE), ValueError, r"train_classes and val_classes, or neither .*only val_classes"),
        ((TRAIN, VAL, FOUR.float(), THREE), TypeError, r"train_classes must be integers.*torch\.float32"),
        ((TRAIN, VAL, FOUR, THREE.double()), TypeError, r"val_classes must be integers.*torch\.float64"),
        ((TRAIN, VAL, FOUR.bool(), THREE), TypeError, r"train_classes must be integers.*torch\.bool"),
        ((TRAIN, VAL, FOUR.cfloat(), THREE), TypeError, r"train_classes must be integers.*torch\.complex64"),
        ((TRAIN, VAL, list("aabb"), THREE), TypeError, r"train_classes must be integers.*got 'a' at position 0"),
        ((TRAIN, VAL, FOUR - 1, THREE), ValueError, r"train_classes must not be negative, got -1"),
        ((TRAIN, VAL, FOUR, THREE - 3), ValueError, r"val_classes must not be negative, got -3"),
        ((TRAIN, VAL, FOUR[:3], THREE), ValueError, r"train_classes must have shape \[4\].*got \[3\]"),
        ((TRAIN, VAL, FOUR[:, None], THREE), ValueError, r"train_classes must have shape \[4\].*got \[4, 1\]"),
        ((TRAIN, VAL, FOUR, FOUR), ValueError, r"val_classes must have shape \[3\].*got \[4\]"),
        ((TRAIN, VAL, FOUR + 6, THREE + 6 * THREE), ValueError, r"^class 6 has training but no validation samples"),
        ((TRAIN, VAL, FOUR + 5, THREE), ValueError, r"^classes 5, 6 have training but no.*proportional_holdout"),
    ],
)
def test_bad_arguments_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        cld_scores(*arguments)


def test_many_classes_without_validation_samples_are_counted_not_listed():
    message = r"^classes 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 15 more have training but no validation samples"
    with pytest.raises(ValueError, match=message):
        cld_scores(losses(6, 26), VAL, torch.arange(26), torch.zeros(3).long())


@pytest.mark.parametrize("value", [INF, -INF])
def test_an_infinite_validation_loss_raises_and_names_the_first_row_and_its_class(value):
    val = VAL.clone()
    val[4, 0], val[2, 1], val[3:, 1] = value, value, value
    with pytest.raises(ValueError, match=r"of class 1 are not finite at row 2: "):
        cld_scores(TRAIN, val, FOUR, THREE)


# Several numbers of rows in one pass


def half_way(train, val, rows, **classes):
    return [(scores.numpy(), most) for scores, most in scores_at(rows, train, val, **classes)]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_scores_of_the_first_rows_are_those_of_the_definition(offset):
    train, val = losses(23, 300) + offset, losses(23, 60, seed=1) + offset
    classes = {"train_classes": torch.arange(300) % 5, "val_classes": torch.arange(60) % 5}
    for rows, (scores, most) in zip([4, 12, 23], half_way(train, val, [4, 12, 23], **classes), strict=True):
        assert most == rows - 1
        expected = cld_oracle(train[:rows], val[:rows], *classes.values())
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_a_reference_that_moves_only_later_gives_no_early_scores():
    train, val = losses(20, 50), losses(20, 8, seed=1)
    val[:10] = val[0]
    early, late = (scores for scores, _ in half_way(train, val, [10, 20]))
    assert np.isnan(early).all()
    np.testing.assert_allclose(late, cld_oracle(train, val), rtol=0, atol=1e-5)


def test_a_reference_that_hardly_moves_at_first_is_scored_from_its_own_differences():
    train, val = losses(20, 50), losses(20, 8, seed=1).double()
    val[:10] = val[0] + 1e-9 * val[:10]
    val[10:] *= 1e3
    early, late = (scores for scores, _ in half_way(train, val, [10, 20]))
    np.testing.assert_allclose(early, cld_oracle(train[:10], val[:10]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(late, cld_oracle(train, val), rtol=0, atol=1e-5)


def test_missing_and_infinite_losses_count_from_their_row_on():
    train, val = losses(16, 6), losses(16, 8, seed=1)
    train[3, 0], train[12, 1], train[12, 2], val[5, 3] = torch.nan, torch.nan, torch.inf, torch.nan
    for rows, (scores, _) in zip([8, 16], half_way(train, val, [8, 16]), strict=True):
        np.testing.assert_allclose(scores, cld_oracle(train[:rows], val[:rows]), rtol=0, atol=1e-5)


def test_too_few_early_differences_are_counted():
    train, val = losses(9, 4), losses(9, 8, seed=1)
    train[1:3] = torch.nan
    assert [most for _, most in half_way(train, val, [5, 9])] == [1, 5]
