"""The callback together with other callbacks, loggers, tuners, timm, pytorch_lightning and custom training loops."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from lightning.fabric import Fabric
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from oracles import assert_scores, cld_oracle
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from toys import CLASSES, Blobs, Classifier, plain_losses, quiet_trainer

from lightning_cld import CLDCallback, CLDMetric, CLDScores, CoresetDataModule, LossTrajectories

WeightAveraging = getattr(lightning_callbacks, "WeightAveraging", None)  # since lightning 2.6


class Watcher(Callback):
    """Computes the losses that CLD should log, without CLD: one sample at a time, on a copy of the module."""

    def __init__(self) -> None:
        self.train: list[Tensor] = []
        self.val: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch < trainer.max_epochs - self.extra(trainer):
            self.watch(trainer, pl_module)

    def extra(self, trainer: L.Trainer) -> int:
        """The extra epochs at the end: SWA adds one that only updates BatchNorm on averaged weights."""
        return sum(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)

    def watch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        net = nn.Module()
        net.net = copy.deepcopy(pl_module.net)
        self.train.append(plain_losses(net, trainer.datamodule.train_set))
        self.val.append(plain_losses(net, trainer.datamodule.val_set))

    def scores(self, data: Blobs) -> np.ndarray:
        return cld_oracle(torch.stack(self.train), torch.stack(self.val), labels(data.train_set), labels(data.val_set))


def labels(part: Any) -> Tensor:
    return torch.tensor([int(part[position][1]) for position in range(len(part))])


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def many(root: Any) -> list[Callback]:
    return [
        ModelCheckpoint(root / "checkpoints", monitor="val_loss", save_top_k=2, save_last=True),
        GradientAccumulationScheduler({0: 1, 2: 2}),
        LearningRateMonitor("epoch"),
        RichProgressBar(),
    ]


GROUPS: dict[str, Callable[[], list[Callback]]] = {
    "stochastic weight averaging": lambda: [
        StochasticWeightAveraging(0.05, swa_epoch_start=3),
        EarlyStopping("val_loss", patience=50),
    ],
    "stopped early": lambda: [EarlyStopping("val_loss", patience=4, min_delta=10.0)],
}
if WeightAveraging is not None:
    GROUPS["both averages"] = lambda: [
        StochasticWeightAveraging(0.05, swa_epoch_start=3),
        WeightAveraging(),
        EarlyStopping("val_loss", patience=50),
    ]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.filterwarnings("ignore")
def test_many_callbacks_at_once(tmp_path, group):
    def run(name: str, watcher: Callback) -> tuple[L.Trainer, L.LightningModule, Blobs]:
        L.seed_everything(7, verbose=False)
        root = tmp_path / name
        callbacks = [watcher, *many(root), *GROUPS[group]()]
        settings = {"logger": CSVLogger(root), "enable_checkpointing": True, "enable_progress_bar": True}
        trainer = quiet_trainer(root, *callbacks, max_epochs=8, log_every_n_steps=1, **settings)
        model, data = Scheduled(), Blobs()
        trainer.fit(model, datamodule=data)
        return trainer, model, data

    plain, cld = Watcher(), CLDCallback(dirpath=tmp_path / "cld")
    plain_trainer, plain_model, data = run("plain", plain)
    trainer, model, _ = run("watched", cld)

    for name, value in plain_model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert trainer.global_step == plain_trainer.global_step
    logs = [sorted((tmp_path / run / "lightning_logs").rglob("metrics.csv")) for run in ("plain", "watched")]
    assert [csv_rows(path) for path in logs[0]] == [csv_rows(path) for path in logs[1]] != []
    saved = [sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir()) for run in ("plain", "watched")]
    assert saved[0] == saved[1]
    assert len(saved[0]) == 3

    epochs = {"stopped early": 5}.get(group, 8)
    assert cld.trajectories.epochs == list(range(epochs + 1))
    torch.testing.assert_close(cld.trajectories.train_losses, torch.stack(plain.train))
    torch.testing.assert_close(cld.trajectories.val_losses, torch.stack(plain.val))
    assert_scores(cld.scores.values, plain.scores(data))


# Loggers


def csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a log, without the columns under `cld/`."""
    with path.open(newline="") as file:
        rows = [
            {name: value for name, value in row.items() if not name.startswith("cld/")} for row in csv.DictReader(file)
        ]
    return [row for row in rows if any(value for name, value in row.items() if name != "step")]


