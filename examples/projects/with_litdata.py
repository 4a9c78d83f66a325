"""litdata: chunks made on this machine, read by StreamingDataLoader.

    python examples/projects/with_litdata.py

What is special:

- Each sample holds its place in the chunks, `index`. `cld_step` returns the indices of a batch as its third value, and
  `CLDCallback(num_samples=...)` says how many there are.
- Workers and shuffling change the order. Each loss goes where its index says.
- litdata can read any sample by its index. So the coreset is served like one of a map-style set: only chunks that hold
  some of it are read, and `epoch_length`, `redraw` and several processes work as they do there.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import litdata
import numpy as np
import torch
from _checks import Checks, Served, quiet_trainer, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_cld import CLDCallback, CoresetDataModule

SIZES = {"train": 120, "val": 40}


def make_sample(split: str, index: int) -> dict[str, Any]:
    """A point near the centre of its class; the samples are sorted by class."""
    label = 3 * index // SIZES[split]
    draw = np.random.default_rng([index, len(split)])
    return {"index": index, "point": (draw.normal(size=4) + np.eye(3, 4)[label]).astype(np.float32), "label": label}


def write_chunks(root: Path) -> None:
    for split, size in SIZES.items():
        make = functools.partial(make_sample, split)
        litdata.optimize(make, list(range(size)), str(root / split), chunk_size=16, num_workers=1, verbose=False)


class Points(L.LightningDataModule):
    """The chunks of both splits."""

    def __init__(self, root: Path, workers: int = 0, shuffle: bool = True) -> None:
        super().__init__()
        self.root, self.workers, self.shuffle = root, workers, shuffle

    def make_loader(self, split: str, shuffle: bool) -> litdata.StreamingDataLoader:
        chunks = litdata.StreamingDataset(str(self.root / split), shuffle=shuffle)
        return litdata.StreamingDataLoader(chunks, batch_size=16, num_workers=self.workers)

    def train_dataloader(self) -> litdata.StreamingDataLoader:
        return self.make_loader("train", self.shuffle)

    def val_dataloader(self) -> litdata.StreamingDataLoader:
        return self.make_loader("val", shuffle=False)


class InMemory(Dataset):
    """The same samples as a map-style dataset."""

    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return make_sample(self.split, index)


class Classifier(L.LightningModule):
    """A small network whose step says which samples a batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def cld_step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What CLD logs: a loss for each sample, its class, and its position."""
        losses = F.cross_entropy(self.network(batch["point"]), batch["label"], reduction="none")
        return losses, batch["label"], batch["index"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch["point"]), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch["label"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def main(checks: Checks, root: Path) -> None:
    # In a process of its own, since workers that are forked beside litdata's threads may wait for each other for ever.
    subprocess.run([sys.executable, __file__, str(root)], check=True)
    count = SIZES["train"]

    several = CLDCallback(dirpath=root / "workers", num_samples=count)
    quiet_trainer(3, several).fit(Classifier(), datamodule=Points(root, workers=2))
    labels = [make_sample("train", index)["label"] for index in range(count)]
    checks.check(
        several.scores.classes.tolist() == labels,
        "two workers read the chunks shuffled, and each index has its own class",
    )

    coreset = CoresetDataModule(Points(root, workers=2), root / "workers" / "cld-scores.npz", fraction=0.25)
    served = Served(lambda batch: batch["index"].tolist())
    trainer = quiet_trainer(1, served)
    trainer.fit(Classifier(), datamodule=coreset)
    checks.served(served.seen, coreset.indices, of=count)
    checks.check(trainer.num_training_batches == 2, "the Trainer knew the number of batches beforehand")

    cld = CLDCallback(dirpath=root, num_samples=count)
    same = CLDCallback(
        dirpath=root,
        filename="map-style",
        train_dataloader=DataLoader(InMemory("train"), 16),
        val_dataloader=DataLoader(InMemory("val"), 16),
    )
    quiet_trainer(4, cld, same).fit(Classifier(), datamodule=Points(root, shuffle=False))
    checks.check(
        torch.equal(cld.scores.values, same.scores.values),
        f"the {len(cld.scores)} scores are bit for bit those of the same samples as a map-style set",
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_chunks(Path(sys.argv[1]))
    else:
        run(main)
