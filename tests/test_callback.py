import copy
import logging
import pickle
import warnings
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from oracles import assert_scores, cld_oracle
from scipy.stats import pearsonr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, SubsetRandomSampler, TensorDataset
from toys import Blobs, Classifier, blobs, fit, plain_losses, quiet_trainer

from lightning_cld import CLDCallback, CLDScores, LossTrajectories


class PlainRows(Callback):
    """The losses that a sweep should log: one sample at a time, with the weights at each epoch's end."""

    def __init__(self):
        self.rows = []

    def on_train_start(self, trainer, pl_module):
        self.rows.append(plain_losses(pl_module, trainer.train_dataloader.dataset))

    def on_train_epoch_end(self, trainer, pl_module):
        self.rows.append(plain_losses(pl_module, trainer.train_dataloader.dataset))


# What is logged and scored


def test_rows_are_the_losses_under_the_weights_of_each_checkpoint(tmp_path):
    cld, plain = CLDCallback(), PlainRows()
    fit(tmp_path, cld, callbacks=[plain])
    torch.testing.assert_close(cld.trajectories.train_losses, torch.stack(plain.rows), rtol=1e-4, atol=1e-6)
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4]


def test_scores_are_the_correlations_of_the_logged_losses(tmp_path):
    cld = CLDCallback()
    fit(tmp_path, cld)
    train = np.diff(cld.trajectories.train_losses.numpy().astype(np.float64), axis=0)
    val = cld.trajectories.val_losses.numpy().astype(np.float64)
    for position, label in enumerate(cld.trajectories.train_classes.tolist()):
        reference = np.diff(val[:, cld.trajectories.val_classes.numpy() == label].mean(axis=1))
        assert cld.scores.values[position] == pytest.approx(pearsonr(train[:, position], reference)[0], abs=1e-5)


def test_classes_are_those_of_the_train_set(tmp_path):
    cld, data = CLDCallback(), Blobs()
    fit(tmp_path, cld, datamodule=data)
    assert cld.scores.classes.tolist() == [int(label) for _, label in data.train_set]


@pytest.mark.parametrize(
    ("arguments", "max_epochs", "epochs"),
    [
        ({"every_n_epochs": 2}, 7, [0, 2, 4, 6]),
        ({"cutoff_epoch": 3}, 6, [0, 1, 2, 3]),
        ({"cutoff_epoch": 6, "every_n_epochs": 2}, 8, [0, 2, 4, 6]),
    ],
)
def test_timeline(tmp_path, arguments, max_epochs, epochs):
    cld = CLDCallback(**arguments)
    trainer, _ = fit(tmp_path, cld, max_epochs=max_epochs)
    assert cld.trajectories.epochs == cld.scores.epochs == epochs
    assert trainer.current_epoch == max_epochs


def test_scores_are_saved_at_the_cutoff_and_not_at_the_end(tmp_path):
    class SeenAt(Callback):
        def __init__(self):
            self.epochs = []

        def on_train_epoch_start(self, trainer, pl_module):
            if (tmp_path / "cld-scores.npz").exists():
                self.epochs.append(trainer.current_epoch)

    seen = SeenAt()
    fit(tmp_path, CLDCallback(cutoff_epoch=3, dirpath=tmp_path), max_epochs=6, callbacks=[seen])
    assert seen.epochs == [3, 4, 5]


def test_stop_at_cutoff_ends_training_there(tmp_path):
    trainer, _ = fit(tmp_path, CLDCallback(cutoff_epoch=3, stop_at_cutoff=True), max_epochs=9)
    assert trainer.current_epoch == 3


def test_early_cutoff_scores_like_a_run_that_ends_there(tmp_path):
    early, whole = CLDCallback(cutoff_epoch=4), CLDCallback()
    fit(tmp_path, early, max_epochs=8)
    fit(tmp_path, whole, max_epochs=8)
    assert torch.equal(early.scores.values, whole.trajectories.score(cutoff_epoch=4).values)


@pytest.mark.parametrize("history", ["full", "running"])
def test_a_second_fit_starts_clean(tmp_path, history):
    cld, once = CLDCallback(history=history), CLDCallback(history=history)
    fit(tmp_path, cld, max_epochs=6)
    fit(tmp_path, cld, max_epochs=4)
    fit(tmp_path, once, max_epochs=4)
    assert cld.scores.epochs == [0, 1, 2, 3, 4]
    assert torch.equal(cld.scores.values, once.scores.values)


@pytest.mark.parametrize("history", ["full", "running"])
def test_a_fit_that_goes_on_continues_the_timeline(tmp_path, history):
    cld = CLDCallback(history=history)
    trainer, module = fit(tmp_path, cld, max_epochs=3)
    assert cld.scores.epochs == [0, 1, 2, 3]
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module, datamodule=Blobs())
    assert cld.scores.epochs == [0, 1, 2, 3, 4, 5, 6]


# Watching changes nothing


@pytest.mark.parametrize("workers", [0, 2])
def test_training_with_the_callback_is_the_same_bit_for_bit(tmp_path, workers):
    def train(cld):
        data = Blobs(num_workers=workers, persistent_workers=workers > 0)
        trainer, module = fit(tmp_path, cld, datamodule=data, max_epochs=3, num_sanity_val_steps=2)
        return module.state_dict(), torch.get_rng_state(), trainer.callback_metrics, trainer.global_step

    plain, watched = train(None), train(CLDCallback())
    for name, value in plain[0].items():
        assert torch.equal(value, watched[0][name]), name
    assert torch.equal(plain[1], watched[1])
    assert plain[2] == watched[2]
    assert plain[3] == watched[3]


def test_a_frozen_batchnorm_stays_frozen(tmp_path):
    class Frozen(Classifier):
        def on_train_start(self):
            self.net[1].eval()

    _, module = fit(tmp_path, CLDCallback(), Frozen)
    assert not module.net[1].training
    assert module.net[3].training


def test_what_train_and_eval_of_a_module_do_is_not_done_by_a_sweep(tmp_path):
    class Merges(Classifier):
        merges = 0

        def train(self, mode=True):
            Merges.merges += not mode
            return super().train(mode)

    fit(tmp_path, CLDCallback(), Merges, limit_val_batches=0)
    assert Merges.merges == 0


def test_what_forward_logs_is_not_changed_by_a_sweep(tmp_path):
    class Logs(Classifier):
        def forward(self, inputs):
            outputs = super().forward(inputs)
            if self._trainer is not None:
                self.log_dict({"norm": outputs.norm()}, on_epoch=True, on_step=False)
            return outputs

    metrics = [fit(tmp_path, cld, Logs, limit_val_batches=0)[0].callback_metrics for cld in (None, CLDCallback())]
    assert metrics[0] == metrics[1]


