"""Everything that needs a GPU, for a bare machine that has one for some minutes and no network.

Where there is a network, once: what must travel, in folders of at most 60 MB each, which are listed.

    python examples/benchmarks/gpu.py pack --root DIR --wheels lightning torchmetrics lightning-utilities

On the machine with the GPU, again and again: each call takes in the folders that lie in --packed, goes on where the
one before stopped, and ends within --minutes.

    python examples/benchmarks/gpu.py run --packed packed --work gpu-runs

A rehearsal on a CPU, with made-up data and next to nothing of everything:

    python examples/benchmarks/gpu.py run --device cpu --tiny --work rehearsal

The machine needs Python with a torch for CUDA, and the packages in `NEEDED`: name those that it lacks to `pack`.

Pieces: `identity` (is training bit by bit the same with and without the callback?), `sweep` (against the bare loop; its
share of an epoch; what waits for the device), `scores` (at the size of ImageNet), `memory` (of the history, by epoch)
and `training` (CIFAR-100 with ResNet-18). Without CIFAR-100 the sweep takes noise, and training is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOT = 60_000_000
PIECES = ("identity", "sweep", "scores", "memory", "training")
NEEDED = ("torch", "torchvision", "numpy", "sklearn", "tqdm", "lightning", "torchmetrics")

# What travels


def pack(args: argparse.Namespace) -> None:
    """Writes the folders that must travel, and lists them."""
    import numpy as np
    from _runs import load

    args.packed.mkdir(parents=True, exist_ok=True)
    parts = load("cifar100", args.root)
    images = np.concatenate([part.images.numpy() for part in parts])
    targets = np.concatenate([part.targets.numpy() for part in parts]).astype(np.uint8)
    test = np.repeat([False, True], [len(part) for part in parts])
    most = args.lot_bytes // (images[0].nbytes + 2)  # even if nothing can be compressed
    lots = -(-len(images) // most)
    for number, part in enumerate(np.array_split(np.arange(len(images)), lots)):
        lot = args.packed / f"lot-{number}"
        lot.mkdir(exist_ok=True)
        np.savez_compressed(
            lot / f"cifar100-{number}.npz",
            images=images[part],
            targets=targets[part],
            test=test[part],
            lots=lots,
        )
    if args.wheels:
        wheels = args.packed / f"lot-{lots}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(wheels)]
        command += ["--python-version", args.python_version] if args.python_version else []
        command += [word for platform in args.platform for word in ("--platform", platform)]
        subprocess.run([*command, *args.wheels], check=True)
    for lot in sorted(args.packed.glob("lot-*")):
        files = sorted(lot.iterdir())
        size = sum(file.stat().st_size for file in files)
        print(f"{lot}: {size / 1e6:.1f} MB: {', '.join(file.name for file in files)}")
        if size > args.lot_bytes:
            raise SystemExit(f"{lot} is larger than {args.lot_bytes / 1e6:.0f} MB. Name fewer wheels.")


def take_in(packed: Path | None, work: Path) -> None:
    """Keeps the data that came, and makes the packages importable."""
    site = work / "site"
    for lot in sorted(packed.glob("lot-*")) if packed is not None and packed.exists() else ():
        (work / "data").mkdir(parents=True, exist_ok=True)
        for file in lot.glob("*.npz"):
            shutil.copyfile(file, work / "data" / f"{file.name}.tmp")
            (work / "data" / f"{file.name}.tmp").replace(work / "data" / file.name)
        wheels = [str(wheel) for wheel in lot.glob("*.whl")]
        if wheels:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
            subprocess.run([*install, "--target", str(site), *wheels], check=True)
    sys.path.insert(0, str(site))
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"Missing here: {', '.join(missing)}. Name them to `gpu.py pack --wheels` and bring that lot.")


# The call


def run(args: argparse.Namespace) -> None:
    """Does as many of the pieces as there is time for, and prints the tables of all that is done."""
    started = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms ask for
    take_in(args.packed, args.work)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the library need not be installed
    import torch
    from _gpu_pieces import identity, memory, scores, sweep, training
    from _gpu_runs import REAL, TINY, OutOfTimeError, Run, cifar_splits, made_up_splits, quiet

    quiet()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here. Rehearse with --device cpu --tiny.")
    call = Run(
        work=args.work.absolute(),
        sizes=TINY if args.tiny else REAL,
        device=torch.device(args.device, *([0] if args.device == "cuda" else [])),
        workers=args.workers,
        epochs=args.epochs,
        training_minutes=args.training_minutes,
        precision=args.precision,
        ends=started + 60 * args.minutes,
    )
    pieces = {
        "identity": lambda: identity(call),
        "sweep": lambda: sweep(call),
        "scores": lambda: scores(call),
        "memory": lambda: memory(call),
        "training": lambda: training(call, made_up_splits(call) if args.tiny else cifar_splits(call.work)),
    }
    finished, failed = True, {}
    for name in args.pieces:
        try:
            pieces[name]()
        except OutOfTimeError:
            finished = False
            break
        except Exception as error:  # noqa: BLE001  # the minutes of the others must not be lost
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"{name} failed: {failed[name]}", file=sys.stderr, flush=True)
    print_tables(call)
    where = f"{torch.cuda.get_device_name()}" if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}; {(time.monotonic() - started) / 60:.1f} minutes in this call.")
    print("Everything is done." if finished and not failed else "The same command goes on with the rest:")
    print(f"    python {' '.join([args.script, *args.command])}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


TABLES: dict[str, list[str]] = {
    "identity": ["precision", "history", "deterministic", "identical", "largest_difference", "scored"],
    "epoch": ["precision", "samples", "epoch_seconds"],
    "sweep": ["data", "batch_size", "precision", "sweep_seconds", "per_bare_loop", "per_epoch"],
    "waits": ["batches", "warned", "synchronised"],
    "scores": ["samples", "checkpoints", "cld_scores_ms", "values_ms", "score_ms", "extra_bytes", "apart_from_the_cpu"],
    "memory": ["history", "samples", "devices", "history_bytes", "bytes_per_epoch"],
    "training": ["method", "fraction", "epochs", "steps", "accuracy"],
}


def print_tables(call: Any) -> None:
    for piece, columns in TABLES.items():
        rows = call.rows(piece)
        if rows:
            print(f"\n{piece}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
            for row in rows:
                print(f"| {' | '.join(_shown(row.get(column)) for column in columns)} |")
    print()


def _shown(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def main(argv: Sequence[str] | None = None) -> None:
    known = "(default: %(default)s)"
    parser = argparse.ArgumentParser(description="What needs a GPU, in calls of some minutes.")
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="make what must travel")
    packing.set_defaults(function=pack)
    add = packing.add_argument
    add("--root", type=Path, default=Path("data"), help=f"folder of torchvision's datasets {known}")
    add("--packed", type=Path, default=Path("packed"), help=f"folder for the lots {known}")
    add("--wheels", nargs="*", default=[], help="packages that the machine lacks, without what they need")
    add("--python-version", help="of the machine, as for pip download (default: this one's)")
    add("--platform", nargs="*", default=[], help="of the machine, as for pip download (default: this one's)")
    add("--lot-bytes", type=int, default=LOT, help=f"size of a lot {known}")
    running = commands.add_parser("run", help="go on with the pieces")
    running.set_defaults(function=run)
    add = running.add_argument
    add("--packed", type=Path, help="folder of the lots that came")
    add("--work", type=Path, default=Path("gpu-runs"), help=f"folder of what is done {known}")
    add("--pieces", nargs="+", choices=PIECES, default=list(PIECES), help=known)
    add("--minutes", type=float, default=8.5, help=f"time of this call {known}")
    add("--training-minutes", type=float, default=14.0, help=f"time of all training, which settles the epochs {known}")
    add("--epochs", type=int, help="epochs of proxy and targets (default: as many as there is time for, 164 at most)")
    add("--precision", default="bf16-mixed", help=f"of the sweep and of training {known}")
    add("--workers", type=int, default=8, help=f"worker processes of a loader {known}")
    add("--device", choices=["cuda", "cpu"], default="cuda", help=known)
    add("--tiny", action="store_true", help="next to nothing of everything, with made-up data")
    args = parser.parse_args(argv)
    args.script, args.command = "examples/benchmarks/gpu.py", sys.argv[1:] if argv is None else list(argv)
    args.function(args)


if __name__ == "__main__":
    main()
