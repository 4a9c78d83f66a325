"""How much validation data does CLD need, and which? Its size, skewed choices of it, and wrong labels in it.

    python examples/benchmarks/validation.py --root DIR --jobs 2

A fifth of each class is held out once and logged. Validation samples do not touch training, so that smaller and skewed
references are columns of the same log. Accuracy is that of a target trained on the tenth with the highest CLD.
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
    train_proxies,
    train_target,
)
from torch import Tensor

from lightning_cld import LossTrajectories, baselines

HOLDOUT = 0.2
FRACTION = 0.1
WRONG = 0.2

Draw = Callable[[Tensor, float, torch.Generator], Tensor]
"""From the mean losses of a class's validation samples and the share to take to settings among them."""


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
"""The share of the pool's classes, and how it is drawn from the held-out fifth."""

RANDOM = "no reference: random per class"


def choose_reference(losses: LossTrajectories, share: float, draw: Draw, seed: int) -> LossTrajectories:
    """The same log with fewer validation samples."""
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
    """Chooses by one reference and trains a target on the choice."""
    case = Case.of(cell)
    full = run_proxy(Case.of({**cell, "val_noise": 0.0}), settings).trajectories
    best = full.score()
    if cell["reference"] == RANDOM:
        scores = full.score(by=partial(baselines.random_values, seed=2000 + case.seed))
    else:
        share, draw = REFERENCES[cell["reference"]]
        scores = choose_reference(run_proxy(case, settings).trajectories, share, draw, case.seed).score()
    positions = scores.select(fraction=FRACTION)
    result = train_target(case, settings, positions, network=case.network, budget="steps")
    return {
        "spearman": round(rank_correlation(scores.values, best.values), 4),
        "overlap": round(overlap(positions, best.select(fraction=FRACTION)), 4),
        "wrong": result["wrong"],
        "accuracy": result["accuracy"],
    }


def table(rows: Iterable[Row]) -> str:
    """Mean ± spread over the seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["noise"], row["reference"]), []).append(row)
    order = [*REFERENCES, RANDOM]
    body = []
    for (noise, reference), group in sorted(
        groups.items(), key=lambda item: (float(item[0][0]), order.index(item[0][1]))
    ):
        line = [f"{float(noise):.0%}", reference]
        for column, digits in (("spearman", 3), ("overlap", 2), ("accuracy", 1)):
            mean, spread = mean_and_spread([float(row[column]) for row in group])
            line.append(f"{mean:.{digits}f} ± {spread:.{digits}f}")
        body.append(line)
    head = ["wrong train labels", "validation samples", "Spearman with 20 %", "overlap at 10 %", "accuracy at 10 %"]
    return markdown(head, body)


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
        cells += [
            {**(mislabelled if reference.endswith("wrong labels") else proxy), "reference": reference}
            for reference in (*REFERENCES, RANDOM)
        ]
    train_proxies(proxies, args, settings)
    rows = run_cells(args.csv, cells, partial(run_cell, settings=settings), jobs=args.jobs)
    print(f"\n{args.dataset}, {args.network}, {args.seeds} seed(s), {FRACTION:.0%} kept, equal steps\n")
    print(table(rows))


if __name__ == "__main__":
    main()
