"""A coreset that is drawn anew for each pass over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import SequentialSampler, SubsetRandomSampler
from typing_extensions import override

from lightning_cld.data.samplers import (
    FullLengthSampler,
    draws_by_weight,
    is_distributed,
    not_drawn,
    processes,
    shared_seed,
)


class Draws(NamedTuple):
    """The coresets that are drawn in a run, one for each pass.

    Attributes:
        draw: Gives the positions of the coreset of pass 0, 1, ..., sorted, int64 `[size]`.
        size: The number of positions in each.
        pool: All positions that may be drawn, sorted, int64.
    """

    draw: Callable[[int], Tensor]
    size: int
    pool: Tensor


class RedrawingSampler(FullLengthSampler):
    """Yields positions in the full set. Each pass is over a coreset of its own.

    Passes are numbered through the whole run. The epoch decides which pass is first, so all processes, and a run that
    is resumed, draw the same coresets.

    Args:
        draws: The coresets.
        epoch_size: Positions drawn an epoch, by all processes together.
        shuffle: Whether each pass is in random order.
        weights: The weight of each position in the full set, `[N]`, by which each pass draws from its coreset; None
            for passes that yield the whole coreset.
        replacement: Whether a pass by weight may draw a position again.
        pass_size: Positions drawn in a pass by weight.
        epoch: The first epoch.
        **layout: As for `FullLengthSampler`.

    Example:
        >>> import torch
        >>> from lightning_cld.data.redrawing import Draws, RedrawingSampler
        >>> draws = Draws(lambda number: torch.tensor([number, 7]), 2, torch.arange(8))
        >>> sampler = RedrawingSampler(draws, 4, shuffle=False)
        >>> list(sampler)
        [0, 7, 1, 7]
        >>> sampler.set_epoch(2)
        >>> list(sampler)
        [4, 7, 5, 7]
    """

    def __init__(
        self,
        draws: Draws,
        epoch_size: int,
        *,
        shuffle: bool,
        weights: Tensor | None = None,
        replacement: bool = False,
        pass_size: int | None = None,
        epoch: int = 0,
        **layout: Any,
    ) -> None:
        super().__init__(pass_size or draws.size, epoch_size, shuffle=shuffle, **layout)
        self.draws = draws
        self.weights = weights
        self.replacement = replacement
        self.set_epoch(epoch)

    @override
    def _drawn(self, number: int, length: int) -> Tensor:
        positions = self.draws.draw(number)
        if self.weights is None and not self.replacement:
            return positions[super()._drawn(number, length)]
        generator = self._generator(number)
        if self.weights is None:
            return positions[torch.randint(len(positions), (length,), generator=generator)]
        return positions[torch.multinomial(self.weights[positions], length, self.replacement, generator=generator)]


def redrawing_sampler(
    sampler: Any, draws: Draws, full: int, *, full_length: bool, epoch: int, trainer: Trainer | None
) -> RedrawingSampler:
    """A sampler that does with a fresh coreset in each pass what the full set's sampler does with the full set.

    Args:
        sampler: The full set's sampler, for which `is_known_sampler` is true.
        draws: The coresets.
        full: The number of samples in the full set.
        full_length: Whether an epoch is to be as long as the full set's.
        epoch: The first epoch.
        trainer: The Trainer if it splits the samples between its processes; None if each process draws for itself.

    Raises:
        ValueError: If the sampler leaves out positions that may be drawn, or too little might be left to draw.
    """
    epoch_size = full if full_length else draws.size
    settings: dict[str, Any] = {"shuffle": type(sampler) is not SequentialSampler, "epoch": epoch}
    if type(sampler) is SubsetRandomSampler:
        epoch_size = len(sampler.indices) if full_length else draws.size
        outside = not_drawn(sampler, draws.pool, full)
        if outside:
            raise ValueError(
                f"The train loader's SubsetRandomSampler leaves out {len(outside)} of the positions that redraw=True "
                f"draws from ({outside[:5]}); they may be validation samples. Score with the same sampler."
            )
    elif hasattr(sampler, "replacement"):  # one that draws at random, or by weight
        scaled = max(1, round(sampler.num_samples * draws.size / full))
        epoch_size = sampler.num_samples if full_length else scaled
        if draws_by_weight(sampler):
            weights = torch.as_tensor(sampler.weights, dtype=torch.double)
            _check_weights(weights, draws, scaled, replacement=sampler.replacement)
            settings["weights"] = weights
        if draws_by_weight(sampler) or sampler.replacement:
            settings |= {"replacement": sampler.replacement, "pass_size": scaled}
    if is_distributed(sampler):
        settings |= {name: getattr(sampler, name) for name in ("shuffle", "num_replicas", "rank", "seed", "drop_last")}
    else:
        settings |= {"seed": shared_seed(getattr(sampler, "generator", None), trainer), **processes(trainer)}
    return RedrawingSampler(draws, epoch_size, **settings)


def _check_weights(weights: Tensor, draws: Draws, pass_size: int, *, replacement: bool) -> None:
    """Raises unless each coreset that may be drawn has enough samples of positive weight."""
    certain = draws.size - int((weights[draws.pool] <= 0).sum())
    needed = 1 if replacement else pass_size
    if certain < needed:
        raise ValueError(
            f"The WeightedRandomSampler draws {pass_size} samples {'with' if replacement else 'without'} replacement, "
            f"but of the {draws.size} samples of a coreset that redraw=True draws, only {max(0, certain)} are sure to "
            "have a positive weight. Give every sample a positive weight"
            f"{'' if replacement else ', or use replacement=True'}."
        )


def epoch_ahead(trainer: Trainer | None) -> int:
    """The epoch that a Trainer is about to train, by the number that it will tell to samplers.

    It tells them only after workers have started to read, which is too late in the first epoch of a resumed run.
    """
    if trainer is None:
        return 0
    loop: Any = trainer.fit_loop
    batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress.current
    # From a checkpoint that was saved within the last batch of an epoch, a run goes on with the next epoch.
    is_over = batches.is_last_batch and batches.current.completed < batches.current.processed
    return int(epochs.processed + (loop.restarting and is_over and epochs.processed < epochs.started))