def csv_log(root: Any) -> list[dict[str, str]]:
    return csv_rows(root / "lightning_logs" / "version_0" / "metrics.csv")


def tensorboard_log(root: Any) -> Any:
    events = EventAccumulator(str(root / "lightning_logs" / "version_0")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("cld/")
    }


@pytest.mark.parametrize(
    ("logger", "read", "folder"),
    [
        (CSVLogger, csv_log, "lightning_logs/version_0"),
        (TensorBoardLogger, tensorboard_log, "lightning_logs/version_0"),
        (lambda root: False, lambda root: None, "."),
        (
            lambda root: [TensorBoardLogger(root), CSVLogger(root, version=1)],
            tensorboard_log,
            "lightning_logs/version_0",
        ),
    ],
    ids=["csv", "tensorboard", "none", "two"],
)
@pytest.mark.filterwarnings("ignore")
def test_loggers(tmp_path, logger, read, folder):
    logs = []
    for name, callbacks in (("plain", []), ("watched", [CLDCallback()])):
        L.seed_everything(7, verbose=False)
        root = tmp_path / name
        trainer = quiet_trainer(root, *callbacks, logger=logger(root), log_every_n_steps=1)
        trainer.fit(Classifier(), datamodule=Blobs())
        logs.append(read(root))
    assert logs[0] == logs[1]
    assert (tmp_path / "watched" / folder / "cld-scores.npz").is_file()
    assert callbacks[0].scores_path == tmp_path / "watched" / folder / "cld-scores.npz"


# Tuners


class Resizable(Blobs):
    """A datamodule whose batch size can be tuned."""

    batch_size = 5  # not a power of two; the tuner tries only those

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True)


def scale(trainer: L.Trainer, model: L.LightningModule, data: Resizable) -> None:
    Tuner(trainer).scale_batch_size(model, datamodule=data, steps_per_trial=1, max_trials=2)


def test_a_tuner_resizes_the_datamodule_within_a_coreset(tmp_path):
    data = Resizable()
    tried = []
    data.train_dataloader = lambda: tried.append(data.batch_size) or DataLoader(data.train_set, data.batch_size)
    coreset = CoresetDataModule(data, range(40))
    found = Tuner(quiet_trainer(tmp_path)).scale_batch_size(
        Classifier(), datamodule=coreset, steps_per_trial=1, max_trials=2
    )
    assert found == data.batch_size == coreset.batch_size == coreset.train_dataloader().batch_size
    assert len(set(tried)) > 1


def find(trainer: L.Trainer, model: L.LightningModule, data: Resizable) -> None:
    Tuner(trainer).lr_find(model, datamodule=data, num_training=40)


TUNERS = {
    "scale_batch_size": (scale, list),
    "lr_find": (find, list),
    "BatchSizeFinder": (None, lambda: [BatchSizeFinder(steps_per_trial=1, max_trials=2)]),
    "LearningRateFinder": (None, lambda: [LearningRateFinder(num_training_steps=40)]),
}


