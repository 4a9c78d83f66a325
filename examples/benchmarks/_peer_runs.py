"""The data, the proxies and the training loop of `peers.py`.

A plain loop trains all methods' models side by side, which for networks as small as these takes a fraction of the
time. Each has its own weights, batches and random numbers. Some methods want the loss of every sample of a batch, and
decide by it what is served next.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from _grid import Row
from _runs import Case, divide, make_splits
from torch import Tensor
from torch.nn import functional as F

from lightning_cld import CLDScores, LossTrajectories

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are scripts, not a package
from _common import PRESETS, Images, Preset, make_network

TABLE = Preset("A table", "mlp", epochs=15, steps=1_500, batch_size=64, lr=0.1, holdout=0.15)


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

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.train.classes.max()) + 1


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


class Models:
    """Networks with one hidden layer of 128, side by side. All begin with the same weights.

    Args:
        data: What they are for.
        seed: Of the weights.
        count: How many.
    """

    def __init__(self, data: Data, seed: int, count: int) -> None:
        torch.manual_seed(seed)
        first, _, last = make_network("mlp", data.train.inputs[:1, :, None, None], data.classes)[1:]
        self.parameters = [
            value.detach().expand(count, *value.shape).clone().requires_grad_()
            for layer in (first, last)
            for value in (layer.weight.T, layer.bias[None])
        ]

    def __call__(self, inputs: Tensor) -> Tensor:
        """Takes `[count, B, D]`, gives `[count, B, C]`."""
        weights, biases, last_weights, last_biases = self.parameters
        hidden = torch.baddbmm(biases, inputs, weights).relu()
        return torch.baddbmm(last_biases, hidden, last_weights)

    @torch.no_grad()
    def logits(self, part: Part) -> Tensor:
        """The logits of all samples, `[count, N, C]`."""
        count = len(self.parameters[0])
        parts = part.inputs.split(1 + 4096 // count)
        return torch.cat([self(inputs.expand(count, *inputs.shape)) for inputs in parts], dim=1)

    def accuracies(self, part: Part) -> list[float]:
        """In percent."""
        right = self.logits(part).argmax(2) == part.classes
        return (100 * right.double().mean(1)).tolist()


class _Queue:
    """The samples of one method in batches, which may hold the end of one pass and the beginning of another."""

    def __init__(self, rival: Rival, seed: int) -> None:
        self.rival, self.passes = rival, []
        self._waiting, self._generator = torch.empty(0, dtype=torch.long), torch.Generator().manual_seed(seed)

    def batch(self, size: int, step: int) -> Tensor:
        while len(self._waiting) < size:
            positions = self.rival.draw(step)
            self.passes.append(len(positions))
            order = torch.randperm(len(positions), generator=self._generator)
            self._waiting = torch.cat([self._waiting, positions[order]])
        batch, self._waiting = self._waiting[:size], self._waiting[size:]
        return batch


@dataclass(frozen=True)
class Served:
    """What the models were trained on."""

    passes: list[list[int]]  # for each model the sizes of its passes
    counts: Tensor  # how often each train sample was served, `[count, N]`


def fit(models: Models, data: Data, rivals: Sequence[Rival], steps: int, seed: int) -> Served:
    """Trains each model on what its rival draws, for some steps on whole batches."""
    preset = data.preset
    optimizer = torch.optim.SGD(models.parameters, preset.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, preset.lr, steps, pct_start=0.2)
    queues = [_Queue(rival, seed) for rival in rivals]
    counts = torch.zeros(len(rivals), len(data.train.classes), dtype=torch.long)
    weights = torch.ones(len(rivals), preset.batch_size)
    for step in range(steps):
        batches = torch.stack([queue.batch(preset.batch_size, step) for queue in queues])
        logits = models(data.train.inputs[batches])
        losses = F.cross_entropy(logits.flatten(0, 1), data.train.classes[batches].flatten(), reduction="none")
        losses = losses.view_as(batches)
        for row, (rival, batch) in enumerate(zip(rivals, batches, strict=True)):
            rival.observe(batch, losses[row].detach())
            weights[row] = rival.weigh(batch)
        optimizer.zero_grad()
        (losses * weights).mean(1).sum().backward()
        optimizer.step()
        schedule.step()
        counts.scatter_add_(1, batches, torch.ones_like(batches))
    return Served([queue.passes for queue in queues], counts)


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
    models, logged = Models(data, cell["seed"], 1), ([], [])

    def log() -> None:
        for rows, part in zip(logged, (data.train, data.val), strict=True):
            rows.append(models.logits(part)[0].numpy())

    samples = len(data.train.classes)
    # Batches go on from one pass into the next, so that this many steps draw this many times.
    steps = cell["epochs"] * samples // data.preset.batch_size
    fit(models, data, [_Whole(samples, log)], steps, 6000 + cell["seed"])
    log()
    folder = folder_of(cell, places.work)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "val"), logged, strict=True):
        np.save(folder / f"{name}_logits.npy", np.stack(rows))
    return {"accuracy": round(models.accuracies(data.test)[0], 2)}


@functools.lru_cache(maxsize=1)
def _read_proxy(folder: Path, dataset: str, noise: float, seed: int, places: Places) -> Proxy:
    logits = (torch.from_numpy(np.load(folder / f"{name}_logits.npy")) for name in ("train", "val"))
    return Proxy(*logits, make_data(dataset, noise, seed, places), folder)


def read_proxy(cell: dict[str, Any], places: Places) -> Proxy:
    return _read_proxy(folder_of(cell, places.work), cell["dataset"], cell["noise"], cell["seed"], places)
