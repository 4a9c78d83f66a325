"""datasets with `streaming=True`: a Hugging Face `IterableDataset`, whose rows have ids.

    python examples/projects/with_streaming.py

What is special:

- `cld_step` returns the ids of a batch as its third value, and the scores hold them as names.
- The coreset is served by `CoresetDataModule(..., identify=lambda row: row["id"])`. It reads the stream and passes on
  the rows that were chosen, in the workers, before batches are made. An epoch has a known length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from _checks import Checks, Served, quiet_trainer, run
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule

TRAIN, VAL, SHARDS = 120, 40, 4


def make_rows(split: str, count: int) -> Dataset:
    """Points near the centres of three classes, sorted by class, as a map-style dataset."""
    draw = np.random.default_rng(len(split))
    labels = 3 * np.arange(count) // count
    points = (draw.normal(size=(count, 4)) + np.eye(3, 4)[labels]).astype(np.float32)
    ids = [f"{split}-{place:04d}" for place in range(count)]
    return Dataset.from_dict({"id": ids, "point": points.tolist(), "label": labels.tolist()}).with_format("torch")


def id_of(row: dict[str, Any]) -> str:
    return row["id"]


class Rows(L.LightningDataModule):
    """The streams of both splits."""

    def __init__(self, workers: int = 0, shuffle: bool = True) -> None:
        super().__init__()
        self.workers, self.shuffle = workers, shuffle

    def make_stream(self, split: str, count: int) -> IterableDataset:
        # Yours would come from load_dataset(..., streaming=True).
        return make_rows(split, count).to_iterable_dataset(num_shards=SHARDS)

    def train_dataloader(self) -> DataLoader:
        stream = self.make_stream("train", TRAIN)
        if self.shuffle:
            stream = stream.shuffle(seed=0, buffer_size=50)
        return DataLoader(stream, 16, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.make_stream("val", VAL), 16, num_workers=self.workers)


class Classifier(L.LightningModule):
    """A small network whose step says which samples a batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def cld_step(self, batch: Any) -> tuple[Tensor, Tensor, list[str]]:
        """What CLD logs: a loss for each sample, its class, and its name."""
        losses = F.cross_entropy(self.network(batch["point"]), batch["label"], reduction="none")
        return losses, batch["label"], batch["id"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch["point"]), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch["label"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def main(checks: Checks, root: Path) -> None:
    rows = make_rows("train", TRAIN)

    cld = CLDCallback(dirpath=root)
    same = CLDCallback(
        dirpath=root,
        filename="map-style",
        train_dataloader=DataLoader(rows, 16),
        val_dataloader=DataLoader(make_rows("val", VAL), 16),
    )
    quiet_trainer(4, cld, same).fit(Classifier(), datamodule=Rows(shuffle=False))
    checks.check(list(cld.scores.names) == list(rows["id"]), f"the scores hold the {TRAIN} ids")
    checks.check(
        torch.equal(cld.scores.values, same.scores.values),
        "the scores are bit for bit those of the same rows as a map-style set",
    )

    several = CLDCallback(dirpath=root / "workers")
    quiet_trainer(3, several).fit(Classifier(), datamodule=Rows(workers=2))
    labels = dict(zip(rows["id"], map(int, rows["label"]), strict=True))
    checks.check(
        [labels[name] for name in several.scores.names] == several.scores.classes.tolist(),
        "two workers read the shards shuffled, and each id has its own class",
    )

    scores = CLDScores.load(root / "cld-scores.npz")
    coreset = CoresetDataModule(Rows(workers=2), scores, fraction=0.25, identify=id_of)
    served = Served(lambda batch: batch["id"])
    trainer = quiet_trainer(1, served)
    trainer.fit(Classifier(), datamodule=coreset)
    checks.served(served.seen, scores.names[coreset.indices], of=TRAIN)
    checks.check(trainer.num_training_batches == 2, "the Trainer knew the number of batches beforehand")


if __name__ == "__main__":
    run(main)
