"""What the scripts beside it share: a Trainer that is quiet, and the checks, each of which prints a line."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_cld import LossTrajectories


class Checks:
    """Prints a line for each check, and remembers whether one failed."""

    def __init__(self) -> None:
        self.failed = False

    def check(self, passed: bool, what: str) -> None:
        self.failed |= not passed
        print(f"{'ok    ' if passed else 'FAILED'} {what}", flush=True)

    def losses(
        self, trajectories: LossTrajectories, module: L.LightningModule, loss_at: Callable[[str, int], Tensor]
    ) -> None:
        """Compares the losses of the last checkpoint with those of the trained module, computed one by one.

        Args:
            trajectories: What was logged.
            module: The module, with the weights of the last checkpoint.
            loss_at: From "train" or "val" and a position to that sample's loss, computed without CLD.
        """
        module.eval()
        for split, logged in (("train", trajectories.train_losses[-1]), ("val", trajectories.val_losses[-1])):
            with torch.no_grad():
                by_hand = torch.stack([loss_at(split, position).squeeze() for position in range(len(logged))])
            low, high, off = float(by_hand.min()), float(by_hand.max()), float((logged - by_hand).abs().max())
            self.check(
                # Losses that are all alike could not tell one sample from another.
                torch.allclose(logged, by_hand, rtol=1e-4, atol=1e-5) and high - low > 0.01,
                f"{len(logged)} {split} losses after {trajectories.epochs[-1]} epochs are those computed by hand: from "
                f"{low:.2f} to {high:.2f}, {off:.0e} apart at most",
            )

    def served(self, seen: list[Any], chosen: list[Any], of: int) -> None:
        """Compares what an epoch of training was given with what was chosen, by names of the samples."""
        self.check(
            sorted(seen) == sorted(chosen) and 0 < len(set(chosen)) == len(chosen) < of,
            f"an epoch of the target's training had the {len(chosen)} chosen of {of} samples, each once, and no other",
        )


class Served(L.Callback):
    """Notes which samples a training is given.

    Args:
        names: From a batch, as the training step gets it, to what tells its samples apart.
    """

    def __init__(self, names: Callable[[Any], Iterable[Any]]) -> None:
        self.names = names
        self.seen: list[Any] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen.extend(self.names(batch))


def quiet_trainer(epochs: int, *callbacks: L.Callback) -> L.Trainer:
    """A Trainer on the CPU that shows and saves nothing."""
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def run(main: Callable[[Checks, Path], None]) -> None:
    """Runs a script in a folder of its own, and ends it, with status 1 if a check failed.

    Of warnings it shows what lightning-cld says, and not what all the others do.

    Args:
        main: The script, a function of the checks to make and the folder.
    """
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = _show_warning
    L.seed_everything(0, verbose=False)
    checks = Checks()
    with TemporaryDirectory() as folder:
        main(checks, Path(folder))
    sys.exit(int(checks.failed))


def _show_warning(message: Warning | str, *where: Any) -> None:
    if any(word in str(message) for word in ("CLD", "coreset", "train set", "validation set")):
        print(f"warned {message}", flush=True)