@pytest.mark.parametrize("first", [True, False], ids=["CLDCallback first", "CLDCallback last"])
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.filterwarnings("ignore")
def test_tuners(tmp_path, tuner, first):
    search, callbacks = TUNERS[tuner]

    def run(*watching: Callback) -> tuple[L.LightningModule, Resizable]:
        L.seed_everything(7, verbose=False)
        both = [*watching, *callbacks()] if first else [*callbacks(), *watching]
        trainer = quiet_trainer(tmp_path, *both)
        model, data = Classifier(), Resizable()
        if search is not None:
            search(trainer, model, data)
        trainer.fit(model, datamodule=data)
        return model, data

    plain, plain_data = run()
    cld = CLDCallback()
    model, data = run(cld)
    assert (model.lr, data.batch_size) == (plain.lr, plain_data.batch_size)
    assert (model.lr, data.batch_size) != (0.1, 5), "nothing was tuned"
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4]
    # The tuner's training is undone before theta_0 is logged.
    L.seed_everything(7, verbose=False)
    torch.testing.assert_close(cld.trajectories.train_losses[0], plain_losses(Classifier(), data.train_set))


class FindsAgain(LearningRateFinder):
    """Finds a learning rate before the third epoch, as Lightning's guide shows, which restores a checkpoint there."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 2:
            self.lr_find(trainer, pl_module)


class NotesFiles(Callback):
    """Notes, when training ends, which checkpoints a kill would not lose."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found = sorted(path.stem for path in self.folder.glob("cld-rows-*/after-*.npz"))


@pytest.mark.filterwarnings("ignore")
def test_a_tuner_in_mid_fit_loses_no_checkpoint_to_a_kill(tmp_path):
    cld, notes = CLDCallback(dirpath=tmp_path / "runs"), NotesFiles(tmp_path / "runs")
    quiet_trainer(tmp_path, FindsAgain(num_training_steps=40), cld, notes).fit(Classifier(), datamodule=Resizable())
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4]
    assert notes.found == [f"after-{epoch:06}" for epoch in range(4)]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["cld-scores.npz", "cld-trajectories.npz"]


# timm models


class Timm(L.LightningModule):
    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.net = timm.create_model(name, pretrained=False, num_classes=CLASSES, in_chans=1, **options)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def pictures() -> TensorDataset:
    """Images of 32 by 32 pixels with a brighter stripe, whose place shows the class."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(48) % CLASSES
    images = torch.randn(48, 1, 32, 32, generator=generator)
    for image, target in zip(images, targets, strict=True):
        image[0, 10 * target : 10 * target + 10] += 1
    return TensorDataset(images, targets)


@pytest.mark.filterwarnings("ignore")
def test_a_proxy_and_a_target_of_timm(tmp_path):
    L.seed_everything(7, verbose=False)
    data, cld = Blobs(pictures()), CLDCallback(dirpath=tmp_path)
    proxy = Timm("resnet10t")
    quiet_trainer(tmp_path, cld, max_epochs=3).fit(proxy, datamodule=data)
    # The last row equals the losses of the final module, with BatchNorm and dropout in evaluation mode.
    torch.testing.assert_close(
        cld.trajectories.train_losses[-1], plain_losses(proxy, data.train_set), rtol=1e-4, atol=1e-5
    )
    coreset = CoresetDataModule(data, cld.scores, fraction=0.5)
    target = Timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=2)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(target, datamodule=coreset)
    assert trainer.global_step == 2  # batches of 16, for a coreset of 18 out of 36


# The package pytorch_lightning


class OldClassifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier().net

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class OldBlobs(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        inner = Blobs()
        self.train_set, self.val_set = inner.train_set, inner.val_set
        self.train_dataloader, self.val_dataloader = inner.train_dataloader, inner.val_dataloader


def old_trainer(root: Any, *callbacks: Callback, max_epochs: int = 4) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=root,
        callbacks=list(callbacks),
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.filterwarnings("ignore")
def test_the_package_pytorch_lightning(tmp_path):
    def run(*callbacks: Callback) -> OldClassifier:
        L.seed_everything(7, verbose=False)
        model = OldClassifier()
        old_trainer(tmp_path, *callbacks).fit(model, datamodule=OldBlobs())
        return model

    cld = CLDCallback(dirpath=tmp_path)
    watched, plain, data = run(cld), run(), OldBlobs()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    torch.testing.assert_close(cld.trajectories.train_losses[-1], plain_losses(plain, data.train_set))
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4]
    losses = (cld.trajectories.train_losses, cld.trajectories.val_losses)
    assert_scores(cld.scores.values, cld_oracle(*losses, labels(data.train_set), labels(data.val_set)))
    assert torch.equal(CLDScores.load(tmp_path / "cld-scores.npz").values, cld.scores.values)

    # Its Trainer refuses datamodules of lightning.pytorch, and CoresetDataModule is one.
    with pytest.raises(TypeError, match=r"of lightning\.pytorch, got OldBlobs"):
        CoresetDataModule(data, cld.scores, fraction=0.5)
    trainer = old_trainer(tmp_path, max_epochs=1)
    trainer.fit(OldClassifier(), DataLoader(Subset(data.train_set, cld.scores.select(fraction=0.5)), 15))
    assert trainer.global_step == 3  # batches of 15, for a coreset of 45 out of 90


@pytest.mark.filterwarnings("ignore")
def test_the_package_pytorch_lightning_resumes(tmp_path):
    L.seed_everything(7, verbose=False)
    first = CLDCallback(dirpath=tmp_path / "first")
    trainer = old_trainer(tmp_path, first, max_epochs=3)
    trainer.fit(OldClassifier(), datamodule=OldBlobs())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = CLDCallback(dirpath=tmp_path / "second")
    old_trainer(tmp_path, second, max_epochs=5).fit(
        OldClassifier(), datamodule=OldBlobs(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert second.trajectories.epochs == [0, 1, 2, 3, 4, 5]
    assert torch.equal(second.trajectories.train_losses[:4], first.trajectories.train_losses)


# Custom training loops


def own_net() -> nn.Module:
    """A network without dropout: custom loops draw random numbers differently from Lightning's."""
    L.seed_everything(7, verbose=False)
    net = Classifier().net
    net[3] = nn.Identity()
    return net


