from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    assert_scores,
    cld_oracle,
    confidence_oracle,
    held_out_oracle,
    losses,
    noisy_losses,
    reliability_oracle,
)

from lightning_cld import cld_scores
from lightning_cld.functional import moments
from lightning_cld.functional.diagnostics import split_in_halves
from lightning_cld.functional.moments import (
    Classes,
    Moments,
    early_confidence_of,
    judged_by,
    reliability_by_class,
    scores,
    skip,
    update,
)

NAN, INF = float("nan"), float("inf")
CLASSES, VAL_CLASSES = torch.tensor([0, 3, 700])[torch.arange(30) % 3], torch.tensor([0, 3, 700])[torch.arange(12) % 3]


def case(rows=10):
    """Losses of 30 train and 12 validation samples."""
    return losses(rows, 30), losses(rows, 12, seed=1)


def moments_of(train, val, classes, theta_0=False):
    moments = Moments.empty(train.shape[1], val.shape[1], len(classes.labels))
    for row, (train_row, val_row) in enumerate(zip(train, val, strict=True)):
        moments = update(moments, train_row, val_row, classes, theta_0=theta_0 and row == 0)
    return moments


def run(train, val, train_classes=None, val_classes=None):
    """The scores from rows that are added one by one."""
    if train_classes is None:
        train_classes, val_classes = torch.zeros(train.shape[1]).long(), torch.zeros(val.shape[1]).long()
    classes = Classes.of(train_classes, val_classes)
    return scores(moments_of(train, val, classes), classes)


# The score


@pytest.mark.parametrize("rows", [4, 5, 10, 60, 1000])
def test_agrees_with_the_definition(rows):
    arguments = (*case(rows), CLASSES, VAL_CLASSES)
    assert_scores(run(*arguments), cld_oracle(*arguments))


def test_is_far_nearer_to_the_definition_than_promised():
    arguments = (*case(300), CLASSES, VAL_CLASSES)
    np.testing.assert_allclose(run(*arguments).double().numpy(), cld_oracle(*arguments), rtol=0, atol=2e-7)


@pytest.mark.parametrize("rows", [4, 7, 12])
def test_scores_can_be_had_at_every_checkpoint(rows):
    train, val = case(12)
    classes = Classes.of(CLASSES, VAL_CLASSES)
    moments = moments_of(train[:rows], val[:rows], classes)
    assert_scores(scores(moments, classes), cld_oracle(train[:rows], val[:rows], CLASSES, VAL_CLASSES))


@pytest.mark.parametrize("offset", [1e3, -1e5, 1e7])
def test_an_offset_that_all_losses_share_does_no_harm(offset):
    train, val = case(200)
    train, val = train + offset, val + offset
    assert_scores(run(train, val), cld_oracle(train, val))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_huge_and_tiny_losses_score_like_others(scale):
    train, val = case(60)
    train, val = train * scale, val * scale
    assert_scores(run(train, val), cld_oracle(train, val))


def test_a_slope_that_is_steep_beside_the_noise_does_no_harm():
    slope = torch.arange(1000.0)[:, None]
    train, val = (1e-3 * part for part in case(1000))
    assert_scores(run(slope + train, slope + val), cld_oracle(slope + train, slope + val))


@pytest.mark.parametrize("step", [2e-4, 1e-3, 1e-2])
def test_a_thousand_steps_that_are_tiny_beside_the_first_are_not_lost(step):
    # Two jumps, then a long zigzag, then the jumps again. Each step of the zigzag is too small to change the sums in
    # float32, so the score would be wrong by more than 1e-5. Many sizes test many mantissas.
    size = torch.linspace(5.7, 11.3, 64).double()
    zigzag = torch.tensor([1.0, -1.0]).double().repeat(800)
    differences = torch.cat([size[None], -size[None], 3.1e-4 * zigzag[:, None] * size, size[None], -size[None]])
    reference = torch.cat([torch.tensor([-1.0, 1.0]), step * zigzag, torch.tensor([1.0, -1.0])])
    train = 12 + torch.cat([torch.zeros(1, 64), differences]).cumsum(0)
    val = 12 + torch.cat([torch.zeros(1), reference]).cumsum(0)[:, None]
    assert_scores(run(train, val), cld_oracle(train.float(), val.float()))


