"""What do many samples on many processes need? The formulas, and a run of the real code that they must agree with.

    python examples/benchmarks/many_processes.py
    python examples/benchmarks/many_processes.py --samples 20000 --processes 2

Each way of logging is run by Lightning's DDP (gloo, on the CPU) with a tiny network. Every process adds up the tensors
that the history keeps and the bytes that it gives to collectives within the callback's hooks; the files are those on
disk. Beside each figure stands what the formula says, and below what it says of 10^8 samples on 64 processes. Each
process has some 830 MB of resident memory, part of it shared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from _grid import markdown
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are scripts, not a package
from _common import QUIET, quiet

from lightning_cld import CLDCallback
from lightning_cld.recording import results

WAYS: dict[str, dict[str, str]] = {
    'history="full"': {},
    'history="running"': {"history": "running"},
    'record="step"': {"record": "step"},
}


@dataclass(frozen=True)
class Size:
    """A run: train and validation samples, checkpoints (theta_0 included), classes, processes."""

    samples: int
    references: int
    checkpoints: int
    classes: int
    processes: int


FAR = Size(10**8, 10**6, 91, 1000, 64)


def needs(size: Size, way: str) -> dict[str, float]:
    """Bytes by the formulas of `examples/guides/many_samples.md`.

    `device`, `host`: what each process keeps, beside the losses of an epoch's steps (`step`). `first`, `later`: what it
    gives to collectives at the first checkpoint, and at each later one. `lightning`: the state in a checkpoint file of
    Lightning's after the last epoch; `named`: the same where it names the losses instead of holding them. `row`: what
    is written at each checkpoint. `losses`, `scores`: the two files at the end.
    """
    train, both, rows = size.samples, size.samples + size.references, size.checkpoints
    steps = 8 * train if way == 'record="step"' else 0
    classes, positions = 8 * both, 8 * both
    if way == 'history="running"':
        index = 2 if size.classes <= 32_767 else 4
        tenth = 4 * train // 10
        device, host = (34 + index) * train + 52 * size.references + 520 * size.classes, classes + positions + tenth
        state, named, row, file = device + tenth, device + tenth, 20 * train, 0
    else:
        device, host = 4 * both * rows, classes + positions
        state = file = device + classes
        named, row = 0, 4 * both
    return {
        "device": device,
        "host": host,
        "step": steps,
        "first": 12 * both + steps,
        "later": 4 * both + (steps - 4 * train if steps else 0),
        "lightning": state + steps,
        "named": named + steps,
        "row": row,
        "losses": file,
        "scores": 20 * train,
    }


# A run


class Points(Dataset):
    """Points that are made when they are read, so that they take no memory."""

    def __init__(self, samples: int, classes: int) -> None:
        self.targets = torch.arange(samples) % classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Any:
        index = torch.tensor(indices)
        targets = self.targets[index]
        points = torch.stack([(index * k % 101 / 101 - 0.5) + targets % (k + 1) for k in range(1, 5)], dim=1)
        return list(zip(points, targets, index, strict=True))


class Tiny(L.LightningModule):
    """One layer, whose steps return what `record="step"` asks for."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, classes)

    def forward(self, points: Tensor) -> Tensor:
        return self.layer(points.float())

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return {"loss": losses.mean(), "sample_losses": losses.detach(), "sample_index": batch[2]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


@contextmanager
def counted_collectives(counts: dict[str, int], name: Callable[[], str | None]) -> Iterator[None]:
    """Adds up the bytes of the tensors that are given to collectives, under the name of the moment."""

    def counting(own: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if (now := name()) is not None and given:
                counts[now] = counts.get(now, 0) + given[-1].numel() * given[-1].element_size()
            return own(*args, **kwargs)

        return collective

    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce")
    own = {name: getattr(torch.distributed, name) for name in names}
    try:
        for each, function in own.items():
            setattr(torch.distributed, each, counting(function))
        yield
    finally:
        for each, function in own.items():
            setattr(torch.distributed, each, function)


class Counted(CLDCallback):
    """Says at which checkpoint it is, and how many bytes of classes and positions are kept beside the losses."""

    now: str | None = None
    host: int = 0
    row: int = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.now = "first"
        super().on_train_start(trainer, pl_module)
        self.now = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.now = "later"
        sources = self._recorder.sources
        self.host = tensor_bytes([(sweep.positions, sweep._classes) for sweep in (sources.train, sources.val)])
        super().on_train_epoch_end(trainer, pl_module)
        self.now = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()  # until the newest file is written
        files = {path.name: path.stat().st_size for path in self.dirpath.glob("cld-rows-*/*.npz")}
        self.row = files.get("scores.npz") or files[max(name for name in files if name.startswith("after-"))]
        trainer.strategy.barrier()  # before the folder is deleted
        super().on_train_end(trainer, pl_module)


def tensor_bytes(value: Any) -> int:
    """Of all tensors in an object, each memory once."""
    found: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for one in value:
                look(one)
        elif hasattr(value, "__dict__"):
            look(vars(value))

    look(value)
    return sum(found.values())


def measure(size: Size, way: str, folder: Path) -> dict[str, float]:
    """One fit on this process and the others; what this one has kept, sent and written."""
    kept = results.KEPT_IN_CHECKPOINTS
    train, val = (DataLoader(Points(count, size.classes), 4096) for count in (size.samples, size.references))
    cld = Counted(val_dataloader=val, dirpath=folder, batch_size=4096, **WAYS[way])
    L.seed_everything(0, verbose=False)
    settings = {**QUIET, "accelerator": "cpu", "strategy": "ddp", "devices": size.processes}
    trainer = L.Trainer(max_epochs=size.checkpoints - 1, callbacks=[cld], limit_val_batches=0, **settings)
    counts: dict[str, int] = {}
    with counted_collectives(counts, lambda: cld.now):
        trainer.fit(Tiny(size.classes), train)
    checkpoint = folder / "last.ckpt"
    trainer.save_checkpoint(checkpoint)
    naming = folder / "naming.ckpt"
    results.KEPT_IN_CHECKPOINTS = 0
    trainer.save_checkpoint(naming)
    results.KEPT_IN_CHECKPOINTS = kept
    trainer.strategy.barrier()
    plain = sum(weight.numel() * 4 for weight in trainer.lightning_module.parameters())
    files = {path.stem: path.stat().st_size for path in folder.glob("cld-*.npz")}
    history, steps = cld._recorder.history, cld._recorder.step_losses
    # Of the history these are on the CPU: the best tenth at half of the epochs, or the classes, which the sweeps share.
    tenth = tensor_bytes(getattr(history, "_kept", None))
    classes = 0 if way == 'history="running"' else tensor_bytes([history.train_classes, history.val_classes])
    return {
        "device": tensor_bytes(history) - tenth - classes,
        "host": cld.host + tenth,
        "step": tensor_bytes(steps) if steps is not None else 0,
        "first": counts["first"],
        "later": counts["later"] / (size.checkpoints - 1),
        "lightning": checkpoint.stat().st_size - plain,
        "named": naming.stat().st_size - plain,
        "row": cld.row,
        "losses": files.get("cld-trajectories", 0),
        "scores": files["cld-scores"],
    }


# The tables


def shown(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def compare(size: Size, measured: dict[str, dict[str, float]]) -> list[list[str]]:
    lines = []
    for way, own in measured.items():
        for what, expected in needs(size, way).items():
            ratio = f"{own[what] / expected:.3f}" if expected else ""
            if expected or own[what]:
                lines.append([way, what, shown(own[what]), shown(expected), ratio])
    return lines


def foretell(size: Size) -> list[list[str]]:
    return [[way, *map(shown, needs(size, way).values())] for way in WAYS]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bytes on devices, on the wire and on disk, measured and foretold.")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--samples", type=int, default=100_000, help=f"train samples {known}")
    add("--processes", type=int, default=8, help=known)
    add("--checkpoints", type=int, default=8, help=f"theta_0 included {known}")
    add("--classes", type=int, default=100, help=known)
    add("--work", type=Path, help="folder for the files (default: a temporary one)")
    args = parser.parse_args(argv)
    quiet(single_thread=True)
    warnings.filterwarnings("ignore")
    size = Size(args.samples, args.samples // 10, args.checkpoints, args.classes, args.processes)
    if args.work is None:
        # Lightning starts the other processes with the same command line, which must name the same folder.
        with TemporaryDirectory() as folder:
            sys.argv += ["--work", folder]
            main([*(sys.argv[1:] if argv is None else argv), "--work", folder])
        return
    measured = {}
    for number, way in enumerate(WAYS):
        folder = args.work / str(number)
        measured[way] = measure(size, way, folder)
        (folder / f"rank-{os.environ.get('LOCAL_RANK', '0')}.json").write_text(
            json.dumps(measured[way]), encoding="utf-8"
        )
        torch.distributed.barrier()
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(f"\n{size.samples:,} samples, {size.references:,} of validation, {size.checkpoints} checkpoints,")
        print(f"{size.classes} classes, {size.processes} processes: bytes of each process\n")
        print(markdown(["way", "what", "measured", "formula", "measured / formula"], compare(size, measured)))
        print(
            f"\n{FAR.samples:,} samples, {FAR.references:,} of validation, {FAR.checkpoints} checkpoints, by formula\n"
        )
        print(markdown(["way", *needs(FAR, next(iter(WAYS)))], foretell(FAR)))


if __name__ == "__main__":
    main()
