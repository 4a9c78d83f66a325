from __future__ import annotations

import io
import pickle
import platform
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from oracles import assert_scores, cld_oracle, confidence_oracle, losses, noisy_losses
from toys import Blobs, fit

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule, baselines
from lightning_cld.data.fingerprint import Fingerprint
from lightning_cld.functional.diagnostics import reference_reliability
from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.scores import OUTSIDE
from lightning_cld.trajectories import LossTrajectories

NAN, INF = float("nan"), float("inf")
TRAIN, VAL = losses(13, 30), losses(13, 12, seed=1)
CLASSES, VAL_CLASSES = torch.tensor([0, 3, 700])[torch.arange(30) % 3], torch.tensor([0, 3, 700])[torch.arange(12) % 3]
NAMES = [f"shard-{position % 4}/{position}" for position in range(30)]
EPOCHS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16]


def trajectories(**changes):
    arguments = {
        "train_losses": TRAIN.clone(),
        "val_losses": VAL.clone(),
        "train_classes": CLASSES,
        "val_classes": VAL_CLASSES,
        "epochs": EPOCHS,
        "fingerprint": Fingerprint(30, "labels", "probe"),
        "metadata": {"seed": 7, "nested": {"list": [1, 2.5, None]}},
        "names": NAMES,
    }
    return LossTrajectories(**{**arguments, **changes})


def assert_same(a, b):
    for name in ("train_losses", "val_losses", "train_classes", "val_classes"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True)
    assert (a.epochs, a.fingerprint, a.metadata, a.names) == (b.epochs, b.fingerprint, b.metadata, b.names)


# Construction


@pytest.mark.parametrize(
    "kind",
    [
        lambda tensor: tensor,
        lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.int(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.tolist(),
    ],
    ids=["tensor", "other dtype", "ndarray", "list"],
)
def test_losses_and_classes_come_as_tensors_arrays_or_lists(kind):
    made = trajectories(
        **{
            "train_losses": kind(TRAIN),
            "val_losses": kind(VAL),
            "train_classes": kind(CLASSES),
            "val_classes": kind(VAL_CLASSES),
        }
    )
    assert_same(made, trajectories())


def test_its_attributes_are_what_it_was_given():
    made = trajectories()
    assert torch.equal(made.train_losses, TRAIN)
    assert torch.equal(made.val_losses, VAL)
    assert torch.equal(made.train_classes, CLASSES)
    assert torch.equal(made.val_classes, VAL_CLASSES)
    assert made.epochs == EPOCHS
    assert made.fingerprint == Fingerprint(30, "labels", "probe")
    assert made.metadata == {"seed": 7, "nested": {"list": [1, 2.5, None]}}


def test_what_is_not_given_is_none_or_numbered():
    made = LossTrajectories(TRAIN, VAL)
    assert made.train_classes is None
    assert made.val_classes is None
    assert made.fingerprint is None
    assert made.epochs == list(range(13))
    assert made.metadata == {}


def test_len_and_repr_count_what_there_is():
    assert len(trajectories()) == 13
    assert repr(trajectories()) == "LossTrajectories(13 checkpoints, 30 train and 12 val samples)"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_losses": TRAIN.long()}, TypeError, r"train_losses must be a floating point tensor"),
        ({"val_losses": VAL[0]}, ValueError, r"val_losses must have shape \[checkpoints, samples\]"),
        ({"val_losses": VAL[:5]}, ValueError, r"a row for each checkpoint, got 13 and 5 rows"),
        ({"train_losses": TRAIN[:0], "val_losses": VAL[:0]}, ValueError, r"a row for each checkpoint, got 0 and 0"),
        ({"train_classes": None}, ValueError, r"got only val_classes"),
        ({"val_classes": None}, ValueError, r"got only train_classes"),
        ({"train_classes": CLASSES.float()}, TypeError, r"train_classes must be integers"),
        ({"val_classes": VAL_CLASSES.bool()}, TypeError, r"val_classes must be integers"),
        ({"train_classes": CLASSES[:5]}, ValueError, r"train_classes must have shape \[30\].*got \[5\]"),
        ({"val_classes": VAL_CLASSES[:5]}, ValueError, r"val_classes must have shape \[12\].*got \[5\]"),
        ({"train_classes": CLASSES - 2}, ValueError, r"train_classes must not be negative, got -2"),
        ({"val_classes": VAL_CLASSES - 1}, ValueError, r"val_classes must not be negative, got -1"),
        ({"train_classes": torch.full((30,), OUTSIDE)}, ValueError, r"train_classes are all -1"),
        ({"val_classes": torch.zeros(12).long()}, ValueError, r"classes 3, 700 have training but no validation"),
        ({"epochs": [0, 1]}, ValueError, r"epochs must be 13 increasing numbers .*got \[0, 1\]"),
        ({"epochs": []}, ValueError, r"epochs must be 13 increasing numbers"),
        ({"epochs": range(-1, 12)}, ValueError, r"epochs must be 13 increasing numbers .*got \[-1, 0, 1"),
        ({"epochs": [0, 0, *range(2, 13)]}, ValueError, r"epochs must be 13 increasing numbers .*got \[0, 0, 2"),
        ({"epochs": range(12, -1, -1)}, ValueError, r"epochs must be 13 increasing numbers .*got \[12, 11"),
    ],
)
def test_bad_arguments_raise(changes, error, message):
    with pytest.raises(error, match=message):
        trajectories(**changes)


