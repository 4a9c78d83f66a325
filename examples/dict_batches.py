"""Batches that are dictionaries, as with Hugging Face: `cld_step` says what the loss and the class are. No download.

    pip install -e ".[examples]"
    python examples/dict_batches.py

The batches are `{"pixel_values": ..., "labels": ...}`, and the model returns an object with `loss` and `logits`, as
those of `transformers` do; that package is not needed here. A fifth of the train labels of scikit-learn's handwritten
digits are made wrong, so the example also shows how many of them are among those that `scores.suspects()` lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import lightning as L
import torch
from _common import flip_labels, quiet, quiet_trainer
from _small import arguments, print_table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_cld import CLDCallback, CoresetDataModule, baselines, proportional_holdout

Batch = dict[str, Tensor]


@dataclass
class Output:
    """What a classifier of `transformers` returns, in short."""

    logits: Tensor
    loss: Tensor | None = None


class DigitClassifier(nn.Module):
    """Called like `AutoModelForImageClassification`: put your own in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.layers(pixel_values)
        return Output(logits, None if labels is None else F.cross_entropy(logits, labels))


class Records(Dataset):
    """Samples that are dictionaries; the default collate function makes batches of them that are dictionaries too."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class Digits(L.LightningDataModule):
    """The digits in three parts, with wrong labels in the train set only."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        digits = load_digits()
        images, labels = torch.from_numpy(digits.images / 16).float(), torch.from_numpy(digits.target)
        rest, test = proportional_holdout(labels, 0.25, seed=1000 + seed)
        train, val = proportional_holdout(labels[rest], 0.15, seed=seed)
        train, val = rest[train], rest[val]
        noisy = flip_labels(labels[train], 0.2, seed=2000 + seed)
        self.wrong = noisy != labels[train]
        self.train = Records(images[train], noisy)
        self.val, self.test = Records(images[val], labels[val]), Records(images[test], labels[test])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 32, shuffle=True)

    def val_dataloader(self) -> DataLoader:  # the reference of CLD: held out of the train set, never the test set
        return DataLoader(self.val, 512)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 512)


class FineTuning(L.LightningModule):
    """Trains such a model by the loss that it returns."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        L.seed_everything(seed, verbose=False)  # of the weights, and of the order of batches that follows
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
    args = arguments(argv, epochs=15)
    quiet(single_thread=True)
    rows, listed, caught, wrong = [], 0, 0, 0
    for seed in range(args.seeds):
        data = Digits(seed)
        cld = CLDCallback(dirpath="runs/dict")
        quiet_trainer(args.epochs, cld).fit(FineTuning(seed), datamodule=data)
        suspects = cld.scores.suspects()
        listed, caught = listed + len(suspects), caught + int(data.wrong[suspects].sum())
        wrong += int(data.wrong.sum())

        # With epoch_length="full" every training takes as many steps, so that what differs is the data.
        at_random = cld.trajectories.score(by=partial(baselines.random_values, seed=seed))
        budget = {"fraction": args.fraction, "epoch_length": "full"}
        for name, chosen in {
            "everything": data,
            "random per class": CoresetDataModule(data, at_random, **budget),
            "CLD, top": CoresetDataModule(data, cld.scores, **budget),
            "CLD, drawn": CoresetDataModule(data, cld.scores, **budget, rule="draw", seed=seed),
        }.items():
            target, trainer = FineTuning(100 + seed), quiet_trainer(args.epochs)
            trainer.fit(target, datamodule=chosen)
            (measured,) = trainer.test(target, datamodule=chosen, verbose=False)
            kept = len(chosen.indices) if chosen is not data else len(data.train)
            rows.append((name, kept, 100 * measured["accuracy"]))
    print_table("test accuracy (%)", rows)
    print(f"\nOf {listed} suspects {caught} have a wrong label; {wrong} labels are wrong in all.")


if __name__ == "__main__":
    main()
