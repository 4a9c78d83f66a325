"""`OwnValidation`: the loss that the run itself finds in validation, to compare a sweep with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_cld.guards import is_a

_NAMES = re.compile(r"(val|valid|validation)[-_./ ]?loss(_epoch)?|loss[-_./ ](val|valid|validation)", re.IGNORECASE)
"""What the loss of a validation is called where it is logged."""

_TIMES = 2.0
"""How many times as large one of two losses must be for them to differ grossly."""

_SHARE = 0.1
"""The share of the loss before training by which they must differ at least: small losses differ for many reasons."""


class OwnValidation:
    """Gathers the validation loss that the run logs or returns, and compares it once with the loss of a sweep."""

    def __init__(self) -> None:
        self._compared = False
        self._untrained: float | None = None
        self.start()

    def start(self) -> None:
        """Begins a validation."""
        self._returned: list[Tensor] = []
        self._batches: int | None = None

    def add(self, outputs: Any) -> None:
        """Takes what a validation step returned; nothing is waited for."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not self._compared and isinstance(loss, Tensor) and loss.is_floating_point() and loss.numel() == 1:
            self._returned.append(loss.detach().reshape(()))

    def end(self, trainer: Trainer) -> None:
        """Notes after which batch of the training the validation took place."""
        self._batches = _trained_batches(trainer)

    def compare(self, trainer: Trainer, val_loss: float) -> None:
        """Warns if a sweep's mean validation loss is grossly another than the run's own under the same weights.

        Args:
            trainer: The Trainer of the fit.
            val_loss: Of a sweep over the very samples that the run validates on.
        """
        if self._untrained is None:
            self._untrained = val_loss
        # Weights that are averaged for validation are other ones than those that are trained.
        averages = any(is_a(callback, "WeightAveraging") for callback in trainer.callbacks)  # type: ignore[attr-defined]  # Lightning sets it
        whole = isinstance(trainer.limit_val_batches, float) and trainer.limit_val_batches == 1.0
        if self._compared or averages or not whole or self._batches != _trained_batches(trainer):
            return
        own = self._own(trainer)
        if own is None:
            return
        self._compared = True
        name, value = own
        low, high = sorted((abs(value), abs(val_loss)))
        if high > _TIMES * low and high - low > _SHARE * abs(self._untrained):
            rank_zero_warn(
                f"CLD: the sweep's mean validation loss is {val_loss:.4g}, but {name} is {value:.4g} after the same "
                "step. If both are to be the same loss, batches reach the module otherwise in a sweep than in your "
                "validation: compute the losses yourself, define cld_step(self, batch) on the LightningModule. Or your "
                "validation has other weights, such as an average: then both are right."
            )

    def _own(self, trainer: Trainer) -> tuple[str, float] | None:
        """What the run logged or returned as its validation loss, and how to call it."""
        for name, value in trainer.callback_metrics.items():
            if _NAMES.fullmatch(name):
                return f"the {name} that this run logged", float(value)
        if self._returned:
            return "the loss that validation_step returned", float(torch.stack(self._returned).mean())
        return None


def _trained_batches(trainer: Trainer) -> int:
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready
