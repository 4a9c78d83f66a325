"""What does a look at the data cost before the first sweep? Seconds and memory for as many samples as ImageNet has.

    python examples/benchmarks/startup.py
    python examples/benchmarks/startup.py --samples 50000 --repeats 9

That look tells train sets apart: it hashes the labels, the positions and the names of the files, and reads a few
samples. Reading costs next to nothing here. The datasets are made up: one of folders, with a path and a class for each
sample; a random 90 % of that, as a `Subset`; and a `TensorDataset`. Seconds are of the processor, medians over the
repeats. The extra memory is the process's peak during one look minus what it held before (Linux only).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from _grid import markdown
from scoring import extra_memory
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from tqdm import tqdm

from lightning_cld.recording.sources import find_sources


class Folders(Dataset[tuple[Tensor, int]]):
    """Has the attributes of an `ImageFolder`, but no files."""

    def __init__(self, samples: int, classes: int) -> None:
        self.targets = [position * classes // samples for position in range(samples)]
        self.samples = [
            (f"/data/train/n{label:08}/n{label:08}_{position}.JPEG", label)
            for position, label in enumerate(self.targets)
        ]
        self.transform = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 4, 4), index / len(self)), self.targets[index]


def datasets(samples: int, classes: int) -> dict[str, Dataset[Any]]:
    folders = Folders(samples, classes)
    part = torch.randperm(samples, generator=torch.Generator().manual_seed(0))[: samples * 9 // 10]
    return {
        "folders": folders,
        "subset of folders": Subset(folders, part.tolist()),
        "tensors": TensorDataset(torch.rand(samples, 4), torch.arange(samples) % classes),
    }


def look(dataset: Dataset[Any], val: DataLoader[Any]) -> None:
    # Only these attributes of a Trainer are asked for.
    loader = DataLoader(dataset, batch_size=256, shuffle=True)
    trainer: Any = SimpleNamespace(train_dataloader=loader, datamodule=None, lightning_module=None)
    find_sources(trainer, None, val, None)


def measure(name: str, dataset: Dataset[Any], classes: int, repeats: int) -> list[str]:
    """One line of the table."""
    val = DataLoader(TensorDataset(torch.rand(50 * classes, 4), torch.arange(50 * classes) % classes), batch_size=256)
    look(val.dataset, val)  # a warm-up
    memory = extra_memory(lambda: look(dataset, val))
    seconds = []
    for _ in tqdm(range(repeats), desc=name):
        started = time.process_time()
        look(dataset, val)
        seconds.append(time.process_time() - started)
    return [
        name,
        f"{len(dataset):,}",  # type: ignore[arg-type]  # map-style
        f"{statistics.median(seconds):.3f}",
        "" if memory is None else f"{memory / 2**20:.0f}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the look at the data before the first sweep.")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--samples", type=int, default=1_281_167, help=known)
    add("--classes", type=int, default=1_000, help=known)
    add("--repeats", type=int, default=5, help=f"rounds of timing {known}")
    args = parser.parse_args(argv)
    lines = [
        measure(name, dataset, args.classes, args.repeats)
        for name, dataset in datasets(args.samples, args.classes).items()
    ]
    print(f"python examples/benchmarks/startup.py --samples {args.samples} --classes {args.classes}", end=" ")
    print(f"--repeats {args.repeats}\n")
    print(markdown(["train set", "samples", "processor, s", "extra memory, MiB"], lines))


if __name__ == "__main__":
    main()
