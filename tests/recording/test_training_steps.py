"""Losses from training steps: `record="step"` and `IndexedDataset`."""

from __future__ import annotations

import copy
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from oracles import cld_oracle, losses
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, Subset, SubsetRandomSampler, TensorDataset

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule, IndexedDataset, LossTrajectories
from lightning_cld.data.labels import labels_of
from lightning_cld.data.nesting import flat
from lightning_cld.functional.step_losses import at_epoch_ends
from lightning_cld.recording.training_steps import StepLosses
from tests.toys import Blobs, Classifier, blobs, fit, plain_losses

NAN, INF = float("nan"), float("inf")


class Stepping(Classifier):
    """Returns its losses and keeps its own list of them for each epoch."""

    def __init__(self):
        super().__init__()
        self.seen = {}
        self.changes = {}  # changed outputs, by step number

    def training_step(self, batch, batch_idx):
        inputs, targets, index = batch
        each = F.cross_entropy(self(inputs), targets, reduction="none")
        seen = self.seen.setdefault(self.current_epoch + 1, {})
        for position, loss in zip(index.tolist(), each.tolist(), strict=True):
            seen.setdefault(position, []).append(loss)
        outputs = {"loss": each.mean(), "sample_losses": each, "sample_index": index}
        return {**outputs, **self.changes.get(self.global_step, {})}


class Indexed(Blobs):
    def __init__(self, **loader):
        super().__init__(**loader)
        self.train_set = IndexedDataset(self.train_set)


def stepped(tmp_path, module=Stepping, datamodule=None, cld=None, **arguments):
    cld = cld or CLDCallback(record="step")
    trainer, module = fit(tmp_path, cld, module, datamodule or Indexed(), **arguments)
    return cld, module, trainer


def expected(module, samples):
    """The expected row of each epoch, from the losses that the module kept."""
    rows = torch.full((len(module.seen), samples), NAN, dtype=torch.float64)
    for epoch, seen in module.seen.items():
        for position, values in seen.items():
            rows[epoch - 1, position] = np.mean(values)
    return rows


def assert_rows(cld, module):
    rows = cld.trajectories.train_losses[1:]
    torch.testing.assert_close(rows.double(), expected(module, rows.shape[1]), rtol=1e-6, atol=1e-6, equal_nan=True)


# What is logged


@pytest.mark.parametrize(
    ("loader", "arguments"),
    [
        ({}, {}),
        ({"num_workers": 2}, {}),
        ({"num_workers": 2, "persistent_workers": True}, {}),
        ({"batch_size": 7, "shuffle": False}, {"accumulate_grad_batches": 3}),
        ({}, {"precision": "bf16-mixed"}),
        ({"drop_last": True}, {}),
        ({}, {"limit_train_batches": 3}),
        ({"shuffle": None, "sampler": torch.utils.data.WeightedRandomSampler(torch.ones(90), 60)}, {}),
    ],
)
def test_a_row_is_what_the_steps_of_its_epoch_saw(tmp_path, loader, arguments):
    cld, module, _ = stepped(tmp_path, datamodule=Indexed(**loader), **arguments)
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4]
    assert_rows(cld, module)


def test_the_validation_set_and_theta_0_are_swept(tmp_path):
    class Watches(Callback):
        def __init__(self):
            self.rows = []

        def on_train_start(self, trainer, module):
            self.rows.append(plain_losses(module, trainer.datamodule.plain))

        def on_train_epoch_end(self, trainer, module):
            self.rows.append(plain_losses(module, trainer.datamodule.val_set))

    data = Indexed()
    data.plain = data.train_set.dataset
    watches = Watches()
    cld, _, _ = stepped(tmp_path, datamodule=data, callbacks=[watches])
    torch.testing.assert_close(cld.trajectories.train_losses[0], watches.rows[0])
    torch.testing.assert_close(cld.trajectories.val_losses[1:], torch.stack(watches.rows[1:]))
    assert torch.equal(cld.trajectories.train_classes, labels_of(flat(data.plain)))


def test_a_sample_that_no_step_saw_is_a_hole(tmp_path):
    cld, _, _ = stepped(tmp_path, datamodule=Indexed(batch_size=40, drop_last=True))
    theta_0, *rows = cld.trajectories.train_losses
    assert not theta_0.isnan().any()
    assert [int(row.isnan().sum()) for row in rows] == [10] * 4


