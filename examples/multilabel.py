"""Several labels an image: all samples in one class, or in groups of your own. No download.

    pip install -e ".[examples]"
    python examples/multilabel.py

Each image is two of scikit-learn's handwritten digits side by side, and its labels are the digits that are in it. The
loss is the mean of ten binary cross-entropies, one for each digit.

CLD compares a sample with the validation samples of its class. Here nothing is *the* class of a sample, so all are in
one; but any integer column may be given in its place, as the left digit is here, to see what that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lightning as L
import torch
from _common import quiet, quiet_trainer
from _small import arguments, print_table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MultilabelAveragePrecision

from lightning_cld import CLDCallback, CoresetDataModule, baselines

Batch = tuple[Tensor, Tensor, Tensor]


def pairs(digits: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> TensorDataset:
    """Images of two digits `[count, 8, 16]`, which digits are in them `[count, 10]`, and the left one `[count]`."""
    left, right = torch.randint(len(digits), (2, count), generator=generator)
    images = torch.cat([digits[left], digits[right]], dim=2)
    present = F.one_hot(labels[left], 10) | F.one_hot(labels[right], 10)
    return TensorDataset(images, present, labels[left])


class Pairs(L.LightningDataModule):
    """Pairs of digits in three parts; no digit is in two of them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        images, labels = load_digits(return_X_y=True)
        digits, labels = torch.from_numpy(images / 16).float().view(-1, 8, 8), torch.from_numpy(labels)
        generator = torch.Generator().manual_seed(seed)
        first, second, third = torch.randperm(len(digits), generator=generator).split([1000, 200, 597])
        self.train = pairs(digits[first], labels[first], 1200, generator)
        self.val = pairs(digits[second], labels[second], 300, generator)
        self.test = pairs(digits[third], labels[third], 1000, generator)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 64, shuffle=True)

    def val_dataloader(self) -> DataLoader:  # the reference of CLD: held out of the train set, never the test set
        return DataLoader(self.val, 512)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 512)


class Tagger(L.LightningModule):
    """Says for each of the ten digits whether it is in the image."""

    def __init__(self, seed: int, *, grouped: bool = False) -> None:
        super().__init__()
        L.seed_everything(seed, verbose=False)  # of the weights, and of the order of batches that follows
        self.grouped = grouped
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.precision = MultilabelAveragePrecision(num_labels=10)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def cld_step(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What CLD logs: a loss for each sample, and its group if there are any."""
        images, present, left = batch
        losses = F.binary_cross_entropy_with_logits(self(images), present.float(), reduction="none").mean(dim=1)
        return losses, left if self.grouped else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, present, _ = batch
        return F.binary_cross_entropy_with_logits(self(images), present.float())

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, present, _ = batch
        self.precision(self(images), present)
        self.log("precision", self.precision)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.003)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv, epochs=15)
    quiet(single_thread=True)
    rows = []
    for seed in range(args.seeds):
        data = Pairs(seed)
        cld = CLDCallback(dirpath="runs/multilabel")
        quiet_trainer(args.epochs, cld).fit(Tagger(seed), datamodule=data)
        by_group = CLDCallback(dirpath="runs/multilabel", filename="grouped")
        quiet_trainer(args.epochs, by_group).fit(Tagger(seed, grouped=True), datamodule=data)

        # With epoch_length="full" every training takes as many steps, so that what differs is the data.
        at_random = cld.trajectories.score(by=partial(baselines.random_values, seed=seed))
        budget = {"fraction": args.fraction, "epoch_length": "full"}
        drawn = {**budget, "rule": "draw", "seed": seed}
        for name, chosen in {
            "everything": data,
            "random": CoresetDataModule(data, at_random, **budget),
            "CLD, top": CoresetDataModule(data, cld.scores, **budget),
            "CLD, drawn": CoresetDataModule(data, cld.scores, **drawn),
            "CLD, top, groups": CoresetDataModule(data, by_group.scores, **budget),
            "CLD, drawn, groups": CoresetDataModule(data, by_group.scores, **drawn),
        }.items():
            target, trainer = Tagger(100 + seed), quiet_trainer(args.epochs)
            trainer.fit(target, datamodule=chosen)
            (measured,) = trainer.test(target, datamodule=chosen, verbose=False)
            kept = len(chosen.indices) if chosen is not data else len(data.train)
            rows.append((name, kept, 100 * measured["precision"]))
    print_table("test mean average precision (%)", rows)


if __name__ == "__main__":
    main()