def test_what_a_module_keeps_under_the_name_of_log_stays(tmp_path):
    class Keeps(Classifier):
        def __init__(self):
            super().__init__()
            self.log = lambda *arguments, **settings: None

    module = Keeps()
    kept = module.log
    fit(tmp_path, CLDCallback(), module)
    assert module.log is kept


def test_float64_by_default_gives_scores_too(tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        double = TensorDataset(blobs().tensors[0].double(), blobs().tensors[1])
        cld = CLDCallback()
        fit(tmp_path, cld, datamodule=Blobs(double))
    finally:
        torch.set_default_dtype(torch.float32)
    assert cld.scores.values.dtype == torch.float32


def test_a_sweep_that_raises_leaves_mode_and_random_state_alone(tmp_path):
    class Breaks(Classifier):
        def cld_step(self, batch):
            torch.rand(3)
            if self.trainer.global_step:
                raise RuntimeError("no memory")
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none"), batch[1]

    with pytest.warns(UserWarning, match="after 1 epochs could not be logged: no memory"):
        _, watched = fit(tmp_path, CLDCallback(), Breaks)
    state = torch.get_rng_state()
    _, plain = fit(tmp_path, None)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_augmentation_hooks_see_the_evaluation_branch(tmp_path):
    class Augments(Blobs):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 0, batch[1]] if self.trainer.training else batch

    augmented, plain = CLDCallback(), CLDCallback()
    fit(tmp_path, augmented, datamodule=Augments())
    fit(tmp_path, plain)
    assert torch.equal(augmented.trajectories.train_losses[0], plain.trajectories.train_losses[0])


# The loss


def test_loss_fn_replaces_the_loss(tmp_path):
    cld = CLDCallback(loss_fn=lambda outputs, targets: outputs.gather(1, targets[:, None]).squeeze(1).neg())
    _, module = fit(tmp_path, cld, max_epochs=3)
    data = Blobs()
    inputs = torch.stack([x for x, _ in data.train_set])
    labels = torch.stack([y for _, y in data.train_set])
    module.eval()
    with torch.no_grad():
        expected = -module(inputs)[torch.arange(len(labels)), labels]
    torch.testing.assert_close(cld.trajectories.train_losses[-1], expected, rtol=1e-4, atol=1e-5)
    assert cld.scores.classes.tolist() == labels.tolist()


def test_loss_fn_of_targets_that_are_no_classes_makes_one_class(tmp_path):
    points = blobs().tensors[0]
    values = points.sum(dim=1, keepdim=True)

    class Regressor(Classifier):
        def __init__(self):
            super().__init__(lr=0.01)
            self.net = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    cld = CLDCallback(loss_fn=lambda outputs, targets: (outputs - targets).square().squeeze(1))
    data = TensorDataset(points, values)
    datamodule = L.LightningDataModule.from_datasets(
        Subset(data, range(90)), Subset(data, range(90, 120)), None, None, 16
    )
    fit(tmp_path, cld, Regressor, datamodule)
    assert cld.scores.classes is None
    assert len(cld.scores.select(fraction=0.1)) == 9


def test_cld_step_takes_any_batch(tmp_path):
    class AsDictionary(Dataset):
        def __init__(self, subset):
            self.subset = subset

        def __len__(self):
            return len(self.subset)

        def __getitem__(self, index):
            return {"x": self.subset[index][0], "labels": self.subset[index][1]}

    class DictionaryModule(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["x"]), batch["labels"])

        def validation_step(self, batch, batch_idx):
            pass

        def cld_step(self, batch):
            return F.cross_entropy(self(batch["x"]), batch["labels"], reduction="none"), batch["labels"]

    data = Blobs()
    wrapped = L.LightningDataModule.from_datasets(
        AsDictionary(data.train_set), AsDictionary(data.val_set), batch_size=16
    )
    cld = CLDCallback()
    fit(tmp_path, cld, DictionaryModule, wrapped)
    assert cld.scores.classes.tolist() == [int(label) for _, label in data.train_set]


# The data


class Noisy(Dataset):
    """Blobs with fresh noise at every read, as augmentation does."""

    def __init__(self, subset):
        self.subset = subset

    def __len__(self):
        return len(self.subset)

    def __getitem__(self, index):
        inputs, target = self.subset[index]
        return inputs + torch.randn(4), target


class WithViews(Blobs):
    def train_dataloader(self):
        return DataLoader(Noisy(self.train_set), 16, shuffle=True)

    def cld_train_dataloader(self):
        return DataLoader(self.train_set, 64)

    def cld_val_dataloader(self):
        return DataLoader(Subset(self.val_set, range(len(self.val_set) - 1)), 64)


def test_views_of_the_datamodule_are_swept(tmp_path):
    cld = CLDCallback()
    module = Classifier()
    first_losses = plain_losses(module, Blobs().train_set)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*un-augmented.*")
        fit(tmp_path, cld, module, WithViews())
    torch.testing.assert_close(cld.trajectories.train_losses[0], first_losses, rtol=1e-4, atol=1e-6)
    assert cld.trajectories.val_losses.shape[1] == len(Blobs().val_set) - 1


def test_explicit_loaders_come_before_the_datamodules(tmp_path):
    data = Blobs()
    cld = CLDCallback(
        train_dataloader=DataLoader(data.train_set, 8), val_dataloader=DataLoader(Subset(data.val_set, range(25)), 8)
    )
    fit(tmp_path, cld, datamodule=WithViews())
    assert cld.trajectories.val_losses.shape[1] == 25


@pytest.mark.parametrize("history", ["full", "running"])
def test_augmented_train_set_is_swept_with_a_warning(tmp_path, history):
    class Augmented(WithViews):
        cld_train_dataloader = None

    cld = CLDCallback(history=history)
    with pytest.warns(UserWarning, match="no share of wrong labels.*cld_train_dataloader"):
        fit(tmp_path, cld, datamodule=Augmented())
    assert not cld.scores.values.isnan().any()
    # Losses of augmented samples are no match for those of validation samples, however right the labels are.
    assert "labels" not in dict(cld.scores.account())
    assert set(cld.scores.plausibility.tolist()) <= {0.0, 1.0}
    assert set(cld.scores.suspects().tolist()) == set(torch.nonzero(cld.scores.values <= 0).flatten().tolist())


@pytest.mark.parametrize("history", ["full", "running"])
def test_a_plain_view_tells_the_share_of_wrong_labels(tmp_path, history):
    cld = CLDCallback(history=history)
    fit(tmp_path, cld, datamodule=WithViews())
    assert dict(cld.scores.account())["labels"].startswith("no clear sign of wrong ones")


