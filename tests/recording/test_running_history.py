from __future__ import annotations

import io
import pickle

import pytest
import torch
from oracles import assert_scores, cld_oracle, confidence_oracle, losses, noisy_losses

from lightning_cld import LossTrajectories
from lightning_cld.data.fingerprint import Fingerprint
from lightning_cld.functional.moments import Moments
from lightning_cld.recording.running_history import RunningHistory

TRAIN, VAL = losses(9, 30), losses(9, 12, seed=1)
CLASSES, VAL_CLASSES = torch.tensor([0, 3, 700])[torch.arange(30) % 3], torch.tensor([0, 3, 700])[torch.arange(12) % 3]
EPOCHS = [0, 1, 2, 3, 4, 6, 8, 10, 12]
NAMES = [f"shard-{position % 4}/{position}" for position in range(30)]
EXPECTED = cld_oracle(TRAIN, VAL, CLASSES, VAL_CLASSES)


def history(rows=9, train_classes=CLASSES, val_classes=VAL_CLASSES):
    known = {"fingerprint": Fingerprint(30, "labels", "probe"), "names": NAMES}
    made = RunningHistory.of_losses(TRAIN[:1], VAL[:1], train_classes, val_classes, EPOCHS[:1], **known)
    return recorded(made, range(1, rows))


def recorded(made, rows):
    for row in rows:
        made.record(EPOCHS[row], TRAIN[row], VAL[row])
    return made


def saved(made):
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    return file.getvalue()


def loaded(content):
    return RunningHistory.from_state_dict(torch.load(io.BytesIO(content), weights_only=True))


def test_recorded_rows_are_scored():
    assert_scores(history().score().values, EXPECTED)


def test_it_is_made_of_rows_as_trajectories_are():
    arguments = (TRAIN, VAL, CLASSES, VAL_CLASSES, EPOCHS)
    running, full = RunningHistory.of_losses(*arguments), LossTrajectories(*arguments)
    assert_scores(running.score().values, full.score().values.numpy())
    assert running.epochs == full.epochs
    assert running.references == full.references == 12
    assert torch.equal(running.train_classes, full.train_classes)
    assert torch.equal(running.val_classes, full.val_classes)
    assert repr(running) == "RunningHistory(9 checkpoints, 30 train and 12 val samples)"


def test_without_classes_all_are_one():
    made = history(train_classes=None, val_classes=None)
    assert made.train_classes is made.val_classes is made.score().classes is None
    assert_scores(made.score().values, cld_oracle(TRAIN, VAL))
    assert loaded(saved(made)).train_classes is None


def test_scores_carry_classes_epochs_identity_and_provenance():
    made = history(6)
    made.keep_best_tenth()
    recorded(made, range(6, 9))
    made.metadata["seed"] = 7
    scores = made.score(cutoff_epoch=12)
    full = LossTrajectories(TRAIN, VAL, CLASSES, VAL_CLASSES, EPOCHS, metadata={"seed": 7}).score()
    assert torch.equal(scores.classes, CLASSES)
    assert scores.epochs == EPOCHS
    assert scores.fingerprint == Fingerprint(30, "labels", "probe")
    assert scores.metadata["seed"] == 7
    assert scores.metadata.keys() == full.metadata.keys()
    assert scores.metadata["reference_sizes"] == full.metadata["reference_sizes"] == {"0": 4, "3": 4, "700": 4}


# What the rule "draw" and the summary need


def with_holes(train, val):
    train[[0, 3]], val[[0, 3]] = torch.nan, torch.nan
    return train, val


def with_bad_losses(train, val):
    train[0, 2] = train[5, 7] = train[11, 8] = torch.inf
    train[0, 3] = train[6, 4] = torch.nan
    val[4, 1] = torch.nan
    return train, val


def with_a_side_missing(train, val):
    train[4] = torch.nan
    val[7] = torch.nan
    return train, val