def test_a_thousand_tiny_contributions_to_a_small_correlation_are_not_lost():
    zigzag = 2.2e-4 * torch.tensor([1.0, -1.0]).double().repeat(800)
    own = torch.cat([torch.tensor([1.0, -1.0, 0.0, 0.0]), zigzag])
    reference = torch.cat([torch.tensor([0.0, 0.0, 1.0, -1.0]), zigzag])
    train, val = (8 + torch.cat([torch.zeros(1), d]).cumsum(0)[:, None] for d in (own, reference))
    expected = cld_oracle(train.float(), val.float())
    assert 3e-5 < expected < 1e-4
    np.testing.assert_allclose(run(train, val).double().numpy(), expected, rtol=0, atol=2e-6)


def outcome(function, arguments):
    """The return value, or the message of the error."""
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)


@settings(deadline=None)
@given(st.data())
def test_agrees_with_the_definition_whatever_the_losses(data):
    rows, samples, references = data.draw(st.tuples(st.integers(4, 40), st.integers(2, 6), st.integers(2, 4)))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    size = data.draw(st.sampled_from([2.0**-20, 1e-3, 1.0, 1e10]))
    offset = data.draw(st.sampled_from([0.0, 1.0, 1e3])) * size * 100
    levels = data.draw(st.integers(1, 40))  # few levels give equal losses and no variance
    decay = data.draw(st.sampled_from([1.0, 0.9, 0.5]))  # decay makes the last differences tiny
    train, val = (
        torch.from_numpy(
            (offset + size * decay ** np.arange(rows)[:, None] * generator.integers(0, levels, (rows, count))).astype(
                np.float32
            )
        )
        for count in (samples, references)
    )
    for row, column in data.draw(st.sets(st.tuples(st.integers(0, rows - 1), st.integers(0, samples - 1)), max_size=2)):
        train[row, column] = INF
    for row in data.draw(st.sets(st.integers(0, rows - 1), max_size=2)):
        train[row] = NAN
        val[row] = NAN
    arguments = (train, val, torch.arange(samples) % 2, torch.arange(references) % 2)
    found, full = outcome(run, arguments), outcome(cld_scores, arguments)
    if isinstance(full, str):  # too few differences
        assert found == full
        return
    assert_scores(found, cld_oracle(*arguments))
    assert torch.equal(found.isnan(), full.isnan())


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.floats(0, 20, width=32), min_size=3, max_size=3), min_size=4, max_size=30),
    st.sampled_from([0.0, 1e3]),
)
def test_agrees_with_the_definition_for_any_floats(rows, offset):
    # Rounding to 2^-16 keeps columns away from the edge where float64 can't tell small differences from none.
    table = ((torch.tensor(rows) + offset) * 2**16).round() / 2**16
    assert_scores(run(table[:, :2], table[:, 2:]), cld_oracle(table[:, :2], table[:, 2:]))


# Losses that were not logged or are not finite


@pytest.mark.parametrize("holes", [[0], [3], [9], [0, 1], [4, 5], [3, 7]], ids=str)
def test_no_difference_spans_a_checkpoint_that_was_not_logged(holes):
    train, val = case()
    train[holes], val[holes] = NAN, NAN
    expected = cld_oracle(train, val, CLASSES, VAL_CLASSES)
    assert np.isfinite(expected).all()
    assert_scores(run(train, val, CLASSES, VAL_CLASSES), expected)


@pytest.mark.parametrize("holes", [[0], [3], [4, 5]], ids=str)
def test_a_checkpoint_that_is_skipped_is_one_that_was_not_logged(holes):
    train, val = case()
    classes = Classes.of(CLASSES, VAL_CLASSES)
    moments = Moments.empty(30, 12, 3)
    for row in range(10):
        moments = skip(moments) if row in holes else update(moments, train[row], val[row], classes)
    train[holes], val[holes] = NAN, NAN
    assert_scores(scores(moments, classes), cld_oracle(train, val, CLASSES, VAL_CLASSES))
    assert int(moments.rows) == 10


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_row_that_one_side_lacks_makes_no_difference(missing):
    train, val = case()
    (train if missing == "train" else val)[4] = NAN
    assert_scores(run(train, val, CLASSES, VAL_CLASSES), cld_oracle(train, val, CLASSES, VAL_CLASSES))


