"""Small modules and data for the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_cld import CLDCallback, proportional_holdout

CLASSES = 3


def blobs(samples: int = 120, seed: int = 0) -> TensorDataset:
    """Three classes of points in four dimensions, in random order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    centres = torch.randn(CLASSES, 4, generator=generator) * 2
    return TensorDataset(centres[labels] + torch.randn(samples, 4, generator=generator), labels)


class Classifier(L.LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Blobs(L.LightningDataModule):
    """Train and validation splits of `blobs`."""

    num_classes = CLASSES

    def __init__(self, pool: Dataset[Any] | None = None, **loader: Any) -> None:
        super().__init__()
        pool = blobs() if pool is None else pool
        labels = blobs().tensors[1] if not isinstance(pool, TensorDataset) else pool.tensors[1]
        train, val = proportional_holdout(labels, 0.25)
        self.train_set = Subset(pool, train.tolist())
        self.val_set = Subset(pool, val.tolist())
        self.loader = {"batch_size": 16, "shuffle": True, **loader}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_set, **self.loader)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, batch_size=16)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, batch_size=16)


def quiet_trainer(root: Path, *callbacks: L.Callback, **arguments: Any) -> L.Trainer:
    """A Trainer that writes only below `root` and prints nothing."""
    defaults: dict[str, Any] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(default_root_dir=root, callbacks=list(callbacks), **{**defaults, **arguments})


def fit(
    root: Path,
    cld: CLDCallback | None,
    module: L.LightningModule | Callable[[], L.LightningModule] = Classifier,
    datamodule: L.LightningDataModule | None = None,
    ckpt_path: str | Path | None = None,
    **arguments: Any,
) -> tuple[L.Trainer, L.LightningModule]:
    """Seeds, trains a `Classifier` on `Blobs` unless others are given, and returns the Trainer and the module."""
    L.seed_everything(7, verbose=False)
    callbacks = arguments.pop("callbacks", [])
    module = module if isinstance(module, L.LightningModule) else module()
    trainer = quiet_trainer(root, *([] if cld is None else [cld]), *callbacks, **arguments)
    trainer.fit(module, datamodule=Blobs() if datamodule is None else datamodule, ckpt_path=ckpt_path)
    return trainer, module


def plain_losses(module: L.LightningModule, dataset: Dataset[Any]) -> Tensor:
    """An oracle for a sweep's row: cross-entropy in evaluation mode, one sample at a time."""
    was_training = module.training
    module.eval()
    with torch.no_grad():
        losses = [
            F.cross_entropy(module.net(inputs[None]), target[None]).item()
            for inputs, target in (dataset[i] for i in range(len(dataset)))
        ]
    module.train(was_training)
    return torch.tensor(losses)
