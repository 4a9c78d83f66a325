"""A script to be killed, which runs a benchmark's grid of instant cells: `python grid_runs.py CSV FOLDER JOBS`.

Every cell appends its number to `FOLDER/log`. Every worker holds the lock of `FOLDER/<pid>.lock` as long as it lives.
While the file `FOLDER/hold` exists, the first cells wait until every worker has started, and the last cell waits until
the file is gone. One worker is then busy and the others are idle.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
from _grid import run_cells

CELLS = [{"method": method, "fraction": fraction} for fraction in (10.0, 0.5) for method in ("b, c", "a", '"')]

_locks = []


def work(cell: dict[str, Any], folder: Path, jobs: int) -> dict[str, Any]:
    """Results that depend only on the cell."""
    import fcntl  # not on every system

    if not _locks:
        _locks.append((folder / f"{os.getpid()}.lock").open("w"))
        fcntl.flock(_locks[0], fcntl.LOCK_EX)
    number, hold = CELLS.index(cell), folder / "hold"
    with (folder / "log").open("a") as file:
        file.write(f"{number}\n")
    while hold.exists() and (number == len(CELLS) - 1 or len(list(folder.glob("*.lock"))) < jobs):
        time.sleep(0.01)
    return {"accuracy": cell["fraction"] / 3, "text": f"{number}, {cell['method']}"}


if __name__ == "__main__":
    csv, folder, jobs = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    run_cells(csv, CELLS, partial(work, folder=folder, jobs=jobs), jobs=jobs)