def test_a_reference_is_of_the_validation_samples_that_were_logged():
    train, val = case()
    val[3, 1] = val[7, 2] = NAN  # one of the four samples in its class
    val[5, VAL_CLASSES == 3] = NAN  # all samples of a class
    assert_scores(run(train, val, CLASSES, VAL_CLASSES), cld_oracle(train, val, CLASSES, VAL_CLASSES))


def test_holes_among_large_losses_do_no_harm():
    train, val = case(100)
    train, val = train + 1000, val + 1000
    train[20::20], val[20::20] = NAN, NAN
    assert_scores(run(train, val), cld_oracle(train, val))


@pytest.mark.parametrize("row", [0, 4, 9])
@pytest.mark.parametrize("loss", [INF, -INF, NAN])
def test_a_sample_with_a_loss_that_is_not_finite_or_missing_is_unscored_and_changes_no_other(row, loss):
    train, val = case()
    expected = cld_oracle(train, val, CLASSES, VAL_CLASSES)
    expected[7] = np.nan
    train[row, 7] = loss
    assert_scores(run(train, val, CLASSES, VAL_CLASSES), expected)


def test_a_trajectory_without_variance_is_unscored():
    train, val = case()
    train[:, 2] = 0.7
    train[:, 5] = torch.arange(10) * 0.5  # constant differences
    train[0, 5] = 1e-15  # vary by less than float64 can tell from rounding
    assert run(train, val).isnan().nonzero().flatten().tolist() == [2, 5]


def test_a_class_whose_reference_has_no_variance_is_unscored():
    train, val = case(50)
    slopes = torch.tensor([0.25, 0.5, 0.25, 0.3125])  # float64 can't represent the mean of the first three
    val[:, VAL_CLASSES == 3] = torch.arange(50)[:, None] * slopes
    val[:, VAL_CLASSES.eq(3).nonzero()[3]] = torch.nan
    assert torch.equal(run(train, val, CLASSES, VAL_CLASSES).isnan(), CLASSES == 3)


def test_an_infinite_reference_raises_and_names_class_and_row():
    train, val = case()
    val[6, 4] = val[7, 0] = val[8, 4] = INF
    with pytest.raises(ValueError, match=r"class 3 are not finite at row 6: training diverged there.*learning rate"):
        run(train, val, CLASSES, VAL_CLASSES)


def test_an_infinite_reference_raises_and_names_the_checkpoint_it_is_given():
    train, val = case()
    classes = Classes.of(CLASSES, VAL_CLASSES)
    val[6] = INF
    with pytest.raises(ValueError, match=r"classes 0, 3, 700 are not finite at epoch g"):
        scores(moments_of(train, val, classes), classes, [f"epoch {letter}" for letter in "abcdefghij"])


def test_an_infinite_loss_of_a_class_that_is_not_trained_on_is_no_problem():
    train, val = case()
    val = torch.cat([val, torch.full((10, 2), INF)], dim=1)
    val_classes = torch.cat([VAL_CLASSES, torch.tensor([1, 9999])])
    assert_scores(run(train, val, CLASSES, val_classes), cld_oracle(train, val, CLASSES, val_classes))


def test_fewer_than_4_checkpoints_raise():
    with pytest.raises(ValueError, match=r"at least 4 checkpoints .* got 3"):
        run(*case(3))


def test_fewer_than_3_differences_raise():
    train, val = case(6)
    train[[2, 4]] = NAN
    with pytest.raises(ValueError, match=r"at least 3 differences .* no sample has more than 1"):
        run(train, val)


def test_a_class_with_fewer_than_3_differences_is_unscored():
    train, val = case(6)
    val[2, VAL_CLASSES == 3] = val[4, VAL_CLASSES == 3] = NAN
    assert torch.equal(run(train, val, CLASSES, VAL_CLASSES).isnan(), CLASSES == 3)


def test_positions_that_are_not_in_use_are_unscored_and_change_no_score():
    train, val = case()
    expected = cld_oracle(train, val, CLASSES, VAL_CLASSES)
    expected[[4, 9]] = np.nan
    classes = CLASSES.clone()
    classes[[4, 9]] = -1
    train[:, 4] = NAN
    assert_scores(run(train, val, classes, VAL_CLASSES), expected)


# The early confidence


def early(train, val, theta_0=False, classes=CLASSES, val_classes=VAL_CLASSES):
    """Of the training and of the validation samples."""
    found = early_confidence_of(moments_of(train, val, Classes.of(classes, val_classes), theta_0))
    return found[: train.shape[1]], found[train.shape[1] :]