def loop(net: nn.Module, step: Callable[[Tensor], None], log: Callable[[], None], data: Blobs) -> None:
    """Trains for four epochs as Lightning would; calls `log` before training and after each epoch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    log()
    for _ in range(4):
        net.train()
        for inputs, targets in data.train_dataloader():
            optimizer.zero_grad()
            step(F.cross_entropy(net(inputs), targets))
            optimizer.step()
        log()


def row(net: nn.Module, part: Any) -> Tensor:
    net.eval()
    inputs, targets = next(iter(DataLoader(part, len(part))))
    with torch.no_grad():
        return F.cross_entropy(net(inputs), targets, reduction="none")


@pytest.mark.filterwarnings("ignore")
def test_own_loops_give_what_the_callback_logs(tmp_path):
    data, cld, model = Blobs(shuffle=False), CLDCallback(), Classifier()
    model.net = own_net()
    quiet_trainer(tmp_path, cld, limit_val_batches=0).fit(model, datamodule=data)

    net, rows = own_net(), []
    loop(
        net, lambda loss: loss.backward(), lambda: rows.append((row(net, data.train_set), row(net, data.val_set))), data
    )
    train_losses, val_losses = map(torch.stack, zip(*rows, strict=True))
    plain = LossTrajectories(train_losses, val_losses, labels(data.train_set), labels(data.val_set))
    torch.testing.assert_close(plain.train_losses, cld.trajectories.train_losses)
    torch.testing.assert_close(plain.val_losses, cld.trajectories.val_losses)
    torch.testing.assert_close(plain.score().values, cld.scores.values, rtol=0, atol=1e-4)
    budget = {"fraction": 0.3}
    assert plain.score().select(**budget).tolist() == cld.scores.select(**budget).tolist()

    fabric = Fabric(accelerator="cpu", devices=1)
    own = fabric.setup_module(own_net())
    metric = CLDMetric(labels(data.train_set), labels(data.val_set))
    loop(own, fabric.backward, lambda: metric.update(row(own, data.train_set), row(own, data.val_set)), data)
    torch.testing.assert_close(metric.compute(), cld.scores.values, rtol=0, atol=1e-4)
