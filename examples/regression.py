"""Regression on a table of numbers: squared error through `cld_step`, all samples in one class. No download.

    pip install -e ".[examples]"
    python examples/regression.py

The data are scikit-learn's: ten measurements of 442 diabetes patients, and how far the disease had gone a year later.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lightning as L
import torch
from _common import quiet, quiet_trainer
from _small import arguments, print_table
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_cld import CLDCallback, CoresetDataModule, baselines

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

    def __init__(self, seed: int) -> None:
        super().__init__()
        L.seed_everything(seed, verbose=False)  # of the weights, and of the order of batches that follows
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
    args = arguments(argv, epochs=30, seeds=5)
    quiet(single_thread=True)
    rows = []
    for seed in range(args.seeds):
        data = Patients(seed)
        cld = CLDCallback(dirpath="runs/regression")
        quiet_trainer(args.epochs, cld).fit(Regressor(seed), datamodule=data)

        # With epoch_length="full" every training takes as many steps, so that what differs is the data.
        at_random = cld.trajectories.score(by=partial(baselines.random_values, seed=seed))
        budget = {"fraction": args.fraction, "epoch_length": "full"}
        for name, chosen in {
            "everything": data,
            "random": CoresetDataModule(data, at_random, **budget),
            "CLD, top": CoresetDataModule(data, cld.scores, **budget),
            "CLD, drawn": CoresetDataModule(data, cld.scores, **budget, rule="draw", seed=seed),
        }.items():
            target, trainer = Regressor(100 + seed), quiet_trainer(args.epochs)
            trainer.fit(target, datamodule=chosen)
            (measured,) = trainer.test(target, datamodule=chosen, verbose=False)
            kept = len(chosen.indices) if chosen is not data else len(data.train)
            rows.append((name, kept, measured["error"]))
    print_table("test error, squared, in variances of the target (lower is better)", rows)


if __name__ == "__main__":
    main()
