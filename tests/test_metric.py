from __future__ import annotations

import io
import pickle

import lightning as L
import pytest
import torch
from oracles import assert_scores, cld_oracle, confidence_oracle, losses, noisy_losses
from torch import nn
from torchmetrics import Metric

from lightning_cld import CLDMetric, CLDScores, LossTrajectories

TRAIN, VAL = losses(12, 30), losses(12, 12, seed=1)
CLASSES, VAL_CLASSES = torch.tensor([0, 3, 700])[torch.arange(30) % 3], torch.tensor([0, 3, 700])[torch.arange(12) % 3]
EXPECTED = cld_oracle(TRAIN, VAL, CLASSES, VAL_CLASSES)
CONFIDENCE = confidence_oracle(TRAIN[1:], VAL[1:])[0]


def updated(metric, rows):
    for row in rows:
        metric.update(TRAIN[row], VAL[row])
    return metric


def metric_of(rows=range(12)):
    return updated(CLDMetric(CLASSES, VAL_CLASSES), rows)


def test_it_is_a_metric_that_agrees_with_the_definition():
    metric = metric_of()
    assert isinstance(metric, Metric)
    assert_scores(metric.compute(), EXPECTED)


def test_without_classes_all_are_one():
    assert_scores(updated(CLDMetric(), range(12)).compute(), cld_oracle(TRAIN, VAL))


def test_scores_can_be_had_between_updates():
    metric = metric_of(range(5))
    assert_scores(metric.compute(), cld_oracle(TRAIN[:5], VAL[:5], CLASSES, VAL_CLASSES))
    assert_scores(updated(metric, range(5, 12)).compute(), EXPECTED)


@pytest.mark.parametrize("classes", [(CLASSES, VAL_CLASSES), ()])
def test_a_row_that_is_missing_is_spanned_by_no_difference(classes):
    metric = CLDMetric(*classes)
    train, val = TRAIN.clone(), VAL.clone()
    train[5] = val[5] = torch.nan
    for train_row, val_row in zip(train, val, strict=True):
        metric.update(train_row, val_row)
    assert_scores(metric.compute(), cld_oracle(train, val, *classes))


def test_reset_forgets_the_checkpoints_and_keeps_the_classes():
    metric = metric_of(range(3, 9))
    metric.reset()
    assert_scores(updated(metric, range(12)).compute(), EXPECTED)


# Scores to choose from


@pytest.mark.parametrize("classes", [(CLASSES, VAL_CLASSES), ()])
def test_its_scores_choose_and_tell_what_those_of_logged_losses_do(classes, tmp_path):
    train, val = losses(12, 30), losses(12, 12, seed=1)
    train[4], val[4] = torch.nan, torch.nan
    train[0, 5] = 1e3  # theta_0 does not count for the confidence
    metric = CLDMetric(*classes)
    for train_row, val_row in zip(train, val, strict=True):
        metric.update(train_row, val_row)
    made, full = metric.score(), LossTrajectories(train, val, *classes).score()
    assert_scores(made.values, cld_oracle(train, val, *classes))
    assert_scores(made.confidence, confidence_oracle(train[1:], val[1:])[0])
    assert torch.equal(made.plausibility.isnan(), made.values.isnan())
    assert (made.epochs, made.fingerprint) == (list(range(12)), full.fingerprint)
    assert torch.equal(made.select(rule="draw", fraction=0.2), full.select(rule="draw", fraction=0.2))
    assert made.suspects().tolist() == full.suspects().tolist()
    for name in ("reference_reliability", "reference_sizes"):
        assert made.metadata[name] == pytest.approx(full.metadata[name], abs=1e-4)
    if classes:
        assert torch.equal(made.classes, CLASSES)
    loaded = CLDScores.load(made.save(tmp_path / "scores.npz"))
    assert torch.equal(loaded.plausibility, made.plausibility)
    assert torch.equal(loaded.confidence, made.confidence)
    assert "settled? Not known: CLDMetric keeps no coreset" in made.summary() or "with care" in made.summary()


def test_its_scores_do_not_follow_later_updates():
    metric = metric_of(range(6))
    scores = metric.score()
    before = [scores.values.clone(), scores.plausibility.clone(), scores.confidence.clone()]
    updated(metric, range(6, 12))
    for now, then in zip((scores.values, scores.plausibility, scores.confidence), before, strict=True):
        assert torch.equal(now, then)
    assert_scores(metric.score().confidence, CONFIDENCE)


