"""Can one tune on a tenth? Twenty configurations trained on everything, and on what costs a tenth of that.

    python examples/benchmarks/tuning.py --dataset digits
    python examples/benchmarks/tuning.py --dataset letter --root TABLES
    python examples/benchmarks/tuning.py --dataset landsat --root TABLES
    python examples/benchmarks/tuning.py --dataset fashion-mnist --root DIR --pool 4000

A configuration is a learning rate, a weight decay, a width, and augmentation or none. Subsets are trained on for as
many epochs as everything, which takes a tenth of the steps. "Everything, a tenth of the epochs" takes as many steps as
they do. Configurations are chosen by their accuracy on the validation split, and judged by the test accuracy that they
have when they are trained on everything. TABLES is a folder with `letter.npz` and `landsat.npz` (see `_tables.py`).
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _grid import Row, markdown, mean_and_spread, run_cells
from _methods import EVERYTHING, METHODS
from _runs import (
    Case,
    Settings,
    add_common_arguments,
    complete,
    make_splits,
    proxy_cell,
    run_proxy,
    train_proxies,
)
from _tables import PRESETS
from _uses import accuracy, always, drawer, train
from torch import Tensor, nn
from torchmetrics.functional import kendall_rank_corrcoef, spearman_corrcoef

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are scripts, not a package
from _common import Classifier, Images, augment, make_network

FRACTION = 0.1
SHORT = "everything, a tenth of the epochs"
SUBSETS = {  # a method of METHODS, and whether each epoch draws anew
    "random": ("random", False),
    "random, anew": ("random", True),
    "CLD": ("CLD", False),
    "CLD, drawn": ("CLD, drawn", False),
    "CLD, drawn, anew": ("CLD, drawn", True),
    "former draw": ("former draw", False),
    "former draw, anew": ("former draw", True),
}
WAYS = (EVERYTHING, SHORT, *SUBSETS)
OTHER_SEED = "everything, another seed"
BY_LOT = "none, chosen by lot"
WIDTHS = {"mlp": (32, 128, 512), "cnn": (4, 8)}


@dataclass(frozen=True)
class Configuration:
    """What is tuned."""

    lr: float
    weight_decay: float
    width: int
    augmented: bool


def configurations(network: str, count: int) -> list[Configuration]:
    """A random search: learning rate from 0.005 to 0.5 and weight decay from 1e-5 to 1e-2, both drawn by magnitude."""
    widths = WIDTHS["mlp" if network == "mlp" else "cnn"]
    draws = torch.rand(100, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    return [
        Configuration(0.005 * 100**lr, 1e-5 * 1000**decay, widths[int(width * len(widths))], augmented < 0.5)
        for lr, decay, width, augmented in draws[:count]
    ]


class Tuned(Classifier):
    """A classifier of one configuration. An augmented MLP sees noise on its inputs, a CNN shifted, mirrored images."""

    def __init__(self, name: str, train: Images, network: str, configuration: Configuration, *, seed: int) -> None:
        super().__init__(name, train, configuration.lr, seed=seed, network=network)
        self.flat, self.augmented = network == "mlp", configuration.augmented
        classes, width = int(train.targets.max()) + 1, configuration.width
        if self.flat:
            inputs = train.images[0].numel()
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))
        else:
            layers = make_network(f"cnn{width}", train.images, classes)
            self.network = layers.to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        if self.augmented:
            images = images + 0.3 * self.std * torch.randn(images.shape) if self.flat else augment(images)
        return super().training_step((images, targets), batch_idx)


def run_cell(cell: dict[str, Any], settings: Settings, count: int) -> dict[str, Any]:
    """Trains one configuration in one way."""
    case, way = Case.of(cell), cell["trained_on"]
    splits, _ = make_splits(case, settings.root)
    batch_size, paid = PRESETS[case.dataset].batch_size, 0.0
    steps = case.epochs * math.ceil(len(splits.train) / batch_size)
    if way in SUBSETS:
        method, anew = SUBSETS[way]
        draw = drawer(case, settings, method, FRACTION, anew=anew)
        steps = case.epochs * math.ceil(len(draw(0)) / batch_size)
        paid = METHODS[method].share * run_proxy(case, settings).epochs_paid
    else:
        draw = always(torch.arange(len(splits.train)))
        steps = round(steps * FRACTION) if way == SHORT else steps
    configuration = configurations(case.network, count)[cell["configuration"]]
    model = Tuned(case.dataset, splits.train, case.network, configuration, seed=3000 + case.seed)
    how = {"steps": steps, "batch_size": batch_size, "weight_decay": configuration.weight_decay}
    train(model, splits.train, draw, **how, seed=8000 + case.seed)
    return {
        "steps": steps,
        "selection_epochs": round(paid, 2),
        "validation": accuracy(model, splits.val),
        "test": accuracy(model, splits.test),
    }


# Tables


def judge(seen: Sequence[float], full: Sequence[Row]) -> tuple[float, float, float, float]:
    """How far a tuner can rely on what was seen.

    Args:
        seen: The validation accuracy of each configuration, by which one is chosen.
        full: The row of each configuration's training on everything.

    Returns:
        Spearman and Kendall correlation with the test accuracies of those trainings, and two regrets, in points below
        the best of them: that of the chosen configuration; and that of the one which is chosen by its training on
        everything, of the three that looked best.
    """
    validation, test = _column(full, "validation"), _column(full, "test")
    ours, theirs = (torch.tensor(values, dtype=torch.float64) for values in (seen, test))
    correlations = float(spearman_corrcoef(ours, theirs)), float(kendall_rank_corrcoef(ours, theirs))
    order = sorted(range(len(seen)), key=lambda number: -seen[number])  # of equally good ones the first, as one would
    of_three = max(order[:3], key=validation.__getitem__)
    return *correlations, max(test) - test[order[0]], max(test) - test[of_three]


def table(rows: Iterable[Row], dataset: str) -> str:
    """Mean ± spread over the seeds, by labels and by what was trained on."""
    runs: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        if row["dataset"] == dataset:
            runs.setdefault((row["noise"], int(row["seed"]), row["trained_on"]), []).append(row)
    for run in runs.values():
        run.sort(key=lambda row: int(row["configuration"]))
    body = []
    for noise in dict.fromkeys(noise for noise, _, _ in runs):
        labels = f"{float(noise):.0%} wrong" if float(noise) else "clean"
        seeds = sorted({seed for level, seed, _ in runs if level == noise})
        full = {seed: runs[noise, seed, EVERYTHING] for seed in seeds}
        for way in WAYS:
            own = {seed: runs[noise, seed, way] for seed in seeds if (noise, seed, way) in runs}
            if not own:
                continue
            judged = [judge(_column(own[seed], "validation"), full[seed]) for seed in own]
            costs = [_cost(own[seed], full[seed]) for seed in own]
            body.append([labels, way, f"{mean_and_spread(costs)[0]:.1f}", *_shown(judged)])
        if len(seeds) > 1:
            after = dict(zip(seeds, [*seeds[1:], seeds[0]], strict=True))
            judged = [judge(_column(full[after[seed]], "validation"), full[seed]) for seed in seeds]
            body.append([labels, OTHER_SEED, "", *_shown(judged)])
        worth = [_column(full[seed], "test") for seed in seeds]
        regrets = [max(values) - sum(values) / len(values) for values in worth]
        mean, spread = mean_and_spread(regrets)
        body.append([labels, BY_LOT, "0.0", "", "", f"{mean:.1f} ± {spread:.1f}", ""])
    return markdown(["labels", "trained on", "cost", "Spearman", "Kendall", "regret", "of the best three"], body)


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def _cost(rows: Sequence[Row], full: Sequence[Row]) -> float:
    """All steps and the proxy's run, in trainings on everything."""
    training = sum(_column(rows, "steps")) / float(full[0]["steps"])
    return training + float(rows[0]["selection_epochs"]) / float(rows[0]["epochs"])


