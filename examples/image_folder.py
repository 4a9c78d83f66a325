"""Images in folders, read and augmented by worker processes; CLD sees them without augmentation. No download.

    pip install -e ".[examples]"
    python examples/image_folder.py

A thousand of scikit-learn's handwritten digits are written as image files, to `runs/image_folder/train/<class>/` and
`runs/image_folder/test/<class>/`, the layout that torchvision's `ImageFolder` reads. The datamodule offers the train
set twice, the same samples at the same positions: with random transforms to train on, without them for `CLDCallback`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from _common import QUIET
from _small import print_table, random_coreset, set_up, train_and_test, write_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_cld import CLDCallback, CoresetDataModule, proportional_holdout

ROOT = Path("runs/image_folder")


class Folders(L.LightningDataModule):
    """Images under `ROOT/train/<class>/` and `ROOT/test/<class>/`; of the former 15 % are held out to validate on."""

    plain = v2.Compose([v2.Grayscale(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    augment = v2.Compose([v2.RandomAffine(degrees=15, translate=(0.1, 0.1)), plain])

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def setup(self, stage: str) -> None:
        pool = ImageFolder(ROOT / "train", self.augment)
        plain_pool = ImageFolder(ROOT / "train", self.plain)
        train, val = proportional_holdout(pool.targets, 0.15, seed=self.seed)
        self.train = Subset(pool, train.tolist())
        self.plain_train = Subset(plain_pool, train.tolist())
        self.val = Subset(plain_pool, val.tolist())
        self.test = ImageFolder(ROOT / "test", self.plain)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 32, shuffle=True, num_workers=2, persistent_workers=True)

    def cld_train_dataloader(self) -> DataLoader:  # found by the callback
        return DataLoader(self.plain_train, 256, num_workers=2)

    def val_dataloader(self) -> DataLoader:  # the reference of CLD: held out of the train set, never the test set
        return DataLoader(self.val, 256, num_workers=2)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 256, num_workers=2)


class Network(L.LightningModule):
    """An ordinary classifier: there is nothing about CLD in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        return F.cross_entropy(self(images), targets)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, targets = batch
        self.log("accuracy", (self(images).argmax(1) == targets).float().mean(), batch_size=len(targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.002)


def main(argv: Sequence[str] | None = None) -> None:
    args, rows = set_up(argv, epochs=6, seeds=2), []
    write_digits(ROOT)
    for seed in range(args.seeds):
        # 1. Train a proxy with the callback, which logs the loss of every sample.
        data = Folders(seed)
        cld = CLDCallback(dirpath="runs/image_folder")
        L.seed_everything(seed, verbose=False)
        L.Trainer(max_epochs=args.epochs, callbacks=[cld], **QUIET).fit(Network(), datamodule=data)

        # 2. Make coresets, one by each rule. A coreset is the same datamodule with its train set narrowed. With
        # epoch_length="full" every training takes the same number of steps, so that only the data differ.
        top = CoresetDataModule(data, cld.scores, fraction=args.fraction, epoch_length="full")
        drawn = CoresetDataModule(data, cld.scores, fraction=args.fraction, epoch_length="full", rule="draw", seed=seed)

        # 3. Train targets on the coresets, on a random one and on everything.
        at_random = random_coreset(data, cld.trajectories, args.fraction, seed)
        choices = {"everything": data, "random per class": at_random, "CLD, top": top, "CLD, drawn": drawn}
        rows += train_and_test(Network, choices, args.epochs, seed)
    print_table("test accuracy", rows, percent=True)


if __name__ == "__main__":
    main()