def test_every_sweep_shows_an_augmented_sample_the_same_way(tmp_path):
    class Augmented(WithViews):
        cld_train_dataloader = None

    class Still(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def on_train_start(self):
            self.net[1].eval()

    cld = CLDCallback()
    with pytest.warns(UserWarning, match="un-augmented"):
        fit(tmp_path, cld, Still, Augmented())
    assert torch.equal(cld.trajectories.train_losses[0], cld.trajectories.train_losses[-1])


def test_val_dataloader_serves_without_a_validation_loop(tmp_path):
    class NoValidation(Classifier):
        validation_step = L.LightningModule.validation_step

    for arguments in ({"limit_val_batches": 0}, {"check_val_every_n_epoch": 3}):
        cld = CLDCallback()
        fit(tmp_path, cld, **arguments)
        assert cld.trajectories.val_losses.shape[1] == len(Blobs().val_set)
    cld = CLDCallback()
    fit(tmp_path, cld, NoValidation)
    assert cld.trajectories.val_losses.shape[1] == len(Blobs().val_set)


@pytest.mark.parametrize("history", ["full", "running"])
def test_positions_outside_of_a_subset_sampler_are_unscored_and_do_not_count(tmp_path, history):
    pool = blobs()

    class Sampled(Blobs):
        def train_dataloader(self):
            return DataLoader(pool, 16, sampler=SubsetRandomSampler(range(0, 80)))

        def val_dataloader(self):
            return DataLoader(pool, 16, sampler=SubsetRandomSampler(range(80, 120)))

    cld = CLDCallback(history=history)
    fit(tmp_path, cld, datamodule=Sampled())
    assert len(cld.scores) == 120
    assert cld.scores.values[80:].isnan().all()
    assert not cld.scores.values[:80].isnan().any()
    assert sum(cld.scores.metadata["reference_sizes"].values()) == 40
    chosen = cld.scores.select(fraction=0.5)
    assert len(chosen) == 40
    assert chosen.max() < 80


class Fixed(Sampler):
    """Yields given positions in order, but offers no attribute that lists them."""

    def __init__(self, positions):
        self.order = positions

    def __iter__(self):
        return iter(self.order)

    def __len__(self):
        return len(self.order)


def on_one_pool(**val):
    """A train and a validation loader over the same pool, separated by their samplers."""
    pool = blobs()
    return _loaders(
        train_dataloader=lambda s: DataLoader(pool, 16, sampler=list(range(80))),
        val_dataloader=lambda s: DataLoader(pool, **val),
    )


@pytest.mark.parametrize(
    "val",
    [
        {"batch_size": 16, "sampler": range(80, 120)},
        {"batch_size": 16, "sampler": np.arange(80, 120)},
        {"batch_sampler": [list(range(80, 110)), list(range(110, 120))]},
    ],
    ids=["range", "array", "batches"],
)
def test_plain_positions_in_the_place_of_a_sampler_keep_the_sets_apart(tmp_path, val, recwarn):
    cld = CLDCallback(batch_size=16)
    fit(tmp_path, cld, datamodule=on_one_pool(**val))
    assert cld.trajectories.references == 40
    assert cld.scores.values[80:].isnan().all()
    assert not [warning for warning in recwarn if "unknown" in str(warning.message)]


@pytest.mark.parametrize(
    "val",
    [{"batch_size": 16, "sampler": Fixed(range(80, 120))}, {"batch_sampler": Fixed([[80, 81], [82, 83, 84]])}],
    ids=["sampler", "batch sampler"],
)
def test_a_validation_sampler_that_says_no_positions_is_warned_of(tmp_path, val):
    with pytest.warns(UserWarning, match="against all 120 samples of the validation set; whether Fixed .*Subset"):
        fit(tmp_path, CLDCallback(batch_size=16), datamodule=on_one_pool(**val))


def test_batch_size_changes_no_loss(tmp_path):
    small, large = CLDCallback(batch_size=7), CLDCallback(batch_size=1000)
    fit(tmp_path, small)
    fit(tmp_path, large)
    torch.testing.assert_close(small.trajectories.train_losses, large.trajectories.train_losses)


# A running history


def test_a_running_history_gives_the_scores_of_a_full_one(tmp_path):
    full, running = CLDCallback(), CLDCallback(history="running", dirpath=tmp_path / "running")
    fit(tmp_path, full, max_epochs=12)
    fit(tmp_path, running, max_epochs=12)
    torch.testing.assert_close(running.scores.values, full.scores.values, rtol=0, atol=1e-5)
    assert torch.equal(running.scores.classes, full.scores.classes)
    assert running.scores.epochs == full.scores.epochs
    assert running.scores.fingerprint == full.scores.fingerprint
    loaded = CLDScores.load(running.scores_path)
    assert torch.equal(loaded.values, running.scores.values)
    assert (loaded.metadata["history"], loaded.metadata["model"]) == ("running", "Classifier")


@pytest.mark.parametrize("every", [1, 3])
def test_a_running_history_draws_the_coresets_of_a_full_one_and_tells_as_much(tmp_path, every):
    full = CLDCallback(every_n_epochs=every, dirpath=tmp_path)
    running = CLDCallback(history="running", every_n_epochs=every, dirpath=tmp_path / "running")
    for cld in (full, running):
        fit(tmp_path, cld, max_epochs=13)
    expected, found = (CLDScores.load(cld.scores_path) for cld in (full, running))
    torch.testing.assert_close(found.confidence, expected.confidence, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.plausibility, expected.plausibility, rtol=0, atol=1e-5)
    for share in (0.05, 0.3, 0.7):
        drawn = [set(made.select(rule="draw", fraction=share, seed=3).tolist()) for made in (expected, found)]
        assert len(drawn[0] & drawn[1]) >= 0.9 * len(drawn[0])  # equal, unless two draws are level to five digits
    assert set(found.suspects().tolist()) == set(expected.suspects().tolist())
    texts = [dict(made.account()) for made in (expected, found)]
    assert {"settled", "reliability", "trust"} <= texts[0].keys() or every == 3
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("watching", "epochs", "half"),
    [
        ({}, 9, 4),
        ({"cutoff_epoch": 8}, 12, 4),
        ({"every_n_epochs": 2}, 13, 6),
        ({"every_n_epochs": 3}, 14, None),  # too few checkpoints up to 6 epochs
        ({"every_n_epochs": 2, "cutoff_epoch": 10}, 12, None),
    ],
)
def test_a_running_history_knows_what_was_in_the_coreset_at_half_of_the_epochs(tmp_path, watching, epochs, half):
    found = []
    for history in ("full", "running"):
        cld = CLDCallback(history=history, dirpath=tmp_path / history, **watching)
        fit(tmp_path, cld, max_epochs=epochs)
        about = cld.scores.metadata
        found.append([about.get(name) for name in ("half_epoch", "half_overlap", "half_problem")])
    assert found[0] == found[1]
    assert found[0][0] == half
    assert (found[0][2] is None) == (half is not None)


def test_a_running_history_has_no_trajectories_and_says_why(tmp_path):
    cld = CLDCallback(history="running", dirpath=tmp_path)
    with pytest.raises(RuntimeError, match="logged nothing"):
        _ = cld.trajectories
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="CLD.*")
        fit(tmp_path, cld)
    with pytest.raises(RuntimeError, match=r"history='running'.* no trajectories.*history='full'"):
        _ = cld.trajectories
    assert [path.name for path in tmp_path.iterdir()] == ["cld-scores.npz"]


