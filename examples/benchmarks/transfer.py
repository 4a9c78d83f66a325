"""Does a small proxy's coreset work for other architectures as well as the coreset of their own proxy?

    python examples/benchmarks/transfer.py --root DIR --jobs 2

Targets of two other networks are trained on three kinds of coreset: from the small proxy, from a proxy of their own
network (both by the rules "top" and "draw"), and random. All train for the same number of steps.
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
    target_cell,
    train_proxies,
    train_target,
)

RULES = ("CLD", "CLD, drawn")


def run_cell(cell: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Trains one target on one coreset."""
    case = Case.of(cell)
    choose = METHODS[cell["method"]].choose
    positions = choose(run_proxy(case, settings).trajectories, cell["fraction"], case.seed)
    result = train_target(case, settings, positions, network=cell["target"], budget="steps")
    shared: Any = ""
    if cell["method"] == "CLD":  # draws overlap mostly through their random numbers
        own = run_proxy(Case.of({**cell, "network": cell["target"]}), settings).trajectories
        shared = round(overlap(positions, choose(own, cell["fraction"], case.seed)), 4)
    return {"accuracy": result["accuracy"], "wrong": result["wrong"], "overlap": shared}


def table(rows: Iterable[Row]) -> str:
    """Accuracy in percent, and the overlap of both proxies' coresets: mean ± spread over the seeds."""
    groups: dict[tuple[str, ...], dict[tuple[str, bool], list[Row]]] = {}
    for row in rows:
        choice = (row["method"], row["network"] == row["target"])
        groups.setdefault((row["target"], row["noise"], row["fraction"]), {}).setdefault(choice, []).append(row)
    choices = {"random": ("random", False)}
    measured = {method for group in groups.values() for method, _ in group}
    for rule in [rule for rule in RULES if rule in measured]:
        choices |= {f"{rule}, small proxy": (rule, False), f"{rule}, own proxy": (rule, True)}
    body = []
    for (target, noise, fraction), group in groups.items():
        line = [target, f"{float(noise):.0%}", f"{float(fraction):.0%}"]
        for choice in choices.values():
            mean, spread = mean_and_spread([float(row["accuracy"]) for row in group[choice]])
            line.append(f"{mean:.1f} ± {spread:.1f}")
        mean, spread = mean_and_spread([float(row["overlap"]) for row in group["CLD", False]])
        body.append([*line, f"{mean:.2f} ± {spread:.2f}"])
    return markdown(["target", "wrong labels", "kept", *choices, "overlap of the two CLD coresets"], body)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Coresets of a small proxy on other architectures.")
    add_common_arguments(parser, "transfer.csv")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--targets", choices=NETWORKS, nargs="+", default=["cnn16", "mlp"], help=f"networks of the targets {known}")
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
            choices = [("random", args.network), *itertools.product(RULES, (args.network, target))]
            cells += [
                target_cell({**small, "network": network}, settings, target=target, fraction=fraction, method=method)
                for method, network in choices
            ]
    train_proxies(proxies, args, settings)
    rows = run_cells(args.csv, cells, partial(run_cell, settings=settings), jobs=args.jobs)
    print(f"\n{args.dataset}, small proxy {args.network}, {args.seeds} seed(s), equal steps\n")
    print(table(rows))


if __name__ == "__main__":
    main()
