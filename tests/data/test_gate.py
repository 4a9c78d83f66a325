"""What a gate counts and shares, and streams that are read at positions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from toy_streams import Stream

from lightning_cld.data.gate import Gate
from lightning_cld.data.random_access import map_style, samples_in


def itself(sample: int) -> int:
    return sample


def test_members_are_counted_until_the_count_is_reset():
    gate = Gate(itself, [7, 2])
    passed = [sample for sample in (2, 3, 7, 2) if gate(sample)]
    assert passed == [2, 7, 2]
    assert gate.passed().tolist() == [2, 1]
    gate.reset()
    assert gate.passed().tolist() == [0, 0]
    for _ in range(300):
        gate(7)
    assert gate.passed()[1] == 255  # and not 300 modulo 256, which a member that never came might have


@pytest.mark.parametrize(
    "number", [torch.tensor(2), torch.tensor(2, dtype=torch.uint8), torch.ones(1, dtype=torch.int) * 2]
)
def test_whole_numbers_of_every_kind(number):
    assert Gate(lambda sample: number, [2], length=9)(None)
    assert Gate(lambda sample: (number, number), [2], length=3, classes=torch.tensor([0, 1, 2]))(None)


@pytest.mark.parametrize("flag", [True, np.bool_(True)])
def test_a_flag_is_a_class_as_for_the_step(flag):
    scored = torch.tensor([0, 1])
    assert Gate(lambda sample: (1, flag), [1], length=2, classes=scored)(None)
    with pytest.raises(ValueError, match="has the class 1, but 0 when it was scored"):
        Gate(lambda sample: (0, flag), [1], length=2, classes=scored)(None)


def test_a_class_that_was_never_seen_is_passed_over():
    gate = Gate(lambda sample: (sample, 5), [1], length=3, classes=torch.tensor([5, 5, -1]))
    assert [gate(sample) for sample in range(3)] == [False, True, False]


def test_a_stream_without_an_end_is_noticed_only_where_something_is_missing():
    gate = Gate(itself, [0], length=2)
    for _ in range(50):
        gate(0)
    gate = Gate(itself, [1], length=2)
    for _ in range(19):
        gate(0)
    with pytest.raises(ValueError, match=r"After 20 samples .* 0 of the 1 samples of the coreset have passed"):
        gate(0)


def streaming_dataset(size: int) -> IterableDataset:
    """What mosaicml-streaming's dataset has: `size` is all of it, and `len` the part of one process."""

    class StreamingDataset(IterableDataset):
        shuffle = False

        def __init__(self) -> None:
            self.size = size

        def __len__(self) -> int:
            return self.size // 2

        def __iter__(self) -> Iterator[int]:
            raise AssertionError("it is read at positions")

        def __getitem__(self, position: int) -> int:
            return position * 10

    StreamingDataset.__module__ = "streaming.base.dataset"
    return StreamingDataset()


def test_mosaicml_streaming_is_read_at_positions():
    stream = streaming_dataset(9)
    assert samples_in(stream) == 9
    made = map_style(DataLoader(stream, batch_size=4, drop_last=True), None)
    assert [batch.tolist() for batch in made] == [[0, 10, 20, 30], [40, 50, 60, 70]]
    assert samples_in(Stream()) is None
