"""Streams that give any sample by its position: litdata's and mosaicml-streaming's `StreamingDataset`."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_cld.data.gate import Gate
from lightning_cld.data.loaders import loader_settings


class _AtPositions(Dataset[Any]):
    """A stream as a map-style dataset.

    Args:
        stream: For which `samples_in` gives a number.
        gate: Checks that a sample says the position that it is read at; None where samples don't say theirs.
    """

    def __init__(self, stream: Any, gate: Gate | None) -> None:
        self.stream = stream
        self.gate = gate
        self.length = samples_in(stream)

    def __len__(self) -> int:
        return self.length or 0

    @override
    def __getitem__(self, position: int) -> Any:
        sample = self.stream[position]
        said = position if self.gate is None else self.gate.locate(sample)
        if said != position:
            raise ValueError(
                f"identify gives {said} for the sample at position {position} of the stream. The scores are served by "
                "the positions in the stream itself, which those in the scores must be: let the step return them."
            )
        return sample


def samples_in(stream: Any) -> int | None:
    """How many samples a stream has that gives any by its position; None for a stream that does not.

    Their `len` is another number: it depends on workers and processes, and on what they drop.
    """
    library = library_of(stream)
    if library == "litdata":
        return int(sum(end - start for start, end in stream.region_of_interest))  # of each chunk
    if library == "streaming":
        return int(stream.size)
    return None


def library_of(stream: Any) -> str | None:
    """Whose `StreamingDataset` a stream is: "litdata" or "streaming" (mosaicml); None for other streams."""
    for kind in type(stream).__mro__:
        package = kind.__module__.partition(".")[0]
        if kind.__name__ == "StreamingDataset" and package in ("litdata", "streaming"):
            return package
    return None


def map_style(loader: DataLoader[Any], gate: Gate | None) -> DataLoader[Any]:
    """A DataLoader of torch with the settings of a stream's, over all samples of the stream by position.

    Args:
        loader: The user's loader over a stream for which `samples_in` gives a number.
        gate: As for `_AtPositions`.
    """
    return DataLoader(
        _AtPositions(loader.dataset, gate),
        batch_size=loader.batch_size,
        shuffle=bool(loader.dataset.shuffle),  # type: ignore[attr-defined]  # as both libraries have it
        drop_last=loader.drop_last,
        generator=loader.generator,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
        **loader_settings(loader),
    )