def test_a_running_history_is_scored_at_the_cutoff(tmp_path):
    full, running = CLDCallback(cutoff_epoch=4), CLDCallback(history="running", cutoff_epoch=4, stop_at_cutoff=True)
    fit(tmp_path, full, max_epochs=6)
    trainer, _ = fit(tmp_path, running, max_epochs=6)
    assert trainer.current_epoch == 4
    torch.testing.assert_close(running.scores.values, full.scores.values, rtol=0, atol=1e-5)


def test_a_running_history_that_ends_before_the_cutoff_warns_and_raises(tmp_path):
    cld = CLDCallback(history="running", cutoff_epoch=6)
    stop = EarlyStopping("val_loss", patience=0, stopping_threshold=1e9)
    with pytest.warns(UserWarning, match="cutoff_epoch=6 was not reached"):
        fit(tmp_path, cld, max_epochs=8, callbacks=[stop])
    with pytest.raises(ValueError, match="cutoff_epoch=6 was not reached"):
        _ = cld.scores


def test_a_running_history_can_be_scored_while_training_goes_on(tmp_path):
    class Peeks(Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch >= 2:
                self.seen.append(cld.scores.epochs)

    cld, peeks = CLDCallback(history="running"), Peeks()
    fit(tmp_path, cld, callbacks=[peeks])
    assert peeks.seen == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_an_exception_in_a_run_with_a_running_history_is_not_hidden(tmp_path):
    class Dies(Classifier):
        def on_train_epoch_start(self):
            if self.current_epoch == 3:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, CLDCallback(history="running", dirpath=tmp_path), Dies)


# cutoff_epoch="auto"


class Fast(Classifier):
    """Its coreset settles at once. It has no dropout: those random numbers differ between torch versions."""

    def __init__(self, lr=0.1):
        super().__init__(lr)
        self.net[3] = nn.Identity()


class Slow(Fast):
    """Its coreset changes for as long as these tests train it."""

    def __init__(self):
        super().__init__(lr=0.01)


def test_a_coreset_that_has_settled_is_scored_there(tmp_path):
    whole, auto = CLDCallback(), CLDCallback(cutoff_epoch="auto", dirpath=tmp_path)
    fit(tmp_path, whole, Fast, max_epochs=12)
    trainer, _ = fit(tmp_path, auto, Fast, max_epochs=12)
    settled = settled_oracle(whole.trajectories)
    assert 8 <= settled < 12
    assert trainer.current_epoch == 12
    assert auto.trajectories.epochs == auto.scores.epochs == list(range(settled + 1))
    assert torch.equal(auto.scores.values, whole.trajectories.score(settled).values)
    saved = CLDScores.load(tmp_path / "cld-scores.npz")
    assert torch.equal(saved.values, auto.scores.values)
    assert (saved.metadata["cutoff_epoch"], saved.metadata["settled_epoch"]) == ("auto", settled)
    assert f"settled      after {settled} epochs" in saved.summary()


