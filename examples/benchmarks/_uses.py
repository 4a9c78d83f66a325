"""What the benchmarks of the uses of subsets share: a plain training loop, and what it is trained on.

Their networks are so small that a Trainer would spend most of a step around them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from _methods import METHODS
from _runs import Case, Classifier, Images, Settings, run_proxy
from torch import Tensor

Draw = Callable[[int], Tensor]
"""Takes the epoch, from 0; returns the positions in the train set that it passes over."""


def train(
    model: Classifier,
    data: Images,
    draw: Draw,
    *,
    steps: int,
    batch_size: int,
    weight_decay: float = 5e-4,
    seed: int,
) -> None:
    """Trains for a number of steps, with the optimizer and the schedule of `Classifier`, and leaves it in eval mode.

    Args:
        model: What is trained; its `lr` is the highest learning rate.
        data: The train set.
        draw: What each epoch passes over.
        steps: Number of batches; the last epoch may end early.
        batch_size: Samples in a batch.
        weight_decay: That of the optimizer.
        seed: Seed of the order of the samples, and of augmentation.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), model.lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, model.lr, steps, pct_start=0.2)
    model.train()
    done = epoch = 0
    while done < steps:
        positions = draw(epoch)
        for batch in positions[torch.randperm(len(positions))].split(batch_size)[: steps - done]:
            optimizer.zero_grad()
            model.training_step((data.images[batch], data.targets[batch]), done).backward()
            optimizer.step()
            done += 1
            if done < steps:  # the schedule has no value for what comes after the last step
                schedule.step()
        epoch += 1
    model.eval()


@torch.no_grad()
def probabilities(model: Classifier, images: Tensor) -> Tensor:
    """The probability of each class, `[N, C]`."""
    return torch.cat([model(part).softmax(dim=1) for part in images.split(2048)])


def accuracy(model: Classifier, data: Images) -> float:
    """Accuracy in percent. A model that diverged is right by chance."""
    right = probabilities(model, data.images).argmax(dim=1) == data.targets
    return round(100 * float(right.double().mean()), 2)


@functools.lru_cache(maxsize=256)
def chosen(case: Case, settings: Settings, method: str, fraction: float, seed: int) -> Tensor:
    """The positions that one of `METHODS` chooses from the proxy's losses."""
    return METHODS[method].choose(run_proxy(case, settings).trajectories, fraction, seed)


def always(positions: Tensor) -> Draw:
    """The same positions in every epoch."""
    return lambda epoch: positions


def drawer(case: Case, settings: Settings, method: str, fraction: float, *, anew: bool) -> Draw:
    """One subset for all epochs or, if `anew`, one for each epoch."""
    if not anew:
        return always(chosen(case, settings, method, fraction, case.seed))
    return lambda epoch: chosen(case, settings, method, fraction, 1000 * case.seed + epoch)
