"""Do early or fewer checkpoints choose the same coreset? Rank correlation and overlap with all checkpoints.

    python examples/benchmarks/early.py --root DIR --jobs 2

The proxies are those of `accuracy.py`, shared through `--work`. For the effect on accuracy, see `accuracy.py` (methods
"CLD, first third" and so on).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

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
)

PARTS = {
    "first third": (1 / 3, 1),
    "first half": (1 / 2, 1),
    "every 2nd": (1, 2),
    "every 3rd": (1, 3),
}
"""The share of the epochs that is used, and the step between them."""

FRACTIONS = (0.1, 0.3)


def run_cell(cell: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Compares one proxy's scores from some of its checkpoints with its scores from all."""
    losses = run_proxy(Case.of(cell), settings).trajectories
    share, every = PARTS[cell["part"]]
    reference = losses.score()
    scores = losses.score(cutoff_epoch=round(share * losses.epochs[-1]), every_n_epochs=every)
    result = {
        "checkpoints": len(scores.epochs),
        "spearman": round(rank_correlation(scores.values, reference.values), 4),
    }
    for fraction in FRACTIONS:
        shared = overlap(scores.select(fraction=fraction), reference.select(fraction=fraction))
        result[f"overlap at {fraction:.0%}"] = round(shared, 4)
    return result


def table(rows: Iterable[Row]) -> str:
    """Mean ± spread over the seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["noise"], row["part"]), []).append(row)
    columns = ["spearman", *(f"overlap at {fraction:.0%}" for fraction in FRACTIONS)]
    body = []
    for (noise, part), group in sorted(
        groups.items(), key=lambda item: (float(item[0][0]), list(PARTS).index(item[0][1]))
    ):
        shown = [mean_and_spread([float(row[column]) for row in group]) for column in columns]
        body.append([f"{float(noise):.0%}", part, group[0]["checkpoints"], *(f"{m:.3f} ± {s:.3f}" for m, s in shown)])
    return markdown(["wrong labels", "checkpoints used", "how many", *columns], body)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Early and thinned timelines against the whole one.")
    add_common_arguments(parser, "early.csv")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4], help=f"shares of train labels made wrong {known}")
    args = parser.parse_args(argv)
    settings = complete(args)
    proxies = [proxy_cell(args, seed=seed, noise=n) for seed, n in itertools.product(range(args.seeds), args.noise)]
    cells = [{**proxy, "part": part} for proxy, part in itertools.product(proxies, PARTS)]
    train_proxies(proxies, args, settings)
    rows = run_cells(args.csv, cells, partial(run_cell, settings=settings), jobs=args.jobs)
    print(f"\n{args.dataset}, {args.network}, {args.epochs} epochs, {args.seeds} seed(s)\n")
    print(table(rows))


if __name__ == "__main__":
    main()
