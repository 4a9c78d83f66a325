"""Writes the tables of RESULTS.md and of the README anew from the CSVs.

    python examples/benchmarks/report.py

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; its name says which of those below it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import accuracy
import early
import label_noise
import path
import transfer
import validation
from _grid import read_rows
from _runs import RESULTS

PAGES = (Path(__file__).with_name("RESULTS.md"), Path(__file__).parents[2] / "README.md")
_BLOCK = re.compile(r"(<!-- table: (?P<name>.+?) -->\n).*?(\n<!-- end of table -->)", re.DOTALL)


def _accuracy(csv: str, noise: str, budget: str = "steps") -> Callable[[], str]:
    return lambda: accuracy.table(read_rows(RESULTS / csv), noise, budget)


TABLES: dict[str, Callable[[], str]] = {
    "Fashion-MNIST, 0 %": _accuracy("fashion_mnist.csv", "0.0"),
    "Fashion-MNIST, 20 %": _accuracy("fashion_mnist.csv", "0.2"),
    "Fashion-MNIST, 40 %": _accuracy("fashion_mnist.csv", "0.4"),
    "label noise": lambda: label_noise.table(read_rows(RESULTS / "label_noise.csv")),
    "early": lambda: early.table(read_rows(RESULTS / "early.csv")),
    "transfer": lambda: transfer.table(read_rows(RESULTS / "transfer.csv")),
    "validation": lambda: validation.table(read_rows(RESULTS / "validation.csv")),
    "path": lambda: path.table(read_rows(RESULTS / "path.csv")),
}


def render(text: str) -> str:
    """The page with every table made anew.

    Raises:
        KeyError: If the page names a table that there is not.
    """
    return _BLOCK.sub(lambda block: f"{block[1]}{TABLES[block['name']]()}{block[3]}", text)


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"written: {page.name}")


if __name__ == "__main__":
    main()