@pytest.mark.parametrize("hole", [None, 5])
def test_it_finds_wrong_labels_as_logged_losses_do(hole):
    classes, val_classes = torch.arange(3000) % 3, torch.arange(400) % 4
    train, val, wrong = noisy_losses(12, classes, val_classes)
    if hole:
        train[hole], val[hole] = torch.nan, torch.nan
    metric = CLDMetric(classes, val_classes)
    for train_row, val_row in zip(train, val, strict=True):
        metric.update(train_row, val_row)
    made, full = metric.score(), LossTrajectories(train, val, classes, val_classes).score()
    near = (made.plausibility - full.plausibility).abs() < 1e-5  # the others are at the edge of a bin
    assert near.float().mean() > 0.995
    assert made.metadata["implausible"]["share"] == pytest.approx(full.metadata["implausible"]["share"], abs=2e-3)
    assert made.plausibility[wrong].mean() < 0.2
    assert wrong[made.suspects()].float().mean() > 0.8


def test_too_few_checkpoints_have_no_scores():
    with pytest.raises(ValueError, match=r"at least 4 checkpoints .* got 3"):
        metric_of(range(3)).score()


# State: copies, devices, checkpoints


def through_state_dict(metric):
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    other = CLDMetric(CLASSES, VAL_CLASSES)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "travel",
    [
        through_state_dict,
        lambda metric: pickle.loads(pickle.dumps(metric)),
        lambda metric: metric.clone(),
        lambda metric: metric.to("cpu"),
        lambda metric: metric.to(torch.bfloat16).half().set_dtype(torch.float16),
        lambda metric: nn.ModuleList([metric]).to(torch.bfloat16)[0],
    ],
    ids=["state_dict", "pickle", "clone", "device", "dtype", "dtype of its module"],
)
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_it_goes_on_where_it_was(travel, rows):
    metric = travel(metric_of(range(rows)))
    assert_scores(updated(metric, range(rows, 12)).compute(), EXPECTED)
    scores, expected = metric.score(), metric_of().score()
    assert_scores(scores.confidence, CONFIDENCE)
    assert torch.equal(scores.plausibility, expected.plausibility)
    assert scores.metadata["reference_reliability"] == expected.metadata["reference_reliability"]
    assert scores.metadata["implausible"] == expected.metadata["implausible"]


NEW = ("confidence", "confidence_rows", "early", "lowest", "held_out", "early_rows", "marks")
FORMER = {"uncertainty": torch.rand(30), "uncertainty_rows": torch.tensor(5)}
"""What the version before this one kept instead. The oldest kept neither, and no halves."""


def from_former_state_dict(metric, into, oldest):
    state = {name: value for name, value in metric.state_dict().items() if name not in NEW}
    if oldest:
        del state["halves"]
    into.load_state_dict(state if oldest else state | FORMER)
    return into


def from_former_pickle(metric, into, oldest):
    for name in (*NEW, "halves") if oldest else NEW:
        for kept in (vars(metric), metric._defaults, metric._persistent, metric._reductions):
            del kept[name]
    for name, value in {} if oldest else FORMER.items():
        metric.add_state(name, torch.empty(0) if value.ndim else torch.tensor(0), persistent=True)
        setattr(metric, name, value)
    return pickle.loads(pickle.dumps(metric))


FORMERS = pytest.mark.parametrize("former", [from_former_state_dict, from_former_pickle])
OLDEST = pytest.mark.parametrize("oldest", [True, False])


@FORMERS
@OLDEST
def test_a_state_of_an_earlier_version_goes_on_without_plausibility(former, oldest):
    metric = former(metric_of(range(6)), metric_of(range(9)), oldest)  # what a metric held before doesn't stay
    scores = updated(metric, range(6, 12)).score()
    assert_scores(scores.values, EXPECTED)
    assert scores.plausibility is scores.confidence is None
    assert "implausible" not in scores.metadata
    assert ("reference_reliability" in scores.metadata) is not oldest
    with pytest.raises(ValueError, match=r"hold no plausibility \(running moments of an earlier version"):
        scores.select(fraction=0.2, rule="draw")
    assert through_state_dict(metric).score().plausibility is None
    assert not any("uncertainty" in name for name in metric.state_dict())
    metric.reset()
    assert_scores(updated(metric, range(12)).score().confidence, CONFIDENCE)


@FORMERS
@OLDEST
def test_an_earlier_version_without_checkpoints_lacks_nothing(former, oldest):
    metric = former(metric_of(range(0)), CLDMetric(CLASSES, VAL_CLASSES), oldest)
    assert_scores(updated(metric, range(12)).score().confidence, CONFIDENCE)


def test_its_classes_stay_whole_numbers_whatever_its_dtype():
    classes = 5000 + torch.arange(30) % 3  # float16 can't tell them apart
    metric = CLDMetric(classes, classes[:12])
    metric.set_dtype(torch.float16)
    assert torch.equal(updated(metric, range(12)).score().classes, classes)
    assert_scores(metric.compute(), cld_oracle(TRAIN, VAL, classes, classes[:12]))


def test_it_follows_its_device():
    metric = metric_of(range(4)).to("meta")
    assert {value.device.type for value in metric.metric_state.values()} == {"meta"}
    assert metric.device.type == "meta"