def with_lowest(rows, lowest):
    """As `case`, with the lowest mean validation loss in one row."""
    train, val = case(rows)
    return train, val + 0.5 * (torch.arange(rows) - lowest)[:, None].abs()


def assert_early(train, val, theta_0=False, atol=1e-5):
    start = int(theta_0)
    for found, expected in zip(early(train, val, theta_0), confidence_oracle(train[start:], val[start:]), strict=True):
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("theta_0", [True, False])
@pytest.mark.parametrize(("rows", "lowest"), [(4, 0), (4, 1), (60, 0.5), (60, 1), (1000, 1)])
def test_early_confidence_agrees_with_its_definition(rows, lowest, theta_0):
    assert_early(*with_lowest(rows, int(lowest * (rows - 1))), theta_0)


@pytest.mark.parametrize("rows", range(1, 21))
def test_early_confidence_counts_more_than_a_quarter_of_the_rows_however_many_there_are(rows):
    assert_early(losses(rows, 30), torch.arange(1.0, rows + 1)[:, None].expand(rows, 12).clone())  # lowest at first


@pytest.mark.parametrize("late", [1.0, 30.0])
def test_a_thousand_rows_that_hardly_move_the_confidence_are_not_lost(late):
    # All roundings of the mean go the same way: the terms fall slowly, or are all 0 after the first row.
    size = torch.linspace(0.6, 0.8, 30)
    train = torch.cat([size[None], size + torch.linspace(0, late, 1500)[:, None]])
    assert_early(train, torch.linspace(2, 1, 1501)[:, None].expand(1501, 12).clone(), atol=2e-6)


@pytest.mark.parametrize("train_holes", [[], [0], [4, 5]], ids=str)
@pytest.mark.parametrize("val_holes", [[], [3, 4], [6], [9]], ids=str)
@pytest.mark.parametrize("theta_0", [True, False])
def test_early_confidence_leaves_out_checkpoints_that_one_side_lacks(train_holes, val_holes, theta_0):
    train, val = with_lowest(10, 6)
    train[train_holes], val[val_holes] = NAN, NAN
    assert_early(train, val, theta_0)


@pytest.mark.parametrize("loss", [INF, -INF, NAN])
def test_early_confidence_is_not_known_for_a_sample_with_a_loss_that_is_missing_or_not_finite(loss):
    train, val = with_lowest(10, 6)
    expected = confidence_oracle(train[1:], val[1:])[0]
    train[0, 4] = train[8, 5] = loss  # theta_0, and what is after the lowest loss, do not count
    train[3, 7] = loss
    expected[7] = np.nan
    assert_scores(early(train, val, theta_0=True)[0], expected)


def test_early_confidence_of_losses_below_zero_is_that_of_its_definition():
    train, val = (part - 3 for part in with_lowest(10, 6))
    np.testing.assert_allclose(early(train, val)[0].double().numpy(), confidence_oracle(train, val)[0], rtol=1e-6)


def test_classes_that_only_validation_has_do_not_decide_which_row_is_the_lowest():
    train, val = with_lowest(10, 6)
    rising = torch.linspace(1, 200, 10)[:, None].expand(10, 8)
    expected = confidence_oracle(train, val)[0]
    val, val_classes = torch.cat([val, rising], dim=1), torch.cat([VAL_CLASSES, torch.full((8,), 9)])
    assert confidence_oracle(train, val)[0] != pytest.approx(expected)
    assert_scores(early(train, val, val_classes=val_classes)[0], expected)


# How plausible labels are


def judged(train, val, classes, val_classes, theta_0=True):
    known = Classes.of(classes, val_classes)
    moments = moments_of(train, val, known, theta_0)
    return judged_by(moments, known, scores(moments, known))


def test_held_out_scores_are_those_of_leaving_out_one_after_another(monkeypatch):
    """They stand beside the confidence of the validation samples, and those of other classes are NaN."""
    seen = []
    monkeypatch.setattr(moments, "judged", lambda *arguments: seen.append(arguments) or (None, {}))
    train, val = case(40)
    val[20] = NAN
    val_classes = VAL_CLASSES.clone()
    val_classes[[0, 3]] = 9
    val_classes[2] = 700
    val_classes[1] = 3
    judged(train, val, CLASSES, val_classes)
    [((of_train, held_out), (confidence, of_val), (train_classes, given))] = seen
    expected = held_out_oracle(val, val_classes)
    expected[[0, 3]] = np.nan
    assert_scores(held_out, expected)
    assert_scores(of_train, cld_oracle(train, val, CLASSES, val_classes))
    kept = np.isin(val_classes, CLASSES)
    for found, oracle in zip((confidence, of_val), confidence_oracle(train[1:], val[1:], kept), strict=True):
        assert_scores(found, oracle)
    assert torch.equal(train_classes, CLASSES)
    assert torch.equal(given, val_classes)


