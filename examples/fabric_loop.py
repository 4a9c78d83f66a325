"""A loop of your own with Lightning Fabric: each checkpoint's losses go to the metric `CLDMetric`. No download.

    pip install -e ".[examples]"
    python examples/fabric_loop.py

The data are scikit-learn's handwritten digits. `CLDMetric` keeps no losses, only what the scores need, however many
checkpoints there are. For a loop without Fabric, with all losses kept, see `plain_loop.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from _small import digits, print_table, set_up
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from lightning_cld import CLDMetric, proportional_holdout, select_top


def train(fabric: Fabric, dataset: Dataset, epochs: int, epoch_size: int, seed: int) -> Iterator[nn.Module]:
    """Trains a new model, and yields it before the first step and after each epoch, when CLD needs its losses.

    An epoch draws `epoch_size` samples, on a coreset in several passes, so that all trainings take as many steps.
    """
    fabric.seed_everything(seed, verbose=False)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9))
    sampler = RandomSampler(dataset, num_samples=epoch_size)
    loader = fabric.setup_dataloaders(DataLoader(dataset, 32, sampler=sampler))
    yield model
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
        yield model


@torch.no_grad()
def evaluate(fabric: Fabric, model: nn.Module, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The loss of every sample and whether it is classified right, in the dataset's order, without dropout.

    With several devices each evaluates everything: `CLDMetric` needs all losses on all of them.
    """
    loader = fabric.setup_dataloaders(DataLoader(dataset, 512), use_distributed_sampler=False)
    model.eval()
    losses, right = [], []
    for images, labels in loader:
        logits = model(images)
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        right.append(logits.argmax(1) == labels)
    model.train()
    return torch.cat(losses), torch.cat(right)


def main(argv: Sequence[str] | None = None) -> None:
    args, rows = set_up(argv, epochs=15), []
    fabric = Fabric(devices=1)
    for seed in range(args.seeds):
        (images, labels), test = digits(seed)
        train_part, val_part = proportional_holdout(labels, 0.15, seed=seed)
        classes, val_classes = labels[train_part], labels[val_part]
        train_set, val_set = TensorDataset(images[train_part], classes), TensorDataset(images[val_part], val_classes)

        # 1. Train a proxy; at each checkpoint the losses of all samples go to the metric.
        metric = CLDMetric(classes, val_classes).to(fabric.device)
        for proxy in train(fabric, train_set, args.epochs, len(train_set), seed):
            metric.update(evaluate(fabric, proxy, train_set)[0], evaluate(fabric, proxy, val_set)[0])
        scores = metric.compute().cpu()

        # 2. Select coresets, and train targets on them: the last model that `train` yields is the trained one.
        chance = torch.rand(len(train_set), generator=torch.Generator().manual_seed(seed))
        for name, chosen in {
            "everything": torch.arange(len(train_set)),
            "random per class": select_top(chance, classes, fraction=args.fraction),
            "CLD, top": select_top(scores, classes, fraction=args.fraction),
        }.items():
            coreset = Subset(train_set, chosen.tolist())
            *_, target = train(fabric, coreset, args.epochs, len(train_set), 100 + seed)
            right = evaluate(fabric, target, TensorDataset(*test))[1]
            rows.append((name, len(coreset), right.float().mean().item()))
    print_table("test accuracy", rows, percent=True)


if __name__ == "__main__":
    main()
