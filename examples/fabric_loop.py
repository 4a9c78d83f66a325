"""A loop of your own with Lightning Fabric: each checkpoint's losses go to the metric `CLDMetric`. No download.

    pip install -e ".[examples]"
    python examples/fabric_loop.py

The data are scikit-learn's handwritten digits. `CLDMetric` keeps no losses, only what the scores need, however many
checkpoints there are. For a loop without Fabric, with all losses kept, see `plain_loop.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from _common import quiet
from _small import arguments, print_table
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from lightning_cld import CLDMetric, proportional_holdout, select_top


def train(
    fabric: Fabric,
    dataset: Dataset,
    epochs: int,
    epoch_size: int,
    seed: int,
    log: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """Trains a new model, and calls `log` with it before the first step and after each epoch.

    An epoch draws `epoch_size` samples, on a coreset in several passes, so that all trainings take as many steps.
    """
    fabric.seed_everything(seed, verbose=False)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9))
    sampler = RandomSampler(dataset, num_samples=epoch_size)
    loader = fabric.setup_dataloaders(DataLoader(dataset, 32, sampler=sampler))
    log(model)
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(inputs), targets))
            optimizer.step()
        log(model)
    return model


@torch.no_grad()
def evaluate(fabric: Fabric, model: nn.Module, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The loss of every sample and whether it is classified right, in the dataset's order, without dropout.

    Of several devices each would evaluate everything, since `CLDMetric` wants all losses on all of them.
    """
    loader = fabric.setup_dataloaders(DataLoader(dataset, 512), use_distributed_sampler=False)
    model.eval()
    losses, right = [], []
    for inputs, targets in loader:
        logits = model(inputs)
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        right.append(logits.argmax(1) == targets)
    model.train()
    return torch.cat(losses), torch.cat(right)


def compare(fabric: Fabric, digits: TensorDataset, args: argparse.Namespace, seed: int) -> list[tuple[str, int, float]]:
    """Scores a train set, trains on parts of it, and returns what each of them gave."""
    targets = digits.tensors[1]
    rest, test = proportional_holdout(targets, 0.25, seed=1000 + seed)
    train_part, val_part = proportional_holdout(targets[rest], 0.15, seed=seed)
    train_set, val_set, test_set = (Subset(digits, part.tolist()) for part in (rest[train_part], rest[val_part], test))
    classes = targets[train_set.indices]

    metric = CLDMetric(classes, targets[val_set.indices]).to(fabric.device)

    def log(model: nn.Module) -> None:
        metric.update(evaluate(fabric, model, train_set)[0], evaluate(fabric, model, val_set)[0])

    train(fabric, train_set, args.epochs, len(train_set), seed, log)
    scores = metric.compute().cpu()

    chance = torch.rand(len(train_set), generator=torch.Generator().manual_seed(seed))
    rows = []
    for name, chosen in {
        "everything": range(len(train_set)),
        "random per class": select_top(chance, classes, fraction=args.fraction).tolist(),
        "CLD, top": select_top(scores, classes, fraction=args.fraction).tolist(),
    }.items():
        subset = Subset(train_set, chosen)
        model = train(fabric, subset, args.epochs, len(train_set), 100 + seed)
        right = evaluate(fabric, model, test_set)[1]
        rows.append((name, len(subset), 100 * right.float().mean().item()))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv, epochs=15)
    quiet(single_thread=True)
    fabric = Fabric(devices=1)
    inputs, targets = load_digits(return_X_y=True)
    digits = TensorDataset(torch.from_numpy(inputs / 16).float(), torch.from_numpy(targets))
    rows = [row for seed in range(args.seeds) for row in compare(fabric, digits, args, seed)]
    print_table("test accuracy (%)", rows)


if __name__ == "__main__":
    main()