@pytest.mark.parametrize("rows", [4, 12, 200])
def test_wrong_labels_are_not_plausible_and_right_ones_are(rows):
    classes, val_classes = torch.arange(3000) % 3, torch.arange(400) % 4
    train, val, wrong = noisy_losses(rows, classes, val_classes)
    confidence, plausible, shares = judged(train, val, classes, val_classes)
    assert plausible[wrong].mean() < 0.15
    assert plausible[~wrong].mean() > 0.85
    assert shares["share"][0] == pytest.approx(float(wrong.float().mean()), abs=0.05)
    assert list(shares["classes"]) == ["0", "1", "2"]
    assert confidence.shape == plausible.shape == (3000,)


def test_positions_that_are_not_in_use_have_no_plausibility_and_change_no_other():
    classes, val_classes = torch.arange(3000) % 3, torch.arange(400) % 4
    train, val, _ = noisy_losses(12, classes, val_classes)
    expected = judged(train, val, classes, val_classes)
    more, more_classes = torch.cat([train, torch.rand(12, 9)], dim=1), torch.cat([classes, torch.full((9,), -1)])
    found = judged(more, val, more_classes, val_classes)
    assert torch.equal(found[1][:3000], expected[1])
    assert found[1][3000:].isnan().all()
    assert found[2] == expected[2]


# The reliability of the references


def assert_reliability(train, val, classes=CLASSES, val_classes=VAL_CLASSES):
    """Compares it with scipy's correlations over the same halves."""
    known = Classes.of(classes, val_classes)
    labels, wanted = known.labels, torch.isin(val_classes, known.labels)
    splits = np.zeros((10, len(val_classes)), int)
    halves = split_in_halves(torch.searchsorted(labels, val_classes[wanted]), len(labels))
    splits[:, wanted.numpy()] = halves.numpy() % 2
    found = reliability_by_class(moments_of(train, val, known), known)
    assert list(found) == [str(label) for label in labels.tolist()]
    for label, value in found.items():
        expected = reliability_oracle(val, val_classes, int(label), splits)
        assert (np.nan if value is None else value) == pytest.approx(expected, abs=6e-5, nan_ok=True), label
    return found


@pytest.mark.parametrize("rows", [4, 10, 1000])
def test_reliability_agrees_with_its_definition(rows):
    found = assert_reliability(*case(rows))
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_reliability_suffers_from_no_offset_and_no_scale(offset, scale):
    train, val = case(100)
    assert_reliability(scale * train, scale * (val + offset))


def test_reliability_of_two_samples_is_their_correlation_and_of_one_is_not_known():
    train, val = case()
    val_classes = torch.tensor([0, 3, 3, 700, 9, 9, 9, 9, 9, 9, 9, 9])
    expected = np.corrcoef(np.diff(val[:, 1].double()), np.diff(val[:, 2].double()))[0, 1]
    classes = Classes.of(CLASSES, val_classes)
    found = reliability_by_class(moments_of(train, val, classes), classes)
    assert found == {"0": None, "3": pytest.approx(expected, abs=6e-5), "700": None}


def test_reliability_is_of_the_differences_that_were_logged():
    train, val = case(12)
    train[2], val[2] = NAN, NAN
    train[4] = NAN  # the references have a loss here all the same
    val[6] = NAN
    val[8, 3] = NAN  # one of the four samples in its class
    val[9, VAL_CLASSES == 3] = NAN  # all samples of a class
    assert_reliability(train, val)


def test_a_skipped_checkpoint_is_spanned_by_no_difference_of_halves():
    train, val = case()
    known = Classes.of(CLASSES, VAL_CLASSES)
    skipped = moments_of(train[:4], val[:4], known)
    skipped = skip(skipped)
    for row in range(5, 10):
        skipped = update(skipped, train[row], val[row], known)
    val[4] = train[4] = NAN
    assert reliability_by_class(skipped, known) == assert_reliability(train, val)


