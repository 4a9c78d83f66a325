"""Runs each cell of a benchmark once and keeps the results in one CSV. Nothing here knows about CLD."""

from __future__ import annotations

import csv
import multiprocessing
import os
import statistics
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV; none if the file does not exist yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_cells(
    path: Path, cells: Sequence[dict[str, Any]], work: Callable[[dict[str, Any]], dict[str, Any]], *, jobs: int
) -> list[Row]:
    """Runs the cells that `path` does not hold yet, and returns the rows of all cells.

    A row is a cell and the result of `work` for it. After every cell the whole file is replaced, sorted. A run that was
    killed and restarted therefore leaves the same file as an uninterrupted run.

    Args:
        path: The CSV. Its rows of other cells are kept.
        cells: Plain values that identify each cell, all under the same names.
        work: A function at the top level of a module, called with a cell in a worker process.
        jobs: Number of worker processes.
    """
    if not cells:
        return []
    names = list(cells[0])
    rows = {_key(row, names): row for row in read_rows(path)}
    open_cells = [cell for cell in cells if _key(cell, names) not in rows]
    # Workers are spawned: a forked one would inherit the parent's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, context, _start_worker, (jobs,)) as pool,
        tqdm(total=len(cells), initial=len(cells) - len(open_cells), unit="cell", desc=path.stem) as bar,
    ):
        futures = {pool.submit(work, cell): cell for cell in open_cells}
        try:
            for future in as_completed(futures):
                row = {name: str(value) for name, value in {**futures[future], **future.result()}.items()}
                rows[_key(row, names)] = row
                write_rows(path, rows.values())
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [rows[_key(cell, names)] for cell in cells]


def _key(row: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in names)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replaces a CSV by these rows, sorted."""
    ordered = sorted(rows, key=lambda row: [_sortable(value) for value in row.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ordered[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    temporary.replace(path)


def _sortable(value: str) -> tuple[float, str]:
    """A sort key that puts numbers by value, and before any text."""
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value


def _start_worker(jobs: int) -> None:
    if jobs > 1:
        torch.set_num_threads(1)
    # If its parent is killed, a worker would wait forever for its next cell.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# Tables


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the standard deviation over the seeds (0 for one seed)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
