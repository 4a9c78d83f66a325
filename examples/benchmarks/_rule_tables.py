"""The tables of `rules.py`: in how many cells a rule is behind random, level with it or ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from _grid import Row, markdown
from _rule_cases import CASES
from scipy import stats

RANDOM = "random"
RULES = ("top", "former draw", "draw", "right labels")
LISTS = ("suspects", "as many of lowest CLD", "CLD below zero")


@dataclass(frozen=True)
class Difference:
    """A rule less another one, random if nothing else is said, in one cell."""

    dataset: str
    case: str
    rule: str
    fraction: float
    points: float  # mean over the seeds
    sign: int  # -1: behind, 0: level, 1: ahead


def differences(rows: Iterable[Row], datasets: Sequence[str], than: str = RANDOM) -> list[Difference]:
    """Compares every rule with one of them in every cell by a paired t-test over the seeds, at 95 %."""
    own = [row for row in rows if row["dataset"] in datasets]
    of_other = {_place(row): row["accuracies"] for row in own if row["rule"] == than}
    found = []
    for row in own:
        if row["rule"] == than or _place(row) not in of_other:
            continue
        pairs = [np.array(values.split(), float) for values in (row["accuracies"], of_other[_place(row)])]
        place = row["dataset"], row["case"], row["rule"], float(row["fraction"])
        found.append(Difference(*place, float((pairs[0] - pairs[1]).mean()), sign_of(*pairs)))
    return found


def _place(row: Row) -> tuple[str, ...]:
    return row["dataset"], row["case"], row["seeds"], row["fraction"]


def sign_of(rule: np.ndarray, other: np.ndarray) -> int:
    """Whether a rule is behind another one (-1), level (0) or ahead (1)."""
    difference = np.round(rule - other, 6)
    if np.ptp(difference) == 0:  # no spread to test by
        return int(np.sign(difference[0]))
    return int(np.sign(difference.mean())) if stats.ttest_1samp(difference, 0).pvalue < 0.05 else 0


def rules_table(rows: Iterable[Row], datasets: Sequence[str]) -> str:
    """A line per rule."""
    found = differences(rows, datasets)
    order = [rule for rule in RULES if any(row.rule == rule for row in found)]
    return _table("rule", {rule: [row for row in found if row.rule == rule] for rule in order})


def cases_table(rows: Iterable[Row], datasets: Sequence[str], rule: str = "draw") -> str:
    """A line per case, for one rule."""
    found = [row for row in differences(rows, datasets) if row.rule == rule]
    order = [case for case in CASES if any(row.case == case for row in found)]
    return _table("case", {case: [row for row in found if row.case == case] for case in order})


def parts_table(rows: Iterable[Row], datasets: Sequence[str], rule: str = "draw") -> str:
    """A line per data set and a line per fraction, for one rule."""
    found = [row for row in differences(rows, datasets) if row.rule == rule]
    parts = {name: [row for row in found if row.dataset == name] for name in datasets}
    for fraction in sorted({row.fraction for row in found}):
        parts[f"{100 * fraction:g} % kept"] = [row for row in found if row.fraction == fraction]
    return _table("cells", {name: part for name, part in parts.items() if part})


def rivals_table(rows: Iterable[Row], datasets: Sequence[str], rule: str = "draw") -> str:
    """A line per other rule, for one rule."""
    rows = list(rows)
    parts = {other: [row for row in differences(rows, datasets, other) if row.rule == rule] for other in RULES}
    return _table(f"{rule} against", {other: part for other, part in parts.items() if part})


def _table(what: str, parts: dict[str, list[Difference]]) -> str:
    body = [[name, *_counted(part)] for name, part in parts.items()]
    return markdown([what, "behind", "level", "ahead", "mean difference", "worst cell"], body)


def _counted(found: Sequence[Difference]) -> list[str]:
    signs = [row.sign for row in found]
    worst = min(found, key=lambda row: row.points)
    place = f"{worst.points:+.1f} ({worst.dataset}, {worst.case}, {100 * worst.fraction:g} %)"
    return [*(str(signs.count(sign)) for sign in (-1, 0, 1)), f"{np.mean([row.points for row in found]):+.2f}", place]


def shares_table(rows: Iterable[Row], datasets: Sequence[str]) -> str:
    """A line per case: the estimated share of wrong labels against the true one, in percent."""
    body = []
    for case, own in _by_case(rows, datasets):
        true, estimate = (np.array([float(row[name]) for row in own]) for name in ("share", "estimate"))
        numbers = (
            true,
            estimate,
            abs(estimate - true),
            *(_column(own, n) for n in ("held", "class_error", "classes_held")),
        )
        places = (1, 1, 1, 0, 1, 0)
        body.append([case, *(f"{100 * np.mean(n):.{p}f}" for n, p in zip(numbers, places, strict=True))])
    head = ["case", "wrong", "estimate", "mean error", "intervals that hold it", "mean error of a class"]
    return markdown([*head, "intervals of classes that hold it"], body)


def suspects_table(rows: Iterable[Row], datasets: Sequence[str]) -> str:
    """A line per case with wrong labels: precision / recall of lists of suspects, and AUROC of several scores."""
    body = []
    aurocs: list[str] = []
    for case, own in _by_case((row for row in rows if float(row["share"])), datasets):
        aurocs = [name for name in own[0] if name.startswith("AUROC: ")]
        lists = [f"{_mean(_column(own, f'{n}: precision'))} / {_mean(_column(own, f'{n}: recall'))}" for n in LISTS]
        body.append([case, *lists, *(_mean(_column(own, name)) for name in aurocs)])
    return markdown(["case", *LISTS, *aurocs], body)


def _by_case(rows: Iterable[Row], datasets: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    rows = [row for row in rows if row["dataset"] in datasets]
    for case in CASES:
        own = [row for row in rows if row["case"] == case]
        if own:
            yield case, own


def _column(rows: Iterable[Row], name: str) -> list[float]:
    """The values of a column, without empty ones."""
    return [float(row[name]) for row in rows if row[name]]


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}" if values else "-"
