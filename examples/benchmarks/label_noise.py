"""How well do logged losses find mislabeled samples? Low CLD against mean loss, variability and confidence.

    python examples/benchmarks/label_noise.py --root DIR --jobs 2

For each kind and rate of wrong labels, with a clean and with an equally noisy validation split: AUROC, R-precision (the
precision among the top n samples, for n wrong labels), and what `CLDScores.suspects` lists (scores below 0). The
proxies are those of `accuracy.py`, shared through `--work`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from _grid import Row, markdown, mean_and_spread, run_cells
from _runs import Case, Settings, add_common_arguments, complete, make_splits, proxy_cell, run_proxy
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.retrieval import retrieval_precision

from lightning_cld import LossTrajectories, baselines

# A high value marks a suspected wrong label.
DETECTORS: dict[str, Callable[[LossTrajectories], Tensor]] = {
    "low CLD": baselines.lowest_cld,
    "low CLD, first half": lambda losses: -losses.score(cutoff_epoch=losses.epochs[-1] // 2).values,
    "high mean loss": baselines.highest_mean_loss,
    "low confidence": lambda losses: -baselines.confidence(losses),
    "low variability": lambda losses: -baselines.variability(losses),
}


def judge(values: Tensor, wrong: Tensor) -> tuple[float, float]:
    """AUROC of the values, and precision among the highest n values, for n wrong labels."""
    # Ranks, because torchmetrics expects probabilities: it retrieves only positive values, and squashes values outside
    # [0, 1]. Unscored samples (NaN) rank as the most suspect.
    ranks = (values.argsort().argsort() + 1) / len(values)
    precision = retrieval_precision(ranks, wrong, top_k=int(wrong.sum()))
    return float(binary_auroc(ranks, wrong.int())), float(precision)


def run_cell(cell: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Tests every detector on one proxy's losses."""
    case = Case.of(cell)
    losses = run_proxy(case, settings).trajectories
    _, wrong = make_splits(case, settings.root)
    result: dict[str, Any] = {}
    for name, detector in DETECTORS.items():
        auroc, precision = judge(detector(losses), wrong)
        result[f"{name}: AUROC"] = round(auroc, 4)
        result[f"{name}: precision"] = round(precision, 4)
    suspects = losses.score().suspects(0.0)  # by the score alone, as the other detectors
    result["suspects: share"] = round(len(suspects) / len(wrong), 4)
    result["suspects: precision"] = round(float(wrong[suspects].float().mean()), 4)
    result["suspects: recall"] = round(float(wrong[suspects].sum() / wrong.sum()), 4)
    return result


def table(rows: Iterable[Row]) -> str:
    """Mean ± spread over the seeds."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["noise_kind"], row["noise"], row["val_noise"]), []).append(row)
    body = []
    for (kind, noise, val_noise), group in groups.items():
        validation = "as noisy" if float(val_noise) else "clean"
        line = [f"{float(noise):.0%} {kind}", validation]
        for name in DETECTORS:
            aurocs, precisions = ([float(row[f"{name}: {what}"]) for row in group] for what in ("AUROC", "precision"))
            line.append(f"{_shown(aurocs)} / {_shown(precisions)}")
        found = [
            _shown([float(row[f"suspects: {what}"]) for row in group]) for what in ("share", "precision", "recall")
        ]
        body.append([*line, " / ".join(found)])
    head = ["wrong labels", "validation", *DETECTORS, "score of zero or less: share / precision / recall"]
    return markdown(head, body)


def _shown(values: list[float]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:.3f} ± {spread:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How well the logged losses find wrong labels.")
    add_common_arguments(parser, "label_noise.csv")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--noise", type=float, nargs="+", default=[0.2, 0.4], help=f"shares of train labels made wrong {known}")
    args = parser.parse_args(argv)
    settings = complete(args)
    cells = [
        proxy_cell(args, seed=seed, noise=noise, noise_kind=kind, val_noise=val_noise)
        for seed, kind, noise in itertools.product(range(args.seeds), ("symmetric", "pair"), args.noise)
        for val_noise in (0.0, noise)
    ]
    rows = run_cells(args.csv, cells, partial(run_cell, settings=settings), jobs=args.jobs)
    print(f"\n{args.dataset}, {args.network}, {args.seeds} seed(s): AUROC / precision at the true rate\n")
    print(table(rows))


if __name__ == "__main__":
    main()
