"""Reading the user's dataloaders: what is in them, and the same data in order."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_cld.data.device_loaders import DeviceBatches, differs, loader_inside
from lightning_cld.data.fingerprint import probe_positions
from lightning_cld.data.nesting import all_datasets, whole_numbers
from lightning_cld.data.redrawing import RedrawingSampler
from lightning_cld.data.samplers import drawn_from, is_known_sampler
from lightning_cld.guards import preserved_rng

_WHOLE_SET_SAMPLERS = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)
_POSITIONS = (list, tuple, range, Tensor, np.ndarray)
"""A loader's sampler, or a batch, may be a plain sequence of positions."""

_DRAWN = 5
"""What an unknown sampler is asked for, to see whether it draws positions."""


def check_loader(loaders: Any, kind: str) -> DataLoader[Any]:
    """Returns the one map-style DataLoader in `loaders`.

    Of a device loader it returns the DataLoader inside as `DeviceBatches`, so that what is read of it passes through
    the device loader too: a model then sees what it sees in training and evaluation.

    Args:
        loaders: What the user gave, or a Trainer holds: a loader, or a collection of them.
        kind: "train" or "val", for errors.

    Raises:
        TypeError: If it is no DataLoader of torch, has an iterable-style dataset, or yields ready batches.
        ValueError: If there are several.
    """
    argument = f"{kind}_dataloader=... of CLDCallback or trajectories_from_checkpoints"
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, Sequence):
        if len(loaders) != 1:
            raise ValueError(
                f"CLD scores one {kind} set, but there are {len(loaders)} {kind} dataloaders. Name the one to use: "
                f"{argument}."
            )
        loaders = loaders[0]
    outer, loaders = loaders, loader_inside(loaders)
    if not isinstance(loaders, DataLoader):
        raise TypeError(
            f"CLD reads a torch.utils.data.DataLoader, but the {kind} dataloader is a {type(loaders).__name__}. "
            f"Give one with {argument}, or log the losses yourself and score them with LossTrajectories."
        )
    if isinstance(loaders.dataset, IterableDataset):
        raise TypeError(
            f"The {kind} dataset {type(loaders.dataset).__name__} is an IterableDataset: its samples have no "
            "positions to score or select. Use a map-style dataset, or log the losses of the stream yourself and "
            "score them with LossTrajectories."
        )
    if not hasattr(loaders.dataset, "__len__"):
        raise TypeError(
            f"The {kind} dataset {type(loaders.dataset).__name__} has no __len__, so no positions to score."
        )
    if loaders.batch_sampler is None:
        raise TypeError(
            f"The {kind} dataloader has batch_size=None, so its dataset yields ready batches and positions of single "
            f"samples are unknown. Give a loader over single samples with {argument}."
        )
    return loaders if loaders is outer else DeviceBatches(loaders, outer)


def loader_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """What a loader does apart from its dataset and the order of samples, as keyword arguments of DataLoader."""
    return {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }


def sequential_loader(
    loader: DataLoader[Any], positions: Sequence[int], *, batch_size: int | None, kind: str, **changes: Any
) -> DataLoader[Any]:
    """A loader over the same dataset that yields the samples at `positions`, in that order.

    It is always a new loader: iterating the user's own would advance its generator or share its persistent workers.

    Args:
        loader: The user's loader.
        positions: Positions in its dataset.
        batch_size: Samples a batch; None takes the user's.
        kind: "train" or "val", for errors.
        **changes: Arguments of DataLoader that shall differ from the user's loader, or that are not taken from it.

    Raises:
        TypeError: If `batch_size` is None and the loader has a batch sampler that does not say its own.
    """
    size = batch_size or loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int):
        raise TypeError(
            f"The {kind} dataloader has a custom batch sampler ({type(loader.batch_sampler).__name__}) that does not "
            "say its batch size. Say how many samples to evaluate at a time: batch_size=... of CLDCallback or "
            "trajectories_from_checkpoints."
        )
    # A sampler is anything with a length and an iterator.
    made = DataLoader(loader.dataset, batch_size=size, sampler=positions, **{**loader_settings(loader), **changes})
    if isinstance(loader, DeviceBatches) and "collate_fn" not in changes:  # of other batches it could make nothing
        return DeviceBatches(made, loader.outer)
    return made


def changes_on_device(loader: DataLoader[Any], kind: str) -> bool:
    """Whether a device loader shows a few samples differently when they pass it twice, as random erasing does."""
    if not isinstance(loader, DeviceBatches):
        return False
    positions = probe_positions(len(loader.dataset)).tolist()  # type: ignore[arg-type]  # map-style, as checked
    twice = [position for position in positions for _ in range(2)]
    with preserved_rng():
        # One sample a batch, so that no more than two are held at a time.
        batches = iter(
            sequential_loader(loader, twice, batch_size=1, kind=kind, num_workers=min(1, loader.num_workers))
        )
        return any(differs(first, second) for first, second in zip(batches, batches, strict=True))


