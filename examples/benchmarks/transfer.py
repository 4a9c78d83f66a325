"""Does a small proxy's coreset serve other architectures as well as their own would?

    python examples/benchmarks/transfer.py --root DIR --jobs 2

Targets of two other networks are trained on the coreset that the small proxy chose, on the one that a proxy of their
own kind chose, and on a random one. All take the same number of steps.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from _grid import Row, markdown, mean_and_spread, run_cells
from _methods import METHODS
from _runs import (
    NETWORKS,
    Case,
    Settings,
    add_common_arguments,
    complete,
    overlap,
    proxy_cell,
    run_proxy,
    train_proxies,
    train_target,
)


def run_cell(cell: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Trains one target on one choice."""
    case = Case.of(cell)
    choose = METHODS[cell["method"]].choose
    positions = choose(run_proxy(case, settings).trajectories, cell["fraction"], case.seed)
    own = run_proxy(Case.of({**cell, "network": cell["target"]}), settings).trajectories
    result = train_target(case, settings, positions, network=cell["target"], budget="steps")
    shared = overlap(positions, choose(own, cell["fraction"], case.seed))
    return {"accuracy": result["accuracy"], "wrong": result["wrong"], "overlap": round(shared, 4)}


def table(rows: Iterable[Row]) -> str:
    """Accuracy in percent, mean ± spread over the seeds."""
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        chosen_by = "random" if row["method"] == "random" else f"{row['method']}, {_whose(row)}"
        key = (row["target"], row["noise"], row["fraction"])
        groups.setdefault(key, {}).setdefault(chosen_by, []).append(row)
    choices = list(dict.fromkeys(choice for group in groups.values() for choice in group))
    body = []
    for (target, noise, fraction), group in groups.items():
        line = [target, f"{float(noise):.0%}", f"{float(fraction):.0%}"]
        for choice in choices:
            mean, spread = mean_and_spread([float(row["accuracy"]) for row in group[choice]])
            line.append(f"{mean:.1f} ± {spread:.1f}")
        small = next(choice for choice in choices if choice.endswith("small proxy"))
        shared, spread = mean_and_spread([float(row["overlap"]) for row in group[small]])
        body.append([*line, f"{shared:.2f} ± {spread:.2f}"])
    return markdown(["target", "wrong labels", "kept", *choices, "overlap of the two CLD coresets"], body)


def _whose(row: Row) -> str:
    return "own proxy" if row["network"] == row["target"] else "small proxy"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Coresets of a small proxy on other architectures.")
    add_common_arguments(parser, "transfer.csv")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--targets", choices=NETWORKS, nargs="+", default=["cnn16", "mlp"], help=f"the other networks {known}")
    add("--noise", type=float, nargs="+", default=[0.0, 0.2], help=f"shares of train labels made wrong {known}")
    add("--fractions", type=float, nargs="+", default=[0.1, 0.3], help=f"shares to keep {known}")
    args = parser.parse_args(argv)
    settings = complete(args)
    proxies, cells = [], []
    for seed, noise in itertools.product(range(args.seeds), args.noise):
        for network in (args.network, *args.targets):
            proxies.append(proxy_cell(args, seed=seed, noise=noise, network=network))
        small = proxies[-1 - len(args.targets)]
        for target, fraction in itertools.product(args.targets, args.fractions):
            cell = {**small, "target": target, "fraction": fraction}
            cells += [
                {**cell, "method": "CLD"},
                {**cell, "method": "CLD", "network": target},
                {**cell, "method": "random"},
            ]
    train_proxies(proxies, args, settings)
    rows = run_cells(args.csv, cells, partial(run_cell, settings=settings), jobs=args.jobs)
    print(f"\n{args.dataset}, small proxy {args.network}, {args.seeds} seed(s), equal steps\n")
    print(table(rows))


if __name__ == "__main__":
    main()