def settled_oracle(trajectories):
    """The epoch of the third checkpoint in a row whose coreset shares 85 % with the coreset at half the epochs."""
    chosen = {epoch: set(trajectories.score(epoch).select(fraction=0.1).tolist()) for epoch in range(3, 13)}
    agrees = [len(chosen[e] & chosen[e // 2]) >= 0.85 * len(chosen[e]) for e in range(6, 13)]
    return next((e + 8 for e in range(5) if all(agrees[e : e + 3])), None)


def test_training_can_stop_where_the_coreset_has_settled(tmp_path):
    cld = CLDCallback(cutoff_epoch="auto", stop_at_cutoff=True, dirpath=tmp_path)
    trainer, _ = fit(tmp_path, cld, Fast, max_epochs=12)
    assert trainer.current_epoch == cld.scores.metadata["settled_epoch"] == cld.scores.epochs[-1] < 12


def test_a_coreset_that_does_not_settle_is_scored_at_the_end(tmp_path):
    whole, auto = CLDCallback(), CLDCallback(cutoff_epoch="auto", stop_at_cutoff=True, dirpath=tmp_path)
    fit(tmp_path, whole, Slow, max_epochs=12)
    trainer, _ = fit(tmp_path, auto, Slow, max_epochs=12)
    assert settled_oracle(whole.trajectories) is None
    assert trainer.current_epoch == 12
    assert torch.equal(auto.scores.values, whole.scores.values)
    saved = CLDScores.load(tmp_path / "cld-scores.npz")
    assert (saved.metadata["cutoff_epoch"], saved.metadata["settled_epoch"]) == ("auto", None)
    assert "settled      no, scored at the end" in saved.summary()


def test_scores_of_other_cutoffs_say_nothing_of_settling(tmp_path):
    cld = CLDCallback(cutoff_epoch=4, dirpath=tmp_path)
    fit(tmp_path, cld, max_epochs=5)
    assert "settled_epoch" not in cld.scores.metadata
    assert not any(row.startswith("settled ") for row in cld.scores.summary().splitlines())


def test_another_fit_settles_for_itself(tmp_path):
    cld = CLDCallback(cutoff_epoch="auto", dirpath=tmp_path)
    fit(tmp_path, cld, Fast, max_epochs=12)
    settled = cld.scores.epochs[-1]
    assert settled < 12
    fit(tmp_path, cld, Slow, max_epochs=12)
    assert cld.scores.epochs[-1] == 12
    fit(tmp_path, cld, Fast, max_epochs=12)
    assert cld.scores.epochs[-1] == settled


def test_a_coreset_that_cannot_be_compared_does_not_end_training(tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise MemoryError("no memory")

    monkeypatch.setattr("lightning_cld.recording.settling.best_tenth", fail)
    cld = CLDCallback(cutoff_epoch="auto", dirpath=tmp_path)
    with pytest.warns(UserWarning, match="could not find out whether the coreset has settled: no memory"):
        fit(tmp_path, cld, max_epochs=10)
    assert cld.scores.epochs == list(range(11))


# Files and messages


def test_files_go_to_dirpath(tmp_path):
    cld = CLDCallback(dirpath=tmp_path / "a" / "b")
    assert cld.scores_path == tmp_path / "a" / "b" / "cld-scores.npz"
    fit(tmp_path, cld)
    assert torch.equal(CLDScores.load(cld.scores_path).values, cld.scores.values)
    loaded = LossTrajectories.load(tmp_path / "a" / "b" / "cld-trajectories.npz")
    assert torch.equal(loaded.train_losses, cld.trajectories.train_losses)
    assert sorted(path.name for path in cld.scores_path.parent.iterdir()) == ["cld-scores.npz", "cld-trajectories.npz"]


def test_files_go_to_the_loggers_directory(tmp_path):
    cld = CLDCallback(filename="round1")
    assert cld.scores_path is None
    logger = CSVLogger(tmp_path, name="logs", version=3)
    fit(tmp_path, cld, logger=logger)
    assert cld.scores_path == Path(logger.log_dir) / "round1.npz"
    assert cld.scores_path.exists()
    assert (Path(logger.log_dir) / "round1-trajectories.npz").exists()


def test_files_go_to_the_trainers_root_without_a_logger(tmp_path):
    cld = CLDCallback()
    fit(tmp_path, cld)
    assert cld.scores_path == tmp_path / "cld-scores.npz"
    assert cld.scores_path.exists()


def test_scores_tell_where_they_come_from(tmp_path):
    cld = CLDCallback(cutoff_epoch=4, every_n_epochs=1, dirpath=tmp_path)
    fit(tmp_path, cld, max_epochs=5)
    metadata = CLDScores.load(cld.scores_path).metadata
    assert metadata["model"] == "Classifier"
    assert (metadata["cutoff_epoch"], metadata["every_n_epochs"], metadata["max_epochs"]) == (4, 1, 5)
    assert metadata["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert metadata["sweep_seconds"] > 0


def test_one_closing_message(tmp_path, caplog):
    cld = CLDCallback(dirpath=tmp_path)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        logging.getLogger("lightning.pytorch").addHandler(caplog.handler)
        try:
            fit(tmp_path, cld)
        finally:
            logging.getLogger("lightning.pytorch").removeHandler(caplog.handler)
    messages = {record.getMessage() for record in caplog.records if record.getMessage().startswith("CLD")}
    assert len(messages) == 1
    message = messages.pop()
    for fact in (f"{len(cld.scores)} samples", "3 classes", "5 checkpoints", " s.", str(cld.scores_path)):
        assert fact in message


def test_epochs_that_lightning_adds_for_averaging_are_not_told(tmp_path):
    cld = CLDCallback()
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=2)
    fit(tmp_path, cld, callbacks=[averaging], max_epochs=5)
    assert cld.scores.metadata["max_epochs"] == cld.scores.epochs[-1] == 5


def test_fast_dev_run_has_nothing_to_score(tmp_path):
    cld = CLDCallback()
    fit(tmp_path, cld, fast_dev_run=True)
    with pytest.raises(RuntimeError, match="logged nothing"):
        _ = cld.scores


# Interrupted runs


def test_resumed_run_has_the_rows_and_scores_of_the_uninterrupted_one(tmp_path):
    class NoDropout(Classifier):
        def __init__(self):
            super().__init__()
            self.net[3] = nn.Identity()

    data = Blobs(shuffle=False)
    whole, first, second = CLDCallback(), CLDCallback(), CLDCallback()
    fit(tmp_path, whole, NoDropout, data, max_epochs=6)
    trainer, _ = fit(tmp_path, first, NoDropout, data, max_epochs=3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, second, NoDropout, data, max_epochs=6, ckpt_path=tmp_path / "half.ckpt")
    assert second.trajectories.epochs == whole.trajectories.epochs
    assert torch.equal(second.trajectories.train_losses, whole.trajectories.train_losses)
    assert torch.equal(second.scores.values, whole.scores.values)


@pytest.mark.parametrize("every_n_train_steps", [6, 4])
def test_resume_from_a_step_checkpoint_leaves_no_hole(tmp_path, every_n_train_steps):
    # An epoch has 6 steps, so step 12 is in its last batch.
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=every_n_train_steps, save_top_k=-1)
    cld = CLDCallback()
    fit(tmp_path, CLDCallback(), max_epochs=5, callbacks=[saver], enable_checkpointing=True)
    fit(tmp_path, cld, max_epochs=5, ckpt_path=tmp_path / "step=12.ckpt")
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4, 5]
    assert not cld.trajectories.train_losses.isnan().any()


def test_checkpoint_of_a_run_without_the_callback_gives_no_theta_0(tmp_path):
    trainer, _ = fit(tmp_path, None, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    cld = CLDCallback()
    with pytest.warns(UserWarning, match="theta_0 is missing"):
        fit(tmp_path, cld, max_epochs=7, ckpt_path=tmp_path / "plain.ckpt")
    assert cld.trajectories.epochs == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "other", [{"every_n_epochs": 2}, {"cutoff_epoch": 5}, {"cutoff_epoch": "auto"}, {"history": "running"}]
)
def test_resume_with_another_timeline_is_refused(tmp_path, other):
    trainer, _ = fit(tmp_path, CLDCallback(), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="timelines don't fit"):
        fit(tmp_path, CLDCallback(**other), max_epochs=8, ckpt_path=tmp_path / "half.ckpt")


def test_resume_on_another_train_set_is_refused(tmp_path):
    trainer, _ = fit(tmp_path, CLDCallback(), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    other = Blobs(TensorDataset(blobs().tensors[0], blobs().tensors[1].roll(1)))
    with pytest.raises(ValueError, match="not the one whose losses were logged"):
        fit(tmp_path, CLDCallback(), datamodule=other, max_epochs=6, ckpt_path=tmp_path / "half.ckpt")


def test_testing_a_checkpoint_leaves_the_rows_alone(tmp_path):
    cld = CLDCallback()
    trainer, module = fit(
        tmp_path, cld, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]
    )
    trainer.test(module, datamodule=Blobs(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4]


def test_an_exception_leaves_the_logged_losses_on_disk(tmp_path):
    class Dies(Classifier):
        def on_train_epoch_start(self):
            if self.current_epoch == 4:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path), Dies, max_epochs=6)
    assert LossTrajectories.load(tmp_path / "cld-trajectories.npz").epochs == [0, 1, 2, 3, 4]
    assert not (tmp_path / "cld-scores.npz").exists()


# Scores of other processes and runs


def test_scores_of_processes_that_are_gone_are_read_from_their_file(tmp_path):
    cld = CLDCallback(dirpath=tmp_path)
    elsewhere = copy.deepcopy(cld)  # as in a forked or spawned process
    fit(tmp_path, elsewhere)
    assert torch.equal(cld.scores.values, elsewhere.scores.values)


def test_scores_of_an_earlier_run_are_not_taken_for_its_own(tmp_path):
    fit(tmp_path, CLDCallback(dirpath=tmp_path))
    with pytest.raises(RuntimeError, match="logged nothing"):
        _ = CLDCallback(dirpath=tmp_path).scores


def test_scores_of_the_fit_before_are_not_taken_for_those_of_one_that_failed(tmp_path):
    cld = CLDCallback(dirpath=tmp_path)
    fit(tmp_path, cld)
    with pytest.raises(TypeError, match="no forward"):
        fit(tmp_path, cld, NoForward)
    with pytest.raises(RuntimeError, match="logged nothing"):
        _ = cld.scores


def test_numpy_numbers_are_numbers(tmp_path):
    cld = CLDCallback(cutoff_epoch=np.int64(4), every_n_epochs=np.int32(1), batch_size=np.int16(8), dirpath=tmp_path)
    fit(tmp_path, cld)
    assert CLDScores.load(tmp_path / "cld-scores.npz").metadata["cutoff_epoch"] == 4


@pytest.mark.parametrize("history", ["full", "running"])
def test_a_callback_can_be_pickled_before_and_after_a_fit(tmp_path, history):
    cld = CLDCallback(history=history)
    pickle.dumps(cld)
    fit(tmp_path, cld)
    assert torch.equal(pickle.loads(pickle.dumps(cld)).scores.values, cld.scores.values)


def test_files_that_cannot_be_written_do_not_end_training(tmp_path, monkeypatch):
    def fail(*arguments):
        raise MemoryError("no memory")

    monkeypatch.setattr("lightning_cld.recording.results.write_together", fail)
    with pytest.warns(UserWarning, match="could not be saved"):
        trainer, _ = fit(tmp_path, CLDCallback(cutoff_epoch=3, dirpath=tmp_path), max_epochs=4)
    assert trainer.current_epoch == 4


@pytest.mark.parametrize("names", [("a", "a-scores"), ("a", "a-trajectories")])
def test_two_callbacks_with_files_of_one_name_are_refused(tmp_path, names):
    module = Classifier()
    one, other = (CLDCallback(dirpath=tmp_path, filename=name) for name in names)
    with pytest.raises(ValueError, match=r"would write a-trajectories\.npz: filename='a.*' and filename='a.*'"):
        fit(tmp_path, one, module, callbacks=[other])
    elsewhere = CLDCallback(dirpath=tmp_path / "elsewhere", filename=names[1])
    fit(tmp_path, CLDCallback(dirpath=tmp_path, filename=names[0]), callbacks=[elsewhere])


def test_a_dirpath_that_cannot_be_is_found_out_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    module = Classifier()
    with pytest.raises(OSError, match="file"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path / "file"), module)
    assert module.trainer.global_step == 0