def test_reliability_is_not_known_without_change_or_with_too_few_differences():
    train, val = case()
    val[:, VAL_CLASSES == 0] = torch.arange(10)[:, None] * torch.tensor([0.25, 0.5, 0.25, 0.3125])
    val[0, VAL_CLASSES == 0] = 1e-15  # varies by less than float64 can tell from rounding
    val[3:, VAL_CLASSES == 3] = NAN
    known = Classes.of(CLASSES, VAL_CLASSES)
    found = reliability_by_class(moments_of(train, val, known), known)
    assert found == {"0": None, "3": None, "700": pytest.approx(found["700"])}


def test_halves_are_of_the_same_class_and_as_large_as_each_other():
    groups = torch.tensor([0, 2, 1, 0, 0, 2, 1, 1, 0, 1, 1])
    splits = split_in_halves(groups, 3)
    for half in splits:
        assert torch.equal(half // 2, groups)
        sizes = torch.bincount(half, minlength=6).view(3, 2)
        assert (sizes[:, 0] - sizes[:, 1]).tolist() == [0, 1, 0]
    assert len(torch.unique(splits, dim=0)) > 5


# Memory and side effects


def test_only_scores_are_kept_where_only_these_are_wanted():
    train, val = case()
    known = Classes.of(CLASSES, VAL_CLASSES)
    lean = Moments.empty(30, 12, 3, scores_only=True)
    for train_row, val_row in zip(train, val, strict=True):
        lean = update(lean, train_row, val_row, known)
    assert torch.equal(scores(lean, known), run(train, val, CLASSES, VAL_CLASSES))
    assert judged_by(lean, known, scores(lean, known)) is reliability_by_class(lean, known) is None
    assert lean.confidence.numel() == lean.early.numel() == lean.held_out.numel() == lean.halves.numel() == 0


@pytest.mark.parametrize("rows", [1, 5, 50])
@pytest.mark.parametrize(("labels", "most"), [(10, 36), (40_000, 38)])
def test_it_keeps_36_bytes_a_training_sample_however_many_rows_there_are(rows, labels, most):
    samples, references = 50_000, labels + 1000
    classes = Classes.of(torch.arange(samples) % labels, torch.arange(references) % labels)
    moments = Moments.empty(samples, references, labels)
    for _ in range(rows):
        moments = update(moments, torch.rand(samples), torch.rand(references), classes)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in (*moments, *classes))
    scalars = 8 + 1 + 8 + 8 + 8
    # Beside the moments a class has its label, and a validation sample its class.
    assert kept == most * samples + (44 + 8) * references + (512 + 8) * labels + scalars


def test_rows_may_be_written_to_once_they_were_taken():
    train, val = case()
    classes = Classes.of(CLASSES, VAL_CLASSES)
    moments, train_row, val_row = Moments.empty(30, 12, 3), torch.empty(30), torch.empty(12)
    for row in range(10):
        train_row.copy_(train[row])
        val_row.copy_(val[row])
        moments = update(moments, train_row, val_row, classes)
    assert_scores(scores(moments, classes), cld_oracle(train, val, CLASSES, VAL_CLASSES))


@pytest.mark.parametrize("step", ["update", "skip"])
def test_the_moments_before_stay_as_they_are(step):
    train, val = case()
    classes = Classes.of(CLASSES, VAL_CLASSES)
    moments = moments_of(train[:6], val[:6], classes)
    before = [tensor.clone() for tensor in moments]
    later = skip(moments) if step == "skip" else update(moments, train[6], val[6], classes)
    assert all(torch.equal(*pair) for pair in zip(moments, before, strict=True))
    assert int(later.rows) == 7


def test_slices_change_no_score(monkeypatch):
    train, val = case()
    expected, confident = run(train, val, CLASSES, VAL_CLASSES), early(train, val)[0]
    monkeypatch.setattr(moments, "_SLICE", 7)
    monkeypatch.setattr("lightning_cld.functional.confidence._SLICE", 7)
    assert torch.equal(run(train, val, CLASSES, VAL_CLASSES), expected)
    assert torch.equal(early(train, val)[0], confident)


def test_losses_of_other_dtypes_and_with_gradients_are_taken():
    train, val = case()
    expected = run(train, val)
    doubled = run(train.double().requires_grad_(), val.double())
    assert torch.equal(doubled, expected)
    assert not doubled.requires_grad
