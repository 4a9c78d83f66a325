"""What does logging cost? Fits with and without `CLDCallback`, and a sweep against a minimal evaluation loop.

    python examples/benchmarks/overhead.py --root DIR
    python examples/benchmarks/overhead.py --case resnet18 --samples 256

All variants run in turn, round after round, in one process. A ratio is the median over the rounds of the ratios within
one round. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from _grid import markdown
from _runs import PRESETS, Classifier, Images, Splits, load, quiet, quiet_trainer
from _steps import SteppingClassifier, indexed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from tqdm import tqdm

from lightning_cld import CLDCallback, LossTrajectories, proportional_holdout
from lightning_cld.recording.batch_hooks import BatchHooks
from lightning_cld.recording.batch_losses import make_step
from lightning_cld.recording.settling import Settling
from lightning_cld.recording.sweep import Sweep

EPOCHS = 9  # of every fit; a sweep every 3rd epoch needs 9 for enough checkpoints
PLAIN = "without the callback"
WAYS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "sweep every epoch": {},
    "the same, running history": {"history": "running"},
    "sweep every 3rd epoch": {"every_n_epochs": 3},
    "steps": {"record": "step"},
}


class OneByOne(Dataset):
    """The same images, read one by one as in most datasets, for the default collate function."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index]


