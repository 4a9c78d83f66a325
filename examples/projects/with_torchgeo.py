"""torchgeo: a `ClassificationTask` on a `NonGeoDataModule`, here of generated tiles of four bands.

    python examples/projects/with_torchgeo.py

What is special:

- Batches are dictionaries, and the task is torchgeo's own, so `step=` says what its loss and the classes are.
- The datamodule normalises and augments in `on_after_batch_transfer`, by the stage that the Trainer is in. CLD
  evaluates in the validation stage: train samples too are prepared by `val_aug` or `aug`, and never by `train_aug`. So
  no view without augmentation is needed.
- The train loader has `drop_last=True`, over the coreset too: an epoch leaves out what does not fill a batch.
- A `GeoDataModule` draws patches at random places, which have no positions that could be scored. List patches once,
  `patches = list(GridGeoSampler(dataset, size, stride))`, and train on a dataset whose sample `i` is
  `dataset[patches[i]]`, with `stack_samples` for collate function.
- Releases of torchgeo that need Python 3.12 call the task `torchgeo.tasks.Classification`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kornia.augmentation as K
import lightning as L
import numpy as np
import rasterio
import torch
from _checks import Checks, Served, quiet_trainer, run
from torch import Tensor
from torch.nn import functional as F
from torchgeo.datamodules import NonGeoDataModule
from torchgeo.datasets import NonGeoClassificationDataset
from torchgeo.datasets.utils import rasterio_loader
from torchgeo.trainers import ClassificationTask

from lightning_cld import CLDCallback, CoresetDataModule

CLASSES, SIZE = ("field", "forest"), 32


class Tiles(NonGeoClassificationDataset):
    """A folder for each class, as EuroSAT or RESISC45 have it."""

    def __init__(self, root: Path, split: str) -> None:
        super().__init__(root / split, loader=rasterio_loader)


class TilesDataModule(NonGeoDataModule):
    """Normalises all tiles, and flips those that are trained on."""

    mean, std = torch.tensor(0), torch.tensor(255)

    def __init__(self, root: Path) -> None:
        super().__init__(Tiles, batch_size=8, root=root)
        flip = K.RandomHorizontalFlip(p=0.5)
        self.train_aug = K.AugmentationSequential(K.Normalize(self.mean, self.std), flip, data_keys=None, keepdim=True)


def make_tiles(root: Path) -> None:
    """Generates the tiles; the last band of each holds its number, and nothing else."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 10)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(label * count, (label + 1) * count):
                tile = draw.integers(0, 160 + 60 * label, (4, SIZE, SIZE), dtype=np.uint8)
                tile[3] = number
                shape = {"width": SIZE, "height": SIZE, "count": 4, "dtype": "uint8"}
                with rasterio.open(root / split / name / f"{number:03}.tif", "w", driver="GTiff", **shape) as file:
                    file.write(tile)


def make_task() -> ClassificationTask:
    return ClassificationTask(model="resnet10t", in_channels=4, num_classes=len(CLASSES))


def step(task: L.LightningModule, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What CLD logs: a loss for each sample, and its class."""
    return F.cross_entropy(task(batch["image"]), batch["label"], reduction="none"), batch["label"]


def main(checks: Checks, root: Path) -> None:
    make_tiles(root)

    data, proxy = TilesDataModule(root), make_task()
    cld = CLDCallback(step=step, dirpath=root)
    quiet_trainer(4, cld).fit(proxy, datamodule=data)

    def by_hand(split: str, position: int) -> Tensor:
        sample = Tiles(root, split)[position]
        return F.cross_entropy(proxy(sample["image"][None] / 255), sample["label"][None])

    checks.losses(cld.trajectories, proxy, by_hand)

    coreset = CoresetDataModule(TilesDataModule(root), root / "cld-scores.npz", fraction=1 / 3)
    served = Served(lambda batch: (batch["image"][:, 3, 0, 0] * 255).round().int().tolist())
    quiet_trainer(1, served).fit(make_task(), datamodule=coreset)
    numbers = [int(Path(path).stem) for path, _ in data.train_dataset.samples]
    checks.served(served.seen, [numbers[position] for position in coreset.indices], of=len(numbers))


if __name__ == "__main__":
    run(main)
