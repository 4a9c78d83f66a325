"""Does training on a CLD coreset follow the path of training on everything? Validation losses during training.

    python examples/benchmarks/path.py --root DIR --jobs 2

Targets start from the same initial weights. At evenly spaced steps, the validation loss on a coreset of 10 % is
compared with the validation loss of training on everything. A random coreset is compared too, and so is training on
everything with another order of batches, which shows how close two runs come by chance.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from _grid import Row, markdown, mean_and_spread, run_cells
from _methods import EVERYTHING, METHODS
from _runs import (
    RESULTS,
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
from matplotlib.figure import Figure
from torch.nn import functional as F

FRACTION = 0.1
POINTS = 30
ANOTHER_ORDER = "everything, another order"


class ValidationCurve(L.Callback):
    """Records the mean validation loss at evenly spaced steps."""

    def __init__(self, steps: int, another_order: bool) -> None:
        self.every = max(1, steps // POINTS)
        self.another_order = another_order
        self.points: list[tuple[int, float]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.another_order:  # changes the order of batches, after the initial weights are made
            torch.manual_seed(torch.initial_seed() + 1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            pl_module.eval()
            val = trainer.datamodule.val
            with torch.no_grad():
                parts = zip(val.images.split(1000), val.targets.split(1000), strict=True)
                losses = [F.cross_entropy(pl_module(images), targets, reduction="sum") for images, targets in parts]
            self.points.append((trainer.global_step, float(sum(losses)) / len(val)))
            pl_module.train()


def run_cell(cell: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Trains one target and records its curve."""
    case, method = Case.of(cell), cell["method"]
    positions = None
    if method in METHODS:
        positions = METHODS[method].choose(run_proxy(case, settings).trajectories, FRACTION, case.seed)
    curve = ValidationCurve(settings.steps, method == ANOTHER_ORDER)
    result = train_target(case, settings, positions, curve, network=case.network, budget="steps")
    steps, losses = zip(*curve.points, strict=True)
    return {
        "accuracy": result["accuracy"],
        "at_steps": " ".join(map(str, steps)),
        "val_losses": " ".join(f"{loss:.4f}" for loss in losses),
    }


def _curves(rows: Iterable[Row]) -> dict[tuple[str, str, str], torch.Tensor]:
    return {
        (row["noise"], row["seed"], row["method"]): torch.tensor([float(loss) for loss in row["val_losses"].split()])
        for row in rows
    }


def table(rows: Sequence[Row]) -> str:
    """Mean absolute gap to the curve of everything and correlation with it: mean ± spread over the seeds."""
    curves = _curves(rows)
    groups: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for row in rows:
        if row["method"] != EVERYTHING:
            curve, full = (curves[row["noise"], row["seed"], name] for name in (row["method"], EVERYTHING))
            gap = float((curve - full).abs().mean())
            together = float(torch.corrcoef(torch.stack([curve, full]))[0, 1])
            groups.setdefault((row["noise"], row["method"]), []).append((gap, together, float(curve[-1] - full[-1])))
    body = []
    for (noise, method), values in groups.items():
        shown = [mean_and_spread(column) for column in zip(*values, strict=True)]
        body.append([f"{float(noise):.0%}", method, *(f"{mean:.3f} ± {spread:.3f}" for mean, spread in shown)])
    return markdown(["wrong labels", "trained on", "mean gap", "correlation", "gap at the end"], body)


def draw(rows: Sequence[Row], path: Any) -> None:
    """The curves of every noise level, averaged over the seeds."""
    noises = sorted({row["noise"] for row in rows}, key=float)
    curves = _curves(rows)
    figure = Figure(figsize=(1 + 4.5 * len(noises), 4), layout="constrained")
    steps = [int(step) for step in rows[0]["at_steps"].split()]
    for axis, noise in zip(figure.subplots(1, len(noises), squeeze=False)[0], noises, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            members = [curve for (rate, _, name), curve in curves.items() if (rate, name) == (noise, method)]
            style = {"color": "black"} if method == EVERYTHING else {}
            axis.plot(steps, torch.stack(members).mean(dim=0), label=method, **style)
        axis.set_title(f"{float(noise):.0%} of the train labels wrong")
        axis.set_xlabel("steps")
        axis.set_ylabel("validation loss")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Validation losses of training on a coreset and on everything.")
    add_common_arguments(parser, "path.csv")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--noise", type=float, nargs="+", default=[0.0, 0.2], help=f"shares of train labels made wrong {known}")
    add("--figure", default=str(RESULTS / "path.png"), help=f"where to save the figure {known}")
    args = parser.parse_args(argv)
    settings = complete(args)
    proxies = [proxy_cell(args, seed=seed, noise=n) for seed, n in itertools.product(range(args.seeds), args.noise)]
    methods = (EVERYTHING, ANOTHER_ORDER, "CLD", "CLD, drawn", "random", "lowest CLD")
    cells = [target_cell(proxy, settings, method=method) for proxy, method in itertools.product(proxies, methods)]
    train_proxies(proxies, args, settings)
    rows = run_cells(args.csv, cells, partial(run_cell, settings=settings), jobs=args.jobs)
    print(f"\n{args.dataset}, {args.network}, {args.seeds} seed(s), {FRACTION:.0%} kept, equal steps\n")
    print(table(rows))
    draw(rows, args.figure)
    print(f"Figure: {args.figure}")


if __name__ == "__main__":
    main()
