"""The user's train dataloader, made again over the coreset."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from typing_extensions import override

from lightning_cld.data.loaders import loader_settings


class FullLengthSampler(DistributedSampler[int]):
    """Draws positions of a coreset until an epoch is as long as the full set's.

    Whole passes over the coreset, then a fresh draw without repeats for the remainder. Every process of a distributed
    run draws the same positions and takes its share; Lightning leaves a `DistributedSampler` in place and tells it
    the epoch.

    Args:
        coreset_size: Positions are in `range(coreset_size)`.
        epoch_size: Positions drawn an epoch, by all processes together.
        shuffle: Whether each pass is in random order.
        num_replicas: Number of processes.
        rank: The number of this one.
        seed: Seed of the draws, the same in all processes.

    Example:
        >>> from lightning_cld.data.narrowing import FullLengthSampler
        >>> sampler = FullLengthSampler(3, 7, shuffle=False)
        >>> list(sampler)[:6], len(sampler)
        ([0, 1, 2, 0, 1, 2], 7)
    """

    def __init__(
        self,
        coreset_size: int,
        epoch_size: int,
        *,
        shuffle: bool,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        # The parent only asks for the length of what it samples from.
        super().__init__(range(epoch_size), num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]  # see above
        self.coreset_size = coreset_size
        self.epoch_size = epoch_size

    @override
    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        passes, remainder = divmod(self.epoch_size, self.coreset_size)
        order = [
            torch.randperm(self.coreset_size, generator=generator) if self.shuffle else torch.arange(self.coreset_size)
            for _ in range(passes)
        ]
        rest = torch.randperm(self.coreset_size, generator=generator)[:remainder]
        drawn = torch.cat([*order, rest if self.shuffle else rest.sort().values])
        padded = drawn[torch.arange(self.total_size) % self.epoch_size]  # as many for each process
        return iter(padded[self.rank :: self.num_replicas].tolist())


def check_narrowable(loader: Any) -> None:
    """Raises TypeError unless a loader over a part of the same dataset can be made from what `loader` says."""
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"CoresetDataModule narrows one torch DataLoader, but train_dataloader() returned a "
            f"{type(loader).__name__}. Narrow the datasets yourself with torch.utils.data.Subset."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"The train dataset {type(loader.dataset).__name__} is an IterableDataset: its samples have no positions, "
            "so no coreset can be chosen from it. Use a map-style dataset."
        )
    if loader.batch_size is None:
        raise TypeError(
            "The train dataloader has a custom batch sampler, or batch_size=None. Which batches it would make of a "
            "coreset is unknown: build that loader yourself over torch.utils.data.Subset(dataset, indices)."
        )


def narrow_loader(
    loader: DataLoader[Any], indices: list[int], epoch_length: str, trainer: Trainer | None
) -> DataLoader[Any]:
    """The same loader over the samples at `indices`.

    Args:
        loader: The full train set's loader, checked by `check_narrowable`.
        indices: Positions of the coreset in its dataset.
        epoch_length: "coreset" or "full", as in `CoresetDataModule`.
        trainer: The Trainer to serve, for its number of processes; None for one process.

    Raises:
        TypeError: If the sampler or the loader's class can't be carried over.
        ValueError: If nothing would be drawn, or positions lie outside of the sampler's.
    """
    subset: Dataset[Any] = Subset(loader.dataset, indices)
    sampler = _narrow_sampler(loader, subset, indices, epoch_length, trainer)
    world = 1 if isinstance(sampler, DistributedSampler) else _layout(trainer)["num_replicas"]
    draws = -(-len(sampler) // world)
    if loader.drop_last and epoch_length == "coreset" and draws < (loader.batch_size or 1):
        raise ValueError(
            f"A coreset of {len(indices)} samples, of which an epoch draws {draws} on each device, gives no batch of "
            f"{loader.batch_size} with drop_last=True. Keep more samples, lower the batch size, or use "
            'epoch_length="full".'
        )
    settings = {
        **loader_settings(loader),
        "batch_size": loader.batch_size,
        "sampler": sampler,
        "drop_last": loader.drop_last,
        "generator": loader.generator,
        "persistent_workers": loader.persistent_workers,
    }
    if hasattr(loader, "in_order"):  # not in every torch
        settings["in_order"] = loader.in_order
    try:
        return type(loader)(subset, **settings, **_added_arguments(loader))
    except TypeError as error:
        raise TypeError(
            f"{type(loader).__name__} can't be made again over the coreset: {error}. Let its constructor pass on "
            "DataLoader's arguments and keep its own as attributes of the same names, or build it yourself over "
            "torch.utils.data.Subset(dataset, indices)."
        ) from error


def _added_arguments(loader: DataLoader[Any]) -> dict[str, Any]:
    """What a subclass of DataLoader takes beside its arguments, from attributes of the same names.

    Raises:
        TypeError: If there is no such attribute: a default in its place would change what the loader does.
    """
    known = inspect.signature(DataLoader).parameters
    added = [
        name
        for name, parameter in [*inspect.signature(type(loader)).parameters.items()][1:]  # the first is the dataset
        if name not in known and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    missing = [name for name in added if not hasattr(loader, name)]
    if missing:
        raise TypeError(f"its {', '.join(missing)} can't be read from it")
    return {name: getattr(loader, name) for name in added}


def _layout(trainer: Trainer | None) -> dict[str, int]:
    """How many processes share the samples, and which of them this one is."""
    layout = None if trainer is None else trainer.distributed_sampler_kwargs
    return {"num_replicas": 1, "rank": 0} if layout is None else {k: layout[k] for k in ("num_replicas", "rank")}


def _draw_seed(generator: torch.Generator | None, trainer: Trainer | None) -> int:
    """A seed from where the full set's sampler would take its own, the same in all processes."""
    seed = int(torch.empty((), dtype=torch.int64).random_(2**31, generator=generator))
    return seed if trainer is None or trainer.world_size == 1 else trainer.strategy.broadcast(seed)


