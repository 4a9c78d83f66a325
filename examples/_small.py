"""What the small examples share: their arguments and the table that they print."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence


def arguments(argv: Sequence[str] | None, *, epochs: int, seeds: int = 3, fraction: float = 0.2) -> argparse.Namespace:
    """The command line; the values given here are what suits the example's data."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs, help="epochs of every training")
    parser.add_argument("--seeds", type=int, default=seeds, help="how many seeds to repeat it all with")
    parser.add_argument("--fraction", type=float, default=fraction, help="share of the train set to keep")
    return parser.parse_args(argv)


def print_table(metric: str, rows: Sequence[tuple[str, int, float]]) -> None:
    """Prints mean and standard deviation over the seeds.

    Args:
        metric: What was measured.
        rows: What was trained on, the number of its samples, and the value measured; one row for each seed.
    """
    print(f"{'trained on':<20} {'samples':>8}   {metric}")
    for name, samples in dict.fromkeys((name, samples) for name, samples, _ in rows):
        values = [value for row, _, value in rows if row == name]
        around = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"{name:<20} {samples:>8,}   {statistics.fmean(values):.2f}{around}")