# Runs that can't be scored


def test_a_reference_that_is_not_finite_before_training_raises_at_the_start(tmp_path):
    pool = blobs()
    pool.tensors[0][int(Blobs().val_set.indices[4])] = torch.nan
    with pytest.raises(
        ValueError, match=r"Before the first step validation losses of class \d are not finite \(position 4 of"
    ):
        fit(tmp_path, CLDCallback(), datamodule=Blobs(pool))


def test_a_validation_loss_of_an_untrained_class_may_be_infinite(tmp_path):
    pool = blobs()
    data = Blobs(pool)
    untrained = int(data.val_set.dataset.tensors[1][data.val_set.indices[4]])
    pool.tensors[0][int(data.val_set.indices[4])] = torch.nan
    data.train_set.indices = [p for p in data.train_set.indices if int(pool.tensors[1][p]) != untrained]
    cld = CLDCallback()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not finite.*")
        fit(tmp_path, cld, datamodule=data)
    assert not cld.scores.values.isnan().any()


@pytest.mark.parametrize("history", ["full", "running"])
@pytest.mark.parametrize(
    ("before", "after"), [(range(90), range(45)), (range(45), range(90)), (range(45), range(45, 90))]
)
@pytest.mark.parametrize("classes", [True, False])
def test_a_run_does_not_go_on_with_another_sampler(tmp_path, history, before, after, classes):
    class OneClass(Classifier):
        def cld_step(self, batch):
            losses, labels = torch.nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none"), batch[1]
            return losses, labels if classes else None

    def over(positions):
        return Blobs(shuffle=None, sampler=SubsetRandomSampler(positions))

    trainer, _ = fit(tmp_path, CLDCallback(history=history), OneClass(), over(before), max_epochs=4)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    with pytest.raises(ValueError, match=r"its sampler draws \d+ positions.*Resume with the sampler that was logged"):
        fit(
            tmp_path,
            CLDCallback(history=history),
            OneClass(),
            over(after),
            ckpt_path=tmp_path / "four.ckpt",
            max_epochs=8,
        )


@pytest.mark.parametrize("history", ["full", "running"])
def test_a_sample_with_a_non_finite_loss_is_unscored(tmp_path, history):
    pool = blobs()
    broken = int(Blobs().train_set.indices[5])
    pool.tensors[0][broken] = torch.nan

    class SkipsNan(Classifier):
        def training_step(self, batch, batch_idx):
            fine = ~batch[0].isnan().any(dim=1)
            return F.cross_entropy(self(batch[0][fine]), batch[1][fine])

    cld = CLDCallback(history=history)
    fit(tmp_path, cld, SkipsNan, Blobs(pool))
    assert cld.scores.values.isnan().nonzero().flatten().tolist() == [5]
    if history == "full":
        assert cld.trajectories.train_losses[:, 5].isposinf().all()


@pytest.mark.parametrize("history", ["full", "running"])
def test_a_diverged_reference_warns_in_training_and_raises_from_scores(tmp_path, history):
    class Diverges(Classifier):
        def cld_step(self, batch):
            losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
            return torch.where(
                (batch[1] == 1) & (self.current_epoch == 2) & (self.global_step > 0), torch.nan, losses
            ), batch[1]

    cld = CLDCallback(dirpath=tmp_path, history=history)
    with pytest.warns(UserWarning, match="class 1 are not finite after 3 epochs"):
        trainer, _ = fit(tmp_path, cld, Diverges, max_epochs=5)
    assert trainer.current_epoch == 5
    with pytest.raises(ValueError, match=r"class 1 are not finite at the checkpoint after 3 epochs"):
        _ = cld.scores


def test_training_that_ends_before_the_cutoff_warns_and_scores_raise(tmp_path):
    cld = CLDCallback(cutoff_epoch=6, dirpath=tmp_path)
    stop = EarlyStopping("val_loss", patience=0, stopping_threshold=1e9)
    with pytest.warns(UserWarning, match="cutoff_epoch=6 was not reached"):
        fit(tmp_path, cld, max_epochs=8, callbacks=[stop])
    with pytest.raises(ValueError, match="cutoff_epoch=6 was not reached"):
        _ = cld.scores
    assert LossTrajectories.load(tmp_path / "cld-trajectories.npz").epochs == [0, 1]


@pytest.mark.parametrize(
    ("cutoff", "steps", "message"),
    [(None, 12, "max_steps=12 .* at least 4"), (4, 18, "cutoff_epoch=4 is never reached")],
)
@pytest.mark.parametrize("max_epochs", [-1, 20])
def test_too_few_epochs_in_max_steps_raise_at_the_start(tmp_path, cutoff, steps, message, max_epochs):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, CLDCallback(cutoff_epoch=cutoff), max_epochs=max_epochs, max_steps=steps)
    fit(tmp_path, cld := CLDCallback(cutoff_epoch=cutoff), max_epochs=max_epochs, max_steps=steps + 6)
    assert not cld.scores.values.isnan().any()


