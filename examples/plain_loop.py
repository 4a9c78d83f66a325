"""A loop of your own in plain PyTorch: the logged losses go to `LossTrajectories`. No download.

    pip install -e ".[examples]"
    python examples/plain_loop.py

The data are scikit-learn's handwritten digits. All that CLD needs of the loop is a row of losses, one for every train
sample and one for every validation sample, from before the first step and after each epoch. For `CLDMetric`, which
keeps no losses, see `fabric_loop.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from _small import digits, print_table, set_up
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cld import LossTrajectories, baselines, proportional_holdout


def train(inputs: Tensor, targets: Tensor, epochs: int, epoch_size: int, seed: int) -> Iterator[nn.Module]:
    """Trains a new model, and yields it before the first step and after each epoch, when CLD needs its losses.

    An epoch draws `epoch_size` samples, on a coreset in several passes, so that all trainings take as many steps.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    yield model
    for _ in range(epochs):
        passes = -(-epoch_size // len(targets))
        order = torch.cat([torch.randperm(len(targets)) for _ in range(passes)])[:epoch_size]
        for batch in order.split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
        yield model


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits in evaluation mode: dropout would be noise in the losses."""
    model.eval()
    logits = model(inputs)
    model.train()
    return logits


def main(argv: Sequence[str] | None = None) -> None:
    args, rows = set_up(argv, epochs=15), []
    for seed in range(args.seeds):
        (images, labels), (test_x, test_y) = digits(seed)
        train_part, val_part = proportional_holdout(labels, 0.15, seed=seed)
        x, y, val_x, val_y = images[train_part], labels[train_part], images[val_part], labels[val_part]

        # 1. Train a proxy; at each checkpoint the losses of all samples are kept.
        train_losses, val_losses = [], []
        for proxy in train(x, y, args.epochs, len(y), seed):
            train_losses.append(F.cross_entropy(logits_of(proxy, x), y, reduction="none"))
            val_losses.append(F.cross_entropy(logits_of(proxy, val_x), val_y, reduction="none"))
        trajectories = LossTrajectories(torch.stack(train_losses), torch.stack(val_losses), y, val_y)

        # 2. Select coresets, and train targets on them: the last model that `train` yields is the trained one.
        scores = trajectories.score()
        at_random = trajectories.score(by=partial(baselines.random_values, seed=seed))
        for name, chosen in {
            "everything": torch.arange(len(y)),
            "random per class": at_random.select(fraction=args.fraction),
            "CLD, top": scores.select(fraction=args.fraction),
            "CLD, drawn": scores.select(fraction=args.fraction, rule="draw", seed=seed),
        }.items():
            *_, target = train(x[chosen], y[chosen], args.epochs, len(y), 100 + seed)
            right = logits_of(target, test_x).argmax(1) == test_y
            rows.append((name, len(chosen), right.float().mean().item()))
    print_table("test accuracy", rows, percent=True)


if __name__ == "__main__":
    main()
