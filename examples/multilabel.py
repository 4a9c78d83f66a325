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

import lightning as L
import torch
from _common import QUIET
from _small import pairs_of_digits, print_table, random_coreset, set_up, train_and_test
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MultilabelAveragePrecision

from lightning_cld import CLDCallback, CoresetDataModule

Batch = tuple[Tensor, Tensor, Tensor]
"""Images `[B, 8, 16]`, which of the ten digits are in them `[B, 10]`, and which is the left one `[B]`."""


class Pairs(L.LightningDataModule):
    """Images of two digits, in three parts."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.train, self.val, self.test = pairs_of_digits(seed)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 64, shuffle=True)

    def val_dataloader(self) -> DataLoader:  # the reference of CLD: held out of the train set, never the test set
        return DataLoader(self.val, 512)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 512)


class Tagger(L.LightningModule):
    """Says for each of the ten digits whether it is in the image."""

    def __init__(self, *, grouped: bool = False) -> None:
        super().__init__()
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
    args, rows = set_up(argv, epochs=15), []
    for seed in range(args.seeds):
        # 1. Train a proxy with the callback, which logs the loss of every sample; and another one with groups.
        data = Pairs(seed)
        cld = CLDCallback(dirpath="runs/multilabel")
        L.seed_everything(seed, verbose=False)
        L.Trainer(max_epochs=args.epochs, callbacks=[cld], **QUIET).fit(Tagger(), datamodule=data)
        by_group = CLDCallback(dirpath="runs/multilabel", filename="grouped")
        L.seed_everything(seed, verbose=False)
        L.Trainer(max_epochs=args.epochs, callbacks=[by_group], **QUIET).fit(Tagger(grouped=True), datamodule=data)

        # 2. Make coresets, one by each rule, without and with groups. A coreset is the same datamodule with its train
        # set narrowed. With epoch_length="full" every training takes the same number of steps, so that only the data
        # differ.
        budget = {"fraction": args.fraction, "epoch_length": "full"}
        choices = {
            "everything": data,
            "random": random_coreset(data, cld.trajectories, args.fraction, seed),
            "CLD, top": CoresetDataModule(data, cld.scores, **budget),
            "CLD, drawn": CoresetDataModule(data, cld.scores, **budget, rule="draw", seed=seed),
            "CLD, top, groups": CoresetDataModule(data, by_group.scores, **budget),
            "CLD, drawn, groups": CoresetDataModule(data, by_group.scores, **budget, rule="draw", seed=seed),
        }

        # 3. Train targets on all of them.
        rows += train_and_test(Tagger, choices, args.epochs, seed)
    print_table("test mean average precision", rows, percent=True)


if __name__ == "__main__":
    main()
