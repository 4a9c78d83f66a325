"""Samplers of a coreset that do what the full set's sampler does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from typing_extensions import override

from lightning_cld.data.nesting import whole_numbers

_AT_A_TIME = 2**16
"""So many positions are made Python numbers at a time, which take more memory than tensors."""


class FullLengthSampler(DistributedSampler[int]):
    """Draws positions of a coreset until an epoch is as long as the full set's.

    An epoch consists of whole passes over the coreset, and of a fresh draw without repeats for the remainder. Every
    process of a distributed run draws the same positions and takes its share. Lightning leaves a `DistributedSampler`
    in place and tells it the epoch. torchdata's `StatefulDataLoader` saves its state, so that a run which is resumed in
    the middle of an epoch goes on with the next position.

    Args:
        coreset_size: Positions are in `range(coreset_size)`.
        epoch_size: Positions drawn an epoch, by all processes together.
        shuffle: Whether each pass is in random order.
        num_replicas: Number of processes.
        rank: The number of this one.
        seed: Seed of the draws, the same in all processes.
        drop_last: Whether positions that can't be shared out evenly are left out; else some are drawn twice.

    Example:
        >>> from lightning_cld.data.samplers import FullLengthSampler
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
        drop_last: bool = False,
    ) -> None:
        # The parent only asks for the length of what it samples from.
        super().__init__(range(epoch_size), num_replicas, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]  # see above
        self.coreset_size = coreset_size
        self.epoch_size = epoch_size
        self._yielded = 0
        self._start = 0

    @override
    def __iter__(self) -> Iterator[int]:
        # A generator starts with its first position, by which time the epoch and the state are known.
        self._yielded, self._start = self._start, 0
        # As many for each process; if that takes more than are drawn, it begins again.
        share = torch.arange(self.rank, self.total_size, self.num_replicas)[self._yielded :] % self.epoch_size
        places = share % self.coreset_size
        passes, counts = torch.unique_consecutive(share // self.coreset_size, return_counts=True)
        first = self.epoch * -(-self.epoch_size // self.coreset_size)
        for number, some in zip(passes.tolist(), torch.split(places, counts.tolist()), strict=True):
            length = min(self.coreset_size, self.epoch_size - number * self.coreset_size)  # the last may be cut short
            drawn = self._drawn(first + number, length)[some]
            for start in range(0, len(drawn), _AT_A_TIME):
                for position in drawn[start : start + _AT_A_TIME].tolist():
                    self._yielded += 1
                    yield position

    def _drawn(self, number: int, length: int) -> Tensor:
        """So many positions of a pass, by its number in the whole run."""
        drawn = torch.randperm(self.coreset_size, generator=self._generator(number))[:length]
        return drawn if self.shuffle else drawn.sort().values

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + number)

    def state_dict(self) -> dict[str, int]:
        """How far the sampler is: its seed, the epoch, and how many positions it has yielded in that epoch."""
        return {"seed": self.seed, "epoch": self.epoch, "yielded": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from where `state` was taken. The end of an epoch is the start of the next one."""
        epochs, self._start = divmod(state["yielded"], self.num_samples)
        if "epoch" in state:  # one of the full set's sampler, which is torchdata's, only says how many it has yielded
            self.seed, self.epoch = state["seed"], state["epoch"] + epochs


def is_known_sampler(sampler: Any) -> bool:
    """Whether it is known what a sampler would draw from a coreset, because it is one of torch or torchdata."""
    return (
        type(sampler) in (SequentialSampler, SubsetRandomSampler)
        or draws_by_weight(sampler)
        or _draws_at_random(sampler)
        or is_distributed(sampler)
    )


def draws_by_weight(sampler: Any) -> bool:
    """Whether it is torch's `WeightedRandomSampler`, or one that only finds the weights, as PyG's for classes does."""
    return isinstance(sampler, WeightedRandomSampler) and type(sampler).__iter__ is WeightedRandomSampler.__iter__


def drawn_from(sampler: Any, length: int) -> int:
    """The number of samples that a sampler of torch draws from, which may not be `length`, that of the dataset."""
    if type(sampler) not in (SequentialSampler, RandomSampler, DistributedSampler):
        return length
    return len(sampler.dataset if is_distributed(sampler) else sampler.data_source)


def check_source(sampler: Any, full: int) -> None:
    """Raises unless a sampler draws from all of a dataset of `full` samples, and each as often.

    Raises:
        ValueError: If it draws from fewer or more, has another number of weights, or repeats positions.
    """
    if drawn_from(sampler, full) != full:
        raise ValueError(
            f"The train loader's {type(sampler).__name__} draws from {drawn_from(sampler, full):,} samples, but its "
            f"dataset has {full:,}. Make the sampler from that dataset, or use a Subset of it as the dataset."
        )
    if draws_by_weight(sampler) and len(sampler.weights) != full:
        raise ValueError(
            f"The train loader's {type(sampler).__name__} has {len(sampler.weights):,} weights, but its dataset has "
            f"{full:,} samples. Give a weight for each."
        )
    if type(sampler) is SubsetRandomSampler:
        numbers = _numbers_in(sampler.indices)
        repeated = len(numbers) - len(torch.unique(numbers))
        if repeated:
            raise ValueError(
                f"The train loader's SubsetRandomSampler repeats {repeated:,} positions, and it is unknown how often a "
                "coreset should. Use a WeightedRandomSampler to draw some more often."
            )


def narrow_sampler(sampler: Any, subset: Subset[Any], *, full_length: bool, trainer: Trainer | None) -> Any:
    """A sampler of a coreset that does what the full set's sampler does.

    Args:
        sampler: The full set's sampler, for which `is_known_sampler` is true.
        subset: The coreset.
        full_length: Whether an epoch is to be as long as the full set's.
        trainer: The Trainer if it splits the samples between its processes; None if each process draws for itself.

    Raises:
        ValueError: If nothing would be drawn, or the sampler leaves out positions of the coreset.
    """
    full, kept = len(subset.dataset), len(subset)  # type: ignore[arg-type]  # map-style, as checked
    kind = type(sampler)
    source: Any = subset  # a sampler only asks for its length, which torch's type for a dataset does not promise

    def scaled(draws: int) -> int:
        return draws if full_length else max(1, round(draws * kept / full))

    if draws_by_weight(sampler):
        weights = torch.as_tensor(sampler.weights, dtype=torch.double)[_numbers_in(subset.indices)]
        if not weights.sum() > 0:
            raise ValueError("The WeightedRandomSampler's weights are zero for every sample of the coreset.")
        draws = scaled(sampler.num_samples)
        if not sampler.replacement and draws > kept:
            raise ValueError(
                f"The WeightedRandomSampler draws {draws} samples without replacement, but the coreset has {kept}. Use "
                'replacement=True, or epoch_length="coreset".'
            )
        return WeightedRandomSampler(weights.tolist(), draws, sampler.replacement, sampler.generator)
    # For more than one pass torchdata's sampler draws as a FullLengthSampler does. It can also go on from a state of
    # the full set's sampler.
    resumes = full_length and trainer is None and _is_of_torchdata(sampler, "RandomSampler")
    if _draws_at_random(sampler) and (sampler.replacement or sampler.num_samples != full or resumes):
        return kind(source, sampler.replacement, scaled(sampler.num_samples), sampler.generator)
    if kind is SubsetRandomSampler:
        outside = not_drawn(sampler, _numbers_in(subset.indices), full)
        full = len(sampler.indices)
        if outside:
            raise ValueError(
                f"The train loader's SubsetRandomSampler does not draw {len(outside)} positions of the coreset "
                f"({outside[:5]}); they may be validation samples."
            )

    shuffle = sampler.shuffle if is_distributed(sampler) else kind is not SequentialSampler
    if is_distributed(sampler):
        names = ("num_replicas", "rank", "seed", "drop_last")
        layout: dict[str, Any] = {name: getattr(sampler, name) for name in names}
        return (
            FullLengthSampler(kept, full, shuffle=shuffle, **layout)
            if full_length
            else kind(subset, shuffle=shuffle, **layout)
        )
    generator = getattr(sampler, "generator", None)
    if full_length:
        layout = dict[str, Any](processes(trainer))
        return FullLengthSampler(kept, full, shuffle=shuffle, seed=shared_seed(generator, trainer), **layout)
    if not shuffle:
        return SequentialSampler(source)
    return (kind if _draws_at_random(sampler) else RandomSampler)(source, generator=generator)


def shared_seed(generator: torch.Generator | None, trainer: Trainer | None) -> int:
    """A seed from a generator, or from the global one; if there is a Trainer, the first process's for all."""
    seed = int(torch.empty((), dtype=torch.int64).random_(2**31, generator=generator))
    return seed if trainer is None else int(trainer.strategy.broadcast(seed))


def not_drawn(sampler: SubsetRandomSampler, positions: Tensor, full: int) -> list[int]:
    """Those of some positions that the sampler never draws from a dataset of `full` samples, sorted."""
    drawn = _numbers_in(sampler.indices)
    kept_out = torch.ones(full, dtype=torch.bool)
    kept_out[drawn[(drawn >= -full) & (drawn < full)]] = False
    left_out: list[int] = positions[kept_out[positions]].sort().values.tolist()
    return left_out


def processes(trainer: Trainer | None) -> dict[str, int]:
    """How many processes a Trainer splits the samples between, and the number of this one."""
    layout = None if trainer is None else trainer.distributed_sampler_kwargs
    return {"num_replicas": 1, "rank": 0} if layout is None else {k: layout[k] for k in ("num_replicas", "rank")}


def _numbers_in(positions: Any) -> Tensor:
    """Positions, int64 `[N]`."""
    numbers = whole_numbers(positions)
    return torch.tensor([int(position) for position in positions]) if numbers is None else numbers


def _draws_at_random(sampler: Any) -> bool:
    return type(sampler) is RandomSampler or _is_of_torchdata(sampler, "RandomSampler")


def is_distributed(sampler: Any) -> bool:
    """Whether a sampler is a `DistributedSampler`, or the one of torchdata."""
    return type(sampler) is DistributedSampler or _is_of_torchdata(sampler, "StatefulDistributedSampler")


def _is_of_torchdata(sampler: Any, name: str) -> bool:
    """Whether a sampler is the one of torchdata with this name. It takes the same arguments as the one of torch."""
    return type(sampler).__name__ == name and type(sampler).__module__.partition(".")[0] == "torchdata"