MANY = torch.arange(2400) % 4 * 7  # classes 0, 7, 14 and 21
MANY_VAL = torch.cat([torch.arange(480) % 4 * 7, torch.full((40,), 3), torch.full((60,), 28)])[torch.arange(580) != 21]
MANY[-200:] = 28  # with 60 validation samples, so that it is judged with all classes; class 3 is only in validation


def assert_as_much(running, full, samples, tolerance):
    """Checks that `running` tells what `full` does of some samples.

    A score that differs by rounding may lie on the other side of a bin's edge, so a few samples may have the
    plausibility of the next bin.
    """
    torch.testing.assert_close(running.values[samples], full.values[samples], rtol=0, atol=1e-5)
    torch.testing.assert_close(running.confidence[samples], full.confidence[samples], rtol=0, atol=1e-5)
    near = (running.plausibility - full.plausibility)[samples].abs() < tolerance
    assert near.float().mean() > (0.99 if tolerance < 1e-3 else 0.97)
    reliability = full.metadata["reference_reliability"]
    assert running.metadata["reference_reliability"] == pytest.approx(reliability, abs=1e-4)
    found, expected = running.metadata["implausible"], full.metadata["implausible"]
    assert found["share"] == pytest.approx(expected["share"], abs=max(2e-3, tolerance))
    assert found["classes"].keys() == expected["classes"].keys() == {"0", "7", "14", "21", "28"}
    for label, shares in expected["classes"].items():
        assert found["classes"][label] == pytest.approx(shares, abs=max(5e-3, tolerance)), label


@pytest.mark.parametrize(("start", "rows"), [(0, 12), (2, 12), (0, 300)])
@pytest.mark.parametrize("change", [with_holes, with_bad_losses, with_a_side_missing])
def test_scores_tell_as_much_as_those_of_a_full_history(start, rows, change):
    train, val, wrong = noisy_losses(rows, MANY, MANY_VAL, seed=3)
    train, val = change(train, val)
    classes = MANY.clone()
    classes[[10, 11]] = -1
    arguments = (train, val, classes, MANY_VAL, range(start, start + rows))
    full, running = LossTrajectories(*arguments).score(), RunningHistory.of_losses(*arguments).score()
    known = ~running.values.isnan()
    assert known.sum() >= 2390
    # One of about a hundred validation samples in a class has a loss that is NaN: only the full history compares it.
    assert_as_much(running, full, known, 0.03 if change is with_bad_losses else 1e-5)
    assert 0.15 < full.metadata["implausible"]["share"][0] < 0.35
    assert full.plausibility[wrong & known].mean() < 0.3
    suspects, expected = set(running.suspects().tolist()), set(full.suspects().tolist())
    assert len(suspects ^ expected) <= 0.02 * len(expected)
    for fraction in (0.1, 0.5):
        drawn, expected = (made.select(rule="draw", fraction=fraction) for made in (running, full))
        assert len(drawn) == len(expected)
        assert torch.isin(drawn, expected).float().mean() > 0.98


