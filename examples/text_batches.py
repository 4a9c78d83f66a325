"""Text: batches of variable length, made by a collate function of your own. No download.

    pip install -e ".[examples]"
    python examples/text_batches.py

The task: from which library is this docstring? The texts are the first lines of docstrings in the installed packages.
Neither data nor module is made for CLD: the collate function yields `(inputs, targets)`, whatever the inputs are,
and the module returns logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from _common import QUIET
from _small import docstrings, print_table, random_coreset, set_up, train_and_test
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from lightning_cld import CLDCallback, CoresetDataModule, proportional_holdout

PACKAGES = ("lightning", "numpy", "torchmetrics", "torchvision")
VOCABULARY = 4096

Sample = tuple[Tensor, int]
"""A text with a number for each of its words, and the package that it is from."""
Texts = tuple[Tensor, Tensor]
"""Words of all texts of a batch, one after the other, and where each text starts."""


def collate(samples: list[Sample]) -> tuple[Texts, Tensor]:
    texts, targets = zip(*samples, strict=True)
    lengths = torch.tensor([len(text) for text in texts])
    return (torch.cat(texts), lengths.cumsum(0) - lengths), torch.tensor(targets)


class DocstringData(L.LightningDataModule):
    """The texts in three parts."""

    def __init__(self, samples: list[Sample], seed: int) -> None:
        super().__init__()
        labels = torch.tensor([label for _, label in samples])
        rest, test = proportional_holdout(labels, 0.2, seed=1000 + seed)
        train, val = proportional_holdout(labels[rest], 0.1, seed=seed)
        self.train, self.val, self.test = (Subset(samples, part.tolist()) for part in (rest[train], rest[val], test))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 64, shuffle=True, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:  # the reference of CLD: held out of the train set, never the test set
        return DataLoader(self.val, 512, collate_fn=collate)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 512, collate_fn=collate)


class TextClassifier(L.LightningModule):
    """The mean of a text's word vectors, and a linear layer; there is nothing about CLD in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(VOCABULARY, 32)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(32, len(PACKAGES)))

    def forward(self, texts: Texts) -> Tensor:
        words, starts = texts
        return self.head(self.embedding(words, starts))

    def training_step(self, batch: tuple[Texts, Tensor], batch_idx: int) -> Tensor:
        texts, targets = batch
        return F.cross_entropy(self(texts), targets)

    def test_step(self, batch: tuple[Texts, Tensor], batch_idx: int) -> None:
        texts, targets = batch
        self.log("accuracy", (self(texts).argmax(1) == targets).float().mean(), batch_size=len(targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.005)


def main(argv: Sequence[str] | None = None) -> None:
    args = set_up(argv, epochs=10)
    samples, rows = docstrings(PACKAGES, VOCABULARY), []
    for seed in range(args.seeds):
        # 1. Train a proxy with the callback, which logs the loss of every sample.
        data = DocstringData(samples, seed)
        cld = CLDCallback(dirpath="runs/text")
        L.seed_everything(seed, verbose=False)
        L.Trainer(max_epochs=args.epochs, callbacks=[cld], **QUIET).fit(TextClassifier(), datamodule=data)

        # 2. Make coresets, one by each rule. A coreset is the same datamodule with its train set narrowed. With
        # epoch_length="full" every training takes the same number of steps, so that only the data differ.
        top = CoresetDataModule(data, cld.scores, fraction=args.fraction, epoch_length="full")
        drawn = CoresetDataModule(data, cld.scores, fraction=args.fraction, epoch_length="full", rule="draw", seed=seed)

        # 3. Train targets on the coresets, on a random one and on everything.
        at_random = random_coreset(data, cld.trajectories, args.fraction, seed)
        choices = {"everything": data, "random per class": at_random, "CLD, top": top, "CLD, drawn": drawn}
        rows += train_and_test(TextClassifier, choices, args.epochs, seed)
    print_table("test accuracy", rows, percent=True)


if __name__ == "__main__":
    main()