def test_a_compiled_training_step_logs_the_same(tmp_path):
    class Compiled(Stepping):
        def training_step(self, batch, batch_idx):
            each = self.each(batch)
            return {"loss": each.mean(), "sample_losses": each, "sample_index": batch[2]}

        def configure_model(self):
            def each(batch):
                return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

            self.each = torch.compile(each, backend=self.backend)

    class Eager(Compiled):
        backend = "eager"

    class Traced(Compiled):
        backend = "aot_eager"

    data = {"datamodule": Indexed(batch_size=15)}
    eager, traced = stepped(tmp_path, Eager, **data)[0], stepped(tmp_path, Traced, **data)[0]
    torch.testing.assert_close(eager.trajectories.train_losses, traced.trajectories.train_losses)
    assert not traced.trajectories.train_losses.isnan().any()


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_is_stored_as_infinity(tmp_path, loss):
    module = Stepping()
    module.changes = {3: {"sample_losses": torch.full((16,), loss), "sample_index": torch.arange(16)}}
    cld, _, _ = stepped(tmp_path, module, Indexed(shuffle=False))
    assert cld.trajectories.train_losses[1, :16].isinf().all()
    assert (cld.trajectories.train_losses[1, :16] > 0).all()


def test_training_is_the_same_bit_for_bit(tmp_path):
    plain, _ = fit(tmp_path, None, Stepping, Indexed(num_workers=1))[1], None
    _, watched, _ = stepped(tmp_path, datamodule=Indexed(num_workers=1))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert plain.seen == watched.seen


def test_a_later_start_begins_with_a_sweep(tmp_path):
    files = ModelCheckpoint(tmp_path / "files", save_top_k=-1, filename="{epoch}")
    fit(tmp_path, None, Stepping, Indexed(), callbacks=[files], enable_checkpointing=True, max_epochs=2)
    with pytest.warns(UserWarning, match="theta_0 is missing"):
        cld, module, _ = stepped(tmp_path, ckpt_path=tmp_path / "files/epoch=1.ckpt", max_epochs=7)
    assert cld.trajectories.epochs == [3, 4, 5, 6, 7]
    module.seen = {epoch - 3: seen for epoch, seen in module.seen.items() if epoch > 3}
    assert_rows(cld, module)


# Interrupted


@pytest.mark.parametrize("at", ["the epoch's end", "validation's end", "mid-epoch"])
def test_a_resumed_run_has_the_same_rows(tmp_path, at):
    def files(folder):
        settings = {
            "the epoch's end": {},
            "validation's end": {"save_on_train_epoch_end": False},
            "mid-epoch": {"every_n_train_steps": 4},  # an epoch has six
        }[at]
        return ModelCheckpoint(tmp_path / folder, save_top_k=-1, filename="{step}", **settings)

    plan = {"enable_checkpointing": True, "max_epochs": 5}
    data = {"shuffle": False}
    # No dropout: Lightning does not restore its random numbers.
    module = Stepping()
    module.net[3].p = 0.0
    whole, _, _ = stepped(tmp_path, module, Indexed(**data), callbacks=[files("whole")], **plan)
    saved = tmp_path / "whole" / ("step=16.ckpt" if at == "mid-epoch" else "step=18.ckpt")
    module = Stepping()
    module.net[3].p = 0.0
    resumed, _, _ = stepped(tmp_path, module, Indexed(**data), callbacks=[files("resumed")], ckpt_path=saved, **plan)
    assert resumed.trajectories.epochs == whole.trajectories.epochs == [0, 1, 2, 3, 4, 5]
    if at == "mid-epoch":  # the loader restarts, so the rest of the epoch sees other samples
        assert not resumed.trajectories.train_losses.isnan().any(dim=1)[[0, 1, 2]].any()
        assert int(resumed.trajectories.train_losses[3].isnan().sum()) == 90 - 64
    else:
        torch.testing.assert_close(resumed.trajectories.train_losses, whole.trajectories.train_losses)
        torch.testing.assert_close(resumed.scores.values, whole.scores.values)


def gathered(rank=0):
    """`StepLosses` of four samples after a step on two of them, and what stands in for the Trainer."""
    trainer = SimpleNamespace(world_size=1, is_global_zero=rank == 0)
    made = StepLosses()
    made.start(trainer, 4, torch.device("cpu"))
    made.add(trainer, outputs_of([0, 2], [1.0, 3.0]))
    return made, trainer


def outputs_of(index, each):
    return {"sample_losses": torch.tensor(each), "sample_index": torch.tensor(index)}


