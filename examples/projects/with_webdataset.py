"""webdataset: images in tar files, known by their keys.

    python examples/projects/with_webdataset.py

What is special:

- Samples of a stream have no positions, but these have a `__key__`. `cld_step` returns the keys of a batch as its third
  value, and the scores hold them as names.
- Shards that are read by several workers come in any order. Each loss goes where its key says.
- The coreset is served by key: `CoresetDataModule` puts a filter right behind the tar files, so that samples which are
  left out are neither decoded nor transformed.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import webdataset as wds
from _checks import Checks, Served, quiet_trainer, run
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule

TRAIN, VAL, SHARDS = 120, 40, 4


def write_shards(root: Path) -> dict[str, list[tuple[str, np.ndarray, int]]]:
    """Small images of three classes, in shards that are sorted by class. Returns the samples in their order."""
    draw = np.random.default_rng(0)
    samples: dict[str, list[tuple[str, np.ndarray, int]]] = {}
    for split, count in (("train", TRAIN), ("val", VAL)):
        samples[split] = []
        for shard in range(SHARDS):
            with wds.TarWriter(str(root / f"{split}-{shard}.tar")) as writer:
                for place in range(count // SHARDS):
                    label = (3 * (shard * count // SHARDS + place)) // count
                    image = draw.integers(0, 128, (8, 8, 3), dtype=np.uint8)
                    image[..., label] += draw.integers(0, 100, dtype=np.uint8)
                    key = f"{split}{shard}-{place:03d}"
                    samples[split].append((key, image, label))
                    png = io.BytesIO()
                    Image.fromarray(image).save(png, "png")
                    writer.write({"__key__": key, "png": png.getvalue(), "cls": str(label).encode()})
    return samples


class Images(L.LightningDataModule):
    """The shards. `decoded` lists the keys that were decoded in this process."""

    def __init__(self, root: Path, workers: int = 0) -> None:
        super().__init__()
        self.root, self.workers = root, workers
        self.decoded: list[str] = []

    def make_loader(self, split: str, shuffle: int) -> DataLoader:
        urls = [str(self.root / f"{split}-{shard}.tar") for shard in range(SHARDS)]
        images = wds.WebDataset(urls, shardshuffle=False).shuffle(shuffle).map(self.note).decode("torchrgb")
        return DataLoader(images.to_tuple("png", "cls", "__key__"), batch_size=16, num_workers=self.workers)

    def note(self, sample: dict[str, Any]) -> dict[str, Any]:
        self.decoded.append(sample["__key__"])
        return sample

    def train_dataloader(self) -> DataLoader:
        return self.make_loader("train", shuffle=100)

    def cld_train_dataloader(self) -> DataLoader:
        return self.make_loader("train", shuffle=0)

    def val_dataloader(self) -> DataLoader:
        return self.make_loader("val", shuffle=0)


class InMemory(Dataset):
    """The same samples as a map-style dataset."""

    def __init__(self, samples: list[tuple[str, np.ndarray, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[Tensor, int, str]:
        key, image, label = self.samples[position]
        return torch.from_numpy(image).permute(2, 0, 1) / 255, label, key


class Classifier(L.LightningModule):
    """A small network whose step says which samples a batch holds."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
        self.network = nn.Sequential(*layers)

    def cld_step(self, batch: Any) -> tuple[Tensor, Tensor, list[str]]:
        """What CLD logs: a loss for each sample, its class, and its name."""
        images, labels, keys = batch
        return F.cross_entropy(self.network(images), labels, reduction="none"), labels, keys

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.network(batch[0]), batch[1]), batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def main(checks: Checks, root: Path) -> None:
    samples = write_shards(root)
    keys = [key for key, _, _ in samples["train"]]

    cld = CLDCallback(dirpath=root)
    same = CLDCallback(
        dirpath=root,
        filename="map-style",
        train_dataloader=DataLoader(InMemory(samples["train"]), 16),
        val_dataloader=DataLoader(InMemory(samples["val"]), 16),
    )
    quiet_trainer(4, cld, same).fit(Classifier(), datamodule=Images(root))
    checks.check(list(cld.scores.names) == keys, f"the scores hold the {TRAIN} keys")
    checks.check(
        torch.equal(cld.scores.values, same.scores.values),
        "the scores are bit for bit those of the same samples as a map-style set",
    )

    several = CLDCallback(dirpath=root / "workers")
    quiet_trainer(3, several).fit(Classifier(), datamodule=Images(root, workers=2))
    labels = {key: label for key, _, label in samples["train"]}
    checks.check(
        [labels[name] for name in several.scores.names] == several.scores.classes.tolist(),
        "two workers read the shards in another order, and each key has its own class",
    )

    scores = CLDScores.load(root / "cld-scores.npz")
    data = Images(root)
    coreset = CoresetDataModule(data, scores, fraction=0.25)
    chosen = scores.names[coreset.indices]
    served = Served(lambda batch: batch[2])
    trainer = quiet_trainer(1, served)
    trainer.fit(Classifier(), datamodule=coreset)
    checks.served(served.seen, chosen, of=TRAIN)
    read = [key for key in data.decoded if key.startswith("train")]
    checks.check(sorted(read) == sorted(chosen), "no other sample of the train shards was decoded")
    checks.check(trainer.num_training_batches == 2, "the Trainer knew the number of batches beforehand")


if __name__ == "__main__":
    run(main)
