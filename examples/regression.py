"""Regression on a table of numbers: squared error through `cld_step`, all samples in one class. No download.

    pip install -e ".[examples]"
    python examples/regression.py

The data are scikit-learn's: ten measurements of 442 diabetes patients, and how far the disease had gone a year later.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from _common import QUIET
from _small import print_table, random_coreset, set_up, train_and_test
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_cld import CLDCallback, CoresetDataModule

Batch = tuple[Tensor, Tensor]


class Patients(L.LightningDataModule):
    """The patients in three parts, inputs and target brought to unit variance."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        inputs, targets = load_diabetes(return_X_y=True)
        inputs = torch.from_numpy(inputs / inputs.std()).float()
        targets = torch.from_numpy((targets - targets.mean()) / targets.std()).float()
        # Seeded: each training must see the same split, or positions would mean other patients.
        self.train, self.val, self.test = random_split(
            TensorDataset(inputs, targets), (0.65, 0.1, 0.25), torch.Generator().manual_seed(seed)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 32, shuffle=True)

    def val_dataloader(self) -> DataLoader:  # the reference of CLD: held out of the train set, never the test set
        return DataLoader(self.val, 512)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 512)


class Regressor(L.LightningModule):
    """A small network with one output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs).squeeze(1)

    def cld_step(self, batch: Batch) -> tuple[Tensor, None]:
        """What CLD logs: a loss for each sample; None puts all of them into one class."""
        inputs, targets = batch
        return F.mse_loss(self(inputs), targets, reduction="none"), None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.mse_loss(self(inputs), targets)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("error", F.mse_loss(self(inputs), targets), batch_size=len(targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.003)


def main(argv: Sequence[str] | None = None) -> None:
    args, rows = set_up(argv, epochs=30, seeds=5), []
    for seed in range(args.seeds):
        # 1. Train a proxy with the callback, which logs the loss of every sample.
        data = Patients(seed)
        cld = CLDCallback(dirpath="runs/regression")
        L.seed_everything(seed, verbose=False)
        L.Trainer(max_epochs=args.epochs, callbacks=[cld], **QUIET).fit(Regressor(), datamodule=data)

        # 2. Make coresets, one by each rule. A coreset is the same datamodule with its train set narrowed. With
        # epoch_length="full" every training takes the same number of steps, so that only the data differ.
        top = CoresetDataModule(data, cld.scores, fraction=args.fraction, epoch_length="full")
        drawn = CoresetDataModule(data, cld.scores, fraction=args.fraction, epoch_length="full", rule="draw", seed=seed)

        # 3. Train targets on the coresets, on a random one and on everything.
        at_random = random_coreset(data, cld.trajectories, args.fraction, seed)
        choices = {"everything": data, "random": at_random, "CLD, top": top, "CLD, drawn": drawn}
        rows += train_and_test(Regressor, choices, args.epochs, seed)
    print_table("test error, squared, in variances of the target (lower is better)", rows)


if __name__ == "__main__":
    main()