def test_too_little_time_warns_at_the_end(tmp_path):
    class TimeIsUp(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    cld = CLDCallback()
    with pytest.warns(UserWarning, match="at least 4 checkpoints"):
        fit(tmp_path, cld, max_epochs=9, callbacks=[TimeIsUp()])
    with pytest.raises(ValueError, match="at least 4 checkpoints"):
        _ = cld.scores


@pytest.mark.parametrize("history", ["full", "running"])
def test_a_failed_sweep_leaves_a_hole_and_training_goes_on(tmp_path, history):
    class FailsOnce(Classifier):
        def cld_step(self, batch):
            if self.global_step and self.current_epoch == 2:
                raise RuntimeError("disk away")
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none"), batch[1]

    whole, cld = CLDCallback(), CLDCallback(history=history)
    fit(tmp_path, whole, max_epochs=8)
    with pytest.warns(UserWarning, match="after 3 epochs could not be logged: disk away"):
        fit(tmp_path, cld, FailsOnce, max_epochs=8)
    assert cld.scores.epochs == [0, 1, 2, 4, 5, 6, 7, 8]
    train, val = whole.trajectories.train_losses.clone(), whole.trajectories.val_losses.clone()
    train[3], val[3] = torch.nan, torch.nan
    expected = cld_oracle(train, val, whole.trajectories.train_classes, whole.trajectories.val_classes)
    assert np.isfinite(expected).all()
    assert_scores(cld.scores.values, expected)


def test_a_checkpoint_that_was_missed_leaves_a_hole(tmp_path):
    cld = CLDCallback()

    class LooksAway(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                trainer.callbacks.remove(cld)

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                trainer.callbacks.append(cld)

    fit(tmp_path, cld, max_epochs=8, callbacks=[LooksAway()])
    assert cld.trajectories.epochs == list(range(9))
    assert cld.trajectories.train_losses.isnan().all(dim=1).nonzero().flatten().tolist() == [4]


def test_manual_optimization_with_uncounted_steps_has_one_theta_0(tmp_path):
    class Uncounted(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.own_optimizer = torch.optim.SGD(self.parameters(), 0.1)

        def training_step(self, batch, batch_idx):
            self.own_optimizer.zero_grad()
            F.cross_entropy(self(batch[0]), batch[1]).backward()
            self.own_optimizer.step()

    trainer, _ = fit(tmp_path, CLDCallback(), Uncounted, max_epochs=3)
    assert trainer.global_step == 0
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    first = CLDCallback()
    fit(tmp_path, first, Uncounted, max_epochs=3)
    resumed = CLDCallback()
    fit(tmp_path, resumed, Uncounted, max_epochs=5, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.trajectories.train_losses[:4], first.trajectories.train_losses)


def test_a_train_set_that_changes_its_order_is_noticed(tmp_path):
    class Reshuffles(Dataset):
        reads = 0

        def __len__(self):
            return len(Blobs().train_set)

        def __getitem__(self, index):
            Reshuffles.reads += 1
            return Blobs().train_set[(index + Reshuffles.reads // 150) % len(self)]

    datamodule = L.LightningDataModule.from_datasets(Reshuffles(), Blobs().val_set, batch_size=16)
    cld = CLDCallback()
    with pytest.warns(UserWarning, match="the train set shows other samples at the same positions"):
        fit(tmp_path, cld, datamodule=datamodule)
    with pytest.raises(ValueError, match="at least 4 checkpoints"):
        _ = cld.scores


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cutoff_epoch": 2}, ValueError, "cutoff_epoch=2 .* gives 3 checkpoints"),
        ({"cutoff_epoch": 10, "every_n_epochs": 3}, ValueError, "multiple of every_n_epochs=3"),
        ({"cutoff_epoch": 0}, ValueError, "cutoff_epoch must be at least 1"),
        ({"cutoff_epoch": "soon"}, ValueError, "cutoff_epoch must be a number of epochs, 'auto' or None, got 'soon'"),
        ({"cutoff_epoch": "4"}, ValueError, "got '4'"),
        ({"cutoff_epoch": "auto", "history": "running"}, ValueError, "history='running' does not keep.*history='full'"),
        ({"cutoff_epoch": 4.5}, TypeError, "cutoff_epoch must be a whole number"),
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs must be at least 1"),
        ({"batch_size": -1}, ValueError, "batch_size must be at least 1"),
        ({"stop_at_cutoff": True}, ValueError, "needs a cutoff_epoch"),
        ({"loss_fn": nn.CrossEntropyLoss()}, ValueError, "reduction='none'"),
        ({"loss_fn": nn.CrossEntropyLoss}, TypeError, "instance"),
        ({"filename": "a/b"}, ValueError, "dirpath"),
        ({"history": "none"}, ValueError, "history must be 'full' or 'running', got 'none'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        CLDCallback(**arguments)


@pytest.mark.parametrize(
    ("arguments", "max_epochs", "message"),
    [
        ({}, 2, "max_epochs=2 .* gives 3 checkpoints"),
        ({"every_n_epochs": 3}, 8, "max_epochs=8 with every_n_epochs=3 gives 3 checkpoints"),
        ({"cutoff_epoch": 9}, 5, "never reached with max_epochs=5"),
    ],
)
def test_plans_that_cannot_work_raise_before_anything_runs(tmp_path, arguments, max_epochs, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, CLDCallback(**arguments), max_epochs=max_epochs)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Blobs().train_set)


class TupleOutput(Classifier):
    def forward(self, inputs):
        return self.net(inputs), inputs


class OneLogit(Classifier):
    def forward(self, inputs):
        return self.net(inputs)[:, :1]


class NoForward(Classifier):
    forward = L.LightningModule.forward


class BothLosses(Classifier):
    def cld_step(self, batch):
        return None


class ShortLosses(Classifier):
    def cld_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1]), batch[1]


class NoPair(Classifier):
    def cld_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")


class FloatClasses(Classifier):
    def cld_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none"), batch[1].float()


class SomeClasses(Classifier):
    def cld_step(self, batch):
        classes = batch[1] if len(batch[1]) == 16 else None
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none"), classes


class NegativeClasses(Classifier):
    def cld_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none"), batch[1] - 1


@pytest.mark.parametrize(
    ("module", "callback", "error", "message"),
    [
        (TupleOutput, {}, TypeError, "a tuple of 2.*loss_fn.*cld_step"),
        (OneLogit, {}, TypeError, r"\[16, 1\].*loss_fn.*cld_step"),
        (NoForward, {}, TypeError, "no forward.*cld_step"),
        (BothLosses, {"loss_fn": nn.CrossEntropyLoss(reduction="none")}, ValueError, "Remove loss_fn to use cld_step"),
        (ShortLosses, {}, ValueError, r"one loss per sample.*shape \[\]"),
        (NoPair, {}, TypeError, r"must return \(losses, classes\)"),
        (FloatClasses, {}, TypeError, "classes as integers"),
        (SomeClasses, {}, ValueError, "classes for some batches and None for others"),
        (NegativeClasses, {}, ValueError, "must not be negative, got -1"),
        (Classifier, {"loss_fn": lambda outputs, targets: F.cross_entropy(outputs, targets)}, ValueError, "reduction"),
    ],
)
def test_bad_modules_and_losses_raise_before_the_first_step(tmp_path, module, callback, error, message):
    with pytest.raises(error, match=message):
        fit(tmp_path, CLDCallback(**callback), module := module())
    assert module.trainer.global_step == 0


def _loaders(**methods):
    return type("Custom", (Blobs,), methods)()


@pytest.mark.parametrize(
    ("datamodule", "error", "message"),
    [
        (
            lambda: _loaders(val_dataloader=L.LightningDataModule.val_dataloader),
            ValueError,
            "no validation data.*test set",
        ),
        (lambda: _loaders(val_dataloader=lambda s: [DataLoader(s.val_set)] * 2), ValueError, "2 val dataloaders"),
        (lambda: _loaders(val_dataloader=lambda s: DataLoader(Subset(s.val_set, []))), ValueError, "empty"),
        (lambda: _loaders(train_dataloader=lambda s: [DataLoader(s.train_set)] * 2), ValueError, "2 train dataloaders"),
        (lambda: _loaders(train_dataloader=lambda s: DataLoader(Stream(), 16)), TypeError, "is a stream.*positions"),
        (
            lambda: _loaders(
                train_dataloader=lambda s: DataLoader(
                    TensorDataset(torch.rand(5, 8, 4), torch.zeros(5, 8).long()), None
                )
            ),
            TypeError,
            "is a stream.*positions",
        ),
        (
            lambda: _loaders(train_dataloader=lambda s: DataLoader(s.train_set, batch_sampler=[[0, 1], [2, 3]])),
            TypeError,
            r"batch_size=\.\.\. of CLDCallback",
        ),
        (
            lambda: _loaders(
                cld_val_dataloader=lambda s: DataLoader(TensorDataset(torch.rand(9, 4), torch.zeros(9).long()))
            ),
            ValueError,
            "classes 1, 2 have training but no validation samples.*proportional_holdout",
        ),
        (
            lambda: _loaders(cld_train_dataloader=lambda s: DataLoader(s.val_set)),
            ValueError,
            "not of the dataset that is trained on: it has 30 samples, not 90",
        ),
        (
            lambda: _loaders(cld_train_dataloader=lambda s: DataLoader(Subset(s.train_set, range(89, -1, -1)))),
            ValueError,
            "it takes other positions of a larger dataset",
        ),
        (
            lambda: _loaders(
                train_dataloader=lambda s: DataLoader(TensorDataset(torch.rand(40, 4), torch.rand(40, 3)), 8)
            ),
            TypeError,
            r"float32 tensor of shape \[8, 3\]",
        ),
        (
            lambda: _loaders(train_dataloader=lambda s: DataLoader(TensorDataset(torch.rand(40, 4)), 8)),
            TypeError,
            r"\(inputs, targets, ...\).*cld_step",
        ),
    ],
)
def test_bad_data_raise_before_the_first_step(tmp_path, datamodule, error, message):
    module = Classifier()
    module.training_step = lambda batch, batch_idx: pytest.fail("a step was taken")
    with pytest.raises(error, match=message):
        fit(tmp_path, CLDCallback(), module, datamodule())


def test_a_custom_batch_sampler_serves_with_batch_size(tmp_path):
    batches = [list(range(start, start + 10)) for start in range(0, 90, 10)]
    data = _loaders(train_dataloader=lambda s: DataLoader(s.train_set, batch_sampler=batches))
    cld = CLDCallback(batch_size=20)
    fit(tmp_path, cld, datamodule=data)
    assert not cld.scores.values.isnan().any()


def test_an_explicit_view_serves_where_the_trainers_loader_cannot(tmp_path):
    data = _loaders(train_dataloader=lambda s: {"a": DataLoader(s.train_set, 16), "b": DataLoader(s.train_set, 16)})

    class TwoLoaders(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    cld = CLDCallback(train_dataloader=DataLoader(Blobs().train_set, 16))
    fit(tmp_path, cld, TwoLoaders, data)
    assert len(cld.scores) == 90


def test_a_trainer_without_a_datamodule(tmp_path):
    data, cld = Blobs(), CLDCallback()
    quiet_trainer(tmp_path, cld).fit(Classifier(), data.train_dataloader(), data.val_dataloader())
    assert len(cld.scores) == 90


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_wrap_the_module_are_refused(package, name):
    strategy = getattr(import_module(f"{package}.strategies"), name)
    trainer = Mock(strategy=object.__new__(strategy))  # setting it up needs a GPU
    with pytest.raises(TypeError, match="one device, with DDP"):
        CLDCallback()._recorder.start(trainer, Classifier())


def sorted_batch(samples):
    """As for recurrent networks: the longest first."""
    samples = sorted(samples, key=lambda sample: -float(sample[0].sum()))
    return torch.utils.data.default_collate(samples)


def padded_batch(samples):
    return torch.utils.data.default_collate(list(samples))


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_batches_that_sort_their_samples_are_refused(tmp_path, kind):
    class Sorting(Blobs):
        def val_dataloader(self):
            return DataLoader(self.val_set, 16, collate_fn=sorted_batch if kind == "validation" else padded_batch)

    data = Sorting(collate_fn=sorted_batch if kind == "train" else padded_batch)
    message = (
        rf"The collate_fn of the {kind[:5] if kind == 'train' else 'val'} loader .*enforce_sorted=False.*_dataloader="
    )
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, CLDCallback(), datamodule=data)
    kept = DataLoader(data.train_set, 16, collate_fn=padded_batch), DataLoader(data.val_set, 16)
    cld = CLDCallback(train_dataloader=kept[0], val_dataloader=kept[1])
    fit(tmp_path, cld, datamodule=data)
    assert torch.equal(cld.scores.classes, torch.tensor([int(label) for _, label in data.train_set]))


def test_a_loss_with_layers_of_its_own_is_evaluated_and_stays_as_it_is(tmp_path):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))

        def forward(self, outputs, targets):
            return torch.nn.functional.cross_entropy(self.layers(outputs), targets, reduction="none")

    loss = Noisy()
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    cld = CLDCallback(loss_fn=loss)
    _, module = fit(tmp_path, cld)
    assert all(part.training for part in loss.modules())
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    loss.eval()
    module.eval()
    inputs, targets = torch.utils.data.default_collate(list(Blobs().train_set))
    with torch.no_grad():
        expected = loss(module(inputs), targets)
    torch.testing.assert_close(cld.trajectories.train_losses[-1], expected, rtol=1e-4, atol=1e-5)
