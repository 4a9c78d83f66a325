"""timm: a model of `create_model` on an `ImageDataset`, by loaders of `create_loader`, with and without prefetching.

    python examples/projects/with_timm.py

What is special:

- Batches are `(images, targets)` and models return logits: CLD needs to be told nothing of the loss.
- `create_loader` writes its transforms into the dataset. Make an `ImageDataset` for each loader, or the view without
  augmentation takes the augmentation from training as well.
- Timm's `PrefetchLoader` (`use_prefetcher=True`, the default) is no DataLoader of torch, and normalises as it goes.
  Give the callback views without it, `cld_train_dataloader()` and `cld_val_dataloader()`. For the coreset make the
  train loader without it too; `PrefetchLoader` normalises images that are not normalised yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import timm
import torch
from _checks import Checks, Served, quiet_trainer, run
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageDataset, create_loader
from torch import Tensor
from torch.nn import functional as F

from lightning_cld import CLDCallback, CoresetDataModule

SIZE = 32
MEAN, STD = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))


def make_images(root: Path) -> None:
    """Generates noise, dark (class 0) and bright (class 1); all of an image's blue is its number."""
    draw = np.random.default_rng(0)
    for number in range(80):
        image = draw.integers(0, 190 + 10 * (number % 2), (SIZE, SIZE, 3), dtype=np.uint8)
        image[..., 2] = number
        folder = root / ("train" if number < 60 else "val") / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:02}.png")


class Images(L.LightningDataModule):
    """60 images to train on and 20 for the reference, with or without timm's prefetching."""

    def __init__(self, root: Path, prefetch: bool = False) -> None:
        super().__init__()
        self.root, self.prefetch = root, prefetch

    def loader(self, split: str, training: bool, prefetch: bool) -> Any:
        return create_loader(
            ImageDataset(str(self.root / split)),
            input_size=(3, SIZE, SIZE),
            batch_size=10,
            is_training=training,
            color_jitter=0.0,  # keeps the number in an image's blue
            crop_pct=1.0,
            num_workers=0,
            use_prefetcher=prefetch,
            device=torch.device("cpu"),
        )

    def train_dataloader(self) -> Any:
        return self.loader("train", training=True, prefetch=self.prefetch)

    def val_dataloader(self) -> Any:
        return self.loader("val", training=False, prefetch=self.prefetch)

    def cld_train_dataloader(self) -> Any:  # both are found by the callback
        return self.loader("train", training=False, prefetch=False)

    def cld_val_dataloader(self) -> Any:
        return self.loader("val", training=False, prefetch=False)


class Classifier(L.LightningModule):
    """A model of timm, trained as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("resnet10t", pretrained=False, num_classes=2)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def check_proxy(checks: Checks, root: Path, *, prefetch: bool) -> None:
    """Trains a proxy and compares its losses with the same model on the images as they are in their files."""
    print(f"trained with{'' if prefetch else 'out'} PrefetchLoader:")
    proxy, cld = Classifier(), CLDCallback(dirpath=root)
    quiet_trainer(4, cld).fit(proxy, datamodule=Images(root, prefetch))

    def by_hand(split: str, position: int) -> Tensor:
        path = ImageDataset(str(root / split)).filename(position, absolute=True)
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
        return F.cross_entropy(proxy(((image - MEAN) / STD)[None]), torch.tensor([int(Path(path).stem) % 2]))

    checks.losses(cld.trajectories, proxy, by_hand)


def main(checks: Checks, root: Path) -> None:
    make_images(root)

    check_proxy(checks, root, prefetch=True)
    check_proxy(checks, root, prefetch=False)

    coreset = CoresetDataModule(Images(root), root / "cld-scores.npz", fraction=1 / 3)
    served = Served(lambda batch: ((batch[0] * STD + MEAN)[:, 2, 0, 0] * 255).round().int().tolist())
    quiet_trainer(1, served).fit(Classifier(), datamodule=coreset)
    numbers = [int(Path(path).stem) for path in ImageDataset(str(root / "train")).filenames()]
    checks.served(served.seen, [numbers[position] for position in coreset.indices], of=60)


if __name__ == "__main__":
    run(main)
