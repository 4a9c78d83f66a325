"""A loop of your own in plain PyTorch: the logged losses go to `LossTrajectories`. No download.

    pip install -e ".[examples]"
    python examples/plain_loop.py

The data are scikit-learn's handwritten digits. All that CLD needs of the loop is a row of losses, one for every train
sample and one for every validation sample, from before the first step and after each epoch. For `CLDMetric`, which
keeps no losses, see `fabric_loop.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from _common import quiet
from _small import arguments, print_table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cld import LossTrajectories, baselines, proportional_holdout


def train(
    inputs: Tensor,
    targets: Tensor,
    epochs: int,
    epoch_size: int,
    seed: int,
    log: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """Trains a new model, and calls `log` with it before the first step and after each epoch.

    An epoch draws `epoch_size` samples, on a coreset in several passes, so that all trainings take as many steps.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    log(model)
    for _ in range(epochs):
        passes = -(-epoch_size // len(targets))
        order = torch.cat([torch.randperm(len(targets)) for _ in range(passes)])[:epoch_size]
        for batch in order.split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
        log(model)
    return model


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits in evaluation mode: dropout would be noise in the losses."""
    model.eval()
    logits = model(inputs)
    model.train()
    return logits


def compare(inputs: Tensor, targets: Tensor, args: argparse.Namespace, seed: int) -> list[tuple[str, int, float]]:
    """Scores a train set, trains on parts of it, and returns what each of them gave."""
    rest, test = proportional_holdout(targets, 0.25, seed=1000 + seed)
    train_part, val_part = proportional_holdout(targets[rest], 0.15, seed=seed)
    x, y = inputs[rest[train_part]], targets[rest[train_part]]
    val_x, val_y = inputs[rest[val_part]], targets[rest[val_part]]
    train_losses, val_losses = [], []

    def log(model: nn.Module) -> None:
        train_losses.append(F.cross_entropy(outputs_of(model, x), y, reduction="none"))
        val_losses.append(F.cross_entropy(outputs_of(model, val_x), val_y, reduction="none"))

    train(x, y, args.epochs, len(y), seed, log)
    trajectories = LossTrajectories(torch.stack(train_losses), torch.stack(val_losses), y, val_y)
    scores = trajectories.score()

    at_random = trajectories.score(by=partial(baselines.random_values, seed=seed))
    rows = []
    for name, chosen in {
        "everything": torch.arange(len(y)),
        "random per class": at_random.select(fraction=args.fraction),
        "CLD, top": scores.select(fraction=args.fraction),
        "CLD, drawn": scores.select(fraction=args.fraction, rule="draw", seed=seed),
    }.items():
        target = train(x[chosen], y[chosen], args.epochs, len(y), 100 + seed)
        right = outputs_of(target, inputs[test]).argmax(1) == targets[test]
        rows.append((name, len(chosen), 100 * right.float().mean().item()))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv, epochs=15)
    quiet(single_thread=True)
    inputs, targets = load_digits(return_X_y=True)
    inputs, targets = torch.from_numpy(inputs / 16).float(), torch.from_numpy(targets)
    rows = [row for seed in range(args.seeds) for row in compare(inputs, targets, args, seed)]
    print_table("test accuracy (%)", rows)


if __name__ == "__main__":
    main()
