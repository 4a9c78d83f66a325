"""Other methods on the same proxies, for the same steps: what fixed and redrawn subsets are worth beside CLD's.

    pip install datacull==1.0.2
    python examples/benchmarks/peers.py --datasets digits fashion-mnist landsat letter --root DIR --tables TABLES

TABLES holds landsat.npz and letter.npz, with the arrays pool_inputs, pool_classes, test_inputs and test_classes; any
other table does as well. Without DataCull, name the `--methods` that are not its own. The targets of a proxy train side
by side. Finished cells are rows of a CSV and are not run again, so a killed run continues with the same command.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from _grid import Row, markdown, mean_and_spread, run_cells
from _peer_datacull import DATACULL, package
from _peer_rivals import RANDOM, RANDOM_ANEW, RIVALS
from _peer_runs import Models, Places, fit, make_data, preset_of, read_proxy, train_proxy
from _runs import RESULTS

ENTRIES = {**RIVALS, **DATACULL}
CHOSE = ("digits", "fashion-mnist")
"""The data sets by which the rule "CLD, drawn" was chosen."""


@functools.lru_cache(maxsize=2)
def train_all(proxy: tuple[tuple[str, Any], ...], steps: int, choices: tuple[tuple[str, float], ...], places: Places):
    """Trains and tests the targets of one proxy, a method and a fraction each, side by side."""
    torch.set_num_threads(1)  # for networks as small as these a second thread costs more than it saves
    known = read_proxy(dict(proxy), places)
    data, seed = known.data, dict(proxy)["seed"]
    rivals = [ENTRIES[method].make(known, fraction, steps, seed) for method, fraction in choices]
    # Not the proxy's seed: a coreset should work for other initial weights too.
    models = Models(data, 3000 + seed, len(rivals))
    served = fit(models, data, rivals, steps, 7000 + seed)
    results = {}
    for choice, passes, counts, accuracy in zip(
        choices, served.passes, served.counts, models.accuracies(data.test), strict=True
    ):
        agreement = ENTRIES[choice[0]].agreement
        results[choice] = {
            "kept": round(sum(passes) / len(passes) / len(counts), 4),
            "seen": round(float((counts > 0).double().mean()), 4),
            "wrong": round(float(counts[data.wrong].sum() / counts.sum()), 4),
            "accuracy": round(accuracy, 2),
            "from_losses": round(agreement(known), 4) if agreement else "",
        }
    return results


def run_cell(cell: dict[str, Any], choices: tuple[tuple[str, float], ...], places: Places) -> dict[str, Any]:
    """The result of one target. The first of a proxy trains them all."""
    proxy = tuple((name, cell[name]) for name in ("dataset", "epochs", "noise", "seed"))
    return train_all(proxy, cell["steps"], choices, places)[cell["method"], cell["fraction"]]


def _train_proxy(cell: dict[str, Any], places: Places) -> dict[str, Any]:
    torch.set_num_threads(1)
    return train_proxy(cell, places)


def make_cells(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The cells of the proxies and of the targets, seed after seed, so that the first seeds are complete early."""
    proxies = [
        {"dataset": dataset, "epochs": args.epochs or preset_of(dataset).epochs, "noise": noise, "seed": seed}
        for seed, dataset, noise in itertools.product(range(args.seeds), args.datasets, args.noise)
    ]
    targets = [
        {**proxy, "steps": args.steps or preset_of(proxy["dataset"]).steps, "fraction": fraction, "method": method}
        for proxy in proxies
        for method, fraction in choices_of(args)
    ]
    return proxies, targets


def choices_of(args: argparse.Namespace) -> tuple[tuple[str, float], ...]:
    return tuple(
        (method, fraction)
        for method in args.methods
        for fraction in (args.fractions if ENTRIES[method].sized else [1.0])
    )


# Tables


Place = tuple[str, str, str]
"""A data set, its share of wrong labels, and the fraction kept."""


def _by_place(rows: Iterable[Row]) -> dict[str, dict[Place, list[float]]]:
    """Accuracies by method and place. Methods without a size stand at every fraction of the others."""
    rows = list(rows)
    found: dict[str, dict[Place, list[float]]] = {}
    fractions = sorted({row["fraction"] for row in rows if ENTRIES[row["method"]].sized}, key=float)
    for row in rows:
        for fraction in [row["fraction"]] if ENTRIES[row["method"]].sized else fractions:
            place = row["dataset"], row["noise"], fraction
            found.setdefault(row["method"], {}).setdefault(place, []).append(float(row["accuracy"]))
    return found


