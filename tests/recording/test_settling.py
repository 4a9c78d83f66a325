from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_cld import LossTrajectories
from lightning_cld.recording import settling
from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.recording.settling import Settling

SAMPLES, CLASSES = 60, torch.arange(60) % 3
VAL_CLASSES = torch.arange(12) % 3


def timeline(rows, noise, seed=0, epochs=None):
    """Losses whose scores settle sooner with less noise."""
    generator = np.random.default_rng(seed)
    falling = 3 * np.exp(-np.arange(rows) / 3)[:, None]
    own = generator.random(SAMPLES) + 0.5
    spread = generator.random((rows, SAMPLES)) * (np.linspace(0, 1, SAMPLES) + noise)
    train = (falling * own + spread).astype(np.float32)
    val = (falling + 0.01 * generator.random((rows, 12))).astype(np.float32)
    return LossTrajectories(train, val, CLASSES, VAL_CLASSES, epochs)


def coreset_oracle(made, row):
    """The best two of each class's twenty samples, from the definition in float64; None if there are no scores."""
    train, val = made.train_losses[: row + 1].double().numpy(), made.val_losses[: row + 1].double().numpy()
    if row < 3 or np.isnan(train[-1]).any():
        return None
    chosen = set()
    for c in range(3):
        differences = np.diff(np.column_stack([val[:, c::3].mean(axis=1), train[:, c::3]]), axis=0)
        values = np.corrcoef(differences[~np.isnan(differences[:, 0])].T)[0, 1:]
        chosen |= {c + 3 * place for place in np.argsort(-values)[:2].tolist()}
    return chosen


def settled_oracle(made, level=0.85, patience=3):
    coresets = {epoch: coreset_oracle(made, row) for row, epoch in enumerate(made.epochs)}
    coresets = {epoch: coreset for epoch, coreset in coresets.items() if coreset is not None}
    agreeing = 0
    for epoch, coreset in coresets.items():
        earlier = [other for other in coresets if other <= epoch / 2]
        if earlier:
            agreeing = agreeing + 1 if len(coreset & coresets[max(earlier)]) / 6 >= level else 0
        if agreeing == patience:
            return epoch
    return None


@pytest.mark.parametrize("epochs", [None, range(0, 80, 2), [*range(10), *range(10, 70, 2)]], ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_it_settles_where_the_definition_says(epochs, noise, seed):
    made = timeline(40, noise, seed, epochs)
    assert Settling().epoch(made) == settled_oracle(made)


def test_the_timelines_of_these_tests_settle_at_all_kinds_of_epochs():
    found = {Settling().epoch(timeline(40, noise, seed)) for noise in (0.0, 0.1, 1.0) for seed in range(3)}
    assert None in found
    assert len(found) > 4


def some(settled):
    """A timeline that settles after epoch `settled`, and the epoch where it does."""
    for seed in range(20):
        made = timeline(40, 0.0, seed)
        epoch = settled_oracle(made)
        if epoch is not None and epoch > settled:
            return made, epoch
    raise AssertionError("no such timeline")


def test_what_it_says_does_not_depend_on_when_it_is_asked():
    made, expected = some(12)
    grown = LossTrajectories(made.train_losses[:1], made.val_losses[:1], CLASSES, VAL_CLASSES, [0])
    settling = Settling()
    answers = {0: settling.epoch(grown)}
    for epoch in range(1, expected + 1):
        grown.record(epoch, made.train_losses[epoch], made.val_losses[epoch])
        answers[epoch] = settling.epoch(grown)
        if epoch in (5, expected - 1):  # as in a resumed run
            settling = Settling()
            assert settling.epoch(grown) == answers[epoch]
    assert answers == {**dict.fromkeys(range(expected)), expected: expected}


@pytest.mark.parametrize("holes", [[5], [10], [7, 8], [9, 11, 13]], ids=str)
def test_a_checkpoint_that_was_not_logged_is_not_compared(holes):
    for seed in (1, 2, 7):
        made = timeline(40, 0.0, seed)
        train, val = made.train_losses.clone(), made.val_losses.clone()
        train[holes], val[holes] = torch.nan, torch.nan
        holed = LossTrajectories(train, val, CLASSES, VAL_CLASSES)
        assert Settling().epoch(holed) == settled_oracle(holed)


@pytest.mark.parametrize(("name", "value"), [("OVERLAP", 0.0), ("PATIENCE", 1)])
def test_its_constants_are_what_it_goes_by(monkeypatch, name, value):
    made, expected = some(12)
    monkeypatch.setattr(settling, name, value)
    changed = {"level" if name == "OVERLAP" else "patience": value}
    assert Settling().epoch(made) == settled_oracle(made, **changed) < expected


def test_it_remembers_no_more_coresets_than_it_needs():
    settling = Settling()
    settling.epoch(timeline(40, 1.0))
    assert min(settling._chosen) == 19
    assert len(settling._chosen) == 21


@pytest.mark.parametrize("classes", [None, CLASSES.where(torch.arange(SAMPLES) < 50, -1)], ids=["none", "outside"])
def test_it_takes_one_class_and_positions_that_are_not_in_use(classes):
    made = timeline(20, 0.0)
    val_classes = None if classes is None else VAL_CLASSES
    made = LossTrajectories(made.train_losses, made.val_losses, classes, val_classes)
    settling = Settling()
    assert settling.epoch(made) in (None, *settling._chosen)
    assert len(settling._chosen) > 4
    for epoch, chosen in settling._chosen.items():
        assert chosen.tolist() == made.score(epoch).select(fraction=0.1).tolist()


def test_a_reference_that_diverged_never_settles():
    made = timeline(40, 0.0, seed=2)
    assert Settling().epoch(made) is not None
    val = made.val_losses.clone()
    val[5, 0] = torch.inf
    assert Settling().epoch(LossTrajectories(made.train_losses, val, CLASSES, VAL_CLASSES)) is None


@pytest.mark.parametrize("history", ["full", "running"])
def test_overlaps_are_those_of_the_newest_checkpoint(history):
    made = timeline(20, 0.1)
    grown = LossTrajectories(made.train_losses[:1], made.val_losses[:1], CLASSES, VAL_CLASSES, [0])
    if history == "running":
        grown = RunningHistory.of_losses(made.train_losses[:1], made.val_losses[:1], CLASSES, VAL_CLASSES, [0])
    coresets = [coreset_oracle(made, row) for row in range(20)]
    settling, seen = Settling(), set()
    for epoch in range(20):
        if epoch > 0:
            grown.record(epoch, made.train_losses[epoch], made.val_losses[epoch])
        for _ in range(2):  # a second look finds nothing new
            settling.look(grown)
            earlier = {"previous": epoch - 1, "half": epoch // 2}
            expected = {
                name: len(coresets[epoch] & coresets[other]) / 6 if other >= 3 else None
                for name, other in earlier.items()
            }
            assert settling.overlaps._asdict() == pytest.approx(expected)
        seen.add(settling.overlaps)
    assert len(seen) > 5


def test_there_are_no_overlaps_once_a_reference_diverged():
    made = timeline(12, 0.1)
    settling = Settling()
    settling.look(made)
    assert None not in settling.overlaps
    made.record(12, made.train_losses[11], torch.full((12,), torch.inf))
    settling.look(made)
    assert settling.overlaps == (None, None)
