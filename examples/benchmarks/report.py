"""Rewrites the tables of the README and of the pages in `results`, and the figures of these, from the CSVs.

    python examples/benchmarks/report.py

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. NAME is a key of `TABLES` below.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import accuracy
import cifar100
import cleaning
import early
import keeping
import label_noise
import overhead
import path
import peers
import quality
import scale
import streams
import transfer
import tuning
import validation
from _figures import draw_accuracy, draw_compute
from _grid import Row, read_rows
from _methods import EVERYTHING, HELD_OUT, METHODS
from _rule_cases import CHOSE, JUDGE, TINY
from _rule_tables import cases_table, parts_table, rivals_table, rules_table, shares_table, suspects_table
from _runs import RESULTS

PAGES = (Path(__file__).parents[2] / "README.md", *sorted(RESULTS.glob("*.md")))
_BLOCK = re.compile(r"(<!-- table: (?P<name>.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


RULES = ("random", "CLD", "CLD, drawn")
TRIED = ("former draw", "former draw above zero", "former draw, but without CLD", "drop negative", "drop Otsu")
PARTS = ("CLD", "CLD, first half", "CLD, first third", "CLD, every 2nd", "CLD, every 3rd")
USES = ("letter", "landsat", "digits")
OTHERS = [method for method in METHODS if method not in (*TRIED, *PARTS[1:])]


def _rows(name: str) -> list[Row]:
    return read_rows(RESULTS / f"{name}.csv")


def _of_sizes(name: str, *fractions: str) -> list[Row]:
    """The rows of a few sizes, and of what they are compared with."""
    return [row for row in _rows(name) if row["fraction"] in fractions or row["method"] in (EVERYTHING, HELD_OUT)]


def _accuracy(name: str, noise: str, methods: Sequence[str]) -> Callable[[], str]:
    return lambda: accuracy.table(_rows(name), noise, "steps", methods)


def _quality(dataset: str, noise: float) -> Callable[[], str]:
    def table() -> str:
        rows = _rows("quality")
        return quality.table(row for row in rows if row["dataset"] == dataset and float(row["noise"]) == noise)

    return table


def _of_dataset(script: ModuleType, dataset: str) -> Callable[[], str]:
    return lambda: script.table(_rows(script.__name__), dataset)


def _of_sets(make: Callable[[list[Row], Sequence[str]], str], csv: str, datasets: Sequence[str]) -> str:
    return make(_rows(csv), datasets)


def _overhead(part: str) -> str:
    return overhead.table(_rows("overhead"), part)


def _peers(dataset: str) -> str:
    return peers.table(_rows("peers"), dataset)


TABLES: dict[str, Callable[[], str]] = {
    "rules": lambda: accuracy.compact_table(_rows("fashion_mnist"), RULES),
    "rules, in short": lambda: accuracy.compact_table(_of_sizes("fashion_mnist", "0.1", "0.3"), RULES),
    "label noise": lambda: label_noise.table(_rows("label_noise")),
    "robustness": lambda: accuracy.compact_table(
        _rows("robustness"), (*RULES, "former draw", "former draw above zero")
    ),
    "fresh seeds": lambda: accuracy.compact_table(_rows("digits_fresh"), RULES),
    "early": lambda: early.table(_rows("early")),
    "early, cifar100": lambda: early.table(_rows("early_cifar100")),
    "transfer": lambda: transfer.table(_rows("transfer")),
    "transfer, cifar100": lambda: transfer.table(_rows("transfer_cifar100")),
    "validation": lambda: validation.table(_rows("validation")),
    "validation, cifar100": lambda: validation.table(_rows("validation_cifar100")),
    "path": lambda: path.table(_rows("path")),
    "path, cifar100": lambda: path.table(_rows("path_cifar100")),
    **{f"CNN, {float(n):.0%}": _accuracy("fashion_mnist", n, OTHERS) for n in ("0.0", "0.2", "0.4")},
    **{f"MLP, {float(n):.0%}": _accuracy("fashion_mnist_mlp", n, OTHERS) for n in ("0.0", "0.2", "0.4")},
    **{f"tried, MLP, {float(n):.0%}": _accuracy("fashion_mnist_mlp", n, RULES + TRIED) for n in ("0.0", "0.2", "0.4")},
    **{f"tried, digits, {float(n):.0%}": _accuracy("digits", n, RULES + TRIED) for n in ("0.0", "0.2", "0.4")},
    **{f"early accuracy, {float(n):.0%}": _accuracy("fashion_mnist", n, ("random", *PARTS)) for n in ("0.0", "0.2")},
    **{f"overhead, {part}": partial(_overhead, part) for part in ("run", "sweep", "fit")},
    "streams": lambda: streams.table(_rows("streams")),
    "scale": lambda: scale.table(_rows("scale")),
    "cifar100": _accuracy("cifar100", "0.0", RULES),
    "cifar100, ResNet-18": lambda: cifar100.table(_rows("cifar100_resnet"), _rows("cifar100_resnet_proxies")),
    "cifar100, VGG-16": lambda: cifar100.table(_rows("cifar100_resnet"), _rows("cifar100_resnet_proxies"), "vgg16"),
    "cifar100, ResNet-34": lambda: cifar100.table(
        _rows("cifar100_resnet"), _rows("cifar100_resnet_proxies"), "resnet34"
    ),
    "cifar100, ResNet-18, choices": lambda: cifar100.choices_table(_rows("cifar100_resnet_choices")),
    "cifar100, small": _accuracy("cifar100_small", "0.0", OTHERS),
    **{
        f"quality, {dataset}, {noise:.0%}": _quality(dataset, noise)
        for dataset, noise in (
            ("fashion-mnist", 0.0),
            ("fashion-mnist", 0.2),
            ("cifar100", 0.0),
            ("digits", 0.0),
            ("digits", 0.2),
        )
    },
    "peers": lambda: peers.overview(_rows("peers")),
    "peers, from losses": lambda: peers.stand_ins(_rows("peers")),
    **{f"peers, {dataset}": partial(_peers, dataset) for dataset in (*peers.CHOSE, "landsat", "letter")},
    **{f"tuning, {dataset}": _of_dataset(tuning, dataset) for dataset in (*USES, "fashion-mnist")},
    **{f"cleaning, {dataset}": _of_dataset(cleaning, dataset) for dataset in USES},
    **{f"keeping, {dataset}": _of_dataset(keeping, dataset) for dataset in USES},
    **{
        f"{name}, {which}": partial(_of_sets, make, csv, sets)
        for which, sets in (("sets that chose", CHOSE), ("sets that judge", JUDGE), ("tiny sets", TINY))
        for name, make, csv in (
            ("rules", rules_table, "rules"),
            ("rivals", rivals_table, "rules"),
            ("rules by part", parts_table, "rules"),
            ("rules by case", cases_table, "rules"),
            ("shares", shares_table, "diagnoses"),
            ("suspects", suspects_table, "diagnoses"),
        )
    },
    "epochs": lambda: accuracy.compact_table(_rows("fashion_mnist_epochs"), (*RULES, "CLD, first third")),
}


def render(text: str) -> str:
    """Returns the page with every table rewritten.

    Raises:
        KeyError: If the page names an unknown table.
    """
    return _BLOCK.sub(lambda block: f"{block[1]}{TABLES[block['name']]()}\n{block[3]}", text)


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"written: {page.name}")
    core = [row for row in _rows("fashion_mnist_mlp") if row["method"] in (*OTHERS, EVERYTHING, HELD_OUT)]
    draw_accuracy(core, RESULTS / "fraction.png")
    today = [row for row in _rows("fashion_mnist_epochs") if row["method"] not in TRIED]
    draw_compute(today, RESULTS / "compute.png")
    path.draw(_rows("path"), RESULTS / "path.png")
    path.draw(_rows("path_cifar100"), RESULTS / "path_cifar100.png")


if __name__ == "__main__":
    main()