# The scores


@pytest.mark.parametrize(
    ("choice", "epochs"),
    [
        ({}, EPOCHS),
        ({"cutoff_epoch": 16}, EPOCHS),
        ({"cutoff_epoch": 5}, [0, 1, 2, 3, 4, 5]),
        ({"cutoff_epoch": 9}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"every_n_epochs": 2}, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        ({"every_n_epochs": 3}, [0, 3, 6, 12]),
        ({"cutoff_epoch": 11, "every_n_epochs": 2}, [0, 2, 4, 6, 8, 10]),
    ],
    ids=str,
)
def test_scores_are_those_of_the_checkpoints_chosen(choice, epochs):
    scores = trajectories().score(**choice)
    rows = [EPOCHS.index(epoch) for epoch in epochs]
    assert scores.epochs == epochs
    assert_scores(scores.values, cld_oracle(TRAIN[rows], VAL[rows], CLASSES, VAL_CLASSES))


def test_without_classes_all_are_one():
    assert_scores(LossTrajectories(TRAIN, VAL).score().values, cld_oracle(TRAIN, VAL))


def test_scores_carry_classes_identity_and_provenance():
    scores = trajectories().score(every_n_epochs=2)
    assert torch.equal(scores.classes, CLASSES)
    assert scores.fingerprint == Fingerprint(30, "labels", "probe")
    assert scores.metadata["seed"] == 7
    assert scores.metadata["scored_every_n_epochs"] == 2
    assert scores.metadata["reference_sizes"] == {"0": 4, "3": 4, "700": 4}
    assert scores.metadata["versions"]["python"] == platform.python_version()
    assert set(scores.metadata["versions"]) == {"python", "lightning-cld", "lightning", "torch", "numpy"}


def test_scores_with_their_provenance_can_be_saved(tmp_path):
    scores = trajectories().score()
    assert CLDScores.load(scores.save(tmp_path / "scores.npz")).metadata == scores.metadata


@pytest.mark.parametrize("classes", [True, False], ids=["classes", "one class"])
def test_scores_know_how_reliable_each_reference_is(classes):
    changes = {} if classes else {"train_classes": None, "val_classes": None}
    made = trajectories(**changes)
    labels = torch.tensor([0, 3, 700]) if classes else torch.tensor([0])
    expected = reference_reliability(VAL, VAL_CLASSES if classes else torch.zeros(12, dtype=torch.int64), labels)
    found = made.score().metadata["reference_reliability"]
    assert found == {str(int(c)): round(value, 4) for c, value in zip(labels, expected.tolist(), strict=True)}


def test_a_class_with_one_validation_sample_has_no_known_reliability():
    val_classes = torch.cat([torch.tensor([700]), torch.tensor([0, 3])[torch.arange(11) % 2]])
    reliability = trajectories(val_classes=val_classes).score().metadata["reference_reliability"]
    assert reliability["700"] is None
    assert reliability["0"] is not None


