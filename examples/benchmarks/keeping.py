"""What to keep where only a few samples can be kept? Fixed subsets, trained on for short and for long.

    python examples/benchmarks/keeping.py --dataset digits --steps 200
    python examples/benchmarks/keeping.py --dataset letter --root TABLES --steps 200
    python examples/benchmarks/keeping.py --dataset landsat --root TABLES --steps 200

Memory for replay, or a device, holds a given number of samples, and training may pass over them as often as it likes:
for `--steps`, four times and ten times that. Everything, for as many steps, is what there is no memory for. TABLES is a
folder with `letter.npz` and `landsat.npz` (see `_tables.py`).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from _grid import Row, markdown, mean_and_spread, run_cells
from _methods import EVERYTHING, METHODS
from _runs import (
    Case,
    Classifier,
    Settings,
    add_common_arguments,
    complete,
    make_splits,
    proxy_cell,
    target_cell,
    train_proxies,
)
from _tables import PRESETS
from _uses import accuracy, always, chosen, train

DEFAULT_METHODS = ("random", "CLD", "CLD, drawn", "former draw", "uncertainty", "drop 30 %")
TIMES = (1, 4, 10)


def run_cell(cell: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Trains a model on what one method keeps, and tests it."""
    case, method, preset = Case.of(cell), cell["method"], PRESETS[cell["dataset"]]
    splits, wrong = make_splits(case, settings.root)
    everything = torch.arange(len(wrong))
    kept = everything if method == EVERYTHING else chosen(case, settings, method, cell["fraction"], case.seed)
    steps = cell["times"] * settings.steps
    model = Classifier(case.dataset, splits.train, preset.lr, seed=3000 + case.seed, network=case.network)
    train(model, splits.train, always(kept), steps=steps, batch_size=preset.batch_size, seed=8000 + case.seed)
    return {
        "samples": len(kept),
        "wrong": round(float(wrong[kept].float().mean()), 4),
        "steps": steps,
        "accuracy": accuracy(model, splits.test),
    }


def table(rows: Iterable[Row], dataset: str) -> str:
    """Accuracy by labels, size and steps, with a column per method: mean ± spread over the seeds.

    Bold marks the best mean of a line, everything aside, and all within one spread of it.
    """
    groups: dict[tuple[str, float, int], dict[str, list[float]]] = {}
    samples: dict[float, str] = {}
    for row in rows:
        if row["dataset"] == dataset:
            place = row["noise"], float(row["fraction"]), int(row["steps"])
            groups.setdefault(place, {}).setdefault(row["method"], []).append(float(row["accuracy"]))
            samples[float(row["fraction"])] = row["samples"]
    methods = [method for method in METHODS if any(method in group for group in groups.values())]
    body = []
    for (noise, fraction, steps), group in sorted(groups.items()):
        if fraction == 1:
            continue
        shown = [mean_and_spread(group[method]) for method in methods]
        best, spread = max(shown)
        texts = [_marked(mean, around, mean >= best - spread) for mean, around in shown]
        labels = f"{float(noise):.0%} wrong" if float(noise) else "clean"
        beside = _marked(*mean_and_spread(groups[noise, 1.0, steps][EVERYTHING]), False)
        body.append([labels, f"{fraction:.0%}, {samples[fraction]} samples", f"{steps:,}", *texts, beside])
    return markdown(["labels", "kept", "steps", *methods, EVERYTHING], body)


def _marked(mean: float, spread: float, marked: bool) -> str:
    text = f"{mean:.1f} ± {spread:.1f}"
    return f"**{text}**" if marked else text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fixed subsets for a budget of memory, trained on for long.")
    add_common_arguments(parser, "keeping.csv")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--noise", type=float, nargs="+", default=[0.0, 0.2], help=f"shares of train labels made wrong {known}")
    add("--fractions", type=float, nargs="+", default=[0.01, 0.05], help=f"shares to keep {known}")
    add("--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS, metavar="METHOD", help=", ".join(METHODS))
    args = parser.parse_args(argv)
    settings = complete(args)
    proxies = [
        proxy_cell(args, seed=seed, noise=noise) for seed, noise in itertools.product(range(args.seeds), args.noise)
    ]
    choices = [(EVERYTHING, 1.0), *itertools.product(args.methods, args.fractions)]
    cells = [
        target_cell(proxy, settings, method=method, fraction=fraction, times=times)
        for proxy in proxies
        for (method, fraction), times in itertools.product(choices, TIMES)
    ]
    train_proxies(proxies, args, settings)
    rows = run_cells(args.csv, cells, partial(run_cell, settings=settings), jobs=args.jobs)
    print(f"\n{args.dataset}, {args.network}, {args.seeds} seed(s)\n")
    print(table(rows, args.dataset))


if __name__ == "__main__":
    main()
