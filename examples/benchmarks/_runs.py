"""What the benchmarks share: faulty data, a proxy's logged losses, and a target's accuracy.

Every random draw derives its own seed from the cell's seed, so no two draws are the same.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from _grid import run_cells
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from lightning_cld import CLDCallback, CoresetDataModule, LossTrajectories, proportional_holdout

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are scripts, not a package
from _common import NETWORKS, Classifier, Images, Preset, Splits, flip_labels, load, quiet, quiet_trainer
from _steps import SteppingClassifier, indexed
from _tables import PRESETS, is_table, load_table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """The data, the proxy and the seed: everything that determines a proxy's losses."""

    dataset: str
    network: str
    epochs: int  # epochs of the proxy
    noise: float  # share of the train labels made wrong
    noise_kind: str  # "symmetric": any other class; "pair": the next class
    val_noise: float  # share of the validation labels made wrong
    imbalance: float  # size of the first class divided by size of the last
    seed: int
    holdout: float | None = None  # share for the validation split; None uses the preset
    pool: int | None = None  # samples of the pool that are used, as many of each class as its share; None uses all

    @classmethod
    def of(cls, cell: dict[str, Any]) -> Case:
        return cls(**{field.name: cell[field.name] for field in fields(cls) if field.name in cell})


@dataclass(frozen=True)
class Settings:
    """The folder of the data, the folder of finished proxies, and the steps of a target."""

    root: Path
    work: Path
    steps: int


@functools.lru_cache(maxsize=1)
def _load(name: str, root: Path) -> tuple[Images, Images]:
    return load_table(root / f"{name}.npz") if is_table(name) else load(name, root)


@functools.lru_cache(maxsize=2)
def make_splits(case: Case, root: Path) -> tuple[Splits, Tensor]:
    """Makes the datamodule, and a mask of the wrong train labels.

    Train and validation labels can be made wrong. Test labels stay as they are.
    """
    return divide(case, PRESETS[case.dataset], *_load(case.dataset, root))


def divide(case: Case, preset: Preset, pool: Images, test: Images) -> tuple[Splits, Tensor]:
    """The same for data that are given."""
    seed = case.seed
    kept = _imbalanced(pool.targets, case.imbalance, seed)
    if case.pool is not None:
        _, part = proportional_holdout(pool.targets[kept], case.pool / len(kept), seed=6000 + seed)
        kept = kept[part]
    holdout = preset.holdout if case.holdout is None else case.holdout
    train, val = (kept[part] for part in proportional_holdout(pool.targets[kept], holdout, seed=seed))
    train_labels = flip_labels(pool.targets[train], case.noise, 1000 + seed, case.noise_kind)
    val_labels = flip_labels(pool.targets[val], case.val_noise, 4000 + seed, case.noise_kind)
    parts = Images(pool.images[train], train_labels), Images(pool.images[val], val_labels)
    return Splits(*parts, test, preset.batch_size), train_labels != pool.targets[train]


def _imbalanced(targets: Tensor, factor: float, seed: int) -> Tensor:
    """Sorted positions whose class sizes fall geometrically, by `factor` from the first class to the last."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(5000 + seed))
    classes, kept = int(targets.max()) + 1, []
    for label in range(classes):
        members = order[targets[order] == label]
        kept.append(members[: round(len(members) * factor ** (-label / (classes - 1)))])
    return torch.cat(kept).sort().values


@dataclass(frozen=True)
class Proxy:
    """The losses that one proxy run logged, and their cost."""

    trajectories: LossTrajectories
    fit_seconds: float  # whole run, sweeps included
    sweep_seconds: float

    @property
    def epochs_paid(self) -> float:
        """The time of the run, in epochs of plain training."""
        return self.trajectories.epochs[-1] * self.fit_seconds / (self.fit_seconds - self.sweep_seconds)


def run_proxy(case: Case, settings: Settings, record: str = "sweep") -> Proxy:
    """Trains the proxy with `CLDCallback(record=...)`, or loads the result of an earlier call."""
    name = "-".join(str(value) for value in vars(case).values() if value is not None)
    folder = settings.work / (name if record == "sweep" else f"{name}-{record}")
    done = folder / "proxy.json"  # written last
    if not done.exists():
        quiet()
        splits, _ = make_splits(case, settings.root)
        preset = PRESETS[case.dataset]
        cld = CLDCallback(record=record, dirpath=folder)
        splits, kind = (splits, Classifier) if record == "sweep" else (indexed(splits), SteppingClassifier)
        model = kind(case.dataset, splits.train, preset.lr, seed=case.seed, network=case.network)
        started = time.perf_counter()
        with warnings.catch_warnings():
            # The files of a proxy that was killed are overwritten, which warns.
            warnings.simplefilter("ignore")
            quiet_trainer(case.epochs, cld).fit(model, datamodule=splits)
        seconds = time.perf_counter() - started
        costs = {"fit_seconds": seconds, "sweep_seconds": cld.trajectories.metadata["sweep_seconds"]}
        temporary = done.with_suffix(".tmp")  # a partly written file would look finished
        temporary.write_text(json.dumps(costs), encoding="utf-8")
        temporary.replace(done)
    return _read_proxy(folder)


@functools.lru_cache(maxsize=4)
def _read_proxy(folder: Path) -> Proxy:
    costs = json.loads((folder / "proxy.json").read_text(encoding="utf-8"))
    return Proxy(LossTrajectories.load(folder / "cld-trajectories.npz"), **costs)


def train_target(
    case: Case,
    settings: Settings,
    positions: Tensor | None,
    *callbacks: L.Callback,
    network: str,
    budget: str,
    held_out: bool = False,
) -> dict[str, Any]:
    """Trains a fresh model on a coreset and tests it.

    Args:
        case: The data and the seed.
        settings: The folder of the data, and the number of steps.
        positions: The coreset; None trains on all samples.
        callbacks: Added to the Trainer.
        network: The network of the target.
        budget: "steps" trains for the steps in `settings`, whatever the coreset's size; "epochs" trains for the
            proxy's number of epochs.
        held_out: Train on the validation split instead of the train set.
    """
    quiet()
    splits, wrong = make_splits(case, settings.root)
    preset = PRESETS[case.dataset]
    everything = len(splits.train)
    if held_out:
        splits = Splits(splits.val, splits.val, splits.test, preset.batch_size)
        wrong = torch.full((len(splits.train),), case.val_noise)
    kept = torch.arange(len(splits.train)) if positions is None else positions
    steps, epochs = (settings.steps, None) if budget == "steps" else (-1, case.epochs)
    data = CoresetDataModule(splits, kept, epoch_length="full" if budget == "steps" else "coreset")
    # Not the proxy's seed: a coreset should work for other initial weights too.
    target = Classifier(case.dataset, splits.train, preset.lr, seed=3000 + case.seed, network=network)
    trainer = quiet_trainer(epochs, *callbacks, steps=steps)
    started = time.perf_counter()
    trainer.fit(target, datamodule=data)
    seconds = time.perf_counter() - started
    accuracy = 100 * trainer.test(target, datamodule=data, verbose=False)[0]["test_accuracy"]
    return {
        "samples": len(kept),
        "wrong": round(float(wrong[kept].float().mean()), 4),
        "steps": trainer.global_step,
        "accuracy": round(accuracy, 2),
        "training_seconds": round(seconds, 1),
        "training_epochs": round(trainer.global_step * preset.batch_size / everything, 2),
    }


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman correlation over the samples that are scored in both."""
    scored = ~(first.isnan() | second.isnan())
    return float(spearman_corrcoef(first[scored], second[scored]))


