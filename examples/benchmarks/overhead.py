"""What does logging cost? The start of a run, its sweeps and its end, beside a bare loop; and whole fits.

    python examples/benchmarks/overhead.py
    python examples/benchmarks/overhead.py --case resnet18 --samples 512

The bare loop is a minimal evaluation of the same samples: through a DataLoader with the same settings and batch size,
in evaluation mode and without gradients, it writes each sample's cross-entropy into a row made before. Each sweep lies
between two passes of it, and is divided by their mean; what is shown is the median of many such ratios, and their
quartiles. All seconds are of the processor: of this process, and of worker processes, which end with each pass. So
other work on the machine disturbs little, but it does disturb.

The data are noise in memory: labels and pixels make no difference to the time.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from _grid import Row, markdown, read_rows, write_rows
from _runs import RESULTS, Classifier, Images, Splits, quiet, quiet_trainer
from _steps import SteppingClassifier, indexed
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from tqdm import tqdm

from lightning_cld import CLDCallback, LossTrajectories
from lightning_cld.recording.batch_hooks import BatchHooks
from lightning_cld.recording.batch_losses import make_step
from lightning_cld.recording.settling import Settling
from lightning_cld.recording.sweep import Sweep

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are scripts, not a package
from _common import OneByOne

CHECKPOINTS = 5  # of a run whose parts are measured
EPOCHS = 9  # of whole fits; a sweep every 3rd epoch needs 9 for enough checkpoints
BATCH_SIZE = 128
SHAPES = {"cnn": (1, 28, 28), "resnet18": (3, 32, 32)}
PLAIN = "without the callback"
WAYS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "sweep every epoch": {},
    "the same, running history": {"history": "running"},
    "sweep every 3rd epoch": {"every_n_epochs": 3},
    "steps": {"record": "step"},
}
READINGS = [  # whether a batch is read at once, workers, batch size
    (True, 0, 64),
    (True, 0, 128),
    (True, 0, 1024),
    (False, 0, 128),
    (False, 2, 128),
    (False, 2, 1024),
]
NAMES = ["case", "samples", "part", "what", "reading", "workers", "batch_size"]
"""What identifies a row of the CSV."""


def make_splits(case: str, samples: int) -> Splits:
    """Noise as train set, and an eighth as much for validation."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for size in (samples, samples // 8):
        images = torch.randint(256, (size, *SHAPES[case]), dtype=torch.uint8, generator=generator)
        parts.append(Images(images, torch.arange(size) % 10))
    return Splits(*parts, parts[1], BATCH_SIZE)


def make_model(case: str, splits: Splits, kind: type[Classifier] = Classifier) -> Classifier:
    model = kind("fashion-mnist", splits.train, 0.01, seed=0, network="cnn8")
    if case == "resnet18":
        model.network = resnet18(num_classes=10).to(memory_format=torch.channels_last)
    return model


def seconds_of(call: Callable[[], Any]) -> float:
    """Processor seconds of a call, in this process and in those that ended meanwhile."""
    before = _processor_seconds()
    call()
    return _processor_seconds() - before


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def bare_pass(model: Classifier, reader: DataLoader) -> Tensor:
    """The losses of a minimal evaluation."""
    row, start = torch.empty(len(reader.dataset), device=model.device), 0
    model.eval()
    with torch.no_grad():
        for images, targets in reader:
            images, targets = (part.to(model.device, non_blocking=True) for part in (images, targets))
            row[start : start + len(targets)] = F.cross_entropy(model(images), targets, reduction="none")
            start += len(targets)
    model.train()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return row


def row_of(seconds: Sequence[float], ratios: Sequence[float], **cell: Any) -> dict[str, Any]:
    """A row of the CSV."""
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * [*ratios]
    return {
        **{name: cell.get(name, "") for name in NAMES},
        "measured": len(ratios),
        "seconds": f"{statistics.median(seconds):.4f}",
        "ratio": f"{median:.3f}",
        "lower_quartile": f"{low:.3f}",
        "upper_quartile": f"{high:.3f}",
    }


# The parts of a run


class Bare(L.Callback):
    """Evaluates both sets by the bare loop wherever a checkpoint is due."""

    def __init__(self, splits: Splits) -> None:
        collate_fn = splits.train_dataloader().collate_fn
        self.readers = [DataLoader(part, BATCH_SIZE, collate_fn=collate_fn) for part in (splits.train, splits.val)]
        self.seconds: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds.append(seconds_of(lambda: [bare_pass(pl_module, reader) for reader in self.readers]))

    on_train_epoch_end = on_train_start


