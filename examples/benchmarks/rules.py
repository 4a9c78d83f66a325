"""How do the rules "draw" and "top" do against random subsets, over many faults of the labels and the proxy?

    python examples/benchmarks/rules.py --tables DIR --root DIR

A cell is a data set, a case and a fraction. In every cell each rule chooses a coreset for each seed from the same
proxies' losses, and the targets are trained side by side. `--tables` is a folder of `.npz` files as `_tables.py` reads
them (landsat, spambase, letter, optdigits, trec, adult), `--root` the folder of torchvision's Fashion-MNIST. These need
no files:

    python examples/benchmarks/rules.py --datasets digits
    python examples/benchmarks/rules.py --datasets wine breast-cancer --fractions 0.05 0.1 0.3 0.5 0.9

Rows of finished cases are kept and not run again. A second CSV tells how well the library finds wrong labels there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _diagnoses import diagnose
from _grid import Row, read_rows, write_rows
from _rule_cases import CASES, CHOSE, JUDGE, TINY, Data, Proxy, accuracies_of, cases_of, load_data, run_proxies
from _rule_tables import cases_table, rules_table
from _runs import RESULTS
from torch import Tensor
from tqdm import tqdm

from lightning_cld import CLDScores, baselines, select_top
from lightning_cld.functional import aleatoric_uncertainty
from lightning_cld.functional.selection import above_threshold

FRACTIONS = [0.005, 0.02, 0.05, 0.1, 0.3, 0.5, 0.9]


def _random(proxy: Proxy, fraction: float, seed: int) -> Tensor:
    values = baselines.random_values(proxy.losses, seed=2000 + seed)
    return CLDScores(values, proxy.labels).select(fraction=fraction)


def _top(proxy: Proxy, fraction: float, seed: int) -> Tensor:
    return proxy.scores.select(fraction=fraction, rule="top")


def _draw(proxy: Proxy, fraction: float, seed: int) -> Tensor:
    return proxy.scores.select(fraction=fraction, rule="draw", seed=2000 + seed)


def _former_draw(proxy: Proxy, fraction: float, seed: int) -> Tensor:
    """The rule "draw" until 2026-11-28: among the scores above a threshold, by CLD and uncertainty."""
    values = proxy.scores.values
    _, groups, sizes = torch.unique(proxy.labels, return_inverse=True, return_counts=True)
    kept = torch.bincount(groups[select_top(values, proxy.labels, fraction=fraction)], minlength=len(sizes)) / sizes
    uncertainty = aleatoric_uncertainty(proxy.losses.train_losses[1:]).double()
    weights = values.double() * uncertainty ** (kept**0.25)[groups]
    draw = torch.rand(len(values), generator=torch.Generator().manual_seed(2000 + seed), dtype=torch.float64)
    keys = weights.log() - (-draw.log()).log()
    in_order = -1000.0 - torch.argsort(torch.argsort(-values, stable=True)).double()
    drawn = (above_threshold(values) == 1) & (weights > 0)
    return select_top(torch.where(drawn, keys, in_order), proxy.labels, fraction=fraction)


def _right_labels(proxy: Proxy, fraction: float, seed: int) -> Tensor:
    """Random among the right labels, which nobody knows. Wrong ones are chosen where these are too few."""
    draw = baselines.random_values(proxy.losses, seed=7000 + seed)
    return CLDScores(draw - proxy.wrong.float(), proxy.labels).select(fraction=fraction)


RULES: dict[str, Callable[[Proxy, float, int], Tensor]] = {
    "random": _random,
    "top": _top,
    "former draw": _former_draw,
    "draw": _draw,
    "right labels": _right_labels,
}
"""How a coreset is chosen: takes a proxy, the fraction to keep and a seed, and returns positions in its train set."""


def run_case(proxies: Sequence[Proxy], data: Data, cells: Sequence[dict[str, Any]], steps: int) -> list[Row]:
    """Chooses, trains and tests the coresets of all cells, side by side, and returns their rows."""
    chosen = [
        (RULES[cell["rule"]](proxy, cell["fraction"], seed), proxy, seed)
        for cell in cells
        for seed, proxy in enumerate(proxies)
    ]
    coresets = [(proxy.positions[kept], proxy.labels[kept], seed) for kept, proxy, seed in chosen]
    accuracies = accuracies_of(data, coresets, steps)
    rows = []
    for number, cell in enumerate(cells):
        own = slice(number * len(proxies), (number + 1) * len(proxies))
        wrong = torch.stack([proxy.wrong[kept].double().mean() for kept, proxy, _ in chosen[own]]).mean()
        result = {
            "samples": len(chosen[own][0][0]),
            "wrong": round(float(wrong), 4),
            "accuracies": " ".join(f"{accuracy:.2f}" for accuracy in accuracies[own]),
        }
        rows.append({name: str(value) for name, value in {**cell, **result}.items()})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The rules against random subsets, by data sets that did not choose.")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--datasets", nargs="+", choices=JUDGE + CHOSE + TINY, default=[*JUDGE, *CHOSE], help=f"data {known}")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="(default: all)")
    add("--fractions", type=float, nargs="+", default=FRACTIONS, help=f"shares of the train set kept {known}")
    add("--tables", type=Path, help="folder of the tables, as .npz files")
    add("--root", type=Path, default=Path("data"), help=f"folder of torchvision's Fashion-MNIST {known}")
    add("--seeds", type=int, default=5, help=f"number of seeds {known}")
    add("--steps", type=int, default=1_000, help=f"steps of every target {known}")
    add("--csv", type=Path, default=RESULTS / "rules.csv", help=f"finished cases, which are not run again {known}")
    add("--diagnoses", type=Path, default=RESULTS / "diagnoses.csv", help=f"the second CSV {known}")
    args = parser.parse_args(argv)
    bar = tqdm(total=len(args.datasets) * len(args.cases), unit="case", desc=args.csv.stem)
    for dataset in args.datasets:
        data = load_data(dataset, args.root, args.tables)
        for case in args.cases:
            bar.set_postfix_str(f"{dataset}, {case}")
            if case in cases_of(data):
                _finish(dataset, case, data, args)
            bar.update()
    bar.close()
    rows = read_rows(args.csv)
    for datasets in (JUDGE, CHOSE, TINY):
        if any(row["dataset"] in datasets for row in rows):
            print(f"\n{', '.join(datasets)}\n\n{rules_table(rows, datasets)}\n\n{cases_table(rows, datasets)}")


def _finish(dataset: str, case: str, data: Data, args: argparse.Namespace) -> None:
    """Runs what a case lacks in either CSV."""
    of_case = {"dataset": dataset, "case": case, "seeds": args.seeds}
    rows, diagnoses = read_rows(args.csv), read_rows(args.diagnoses)
    known = {_key(row) for row in rows}
    cells = [{**of_case, "rule": rule, "fraction": fraction} for rule in RULES for fraction in args.fractions]
    cells = [cell for cell in cells if _key(cell) not in known]
    diagnosed = {(row["dataset"], row["case"], row["seed"]) for row in diagnoses}
    open_seeds = [seed for seed in range(args.seeds) if (dataset, case, str(seed)) not in diagnosed]
    if not cells and not open_seeds:
        return
    proxies = run_proxies(data, CASES[case], args.seeds)
    for seed in open_seeds:
        result = {"dataset": dataset, "case": case, "seed": seed, **diagnose(proxies[seed])}
        diagnoses.append({name: str(value) for name, value in result.items()})
    write_rows(args.diagnoses, diagnoses)
    # The smallest coresets have a sample of each class or more.
    write_rows(args.csv, [*rows, *run_case(proxies, data, cells, args.steps)])


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("dataset", "case", "seeds", "rule", "fraction"))


if __name__ == "__main__":
    main()
