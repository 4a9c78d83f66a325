"""What does a sweep over a stream cost, beside iterating the same loader with nothing logged, and a map-style set?

    export OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=2000000000
    python examples/benchmarks/streams.py

The first line keeps glibc from giving freed memory back: else it may do so after each batch of one loop and not of the
other, and the time that the system takes to give it anew outweighs what is measured here.

The samples are noise in memory, images of 3x32x32, and the stream yields them one by one: nothing is read from disks or
decoded, so all that a sweep adds weighs more than in real streams. A name is text of 20 letters. The bare loop iterates
the stream's loader in evaluation mode and without gradients, and computes each sample's cross-entropy. Sweeps are those
of a later checkpoint. Each lies between two passes of the bare loop and is divided by their mean; what is shown is the
median of many such ratios, and their quartiles. All seconds are of the processor. So other work on the machine disturbs
little, but it does disturb. Rows that the CSV holds are not measured again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _grid import Row, markdown, run_cells
from _runs import NETWORKS, RESULTS, Classifier, Images, quiet, quiet_trainer
from overhead import seconds_of
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_cld.recording.batch_hooks import BatchHooks
from lightning_cld.recording.batch_losses import make_step
from lightning_cld.recording.stream_sweep import StreamSweep
from lightning_cld.recording.streams import Readings
from lightning_cld.recording.sweep import Sweep

BATCH_SIZE = 256
KINDS = ("positions", "names")


class Samples(Dataset):
    """Images one by one, each with its label and its position or name."""

    def __init__(self, images: Images, kind: str) -> None:
        self.images, self.targets, self.kind = images.images, images.targets, kind

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int | str]:
        told = index if self.kind == "positions" else f"shard-{index // 1_000:04}/{index:09}"
        return self.images[index], self.targets[index], told


class Stream(Samples, IterableDataset):
    """The same samples as a stream."""

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self.targets)))


class Tells(Classifier):
    """A classifier that returns the losses, the classes, and which samples these are."""

    def cld_step(self, batch: Any) -> tuple[Tensor, Tensor, Any]:
        images, targets, told = batch
        return F.cross_entropy(self(images), targets, reduction="none"), targets, told


def bare_pass(model: Classifier, loader: DataLoader) -> list[Tensor]:
    """Evaluates a loader. The losses of each batch."""
    model.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(model(images), targets, reduction="none") for images, targets, _ in loader]
    model.train()
    return losses


def make_images(samples: int) -> Images:
    """Noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (samples, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Images(images, torch.arange(samples) % 10)


def make_sweeps(
    cell: dict[str, Any],
) -> tuple[Callable[[], list[Tensor]], Callable[[], Tensor], Callable[[], Tensor]]:
    """The bare loop, the sweep over the stream, and the sweep over the map-style set."""
    images = make_images(cell["samples"])
    samples, stream = (kind(images, cell["kind"]) for kind in (Samples, Stream))
    model = Tells("cifar10", images, 0.01, seed=0, network=cell["network"])
    trainer = quiet_trainer(1)
    trainer.strategy.connect(model)
    step, hooks = make_step(model, None), BatchHooks([], model)
    loader = DataLoader(stream, BATCH_SIZE)
    known = len(samples) if cell["kind"] == "positions" else None
    of_stream = StreamSweep(Readings(loader, is_own=True, kind="train"), kind="train", num_samples=known)
    everything = torch.arange(len(samples))
    settings = {"batch_size": BATCH_SIZE, "kind": "train", "fixed": True}
    of_set = Sweep(DataLoader(samples, BATCH_SIZE, shuffle=True), everything, **settings)
    return (
        lambda: bare_pass(model, loader),
        lambda: of_stream.run(trainer, model, step, hooks)[0],
        lambda: of_set.run(trainer, model, step, hooks)[0],
    )


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Processor seconds, and ratios to the bare loop."""
    quiet()
    bare, *sweeps = make_sweeps(cell)
    for sweep in sweeps:  # the first sweeps and the first passes are not counted
        torch.testing.assert_close(sweep(), torch.cat(bare()))
    seconds: dict[str, list[float]] = {"bare": [seconds_of(bare)], "stream": [], "map": []}
    ratios: dict[str, list[float]] = {"stream": [], "map": []}
    for _ in range(cell["rounds"]):
        for name, sweep in zip(ratios, sweeps, strict=True):
            seconds[name].append(seconds_of(sweep))
            seconds["bare"].append(seconds_of(bare))
            ratios[name].append(2 * seconds[name][-1] / sum(seconds["bare"][-2:]))
    found = {f"{name}_seconds": f"{statistics.median(each):.4f}" for name, each in seconds.items()}
    for name, each in ratios.items():
        quartiles = statistics.quantiles(each, n=4, method="inclusive")
        for part, value in zip(("lower_quartile", "ratio", "upper_quartile"), quartiles, strict=True):
            found[f"{name}_{part}"] = f"{value:.3f}"
    return found


def table(rows: Iterable[Row]) -> str:
    """A line for each network and kind."""
    head = ["network", "samples", "told by", "bare loop, s", "stream, s", "of a bare loop", "quartiles"]
    lines = []
    for row in rows:
        line = [row["network"], f"{int(row['samples']):,}", row["kind"], row["bare_seconds"]]
        for name in ("stream", "map"):
            quartiles = f"{row[f'{name}_lower_quartile']} to {row[f'{name}_upper_quartile']}"
            line += [row[f"{name}_seconds"], row[f"{name}_ratio"], quartiles]
        lines.append([*line, row["rounds"]])
    return markdown([*head, "map-style, s", "of a bare loop", "quartiles", "rounds"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The time of sweeps over a stream.")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--samples", type=int, default=20_000, help=f"samples in the stream {known}")
    add("--networks", nargs="+", default=["mlp", "cnn4"], choices=NETWORKS, help=f"networks {known}")
    add("--rounds", type=int, default=7, help=f"pairs of each sweep and the bare loop, 2 at least {known}")
    add("--csv", type=Path, default=RESULTS / "streams.csv", help=f"where the results are kept {known}")
    args = parser.parse_args(argv)
    cells = [
        {
            "network": network,
            "samples": args.samples,
            "kind": kind,
            "rounds": args.rounds,
            "threads": torch.get_num_threads(),
        }
        for network in args.networks
        for kind in KINDS
    ]
    rows = run_cells(args.csv, cells, measure, jobs=1)
    networks = " ".join(args.networks)
    print(f"python examples/benchmarks/streams.py --samples {args.samples} --networks {networks}", end=" ")
    print(f"--rounds {args.rounds}  # {torch.get_num_threads()} threads\n")
    print(table(rows))


if __name__ == "__main__":
    main()
