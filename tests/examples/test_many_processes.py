"""What many samples need: the guide's figures are those of the formulas, and real processes agree with the formulas."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import many_processes

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "examples" / "guides" / "many_samples.md").read_text(encoding="utf-8")


def lines_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_real_processes_need_what_the_formulas_say(tmp_path):
    script = ROOT / "examples" / "benchmarks" / "many_processes.py"
    arguments = ["--samples", "20000", "--processes", "2", "--work", str(tmp_path)]
    said = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr[-3000:]
    size = many_processes.Size(20_000, 2_000, 8, 100, 2)
    for number, way in enumerate(many_processes.WAYS):
        for rank in range(2):
            measured = json.loads((tmp_path / str(number) / f"rank-{rank}.json").read_text())
            for what, expected in many_processes.needs(size, way).items():
                # In files of this size their headers are some percent; where nothing is kept, they are all.
                close = pytest.approx(expected, rel=0.1 if what in ("scores", "row") else 0.03, abs=40_000)
                assert measured[what] == close, (way, what)
    assert "| measured / formula |" in said.stdout


def evaluated(formula: str, size) -> float:
    """A formula of the guide, as `4 (N + M) T + 8 N`, with the numbers in it."""
    code = re.sub(r"(?<=[\d)A-Z]) +(?=[(A-Z])", " * ", formula)
    return eval(code, {"N": size.samples, "M": size.references, "T": size.checkpoints, "C": size.classes})


COLUMNS = {
    "on each device": ("device", "step"),
    "in the memory of each process": ("host",),
    "given to collectives at the first checkpoint": ("first",),
    "at each later one": ("later",),
    "in each checkpoint file of Lightning's, if it holds the losses": ("lightning",),
    "the same, if it names their folder": ("named",),
    "written to `dirpath` at each checkpoint": ("row",),
    "`cld-trajectories.npz`": ("losses",),
    "`cld-scores.npz`": ("scores",),
}


def test_the_guide_has_the_formulas_and_what_they_come_to():
    formulas, figures = (lines_of(part) for part in GUIDE.split("## In figures"))
    head, found = ["", *(f"`{way}`" for way in many_processes.WAYS)], set()
    assert formulas[0] == head
    assert figures[0] == head
    for formula, figure in zip(formulas[2:], figures[2 : len(formulas)], strict=True):
        assert formula[0] == figure[0]
        found.add(formula[0])
        for way, own, shown in zip(many_processes.WAYS, formula[1:], figure[1:], strict=True):
            for size in (many_processes.FAR, many_processes.Size(20_000, 3_000, 7, 50, 4)):
                needs = many_processes.needs(size, way)
                expected = sum(needs[what] for what in COLUMNS[formula[0]])
                assert evaluated(own, size) == pytest.approx(expected), (formula[0], way)
            needs = many_processes.needs(many_processes.FAR, way)
            total = sum(needs[what] for what in COLUMNS[formula[0]])
            assert shown == (many_processes.shown(total) if total else "0"), (formula[0], way)
    assert found == set(COLUMNS)
