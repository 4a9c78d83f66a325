"""Streams: loaders that are read as they are, because their samples have no positions of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_cld.data.device_loaders import loader_inside
from lightning_cld.data.generators import OwnGenerators
from lightning_cld.data.loaders import reads_in_its_own_way
from lightning_cld.data.streams import is_stream
from lightning_cld.guards import preserved_rng


def stream_in(loaders: Any) -> Any:
    """The one stream in what the user gave, or a Trainer holds; None if there is something else.

    A stream is anything iterable that is no DataLoader over a map-style dataset, and such a DataLoader if its dataset
    yields ready batches.
    """
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, Sequence) and len(loaders) == 1:
        loaders = loaders[0]
    inside = loader_inside(loaders)
    if isinstance(inside, DataLoader) and inside.batch_sampler is None:
        return loaders
    return loaders if is_stream(loaders) and isinstance(inside, Iterable) and not isinstance(inside, str) else None


class Readings:
    """Reads a stream again and again from the same state, while the stream itself goes on as it would have.

    - One that workers read is read by workers of another loader. In the main process it stays as it is.
    - One that nobody else reads is read itself. Random generators that it keeps are put back.
    - Any other is copied once, and that copy for each reading.

    Args:
        stream: The stream.
        is_own: Whether nobody else reads it.
        kind: "train" or "val", for errors.

    Attributes:
        name: What kind of loader it is, for errors.

    Raises:
        TypeError: If the stream would have to be copied and can't be.
    """

    def __init__(self, stream: Any, *, is_own: bool, kind: str) -> None:
        self.name = type(stream).__name__
        self._stream = stream
        self._is_own = is_own
        self._by_workers = (
            isinstance(stream, DataLoader) and stream.num_workers > 0 and not reads_in_its_own_way(stream)
        )
        if not is_own and not self._by_workers:
            try:
                self._stream = _copy_of(stream)
            except Exception as error:
                raise TypeError(
                    f"The {kind} stream {type(stream).__name__} is read by the training, so a sweep needs a copy of "
                    f"it, but it can't be copied: {error}. Give the sweeps a loader of their own: "
                    f"{kind}_dataloader=... of CLDCallback."
                ) from error
        self._generators = OwnGenerators(dataset_of(self._stream))

    @contextmanager
    def begin(self) -> Iterator[Any]:
        """Gives the stream to read within the body."""
        with self._generators.rewound():
            if self._by_workers:
                yield _loader_like(self._stream)
            else:
                yield self._stream if self._is_own else _copy_of(self._stream)


def reseeded(stream: Any, seed: int) -> AbstractContextManager[None]:
    """Runs its body with the random generators that a stream keeps seeded anew."""
    return OwnGenerators(dataset_of(stream)).seeded(seed)


def dataset_of(stream: Any) -> Any:
    """What a loader reads; the stream itself if it is no loader."""
    return getattr(stream, "dataset", stream)


def readings_of_run(trainer: Trainer, stream: Any, kind: str) -> Readings:
    """Readings of a stream that the Trainer reads.

    If a method of the module or the datamodule made the stream, it makes another one for the sweeps: a loader that
    somebody iterates may have a state that says so. What the method changes in its owner is put back. Which method that
    was, Lightning keeps in private.
    """
    loop: Any = trainer.fit_loop if kind == "train" else trainer.fit_loop.epoch_loop.val_loop
    source = loop._data_source
    if source.is_module() and source.is_defined():
        own, before = OwnGenerators(source.instance), dict(vars(source.instance))
        with preserved_rng(), own.rewound():
            made = stream_in(source.dataloader())
        vars(source.instance).clear()
        vars(source.instance).update(before)
        if made is not None:
            return Readings(made, is_own=dataset_of(made) is not dataset_of(stream), kind=kind)
    return Readings(stream, is_own=False, kind=kind)


def _copy_of(stream: Any) -> Any:
    """A copy of a stream and of all that it holds. A pass that is going on stays behind."""
    parts = [stream, *getattr(stream, "pipeline", ())]  # of webdataset, whose first may be a loader
    running = [getattr(part, "_iterator", None) for part in parts]
    return copy.deepcopy(stream, {id(iterator): None for iterator in running if iterator is not None})


def _loader_like(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader over the same dataset that has not begun to read."""
    copied = copy.copy(loader)
    # Past a lock that is meant for users.
    vars(copied).update(_iterator=None, generator=copy.deepcopy(loader.generator))
    return copied