@pytest.mark.parametrize(("choice", "half"), [({}, 8), ({"cutoff_epoch": 7}, 3), ({"every_n_epochs": 2}, 8)])
def test_scores_know_how_much_of_the_best_tenth_was_the_same_at_half_the_epochs(choice, half):
    generator = np.random.default_rng(3)
    train, val = (np.cumsum(generator.normal(size=(13, n)), axis=0).astype(np.float32) for n in (300, 12))
    classes = torch.tensor([0, 3, 700])[torch.arange(300) % 3]
    made = trajectories(train_losses=train, val_losses=val, train_classes=classes, fingerprint=None, names=None)
    coresets = []
    for cutoff in (choice.get("cutoff_epoch", 16), half):
        kept = [e for e in EPOCHS if e <= cutoff and e % choice.get("every_n_epochs", 1) == 0]
        rows = [EPOCHS.index(epoch) for epoch in kept]
        values = cld_oracle(train[rows], val[rows], classes, VAL_CLASSES)
        coresets.append(
            {int(i) for c in (0, 3, 700) for i in sorted(np.flatnonzero(classes == c), key=lambda i: -values[i])[:10]}
        )
    metadata = made.score(**choice).metadata
    assert metadata["half_epoch"] == half
    assert metadata["half_overlap"] == round(len(coresets[0] & coresets[1]) / 30, 4) < 1


@pytest.mark.parametrize(
    ("changes", "choice"),
    [({}, {"cutoff_epoch": 5}), ({"epochs": range(20, 33)}, {})],
    ids=["too few by then", "nothing by then"],
)
def test_scores_of_too_few_epochs_do_not_know_how_settled_they_are(changes, choice):
    metadata = trajectories(**changes).score(**choice).metadata
    assert not {"half_epoch", "half_overlap"} & set(metadata)
    assert "reference_reliability" in metadata


@pytest.mark.parametrize("cutoff", [None, 7])
def test_values_are_those_of_the_scores(cutoff):
    made = trajectories()
    assert torch.equal(made.values(cutoff), made.score(cutoff).values)


def test_positions_outside_of_the_sampler_are_unscored_and_change_no_score():
    classes = CLASSES.clone()
    classes[[4, 9]] = OUTSIDE
    train = TRAIN.clone()
    train[:, 4] = NAN
    expected = cld_oracle(TRAIN, VAL, CLASSES, VAL_CLASSES)
    expected[[4, 9]] = np.nan
    scores = trajectories(train_losses=train, train_classes=classes).score()
    assert_scores(scores.values, expected)
    assert torch.equal(scores.classes, classes)


def test_a_class_that_lies_outside_of_the_sampler_needs_no_reference():
    classes = CLASSES.where(CLASSES != 700, OUTSIDE)
    scores = trajectories(train_classes=classes, val_classes=VAL_CLASSES.clamp(max=3)).score()
    assert torch.equal(scores.values.isnan(), CLASSES == 700)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"cutoff_epoch": 17}, r"cutoff_epoch=17 was not reached: the last checkpoint is after 16 epochs"),
        ({"cutoff_epoch": 2}, r"at least 4 checkpoints, got 3 \(after \[0, 1, 2\] epochs\) with cutoff_epoch=2"),
        ({"every_n_epochs": 5}, r"at least 4 checkpoints, got 3 \(after \[0, 5, 10\] epochs\)"),
        ({"every_n_epochs": 8}, r"got 3 \(after \[0, 8, 16\] epochs\).*every_n_epochs=8"),
        ({"every_n_epochs": 0}, r"every_n_epochs must be at least 1, got 0"),
        ({"every_n_epochs": -1}, r"every_n_epochs must be at least 1, got -1"),
    ],
    ids=str,
)
def test_checkpoints_that_there_are_too_few_of_raise(choice, message):
    with pytest.raises(ValueError, match=message):
        trajectories().score(**choice)


def diverged():
    """Trajectories whose reference of class 3 is infinite from the checkpoint after 12 epochs on."""
    val = VAL.clone()
    val[10, 4] = val[11, 0] = INF
    return trajectories(val_losses=val)


def test_an_infinite_reference_raises_and_names_its_epoch_and_class():
    with pytest.raises(ValueError, match=r"of class 3 are not finite at the checkpoint after 12 epochs"):
        diverged().score()


def test_a_reference_that_is_infinite_after_the_cutoff_is_no_problem():
    expected = cld_oracle(TRAIN[:10], VAL[:10], CLASSES, VAL_CLASSES)
    assert_scores(diverged().score(cutoff_epoch=10).values, expected)


