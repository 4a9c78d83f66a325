"""How fast are scores, and how much memory do they take? `cld_scores` against per-class numpy and torchmetrics.

    python examples/benchmarks/scoring.py
    python examples/benchmarks/scoring.py --samples 1281167 --repeats 9

The losses are random, because only their number matters. The functions run in turn; times are medians, and a ratio is
the median of paired ratios. The extra memory is the process's peak during one call minus what it held before, as a
share of the train losses (Linux only). torchmetrics gets the float32 differences of all samples and of their classes.
Beyond some millions of samples memory is short for that, so it is left out there. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _grid import markdown
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef
from tqdm import tqdm

from lightning_cld import cld_scores


def per_class_numpy(
    train_losses: np.ndarray, val_losses: np.ndarray, train_classes: np.ndarray, val_classes: np.ndarray
) -> np.ndarray:
    """CLD from its definition, class by class, vectorised over each class's samples."""
    scores = np.empty(train_losses.shape[1])
    for label in np.unique(train_classes):
        members = np.flatnonzero(train_classes == label)
        reference = np.diff(val_losses[:, val_classes == label].mean(axis=1, dtype=np.float64))
        difference = np.diff(train_losses[:, members].astype(np.float64), axis=0)
        reference = reference - reference.mean()
        difference = difference - difference.mean(axis=0)
        norms = np.linalg.norm(difference, axis=0) * np.linalg.norm(reference)
        scores[members] = reference @ difference / norms
    return scores


def with_torchmetrics(train_losses: Tensor, val_losses: Tensor, train_classes: Tensor, val_classes: Tensor) -> Tensor:
    """CLD from its definition, with torchmetrics' correlation of all columns at once."""
    members = torch.nn.functional.one_hot(val_classes).float()
    reference = (val_losses @ members / members.sum(dim=0)).diff(dim=0)
    return pearson_corrcoef(train_losses.diff(dim=0), reference[:, train_classes])


def make_losses(samples: int, checkpoints: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train losses, validation losses with 50 samples per class, and the classes of both."""
    generator = torch.Generator().manual_seed(0)
    train_losses = torch.rand(checkpoints, samples, generator=generator)
    val_losses = torch.rand(checkpoints, 50 * classes, generator=generator)
    train_classes = torch.randint(classes, (samples,), generator=generator)
    return train_losses, val_losses, train_classes, torch.arange(50 * classes) % classes


def seconds_of(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def extra_memory(call: Callable[[], Any]) -> float | None:
    """Peak bytes of the process during the call, minus its bytes before; None if the system does not report them."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    reset.write_text("5", encoding="ascii")  # resets the peak
    before = _kibibytes(status, "VmRSS")
    call()
    return 1024.0 * (_kibibytes(status, "VmHWM") - before)


def _kibibytes(status: Path, name: str) -> int:
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(samples: int, checkpoints: int, classes: int, repeats: int, most: int) -> list[str]:
    """One line of the table."""
    losses = make_losses(samples, checkpoints, classes)
    arrays = [tensor.numpy() for tensor in losses]
    calls: list[Callable[[], Any]] = [lambda: cld_scores(*losses), lambda: per_class_numpy(*arrays)]
    if samples <= most:
        calls.append(lambda: with_torchmetrics(*losses))
    memory = extra_memory(calls[0])  # first, before earlier calls leave freed memory
    results = [np.asarray(call()) for call in calls]  # also a warm-up
    rounds = [[seconds_of(call) for call in calls] for _ in tqdm(range(repeats), desc=f"{samples:,} samples")]
    size = losses[0].numel() * losses[0].element_size()
    line = [f"{samples:,}", f"{statistics.median(seconds[0] for seconds in rounds):.4f}"]
    line.append("" if memory is None else f"{memory / size:.1%}")
    for other, result in enumerate(results[1:], start=1):
        line.append(f"{statistics.median(seconds[other] for seconds in rounds):.3f}")
        line.append(f"{statistics.median(seconds[other] / seconds[0] for seconds in rounds):.1f}")
        line.append(f"{float(np.abs(results[0] - result).max()):.0e}")
    return line + [""] * (9 - len(line))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time and memory of cld_scores against per-class numpy.")
    add, known = parser.add_argument, "(default: %(default)s)"
    sizes = [10_000, 100_000, 1_281_167, 10_000_000]
    add("--samples", type=int, nargs="+", default=sizes, help=f"numbers of samples {known}")
    add("--checkpoints", type=int, default=91, help=known)
    add("--classes", type=int, default=1_000, help=known)
    add("--repeats", type=int, default=5, help=f"rounds of timing {known}")
    add("--torchmetrics-up-to", type=int, default=2_000_000, help=f"largest number of samples for torchmetrics {known}")
    args = parser.parse_args(argv)
    lines = [
        measure(samples, args.checkpoints, args.classes, args.repeats, args.torchmetrics_up_to)
        for samples in args.samples
    ]
    head = ["samples", "cld_scores, s", "extra memory"]
    for other in ("numpy", "torchmetrics"):
        head += [f"{other}, s", f"{other} / cld_scores", f"{other}: apart"]
    print(f"{args.checkpoints} checkpoints, {args.classes:,} classes, {torch.get_num_threads()} threads")
    print(markdown(head, lines))


if __name__ == "__main__":
    main()
