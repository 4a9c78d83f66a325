"""Batches of those samples of a stream that pass a gate, made in the worker that reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_cld.data.gate import Gate
from lightning_cld.data.narrowing import WorkerStart, made_again


class GatedBatches(IterableDataset[tuple[int, bool, Any]]):
    """Reads a stream and makes batches of the samples that pass.

    It yields the number of samples, True and a batch; at the end of the stream, the number of samples that were too few
    for one, False, and a list of these.

    Args:
        stream: The user's dataset.
        gate: Says which samples pass; None for all.
        batch_size: Samples a batch.
        collate_fn: Makes a batch of a list of samples.
    """

    def __init__(self, stream: Any, gate: Gate | None, batch_size: int, collate_fn: Callable[[Any], Any]) -> None:
        self.stream = stream
        self.gate = gate
        self.batch_size = batch_size
        self.collate_fn = collate_fn

    @override
    def __iter__(self) -> Iterator[tuple[int, bool, Any]]:
        kept: list[Any] = []
        for sample in self.stream:
            if self.gate is None or self.gate(sample):
                kept.append(sample)
            if len(kept) == self.batch_size:
                yield len(kept), True, self.collate_fn(kept)
                kept = []
        if kept:
            yield len(kept), False, kept


class _StatefulBatches(GatedBatches):
    """With the state of its stream: whenever a batch has been yielded, no sample is held back."""

    _beginning: Any = None

    @override
    def __iter__(self) -> Iterator[tuple[int, bool, Any]]:
        yield from super().__iter__()
        self.rewind()

    def rewind(self) -> None:
        if self._beginning is not None:  # streams of Hugging Face would begin at a loaded state again and again
            self.stream.load_state_dict(self._beginning)
            self._beginning = None

    def state_dict(self) -> Any:
        return self.stream.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._beginning = copy.deepcopy(self.stream.state_dict())
        self.stream.load_state_dict(state)


def rewind(loader: Any) -> None:
    """Puts the stream of a `batching_loader` back to its beginning, if a state was loaded into it in this process."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, _StatefulBatches):
        dataset.rewind()


def batching_loader(loader: DataLoader[Any], stream: Any, gate: Gate | None, *, plain: bool = False) -> DataLoader[Any]:
    """A loader that reads as the user's does, and yields what `GatedBatches` does.

    Args:
        loader: The user's loader, with a batch size.
        stream: The stream to read: the user's, or one that is filtered already.
        gate: As for `GatedBatches`.
        plain: Whether to make one of torch's class rather than of the user's.

    Raises:
        TypeError: If the loader's class can't be made so.
    """
    stateful = all(callable(getattr(stream, name, None)) for name in ("state_dict", "load_state_dict"))
    kind = _StatefulBatches if stateful and not plain else GatedBatches
    batches = kind(stream, gate, loader.batch_size or 1, loader.collate_fn)
    changes: dict[str, Any] = {"batch_size": None, "collate_fn": _as_it_is}
    if loader.num_workers:
        changes["worker_init_fn"] = WorkerStart(loader.worker_init_fn, "stream")
    return made_again(loader, batches, plain=plain, **changes)


def _as_it_is(batch: Any) -> Any:
    return batch