def test_a_loss_that_is_infinite_after_the_cutoff_is_no_problem():
    train = TRAIN.clone()
    train[10, 4] = INF
    made = trajectories(train_losses=train)
    assert made.score().values.isnan().nonzero().flatten().tolist() == [4]
    assert made.score(cutoff_epoch=10).values.isfinite().all()


def test_scoring_leaves_the_losses_as_they_are():
    made = trajectories()
    made.score(every_n_epochs=2)
    assert_same(made, trajectories())


# Scores other than CLD


def last_loss(part, sign=1.0):
    return sign * part.train_losses[-1]


class Hardest:
    def __call__(self, part):
        return last_loss(part)

    def hard(self, part):
        return last_loss(part)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_are_those_that_by_returns(dtype):
    values = torch.linspace(-1, 1, 30).to(dtype)
    scores = trajectories().score(by=lambda part: values)
    assert scores.values.dtype == torch.float32
    assert torch.equal(scores.values, values.float())


def test_by_may_return_what_has_no_value_for_some_or_hangs_on_a_graph():
    values = torch.linspace(-1, 1, 30)
    values[3] = NAN
    scores = trajectories().score(by=lambda part: values.clone().requires_grad_() * 1)
    torch.testing.assert_close(scores.values, values, equal_nan=True)
    assert not scores.values.requires_grad
    assert 3 not in scores.select(per_class=9).tolist()


@pytest.mark.parametrize(
    ("choice", "rows"),
    [
        ({}, range(13)),
        ({"cutoff_epoch": 0}, [0]),
        ({"cutoff_epoch": 9}, range(9)),
        ({"every_n_epochs": 3}, [0, 3, 6, 10]),
        ({"cutoff_epoch": 11, "every_n_epochs": 4}, [0, 4, 8]),
    ],
    ids=str,
)
def test_by_is_given_the_checkpoints_chosen_and_all_that_belongs_to_them(choice, rows):
    seen, rows = [], list(rows)
    scores = trajectories().score(**choice, by=lambda part: seen.append(part) or last_loss(part))
    (part,) = seen
    epochs = [EPOCHS[row] for row in rows]
    assert_same(part, trajectories(train_losses=TRAIN[rows], val_losses=VAL[rows], epochs=epochs))
    assert scores.epochs == epochs
    assert torch.equal(scores.values, TRAIN[rows[-1]])


def test_by_is_given_only_the_rows_that_were_recorded():
    assert torch.equal(recorded(10).score(by=last_loss).values, TRAIN[9])
    assert torch.equal(recorded(10).score(5, by=last_loss).values, TRAIN[5])


def test_what_by_does_to_the_trajectories_it_was_given_stays_with_them():
    def clumsy(part):
        part.record(5, torch.zeros(30), torch.zeros(12))
        part.record(6, torch.zeros(30), torch.zeros(12))
        part.metadata["seed"] = 8
        return last_loss(part)

    made = trajectories()
    assert made.score(5, by=clumsy).metadata["seed"] == 7
    assert_same(made, trajectories())


def test_scores_by_something_else_carry_classes_identity_and_provenance():
    scores = trajectories().score(every_n_epochs=2, by=last_loss)
    assert torch.equal(scores.classes, CLASSES)
    assert scores.fingerprint == Fingerprint(30, "labels", "probe")
    by_cld = trajectories().score(every_n_epochs=2).metadata
    assert by_cld.pop("scored_by") == "CLD"
    by_loss = dict(scores.metadata)
    assert by_loss.pop("scored_by") == "last_loss"
    for only_of_cld in ("reference_reliability", "half_epoch", "half_overlap", "implausible", "differences"):
        assert by_cld.pop(only_of_cld) is not None
    assert {**by_loss, "created": None} == {**by_cld, "created": None}


@pytest.mark.parametrize(
    ("by", "name"),
    [
        (last_loss, "last_loss"),
        (baselines.dual, "dual"),
        (partial(last_loss, sign=-1.0), "last_loss"),
        (partial(partial(last_loss), sign=-1.0), "last_loss"),
        (Hardest(), "Hardest"),
        (partial(Hardest()), "Hardest"),
        (Hardest().hard, "hard"),
        (lambda part: last_loss(part), "<lambda>"),
    ],
    ids=["function", "baseline", "partial", "partial of a partial", "object", "partial object", "method", "lambda"],
)
def test_scores_say_what_they_were_scored_by(tmp_path, by, name):
    scores = trajectories().score(by=by)
    assert scores.metadata["scored_by"] == name
    assert CLDScores.load(scores.save(tmp_path / "scores.npz")).metadata["scored_by"] == name


