from __future__ import annotations

import io

import pytest
import torch
from oracles import assert_scores, cld_oracle, losses

from lightning_cld import LossTrajectories
from lightning_cld.data.fingerprint import Fingerprint
from lightning_cld.recording.running_history import RunningHistory

TRAIN, VAL = losses(9, 30), losses(9, 12, seed=1)
CLASSES, VAL_CLASSES = torch.tensor([0, 3, 700])[torch.arange(30) % 3], torch.tensor([0, 3, 700])[torch.arange(12) % 3]
EPOCHS = [0, 1, 2, 3, 4, 6, 8, 10, 12]
EXPECTED = cld_oracle(TRAIN, VAL, CLASSES, VAL_CLASSES)


def history(rows=9, train_classes=CLASSES, val_classes=VAL_CLASSES):
    made = RunningHistory.of_losses(
        TRAIN[:1], VAL[:1], train_classes, val_classes, EPOCHS[:1], fingerprint=Fingerprint(30, "labels", "probe")
    )
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
    made = history()
    made.metadata["seed"] = 7
    scores = made.score(cutoff_epoch=12)
    full = LossTrajectories(TRAIN, VAL, CLASSES, VAL_CLASSES, EPOCHS, metadata={"seed": 7}).score()
    assert torch.equal(scores.classes, CLASSES)
    assert scores.epochs == EPOCHS
    assert scores.fingerprint == Fingerprint(30, "labels", "probe")
    assert scores.metadata["seed"] == 7
    needs_the_losses = {"reference_reliability", "half_epoch", "half_overlap"}
    assert scores.metadata.keys() == full.metadata.keys() - needs_the_losses
    assert scores.metadata["reference_sizes"] == full.metadata["reference_sizes"] == {"0": 4, "3": 4, "700": 4}


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
    assert torch.equal(recorded(after, range(rows, 9)).score().values, history().score().values)


def test_its_state_does_not_follow_what_is_recorded_later():
    made = history(5)
    state = made.state_dict()
    recorded(made, range(5, 9))
    other = recorded(RunningHistory.from_state_dict(state), range(5, 7))
    assert other.epochs == EPOCHS[:7]
    assert torch.equal(other.score().values, history(7).score().values)


@pytest.mark.parametrize("rows", [2, 40])
def test_its_state_in_a_checkpoint_takes_20_bytes_a_sample(rows):
    classes = torch.arange(20_000) % 10
    made = RunningHistory.of_losses(torch.rand(rows, 20_000), torch.rand(rows, 10), classes, torch.arange(10))
    assert len(saved(made)) < 20 * 20_000 + 16_000


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