def assert_row(made, trainer, expected):
    torch.testing.assert_close(made.row(trainer), torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_a_row_can_be_taken_again_until_the_next_step():
    made, trainer = gathered()
    for _ in range(2):  # a signal ended the sweep of the validation set
        assert_row(made, trainer, [1.0, NAN, 3.0, NAN])
    again = StepLosses()
    again.load_state_dict(made.state_dict())
    again.start(trainer, 4, torch.device("cpu"))
    for resumed in (made, again):
        assert_row(resumed, trainer, [1.0, NAN, 3.0, NAN])
        resumed.add(trainer, outputs_of([1, 2], [5.0, 7.0]))
        assert_row(resumed, trainer, [NAN, 5.0, 7.0, NAN])


def test_an_epoch_whose_steps_were_all_skipped_has_no_losses_of_the_one_before():
    made, trainer = gathered()
    made.row(trainer)
    made.add(trainer, None)
    assert_row(made, trainer, [NAN] * 4)


def test_losses_of_an_epoch_that_could_not_be_logged_stay_out_of_the_next_row(tmp_path):
    class Breaks(Callback):
        def on_validation_end(self, trainer, pl_module):
            data.val_set.indices[0] = 10**6 if trainer.current_epoch == 1 else first

        def on_train_epoch_end(self, trainer, pl_module):  # after the sweep
            data.val_set.indices[0] = first

    data = Indexed()
    first = data.val_set.indices[0]
    module = Stepping()
    cld = CLDCallback(record="step")
    with pytest.warns(UserWarning, match="after 2 epochs could not be logged"):
        stepped(tmp_path, module, data, cld, callbacks=[Breaks()], max_epochs=6)
    rows = cld.trajectories.train_losses[1:]
    wanted = expected(module, rows.shape[1])
    wanted[1] = NAN
    torch.testing.assert_close(rows.double(), wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_what_rank_0_had_gathered_counts_once_after_a_resume():
    state = gathered()[0].state_dict()
    for rank, row in ((0, [1.0, NAN, 3.0, NAN]), (1, [NAN] * 4)):
        resumed, trainer = gathered(rank)
        resumed.load_state_dict(state)
        resumed.start(trainer, 4, torch.device("cpu"))
        assert_row(resumed, trainer, row)


def test_the_state_of_an_earlier_version_loads():
    sums, counts = torch.tensor([2.0, 0.0, 3.0, 0.0, 0.0]), torch.tensor([2, 0, 1, 0, 0], dtype=torch.int32)
    resumed, trainer = gathered()
    resumed.load_state_dict({"sums": sums, "counts": counts})
    resumed.start(trainer, 4, torch.device("cpu"))
    assert_row(resumed, trainer, [1.0, NAN, 3.0, NAN])


def test_a_checkpoint_that_a_signal_writes_has_all_or_nothing_of_a_step():
    made, trainer = gathered()
    rows = set()

    def looks(frame, event, argument):  # before each line of the code, where a handler may run
        state = StepLosses()
        state.load_state_dict(made.state_dict())
        rows.add(tuple(state.row(trainer)[:3].nan_to_num(nan=-1.0).tolist()))
        return looks

    sys.settrace(lambda frame, *_: looks if frame.f_code.co_name == "add" else None)
    try:
        made.add(trainer, outputs_of([0, 1], [3.0, 5.0]))
    finally:
        sys.settrace(None)
    assert rows | {tuple(made.row(trainer)[:3].tolist())} == {(1.0, -1.0, 3.0), (2.0, 5.0, 3.0)}


def test_another_record_does_not_resume(tmp_path):
    files = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    stepped(tmp_path, callbacks=[files], enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"record='step'\), this run has record='sweep'"):
        fit(tmp_path, CLDCallback(), Stepping, Indexed(), tmp_path / "epoch=1.ckpt", max_epochs=6)


# Checks of a step's outputs


WRONG = {
    "nothing": (None, TypeError, "without sample_losses and sample_index"),
    "other keys": ({"losses": torch.ones(16)}, TypeError, "the keys .'loss', 'losses'."),
    "no positions": ({"sample_losses": torch.ones(16)}, TypeError, "the keys"),
    "a list": (
        {"sample_losses": [1.0], "sample_index": torch.arange(1)},
        TypeError,
        "sample_losses must be a floating",
    ),
    "one loss": ({"sample_losses": torch.ones(()), "sample_index": torch.arange(16)}, ValueError, r"\[\] and \[16\]"),
    "short": ({"sample_losses": torch.ones(15), "sample_index": torch.arange(16)}, ValueError, r"\[15\] and \[16\]"),
    "real positions": ({"sample_losses": torch.ones(2), "sample_index": torch.ones(2)}, TypeError, "integer tensor"),
    "too far": ({"sample_losses": torch.ones(2), "sample_index": torch.tensor([3, 90])}, ValueError, "got 3 to 90"),
    "negative": ({"sample_losses": torch.ones(2), "sample_index": torch.tensor([-1, 9])}, ValueError, "got -1 to 9"),
}


class Returns(Classifier):
    def __init__(self, extra, at=0):
        super().__init__()
        self.extra, self.at = extra, at

    def training_step(self, batch, batch_idx):
        each = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        if self.global_step >= self.at:
            return each.mean() if self.extra is None else {"loss": each.mean(), **self.extra}
        return {"loss": each.mean(), "sample_losses": each, "sample_index": batch[2]}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_outputs_raise_at_the_first_step(tmp_path, wrong):
    extra, error, message = WRONG[wrong]
    module = Returns(extra)
    with pytest.raises(error, match=message) as raised:
        stepped(tmp_path, module)
    assert "IndexedDataset" in str(raised.value)
    assert module.trainer.global_step == 1


@pytest.mark.parametrize("wrong", WRONG)
def test_later_they_only_leave_holes(tmp_path, wrong):
    with pytest.warns(UserWarning, match="This is said once"):
        cld, _, trainer = stepped(tmp_path, Returns(WRONG[wrong][0], at=6))
    assert trainer.global_step == 24
    rows = cld.trajectories.train_losses
    assert not rows[:2].isnan().any()
    assert rows[2:].isnan().sum(dim=1).min() >= 89


@pytest.mark.parametrize("skipped", [0, 2])
def test_a_skipped_step_leaves_holes(tmp_path, skipped):
    class Skips(Stepping):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx != skipped else None

    cld, _, _ = stepped(tmp_path, Skips)
    assert (cld.trajectories.train_losses[1:].isnan().sum(dim=1) == 16).all()


def test_positions_in_another_set_are_refused_before_the_first_step(tmp_path):
    class Within(Blobs):
        def __init__(self):
            super().__init__()
            self.train_set = Subset(IndexedDataset(self.train_set.dataset), self.train_set.indices)

    with pytest.raises(ValueError, match=r"IndexedDataset\(Subset\(...\)\)"):
        stepped(tmp_path, datamodule=Within())


def test_positions_in_a_part_of_the_set_are_refused_before_the_first_step(tmp_path):
    class Parts(Blobs):
        def __init__(self):
            super().__init__()
            parts = Subset(self.train_set, range(40)), Subset(self.train_set, range(40, 90))
            self.train_set = ConcatDataset([IndexedDataset(part) for part in parts])

    with pytest.raises(ValueError, match=r"IndexedDataset\(ConcatDataset\(...\)\)"):
        stepped(tmp_path, datamodule=Parts())


def test_without_classes_positions_outside_of_the_sampler_stay_apart(tmp_path):
    class Alike(Stepping):
        def cld_step(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none"), None

    cld, module, _ = stepped(tmp_path, Alike, Indexed(shuffle=None, sampler=SubsetRandomSampler(range(60))))
    assert_rows(cld, module)
    assert cld.scores.values[60:].isnan().all()
    assert not cld.scores.values[:60].isnan().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"record": "steps"}, "record must be 'sweep' or 'step', got 'steps'"),
        ({"record": "step", "history": "running"}, "history='full'"),
        ({"record": "step", "every_n_epochs": 2}, "every_n_epochs=2 saves nothing"),
        ({"record": "step", "cutoff_epoch": "auto"}, "Set cutoff_epoch to a number"),
    ],
)
def test_arguments_that_contradict_each_other(arguments, message):
    with pytest.raises(ValueError, match=message):
        CLDCallback(**arguments)