def test_its_state_takes_28_bytes_a_sample_with_the_class():
    classes = torch.arange(10_000) % 10
    metric = CLDMetric(classes, torch.arange(10))
    for _ in range(6):
        metric.update(torch.rand(10_000), torch.rand(10))
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    assert 0 < file.tell() - 36 * 10_000 < 16_000


def test_a_module_that_holds_it_stores_it_in_lightnings_checkpoints(tmp_path):
    class Holds(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.cld = CLDMetric(CLASSES, VAL_CLASSES)

    trainer = L.Trainer(logger=False, barebones=True)
    module = Holds()
    updated(module.cld, range(6))
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Holds.load_from_checkpoint(tmp_path / "half.ckpt")
    assert_scores(updated(resumed.cld, range(6, 12)).compute(), EXPECTED)


# Several processes


@pytest.mark.parametrize("name", ["sync_on_compute", "dist_sync_on_step"])
def test_synchronisation_is_refused_at_once(name):
    with pytest.raises(ValueError, match=f"{name}=True: .* can't be merged .*gather them before update"):
        CLDMetric(**{name: True})


def test_in_a_distributed_run_compute_does_not_synchronise_and_sync_says_why():
    metric = CLDMetric(CLASSES, VAL_CLASSES, distributed_available_fn=lambda: True)
    assert_scores(updated(metric, range(12)).compute(), EXPECTED)
    with pytest.raises(RuntimeError, match="can't be merged"):
        metric.sync()
    assert_scores(metric.compute(), EXPECTED)


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="older torchmetrics have no such method")
def test_states_are_not_merged():
    with pytest.raises(RuntimeError, match="merge_state"):
        metric_of().merge_state(metric_of())


# Errors


def test_calling_it_says_what_to_call_and_changes_nothing():
    metric = metric_of()
    with pytest.raises(NotImplementedError, match=r"update\(train_losses, val_losses\).*compute\(\)"):
        metric(TRAIN[0], VAL[0])
    assert_scores(metric.compute(), EXPECTED)


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ((CLASSES, None), ValueError, "got only train_classes"),
        ((None, VAL_CLASSES), ValueError, "got only val_classes"),
        ((CLASSES.float(), VAL_CLASSES), TypeError, "train_classes must be integers"),
        ((["a"] * 6, VAL_CLASSES), TypeError, "train_classes must be integers.*got 'a' at position 0"),
        ((CLASSES[None], VAL_CLASSES), ValueError, r"train_classes must have shape"),
        ((CLASSES - 1, VAL_CLASSES), ValueError, "must not be negative, got -1"),
        ((CLASSES, VAL_CLASSES.clamp(max=3)), ValueError, "class 700 has training but no validation"),
    ],
)
def test_bad_classes_raise(classes, error, message):
    with pytest.raises(error, match=message):
        CLDMetric(*classes)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ((TRAIN[0].tolist(), VAL[0]), TypeError, "train_losses must be a floating point tensor .* got list"),
        ((TRAIN[0], VAL[0].long()), TypeError, "val_losses must be a floating point tensor .* got torch.int64"),
        ((TRAIN[:1], VAL[0]), ValueError, r"train_losses must have shape \[30\].*got \[1, 30\]"),
        ((TRAIN[0, :29], VAL[0]), ValueError, r"train_losses must have shape \[30\].*got \[29\]"),
        ((TRAIN[0], VAL[0, :1]), ValueError, r"val_losses must have shape \[12\].*got \[1\]"),
    ],
)
def test_bad_losses_raise_and_change_nothing(rows, losses, error, message):
    metric = metric_of(range(rows))
    with pytest.raises(error, match=message):
        metric.update(*losses)
    assert_scores(updated(metric, range(rows, 12)).compute(), EXPECTED)


@pytest.mark.parametrize("losses", [(TRAIN[0, :29], VAL[0]), (TRAIN[0], VAL[0, :1])])
def test_without_classes_the_first_checkpoint_decides_how_many_samples_there_are(losses):
    metric = CLDMetric()
    with pytest.raises(ValueError, match=r"train_losses must have shape \[N\]"):
        metric.update(TRAIN[0, :0], VAL[0])
    metric.update(TRAIN[0], VAL[0])
    with pytest.raises(ValueError, match=r"must have shape \[(30|12)\]"):
        metric.update(*losses)


def test_too_few_checkpoints_raise():
    with pytest.raises(ValueError, match=r"at least 4 checkpoints .* got 3"):
        metric_of(range(3)).compute()


def test_a_reference_that_is_not_finite_raises_and_names_class_and_row():
    metric = metric_of(range(6))
    metric.update(TRAIN[6], VAL[6].where(VAL_CLASSES != 3, torch.inf))
    with pytest.raises(ValueError, match="class 3 are not finite at row 6"):
        metric.compute()
