"""What does removing suspected samples gain? By the scores, by the mean loss, at random, and by cleanlab.

    python examples/benchmarks/cleaning.py --dataset digits
    python examples/benchmarks/cleaning.py --dataset letter --root TABLES
    python examples/benchmarks/cleaning.py --dataset landsat --root TABLES

After the removal a fresh model is trained on the rest, for as many epochs as the proxy. cleanlab
(`pip install cleanlab`) gets out-of-sample probabilities from five models of the proxy's kind, each trained for as many
epochs on four fifths of the train set; `--remove` chooses what is compared, so that you can do without. TABLES is a
folder with `letter.npz` and `landsat.npz` (see `_tables.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from _grid import Row, markdown, mean_and_spread, run_cells
from _runs import (
    Case,
    Classifier,
    Images,
    Settings,
    add_common_arguments,
    complete,
    make_splits,
    proxy_cell,
    run_proxy,
    train_proxies,
)
from _tables import PRESETS
from _uses import accuracy, always, probabilities, train
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from lightning_cld import baselines

FOLDS = 5
NOTHING = "nothing"
CLEANLAB = "cleanlab"
WRONG = "the wrong ones, if known"
FORMER = "former suspects(): score of zero or less"
REMOVALS = (
    NOTHING,
    "suspects()",
    FORMER,
    "the draw's rest, as many",
    "highest mean loss, as many",
    "random, as many",
    CLEANLAB,
    "lowest CLD, as many as are wrong",
    "highest mean loss, as many as are wrong",
    WRONG,
)
"""What is removed. "As many" is as many as `CLDScores.suspects` lists. How many are wrong is known only here."""


def find(cell: dict[str, Any], settings: Settings) -> tuple[Tensor, float]:
    """The positions to remove, and the cost of knowing them in epochs of training on everything."""
    case, what = Case.of(cell), cell["removed"]
    splits, wrong = make_splits(case, settings.root)
    if what == NOTHING:
        return torch.empty(0, dtype=torch.int64), 0.0
    if what == WRONG:
        return torch.nonzero(wrong).flatten(), 0.0
    if what == CLEANLAB:
        return find_by_cleanlab(case, splits.train)
    proxy = run_proxy(case, settings)
    scores = proxy.trajectories.score()
    suspects = scores.suspects()
    count = int(wrong.sum()) if what.endswith("are wrong") else len(suspects)
    if what == "random, as many":
        order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(9000 + case.seed))
        return order[:count], 0.0
    if what == "the draw's rest, as many":
        left_out = torch.ones(len(scores), dtype=torch.bool)
        left_out[scores.select(size=len(scores) - count, rule="draw", seed=2000 + case.seed)] = False
        return torch.nonzero(left_out).flatten(), proxy.epochs_paid
    if what == "suspects()":
        return suspects, proxy.epochs_paid
    if what == FORMER:
        return scores.suspects(0.0), proxy.epochs_paid
    by = baselines.highest_mean_loss if what.startswith("highest mean loss") else baselines.lowest_cld
    return by(proxy.trajectories).argsort(descending=True, stable=True)[:count], proxy.epochs_paid


def find_by_cleanlab(case: Case, data: Images) -> tuple[Tensor, float]:
    """What cleanlab lists with its own defaults, and the cost of its probabilities."""
    from cleanlab.filter import find_label_issues  # optional: `main` says so where it is missing

    classes = int(data.targets.max()) + 1
    outside, steps = torch.zeros(len(data), classes), 0
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=case.seed)
    for number, (inside, rest) in enumerate(folds.split(data.targets, data.targets)):
        model, taken = fit(case, data, torch.from_numpy(inside), seed=10_000 + 10 * case.seed + number)
        outside[rest] = probabilities(model, data.images[rest])
        steps += taken
    found = find_label_issues(
        data.targets.numpy(), outside.double().numpy(), return_indices_ranked_by="self_confidence", n_jobs=1
    )
    return torch.from_numpy(found).long(), steps * PRESETS[case.dataset].batch_size / len(data)


def fit(case: Case, data: Images, kept: Tensor, seed: int) -> tuple[Classifier, int]:
    """A fresh model, trained on some of the samples for the proxy's number of epochs, and the steps that it took."""
    preset = PRESETS[case.dataset]
    steps = case.epochs * math.ceil(len(kept) / preset.batch_size)
    model = Classifier(case.dataset, data, preset.lr, seed=seed, network=case.network)
    train(model, data, always(kept), steps=steps, batch_size=preset.batch_size, seed=seed)
    return model, steps


def run_cell(cell: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Removes, trains on the rest, and tests."""
    case = Case.of(cell)
    splits, wrong = make_splits(case, settings.root)
    removed, epochs = find(cell, settings)
    stays = torch.ones(len(wrong), dtype=torch.bool)
    stays[removed] = False
    model, _ = fit(case, splits.train, torch.nonzero(stays).flatten(), seed=3000 + case.seed)
    found = int(wrong[removed].sum())
    return {
        "samples": len(removed),
        "share": round(len(removed) / len(wrong), 4),
        "precision": round(found / len(removed), 4) if len(removed) else "",
        "recall": round(found / int(wrong.sum()), 4) if len(removed) and wrong.any() else "",
        "cost_epochs": round(epochs, 2),
        "accuracy": accuracy(model, splits.test),
    }


def table(rows: Iterable[Row], dataset: str) -> str:
    """Mean ± spread over the seeds, by labels and by what was removed."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["dataset"] == dataset:
            groups.setdefault((row["noise"], row["removed"]), []).append(row)
    body = []
    for noise, what in itertools.product(dict.fromkeys(noise for noise, _ in groups), REMOVALS):
        if (noise, what) in groups:
            group = groups[noise, what]
            labels = f"{float(noise):.0%} wrong" if float(noise) else "clean"
            shown = [_shown(group, name, 3) for name in ("share", "precision", "recall")]
            body.append([labels, what, *shown, _shown(group, "cost_epochs", 1), _shown(group, "accuracy", 1)])
    head = ["labels", "removed", "share", "precision", "recall", "cost, in epochs", "accuracy"]
    return markdown(head, body)


def _shown(rows: Sequence[Row], name: str, digits: int) -> str:
    values = [float(row[name]) for row in rows if row[name]]  # nothing removed, or nothing to find
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Removing suspected samples, then training on the rest.")
    add_common_arguments(parser, "cleaning.csv")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--noise", type=float, nargs="+", default=[0.0, 0.2], help=f"shares of train labels made wrong {known}")
    add("--remove", nargs="+", choices=REMOVALS, default=REMOVALS, metavar="WHAT", help=", ".join(REMOVALS))
    args = parser.parse_args(argv)
    if CLEANLAB in args.remove and importlib.util.find_spec("cleanlab") is None:
        others = " ".join(f'"{what}"' for what in REMOVALS if what != CLEANLAB)
        raise SystemExit(
            f"cleanlab is not installed. Run `pip install cleanlab`, or do without it by --remove {others}"
        )
    settings = complete(args)
    proxies = [
        proxy_cell(args, seed=seed, noise=noise) for seed, noise in itertools.product(range(args.seeds), args.noise)
    ]
    cells = [{**proxy, "removed": what} for proxy, what in itertools.product(proxies, args.remove)]
    train_proxies(proxies, args, settings)
    rows = run_cells(args.csv, cells, partial(run_cell, settings=settings), jobs=args.jobs)
    print(f"\n{args.dataset}, {args.epochs} epochs, {args.seeds} seed(s)\n")
    print(table(rows, args.dataset))


if __name__ == "__main__":
    main()
