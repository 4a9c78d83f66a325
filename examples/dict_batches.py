"""Batches that are dictionaries, as with Hugging Face: `cld_step` says what the loss and the class are. No download.

    pip install -e ".[examples]"
    python examples/dict_batches.py

The batches are `{"pixel_values": ..., "labels": ...}`, and the model returns an object with `loss` and `logits`, as
those of `transformers` do; that package is not needed here. A fifth of the train labels of scikit-learn's handwritten
digits are made wrong, so the example also shows how many of them are among those that `scores.suspects()` lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import lightning as L
import torch
from _common import QUIET, flip_labels
from _small import digits, print_table, random_coreset, set_up, train_and_test
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_cld import CLDCallback, CoresetDataModule, proportional_holdout

Batch = dict[str, Tensor]


class DigitClassifier(nn.Module):
    """Called like `AutoModelForImageClassification`, and returns what that does: put your own in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.layers(pixel_values)
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


def records(images: Tensor, labels: Tensor) -> list[Batch]:
    """Samples that are dictionaries; the default collate function makes batches of them that are dictionaries too."""
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


class Digits(L.LightningDataModule):
    """The digits in three parts, with wrong labels in the train set only."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        (images, labels), test = digits(seed)
        train, val = proportional_holdout(labels, 0.15, seed=seed)
        noisy = flip_labels(labels[train], 0.2, seed=2000 + seed)
        self.wrong = noisy != labels[train]
        self.train, self.val = records(images[train], noisy), records(images[val], labels[val])
        self.test = records(*test)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 32, shuffle=True)

    def val_dataloader(self) -> DataLoader:  # the reference of CLD: held out of the train set, never the test set
        return DataLoader(self.val, 512)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 512)


class FineTuning(L.LightningModule):
    """Trains such a model by the loss that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.model = DigitClassifier()

    def cld_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What CLD logs: a loss for each sample, and its class."""
        logits = self.model(batch["pixel_values"]).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none"), batch["labels"]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        right = self.model(batch["pixel_values"]).logits.argmax(1) == batch["labels"]
        self.log("accuracy", right.float().mean(), batch_size=len(right))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.002)


def main(argv: Sequence[str] | None = None) -> None:
    args = set_up(argv, epochs=15)
    rows, suspected, wrong = [], [], []
    for seed in range(args.seeds):
        # 1. Train a proxy with the callback, which logs the loss of every sample.
        data = Digits(seed)
        cld = CLDCallback(dirpath="runs/dict")
        L.seed_everything(seed, verbose=False)
        L.Trainer(max_epochs=args.epochs, callbacks=[cld], **QUIET).fit(FineTuning(), datamodule=data)

        # `suspects` lists samples whose label may be wrong: they do not behave as validation samples of their class do.
        suspected.append(data.wrong[cld.scores.suspects()])
        wrong.append(data.wrong)

        # 2. Make coresets, one by each rule. A coreset is the same datamodule with its train set narrowed. With
        # epoch_length="full" every training takes the same number of steps, so that only the data differ.
        top = CoresetDataModule(data, cld.scores, fraction=args.fraction, epoch_length="full")
        drawn = CoresetDataModule(data, cld.scores, fraction=args.fraction, epoch_length="full", rule="draw", seed=seed)

        # 3. Train targets on the coresets, on a random one and on everything.
        at_random = random_coreset(data, cld.trajectories, args.fraction, seed)
        choices = {"everything": data, "random per class": at_random, "CLD, top": top, "CLD, drawn": drawn}
        rows += train_and_test(FineTuning, choices, args.epochs, seed)
    print_table("test accuracy", rows, percent=True)
    caught, total = torch.cat(suspected), torch.cat(wrong).sum()
    print(f"\nOf {len(caught)} suspects {caught.sum()} have a wrong label; {total} labels are wrong in all.")


if __name__ == "__main__":
    main()