def _narrow_sampler(
    loader: DataLoader[Any],
    subset: Dataset[Any],
    indices: list[int],
    epoch_length: str,
    trainer: Trainer | None,
) -> Any:
    """A sampler of the coreset that does what the loader's does with the full set."""
    sampler: Any = loader.sampler
    full = len(loader.dataset)  # type: ignore[arg-type]  # map-style, as checked
    kept = len(indices)
    kind = type(sampler)
    source: Any = subset  # a sampler only asks for its length, which torch's type for a dataset does not promise

    def scaled(draws: int) -> int:
        return draws if epoch_length == "full" else max(1, round(draws * kept / full))

    if kind is WeightedRandomSampler:
        weights = torch.as_tensor(sampler.weights, dtype=torch.double)[indices]
        if not weights.sum() > 0:
            raise ValueError("The WeightedRandomSampler's weights are zero for every sample of the coreset.")
        draws = scaled(sampler.num_samples)
        if not sampler.replacement and draws > kept:
            raise ValueError(
                f"The WeightedRandomSampler draws {draws} samples without replacement, the coreset has {kept}. Use "
                'replacement=True, or epoch_length="coreset".'
            )
        return WeightedRandomSampler(weights.tolist(), draws, sampler.replacement, sampler.generator)
    if kind is RandomSampler and (sampler.replacement or sampler.num_samples != full):
        return RandomSampler(source, sampler.replacement, scaled(sampler.num_samples), sampler.generator)
    if kind is SubsetRandomSampler:
        full = len(sampler.indices)
        outside = sorted(set(indices) - {int(position) for position in sampler.indices})
        if outside:
            raise ValueError(
                f"{len(outside)} positions of the coreset ({outside[:5]}) are not among those that the train "
                "loader's SubsetRandomSampler draws; they may be validation samples."
            )
    elif kind not in (SequentialSampler, RandomSampler, DistributedSampler):
        raise TypeError(
            f"The train dataloader has a {kind.__name__}, and what it would draw from a coreset is unknown. Use "
            "shuffle=True or a WeightedRandomSampler in the datamodule, or build that loader yourself over "
            "torch.utils.data.Subset(dataset, indices)."
        )

    shuffle = sampler.shuffle if kind is DistributedSampler else kind is not SequentialSampler
    if epoch_length == "full":
        own = kind is DistributedSampler
        return FullLengthSampler(
            kept,
            full,
            shuffle=shuffle,
            seed=sampler.seed if own else _draw_seed(getattr(sampler, "generator", None), trainer),
            **({"num_replicas": sampler.num_replicas, "rank": sampler.rank} if own else _layout(trainer)),
        )
    if kind is DistributedSampler:
        return DistributedSampler(subset, sampler.num_replicas, sampler.rank, shuffle, sampler.seed, sampler.drop_last)
    return RandomSampler(source, generator=sampler.generator) if shuffle else SequentialSampler(source)