HOOKS = [name for name in vars(CLDCallback) if name.startswith("on_") or name in ("setup", "teardown", "state_dict")]


def run_parts(case: str, splits: Splits) -> dict[str, list[float]]:
    """Processor seconds of one run's start and end, each checkpoint's sweeps, and the bare loop around these."""
    spent: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = _processor_seconds()
            try:
                return call(*args, **kwargs)
            finally:
                spent[name].append(_processor_seconds() - before)

        return run

    before, after = Bare(splits), Bare(splits)
    with TemporaryDirectory() as folder:
        cld = CLDCallback(dirpath=folder)
        for name in ("_sweep", *HOOKS):
            setattr(cld, name, timed(name, getattr(cld, name)))
        trainer = quiet_trainer(CHECKPOINTS - 1, before, cld, after)
        trainer.fit(make_model(case, splits), datamodule=splits)
    sweeps = spent["_sweep"]
    start = spent["setup"] + spent["on_train_start"]
    everything = [seconds for name in HOOKS for seconds in spent[name]]
    return {
        "start": [sum(start) - sweeps[0]],
        "sweeps": sweeps,
        "end": [sum(everything) - sum(start) - sum(sweeps[1:])],
        "bare": [(one + other) / 2 for one, other in zip(before.seconds, after.seconds, strict=True)],
    }


def measure_parts(case: str, splits: Splits, rounds: int) -> Iterable[dict[str, Any]]:
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("start", "sweeps", "end")}
    for number in tqdm(range(rounds + 1), desc="runs"):
        run = run_parts(case, splits)
        if number:  # the first run in a process is slower
            bare = statistics.median(run["bare"])
            for name, (seconds, ratios) in found.items():
                seconds += run[name]
                pairs = zip(run[name], run["bare"] if name == "sweeps" else [bare], strict=True)
                ratios += [own / other for own, other in pairs]
    for name, (seconds, ratios) in found.items():
        yield row_of(seconds, ratios, part="run", what=name, batch_size=BATCH_SIZE)


# Sweeps by themselves


def measure_sweep(model: Classifier, loader: DataLoader, batch_size: int, rounds: int) -> tuple[list[float], ...]:
    """Processor seconds of sweeps of a train set, and their ratios to the bare loop's."""
    trainer = quiet_trainer(1)
    trainer.strategy.connect(model)
    trainer.strategy.model_to_device()
    step, hooks = make_step(model, None), BatchHooks([], model)
    everything = torch.arange(len(loader.dataset))
    sweep = Sweep(loader, everything, batch_size=batch_size, kind="train", fixed=True)
    settings = {"num_workers": loader.num_workers, "collate_fn": loader.collate_fn}
    reader = DataLoader(loader.dataset, batch_size, **settings)

    def swept() -> Tensor:
        row, classes = sweep.run(trainer, model, step, hooks)
        step.check_sets(classes, classes)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return row

    torch.testing.assert_close(swept(), bare_pass(model, reader))  # the first one of each is not counted
    seconds, ratios = [], []
    for _ in range(rounds):
        before = seconds_of(lambda: bare_pass(model, reader))
        seconds.append(seconds_of(swept))
        after = seconds_of(lambda: bare_pass(model, reader))
        ratios.append(2 * seconds[-1] / (before + after))
    return seconds, ratios


def measure_sweeps(case: str, splits: Splits, rounds: int) -> Iterable[dict[str, Any]]:
    model = make_model(case, splits)
    for together, workers, batch_size in tqdm(READINGS, desc="sweeps"):
        dataset = splits.train if together else OneByOne(splits.train)
        settings = {"collate_fn": splits.train_dataloader().collate_fn} if together else {}
        loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=workers, **settings)
        seconds, ratios = measure_sweep(model, loader, batch_size, rounds)
        reading = "a batch at a time" if together else "one by one"
        cell = {"reading": reading, "workers": workers, "batch_size": batch_size}
        yield row_of(seconds, ratios, part="sweep", what="train set", **cell)


# Whole fits