def test_scoring_by_something_else_changes_neither_the_losses_nor_cld():
    made, before = trajectories(), trajectories().score()
    for name in ("highest_mean_loss", "area_under_loss", "dual", "stratified_cld"):
        made.score(by=getattr(baselines, name))
        made.score(8, 2, by=getattr(baselines, name))
    assert_same(made, trajectories())
    after = made.score()
    assert torch.equal(after.values, before.values)
    assert torch.equal(made.score(by=lambda part: part.score().values).values, before.values)


def test_values_of_positions_outside_of_the_sampler_are_dropped():
    classes = CLASSES.clone()
    classes[[4, 9]] = OUTSIDE
    scores = trajectories(train_classes=classes).score(by=lambda part: torch.ones(30))
    assert scores.values.isnan().nonzero().flatten().tolist() == [4, 9]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (None, TypeError, r"by=<lambda> must return a floating point tensor, got NoneType"),
        (TRAIN[0].tolist(), TypeError, r"must return a floating point tensor, got list"),
        (TRAIN[0].numpy(), TypeError, r"must return a floating point tensor, got ndarray"),
        (torch.arange(30), TypeError, r"must return a floating point tensor, got torch\.int64"),
        (TRAIN[0] > 1, TypeError, r"must return a floating point tensor, got torch\.bool"),
        (TRAIN[0] + 0j, TypeError, r"must return a floating point tensor, got torch\.complex64"),
        (TRAIN, ValueError, r"by=<lambda> must return one value for each of the 30 .*got shape \[13, 30\]"),
        (TRAIN[0, :29], ValueError, r"one value for each of the 30 training samples, got shape \[29\]"),
        (TRAIN[:1], ValueError, r"one value for each of the 30 training samples, got shape \[1, 30\]"),
        (VAL[0], ValueError, r"one value for each of the 30 training samples, got shape \[12\]"),
        (TRAIN.mean(), ValueError, r"one value for each of the 30 training samples, got shape \[\]"),
    ],
    ids=["None", "list", "ndarray", "int", "bool", "complex", "all", "one fewer", "row", "val", "scalar"],
)
def test_something_else_than_a_value_a_sample_is_refused(values, error, message):
    with pytest.raises(error, match=message):
        trajectories().score(by=lambda part: values)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"cutoff_epoch": 17}, r"cutoff_epoch=17 was not reached: the last checkpoint is after 16 epochs"),
        ({"every_n_epochs": 0}, r"every_n_epochs must be at least 1, got 0"),
    ],
    ids=str,
)
def test_checkpoints_that_there_are_not_raise_for_something_else_too(choice, message):
    with pytest.raises(ValueError, match=message):
        trajectories().score(**choice, by=last_loss)


@pytest.mark.parametrize("by", [None, last_loss], ids=["CLD", "something else"])
@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"cutoff_epoch": 2}, "cutoff_epoch=2 and every_n_epochs=1"),
        ({"every_n_epochs": 20}, "cutoff_epoch=None and every_n_epochs=20"),
        ({"cutoff_epoch": 5, "every_n_epochs": 7}, "cutoff_epoch=5 and every_n_epochs=7"),
    ],
    ids=str,
)
def test_no_checkpoint_left_raises(choice, said, by):
    made = trajectories(epochs=range(3, 16))
    message = rf"No checkpoint is left with {said}. There are checkpoints after \[3, 4, .* epochs\. Use more of them"
    with pytest.raises(ValueError, match=message):
        made.score(**choice, by=by)


def test_scores_by_something_else_serve_their_coreset(tmp_path):
    cld = CLDCallback()
    fit(tmp_path, cld, max_epochs=3)
    by = partial(baselines.random_values, seed=3)
    scores = cld.trajectories.score(by=by)
    coreset = CoresetDataModule(Blobs(), scores.save(tmp_path / "random.npz"), fraction=0.4)
    assert coreset.indices == scores.select(fraction=0.4).tolist()
    assert coreset.indices != cld.trajectories.score().select(fraction=0.4).tolist()
    train_set = Blobs().train_set
    expected = sorted(train_set[i][0].tolist() for i in coreset.indices)
    assert sorted(inputs.tolist() for batch in coreset.train_dataloader() for inputs in batch[0]) == expected
    of_others = CoresetDataModule(Blobs(), trajectories(names=None).score(by=last_loss), size=3)
    with pytest.raises(ValueError, match="not of this train set"):
        of_others.train_dataloader()