def make_splits(case: str, samples: int, root: Path) -> Splits:
    """Fashion-MNIST's first images, or noise in the shape of CIFAR-10; 10 % become the validation split."""
    if case == "fashion-mnist":
        pool, test = load(case, root)
        pool = Images(pool.images[: samples * 10 // 9], pool.targets[: samples * 10 // 9])
    else:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (samples * 10 // 9, 3, 32, 32), dtype=torch.uint8, generator=generator)
        pool = test = Images(images, torch.arange(len(images)) % 10)
    train, val = proportional_holdout(pool.targets, 0.1)
    return Splits(
        *(Images(pool.images[part], pool.targets[part]) for part in (train, val)),
        test,
        PRESETS["fashion-mnist"].batch_size,
    )


def make_model(case: str, splits: Splits, kind: type[Classifier] = Classifier) -> Classifier:
    model = kind("fashion-mnist", splits.train, 0.01, seed=0, network="cnn8")
    if case == "resnet18":
        model.network = resnet18(num_classes=10).to(memory_format=torch.channels_last)
    return model


class Epochs(L.Callback):
    """Times each epoch, including the callbacks at its end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return statistics.median(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))


def time_fit(case: str, splits: Splits, watching: dict[str, Any] | None) -> tuple[float, float]:
    """Seconds of a whole fit, theta_0 included, and of its median epoch."""
    steps = watching is not None and watching.get("record") == "step"
    model = make_model(case, splits, SteppingClassifier if steps else Classifier)
    epochs = Epochs()
    with TemporaryDirectory() as folder:
        callbacks = [] if watching is None else [CLDCallback(dirpath=folder, **watching)]
        trainer = quiet_trainer(EPOCHS, *callbacks, epochs)
        started = time.perf_counter()
        trainer.fit(model, datamodule=indexed(splits) if steps else splits)
        return time.perf_counter() - started, epochs.seconds


def compare_fits(case: str, splits: Splits, rounds: int) -> tuple[list[list[str]], float]:
    """Lines for the table of fits, and the seconds of a plain epoch."""
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    time_fit(case, splits, None)  # a warm-up: the first fit is slower
    for _ in tqdm(range(rounds), desc="fits"):
        for way, watching in WAYS.items():
            times[way].append(time_fit(case, splits, watching))
    lines = []
    for way, own in times.items():
        fits, epochs = (
            statistics.median(part[i] / plain[i] for part, plain in zip(own, times[PLAIN], strict=True)) for i in (0, 1)
        )
        lines.append([way, f"{statistics.median(fit for fit, _ in own):.2f}", f"{fits:.3f}", f"{epochs:.3f}"])
    return lines, statistics.median(epoch for _, epoch in times[PLAIN])


def bare_pass(model: Classifier, reader: DataLoader) -> None:
    """A minimal evaluation that keeps no results."""
    model.eval()
    with torch.no_grad():
        for images, _ in reader:
            model(images.to(model.device, non_blocking=True))
    if model.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def sweeping(model: Classifier, loader: DataLoader, batch_size: int) -> Iterator[Callable[[], None]]:
    """A sweep of the train set, as the callback runs it at every checkpoint."""
    trainer = quiet_trainer(1)
    trainer.strategy.connect(model)
    trainer.strategy.model_to_device()
    keep = loader.persistent_workers
    sweep = Sweep(loader, torch.arange(len(loader.dataset)), batch_size=batch_size, kind="train", keep_workers=keep)
    step = make_step(model, None)

    def run() -> None:
        sweep.run(trainer, model, step, BatchHooks([], model))
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    yield run


def compare_sweeps(case: str, splits: Splits, rounds: int, plain_epoch: float | None) -> list[list[str]]:
    """Lines for the table of sweeps."""
    model, lines = make_model(case, splits), []
    for reading, workers, batch_size in [
        ("a batch at a time", 0, 64),
        ("a batch at a time", 0, 256),
        ("a batch at a time", 0, 1024),
        ("one by one", 0, 64),
        ("one by one", 2, 64),
        ("one by one", 2, 1024),
    ]:
        together = reading != "one by one"
        dataset = splits.train if together else OneByOne(splits.train)
        settings: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
        if together:
            settings["collate_fn"] = splits.train_dataloader().collate_fn
        reader = DataLoader(dataset, batch_size, **settings)
        pairs = []
        with sweeping(model, DataLoader(dataset, 64, shuffle=True, **settings), batch_size) as sweep:
            for number in tqdm(range(rounds + 1), desc=f"{reading}, {workers} workers, {batch_size}"):
                pair = seconds_of(sweep), seconds_of(lambda reader=reader: bare_pass(model, reader))
                if number:  # the first round starts the workers and is not counted
                    pairs.append(pair)
        own = statistics.median(ours for ours, _ in pairs)
        lines.append(
            [
                reading,
                f"{workers}",
                f"{batch_size}",
                f"{own:.3f}",
                f"{statistics.median(ours / bare for ours, bare in pairs):.3f}",
                "" if plain_epoch is None else f"{own / plain_epoch:.2f}",
            ]
        )
    return lines


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


def seconds_of(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The time of fits with and without the callback, and of sweeps.")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--case", choices=["fashion-mnist", "resnet18"], default="fashion-mnist", help=f"resnet18: on noise {known}")
    add("--root", type=Path, default=Path("data"), help=f"folder of torchvision's datasets {known}")
    add("--samples", type=int, default=5_400, help=f"samples in the train set {known}")
    add("--rounds", type=int, default=5, help=f"rounds of timing {known}")
    add("--skip-fits", action="store_true", help="time only sweeps")
    args = parser.parse_args(argv)
    quiet()
    splits, plain_epoch = make_splits(args.case, args.samples, args.root), None
    title = f"{args.case}, {len(splits.train):,} train and {len(splits.val):,} validation samples"
    device = "cuda" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{title}, {EPOCHS} epochs, medians of {args.rounds} rounds, {device}\n")
    if not args.skip_fits:
        lines, plain_epoch = compare_fits(args.case, splits, args.rounds)
        print(markdown(["fit", "seconds", "fit / plain fit", "epoch / plain epoch"], lines), "\n")
    head = ["reading", "workers", "batch size", "sweep, s", "sweep / bare loop", "sweep / plain epoch"]
    sweeps = compare_sweeps(args.case, splits, args.rounds, plain_epoch)
    print(markdown(head, sweeps), "\n")
    settling = time_settling(splits, args.rounds)
    print(
        f'cutoff_epoch="auto": {settling:.4f} s a checkpoint, {settling / float(sweeps[0][3]):.1%} of the first sweep'
    )


if __name__ == "__main__":
    main()