# The scores


def ends(train):
    """In numpy, the mean of each row and the next; a row without a next one stays as it is."""
    train = train.double().numpy()
    rows = [train[0]]
    for row in range(1, len(train)):
        later = train[row + 1] if row + 1 < len(train) else np.full(train.shape[1], np.nan)
        rows.append(np.where(np.isnan(later), train[row], (train[row] + later) / 2))
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_the_mean_of_two_epochs_stands_for_the_checkpoint_between(rows):
    train = losses(rows, 30)
    train[torch.rand(rows, 30, generator=torch.Generator().manual_seed(rows)) < 0.2] = NAN
    torch.testing.assert_close(at_epoch_ends(train).double(), ends(train), equal_nan=True)


@pytest.mark.parametrize("cutoff", [None, 5])
def test_scores_pair_the_means_with_the_reference(cutoff):
    train, val = losses(10, 30), losses(10, 12, seed=1)
    part = slice(None if cutoff is None else cutoff + 1)
    scores = LossTrajectories(train, val, from_steps=True).score(cutoff)
    zeros = torch.zeros(30).long(), torch.zeros(12).long()
    np.testing.assert_allclose(scores.values, cld_oracle(ends(train[part]), val[part], *zeros), atol=1e-5)
    assert scores.metadata["record"] == "step"
    assert LossTrajectories(train, val).score().metadata["record"] == "sweep"