def table(rows: Iterable[Row], dataset: str) -> str:
    """Accuracy in percent by method, share of wrong labels and fraction: mean ± spread over the seeds.

    Bold marks the best mean of a column and all within one spread of it, everything and what keeps most of it aside.
    """
    found = _by_place(row for row in rows if row["dataset"] == dataset)
    places = sorted(
        {place for by_place in found.values() for place in by_place}, key=lambda p: (float(p[1]), float(p[2]))
    )
    shown = {(method, place): mean_and_spread(values) for method, by in found.items() for place, values in by.items()}
    sized = [method for method in found if ENTRIES[method].sized]
    best = {place: max(shown[method, place] for method in sized if (method, place) in shown) for place in places}
    body = []
    for method in ENTRIES:
        if method not in found:
            continue
        line = [method, ENTRIES[method].needs]
        for place in places:
            mean, spread = shown.get((method, place), (None, None))
            text = "" if mean is None else f"{mean:.1f} ± {spread:.1f}"
            line.append(f"**{text}**" if text and method in sized and mean >= best[place][0] - best[place][1] else text)
        body.append(line)
    heads = [f"{'clean' if float(noise) == 0 else f'{float(noise):.0%}'}, {float(f):.0%}" for _, noise, f in places]
    return markdown(["method", "needs", *heads], body)


def overview(rows: Iterable[Row]) -> str:
    """Each method beside the two random ones: mean differences, and in how many places it is behind, level and ahead.

    A place is a data set, a share of wrong labels and a fraction, with two seeds or more. Level are means that differ
    by no more than the larger of their spreads.
    """
    shown = {
        method: {place: mean_and_spread(values) for place, values in by_place.items() if len(values) > 1}
        for method, by_place in _by_place(rows).items()
    }
    body = []
    for method in ENTRIES:
        if method not in shown:
            continue
        line = [method, ENTRIES[method].needs]
        for rival in (RANDOM, RANDOM_ANEW):
            if method == rival:
                line += ["", "", ""]
                continue
            apart: dict[bool, list[float]] = {True: [], False: []}
            counts = [0, 0, 0]
            for place in shown[method].keys() & shown.get(rival, {}).keys():
                (mean, spread), (other, around) = shown[method][place], shown[rival][place]
                apart[place[0] in CHOSE].append(mean - other)
                counts[1 if abs(mean - other) <= max(spread, around) else 2 * (mean > other)] += 1
            line += [f"{sum(part) / len(part):+.1f}" if part else "" for part in (apart[True], apart[False])]
            line.append(" / ".join(map(str, counts)))
        body.append(line)
    heads = ["method", "needs"]
    for rival in (RANDOM, RANDOM_ANEW):
        heads += [f"minus {rival}: sets that chose", "sets that judge", "behind / level / ahead"]
    return markdown(heads, body)


def stand_ins(rows: Iterable[Row]) -> str:
    """The rank correlation of scores that need more than losses with what losses alone give, by data set."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["from_losses"]:
            found.setdefault(row["method"], {}).setdefault(row["dataset"], []).append(float(row["from_losses"]))
    datasets = sorted({dataset for by_dataset in found.values() for dataset in by_dataset})
    body = []
    for method in ENTRIES:
        if method in found:
            by = found[method]
            body.append([method, *(f"{min(by[n]):.3f} to {max(by[n]):.3f}" if n in by else "" for n in datasets)])
    return markdown(["score", *datasets], body)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Other methods on the same proxies, for the same steps.")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--datasets", nargs="+", default=["digits"], help=f"digits, fashion-mnist, and names of tables {known}")
    add("--root", type=Path, default=Path("data"), help=f"folder of torchvision's datasets {known}")
    add("--tables", type=Path, default=Path("tables"), help=f"folder of tables, as NAME.npz {known}")
    add("--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4], help=f"shares of train labels made wrong {known}")
    add("--fractions", type=float, nargs="+", default=[0.1, 0.3], help=f"shares to keep {known}")
    add("--seeds", type=int, default=3, help=f"number of seeds {known}")
    add("--epochs", type=int, help="epochs of the proxies (default: by dataset)")
    add("--steps", type=int, help="steps of every target (default: by dataset)")
    names = ", ".join(ENTRIES)
    add(
        "--methods", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="METHOD", help=f"(default: all) {names}"
    )
    add("--csv", type=Path, default=RESULTS / "peers.csv", help=f"finished cells, which are not run again {known}")
    add("--work", type=Path, default=Path("benchmark-runs/peers"), help=f"folder of finished proxies {known}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    print(f"python examples/benchmarks/peers.py {shlex.join(sys.argv[1:] if argv is None else argv)}")
    if any(method in DATACULL for method in args.methods):
        package()
    places = Places(args.root.absolute(), args.tables.absolute(), args.work.absolute())
    proxies, targets = make_cells(args)
    for dataset in args.datasets:
        make_data(dataset, 0.0, 0, places)  # before any work: the data must be there
    run_cells(args.work / "proxies.csv", proxies, functools.partial(_train_proxy, places=places), jobs=1)
    work = functools.partial(run_cell, choices=choices_of(args), places=places)
    rows = run_cells(args.csv, targets, work, jobs=1)
    for dataset in args.datasets:
        print(f"\n{dataset}\n\n{table(rows, dataset)}")
    print(f"\n{overview(rows)}")
    if any(row["from_losses"] for row in rows):
        print(f"\n{stand_ins(rows)}")


if __name__ == "__main__":
    main()
