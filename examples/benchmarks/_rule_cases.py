"""The data sets and the cases by which rules are compared, and the proxies' losses for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from _runs import _imbalanced, flip_labels, load
from _side_by_side import Networks, train
from _tables import load_table
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.model_selection import train_test_split
from torch import Tensor

from lightning_cld import CLDScores, LossTrajectories, proportional_holdout

CHOSE = ("digits", "optdigits", "trec", "adult", "fashion-mnist")
JUDGE = ("landsat", "spambase", "letter")
TINY = ("wine", "breast-cancer")
"""The sets that the rule was chosen by, those that were kept to report on, and scikit-learn's two smallest, which were
run after all choices. See RESULTS.md."""

_WEIGHTS = 6_000_000
"""Networks are trained together up to so many weights of their first layers."""

_IMAGES, _COMPONENTS = 30_000, 96
"""Of Fashion-MNIST: its first images, and their principal components."""


@dataclass(frozen=True)
class Case:
    """What is wrong with the data or the proxy."""

    noise: float = 0.0  # share of the train labels made wrong
    kind: str = "symmetric"  # "symmetric": any other class; "pair": the next class
    val_noise: float = 0.0  # share of the validation labels made wrong
    imbalance: float = 1.0  # size of the first class divided by size of the last
    epochs: int | None = None  # of the proxy; None: by dataset
    hidden: int = 128  # of the proxy


CASES = {
    "clean": Case(),
    "5 % wrong": Case(0.05),
    "20 % wrong": Case(0.2),
    "40 % wrong": Case(0.4),
    "60 % wrong": Case(0.6),
    "20 % to the next class": Case(0.2, "pair"),
    "40 % to the next class": Case(0.4, "pair"),
    "20 % wrong, validation too": Case(0.2, val_noise=0.2),
    "40 % wrong, validation too": Case(0.4, val_noise=0.4),
    "20 % in validation alone": Case(val_noise=0.2),
    "first class 10 times the last": Case(imbalance=10),
    "20 % wrong, first class 10 times the last": Case(0.2, imbalance=10),
    "20 % wrong, 4 epochs": Case(0.2, epochs=4),
    "20 % wrong, small proxy": Case(0.2, hidden=32),
}


@dataclass(frozen=True)
class Data:
    """A pool, of which train and validation split are made, and a test set, as rows of numbers."""

    pool: Tensor
    classes: Tensor
    test: Tensor
    test_classes: Tensor

    @property
    def count(self) -> int:
        """The number of classes."""
        return int(self.classes.max()) + 1

    @property
    def small(self) -> bool:
        return len(self.pool) < 8_000

    @property
    def batch(self) -> int:
        return 32 if self.small else 64


@dataclass(frozen=True)
class Proxy:
    """The train samples of one seed, as positions in the pool, and what a proxy says about them."""

    positions: Tensor
    labels: Tensor
    wrong: Tensor
    losses: LossTrajectories
    scores: CLDScores


def load_data(name: str, root: Path, tables: Path | None) -> Data:
    """Reads a data set.

    Args:
        name: One of `CHOSE`, `JUDGE` and `TINY`.
        root: The folder of torchvision's data sets.
        tables: The folder of `<name>.npz`, as `_tables.load_table` reads it.

    Raises:
        SystemExit: If the files are missing.
    """
    if name in TINY:
        inputs, classes = (load_wine if name == "wine" else load_breast_cancer)(return_X_y=True)
        parts = train_test_split(inputs, classes, test_size=0.3, stratify=classes, random_state=0)
        of_pool, of_test, pool_classes, test_classes = map(torch.from_numpy, parts)
        of_pool, of_test = _standardised(of_pool.float(), of_test.float())
        return Data(of_pool, pool_classes.long(), of_test, test_classes.long())
    if name not in ("digits", "fashion-mnist"):
        if tables is None:
            raise SystemExit(f"{name} needs --tables DIR, the folder of {name}.npz.")
        pool, test = load_table(tables / f"{name}.npz")
        return Data(pool.images.flatten(1), pool.targets, test.images.flatten(1), test.targets)
    pool, test = load(name, root)
    images = pool.images[:_IMAGES].flatten(1).float()
    if name == "digits":
        inputs, of_test = _standardised(images, test.images.flatten(1))
    else:
        mean = images.mean(dim=0)
        axes = torch.linalg.svd(images[:8_000] - mean, full_matrices=False).Vh[:_COMPONENTS].mT
        inputs, of_test = ((part.flatten(1) - mean) @ axes for part in (images, test.images))
        inputs, of_test = inputs / inputs.std(), of_test / inputs.std()
    return Data(inputs, pool.targets[:_IMAGES], of_test, test.targets)


def _standardised(pool: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets by the pool's mean and deviation."""
    std, mean = torch.std_mean(pool, dim=0)
    std = std.where(std > 0, 1.0)  # a number that never changes says nothing
    return (pool - mean) / std, (test - mean) / std


