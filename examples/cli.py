"""A proxy, its scores and the target on the coreset, each configured by a YAML file, through LightningCLI.

    pip install -e ".[examples,cli]"
    python examples/cli.py fit --config examples/configs/proxy.yaml
    python examples/cli.py fit --config examples/configs/coreset.yaml

The scores are saved under `runs/cli`. Nothing below knows about CLD: callback and datamodule come from the files.
"""

from __future__ import annotations

import lightning as L
import torch
from _common import Images, Splits, flip_labels, load
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cld import proportional_holdout


class Digits(Splits):
    """scikit-learn's handwritten digits, which need no download.

    Args:
        batch_size: Samples in a train batch.
        wrong: Share of the train labels that are replaced by another class.
        seed: Seed of the split, and of what is wrong.
    """

    def __init__(self, batch_size: int = 32, wrong: float = 0.0, seed: int = 0) -> None:
        pool, test = load("digits", None)
        train, val = proportional_holdout(pool.targets, 0.15, seed=seed)
        noisy = Images(pool.images[train], flip_labels(pool.targets[train], wrong, seed))
        super().__init__(noisy, Images(pool.images[val], pool.targets[val]), test, batch_size)


class Network(L.LightningModule):
    """A network of one hidden layer.

    Args:
        hidden: Its width.
        lr: Learning rate of SGD.
    """

    def __init__(self, hidden: int = 128, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images / 16)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        return F.cross_entropy(self(images), targets)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, targets = batch
        accuracy = (self(images).argmax(dim=1) == targets).float().mean()
        self.log("val_accuracy", accuracy, batch_size=len(targets), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


if __name__ == "__main__":
    LightningCLI(Network)
