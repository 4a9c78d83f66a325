"""The paper's network and data: a ResNet-18 on CIFAR-100, by the authors' recipe, smaller and shorter.

    python examples/benchmarks/cifar100.py --root DIR
    python examples/benchmarks/cifar100.py --root DIR --width 64 --epochs 164 --precision 32-true    # in full

SGD with Nesterov momentum, learning rate 0.1, a tenth of it at 81/164 of the training and again at 121/164, weight
decay 5e-4, batches of 128, crops and flips, 10 % of each class for validation: the authors' script says so. The width
is a quarter of the usual one, and the proxy trains for 30 epochs instead of 164, in bfloat16.

Proxies and targets save their state after every epoch, and finished ones are rows of a CSV: a killed run goes on with
the same command. `--only proxies`, `--only choices` (what early or fewer checkpoints would have chosen), `--only
targets` and `--seeds`, `--noise`, `--fractions`, `--methods`, `--targets` choose a part.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from _grid import Row, markdown, read_rows, run_cells
from _methods import METHODS
from _networks import NETWORKS, make_network
from _runs import RESULTS, Case, make_splits, overlap, rank_correlation
from early import PARTS
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule, LossTrajectories

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are scripts, not a package
from _common import QUIET, Classifier, Images, Splits, quiet

EVERYTHING = "everything"
DRAWS = {
    "random": ("random", False),
    "random, anew": ("random", True),
    "CLD, drawn": ("draw", False),
    "CLD, drawn, anew": ("draw", True),
}
"""The rules that draw, and whether each pass has a draw of its own."""
DEFAULT = [*DRAWS, "CLD", "CLD near zero", "lowest CLD"]
WIDTH, EPOCHS = 16, 30
"""Of the networks and the proxies: a quarter of the usual width, and a fifth of the authors' epochs."""

_TENTH = 0.1
PROXY = ("network", "width", "epochs", "noise", "seed")
"""What a cell says of its proxy."""


class Recipe(Classifier):
    """The examples' classifier with another network and the authors' schedule."""

    def __init__(self, train: Images, network: str, width: int, *, seed: int) -> None:
        super().__init__("cifar100", train, 0.1, seed=seed, network="cnn4")
        L.seed_everything(seed, verbose=False)
        layers = make_network(network, int(train.targets.max()) + 1, width)
        self.network = layers.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.contiguous(memory_format=torch.channels_last)).float()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps * 81 // 164, steps * 121 // 164])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    model: L.LightningModule,
    data: L.LightningDataModule,
    folder: Path,
    precision: Any,
    *callbacks: L.Callback,
    **how: Any,
) -> L.Trainer:
    """Trains, or goes on from the last epoch that an earlier call saved in `folder`."""
    quiet()
    settings = {**QUIET, "enable_checkpointing": True, "precision": precision}
    save = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    trainer = L.Trainer(**settings, **how, callbacks=[*callbacks, save])
    saved = folder / "last.ckpt"
    trainer.fit(model, datamodule=data, ckpt_path=saved if saved.exists() else None, weights_only=False)
    saved.unlink(missing_ok=True)
    return trainer


def folder_of(cell: dict[str, Any], work: Path) -> Path:
    return work / "-".join(str(value).replace(" ", "_").replace(",", "") for value in cell.values())


def train_proxy(cell: dict[str, Any], root: Path, work: Path, precision: str) -> dict[str, Any]:
    """Trains a proxy under the callback. Its losses stay in a folder of `work`."""
    splits, _ = make_splits(_case(cell), root)
    folder = folder_of(cell, work)
    model = Recipe(splits.train, cell["network"], cell["width"], seed=cell["seed"])
    cld = CLDCallback(dirpath=folder, batch_size=1024)
    started = time.process_time()
    trainer = fit(model, splits, folder, precision, cld, max_epochs=cell["epochs"])
    accuracy = 100 * trainer.test(model, datamodule=splits, verbose=False)[0]["test_accuracy"]
    seconds = time.process_time() - started  # of the last piece only, where the run was killed
    return {"accuracy": round(accuracy, 2), "seconds": round(seconds)}


def _case(cell: dict[str, Any]) -> Case:
    faults = {"noise": cell["noise"], "noise_kind": "symmetric", "val_noise": 0.0, "imbalance": 1.0}
    return Case("cifar100", "", 0, seed=cell["seed"], **faults)


@functools.lru_cache(maxsize=1)
def losses_of(folder: Path) -> LossTrajectories:
    return LossTrajectories.load(folder / "cld-trajectories.npz")


