"""The data, the proxies and the training loop of `peers.py`: a plain loop, the same for every method.

Methods that draw anew decide what is served while the model trains, and some want the loss of every sample of a batch.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from _grid import Row
from _runs import Case, divide, make_splits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cld import CLDScores, LossTrajectories

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are scripts, not a package
from _common import PRESETS, Images, Preset, make_network

TABLE = Preset("A table", "mlp", epochs=15, steps=1_000, batch_size=64, lr=0.1, holdout=0.15)


@dataclass(frozen=True)
class Places:
    """The folders of torchvision's datasets, of the tables, and of finished proxies."""

    root: Path
    tables: Path | None
    work: Path


@dataclass(frozen=True)
class Part:
    """Samples that the network can take, `[N, D]`, and their classes."""

    inputs: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Data:
    """Train, validation and test samples, a mask of the wrong train labels, and the settings of the dataset."""

    train: Part
    val: Part
    test: Part
    wrong: Tensor
    preset: Preset


def preset_of(dataset: str) -> Preset:
    return PRESETS.get(dataset, TABLE)


def read_table(path: Path) -> tuple[Images, Images]:
    """The pool and the test set of a table, each column a channel of one pixel.

    Raises:
        SystemExit: If the file is not there.
    """
    if not path.exists():
        raise SystemExit(
            f"{path} is not there. --tables names a folder of NAME.npz files, which hold the arrays pool_inputs, "
            "pool_classes, test_inputs and test_classes."
        )
    with np.load(path) as file:
        parts = [(file[f"{part}_inputs"], file[f"{part}_classes"]) for part in ("pool", "test")]
    pool, test = (
        Images(torch.as_tensor(inputs)[:, :, None, None], torch.as_tensor(classes).long()) for inputs, classes in parts
    )
    return pool, test


@functools.lru_cache(maxsize=2)
def make_data(dataset: str, noise: float, seed: int, places: Places) -> Data:
    """Makes the splits, some train labels wrong, with every channel of the inputs standardised.

    Raises:
        SystemExit: If the data are not there.
    """
    case = Case(dataset, "mlp", 0, noise, "symmetric", 0.0, 1.0, seed)
    if dataset in PRESETS:
        splits, wrong = make_splits(case, places.root)
    else:
        splits, wrong = divide(case, TABLE, *read_table((places.tables or Path()) / f"{dataset}.npz"))
    std, mean = torch.std_mean(splits.train.images.float(), dim=(0, 2, 3), keepdim=True)
    train, val, test = (
        Part(((part.images.float() - mean) / std.clamp_min(1e-6)).flatten(1), part.targets)  # a column may be constant
        for part in (splits.train, splits.val, splits.test)
    )
    return Data(train, val, test, wrong, preset_of(dataset))


class Rival(Protocol):
    """What chooses the samples of each pass."""

    def draw(self, step: int) -> Tensor:
        """The positions of the next pass, which begins at this step."""

    def observe(self, positions: Tensor, losses: Tensor) -> None:
        """Called with the losses of every batch."""

    def weigh(self, positions: Tensor) -> Tensor | float:
        """The factors of the losses of a batch."""


