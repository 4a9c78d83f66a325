"""Do time and memory grow in step with the samples? Seconds and peak memory of every public call on tensors.

    python examples/benchmarks/scale.py
    python examples/benchmarks/scale.py --samples 100000 1000000 --checkpoints 30

Every call runs in a process of its own, which makes its losses or scores first. The seconds are of the processor, the
median of a few rounds for calls that are over soon. The extra memory is the process's peak during one call, minus what
it held before (Linux only). Losses and scores are random, because only their number matters. "two reads" sums all train
losses twice, and "np.save" writes them: the least that a call on all losses could cost. The last column is the exponent
of the growth from the smallest to the largest number of samples: 1 is linear. Rows that the CSV holds are not run
again, so a run that was killed goes on. 10,000,000 samples at 91 checkpoints are 3.6 GB of losses, and the process that
holds them may take 12 GB. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _grid import Row, markdown, run_cells
from _runs import RESULTS
from lightning.pytorch import LightningDataModule
from scoring import extra_memory, make_losses
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from lightning_cld import CLDMetric, CLDScores, CoresetDataModule, LossTrajectories, SampleNames, plotting
from lightning_cld.data.loaders import sampled_positions
from lightning_cld.recording.settling import Settling

_ROUNDS, _LONG = 3, 20.0
"""A call is timed so often, or once if the first time takes more seconds than `_LONG`."""

Made = Callable[[], Any]


class Case:
    """What the calls are made on. Each part is made when it is first asked for."""

    def __init__(self, samples: int, checkpoints: int, classes: int, folder: Path) -> None:
        self.samples, self.checkpoints, self.classes, self.folder = samples, checkpoints, classes, folder
        self.generator = torch.Generator().manual_seed(0)

    def trajectories(self) -> LossTrajectories:
        return LossTrajectories(*make_losses(self.samples, self.checkpoints, self.classes))

    def scores(self) -> CLDScores:
        values, plausibility, confidence = (torch.rand(self.samples, generator=self.generator) for _ in range(3))
        epochs = list(range(self.checkpoints))
        return CLDScores(2 * values - 1, self.of_sample(), epochs, plausibility=plausibility, confidence=confidence)

    def of_sample(self) -> torch.Tensor:
        return torch.randint(self.classes, (self.samples,), generator=self.generator)

    def datamodule(self) -> LightningDataModule:
        return LightningDataModule.from_datasets(TensorDataset(torch.empty(self.samples, 1), self.of_sample()))


def _of_losses(call: Callable[[LossTrajectories, Case], Any]) -> Callable[[Case], Made]:
    def make(case: Case) -> Made:
        trajectories = case.trajectories()
        return lambda: call(trajectories, case)

    return make


def _of_scores(call: Callable[[CLDScores, Case], Any]) -> Callable[[Case], Made]:
    def make(case: Case) -> Made:
        scores = case.scores()
        return lambda: call(scores, case)

    return make


def _record(case: Case) -> Made:
    train, val, *classes = make_losses(case.samples, 1, case.classes)

    def call() -> None:
        trajectories = LossTrajectories(train, val, *classes)
        trajectories.reserve(case.checkpoints)
        for epoch in range(1, case.checkpoints):
            trajectories.record(epoch, train[0], val[0])

    return call


def _load(case: Case, made: LossTrajectories | CLDScores) -> Made:
    path = made.save(case.folder / "saved.npz")
    return lambda: type(made).load(path)


def _update(case: Case) -> Made:
    train, val, *classes = make_losses(case.samples, 1, case.classes)
    metric = CLDMetric(*classes)
    metric.update(train[0], val[0])
    return lambda: metric.update(train[0], val[0])


def _compute(case: Case) -> Made:
    train, val, *classes = make_losses(case.samples, 6, case.classes)
    metric = CLDMetric(*classes)
    for train_row, val_row in zip(train[:-1], val[:-1], strict=True):
        metric.update(train_row, val_row)

    def call() -> None:
        metric._computed = None  # else torchmetrics gives what it computed before
        metric.compute()

    return call


def _settling(case: Case) -> Made:
    """One look at a new checkpoint, after six."""
    trajectories = LossTrajectories(*make_losses(case.samples, 30, case.classes))
    train, val = trajectories.train_losses, trajectories.val_losses
    followed = LossTrajectories(train[:1], val[:1], trajectories.train_classes, trajectories.val_classes)
    settling = Settling()
    followed.reserve(30)

    def add() -> None:
        followed.record(len(followed), train[len(followed)], val[len(followed)])
        settling.look(followed)

    for _ in range(6):
        add()
    return add


def _from_positions(case: Case) -> Made:
    datamodule = case.datamodule()
    positions = torch.randperm(case.samples, generator=case.generator)[: case.samples // 2]
    return lambda: CoresetDataModule(datamodule, positions).train_dataloader()


def _from_scores(case: Case) -> Made:
    datamodule, scores = case.datamodule(), case.scores()
    return lambda: CoresetDataModule(datamodule, scores, fraction=0.5)


def _sampler(case: Case) -> Made:
    positions = torch.randperm(case.samples, generator=case.generator)[: case.samples // 2]
    dataset = TensorDataset(torch.empty(case.samples, 1))
    loader = DataLoader(dataset, sampler=SubsetRandomSampler(positions.tolist()))
    return lambda: sampled_positions(loader)


def _texts(case: Case) -> Iterator[str]:
    """Names of 20 letters, made one by one as a stream would."""
    return (f"shard-{place // 1_000:05}/{place:08}" for place in range(case.samples))


def _find(case: Case) -> Made:
    """The names of 100 batches of 256, each from all over."""
    names = SampleNames(_texts(case))
    batches = [names[torch.randint(case.samples, (256,), generator=case.generator)] for _ in range(100)]
    return lambda: [names.find(batch) for batch in batches]


CALLS: dict[str, Callable[[Case], Made]] = {
    "two reads": _of_losses(lambda t, _: (t.train_losses.sum(), t.train_losses.sum())),
    "np.save": _of_losses(lambda t, case: np.save(case.folder / "plain.npy", t.train_losses.numpy())),
    "LossTrajectories.record, all checkpoints": _record,
    "LossTrajectories.values": _of_losses(lambda t, _: t.values()),
    "LossTrajectories.score": _of_losses(lambda t, _: t.score()),
    "LossTrajectories.save": _of_losses(lambda t, case: t.save(case.folder / "losses.npz")),
    "LossTrajectories.load": lambda case: _load(case, case.trajectories()),
    "LossTrajectories.state_dict": _of_losses(lambda t, _: t.state_dict()),
    "plot_agreement": _of_losses(lambda t, _: plotting.plot_agreement(t)),
    "plot_trajectories": _of_losses(lambda t, _: plotting.plot_trajectories(t)),
    "CLDScores.report, with losses": _of_losses(
        lambda t, case: t.score().report(case.folder / "page.html", trajectories=t)
    ),
    "CLDScores.report": _of_scores(lambda s, case: s.report(case.folder / "page.html")),
    "CLDScores.select, top": _of_scores(lambda s, _: s.select(fraction=0.1)),
    "CLDScores.select, draw": _of_scores(lambda s, _: s.select(fraction=0.1, rule="draw")),
    "CLDScores.suspects": _of_scores(lambda s, _: s.suspects()),
    "CLDScores.summary": _of_scores(lambda s, _: s.summary()),
    "CLDScores.save": _of_scores(lambda s, case: s.save(case.folder / "scores.npz")),
    "CLDScores.load": lambda case: _load(case, case.scores()),
    "CLDScores.to_csv": _of_scores(lambda s, case: s.to_csv(case.folder / "scores.csv")),
    "plot_scores": _of_scores(lambda s, _: plotting.plot_scores(s, fraction=0.1)),
    "CLDMetric.update": _update,
    "CLDMetric.compute": _compute,
    "CoresetDataModule, positions": _from_positions,
    "CoresetDataModule, scores": _from_scores,
    "reading a SubsetRandomSampler": _sampler,
    "settling, one look": _settling,
    "SampleNames, making": lambda case: lambda: SampleNames(_texts(case)),
    "SampleNames.find, 100 batches of 256": _find,
}
_BY_SAMPLES = ("CLDScores.", "plot_scores", "CLDMetric", "CoresetDataModule", "reading", "settling", "SampleNames")
"""Calls whose time does not depend on the checkpoints. They are measured for the first number of these only."""


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Seconds and extra memory of one call, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(cell["samples"], cell["checkpoints"], cell["classes"], Path(folder))
        call = CALLS[cell["call"]](case)
        took: list[float] = []

        def timed() -> None:
            started = time.process_time()
            call()
            took.append(time.process_time() - started)

        memory = extra_memory(timed)
        while len(took) < _ROUNDS and took[0] < _LONG:
            timed()
    return {"seconds": round(statistics.median(took), 4), "extra_bytes": "" if memory is None else int(memory)}


def in_own_process(cell: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process that has held nothing before."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{cell} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: Iterable[Row]) -> str:
    """The table: a line for each call and number of checkpoints, seconds and MiB for each number of samples."""
    found = {(row["call"], int(row["checkpoints"]), int(row["samples"])): row for row in rows}
    sizes = sorted({samples for *_, samples in found})
    lines = []
    for call, checkpoints in sorted({key[:2] for key in found}, key=lambda key: (list(CALLS).index(key[0]), key[1])):
        own = {samples: found[call, checkpoints, samples] for samples in sizes if (call, checkpoints, samples) in found}
        line = [call, "" if call.startswith(_BY_SAMPLES) and "losses" not in call else str(checkpoints)]
        for samples in sizes:
            row = own.get(samples)
            memory = "" if row is None or row["extra_bytes"] == "" else f"{int(row['extra_bytes']) / 2**20:,.0f}"
            line += ["" if row is None else f"{float(row['seconds']):.3f}", memory]
        lines.append([*line, _growth({samples: float(row["seconds"]) for samples, row in own.items()})])
    head = ["call", "checkpoints"]
    for samples in sizes:
        head += [f"{samples:,}: s", "MiB"]
    return markdown([*head, "growth"], lines)


def _growth(seconds: dict[int, float]) -> str:
    """The exponent of the growth of the seconds in the samples."""
    first, last = min(seconds), max(seconds)
    if first == last or min(seconds.values()) <= 0:
        return ""
    return f"{math.log(seconds[last] / seconds[first]) / math.log(last / first):.2f}"


def cells(
    samples: Sequence[int], checkpoints: Sequence[int], classes: int, calls: Sequence[str]
) -> list[dict[str, Any]]:
    return [
        {"samples": size, "checkpoints": rows, "classes": classes, "call": call, "threads": torch.get_num_threads()}
        for size in sorted(samples)
        for call in calls
        for rows in (checkpoints[:1] if call.startswith(_BY_SAMPLES) and "losses" not in call else checkpoints)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time and memory of every public call on tensors.")
    add, known = parser.add_argument, "(default: %(default)s)"
    sizes = [100_000, 1_000_000, 10_000_000]
    add("--samples", type=int, nargs="+", default=sizes, help=f"numbers of samples {known}")
    add("--checkpoints", type=int, nargs="+", default=[30, 91], help=known)
    add("--classes", type=int, default=1_000, help=known)
    add("--calls", nargs="+", default=list(CALLS), choices=list(CALLS), metavar="CALL", help="calls to measure")
    add("--csv", type=Path, default=RESULTS / "scale.csv", help=f"where the results are kept {known}")
    add("--cell", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cell is not None:
        print(json.dumps(measure(args.cell)))
        return
    rows = run_cells(args.csv, cells(args.samples, args.checkpoints, args.classes, args.calls), in_own_process, jobs=1)
    numbers = [" ".join(map(str, values)) for values in (args.samples, args.checkpoints)]
    print(f"python examples/benchmarks/scale.py --samples {numbers[0]} --checkpoints {numbers[1]}", end=" ")
    print(f"--classes {args.classes}  # {torch.get_num_threads()} threads\n")
    print(table(rows))


if __name__ == "__main__":
    main()