# Recording


def recorded(rows):
    """Trajectories of `rows` rows, all but the first added by `record`."""
    made = trajectories(train_losses=TRAIN[:1].clone(), val_losses=VAL[:1].clone(), epochs=[0])
    for row in range(1, rows):
        made.record(EPOCHS[row], TRAIN[row], VAL[row])
    return made


@pytest.mark.parametrize("rows", range(1, 14))
def test_recorded_rows_are_appended_and_earlier_ones_stay(rows):
    expected = trajectories(train_losses=TRAIN[:rows], val_losses=VAL[:rows], epochs=EPOCHS[:rows])
    assert_same(recorded(rows), expected)


def test_recorded_rows_are_scored():
    assert_scores(recorded(13).score().values, cld_oracle(TRAIN, VAL, CLASSES, VAL_CLASSES))


@pytest.mark.parametrize("rows", [1, 5, 13])
def test_the_newest_checkpoint_is_replaced(rows):
    made = recorded(rows)
    made.record(EPOCHS[rows - 1], TRAIN[rows - 1] + 1, VAL[rows - 1] + 2)
    train, val = TRAIN[:rows].clone(), VAL[:rows].clone()
    train[-1] += 1
    val[-1] += 2
    assert_same(made, trajectories(train_losses=train, val_losses=val, epochs=EPOCHS[:rows]))


def test_an_older_checkpoint_is_refused():
    made = recorded(5)
    with pytest.raises(ValueError, match=r"recorded in order: got 3 after 4"):
        made.record(3, TRAIN[3], VAL[3])
    assert_same(made, recorded(5))


@pytest.mark.parametrize(
    ("train_row", "val_row"),
    [(TRAIN[5, :7], VAL[5]), (TRAIN[5], VAL[5, :7]), (TRAIN[5, :1], VAL[5]), (TRAIN[5], VAL[5, 0])],
    ids=["train", "val", "one train loss", "one val loss"],
)
def test_a_row_of_the_wrong_length_is_refused_and_changes_nothing(train_row, val_row):
    made = recorded(5)
    with pytest.raises((ValueError, RuntimeError)):
        made.record(5, train_row, val_row)
    assert_same(made, recorded(5))


@pytest.mark.parametrize("kind", [torch.clone, lambda tensor: tensor.numpy().copy()], ids=["tensor", "ndarray"])
def test_recording_leaves_the_losses_it_was_built_from_as_they_are(kind):
    train, val = kind(TRAIN), kind(VAL)
    trajectories(train_losses=train, val_losses=val).record(EPOCHS[-1], TRAIN[0], VAL[0])
    assert torch.equal(torch.as_tensor(train), TRAIN)
    assert torch.equal(torch.as_tensor(val), VAL)


def test_a_row_that_was_recorded_is_no_longer_the_callers():
    made, row = recorded(5), TRAIN[5].clone()
    made.record(5, row, VAL[5])
    row.zero_()
    assert_same(made, recorded(6))


# Files and checkpoints


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_classes": None, "val_classes": None},
        {"fingerprint": None},
        {"metadata": None},
        {"names": None},
        {"train_classes": CLASSES.where(CLASSES != 3, OUTSIDE)},
        {"train_losses": TRAIN.where(TRAIN < 2, NAN), "val_losses": VAL.where(VAL < 2, INF)},
    ],
    ids=["all", "no classes", "no fingerprint", "no metadata", "no names", "outside", "not finite"],
)
@pytest.mark.parametrize("through", ["file", "state"])
def test_what_was_stored_is_read(tmp_path, changes, through):
    before = trajectories(**changes)
    if through == "file":
        after = LossTrajectories.load(before.save(tmp_path / "trajectories.npz"))
    else:
        after = LossTrajectories.from_state_dict(before.state_dict())
    assert_same(after, before)


def test_a_state_and_a_pickle_of_a_version_without_names_are_read():
    state = trajectories().state_dict()
    del state["names"]
    former = trajectories()
    del former.names
    for made in (LossTrajectories.from_state_dict(state), pickle.loads(pickle.dumps(former))):
        assert_same(made, trajectories(names=None))


