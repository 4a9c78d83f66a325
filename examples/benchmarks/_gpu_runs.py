"""What the pieces of `gpu.py` share: sizes, CIFAR's ResNet-18, data on the device or behind workers, and fits."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are scripts, not a package
from _common import QUIET, Classifier, Images, OneByOne, Splits, as_it_is, quiet  # noqa: F401  # for gpu.py
from _networks import make_network

from lightning_cld import proportional_holdout


@dataclass(frozen=True)
class Sizes:
    """How much is run: `REAL` on a GPU, `TINY` to rehearse on a CPU."""

    width: int  # channels of the first layer of the ResNet
    images: int  # of the made-up data for identity and sweeps
    scored: int  # samples whose losses are scored
    checkpoints: int
    classes: int
    kept: int  # samples whose history is kept, for memory
    memory_epochs: int
    rounds: int
    batches: tuple[int, int]  # batches of the two sweeps whose waits are compared


REAL = Sizes(64, 45_000, 1_281_167, 91, 1000, 1_000_000, 12, 5, (20, 80))
TINY = Sizes(2, 60, 3_000, 9, 10, 2_000, 5, 1, (2, 6))

BATCH = 128


class OutOfTimeError(Exception):
    """The time of this call is used up; the next call goes on."""


@dataclass
class Run:
    """One call of `gpu.py run`: where files are, how much is run, and when to stop."""

    work: Path
    sizes: Sizes
    device: torch.device
    workers: int
    epochs: int | None
    training_minutes: float
    precision: str
    ends: float  # time.monotonic()

    def check_time(self, needed: float = 0.0) -> None:
        """Raises if fewer than so many seconds are left."""
        if time.monotonic() + needed > self.ends:
            raise OutOfTimeError

    @property
    def ledger(self) -> Path:
        return self.work / "results.jsonl"

    def rows(self, piece: str) -> list[dict[str, Any]]:
        if not self.ledger.exists():
            return []
        rows = map(json.loads, self.ledger.read_text(encoding="utf-8").splitlines())
        return [row for row in rows if row["piece"] == piece]

    def once(self, piece: str, key: dict[str, Any], work: Callable[[], dict[str, Any]], needed: float = 0.0) -> None:
        """Does a piece of work unless an earlier call did, and adds its result to the ledger."""
        key = {"piece": piece, **key}
        if any(key.items() <= row.items() for row in self.rows(piece)):
            return
        self.check_time(needed)
        started = time.perf_counter()
        row = {**key, **work(), "seconds": round(time.perf_counter() - started, 1)}
        with self.ledger.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# The network


class ResNetClassifier(Classifier):
    """The examples' classifier with a ResNet-18 and the authors' schedule: a tenth of the rate at 81 and 121 of 164."""

    def __init__(self, train: Images, classes: int, width: int, *, seed: int, epochs: int) -> None:
        super().__init__("cifar100", train, 0.1, seed=seed, network="cnn4")
        self.network = make_network("resnet18", classes, width).to(memory_format=torch.channels_last)
        self.epochs = epochs

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        milestones = [max(1, round(self.epochs * at / 164)) for at in (81, 121)]
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)}


# The data


class ImagesThere(Images):
    """Images that are on the device already: a batch is picked there, and nothing waits for it."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        picked = torch.tensor(indices).to(self.images.device, non_blocking=True)
        return self.images[picked], self.targets[picked]


class SplitsThere(Splits):
    """Splits on the device, where nothing is pinned."""

    def __init__(self, parts: list[Images], device: torch.device, sampler: Sampler[int] | None = None) -> None:
        super().__init__(*(ImagesThere(part.images.to(device), part.targets.to(device)) for part in parts), BATCH)
        self.sampler = sampler

    def _loader(self, part: Images, size: int, shuffle: bool = False) -> DataLoader:
        sampler = self.sampler if shuffle else None
        return DataLoader(part, size, shuffle and sampler is None, sampler=sampler, collate_fn=as_it_is)


class DrawnAnew(Sampler[int]):
    """Another random subset at every epoch, with the class balance of the whole."""

    def __init__(self, targets: Tensor, fraction: float, seed: int) -> None:
        self.targets, self.fraction, self.seed, self.epoch = targets.cpu(), fraction, seed, 0

    def set_epoch(self, epoch: int) -> None:  # which Lightning calls
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._drawn())

    def __iter__(self) -> Iterator[int]:
        drawn = self._drawn()
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch + 1)
        return iter(drawn[torch.randperm(len(drawn), generator=generator)].tolist())

    def _drawn(self) -> Tensor:
        return proportional_holdout(self.targets, self.fraction, seed=self.seed * 100_003 + self.epoch)[1]


def made_up(count: int, classes: int = 10, seed: int = 0) -> Images:
    """Noise in the shape of CIFAR, a little lighter from class to class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % classes
    images = torch.randint(200, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Images(images + (targets * 50 // classes).to(torch.uint8)[:, None, None, None], targets)


def made_up_splits(run: Run, count: int | None = None) -> list[Images]:
    return [made_up(run.sizes.images if count is None else count), made_up(100, seed=1), made_up(100, seed=2)]


def cifar_splits(work: Path) -> list[Images] | None:
    """CIFAR-100's train, validation (10 % of each class) and test images; None if some of them have not come."""
    lots = sorted((work / "data").glob("cifar100-*.npz"))
    if not lots or len(lots) < int(np.load(lots[0])["lots"]):
        return None
    read = [np.load(lot) for lot in lots]
    images, targets, test = (np.concatenate([lot[name] for lot in read]) for name in ("images", "targets", "test"))
    pool = Images(torch.from_numpy(images[~test]), torch.from_numpy(targets[~test]).long())
    parts = proportional_holdout(pool.targets, 0.1)
    tested = Images(torch.from_numpy(images[test]), torch.from_numpy(targets[test]).long())
    return [*(Images(pool.images[part], pool.targets[part]) for part in parts), tested]


# Fits


def trainer_of(run: Run, epochs: int, *callbacks: L.Callback, **arguments: Any) -> L.Trainer:
    settings = {**QUIET, "accelerator": run.device.type if run.device.type == "cpu" else "gpu", **arguments}
    return L.Trainer(max_epochs=epochs, callbacks=list(callbacks), num_sanity_val_steps=0, **settings)


class Times(L.Callback):
    """Seconds of each epoch, what is at its end included; last in the list of callbacks."""

    def __init__(self, run: Run) -> None:
        self.run, self.marks = run, []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.run.wait()
        self.marks.append(time.perf_counter())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.run.wait()
        self.marks.append(time.perf_counter())

    @property
    def epochs(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.marks, self.marks[1:], strict=False)]


class Saves(L.Callback):
    """Saves a checkpoint once a minute and when the time of the call is up, and then stops the call."""

    def __init__(self, run: Run, path: Path) -> None:
        self.run, self.path, self.saved = run, path, time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        over = time.monotonic() > self.run.ends and trainer.current_epoch + 1 < trainer.max_epochs
        if over or time.monotonic() - self.saved > 60:
            trainer.save_checkpoint(self.path)
            self.saved = time.monotonic()
        if over:
            raise OutOfTimeError
