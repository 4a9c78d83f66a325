"""What is a coreset worth? Test accuracy by method, size, label noise and step budget.

    python examples/benchmarks/accuracy.py --dataset digits --seeds 5
    python examples/benchmarks/accuracy.py --dataset fashion-mnist --root DIR --jobs 2

For each noise level and seed, one proxy is trained with `CLDCallback`. Every method then chooses a coreset from the
proxy's logged losses, and a fresh model is trained on it. For comparison, models are trained on everything and on the
validation split. Finished cells are rows of a CSV and are not run again, so a killed run continues with the same
command. For your own images: `--dataset folder --root DIR --csv CSV`, with DIR/train/CLASS/ and DIR/test/CLASS/.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from _figures import draw_accuracy, draw_compute
from _grid import Row, markdown, mean_and_spread, run_cells
from _methods import EVERYTHING, HELD_OUT, METHODS
from _runs import (
    Case,
    Settings,
    add_common_arguments,
    complete,
    proxy_cell,
    run_proxy,
    target_cell,
    train_proxies,
    train_target,
)

DEFAULT_METHODS = [
    "random",
    "CLD",
    "CLD, drawn",
    "CLD near zero",
    "lowest CLD",
    "stratified CLD",
    "lowest mean loss",
    "highest mean loss",
    "area under loss",
    "confidence",
    "variability",
    "uncertainty",
    "DUAL",
]


def run_cell(cell: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Trains and tests one target."""
    case = Case.of(cell)
    if cell["method"] in (EVERYTHING, HELD_OUT):
        how = {"network": case.network, "budget": cell["budget"], "held_out": cell["method"] == HELD_OUT}
        return {**train_target(case, settings, None, **how), **_costs(0, 0)}
    method, proxy = METHODS[cell["method"]], run_proxy(case, settings)
    positions = method.choose(proxy.trajectories, cell["fraction"], case.seed)
    result = train_target(case, settings, positions, network=case.network, budget=cell["budget"])
    return {**result, **_costs(method.share * proxy.fit_seconds, method.share * proxy.epochs_paid)}


def _costs(seconds: float, epochs: float) -> dict[str, float]:
    return {"selection_seconds": round(seconds, 1), "selection_epochs": round(epochs, 2)}