@pytest.mark.parametrize("by", [None, last_loss, baselines.near_zero_cld])
def test_scores_have_the_names_of_the_losses(by):
    assert list(trajectories().score(8, 2, by=by).names) == NAMES
    assert trajectories(names=None).score(by=by).names is None


def test_a_file_after_growth_holds_the_rows_recorded(tmp_path):
    assert_same(LossTrajectories.load(recorded(5).save(tmp_path / "file")), recorded(5))


def test_loaded_trajectories_can_be_recorded_to(tmp_path):
    made = LossTrajectories.load(recorded(5).save(tmp_path / "file"))
    made.record(5, TRAIN[5], VAL[5])
    assert_same(made, recorded(6))


@pytest.mark.parametrize("tenths", range(10))
def test_a_truncated_file_is_refused(tmp_path, tenths):
    path = trajectories().save(tmp_path / "trajectories.npz")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * tenths // 10])
    with pytest.raises(ValueError, match=rf"LossTrajectories\.load: {path} is not a complete cld-trajectories file"):
        LossTrajectories.load(path)


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"LossTrajectories\.load: there is no file .*missing\.npz"):
        LossTrajectories.load(tmp_path / "missing.npz")


def test_a_scores_file_is_refused(tmp_path):
    path = trajectories().score().save(tmp_path / "scores.npz")
    with pytest.raises(ValueError, match=r"scores\.npz holds 'cld-scores', not 'cld-trajectories'"):
        LossTrajectories.load(path)


def saved(made):
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    return file.getvalue()


def test_its_state_is_read_from_a_checkpoint_without_unpickling_code():
    state = torch.load(io.BytesIO(saved(trajectories())), weights_only=True)
    assert_same(LossTrajectories.from_state_dict(state), trajectories())


def test_its_state_in_a_checkpoint_is_no_larger_than_what_it_holds():
    classes, val_classes = torch.zeros(20_000, dtype=torch.int64), torch.zeros(500, dtype=torch.int64)
    made = LossTrajectories(torch.rand(1, 20_000), torch.rand(1, 500), classes, val_classes)
    for epoch in range(1, 5):  # the fifth row grows the buffer to eight
        made.record(epoch, torch.rand(20_000), torch.rand(500))
    assert len(saved(made)) <= 5 * 20_500 * 4 + 20_500 * 8 + 64_000


def test_its_state_in_a_checkpoint_does_not_hold_what_it_was_given_a_part_of():
    losses_of_more, classes_of_more = torch.rand(8, 100_000), torch.zeros(100_000, dtype=torch.int64)
    made = LossTrajectories(
        losses_of_more[:4, :50], losses_of_more[:4, :50], classes_of_more[:50], classes_of_more[:50]
    )
    assert len(saved(made)) <= 64_000


def test_its_state_does_not_follow_what_is_recorded_later():
    made = recorded(5)
    state = made.state_dict()
    made.record(4, TRAIN[0], VAL[0])
    made.record(5, TRAIN[5], VAL[5])
    assert_same(LossTrajectories.from_state_dict(state), recorded(5))


def test_its_state_is_not_written_to_by_what_is_made_of_it():
    state = recorded(5).state_dict()
    LossTrajectories.from_state_dict(state).record(4, TRAIN[0], VAL[0])
    assert_same(LossTrajectories.from_state_dict(state), recorded(5))


def test_moving_to_a_device_keeps_what_it_holds():
    made = trajectories()
    assert made.to("cpu") is made
    assert_same(made, trajectories())


@pytest.mark.parametrize("start", [0, 2], ids=["theta_0 logged", "theta_0 missing"])
def test_scores_hold_the_confidence_of_the_trained_checkpoints(start):
    train, val = losses(7, 40, seed=1), losses(7, 12, seed=2)
    train[3, 5], train[4, 6] = float("nan"), float("inf")
    scores = LossTrajectories(train, val, epochs=range(start, start + 7)).score()
    first = 0 if start else 1
    expected = confidence_oracle(train[first:], val[first:])[0]
    np.testing.assert_allclose(scores.confidence.numpy(), expected, rtol=0, atol=1e-6)
    assert np.isnan(expected).nonzero()[0].tolist() == scores.plausibility.isnan().nonzero().flatten().tolist() == [6]