def reads_in_its_own_way(loader: DataLoader[Any]) -> bool:
    """Whether the loader's class does something of its own when it is iterated, which `sequential_loader` leaves out.

    torchdata's `StatefulDataLoader` only keeps count.
    """
    hooks = (getattr(type(loader), name, None) for name in ("__iter__", "_get_iterator"))  # PyG overrides the second
    return any(
        getattr(hook, "__module__", "torch").partition(".")[0] not in ("torch", "torchdata", "lightning_cld")
        for hook in hooks
    )


def sampled_positions(loader: DataLoader[Any]) -> Tensor:
    """Positions of the dataset that the loader's sampler can draw, sorted, int64.

    These are all positions, but for a `SubsetRandomSampler`, a `RedrawingSampler` or a sequence of positions, whose
    others may be validation samples, and for a `WeightedRandomSampler`, which never draws those of weight zero.

    Raises:
        TypeError: If a sequence of positions holds something else.
    """
    sampler, length = _own_sampler(loader), len(loader.dataset)  # type: ignore[arg-type]  # map-style, as checked
    if isinstance(sampler, WeightedRandomSampler):
        drawable = torch.nonzero(torch.as_tensor(sampler.weights) > 0).flatten()
        return drawable[drawable < length]
    listed = _listed(sampler)
    if listed is None:
        return torch.arange(min(length, drawn_from(sampler, length)))
    numbers = whole_numbers(listed)
    if numbers is None:
        raise TypeError(f"The {type(sampler).__name__} has positions that are no whole numbers: {str(listed)[:80]}.")
    positions: Tensor = torch.where(numbers < 0, numbers + length, numbers)
    if len(positions) == 0 or positions.min() < 0 or positions.max() >= length:
        distinct: Tensor = torch.unique(positions)
        return distinct
    drawn = torch.zeros(length, dtype=torch.bool)
    drawn[positions] = True
    return torch.nonzero(drawn).flatten()


def unknown_sampler(loader: DataLoader[Any]) -> str | None:
    """The name of a sampler of which it is unknown which positions it draws; None for those of torch and torchdata."""
    sampler = _own_sampler(loader)
    known = isinstance(sampler, _WHOLE_SET_SAMPLERS) or _listed(sampler) is not None or is_known_sampler(sampler)
    return None if known else type(sampler).__name__


def check_drawn(loader: DataLoader[Any], kind: str) -> None:
    """Raises if a sampler draws something else than positions in the dataset.

    A copy of the sampler is asked for the first few, so that the user's own goes on as it would have.

    Raises:
        TypeError: If what it draws are no whole numbers.
        ValueError: If they lie outside of the dataset.
    """
    sampler, length = _own_sampler(loader), len(loader.dataset)  # type: ignore[arg-type]  # map-style, as checked
    listed = _listed(sampler)
    if listed is None and type(sampler).__module__.startswith("torch."):
        return
    drawn = _first_drawn(sampler, loader) if listed is None else listed[:_DRAWN]
    name = type(sampler).__name__
    for position in drawn:
        try:
            place = None if isinstance(position, bool) else operator.index(position)
        except TypeError:
            place = None
        if place is None:
            raise TypeError(
                f"The {kind} dataloader's {name} draws {position!r}, which is no position in the dataset, so there are "
                "no samples to score or select. List the keys that it draws once, and make a dataset of the list, with "
                "dataset[keys[index]] as its samples."
            )
        if not -length <= place < length:
            raise ValueError(
                f"The {kind} dataloader's {name} draws position {place}, outside of the dataset, whose length is "
                f"{length:,}. CLD scores the samples at the positions from 0 to the length."
            )


def _listed(sampler: Any) -> Any:
    """All that a sampler draws from, where it says so; else None."""
    if isinstance(sampler, SubsetRandomSampler):
        sampler = sampler.indices
    if isinstance(sampler, RedrawingSampler):
        sampler = sampler.draws.pool
    return sampler if isinstance(sampler, _POSITIONS) else None


def _first_drawn(sampler: Any, loader: DataLoader[Any]) -> list[Any]:
    """The first few positions that a copy of a sampler draws; none if it can't be copied, or not be asked now."""
    with preserved_rng():
        try:
            # The data are shared with the copy: they may be large.
            copied = copy.deepcopy(sampler, {id(shared): shared for shared in (loader, *all_datasets(loader.dataset))})
            drawn = list(itertools.islice(copied, _DRAWN))
        except Exception:  # noqa: BLE001  # whatever a sampler raises that is made for training alone
            return []
    if sampler is loader.batch_sampler:  # which draws lists of positions
        return [position for batch in drawn if isinstance(batch, _POSITIONS) for position in batch]
    return drawn


def _own_sampler(loader: DataLoader[Any]) -> Any:
    """The user's sampler, from within the wrapper that Lightning puts around it in a distributed run.

    A batch sampler that does not say what it draws from stands for it.
    """
    sampler: Any = loader.batch_sampler
    if isinstance(sampler, _POSITIONS):
        batches: Any = sampler
        sampler = [position for batch in batches for position in batch]
    while hasattr(sampler, "sampler"):  # what draws batches may itself be wrapped, as in timm's MultiEpochsDataLoader
        sampler = sampler.sampler
    wrapped = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    return sampler if wrapped is None else wrapped