def cases_of(data: Data) -> list[str]:
    """The cases that make sense: of two classes, the next class is any other class."""
    return [name for name, case in CASES.items() if data.count > 2 or case.kind == "symmetric"]


def run_proxies(data: Data, case: Case, seeds: int) -> list[Proxy]:
    """Trains the proxies of all seeds side by side, and scores the samples by their losses after each epoch.

    The seed draws the split, the wrong labels, the initial weights and the order of batches.
    """
    splits = [_split(data, case, seed) for seed in range(seeds)]
    networks = Networks(data.pool.shape[1], case.hidden, data.count, [8000 + seed for seed in range(seeds)])
    samples = len(splits[0][0])
    per_epoch, epochs = samples // data.batch, case.epochs or (20 if data.small else 12)
    logged: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in splits]

    def sweep(steps: int) -> None:
        if steps % per_epoch:
            return
        for network, (rows, (train_split, train_labels, val_split, val_labels)) in enumerate(
            zip(logged, splits, strict=True)
        ):
            rows[0].append(networks.losses(network, data.pool[train_split], train_labels))
            rows[1].append(networks.losses(network, data.pool[val_split], val_labels))

    generators = [torch.Generator().manual_seed(9000 + seed) for seed in range(seeds)]
    order = torch.stack([_passes(samples, per_epoch * data.batch, epochs, generator) for generator in generators])
    positions = torch.stack([split[0] for split in splits]).gather(1, order)
    labels = torch.stack([split[1] for split in splits]).gather(1, order)
    sweep(0)
    train(networks, data.pool, positions, labels, data.batch, sweep)
    proxies = []
    for (train_losses, val_losses), (train_split, train_labels, _, val_labels) in zip(logged, splits, strict=True):
        losses = LossTrajectories(torch.stack(train_losses), torch.stack(val_losses), train_labels, val_labels)
        wrong = train_labels != data.classes[train_split]
        proxies.append(Proxy(train_split, train_labels, wrong, losses, losses.score()))
    return proxies


def _split(data: Data, case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions of the train samples and their labels, and those of the validation samples."""
    kept = _imbalanced(data.classes, case.imbalance, seed)
    share = 0.15 if data.small else 0.1
    train_split, val_split = (kept[part] for part in proportional_holdout(data.classes[kept], share, seed=seed))
    train_labels = flip_labels(data.classes[train_split], case.noise, 1000 + seed, case.kind)
    val_labels = flip_labels(data.classes[val_split], case.val_noise, 4000 + seed, case.kind)
    return train_split, train_labels, val_split, val_labels


def _passes(samples: int, taken: int, passes: int, generator: torch.Generator) -> Tensor:
    """The order of samples over some passes, of each of which so many are taken."""
    return torch.cat([torch.randperm(samples, generator=generator)[:taken] for _ in range(passes)])


def accuracies_of(data: Data, coresets: list[tuple[Tensor, Tensor, int]], steps: int, hidden: int = 128) -> list[float]:
    """Trains a fresh network on each coreset and tests it.

    Args:
        data: The data.
        coresets: Positions in the pool, their labels, and the seed of the initial weights and the order of batches.
        steps: The steps of every network.
        hidden: The number of hidden units.

    Returns:
        The test accuracies in percent.
    """
    accuracies = []
    at_once = max(1, _WEIGHTS // (data.pool.shape[1] * hidden))
    for start in range(0, len(coresets), at_once):
        part = coresets[start : start + at_once]
        orders, labels = [], []
        for positions, of_positions, seed in part:
            generator = torch.Generator().manual_seed(6000 + seed)
            passes = -(-steps * data.batch // len(positions))
            order = _passes(len(positions), len(positions), passes, generator)[: steps * data.batch]
            orders.append(positions[order])
            labels.append(of_positions[order])
        # Not the proxies' seeds: a coreset should work for other initial weights too.
        networks = Networks(data.pool.shape[1], hidden, data.count, [3000 + seed for _, _, seed in part])
        train(networks, data.pool, torch.stack(orders), torch.stack(labels), data.batch)
        for network in range(len(part)):
            right = networks.outputs(network, data.test).argmax(dim=1) == data.test_classes
            accuracies.append(100 * float(right.double().mean()))
    return accuracies
