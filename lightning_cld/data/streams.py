"""Which loaders are streams, and the loader that serves a coreset of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_cld.data.device_loaders import around, loader_inside
from lightning_cld.data.gate import Gate
from lightning_cld.data.gated_batches import batching_loader
from lightning_cld.data.loaders import reads_in_its_own_way
from lightning_cld.data.narrowing import made_again, narrow_loader
from lightning_cld.data.random_access import map_style, samples_in
from lightning_cld.data.redrawing import Draws
from lightning_cld.data.samplers import processes
from lightning_cld.data.stream_loader import Batching, StreamLoader
from lightning_cld.data.webdatasets import filtered, is_pipeline, only_loader, own_length, sample_key, workers_of
from lightning_cld.names import SampleNames

Identify = Callable[[Any], Any]
"""From a sample to its position or name, or to a tuple of that and its class."""


class Members(NamedTuple):
    """The coreset of a stream, and what is known of all its samples.

    Attributes:
        positions: Of the coreset; with names places among them.
        length: The number of scored positions; None if it is unknown.
        used: The number of scored samples; None if it is unknown.
        names: Of all scored samples, or of the coreset if `strangers`; None for positions.
        classes: Of all positions, int64 `[length]`, -1 where there was no sample; None if unknown.
        strangers: Whether other names are expected.
    """

    positions: list[int]
    length: int | None = None
    used: int | None = None
    names: SampleNames | None = None
    classes: Tensor | None = None
    strangers: bool = False


def is_stream(loader: Any) -> bool:
    """Whether a train loader gives samples without positions: whatever is no map-style DataLoader of torch.

    A collection of loaders is none.
    """
    if isinstance(loader, (Mapping, list, tuple, CombinedLoader)):
        return False
    inside = loader_inside(loader)
    return not isinstance(inside, DataLoader) or isinstance(inside.dataset, IterableDataset)


def serve_stream(
    loader: Any,
    members: Members,
    *,
    identify: Identify | None,
    full_length: bool,
    trainer: Trainer | None,
    draws: Draws | None = None,
) -> Any:
    """The loader that serves a coreset of a stream.

    Args:
        loader: The user's loader, for which `is_stream` is true.
        members: The coreset.
        identify: Says which sample one is; None for streams that know it.
        full_length: Whether an epoch is to be as long as the full stream's.
        trainer: The Trainer to serve; None for one process.
        draws: A coreset for each pass in place of `members`.

    Raises:
        TypeError: If it is unknown which sample is which, or samples can't be told apart before they are in batches.
        ValueError: If the number of batches is unknown where it must be known, or passes can't be drawn.
    """
    inside = only_loader(loader_inside(loader))
    samples = samples_in(inside.dataset) if isinstance(inside, DataLoader) else None
    if samples is not None and members.names is None and inside.batch_size is not None:
        return _by_position(loader, inside, samples, members, identify, full_length, trainer, draws)
    if draws is not None:
        raise ValueError(
            "redraw=True draws a coreset for each epoch, and a stream is read anew for each: samples that are not in "
            "the draw can't be skipped without reading them. Leave redraw out, or write the samples to a dataset with "
            "random access."
        )
    if isinstance(inside, DataLoader):
        own = own_length(loader) if is_pipeline(loader) else None  # of a WebLoader around it
        served = _of_loader(inside, members, identify, full_length, trainer, own)
    elif is_pipeline(inside):
        served = _of_own_batches(inside, members, identify or sample_key, full_length, trainer)
    else:
        raise TypeError(
            f"CoresetDataModule narrows a torch DataLoader, but train_dataloader() returned a {type(inside).__name__}, "
            f"which gives ready batches. {_BATCH_LATER}"
        )
    is_device_loader = not isinstance(loader, DataLoader) and isinstance(loader_inside(loader), DataLoader)
    return around(loader, served) if is_device_loader else served


def _by_position(
    loader: Any,
    inside: DataLoader[Any],
    samples: int,
    members: Members,
    identify: Identify | None,
    full_length: bool,
    trainer: Trainer | None,
    draws: Draws | None,
) -> Any:
    """For streams with random access: only what is in the coreset is read."""
    if members.length not in (None, samples):
        raise ValueError(
            f"The scores are of {members.length:,} samples, but the {type(inside.dataset).__name__} has {samples:,}: "
            "this is another stream than the one that was scored."
        )
    if max(members.positions) >= samples:
        raise ValueError(f"Position {max(members.positions)} is outside of the stream of {samples:,} samples.")
    gate = None if identify is None else _gate(members, identify, 0)
    made = map_style(inside, gate)
    whole = made if isinstance(loader, DataLoader) or is_pipeline(loader) else around(loader, made)
    return narrow_loader(whole, members.positions, full_length=full_length, trainer=trainer, draws=draws)


def _of_loader(
    inside: DataLoader[Any],
    members: Members,
    identify: Identify | None,
    full_length: bool,
    trainer: Trainer | None,
    length: int | None = None,
) -> StreamLoader:
    stream: Any = inside.dataset
    kind = type(stream).__name__
    is_filtered = is_pipeline(stream) and filtered(stream, None) is not None
    if is_filtered:
        identify = identify or sample_key
    if identify is None:
        given = "name" if members.names is not None else "position"
        raise TypeError(
            f"The train dataset {kind} is a stream (an IterableDataset), whose samples have no positions. Say which "
            f"sample one is: CoresetDataModule(..., identify=function), where function(sample) is its {given}."
        )
    if inside.batch_size is None:
        if not is_filtered:
            raise TypeError(f"The train loader has batch_size=None, so {kind} gives ready batches. {_BATCH_LATER}")
        return _of_own_batches(inside, members, identify, full_length, trainer, length)
    # litdata's own loader takes no other dataset. Its way of iterating only serves its dataset.
    is_litdata = type(inside).__module__.partition(".")[0] == "litdata"
    if reads_in_its_own_way(inside) and not is_litdata:
        raise TypeError(
            f"{type(inside).__name__} is iterated in a way of its own, so it is unknown what it would do with the "
            "coreset of a stream. Use torch's DataLoader."
        )
    batching = Batching(inside.batch_size, inside.collate_fn, inside.drop_last)

    make = partial(_make_batches, inside, members, identify, is_filtered, is_litdata)
    world = processes(trainer)["num_replicas"]
    samples = len(members.positions)
    if full_length:
        if members.used is None:
            raise ValueError(
                'epoch_length="full" makes epochs as long as the full stream\'s, whose length only scores tell. Give '
                "the scores in place of positions or names."
            )
        samples = members.used
    share = -(-samples // world)
    length = share // batching.size if batching.drop_last else -(-share // batching.size)
    if samples == 0:
        raise ValueError("The coreset is empty: give at least one name or position.")
    if length == 0:
        raise ValueError(
            f"An epoch has {share} samples on each device. With drop_last=True that gives no batch of {batching.size}. "
            'Keep more samples, lower the batch size, or use epoch_length="full".'
        )
    is_pass = world == 1 and not full_length
    return StreamLoader(make, stream, batching=batching, length=length, is_pass=is_pass, trainer=trainer)


def _make_batches(
    inside: DataLoader[Any], members: Members, identify: Identify, is_filtered: bool, plain: bool
) -> tuple[Gate, Any]:
    gate = _gate(members, identify, inside.num_workers)
    if is_filtered:
        return gate, batching_loader(inside, filtered(inside.dataset, gate), None)
    return gate, batching_loader(inside, inside.dataset, gate, plain=plain)


def _of_own_batches(
    loader: Any,
    members: Members,
    identify: Identify,
    full_length: bool,
    trainer: Trainer | None,
    length: int | None = None,
) -> StreamLoader:
    """Of a pipeline of webdataset that makes batches itself."""
    stream = loader.dataset if isinstance(loader, DataLoader) else loader
    if filtered(stream, None) is None:
        raise TypeError(
            f"No stage of the {type(stream).__name__} is known to make samples of files, as those of "
            f"webdataset.WebDataset do, and it gives ready batches. {_BATCH_LATER}"
        )
    length = (length or own_length(loader)) if full_length else None
    if full_length and length is None:
        raise ValueError(
            f'epoch_length="full" needs the number of batches of the full stream, but {type(stream).__name__} makes '
            "its own batches and does not say it. Say it with .with_epoch(number) or .with_length(number), or let the "
            "DataLoader make the batches: DataLoader(dataset, batch_size=...) without .batched(...)."
        )
    if processes(trainer)["num_replicas"] > 1 and not full_length:
        raise ValueError(
            f"{type(stream).__name__} makes its own batches, so it is unknown how many a process gets of the coreset, "
            "and all must get the same number. Let the DataLoader make the batches: DataLoader(dataset, "
            'batch_size=...) without .batched(...), or use epoch_length="full" with .with_epoch(number).'
        )

    make = partial(_make_filtered, loader, members, identify)
    return StreamLoader(make, stream, batching=None, length=length, is_pass=not full_length, trainer=trainer)


def _make_filtered(loader: Any, members: Members, identify: Identify) -> tuple[Gate, Any]:
    gate = _gate(members, identify, workers_of(loader))
    if isinstance(loader, DataLoader):
        return gate, made_again(loader, filtered(loader.dataset, gate), batch_size=None)
    return gate, filtered(loader, gate)


def _gate(members: Members, identify: Identify, workers: int) -> Gate:
    return Gate(
        identify,
        members.positions,
        length=members.length,
        names=members.names,
        classes=members.classes,
        strangers=members.strangers,
        rows=workers,
    )


_BATCH_LATER = (
    "A coreset is chosen before samples are in batches: let the dataset give single samples, and the DataLoader make "
    "batches of them with batch_size=... and collate_fn=..., or filter the samples yourself."
)