class Fixed:
    """The same samples in each pass."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions

    def draw(self, step: int) -> Tensor:
        return self.positions

    def observe(self, positions: Tensor, losses: Tensor) -> None:
        pass

    def weigh(self, positions: Tensor) -> Tensor | float:
        return 1.0


@dataclass(frozen=True)
class Served:
    """What a run was trained on."""

    passes: list[int]  # the size of each
    counts: Tensor  # how often each train sample was served


def new_network(data: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    shape = data.train.inputs[:1, :, None, None]
    return make_network("mlp", shape, int(data.train.classes.max()) + 1)


def fit(network: nn.Module, data: Data, rival: Rival, steps: int, seed: int) -> Served:
    """Trains for some steps on whole batches. A batch may hold the end of one pass and the beginning of the next."""
    preset = data.preset
    optimizer = torch.optim.SGD(network.parameters(), preset.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, preset.lr, steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(seed)
    queue, passes = torch.empty(0, dtype=torch.long), []
    counts = torch.zeros(len(data.train.classes), dtype=torch.long)
    for step in range(steps):
        while len(queue) < preset.batch_size:
            positions = rival.draw(step)
            passes.append(len(positions))
            queue = torch.cat([queue, positions[torch.randperm(len(positions), generator=generator)]])
        batch, queue = queue.split([preset.batch_size, len(queue) - preset.batch_size])
        losses = F.cross_entropy(network(data.train.inputs[batch]), data.train.classes[batch], reduction="none")
        rival.observe(batch, losses.detach())
        optimizer.zero_grad()
        (losses * rival.weigh(batch)).mean().backward()
        optimizer.step()
        schedule.step()
        counts.scatter_add_(0, batch, torch.ones_like(batch))
    return Served(passes, counts)


@torch.no_grad()
def logits_of(network: nn.Module, part: Part) -> Tensor:
    return torch.cat([network(inputs) for inputs in part.inputs.split(4096)])


def accuracy_of(network: nn.Module, part: Part) -> float:
    """In percent."""
    return 100 * float((logits_of(network, part).argmax(1) == part.classes).double().mean())


# Proxies


class Scored(LossTrajectories):
    """Losses that are scored once, however often they are drawn from."""

    @functools.cached_property
    def _scores(self) -> CLDScores:
        return super().score()

    def score(self, *args: Any, **options: Any) -> CLDScores:
        return super().score(*args, **options) if args or options else self._scores


@dataclass(frozen=True)
class Proxy:
    """The logits of one run after every epoch, theta_0 first: `[T + 1, N, C]`."""

    train_logits: Tensor
    val_logits: Tensor
    data: Data
    folder: Path

    @functools.cached_property
    def trajectories(self) -> LossTrajectories:
        """What `CLDCallback` would have logged: the losses alone."""
        classes = self.data.train.classes, self.data.val.classes
        losses = [
            F.cross_entropy(logits.flatten(0, 1), targets.repeat(len(logits)), reduction="none").unflatten(
                0, logits.shape[:2]
            )
            for logits, targets in zip((self.train_logits, self.val_logits), classes, strict=True)
        ]
        return Scored(*losses, *classes)


class _Whole(Fixed):
    """All samples in each pass. Calls a function before each."""

    def __init__(self, samples: int, before: Callable[[], None]) -> None:
        super().__init__(torch.arange(samples))
        self._before = before

    def draw(self, step: int) -> Tensor:
        self._before()
        return self.positions


def folder_of(cell: Row | dict[str, Any], work: Path) -> Path:
    return work / "-".join(str(cell[name]) for name in ("dataset", "epochs", "noise", "seed"))


def train_proxy(cell: dict[str, Any], places: Places) -> dict[str, Any]:
    """Trains a proxy on everything and keeps its logits."""
    data = make_data(cell["dataset"], cell["noise"], cell["seed"], places)
    network, logged = new_network(data, cell["seed"]), ([], [])
    started = time.process_time()

    def log() -> None:
        for rows, part in zip(logged, (data.train, data.val), strict=True):
            rows.append(logits_of(network, part).numpy())

    samples = len(data.train.classes)
    # Batches go on from one pass into the next, so that this many steps draw this many times.
    steps = cell["epochs"] * samples // data.preset.batch_size
    fit(network, data, _Whole(samples, log), steps, 6000 + cell["seed"])
    log()
    folder = folder_of(cell, places.work)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "val"), logged, strict=True):
        np.save(folder / f"{name}_logits.npy", np.stack(rows))
    accuracy = accuracy_of(network, data.test)
    return {"accuracy": round(accuracy, 2), "seconds": round(time.process_time() - started, 1)}


@functools.lru_cache(maxsize=1)
def _read_proxy(folder: Path, dataset: str, noise: float, seed: int, places: Places) -> Proxy:
    logits = (torch.from_numpy(np.load(folder / f"{name}_logits.npy")) for name in ("train", "val"))
    return Proxy(*logits, make_data(dataset, noise, seed, places), folder)


def read_proxy(cell: dict[str, Any], places: Places) -> Proxy:
    return _read_proxy(folder_of(cell, places.work), cell["dataset"], cell["noise"], cell["seed"], places)
