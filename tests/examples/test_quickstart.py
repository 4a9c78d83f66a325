from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"
TINY = ["--epochs", "4", "--cutoff", "3", "--seeds", "1", "--fractions", "0.5", "--batch-size", "128"]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(QUICKSTART), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_quickstart_prints_its_tables_and_findings_and_saves_the_figure(tmp_path):
    result = run(*TINY, "--figure", "out.png", cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    clean, noisy = result.stdout.split("\n20% of the train labels wrong\n")
    for table in (clean, noisy):
        for row in (
            r"^everything +100% +1,146 ",
            r"^CLD, top +50% +573 ",
            r"^CLD, drawn +50% +573 ",
            r"^random per class +50% +573 ",
        ):
            assert len(re.findall(row, table, re.MULTILINE)) == 1, f"{row} in:\n{table}"
    assert re.search(r"^everything +100% +1,146 +0\.0% ", clean, re.MULTILINE)
    assert re.search(r"^everything +100% +1,146 +20\.0% ", noisy, re.MULTILINE)
    assert re.search(
        r"^- CLD, drawn, 20% of the train labels wrong:\n +50% kept: .* to random per class", noisy, re.MULTILINE
    )
    assert "Warning" not in result.stderr
    # It leaves no other files: no logs, checkpoints or scores.
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "4", "--cutoff", "5"], "--cutoff 5 must be from 3 (CLD needs that many epochs) to --epochs 4"),
        (["--figure", "missing/out.png"], "there is no directory"),
    ],
    ids=["cutoff after the last epoch", "figure in a missing directory"],
)
def test_quickstart_refuses_before_it_trains(tmp_path, arguments, said):
    result = run(*arguments, cwd=tmp_path)

    assert result.returncode != 0
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
