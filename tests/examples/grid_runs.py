"""A benchmark's grid whose cells take no time, as a script to be killed: `python grid_runs.py CSV FOLDER JOBS`.

Every cell leaves a line with its number in `FOLDER/log`, and every worker holds the lock of a file `FOLDER/<pid>.lock`
for as long as it lives. While there is a file `FOLDER/hold`, the first cells wait until every worker has one, and the
last cell waits until that file is gone: then one worker is busy and the others have nothing left to do.
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
    """What follows from the cell alone."""
    import fcntl  # which not every system has

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
