"""Checks the library on real data: does the order of the scores mean anything, and are half the epochs enough?

    python examples/benchmarks/fashion_mnist.py --root DIR

One proxy is trained on Fashion-MNIST under `CLDCallback`. Its scores after half of the epochs are compared with those
at the end; then models are trained on the tenth with the highest CLD, the tenth with the lowest, the tenth with the
highest CLD after half of the epochs, a random tenth with as many samples of every class, and everything. All of them
take the same number of steps.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_cld import CLDCallback, CoresetDataModule, proportional_holdout, select_top

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are scripts, not a package
from _common import PRESETS, Classifier, Images, Splits, Ticks, load, quiet, quiet_trainer

DATA = "fashion-mnist"
FRACTION = 0.1
HIGHEST, LOWEST, HALF_TIME = "highest CLD", "lowest CLD", "highest CLD, half the epochs"
RANDOM, EVERYTHING = "random per class", "everything"


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, for scores without ties, over samples that both score."""
    scored = ~(first.isnan() | second.isnan())
    ranks = [scores[scored].argsort().argsort().double() for scores in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def overlap(first: Tensor, second: Tensor) -> float:
    """The share of one coreset that is in another of the same size."""
    return float(torch.isin(first, second).double().mean())


def train_proxy(splits: Splits, epochs: int, bar: tqdm) -> tuple[CLDCallback, float]:
    """The callback of the finished run, and the run's seconds."""
    bar.set_description("proxy")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cld = CLDCallback(dirpath=folder)
        proxy = Classifier(DATA, splits.train, PRESETS[DATA].lr, seed=0)
        quiet_trainer(epochs, cld, Ticks(bar)).fit(proxy, datamodule=splits)
    return cld, time.perf_counter() - started


def train_target(splits: Splits, coreset: Tensor, epochs: int, seed: int, bar: tqdm) -> float:
    """The test accuracy, in percent, of a model trained on the coreset."""
    data = CoresetDataModule(splits, coreset.tolist(), epoch_length="full")
    target = Classifier(DATA, splits.train, PRESETS[DATA].lr, seed=1000 + seed)
    trainer = quiet_trainer(epochs, Ticks(bar))
    trainer.fit(target, datamodule=data)
    return 100 * trainer.test(target, datamodule=data, verbose=False)[0]["test_accuracy"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Checks CLD on Fashion-MNIST.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="where Fashion-MNIST is, or is downloaded to")
    parser.add_argument("--epochs", type=int, default=20, help="of the proxy")
    parser.add_argument("--target-epochs", type=int, default=5, help="of a target, each with as many steps as on all")
    parser.add_argument("--seeds", type=int, default=3, help="how many targets on every coreset")
    args = parser.parse_args(argv)
    half = args.epochs // 2
    if half < 3 or args.target_epochs < 1 or args.seeds < 1:
        parser.error("--epochs must be at least 6 (CLD needs 3 in the first half), --target-epochs and --seeds 1.")

    quiet()
    pool, test = load(DATA, args.root)
    train, val = proportional_holdout(pool.targets, 0.1)
    parts = [Images(pool.images[part], pool.targets[part]) for part in (train, val)]
    splits = Splits(*parts, test, PRESETS[DATA].batch_size)

    methods = (HIGHEST, HALF_TIME, RANDOM, LOWEST, EVERYTHING)
    accuracy: dict[str, list[float]] = {method: [] for method in methods}
    total = args.epochs + len(methods) * args.seeds * args.target_epochs
    with tqdm(total=total, unit="epoch", mininterval=1) as bar:
        cld, proxy_seconds = train_proxy(splits, args.epochs, bar)
        scores, early = cld.scores, cld.trajectories.score(cutoff_epoch=half)
        coresets = {
            HIGHEST: scores.select(fraction=FRACTION),
            HALF_TIME: early.select(fraction=FRACTION),
            LOWEST: select_top(-scores.values, scores.classes, fraction=FRACTION),
            EVERYTHING: torch.arange(len(scores)),
        }
        started = time.perf_counter()
        for seed in range(args.seeds):
            chance = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed))
            coresets[RANDOM] = select_top(chance, scores.classes, fraction=FRACTION)
            for method in methods:
                bar.set_description(f"seed {seed}: {method}")
                accuracy[method].append(train_target(splits, coresets[method], args.target_epochs, seed, bar))
        target_seconds = time.perf_counter() - started

    given = sys.argv[1:] if argv is None else list(argv)
    print(shlex.join(["python", "examples/benchmarks/fashion_mnist.py", *given]))
    packages = ("lightning-cld", "lightning", "torch", "torchvision")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    print(", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages), device]))

    print(f"\nFashion-MNIST, {len(splits.train):,} train, {len(splits.val):,} validation and {len(test):,} test images")
    print(
        f"scores after {half} of {args.epochs} epochs and at the end: rank correlation "
        f"{rank_correlation(early.values, scores.values):.3f}, their {FRACTION:.0%} coresets share "
        f"{overlap(coresets[HIGHEST], coresets[HALF_TIME]):.0%}; {float((scores.values < 0).double().mean()):.1%} of "
        "the scores are negative"
    )
    print(f"\n{'trained on':<30} samples  test accuracy ({args.seeds} seed(s), {args.target_epochs} epochs' steps)")
    for method, values in accuracy.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{method:<30} {len(coresets[method]):>7,}  {statistics.fmean(values):.1f} +- {spread:.1f}")

    sweeps = scores.metadata["sweep_seconds"]
    print(
        f"\nseconds: proxy {proxy_seconds:.0f}, of which {sweeps:.0f} for {len(scores.epochs)} sweeps; "
        f"{len(methods) * args.seeds} targets {target_seconds:.0f}"
    )


if __name__ == "__main__":
    main()
