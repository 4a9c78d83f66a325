"""Text: batches of variable length, made by a collate function of your own. No download.

    pip install -e ".[examples]"
    python examples/text_batches.py

The task: from which library is this docstring? The texts are the first lines of docstrings in the installed packages.
Nothing in it is made for CLD: the collate function yields `(inputs, targets)`, whatever the inputs are, and the module
returns logits.
"""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning as L
import torch
from _common import quiet, quiet_trainer
from _small import arguments, print_table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_cld import CLDCallback, CoresetDataModule, baselines, proportional_holdout

PACKAGES = ("lightning", "numpy", "torchmetrics", "torchvision")
VOCABULARY = 4096

Texts = tuple[Tensor, Tensor]
"""Tokens of all texts of a batch, one after the other, and where each text starts."""


class Docstrings(Dataset):
    """Lines of text as token numbers, each as long as it is, and the package they are from."""

    def __init__(self) -> None:
        lines: dict[str, int] = {}  # a line that several packages have is kept once
        for label, package in enumerate(PACKAGES):
            (folder,) = importlib.util.find_spec(package).submodule_search_locations
            for file in sorted(Path(folder).rglob("*.py")):
                for line in re.findall(r'"""(\w.+)', file.read_text(encoding="utf-8")):
                    if len(line.split()) >= 4:
                        lines.setdefault(line, label)
        words = [re.findall(r"\w+", line.lower()) for line in lines]
        self.texts = [torch.tensor([zlib.crc32(word.encode()) % VOCABULARY for word in line]) for line in words]
        self.targets = list(lines.values())

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.texts[index], self.targets[index]


def collate(samples: list[tuple[Tensor, int]]) -> tuple[Texts, Tensor]:
    texts, targets = zip(*samples, strict=True)
    lengths = torch.tensor([len(text) for text in texts])
    return (torch.cat(texts), lengths.cumsum(0) - lengths), torch.tensor(targets)


class DocstringData(L.LightningDataModule):
    """The lines in three parts."""

    def __init__(self, docstrings: Docstrings, seed: int) -> None:
        super().__init__()
        rest, test = proportional_holdout(docstrings.targets, 0.2, seed=1000 + seed)
        train, val = proportional_holdout(torch.tensor(docstrings.targets)[rest], 0.1, seed=seed)
        self.train = Subset(docstrings, rest[train].tolist())
        self.val = Subset(docstrings, rest[val].tolist())
        self.test = Subset(docstrings, test.tolist())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 64, shuffle=True, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:  # the reference of CLD: held out of the train set, never the test set
        return DataLoader(self.val, 512, collate_fn=collate)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 512, collate_fn=collate)


class TextClassifier(L.LightningModule):
    """The mean of a text's word vectors, and a linear layer; there is nothing about CLD in it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        L.seed_everything(seed, verbose=False)  # of the weights, and of the order of batches that follows
        self.words = nn.EmbeddingBag(VOCABULARY, 32)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(32, len(PACKAGES)))

    def forward(self, texts: Texts) -> Tensor:
        tokens, starts = texts
        return self.head(self.words(tokens, starts))

    def training_step(self, batch: tuple[Texts, Tensor], batch_idx: int) -> Tensor:
        texts, targets = batch
        return F.cross_entropy(self(texts), targets)

    def test_step(self, batch: tuple[Texts, Tensor], batch_idx: int) -> None:
        texts, targets = batch
        self.log("accuracy", (self(texts).argmax(1) == targets).float().mean(), batch_size=len(targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.005)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv, epochs=10)
    quiet(single_thread=True)
    docstrings = Docstrings()
    rows = []
    for seed in range(args.seeds):
        data = DocstringData(docstrings, seed)
        cld = CLDCallback(dirpath="runs/text")
        quiet_trainer(args.epochs, cld).fit(TextClassifier(seed), datamodule=data)

        # With epoch_length="full" every training takes as many steps, so that what differs is the data.
        at_random = cld.trajectories.score(by=partial(baselines.random_values, seed=seed))
        budget = {"fraction": args.fraction, "epoch_length": "full"}
        for name, chosen in {
            "everything": data,
            "random per class": CoresetDataModule(data, at_random, **budget),
            "CLD, top": CoresetDataModule(data, cld.scores, **budget),
            "CLD, drawn": CoresetDataModule(data, cld.scores, **budget, rule="draw", seed=seed),
        }.items():
            target, trainer = TextClassifier(100 + seed), quiet_trainer(args.epochs)
            trainer.fit(target, datamodule=chosen)
            (measured,) = trainer.test(target, datamodule=chosen, verbose=False)
            kept = len(chosen.indices) if chosen is not data else len(data.train)
            rows.append((name, kept, 100 * measured["accuracy"]))
    print_table("test accuracy (%)", rows)


if __name__ == "__main__":
    main()