def overlap(first: Tensor, second: Tensor) -> float:
    """The share of one coreset that is also in another of the same size."""
    return float(torch.isin(first, second).double().mean())


def proxy_cell(args: argparse.Namespace, *, seed: int, noise: float, **others: Any) -> dict[str, Any]:
    """The cell of a proxy: data with symmetric label noise in the train set only, unless `others` says otherwise."""
    cell = {"dataset": args.dataset, "network": args.network, "epochs": args.epochs, "noise": noise}
    return {**cell, "noise_kind": "symmetric", "val_noise": 0.0, "imbalance": 1.0, "seed": seed, **others}


def target_cell(proxy: dict[str, Any], settings: Settings, **others: Any) -> dict[str, Any]:
    """The cell of a target. It includes the number of steps, so a row with another number is not reused."""
    return {**proxy, **others, "of_steps": settings.steps}


def train_proxies(cells: Sequence[dict[str, Any]], args: argparse.Namespace, settings: Settings) -> None:
    """Trains the proxies first: otherwise two workers might train the same one."""
    csv = args.work / f"{args.csv.stem}_proxies.csv"
    run_cells(csv, cells, functools.partial(_train_proxy, settings=settings), jobs=args.jobs)


def _train_proxy(cell: dict[str, Any], settings: Settings) -> dict[str, Any]:
    proxy = run_proxy(Case.of(cell), settings, cell.get("record", "sweep"))
    return {"fit_seconds": round(proxy.fit_seconds, 1), "sweep_seconds": round(proxy.sweep_seconds, 1)}


def add_common_arguments(parser: argparse.ArgumentParser, csv: str) -> None:
    """Adds the arguments that all benchmarks share."""
    add = parser.add_argument
    known = "(default: %(default)s)"
    add("--dataset", choices=PRESETS, default="fashion-mnist", help=f"digits need no files {known}")
    add("--root", type=Path, default=Path("data"), help=f"folder of torchvision's datasets, images or tables {known}")
    add("--network", choices=NETWORKS, help="network of the proxy and the targets (default: by dataset)")
    add("--epochs", type=int, help="epochs of the proxy (default: by dataset)")
    add("--steps", type=int, help="steps of every target, unless epochs are equal (default: by dataset)")
    add("--seeds", type=int, default=3, help=f"number of seeds {known}")
    add("--jobs", type=int, default=1, help=f"worker processes; several get one thread each {known}")
    what = "finished cells, which are not run again; use one CSV per image folder"
    add("--csv", type=Path, default=RESULTS / csv, help=f"{what} {known}")
    add("--work", type=Path, default=Path("benchmark-runs"), help=f"folder of finished proxies {known}")


def complete(args: argparse.Namespace) -> Settings:
    """Fills in the defaults for the dataset."""
    preset = PRESETS[args.dataset]
    args.network = args.network or preset.network
    args.epochs = args.epochs or preset.epochs
    # Only the CSV's name tells image folders apart.
    args.work = (args.work / args.csv.stem if args.dataset == "folder" else args.work).absolute()
    return Settings(args.root.absolute(), args.work, args.steps or preset.steps)