def run_fit(case: str, splits: Splits, watching: dict[str, Any] | None) -> float:
    """Processor seconds of a whole fit, theta_0 included."""
    steps = watching is not None and watching.get("record") == "step"
    model = make_model(case, splits, SteppingClassifier if steps else Classifier)
    with TemporaryDirectory() as folder:
        callbacks = [] if watching is None else [CLDCallback(dirpath=folder, **watching)]
        trainer = quiet_trainer(EPOCHS, *callbacks)
        return seconds_of(lambda: trainer.fit(model, datamodule=indexed(splits) if steps else splits))


def measure_fits(case: str, splits: Splits, rounds: int) -> Iterable[dict[str, Any]]:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    run_fit(case, splits, None)  # a warm-up: the first fit is slower
    for _ in tqdm(range(rounds), desc="fits"):
        for way, watching in WAYS.items():
            seconds[way].append(run_fit(case, splits, watching))
    for way, own in seconds.items():
        ratios = [one / plain for one, plain in zip(own, seconds[PLAIN], strict=True)]
        yield row_of(own, ratios, part="fit", what=way, batch_size=BATCH_SIZE)


def time_settling(splits: Splits, rounds: int) -> float:
    """Seconds that `cutoff_epoch="auto"` takes per checkpoint; the losses are random, as only their number matters."""
    generator = torch.Generator().manual_seed(0)
    classes = splits.train.targets, splits.val.targets
    rows = [[torch.rand(1, len(part), generator=generator) for part in classes] for _ in range(8 + rounds)]
    losses, settling, seconds = LossTrajectories(*rows[0], *classes), Settling(), []
    for epoch, (train, val) in enumerate(rows[1:], start=1):
        losses.record(epoch, train[0], val[0])
        seconds.append(seconds_of(lambda: settling.look(losses)))
    return statistics.median(seconds[-rounds:])


# Tables


def table(rows: Iterable[Row], part: str) -> str:
    """The rows of one part: "run", "sweep" or "fit"."""
    rows = [row for row in rows if row["part"] == part]
    told = {"sweep": ["case", "samples", "reading", "workers", "batch_size"]}.get(part, ["case", "samples", "what"])
    ratio = "of a plain fit" if part == "fit" else "of a bare pass"
    head = [name.replace("_", " ") for name in told]
    lines = [
        [
            *(row[name] for name in told),
            row["seconds"],
            row["ratio"],
            f"{row['lower_quartile']} to {row['upper_quartile']}",
            row["measured"],
        ]
        for row in rows
    ]
    return markdown([*head, "processor, s", ratio, "quartiles", "measured"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The time of fits with and without the callback, and of sweeps.")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--case", choices=SHAPES, default="cnn", help=f"the network {known}")
    add("--samples", type=int, default=8_192, help=f"samples in the train set {known}")
    add("--rounds", type=int, default=20, help=f"pairs of each sweep and the bare loop, and runs {known}")
    add("--fits", type=int, default=5, help=f"rounds of whole fits; 0 leaves them out {known}")
    add("--csv", type=Path, default=RESULTS / "overhead.csv", help=f"rows of the same cells are replaced {known}")
    args = parser.parse_args(argv)
    quiet()
    splits = make_splits(args.case, args.samples)
    command = f"--case {args.case} --samples {args.samples} --rounds {args.rounds} --fits {args.fits}"
    print(f"python examples/benchmarks/overhead.py {command}\n")
    device = "cuda" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{len(splits.train):,} train and {len(splits.val):,} validation samples, torch {torch.__version__}, {device}\n"
    )
    kept = {tuple(row[name] for name in NAMES): row for row in read_rows(args.csv)}
    parts = {
        "run": (measure_parts, args.rounds),
        "sweep": (measure_sweeps, args.rounds),
        "fit": (measure_fits, args.fits),
    }
    for part, (measure, rounds) in parts.items():
        if rounds == 0:
            continue
        rows = [
            {**{name: str(value) for name, value in row.items()}, "case": args.case, "samples": str(args.samples)}
            for row in measure(args.case, splits, rounds)
        ]
        kept |= {tuple(row[name] for name in NAMES): row for row in rows}
        write_rows(args.csv, kept.values())
        print(table(rows, part), "\n")
    settling = time_settling(splits, args.rounds)
    print(f'cutoff_epoch="auto": {settling:.4f} s a checkpoint')


if __name__ == "__main__":
    main()