def _served(cell: dict[str, Any], splits: Splits, proxy: Path) -> CoresetDataModule:
    """What a target is trained on."""
    length = "coreset" if cell["budget"] == "epochs" else "full"
    method, seed = cell["method"], 2000 + 1000 * cell["seed"]
    if method == EVERYTHING:
        return CoresetDataModule(splits, range(len(splits.train)), epoch_length=length)
    if method in DRAWS:
        rule, redraw = DRAWS[method]
        scores = CLDScores.load(proxy / "cld-scores.npz")
        how = {"rule": rule, "seed": seed, "redraw": redraw}
        return CoresetDataModule(splits, scores, fraction=cell["fraction"], **how, epoch_length=length)
    positions = METHODS[method].choose(losses_of(proxy), cell["fraction"], cell["seed"])
    return CoresetDataModule(splits, positions, epoch_length=length)


def train_target(cell: dict[str, Any], root: Path, work: Path, precision: str) -> dict[str, Any]:
    """Trains a target on a coreset of a proxy, and tests it after the last step."""
    splits, wrong = make_splits(_case(cell), root)
    data = _served(cell, splits, folder_of({name: cell[name] for name in PROXY}, work))
    kept = torch.tensor(data.indices)
    how = (
        {"max_epochs": cell["epochs"]} if cell["budget"] == "epochs" else {"max_epochs": -1, "max_steps": cell["steps"]}
    )
    # Not the proxy's seed: a coreset should work for other initial weights too.
    model = Recipe(splits.train, cell["target"], cell["width"], seed=3000 + cell["seed"])
    trainer = fit(model, data, folder_of(cell, work), precision, **how)
    accuracy = 100 * trainer.test(model, datamodule=data, verbose=False)[0]["test_accuracy"]
    return {
        "samples": len(kept),
        "wrong": round(float(wrong[kept].float().mean()), 4),
        "taken": trainer.global_step,
        "accuracy": round(accuracy, 2),
    }


def compare_choices(cell: dict[str, Any], work: Path) -> dict[str, Any]:
    """Compares the choice of a tenth by some of a proxy's checkpoints with the choice by all of them."""
    losses = losses_of(folder_of({name: cell[name] for name in PROXY}, work))
    share, every = PARTS[cell["part"]]
    whole, part = losses.score(), losses.score(round(share * losses.epochs[-1]), every)
    tops, draws = ([scores.select(fraction=_TENTH, rule=rule) for scores in (whole, part)] for rule in ("top", "draw"))
    return {
        "checkpoints": len(part.epochs),
        "spearman": round(rank_correlation(part.values, whole.values), 4),
        "top": round(overlap(*tops), 4),
        "draw": round(overlap(*draws), 4),
    }