def test_classes_that_only_validation_has_change_nothing():
    classes, val_classes = torch.arange(900) % 3, torch.arange(360) % 3
    train, val, _ = noisy_losses(8, classes, val_classes)
    expected = LossTrajectories(train, val, classes, val_classes).score()
    others = torch.linspace(1, 300, 8)[:, None] + torch.rand(8, 120)  # rising, so that theirs is the lowest mean
    more = LossTrajectories(
        train, torch.cat([others, val], dim=1), classes, torch.cat([torch.arange(120) % 2 + 7, val_classes])
    ).score()
    assert (expected.plausibility < 1).any()
    for name in ("values", "plausibility", "confidence"):
        assert torch.equal(getattr(more, name), getattr(expected, name)), name
    assert more.metadata["implausible"] == expected.metadata["implausible"]


def test_losses_of_steps_have_no_share_of_implausible_labels():
    train, val, wrong = noisy_losses(8, torch.arange(900) % 3, torch.arange(360) % 3)
    scores = LossTrajectories(train, val, torch.arange(900) % 3, torch.arange(360) % 3, from_steps=True).score()
    assert "implausible" not in scores.metadata
    assert set(scores.plausibility.tolist()) == {0.0, 1.0}
    assert scores.plausibility[wrong].mean() < 0.2 < 0.8 < scores.plausibility[~wrong].mean()


def test_other_values_hold_no_plausibility():
    trajectories = LossTrajectories(losses(7, 40, seed=1), losses(7, 12, seed=2))
    scores = trajectories.score(by=lambda part: part.train_losses[-1])
    assert scores.plausibility is scores.confidence is None
    assert "implausible" not in scores.metadata


# Memory

PEAK = """
import sys
from lightning_cld import LossTrajectories

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

LossTrajectories.load(sys.argv[1])  # what is imported or set up at the first time does not count
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = peak()
loaded = LossTrajectories.load(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_loading_takes_a_tenth_more_memory_than_the_file_has_bytes(tmp_path):
    classes = torch.arange(400_000) % 10
    small = LossTrajectories([[2.5, 1.0]], [[2.0]]).save(tmp_path / "small.npz")
    large = LossTrajectories(torch.rand(91, 400_000), torch.rand(91, 10), classes, torch.arange(10)).save(
        tmp_path / "large.npz"
    )
    said = subprocess.run([sys.executable, "-c", PEAK, small, large], capture_output=True, text=True, check=True)
    assert 0.9 * large.stat().st_size < int(said.stdout) < 1.1 * large.stat().st_size


def test_a_checkpoint_that_is_logged_is_no_hole():
    made, expected = trajectories(), trajectories()
    made.leave_hole(16)
    assert_same(made, expected)
    made.leave_hole(17)
    assert made.epochs == [*EPOCHS, 17]
    assert made.logged_epochs == EPOCHS
    with pytest.raises(ValueError, match="in order"):
        made.leave_hole(16)


@pytest.mark.parametrize("wrong", [2.5, True, "2"])
def test_epochs_are_whole_numbers(wrong):
    made = trajectories()
    with pytest.raises(TypeError, match="every_n_epochs must be a whole number"):
        made.score(every_n_epochs=wrong)
    with pytest.raises(TypeError, match="epoch must be a whole number"):
        made.record(wrong, torch.zeros(30), torch.zeros(12))
    made.record(np.int64(17), torch.zeros(30), torch.zeros(12))
    assert type(made.epochs[-1]) is int


def test_complex_losses_are_refused():
    with pytest.raises(TypeError, match="train_row must be numbers"):
        trajectories().record(17, torch.zeros(30, dtype=torch.complex64), torch.zeros(12))


@pytest.mark.parametrize("history", [LossTrajectories, RunningHistory.of_losses])
def test_references_are_counted_of_trained_classes_and_differences_without_holes(history):
    val, val_classes = torch.cat([VAL, VAL[:, :2]], dim=1), torch.cat([VAL_CLASSES, torch.tensor([5, 5])])
    made = history(TRAIN[:6], val[:6], CLASSES, val_classes, EPOCHS[:6])
    made.leave_hole(6)
    made.record(7, TRAIN[7], val[7])
    made.record(8, TRAIN[8], val[8])
    found = made.score().metadata
    assert found["reference_sizes"] == {"0": 4, "3": 4, "700": 4}
    assert found["differences"] == 6  # five, and that from epoch 7 to 8