def _shown(judged: Sequence[tuple[float, ...]]) -> list[str]:
    shown = []
    for digits, values in zip((2, 2, 1, 1), zip(*judged, strict=True), strict=True):
        mean, spread = mean_and_spread(values)
        shown.append(f"{mean:.{digits}f} ± {spread:.{digits}f}")
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tuning on a part of the data, against tuning on everything.")
    add_common_arguments(parser, "tuning.csv")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--noise", type=float, nargs="+", default=[0.0, 0.2], help=f"shares of train labels made wrong {known}")
    add("--configurations", type=int, default=20, help=f"how many to tell apart {known}")
    add("--pool", type=int, help="use no more than this many samples of the pool (default: all)")
    parser.set_defaults(epochs=10)
    args = parser.parse_args(argv)
    settings = complete(args)
    proxies = [
        proxy_cell(args, seed=seed, noise=noise, pool=args.pool)
        for seed, noise in itertools.product(range(args.seeds), args.noise)
    ]
    cells = [
        {**proxy, "trained_on": way, "configuration": number}
        for proxy in proxies
        for way, number in itertools.product(WAYS, range(args.configurations))
    ]
    train_proxies(proxies, args, settings)
    rows = run_cells(args.csv, cells, partial(run_cell, settings=settings, count=args.configurations), jobs=args.jobs)
    print(f"\n{args.dataset}, {args.configurations} configurations, {args.epochs} epochs, {args.seeds} seed(s)\n")
    print(table(rows, args.dataset))


if __name__ == "__main__":
    main()
