"""Reading the user's dataloaders: what is in them, and the same data in order."""

from __future__ import annotations

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
    default_collate,
)

from lightning_cld.data.fingerprint import Fingerprint, as_labels, dataset_labels, probe_positions
from lightning_cld.guards import preserved_rng

_WHOLE_SET_SAMPLERS = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)
_POSITIONS = (list, tuple, range, Tensor, np.ndarray)
"""A loader's sampler may be a plain sequence of positions."""


def check_loader(loaders: Any, kind: str) -> DataLoader[Any]:
    """Returns the one map-style DataLoader in `loaders`.

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
    return loaders


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
    return DataLoader(loader.dataset, batch_size=size, sampler=positions, **{**loader_settings(loader), **changes})


def sampled_positions(loader: DataLoader[Any]) -> Tensor:
    """Positions of the dataset that the loader's sampler can draw, sorted, int64.

    All of them, but for a `SubsetRandomSampler` or a sequence of positions, whose others may be validation samples.
    """
    sampler = _own_sampler(loader)
    if isinstance(sampler, SubsetRandomSampler):
        sampler = sampler.indices
    if isinstance(sampler, _POSITIONS):
        positions: Tensor = torch.unique(torch.as_tensor(sampler, dtype=torch.int64))
        return positions
    return torch.arange(len(loader.dataset))  # type: ignore[arg-type]  # map-style, as checked


def unknown_sampler(loader: DataLoader[Any]) -> str | None:
    """The name of a sampler of which it is unknown which positions it draws; None for torch's own."""
    sampler = _own_sampler(loader)
    known = isinstance(sampler, (*_WHOLE_SET_SAMPLERS, SubsetRandomSampler, *_POSITIONS))
    return None if known else type(sampler).__name__


def _own_sampler(loader: DataLoader[Any]) -> Any:
    """The user's sampler, from within the wrapper that Lightning puts around it in a distributed run.

    A batch sampler that does not say what it draws from stands for it.
    """
    batches = loader.batch_sampler
    sampler: Any = getattr(batches, "sampler", batches)
    if isinstance(batches, _POSITIONS):
        sampler = [position for batch in batches for position in batch]
    wrapped = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    return sampler if wrapped is None else wrapped


def fingerprint_of(loader: DataLoader[Any], kind: str) -> Fingerprint:
    """The identity of a loader's dataset; reads a few evenly spaced samples if it does not offer its labels."""
    labels = dataset_labels(loader.dataset)
    if labels is not None:
        return Fingerprint.of_labels(labels)
    length = len(loader.dataset)  # type: ignore[arg-type]  # map-style, as checked
    # Not by the user's collate function, which may mix labels, and differ between two views of the same data.
    probed = read_batches(loader, probe_positions(length).tolist(), times=1, kind=kind, collate_fn=_sample_labels)
    return Fingerprint.of_probe(length, probed[0])


def changes_between_reads(loader: DataLoader[Any], kind: str) -> bool:
    """Whether the dataset shows a few samples differently when read twice, as random augmentation does.

    More of them where worker processes are to be kept, which can be only if no sample ever changes.
    """
    length = len(loader.dataset)  # type: ignore[arg-type]  # map-style, as checked
    probes = probe_positions(length)
    few = probes[:: 1 if loader.persistent_workers else max(1, len(probes) // 8)].tolist()
    first, second = read_batches(loader, few, times=2, kind=kind)
    return not _same(first, second)


def read_batches(loader: DataLoader[Any], positions: list[int], *, times: int, kind: str, **changes: Any) -> list[Any]:
    """The samples at `positions` as one batch, read `times` over; `changes` as for `sequential_loader`.

    Where the user's loader has workers one worker reads them: a dataset that opens files lazily must not open them
    in the main process, from which later workers are forked.
    """
    with preserved_rng():
        return list(
            sequential_loader(
                loader,
                positions * times,
                batch_size=len(positions),
                kind=kind,
                num_workers=min(1, loader.num_workers),
                **changes,
            )
        )


def _sample_labels(samples: Any) -> Tensor | None:
    """Collates the labels of samples; None if they have none, or none that are numbers of one shape."""
    if not isinstance(samples, list):  # a batch already, from a dataset's `__getitems__`
        return as_labels(_label(samples))
    try:
        return as_labels(default_collate([_label(sample) for sample in samples]))
    except (TypeError, RuntimeError):
        return None


def _label(sample: Any) -> Any:
    """What stands in the usual place: second in `(input, label, ...)`, or "labels" or "label" of a mapping."""
    if isinstance(sample, Mapping):
        return sample.get("labels", sample.get("label"))
    return sample[1] if isinstance(sample, (tuple, list)) and len(sample) > 1 else None


def _same(first: Any, second: Any) -> bool:
    """Whether two batches hold the same tensors; anything that is not a tensor is taken for the same."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool(((first == second) | (first != first)).all())
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return all(_same(first[key], second[key]) for key in first.keys() & second.keys())
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return all(_same(a, b) for a, b in zip(first, second, strict=False))
    return True
