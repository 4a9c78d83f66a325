"""MONAI: segmentation of generated volumes with `CacheDataset`, dictionary transforms and `DiceLoss`.

    python examples/projects/with_monai.py

What is special:

- Batches are dictionaries and targets are masks: `cld_step` on your LightningModule returns a loss for each volume, and
  None for the classes. If volumes have a class, such as the hospital, return that instead.
- Give the view without augmentation, `cld_train_dataloader()`: the same files under the validation transforms.
- Load train samples in worker processes. MONAI's random transforms own their generators, and with `num_workers=0`
  the callback's looks at the train set would move those: training would see other augmentations than without it.
- Transforms that make several samples of one, as `RandCropByPosNegLabeld(num_samples=4)`, are augmentation too: the
  view has each volume once, whole or cropped in the middle, and the coreset is of volumes.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import torch
from _checks import Checks, Served, quiet_trainer, run
from monai.data import CacheDataset, DataLoader, decollate_batch
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandFlipd, RandGaussianNoised, ScaleIntensityd
from torch import Tensor

from lightning_cld import CLDCallback, CoresetDataModule

KEYS = ("image", "mask")
SIZE = 16


def make_volumes(root: Path) -> None:
    """Generates bright boxes in noise, and their masks."""
    draw = np.random.default_rng(0)
    for number in range(52):
        mask = np.zeros((SIZE, SIZE, SIZE), dtype=np.float32)
        low = draw.integers(1, SIZE - 8, 3)
        mask[tuple(slice(start, start + int(draw.integers(3, 8))) for start in low)] = 1
        np.save(root / f"mask{number:02}.npy", mask)
        np.save(root / f"image{number:02}.npy", mask + draw.normal(0, 0.5, mask.shape).astype(np.float32))


class Volumes(L.LightningDataModule):
    """40 volumes to train on and 12 for the reference."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        files = [{key: str(root / f"{key}{number:02}.npy") for key in KEYS} for number in range(52)]
        self.train_files, self.val_files = files[:40], files[40:]
        self.plain = Compose([LoadImaged(KEYS), EnsureChannelFirstd(KEYS), ScaleIntensityd("image")])
        noise = RandGaussianNoised("image", prob=0.5)
        self.augment = Compose([*self.plain.transforms, RandFlipd(KEYS, prob=0.5, spatial_axis=0), noise])

    def setup(self, stage: str) -> None:
        self.train = CacheDataset(self.train_files, self.augment, progress=False)
        self.plain_train = CacheDataset(self.train_files, self.plain, progress=False)
        self.val = CacheDataset(self.val_files, self.plain, progress=False)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=4)

    def cld_train_dataloader(self) -> DataLoader:  # found by the callback
        return DataLoader(self.plain_train, batch_size=4)


class Segmentation(L.LightningModule):
    """A small U-Net, trained by Dice loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet(spatial_dims=3, in_channels=1, out_channels=1, channels=(4, 8), strides=(2,))
        self.loss = DiceLoss(sigmoid=True, reduction="none")

    def cld_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        """What CLD logs: a loss for each volume, whatever the number of channels; all are of one class."""
        return self.loss(self.net(batch["image"]), batch["mask"]).flatten(1).mean(1), None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.cld_step(batch)[0].mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.cld_step(batch)[0].mean(), batch_size=len(batch["mask"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(checks: Checks, root: Path) -> None:
    make_volumes(root)

    data, proxy = Volumes(root), Segmentation()
    cld = CLDCallback(dirpath=root)
    quiet_trainer(4, cld).fit(proxy, datamodule=data)

    def by_hand(split: str, position: int) -> Tensor:
        number = position if split == "train" else 40 + position
        image, mask = (torch.from_numpy(np.load(root / f"{key}{number:02}.npy"))[None, None] for key in KEYS)
        image = (image - image.min()) / (image.max() - image.min())
        foreground = torch.sigmoid(proxy.net(image))
        return 1 - (2 * (foreground * mask).sum() + 1e-5) / (foreground.sum() + mask.sum() + 1e-5)

    checks.losses(cld.trajectories, proxy, by_hand)

    coreset = CoresetDataModule(Volumes(root), root / "cld-scores.npz", fraction=0.25)
    served = Served(lambda batch: [sample["image"].meta["filename_or_obj"] for sample in decollate_batch(batch)])
    quiet_trainer(1, served).fit(Segmentation(), datamodule=coreset)
    checks.served(served.seen, [data.train_files[position]["image"] for position in coreset.indices], of=40)


if __name__ == "__main__":
    run(main)
