"""Coresets of streams on two processes."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from launching import run_script
from stream_runs import BATCH, CUT, DEVICES, EPOCHS, SIZE
from toy_streams import SAMPLES, flat, scores_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ddp_fork needs fork")

SHARE = -(-SIZE // DEVICES)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """A function that gives the results of each rank of a fit."""
    root = tmp_path_factory.mktemp("streams")
    log = run_script("stream_runs.py", root, log=root / "log.txt")

    def load(name: str) -> list[dict[str, Any]]:
        files = [root / f"{name}-{rank}.pt" for rank in range(DEVICES)]
        assert all(file.exists() for file in files), log[-6000:]
        return [torch.load(file) for file in files]

    return load


def members() -> list[int]:
    return sorted(scores_of().select(size=SIZE).tolist())


@pytest.mark.parametrize(("name", "length"), [("unequal", 2), ("workers", 2), ("full", 5)])
def test_all_take_the_same_steps_and_serve_their_share_again_and_again(ends, name, length):
    assert length == -(-(SAMPLES // DEVICES if name == "full" else SHARE) // BATCH)
    ranks = ends(name)
    for rank, end in enumerate(ranks):
        assert end["error"] == ""
        assert end["length"] == length
        assert len(end["served"]) == EPOCHS * length
        own = [position for position in members() if (position < CUT) == (rank == 0)]
        times = Counter(flat(end["served"]))
        assert sorted(times) == own
        assert max(times.values()) - min(times.values()) <= 1  # pass after pass, also from one epoch to the next
    assert len(set(flat(ranks[0]["served"]))) != len(set(flat(ranks[1]["served"])))


@pytest.mark.parametrize("step", [3, 4, 9])
def test_each_process_goes_on_where_it_was(ends, step):
    for whole, resumed in zip(ends("unequal"), ends(f"resumed-{step}"), strict=True):
        assert resumed["error"] == ""
        assert resumed["served"] == whole["served"][step:]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("same", "of 15 came several times"),
        ("overlap", "of 15 came several times"),
        ("missing", "of 15 were not in it"),
        ("none", "on rank 1 gives no batch: 0 of the coreset's 15 samples are in it. Every process needs some"),
        ("another", "Sample 42 is outside of the 40"),
    ],
)
def test_both_processes_raise(ends, name, expected):
    errors = [end["error"] for end in ends(name)]
    assert all(expected in error for error in errors), errors
    if name in ("same", "overlap", "missing"):
        assert "together served not every sample of the coreset once" in errors[0]