def test_thinning_comes_after_the_means():
    train, val = losses(9, 30), losses(9, 12, seed=1)
    scores = LossTrajectories(train, val, from_steps=True).score(every_n_epochs=2)
    zeros = torch.zeros(30).long(), torch.zeros(12).long()
    np.testing.assert_allclose(scores.values, cld_oracle(ends(train)[::2], val[::2], *zeros), atol=1e-5)


def test_where_losses_are_from_is_saved(tmp_path):
    trajectories = LossTrajectories(losses(5, 8), losses(5, 4, seed=1), from_steps=True)
    assert LossTrajectories.load(trajectories.save(tmp_path / "a.npz")).from_steps
    assert LossTrajectories.from_state_dict(trajectories.state_dict()).from_steps
    scores = CLDScores.load(trajectories.score().save(tmp_path / "b.npz"))
    with pytest.raises(ValueError, match="do not rank the good ones"):
        scores.select(fraction=0.5)


def test_step_scores_draw_and_are_refused_for_the_top(tmp_path):
    cld, _, _ = stepped(tmp_path, cld=CLDCallback(record="step", dirpath=tmp_path), max_epochs=6)
    assert len(cld.scores.select(fraction=0.2, rule="draw")) == 18
    with pytest.raises(ValueError, match=r'Use rule="draw", or log with record='):
        cld.scores.select(fraction=0.2)
    served = CoresetDataModule(Indexed(), tmp_path / "cld-scores.npz", fraction=0.2, rule="draw")
    fit(tmp_path, None, Stepping, served, max_epochs=1)
    with pytest.raises(ValueError, match=r'Use rule="draw"'):
        CoresetDataModule(Indexed(), tmp_path / "cld-scores.npz", fraction=0.2)


def test_other_scores_of_step_losses_rank_as_ever(tmp_path):
    cld, _, _ = stepped(tmp_path)
    by_mean = cld.trajectories.score(by=lambda trajectories: -trajectories.train_losses[1:].mean(dim=0))
    assert len(by_mean.select(fraction=0.2)) == 18


# The dataset


class Samples(Dataset):
    classes = ("a", "b")

    def __init__(self, kind):
        self.kind, self.targets = kind, [3, 4, 5]

    def __len__(self):
        return 3

    def __getitem__(self, index):
        pair = (torch.tensor(index / 2), self.targets[index])
        if self.kind == "dict":
            return {"input": pair[0], "label": pair[1]}
        return pair[0] if self.kind == "tensor" else (list(pair) if self.kind == "list" else pair)


@pytest.mark.parametrize(
    ("kind", "sample"),
    [
        ("tuple", (torch.tensor(0.5), 4, 1)),
        ("list", (torch.tensor(0.5), 4, 1)),
        ("tensor", (torch.tensor(0.5), 1)),
        ("dict", {"input": torch.tensor(0.5), "label": 4, "sample_index": 1}),
    ],
)
def test_a_sample_says_its_position(kind, sample):
    indexed = IndexedDataset(Samples(kind))
    assert indexed[1] == sample
    assert len(indexed) == 3


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_it_passes_for_the_dataset_within(copied):
    indexed = copied(IndexedDataset(Samples("tuple")))
    assert indexed.classes == ("a", "b")
    assert labels_of(flat(indexed)).tolist() == [3, 4, 5]
    assert indexed[0] == (torch.tensor(0.0), 3, 0)
    with pytest.raises(AttributeError):
        _ = indexed.nothing


def test_its_labels_are_found_through_any_wrapper():
    pool = blobs(40)
    inner = Subset(pool, list(range(5, 30)))
    assert torch.equal(labels_of(flat(IndexedDataset(inner))), pool.tensors[1][5:30])
    assert torch.equal(labels_of(flat(Subset(IndexedDataset(pool), [3, 1]))), pool.tensors[1][[3, 1]])
    assert isinstance(inner.dataset, TensorDataset)