def choices_table(rows: Iterable[Row], width: int = WIDTH, epochs: int = EPOCHS) -> str:
    """A Markdown table: mean over the seeds, for each share of wrong labels and part of the checkpoints."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in _of_size(rows, width, epochs):
        groups.setdefault((row["noise"], row["part"]), []).append(row)
    body = [
        [
            f"{float(noise):.0%}",
            part,
            group[0]["checkpoints"],
            *(f"{statistics.mean(float(row[name]) for row in group):.2f}" for name in ("spearman", "top", "draw")),
        ]
        for (noise, part), group in sorted(groups.items(), key=lambda item: (item[0][0], list(PARTS).index(item[0][1])))
    ]
    head = ["wrong labels", "checkpoints used", "how many", "spearman", "overlap, top", "overlap, draw (same seed)"]
    return markdown(head, body)


def table(
    rows: Iterable[Row],
    proxies: Iterable[Row],
    target: str = "resnet18",
    width: int = WIDTH,
    epochs: int = EPOCHS,
) -> str:
    """A Markdown table of a target's test accuracy by method: a column for each share wrong, share kept and budget.

    Args:
        rows: Those of the targets.
        proxies: Those of the proxies.
        target: The network of the targets.
        width: The width of proxies and targets; rows of others are left out.
        epochs: The same for the epochs of the proxies.
    """
    rows = [row for row in _of_size(rows, width, epochs) if row["target"] == target]
    proxies = [row for row in _of_size(proxies, width, epochs) if row["network"] == target]
    columns = sorted({_column(row) for row in rows if row["method"] != EVERYTHING})
    body = []
    for name in dict.fromkeys([*DRAWS, *METHODS]):
        of_method = [row for row in rows if row["method"] == name]
        if of_method:
            body.append([name, *(_spread([row for row in of_method if _column(row) == column]) for column in columns)])
    everything = [row for row in rows if row["method"] == EVERYTHING]
    as_long = [[row for row in everything if _column(row)[::2] == column[::2]] for column in columns]
    body.append([f"{EVERYTHING}, as long", *map(_spread, as_long)])
    if proxies:
        whole = [[row for row in proxies if float(row["noise"]) == noise] for noise, *_ in columns]
        body.append([f"{EVERYTHING}, all epochs (the proxy)", *map(_spread, whole)])
    head = [
        f"{f'{noise:.0%} wrong' if noise else 'clean'}, {kept:.0%}, {f'{steps:,} steps' if steps else 'all epochs'}"
        for noise, kept, steps in columns
    ]
    return markdown(["trained on", *head], body)


def _of_size(rows: Iterable[Row], width: int, epochs: int) -> list[Row]:
    """The rows of one width and number of epochs, which have nothing to do with those of others."""
    return [row for row in rows if (int(row["width"]), int(row["epochs"])) == (width, epochs)]


def _column(row: Row) -> tuple[float, float, int]:
    """The share of wrong labels, the share kept, and the steps, which are 0 where epochs are equal."""
    return float(row["noise"]), float(row["fraction"]), int(row["steps"])


def _spread(rows: Sequence[Row]) -> str:
    """Mean and standard deviation over the seeds; one seed has no deviation."""
    values = [float(row["accuracy"]) for row in rows]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def make_cells(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The cells of the proxies and of the targets, seed after seed, so that the first seeds are complete early."""
    proxies = [
        {"network": "resnet18", "width": args.width, "epochs": args.epochs, "noise": noise, "seed": seed}
        for seed, noise in itertools.product(args.seeds, args.noise)
    ]
    targets = []
    for proxy, budget, target in itertools.product(proxies, args.budgets, args.targets):
        steps = args.steps if budget == "steps" else 0
        for fraction, method in [*itertools.product(args.fractions, args.methods), (1.0, EVERYTHING)]:
            cell = {**proxy, "target": target, "budget": budget, "steps": steps, "fraction": fraction, "method": method}
            targets.append(cell)
    return proxies, targets


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A ResNet-18 on CIFAR-100 by the authors' recipe.")
    add, known = parser.add_argument, "(default: %(default)s)"
    add("--root", type=Path, default=Path("data"), help=f"folder of torchvision's datasets {known}")
    add("--width", type=int, default=WIDTH, help=f"channels of the first layer {known}")
    add(
        "--epochs", type=int, default=EPOCHS, help=f"epochs of the proxies, and of the targets for equal epochs {known}"
    )
    add("--steps", type=int, default=2112, help=f"steps of the targets for equal steps {known}")
    add("--precision", default="bf16-mixed", help=f"of the Trainer {known}")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help=f"seeds {known}")
    add("--noise", type=float, nargs="+", default=[0.0, 0.4], help=f"shares of train labels made wrong {known}")
    add("--fractions", type=float, nargs="+", default=[0.05, 0.1, 0.3], help=f"shares to keep {known}")
    add("--methods", nargs="+", choices=[*DRAWS, *METHODS], default=DEFAULT, metavar="METHOD")
    add("--targets", nargs="+", choices=NETWORKS, default=["resnet18"], help=f"networks of the targets {known}")
    add("--budgets", nargs="+", choices=["epochs", "steps"], default=["steps"], help=f"what is equal {known}")
    add("--only", choices=["proxies", "choices", "targets"], help="leave out the others")
    add("--jobs", type=int, default=1, help=f"worker processes; several get one thread each {known}")
    add("--work", type=Path, default=Path("benchmark-runs"), help=f"folder of finished proxies {known}")
    args = parser.parse_args(argv)
    where = {"root": args.root.absolute(), "work": args.work.absolute(), "precision": args.precision}
    proxies, targets = make_cells(args)
    if args.only in (None, "proxies"):
        rows = run_cells(
            RESULTS / "cifar100_resnet_proxies.csv", proxies, functools.partial(train_proxy, **where), jobs=args.jobs
        )
        print(json.dumps(rows, indent=1))
    if args.only in (None, "choices"):
        cells = [{**proxy, "part": part} for proxy, part in itertools.product(proxies, PARTS)]
        compare = functools.partial(compare_choices, work=where["work"])
        rows = run_cells(RESULTS / "cifar100_resnet_choices.csv", cells, compare, jobs=args.jobs)
        print(choices_table(rows, args.width, args.epochs))
    if args.only in (None, "targets"):
        run = functools.partial(train_target, **where)
        rows = run_cells(RESULTS / "cifar100_resnet.csv", targets, run, jobs=args.jobs)
        for target in args.targets:
            print(table(rows, read_rows(RESULTS / "cifar100_resnet_proxies.csv"), target, args.width, args.epochs))


if __name__ == "__main__":
    main()
