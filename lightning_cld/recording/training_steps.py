"""`StepLosses`: turns the per-sample losses that training steps return into one row per epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_cld.functional.checks import is_integer, kind_of
from lightning_cld.guards import agreed
from lightning_cld.names import SampleNames

_REMEDY = (
    'With CLDCallback(record="step") training_step must return {"loss": ..., "sample_losses": ..., "sample_index": '
    "...}. sample_losses holds the loss of each sample in the batch, floating point [B]. sample_index holds its "
    "position in the train set, integer [B]; lightning_cld.IndexedDataset puts it into the batch. Of a stream it holds "
    "positions or names, whichever cld_step or step returns."
)


class StepLosses:
    """Gathers the losses of an epoch's training steps into a row.

    A sample that several steps saw gets the mean of its losses. A sample that no step saw gets NaN, not logged.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drops all gathered losses."""
        # Sums of losses and how many they are, float32 `[2, N + 1]`: one tensor, so that a checkpoint that a signal
        # makes Lightning save has both or neither of a step. The last place collects losses with a wrong index. To
        # raise for them at once, steps would have to wait.
        self._totals: Tensor | None = None
        self._is_row = False  # whether these are of an epoch that is over
        self._loaded = False
        self._checked = False
        self._warned = False
        self._names: SampleNames | None = None

    def start(self, trainer: Trainer, samples: int, device: torch.device, names: SampleNames | None = None) -> None:
        """Prepares for steps on a train set of `samples` samples, which may have names."""
        self._names = names
        # What is loaded is rank 0's, and must count once.
        dropped = self._loaded and not trainer.is_global_zero
        if dropped or self._totals is None or self._totals.shape[1] != samples + 1:
            self._totals = torch.zeros(2, samples + 1, device=device)
        self._totals = self._totals.to(device)
        self._loaded, self._checked = False, False

    def add(self, trainer: Trainer, outputs: Any) -> None:
        """Adds the outputs of one training step. Only the first step waits for the device.

        Raises:
            TypeError: At the first step, if an output is missing or has the wrong type.
            ValueError: At the first step, if shapes differ or an index is outside the train set.
        """
        if self._totals is None:  # the samples of a stream are not known yet
            return
        if self._is_row:  # the first step of the next epoch
            self._totals.zero_()
            self._is_row = False
        if not self._checked and not outputs and trainer.world_size == 1:  # skipped before any other
            return
        if not self._checked:
            with agreed(trainer, "The first training step"):
                self._check(outputs)
                self._check_samples(outputs["sample_index"])
            self._checked = True
        elif outputs:  # else the step was skipped
            try:
                self._check(outputs)
            except (TypeError, ValueError) as error:  # watching must not stop a run
                self._warn(f"the losses of a training step were left out. {error}")
                return
        else:
            return
        last = self._totals.shape[1] - 1
        losses = outputs["sample_losses"].detach().to(self._totals.device, torch.float32)
        losses = losses.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        index = self._positions(outputs["sample_index"]).to(self._totals.device, torch.int64, non_blocking=True)
        index = index.where((index >= 0) & (index < last), last)
        self._totals.index_add_(1, index, torch.stack([losses, torch.ones_like(losses)]))

    def row(self, trainer: Trainer) -> Tensor | None:
        """Returns the losses of the finished epoch from all ranks, float32 `[N]`; None if `start` was not called.

        Until the next step is added it returns the same again, also from the state that a checkpoint holds of rank 0.
        """
        if self._totals is None:
            return None
        totals = self._totals
        if trainer.world_size > 1:
            totals = trainer.strategy.reduce(totals.clone(), reduce_op="sum")
            self._totals = totals if trainer.is_global_zero else torch.zeros_like(totals)
        self._is_row = True
        sums, counts = totals
        if counts[-1]:
            what = "outside the train set" if self._names is None else "that the first sweep did not show"
            self._warn(f"{int(counts[-1]):,} losses had a sample_index {what}. {_REMEDY}")
        losses: Tensor = (sums / counts)[:-1]  # a sample without losses gets 0 / 0, NaN
        return losses

    def state_dict(self) -> dict[str, Any] | None:
        """The losses this rank has gathered so far in the current epoch, on the CPU."""
        if self._totals is None:
            return None
        sums, counts = self._totals.cpu()
        # Cloned, because saving a view would save both.
        return {"sums": sums.clone(), "counts": counts.to(torch.int32), "is_row": self._is_row}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """The inverse of `state_dict`, of rank 0's on every rank."""
        if state is not None:
            self._totals = torch.stack([state["sums"], state["counts"].to(torch.float32)])
            self._is_row = state.get("is_row", False)  # not in checkpoints of earlier versions
            self._loaded = True

    def _check(self, outputs: Any) -> None:
        """Raises unless a step's outputs hold losses and positions of one shape; reads no values."""
        if not isinstance(outputs, Mapping) or not {"sample_losses", "sample_index"} <= set(outputs):
            got = f"the keys {sorted(map(str, outputs))}" if isinstance(outputs, Mapping) else kind_of(outputs)
            raise TypeError(f"training_step returned {got}, without sample_losses and sample_index. {_REMEDY}")
        losses, index = outputs["sample_losses"], outputs["sample_index"]
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            raise TypeError(f"sample_losses must be a floating point tensor, got {kind_of(losses)}. {_REMEDY}")
        are_names = isinstance(index, (list, tuple, np.ndarray)) and all(isinstance(name, str) for name in index)
        if self._names is not None and not are_names:
            raise TypeError(
                f"sample_index must be names, by which the samples of this stream are known, got {kind_of(index)}. "
                f"{_REMEDY}"
            )
        if self._names is None and not is_integer(index):
            raise TypeError(f"sample_index must be an integer tensor, got {kind_of(index)}. {_REMEDY}")
        shape = [len(index)] if are_names else list(index.shape)
        if losses.ndim != 1 or shape != list(losses.shape):
            raise ValueError(
                f"sample_losses and sample_index must both have shape [B], got {list(losses.shape)} and {shape}. "
                f"{_REMEDY}"
            )

    def _positions(self, index: Any) -> Tensor:
        """Positions as they are; of names their positions, -1 for unknown ones."""
        return index if isinstance(index, Tensor) or self._names is None else self._names.find(index)

    def _check_samples(self, index: Any) -> None:
        samples = 0 if self._totals is None else self._totals.shape[1] - 1
        if self._names is not None:  # a stream may show samples that it did not show before
            if len(index) and (self._names.find(index) < 0).all():
                raise ValueError(
                    f"sample_index gives names that are not among the {samples:,} of the first sweep, such as "
                    f"{index[0]!r}. {_REMEDY}"
                )
            return
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= samples):
            raise ValueError(
                f"sample_index must be from 0 to {samples - 1}, a position in the train set of {samples:,} samples, "
                f"got {int(index.min())} to {int(index.max())}. {_REMEDY}"
            )

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"CLD: {message} This is said once.")