@pytest.mark.parametrize("rows", [1, 5, 9])
def test_what_it_tells_of_labels_survives_a_resume_bit_for_bit(rows):
    train, val, _ = noisy_losses(12, MANY, MANY_VAL)
    arguments = (MANY, MANY_VAL)
    whole = RunningHistory.of_losses(train, val, *arguments).score()
    resumed = loaded(saved(RunningHistory.of_losses(train[:rows], val[:rows], *arguments)))
    for row in range(rows, 12):
        resumed.record(row, train[row], val[row])
    resumed = pickle.loads(pickle.dumps(resumed)).score()
    for name in ("values", "plausibility", "confidence"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    assert resumed.metadata["implausible"] == whole.metadata["implausible"]


@pytest.mark.parametrize("start", [0, 1])
def test_the_confidence_is_that_of_the_checkpoints_after_theta_0_up_to_the_lowest_validation_loss(start):
    made = RunningHistory.of_losses(TRAIN, VAL, CLASSES, VAL_CLASSES, range(start, start + 9))
    assert_scores(made.score().confidence, confidence_oracle(TRAIN[1 - start :], VAL[1 - start :])[0])


def test_the_best_tenth_that_was_kept_is_compared_with_the_last():
    train, val = losses(13, 60, seed=3), losses(13, 12, seed=4)
    classes = torch.arange(60) % 3
    full = LossTrajectories(train, val, classes, torch.arange(12) % 3).score().metadata
    made = RunningHistory.of_losses(train[:7], val[:7], classes, torch.arange(12) % 3)
    made.keep_best_tenth()
    made = loaded(saved(made))
    for row in range(7, 13):
        made.record(row, train[row], val[row])
    found = made.score().metadata
    assert (found["half_epoch"], found["half_overlap"]) == (6, full["half_overlap"])
    assert found["half_overlap"] < 1
    made.record(14, train[0], val[0])  # ends later than planned
    found = made.score().metadata
    assert "half_overlap" not in found
    assert found["half_problem"].startswith("the best tenth after 7 epochs was not kept")


@pytest.mark.parametrize("keep", [True, False])
def test_why_the_overlap_is_not_known_stands_in_the_metadata(keep):
    made = history(4)
    if keep:
        made = history(2)
        made.keep_best_tenth()
        recorded(made, range(2, 4))
    found = made.score().metadata
    expected = (
        "up to epoch 1 or with all, CLD needs at least 4" if keep else "the best tenth after 1 epochs was not kept"
    )
    assert expected in found["half_problem"]
    assert "half_overlap" not in found


def test_too_few_samples_for_a_tenth_are_the_reason_too():
    made = history(7)
    made.keep_best_tenth()
    assert "half_problem" in recorded(made, range(7, 9)).score().metadata


# States of earlier versions


ADDED_LATER = ("confidence", "confidence_rows", "early", "lowest", "held_out", "early_rows", "marks")


def former_state(made, kept):
    """A state of an earlier version: the oldest kept only what scores need, a later one the uncertainty and halves."""
    state = made.state_dict()
    for name in ADDED_LATER:
        del state["moments"][name]
    del state["names"]
    if kept == "scores":
        del state["kept_tenth"], state["moments"]["halves"]
    else:
        state["moments"] |= {"uncertainty": torch.rand(30), "uncertainty_rows": torch.tensor(4)}
    return state


@pytest.mark.parametrize("kept", ["scores", "uncertainty"])
def test_a_state_of_an_earlier_version_goes_on_without_plausibility(kept):
    after = RunningHistory.from_state_dict(former_state(history(5), kept))
    after.metadata["history"] = "running"
    scores = recorded(after, range(5, 9)).score()
    assert_scores(scores.values, EXPECTED)
    assert scores.plausibility is scores.confidence is None
    assert "implausible" not in scores.metadata
    assert ("reference_reliability" in scores.metadata) is (kept == "uncertainty")
    assert ("reliability" in dict(scores.account())) is (kept == "uncertainty")
    assert "labels" not in dict(scores.account())
    assert scores.names is None
    assert len(scores.select(fraction=0.2)) == 6
    with pytest.raises(ValueError, match=r"hold no plausibility \(running moments of an earlier version"):
        scores.select(fraction=0.2, rule="draw")
    assert loaded(saved(after)).score().plausibility is None  # nor does its next checkpoint make one up


@pytest.mark.parametrize("kept", ["scores", "uncertainty"])
def test_a_pickle_of_an_earlier_version_goes_on_without_plausibility(kept):
    made = history(5)
    moments = made._recorded[0]
    more = () if kept == "scores" else (torch.rand(30), torch.tensor(4), moments.halves)  # pickled without names
    made._recorded = Moments(*moments[:12], *more), made.epochs
    assert "_kept" not in vars(made)
    del made.names
    scores = recorded(pickle.loads(pickle.dumps(made)), range(5, 9)).score()
    assert_scores(scores.values, EXPECTED)
    assert scores.names is None
    assert scores.plausibility is scores.confidence is None
    if kept == "uncertainty":
        expected = history().score().metadata["reference_reliability"]
        assert scores.metadata["reference_reliability"] == expected


def test_positions_outside_of_the_sampler_keep_their_mark():
    classes = CLASSES.clone()
    classes[[4, 9]] = -1
    made = history(train_classes=classes)
    assert torch.equal(made.train_classes, classes)
    assert made.score().values.isnan().nonzero().flatten().tolist() == [4, 9]


def test_a_hole_is_spanned_by_no_difference():
    made = history(4)
    made.leave_hole(EPOCHS[4])
    recorded(made, range(5, 9))
    train, val = TRAIN.clone(), VAL.clone()
    train[4] = val[4] = torch.nan
    assert made.epochs == EPOCHS
    assert_scores(made.score().values, cld_oracle(train, val, CLASSES, VAL_CLASSES))


def test_the_newest_checkpoint_is_recorded_once():
    made = history(5)
    made.record(EPOCHS[4], TRAIN[4], VAL[4])
    made.leave_hole(EPOCHS[4])
    assert_scores(recorded(made, range(5, 9)).score().values, EXPECTED)


@pytest.mark.parametrize("add", [lambda made: made.record(2, TRAIN[2], VAL[2]), lambda made: made.leave_hole(2)])
def test_an_older_checkpoint_is_refused(add):
    made = history(5)
    with pytest.raises(ValueError, match="recorded in order: got 2 after 4"):
        add(made)
    assert_scores(recorded(made, range(5, 9)).score().values, EXPECTED)


@pytest.mark.parametrize("rows", [1, 5, 9])
def test_it_goes_on_from_its_state_in_a_checkpoint(rows):
    before = history(rows)
    before.metadata["seed"] = 7
    after = loaded(saved(before))
    assert after.epochs == EPOCHS[:rows]
    assert (after.fingerprint, after.metadata) == (before.fingerprint, {"seed": 7})
    assert list(recorded(loaded(saved(before)), range(rows, 9)).score().names) == NAMES
    assert torch.equal(recorded(after, range(rows, 9)).score().values, history().score().values)


def test_its_state_does_not_follow_what_is_recorded_later():
    made = history(5)
    state = made.state_dict()
    recorded(made, range(5, 9))
    other = recorded(RunningHistory.from_state_dict(state), range(5, 7))
    assert other.epochs == EPOCHS[:7]
    assert torch.equal(other.score().values, history(7).score().values)


@pytest.mark.parametrize("rows", [2, 40])
def test_its_state_in_a_checkpoint_takes_28_bytes_a_sample(rows):
    classes = torch.arange(20_000) % 10
    made = RunningHistory.of_losses(torch.rand(rows, 20_000), torch.rand(rows, 10), classes, torch.arange(10))
    assert 0 < len(saved(made)) - 36 * 20_000 < 24_000
    if rows > 2:
        made.keep_best_tenth()
        assert 0 < len(saved(made)) - 36.4 * 20_000 < 24_000


def test_it_moves_to_a_device_and_back():
    made = history(5)
    assert made.to("cpu") is made
    assert_scores(recorded(made, range(5, 9)).score().values, EXPECTED)


def test_on_mps_which_has_no_float64_it_stays_on_the_cpu():
    assert_scores(recorded(history(5).to("mps"), range(5, 9)).score().values, EXPECTED)


def test_a_cutoff_that_was_not_reached_raises():
    with pytest.raises(ValueError, match=r"cutoff_epoch=13 was not reached: the last checkpoint is after 12 epochs"):
        history().score(cutoff_epoch=13)


def test_too_few_checkpoints_raise():
    with pytest.raises(ValueError, match=r"at least 4 checkpoints .* got 3"):
        history(3).score()


def test_an_infinite_reference_raises_and_names_its_epoch_and_class():
    made = history(5)
    made.record(6, TRAIN[5], VAL[5].where(VAL_CLASSES != 3, torch.inf))
    with pytest.raises(ValueError, match="class 3 are not finite at the checkpoint after 6 epochs"):
        made.score()
