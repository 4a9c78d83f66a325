"""TorchIO: a `SubjectsDataset` of generated volumes, read by a `SubjectsLoader`.

    python examples/projects/with_torchio.py

What is special:

- Batches are dictionaries of dictionaries: `cld_step` on your LightningModule says what the loss and the classes are.
- Give the view without augmentation, `cld_train_dataloader()`: the same subjects, without the random transforms.
- A `Queue` of patches ignores the index that it is asked for, so it has no positions to score. Train the proxy on whole
  subjects, and the target on a queue of the chosen ones: `[subjects[i] for i in scores.select(...)]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchio as tio
from _checks import Checks, Served, quiet_trainer, run
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cld import CLDCallback, CoresetDataModule

Batch = dict[str, Any]


def make_subjects(root: Path) -> None:
    """Generates volumes of smooth (class 0) and of coarse noise (class 1), half of each."""
    for number in range(52):
        volume = torch.randn(1, 12, 12, 12)
        if number % 2 == 0:
            volume = nn.functional.avg_pool3d(volume, 3, stride=1, padding=1)
        tio.ScalarImage(tensor=volume).save(root / f"case{number:02}.nii")


class Subjects(L.LightningDataModule):
    """40 subjects to train on and 12 for the reference."""

    plain = tio.ZNormalization()
    augment = tio.Compose([plain, tio.RandomFlip(axes=(0, 1, 2)), tio.RandomNoise(std=0.1)])

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.subjects = [
            tio.Subject(mri=tio.ScalarImage(path), label=number % 2, name=path.stem)
            for number, path in enumerate(sorted(root.glob("case*.nii")))
        ]

    def setup(self, stage: str) -> None:
        self.train = tio.SubjectsDataset(self.subjects[:40], transform=self.augment)
        self.plain_train = tio.SubjectsDataset(self.subjects[:40], transform=self.plain)
        self.val = tio.SubjectsDataset(self.subjects[40:], transform=self.plain)

    def train_dataloader(self) -> tio.SubjectsLoader:
        return tio.SubjectsLoader(self.train, batch_size=8, shuffle=True)

    def val_dataloader(self) -> tio.SubjectsLoader:
        return tio.SubjectsLoader(self.val, batch_size=8)

    def cld_train_dataloader(self) -> tio.SubjectsLoader:  # found by the callback
        return tio.SubjectsLoader(self.plain_train, batch_size=8)


class VolumeClassifier(L.LightningModule):
    """One convolution and its mean over the volume."""

    def __init__(self) -> None:
        super().__init__()
        pool, head = nn.AdaptiveAvgPool3d(1), nn.Linear(8, 2)
        self.net = nn.Sequential(nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), pool, nn.Flatten(), head)

    def cld_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What CLD logs: a loss for each subject, and its class."""
        return F.cross_entropy(self.net(batch["mri"][tio.DATA]), batch["label"], reduction="none"), batch["label"]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.cld_step(batch)[0].mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.cld_step(batch)[0].mean(), batch_size=len(batch["label"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(checks: Checks, root: Path) -> None:
    make_subjects(root)

    data, proxy = Subjects(root), VolumeClassifier()
    cld = CLDCallback(dirpath=root)
    quiet_trainer(4, cld).fit(proxy, datamodule=data)

    def by_hand(split: str, position: int) -> Tensor:
        number = position if split == "train" else 40 + position
        volume = data.subjects[number]["mri"].data.float()
        logits = proxy.net(((volume - volume.mean()) / volume.std())[None])
        return F.cross_entropy(logits, torch.tensor([number % 2]))

    checks.losses(cld.trajectories, proxy, by_hand)

    coreset = CoresetDataModule(Subjects(root), root / "cld-scores.npz", fraction=0.25)
    served = Served(lambda batch: batch["name"])
    quiet_trainer(1, served).fit(VolumeClassifier(), datamodule=coreset)
    checks.served(served.seen, [f"case{position:02}" for position in coreset.indices], of=40)


if __name__ == "__main__":
    run(main)