def make_cells(args: argparse.Namespace, settings: Settings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The cells of the proxies and of the targets, seed after seed, so that the first seeds are complete early."""
    proxies = [
        proxy_cell(
            args,
            seed=seed,
            noise=noise,
            noise_kind=args.noise_kind,
            val_noise=noise if args.noisy_validation else 0.0,
            imbalance=args.imbalance,
        )
        for seed, noise in itertools.product(range(args.first_seed, args.first_seed + args.seeds), args.noise)
    ]
    choices = [(EVERYTHING, 1.0), (HELD_OUT, 1.0), *itertools.product(args.methods, args.fractions)]
    targets = [
        target_cell(proxy, settings, budget=args.budget, fraction=fraction, method=method)
        for proxy in proxies
        for method, fraction in choices
    ]
    return proxies, targets


# Tables


def table(rows: Iterable[Row], noise: str, budget: str, methods: Sequence[str] = tuple(METHODS)) -> str:
    """Accuracy in percent by method and fraction, for one noise level and budget: mean ± spread over the seeds.

    Bold marks the best mean of a column and all within one spread of it. The corner shows what they are compared with.
    """
    cells: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if (row["noise"], row["budget"]) == (noise, budget):
            cells.setdefault((row["method"], row["fraction"]), []).append(float(row["accuracy"]))
    fractions = sorted({fraction for method, fraction in cells if method not in (EVERYTHING, HELD_OUT)}, key=float)
    methods = [method for method in methods if any(name == method for name, _ in cells)]
    shown = {key: mean_and_spread(values) for key, values in cells.items()}
    marks = {}
    for fraction in fractions:
        best, spread = max(shown[method, fraction] for method in methods if (method, fraction) in shown)
        marks[fraction] = best - spread
    body = []
    for method in methods:
        line = [method]
        for fraction in fractions:
            if (method, fraction) not in shown:
                line.append("")
                continue
            mean, spread = shown[method, fraction]
            text = f"{mean:.1f} ± {spread:.1f}"
            line.append(f"**{text}**" if mean >= marks[fraction] else text)
        body.append(line)
    compared = [(name, *shown[name, "1.0"]) for name in (EVERYTHING, HELD_OUT) if (name, "1.0") in shown]
    corner = "; ".join(f"{name}: {mean:.1f} ± {spread:.1f}" for name, mean, spread in compared)
    return markdown([corner, *(f"{100 * float(fraction):g} %" for fraction in fractions)], body)


def compact_table(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """Accuracy by faults and fraction, with a column per method: mean ± spread over the seeds.

    Bold marks the best mean of a line and all within one spread of it. The last columns show what they are compared
    with.
    """
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    compared: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        accuracy = float(row["accuracy"])
        if row["method"] in (EVERYTHING, HELD_OUT):
            compared.setdefault((_faults(row), row["method"]), []).append(accuracy)
        elif row["method"] in methods:
            cells.setdefault((_faults(row), row["fraction"]), {}).setdefault(row["method"], []).append(accuracy)
    body = []
    for (faults, fraction), by_method in cells.items():
        shown = [mean_and_spread(by_method[method]) for method in methods]
        best, spread = max(shown)
        texts = [f"{mean:.1f} ± {around:.1f}" for mean, around in shown]
        marked = [
            f"**{text}**" if mean >= best - spread else text for text, (mean, _) in zip(texts, shown, strict=True)
        ]
        beside = [mean_and_spread(compared[faults, name]) for name in (EVERYTHING, HELD_OUT)]
        others = [f"{mean:.1f} ± {around:.1f}" for mean, around in beside]
        body.append([faults, f"{100 * float(fraction):g} %", *marked, *others])
    order = {faults: number for number, faults in enumerate(dict.fromkeys(line[0] for line in body))}
    body.sort(key=lambda line: (order[line[0]], float(line[1].removesuffix(" %"))))
    return markdown(["labels", "kept", *methods, EVERYTHING, HELD_OUT], body)


def _faults(row: Row) -> str:
    """The faults of a row's data, in words."""
    noise, val_noise, imbalance = (float(row[name]) for name in ("noise", "val_noise", "imbalance"))
    kind = " (to the next class)" if row["noise_kind"] == "pair" else ""
    faults = f"{noise:.0%} wrong{kind}" if noise else "clean"
    faults += ", validation too" if val_noise else ""
    return faults + (f", first class {imbalance:g} times the last" if imbalance > 1 else "")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test accuracy of coresets by method, size, label noise and budget.")
    add_common_arguments(parser, "accuracy.csv")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--first-seed", type=int, default=0, help=f"first seed {known}")
    add("--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4], help=f"shares of train labels made wrong {known}")
    add("--noise-kind", choices=["symmetric", "pair"], default="symmetric", help=f"to any class, or the next {known}")
    add("--noisy-validation", action="store_true", help="make the same share of validation labels wrong")
    add("--imbalance", type=float, default=1.0, help=f"size of the first class divided by the last {known}")
    add("--fractions", type=float, nargs="+", default=[0.005, 0.02, 0.1, 0.3, 0.7], help=f"shares to keep {known}")
    add("--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS, metavar="METHOD", help=", ".join(METHODS))
    add("--budget", choices=["steps", "epochs"], default="steps", help=f"what is equal for all targets {known}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    settings = complete(args)
    proxies, targets = make_cells(args, settings)
    train_proxies(proxies, args, settings)
    rows = run_cells(args.csv, targets, partial(run_cell, settings=settings), jobs=args.jobs)
    for noise in args.noise:
        print(f"\n{args.dataset}, {noise:.0%} of the train labels wrong, equal {args.budget}\n")
        print(table(rows, str(noise), args.budget))
    for draw, what in ((draw_accuracy, "fraction"), (draw_compute, "compute")):
        figure = args.csv.with_name(f"{args.csv.stem}_{what}.png")
        draw(rows, figure)
        print(f"Figure: {figure}")


if __name__ == "__main__":
    main()
