"""How much validation data does CLD need, and which? Smaller, skewed and mislabeled validation splits.

    python examples/benchmarks/validation.py --root DIR --jobs 2

20 % of each class is held out once and logged. Validation samples don't affect training, so smaller and skewed
references are columns of the same log. Accuracy is measured on targets trained on coresets of 10 %, by the rules "top"
and "draw".
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from _grid import Row, markdown, mean_and_spread, run_cells
from _runs import (
    Case,
    Settings,
    add_common_arguments,
    complete,
    overlap,
    proxy_cell,
    rank_correlation,
    run_proxy,
    target_cell,
    train_proxies,
    train_target,
)
from torch import Tensor

from lightning_cld import LossTrajectories, baselines

HOLDOUT = 0.2
FRACTION = 0.1
WRONG = 0.2

Draw = Callable[[Tensor, float, torch.Generator], Tensor]
"""Takes the mean losses of a class's validation samples and the share to keep; returns the kept positions."""


def _proportional(losses: Tensor, share: float, generator: torch.Generator) -> Tensor:
    return torch.randperm(len(losses), generator=generator)[: max(1, round(share * len(losses)))]


def _hardest(losses: Tensor, share: float, generator: torch.Generator) -> Tensor:
    return losses.argsort(descending=True)[: max(1, round(share * len(losses)))]


def _easiest(losses: Tensor, share: float, generator: torch.Generator) -> Tensor:
    return losses.argsort()[: max(1, round(share * len(losses)))]


def _mix(losses: Tensor, share: float, generator: torch.Generator) -> Tensor:
    hard = _hardest(losses, 0.2 * share, generator)
    others = torch.randperm(len(losses), generator=generator)
    others = others[~torch.isin(others, hard)]
    return torch.cat([hard, others[: max(1, round(0.8 * share * len(losses)))]])


REFERENCES: dict[str, tuple[float, Draw]] = {
    "20 % of each class": (0.2, _proportional),
    "10 %": (0.1, _proportional),
    "5 %": (0.05, _proportional),
    "2 %": (0.02, _proportional),
    "2 %, the hardest tenth of the 20 %": (0.02, _hardest),
    "2 %, the easiest tenth of the 20 %": (0.02, _easiest),
    "10 %, a fifth of it the hardest": (0.1, _mix),
    "20 %, a fifth of it with wrong labels": (0.2, _proportional),
}
"""The share of each class in the pool, and how it is drawn from the held-out 20 %."""

RANDOM = "no reference: random per class"


def choose_reference(losses: LossTrajectories, share: float, draw: Draw, seed: int) -> LossTrajectories:
    """The same losses with fewer validation samples."""
    generator = torch.Generator().manual_seed(6000 + seed)
    hardness, classes = losses.val_losses[1:].mean(dim=0), losses.val_classes
    columns = []
    for label in torch.unique(classes).tolist():
        members = torch.nonzero(classes == label).flatten()
        columns.append(members[draw(hardness[members], share / HOLDOUT, generator)])
    kept = torch.cat(columns)
    return LossTrajectories(
        losses.train_losses, losses.val_losses[:, kept], losses.train_classes, classes[kept], losses.epochs
    )


def run_cell(cell: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Scores by one reference and trains a target on the coreset."""
    case = Case.of(cell)
    full = run_proxy(Case.of({**cell, "val_noise": 0.0}), settings).trajectories
    best = full.score()
    seed = 2000 + case.seed
    if cell["reference"] == RANDOM:
        scores = full.score(by=partial(baselines.random_values, seed=seed))
    else:
        share, draw = REFERENCES[cell["reference"]]
        scores = choose_reference(run_proxy(case, settings).trajectories, share, draw, case.seed).score()
    positions = scores.select(fraction=FRACTION, rule=cell["rule"], seed=seed)
    result = train_target(case, settings, positions, network=case.network, budget="steps")
    tenth = best.select(fraction=FRACTION)
    return {
        "spearman": round(rank_correlation(scores.values, best.values), 4),
        # Draws overlap mostly through their random numbers.
        "overlap": round(overlap(positions, tenth), 4) if cell["rule"] == "top" else "",
        "wrong": result["wrong"],
        "accuracy": result["accuracy"],
    }


def table(rows: Iterable[Row]) -> str:
    """Mean ± spread over the seeds."""
    groups: dict[tuple[float, int], dict[str, list[Row]]] = {}
    references = [*REFERENCES, RANDOM]
    for row in rows:
        key = (float(row["noise"]), references.index(row["reference"]))
        groups.setdefault(key, {}).setdefault(row["rule"], []).append(row)
    measured = any("draw" in by_rule for by_rule in groups.values())
    columns = {
        "Spearman with 20 %": ("top", "spearman", 3),
        "overlap at 10 %": ("top", "overlap", 2),
        "accuracy, top": ("top", "accuracy", 1),
        **({"accuracy, draw": ("draw", "accuracy", 1)} if measured else {}),
    }
    body = []
    for (noise, number), by_rule in sorted(groups.items()):
        line = [f"{noise:.0%}", references[number]]
        for rule, column, digits in columns.values():
            if rule not in by_rule:
                line.append("-")
                continue
            mean, spread = mean_and_spread([float(row[column]) for row in by_rule[rule]])
            line.append(f"{mean:.{digits}f} ± {spread:.{digits}f}")
        body.append(line)
    return markdown(["wrong train labels", "validation samples", *columns], body)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The size and the choice of the validation split.")
    add_common_arguments(parser, "validation.csv")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--noise", type=float, nargs="+", default=[0.0, 0.2], help=f"shares of train labels made wrong {known}")
    args = parser.parse_args(argv)
    settings = complete(args)
    proxies, cells = [], []
    for seed, noise in itertools.product(range(args.seeds), args.noise):
        proxy = proxy_cell(args, seed=seed, noise=noise, holdout=HOLDOUT)
        mislabelled = {**proxy, "val_noise": WRONG}
        proxies += [proxy, mislabelled]
        cells.append(target_cell(proxy, settings, reference=RANDOM, rule="top"))
        for reference, rule in itertools.product(REFERENCES, ("top", "draw")):
            of_reference = mislabelled if reference.endswith("wrong labels") else proxy
            cells.append(target_cell(of_reference, settings, reference=reference, rule=rule))
    train_proxies(proxies, args, settings)
    rows = run_cells(args.csv, cells, partial(run_cell, settings=settings), jobs=args.jobs)
    print(f"\n{args.dataset}, {args.network}, {args.seeds} seed(s), {FRACTION:.0%} kept, equal steps\n")
    print(table(rows))


if __name__ == "__main__":
    main()
