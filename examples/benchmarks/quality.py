"""What do cheaper ways to log cost? Agreement and target accuracy against a sweep after every epoch.

    python examples/benchmarks/quality.py --dataset fashion-mnist --root DIR --network mlp --jobs 2

The proxies are those of `accuracy.py`, shared through `--work`. The step mode runs the same training once more, with
`CLDCallback(record="step")`.
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

from lightning_cld import CLDScores, LossTrajectories
from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.recording.settling import Settling

REFERENCE = "every epoch"
RANDOM = "random"


def _early(share: float, losses: LossTrajectories) -> CLDScores:
    return losses.score(cutoff_epoch=round(share * losses.epochs[-1]))


def _settled(losses: LossTrajectories) -> CLDScores:
    return losses.score(cutoff_epoch=Settling().epoch(losses))


def _running(losses: LossTrajectories) -> CLDScores:
    classes = losses.train_classes, losses.val_classes
    return RunningHistory.of_losses(losses.train_losses, losses.val_losses, *classes, losses.epochs).score()


MODES: dict[str, Callable[[LossTrajectories], CLDScores]] = {
    REFERENCE: LossTrajectories.score,
    "every 2nd": partial(LossTrajectories.score, every_n_epochs=2),
    "every 3rd": partial(LossTrajectories.score, every_n_epochs=3),
    "first third": partial(_early, 1 / 3),
    "first half": partial(_early, 1 / 2),
    "auto": _settled,
    "step": LossTrajectories.score,
    "running": _running,
}
"""Functions that compute scores from the logged losses."""

RULES = ("top", "draw")


def score(mode: str, case: Case, settings: Settings) -> CLDScores:
    return MODES[mode](run_proxy(case, settings, "step" if mode == "step" else "sweep").trajectories)


def choose(scores: CLDScores, rule: str, fraction: float, seed: int) -> torch.Tensor:
    """The coreset by any rule. Scores of the step mode refuse the rule "top", which is measured here all the same."""
    free = CLDScores(scores.values, scores.classes, plausibility=scores.plausibility, confidence=scores.confidence)
    return free.select(fraction=fraction, rule=rule, seed=seed)


def run_cell(cell: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Compares one mode's scores with the reference's, and trains and tests one target on its coreset."""
    case, fraction = Case.of(cell), cell["fraction"]
    reference = score(REFERENCE, case, settings)
    if cell["mode"] == RANDOM:
        noise = torch.rand(len(reference), generator=torch.Generator().manual_seed(7000 + case.seed))
        chosen = CLDScores(noise, reference.classes).select(fraction=fraction)
        agreement: dict[str, Any] = {"checkpoints": 0, "spearman": "", "overlap": ""}
    else:
        scores = score(cell["mode"], case, settings)
        chosen = choose(scores, cell["rule"], fraction, case.seed)
        shared = overlap(choose(scores, "top", 0.1, 0), choose(reference, "top", 0.1, 0))
        agreement = {
            "checkpoints": len(scores.epochs),
            "spearman": round(rank_correlation(scores.values, reference.values), 4),
            "overlap": round(shared, 4),
        }
    target = train_target(case, settings, chosen, network=case.network, budget="steps")
    return {**agreement, "accuracy": target["accuracy"]}


def table(rows: Iterable[Row]) -> str:
    """Mean ± spread over the seeds, with a line per mode."""
    rows = list(rows)
    places = sorted({(row["rule"], float(row["fraction"])) for row in rows if row["rule"]})
    body = []
    for mode in [*MODES, RANDOM]:
        own = [row for row in rows if row["mode"] == mode]
        if not own:
            continue
        line = [mode]
        for column in ("checkpoints", "spearman", "overlap"):
            values = [float(row[column]) for row in own if row[column]]
            digits = 1 if column == "checkpoints" else 3
            line.append(f"{mean_and_spread(values)[0]:.{digits}f}" if mode != RANDOM else "-")
        for rule, fraction in places:
            cells = [row for row in own if float(row["fraction"]) == fraction and row["rule"] in (rule, "")]
            found = [float(row["accuracy"]) for row in cells]
            mean, spread = mean_and_spread(found) if found else (None, None)
            line.append("-" if mean is None else f"{mean:.1f} ± {spread:.1f}")
        body.append(line)
    shown = [f"{rule}, {fraction:.0%}" for rule, fraction in places]
    return markdown(["logged", "checkpoints", "rank correlation", "overlap at 10 %", *shown], body)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Cheaper ways to log against a sweep after every epoch.")
    add_common_arguments(parser, "quality.csv")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--noise", type=float, default=0.0, help=f"share of train labels made wrong {known}")
    add("--fractions", type=float, nargs="+", default=[0.05, 0.2], help=f"shares of the train set kept {known}")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="(default: all)")
    args = parser.parse_args(argv)
    settings = complete(args)
    cells = [
        target_cell(proxy_cell(args, seed=seed, noise=args.noise), settings, mode=mode, rule=rule, fraction=fraction)
        for seed in range(args.seeds)
        for mode, rule in [(RANDOM, ""), *itertools.product(args.modes, RULES)]
        if not (mode == "running" and rule == "draw")  # it would draw what "every epoch" draws
        for fraction in args.fractions
    ]
    records = ["sweep", "step"] if "step" in args.modes else ["sweep"]
    proxies = [
        proxy_cell(args, seed=seed, noise=args.noise, record=record)
        for seed, record in itertools.product(range(args.seeds), records)
    ]
    train_proxies(proxies, args, settings)
    rows = run_cells(args.csv, cells, partial(run_cell, settings=settings), jobs=args.jobs)
    print(f"\n{args.dataset}, {args.network}, {args.epochs} epochs, {args.seeds} seed(s)\n")
    print(table(rows))


if __name__ == "__main__":
    main()
