"""Images in folders, read and augmented by worker processes; CLD sees them without augmentation. No download.

    pip install -e ".[examples]"
    python examples/image_folder.py

A thousand of scikit-learn's handwritten digits are written as image files, to `runs/image_folder/train/<class>/` and
`runs/image_folder/test/<class>/`, the layout that torchvision's `ImageFolder` reads. The datamodule offers the train
set twice, the same samples at the same positions: with random transforms to train on, without them for `CLDCallback`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning as L
import torch
from _common import quiet, quiet_trainer
from _small import arguments, print_table
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_cld import CLDCallback, CoresetDataModule, baselines, proportional_holdout

ROOT = Path("runs/image_folder")


def write_images() -> None:
    """Writes the digits as small PNG files, every fourth to the test set."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:1000], digits.target[:1000], strict=True)):
        folder = ROOT / ("test" if number % 4 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).resize((16, 16)).save(folder / f"{number:04}.png")


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

    def __init__(self, seed: int) -> None:
        super().__init__()
        L.seed_everything(seed, verbose=False)  # of the weights, and of the order of batches that follows
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
    args = arguments(argv, epochs=6, seeds=2)
    quiet(single_thread=True)
    write_images()
    rows = []
    for seed in range(args.seeds):
        data = Folders(seed)
        cld = CLDCallback(dirpath="runs/image_folder")
        quiet_trainer(args.epochs, cld).fit(Network(seed), datamodule=data)

        # With epoch_length="full" every training takes as many steps, so that what differs is the data.
        at_random = cld.trajectories.score(by=partial(baselines.random_values, seed=seed))
        budget = {"fraction": args.fraction, "epoch_length": "full"}
        for name, chosen in {
            "everything": data,
            "random per class": CoresetDataModule(data, at_random, **budget),
            "CLD, top": CoresetDataModule(data, cld.scores, **budget),
            "CLD, drawn": CoresetDataModule(data, cld.scores, **budget, rule="draw", seed=seed),
        }.items():
            target, trainer = Network(100 + seed), quiet_trainer(args.epochs)
            trainer.fit(target, datamodule=chosen)
            (measured,) = trainer.test(target, datamodule=chosen, verbose=False)
            kept = len(chosen.indices) if chosen is not data else len(data.train)
            rows.append((name, kept, 100 * measured["accuracy"]))
    print_table("test accuracy (%)", rows)


if __name__ == "__main__":
    main()
