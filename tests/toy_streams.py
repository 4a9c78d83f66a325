"""Small streams for the tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from toys import CLASSES

from lightning_cld import CLDScores

SAMPLES = 40


class Stream(IterableDataset):
    """Samples in the order of their classes, split between workers and processes in long parts.

    Args:
        samples: The number of samples.
        first: The position of the first.
        rank: The number of this process.
        world: The number of processes.
        split: Whether workers read different samples.
        endless: Whether it begins again at its end.
        wrong: The position of a sample with another class.
    """

    def __init__(
        self,
        samples: int = SAMPLES,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
        split: bool = True,
        endless: bool = False,
        wrong: int = -1,
    ) -> None:
        self.positions = torch.arange(first, first + samples).tensor_split(world)[rank].tolist()
        self.split = split
        self.endless = endless
        self.wrong = wrong
        self.asked = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        positions = self.positions
        if worker is not None and self.split:
            positions = torch.tensor(positions).tensor_split(worker.num_workers)[worker.id].tolist()
        for position in itertools.cycle(positions) if self.endless else positions:
            self.asked += 1
            yield sample_at(position, self.wrong)


def label_at(position: int) -> int:
    return position * CLASSES // SAMPLES


def name_at(position: int) -> str:
    return f"shard-{position // 10}/{position:03d}"


def sample_at(position: int, wrong: int = -1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(position)
    label = label_at(position)
    return {
        "index": position,
        "name": name_at(position),
        "inputs": torch.randn(4, generator=generator) + label,
        "label": (label + 1) % CLASSES if position == wrong else label,
    }


def index_of(sample: dict[str, Any]) -> int:
    return sample["index"]


def index_and_class(sample: dict[str, Any]) -> tuple[int, int]:
    return sample["index"], sample["label"]


def name_of(sample: dict[str, Any]) -> str:
    return sample["name"]


def scores_of(samples: int = SAMPLES) -> CLDScores:
    """Scores in no order, of all samples."""
    values = torch.rand(samples, generator=torch.Generator().manual_seed(3))
    return CLDScores(values, [label_at(position) for position in range(samples)])


class Data(L.LightningDataModule):
    """A train loader over a stream."""

    def __init__(self, stream: Any = None, **loader: Any) -> None:
        super().__init__()
        self.stream = Stream() if stream is None else stream
        self.loader = {"batch_size": 4, **loader}

    def train_dataloader(self) -> Any:
        return DataLoader(self.stream, **self.loader)


def served(loader: Any) -> list[list[int]]:
    """The positions of each batch of an epoch."""
    return [batch["index"].tolist() for batch in loader]


def flat(lists: list[list[Any]]) -> list[Any]:
    return [item for inner in lists for item in inner]
