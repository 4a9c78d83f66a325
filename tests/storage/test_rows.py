"""Rows grow without needless copies, protect the caller's tensor, and outlive a device without memory."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

from lightning_cld import LossTrajectories
from lightning_cld.storage import rows as module
from lightning_cld.storage.rows import Rows

LOSSES = torch.rand(30, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def allocated(monkeypatch):
    """The number of rows of every buffer that was asked for; those in `refused` fail once, like a full device."""
    sizes, refused = [], []

    def empty(rows, width, device):
        sizes.append(rows)
        if refused and rows in refused:
            refused.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return torch.full((rows, width), torch.nan, device=device)

    monkeypatch.setattr(module, "_empty", empty)
    return sizes, refused


@pytest.fixture
def device(monkeypatch):
    """Lets the CPU grow as a device does, a row at a time."""
    monkeypatch.setattr(module, "_commits_late", lambda device: False)


def grown(rows, until=30):
    for place in range(len(rows), until):
        rows.write(place, LOSSES[place])
    return rows


@pytest.mark.parametrize("reserved", [None, 2, 30, 91])
@pytest.mark.parametrize("first", [1, 5])
@pytest.mark.parametrize("late", [True, False])
def test_rows_are_those_that_were_written(monkeypatch, late, first, reserved):
    monkeypatch.setattr(module, "_commits_late", lambda device: late)
    rows = Rows(LOSSES[:first])
    if reserved:
        rows.reserve(reserved)
    for place in range(first, len(LOSSES)):
        rows.write(place, LOSSES[place])
        assert torch.equal(rows.row(place), LOSSES[place])
        if place in (7, 8, 20):
            assert torch.equal(rows.losses, LOSSES[: place + 1])
    assert (len(rows), rows.width) == (30, 7)
    assert torch.equal(rows.losses, LOSSES)


def test_with_a_reservation_nothing_is_copied(allocated):
    rows = Rows(LOSSES[:1])
    rows.reserve(30)
    first = rows.losses.data_ptr()
    grown(rows)
    rows.reserve(30)
    rows.reserve(4)
    assert rows.losses.data_ptr() == first
    assert allocated[0] == [30]


def test_without_one_the_buffer_doubles(allocated):
    rows = grown(Rows(LOSSES[:1]))
    assert allocated[0] == [1, 2, 4, 8, 16, 32]
    assert torch.equal(rows.losses, LOSSES)


def test_on_a_device_rows_are_put_together_only_when_they_are_read(allocated, device):
    rows = grown(Rows(LOSSES[:1]))
    assert allocated[0] == [1] * 30  # the caller's row, copied, and 29 more
    before = rows.losses.data_ptr()
    assert allocated[0][30:] == [30]
    assert rows.losses.data_ptr() == before


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("reserved", [None, 40])
def test_the_newest_row_can_be_replaced(device, reserved, read):
    rows = Rows(LOSSES[:2])
    if reserved:
        rows.reserve(reserved)
    rows.write(2, LOSSES[9])
    if read:
        assert len(rows.losses) == 3
    rows.write(2, LOSSES[2])
    assert torch.equal(rows.losses, LOSSES[:3])


@pytest.mark.parametrize("place", [1, 2])
def test_neither_the_callers_tensor_nor_what_was_read_of_it_changes(place):
    given = LOSSES[:2].clone()
    rows = Rows(given)
    seen = rows.losses
    rows.write(place, torch.zeros(7))
    given[0] = 9
    assert torch.equal(rows.losses[0], LOSSES[0])
    assert torch.equal(seen[1], LOSSES[1])
    row = torch.ones(7)
    rows.write(3, row)
    row += 1
    assert rows.losses[3].tolist() == [1] * 7


@pytest.mark.parametrize("reserved", [None, 5_000])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda rows: pickle.loads(pickle.dumps(rows))])
def test_a_copy_has_the_rows_and_not_what_was_reserved(copied, reserved):
    rows = Rows(LOSSES[:1])
    if reserved:
        rows.reserve(reserved)
    rows = copied(grown(rows, 20))
    assert torch.equal(rows.losses, LOSSES[:20])
    assert rows.losses.untyped_storage().nbytes() == 20 * 7 * 4
    assert torch.equal(grown(rows).losses, LOSSES)


def test_rows_of_former_pickles_go_on():
    rows = Rows.__new__(Rows)
    rows.__setstate__({"_buffer": torch.cat([LOSSES[:3], torch.full((3, 7), torch.nan)]), "_owned": True, "_count": 3})
    assert torch.equal(rows.losses, LOSSES[:3])
    assert torch.equal(grown(rows).losses, LOSSES)


# A device without memory. The CPU stands for it: what is refused is the first buffer of that many rows.


@pytest.mark.parametrize(
    ("reserved", "refused"),
    [(30, 30), (None, 1), (None, 12), (None, 30)],
    ids=["reserving", "a new row", "reading", "reading at the end"],
)
def test_out_of_memory_loses_no_row_and_warns_once(allocated, device, reserved, refused):
    rows = grown(Rows(LOSSES[:3]), 6)
    allocated[1].append(refused)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if reserved:
            rows.reserve(reserved)
        grown(rows, 12)
        assert torch.equal(rows.losses, LOSSES[:12])
        assert torch.equal(grown(rows).losses, LOSSES)
    assert [str(warning.message).split(",")[0] for warning in caught] == [
        "CLD: the device cpu has no memory left for the logged losses"
    ]
    assert not allocated[1]


def test_scores_survive_a_device_without_memory(allocated, device):
    train, val = LOSSES, LOSSES[:, :3] + 0.1
    trajectories = LossTrajectories(train[:1], val[:1])
    allocated[1].append(30)
    with pytest.warns(UserWarning, match="kept in the CPU's memory"):
        trajectories.reserve(30)
    for epoch in range(1, 30):
        trajectories.record(epoch, train[epoch], val[epoch])
    assert torch.equal(trajectories.score().values, LossTrajectories(train, val).score().values)


def test_a_move_that_finds_no_memory_ends_on_the_cpu(monkeypatch):
    rows = grown(Rows(LOSSES[:1]), 9)

    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.warns(UserWarning, match="the device cuda:0 has no memory left"):
        rows.to("cuda:0")
    assert torch.equal(rows.losses, LOSSES[:9])


def test_more_than_the_cpu_has_is_not_reserved():
    rows = Rows(LOSSES[:1])
    rows.reserve(2**45)
    assert torch.equal(grown(rows).losses, LOSSES)


PEAK = """
import sys
import torch
from lightning_cld.storage.rows import Rows

torch.use_deterministic_algorithms(True)  # fills what torch.empty returns

def kibibytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

width, rows = 500_000, 40
kept = Rows(torch.rand(1, width))
if sys.argv[1] == "reserved":
    kept.reserve(rows)
before = kibibytes("VmRSS")
for place in range(1, rows):
    kept.write(place, torch.rand(width))
print((kibibytes("VmHWM") - before) * 1024 / (rows * width * 4))
kept.losses.sum()
print((kibibytes("VmHWM") - before) * 1024 / (rows * width * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("mode", "most_growing", "most_read"), [("reserved", 1.2, 1.2), ("growing", 2.1, 2.1)])
def test_memory_peaks_at_the_losses_or_twice_that(mode, most_growing, most_read):
    printed = subprocess.run(
        [sys.executable, "-c", PEAK, mode], capture_output=True, text=True, check=True, timeout=120
    )
    growing, read = map(float, printed.stdout.split())
    assert 0.9 < growing < most_growing
    assert read < most_read
