"""`LossTrajectories`: the logged losses, one row per checkpoint, and the scores they give."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cld.data.fingerprint import Fingerprint
from lightning_cld.functional.arrays import IntegersLike, NumbersLike
from lightning_cld.functional.checks import (
    MIN_CHECKPOINTS,
    as_classes,
    as_numbers,
    check_class_pair,
    check_losses,
    check_reference,
    kind_of,
)
from lightning_cld.functional.cld import cld_scores
from lightning_cld.functional.diagnostics import best_tenth, half_of, overlap, reliability_by_class
from lightning_cld.functional.step_losses import at_epoch_ends
from lightning_cld.functional.uncertainty import aleatoric_uncertainty
from lightning_cld.scores import OUTSIDE, CLDScores, check_pool_classes, typed_array
from lightning_cld.storage.files import read_arrays, write_arrays
from lightning_cld.storage.provenance import provenance
from lightning_cld.storage.rows import Rows

_KIND = "cld-trajectories"


class LossTrajectories:
    """Per-sample losses at checkpoints: what CLD is computed from.

    `CLDCallback` fills one during training. Built from plain tensors or arrays it is also the door for losses that
    were logged elsewhere. Losses are kept as float32 on the device of the tensors given; NaN means *not logged*,
    infinity *not finite*.

    Args:
        train_losses: `[T, N]`, a row per checkpoint.
        val_losses: `[T, M]`, the validation samples at the same checkpoints.
        train_classes: Classes of the training samples, integer, `[N]`; -1 for positions that are not in use; None
            for one class.
        val_classes: Classes of the validation samples, integer, `[M]`; None exactly where `train_classes` is.
        epochs: Completed epochs at each row, increasing; 0 is before training. None numbers the rows from 0.
        fingerprint: Identity of the train dataset; None takes its length and the classes for it.
        from_steps: Whether the rows after the first hold what training steps saw within an epoch, instead of sweeps at
            its end, as `CLDCallback(record="step")` logs them. Scores then take the mean of two epochs for the
            checkpoint between them.
        metadata: Plain JSON values about the run, passed on to the scores.

    Raises:
        TypeError: If losses are not floating point, or classes or epochs not integers.
        ValueError: If shapes don't match, classes are negative or lack a reference, or epochs don't increase.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories
        >>> val = torch.tensor([[2.0], [1.0], [0.6], [0.5]])
        >>> train = torch.tensor([[2.2, 1.0], [1.2, 1.5], [0.7, 1.6], [0.6, 1.7]])
        >>> trajectories = LossTrajectories(train, val)
        >>> trajectories.epochs
        [0, 1, 2, 3]
        >>> trajectories.score().select(size=1)
        tensor([0])
    """

    def __init__(
        self,
        train_losses: NumbersLike,
        val_losses: NumbersLike,
        train_classes: IntegersLike | None = None,
        val_classes: IntegersLike | None = None,
        epochs: Sequence[int] | None = None,
        *,
        fingerprint: Fingerprint | None = None,
        from_steps: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        train, val = as_numbers(train_losses, "train_losses"), as_numbers(val_losses, "val_losses")
        check_losses(train, "train_losses")
        check_losses(val, "val_losses")
        if len(train) != len(val) or len(train) == 0:
            raise ValueError(
                "train_losses and val_losses must have a row for each checkpoint, got "
                f"{len(train)} and {len(val)} rows."
            )
        self._train, self._val = Rows(train), Rows(val)
        self.epochs = _check_epochs(epochs, len(train))

        samples, val_samples = train.shape[1], val.shape[1]
        self.train_classes = (
            None if train_classes is None else check_pool_classes(train_classes, samples, "train_classes")
        )
        self.val_classes = None if val_classes is None else as_classes(val_classes, "val_classes").cpu()
        used = self._used_positions()
        check_class_pair(
            None if self.train_classes is None else self.train_classes[used],
            self.val_classes,
            len(used),
            val_samples,
        )
        if fingerprint is not None and fingerprint.length != samples:
            raise ValueError(
                f"The fingerprint is of {fingerprint.length:,} samples, but train_losses have {samples:,} columns."
            )
        self.fingerprint = fingerprint
        self.from_steps = from_steps
        self.metadata = dict(metadata or {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if isinstance(self._train, Tensor):  # pickled when the buffers were plain tensors
            self._train, self._val = Rows(self._train), Rows(self._val)

    @property
    def train_losses(self) -> Tensor:
        """Float32 `[T, N]`, a view of the buffer."""
        return self._train.losses[: len(self.epochs)]

    @property
    def val_losses(self) -> Tensor:
        """Float32 `[T, M]`, a view of the buffer."""
        return self._val.losses[: len(self.epochs)]

    @property
    def references(self) -> int:
        """How many validation samples there are.

        Example:
            >>> from lightning_cld import LossTrajectories
            >>> LossTrajectories([[2.2]], [[2.0, 1.9, 2.3]]).references
            3
        """
        return self._val.width

    def __len__(self) -> int:
        return len(self.epochs)

    def __repr__(self) -> str:
        samples = f"{self._train.width:,} train and {self.references:,} val samples"
        return f"LossTrajectories({len(self)} checkpoints, {samples})"

    def record(self, epoch: int, train_row: NumbersLike, val_row: NumbersLike) -> None:
        """Adds the checkpoint after `epoch` completed epochs, or replaces the newest one if it is that.

        Args:
            epoch: Not smaller than any recorded.
            train_row: Losses of the training samples, `[N]`.
            val_row: Losses of the validation samples, `[M]`.

        Raises:
            ValueError: If `epoch` lies before the newest checkpoint, or a row has the wrong shape.

        Example:
            >>> import torch
            >>> from lightning_cld import LossTrajectories
            >>> trajectories = LossTrajectories([[2.5, 1.0]], [[2.0]])  # before training
            >>> trajectories.record(1, torch.tensor([1.5, 1.25]), torch.tensor([1.0]))
            >>> trajectories.train_losses
            tensor([[2.5000, 1.0000],
                    [1.5000, 1.2500]])
        """
        if epoch < self.epochs[-1]:
            raise ValueError(f"checkpoints are recorded in order: got {epoch} after {self.epochs[-1]}.")
        train, val = as_numbers(train_row, "train_row"), as_numbers(val_row, "val_row")
        for name, row, rows in (("train_row", train, self._train), ("val_row", val, self._val)):
            if list(row.shape) != [rows.width]:
                raise ValueError(f"{name} must have shape {[rows.width]}, got {list(row.shape)}.")
        place = len(self) if epoch > self.epochs[-1] else len(self) - 1
        self._train.write(place, train)
        self._val.write(place, val)
        if place == len(self):  # last, so that an interruption before it leaves the timeline as it was
            self.epochs.append(epoch)

    def leave_hole(self, epoch: int) -> None:
        """Records NaN (not logged) as the checkpoint after `epoch` completed epochs: no difference spans it.

        Example:
            >>> from lightning_cld import LossTrajectories
            >>> trajectories = LossTrajectories([[2.5, 1.0]], [[2.0]])
            >>> trajectories.leave_hole(1)
            >>> trajectories.val_losses
            tensor([[2.],
                    [nan]])
        """
        train_row, val_row = (torch.full_like(losses[0], torch.nan) for losses in (self.train_losses, self.val_losses))
        self.record(epoch, train_row, val_row)

    def to(self, device: torch.device | str) -> LossTrajectories:
        """Moves the losses to `device`, in place, and returns self.

        Example:
            >>> from lightning_cld import LossTrajectories
            >>> LossTrajectories([[2.5, 1.0]], [[2.0]]).to("cpu").train_losses.device
            device(type='cpu')
        """
        self._train.to(device)
        self._val.to(device)
        return self

    def score(
        self,
        cutoff_epoch: int | None = None,
        every_n_epochs: int = 1,
        by: Callable[[LossTrajectories], Tensor] | None = None,
    ) -> CLDScores:
        """Scores from the checkpoints up to an early cutoff, or from every n-th.

        Args:
            cutoff_epoch: Use only checkpoints after at most this many completed epochs; None uses all.
            every_n_epochs: Use only checkpoints whose epoch is a multiple of this.
            by: What to score by instead of CLD: a function from `LossTrajectories` to a value for each training
                sample, `[N]`, higher for those to keep, NaN for those that have none; `lightning_cld.baselines` has
                some.

        Returns:
            The scores, on the CPU.

        Raises:
            TypeError: If `by` returns something else than a floating point tensor.
            ValueError: If the timeline ends before `cutoff_epoch`, no checkpoint is left, or `by` returns another
                shape; for CLD also if fewer than 4 are left, or a validation loss is not finite at one of them.
        """
        part = self._thinned(cutoff_epoch, every_n_epochs)
        if by is None and len(part) < MIN_CHECKPOINTS:
            raise ValueError(
                f"CLD needs at least {MIN_CHECKPOINTS} checkpoints, got {len(part)} (after {part.epochs} epochs) with "
                f"cutoff_epoch={cutoff_epoch} and every_n_epochs={every_n_epochs}. Use more of them."
            )
        values = part._cld() if by is None else part._values_of(by)
        scored_by = "CLD" if by is None else _name_of(by)
        origin = provenance(self.val_classes, self.references, scored_by=scored_by, every_n_epochs=every_n_epochs)
        # Other values have no sign that "draw" could filter by, so they go without what it weights by.
        uncertainty = aleatoric_uncertainty(trained_losses(part)) if by is None else None
        metadata = {
            **self.metadata,
            **origin,
            "record": "step" if self.from_steps else "sweep",
            **({} if by is not None else part._diagnosed(values)),
        }
        return CLDScores(values, self.train_classes, part.epochs, self.fingerprint, metadata, uncertainty)

    def _thinned(self, cutoff_epoch: int | None, every_n_epochs: int) -> LossTrajectories:
        """The checkpoints up to a cutoff that are due every n epochs, on the same memory where that is possible.

        Rows of steps have become those of checkpoints in it.
        """
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}.")
        if cutoff_epoch is not None and cutoff_epoch > self.epochs[-1]:
            raise ValueError(
                f"cutoff_epoch={cutoff_epoch} was not reached: the last checkpoint is after {self.epochs[-1]} epochs."
            )
        rows = [
            row
            for row, epoch in enumerate(self.epochs)
            if epoch % every_n_epochs == 0 and (cutoff_epoch is None or epoch <= cutoff_epoch)
        ]
        if not rows:
            raise ValueError(
                f"No checkpoint is left with cutoff_epoch={cutoff_epoch} and every_n_epochs={every_n_epochs} of those "
                f"after {self.epochs} epochs. Use more of them."
            )
        # Slices of a whole timeline are views; only a thinned one is copied.
        whole = rows == list(range(len(rows)))
        train, val = self.train_losses, self.val_losses
        if self.from_steps:
            train = at_epoch_ends(train[: rows[-1] + 1])
        return LossTrajectories(
            train[: len(rows)] if whole else train[rows],
            val[: len(rows)] if whole else val[rows],
            self.train_classes,
            self.val_classes,
            [self.epochs[row] for row in rows],
            fingerprint=self.fingerprint,
            metadata=self.metadata,
        )

    def values(self, cutoff_epoch: int | None = None) -> Tensor:
        """CLD from the checkpoints up to an early cutoff, without all that `score` adds: faster, to compare cutoffs.

        Args:
            cutoff_epoch: Use only checkpoints after at most this many completed epochs; None uses all.

        Returns:
            Float32, `[N]`, on the CPU; NaN for unscored samples and outside of the sampler.

        Raises:
            ValueError: As `score`.

        Example:
            >>> import torch
            >>> from lightning_cld import LossTrajectories
            >>> falling = torch.tensor([[2.0], [1.0], [0.6], [0.5]])
            >>> LossTrajectories(torch.cat([falling, -falling], dim=1), falling).values()
            tensor([ 1., -1.])
        """
        return self._thinned(cutoff_epoch, 1)._cld()

    def _cld(self) -> Tensor:
        """CLD from all checkpoints; see `values`."""
        train, val = self.train_losses, self.val_losses
        used = self._used_positions()
        train_classes, val_classes = check_class_pair(
            None if self.train_classes is None else self.train_classes[used], self.val_classes, len(used), val.shape[1]
        )
        checkpoints = [f"the checkpoint after {epoch} epochs" for epoch in self.epochs]
        check_reference(val, val_classes, train_classes, checkpoints)
        if len(used) < train.shape[1]:
            train = train[:, used.to(train.device)]
        values = torch.full((self._train.width,), torch.nan, dtype=torch.float32)
        values[used] = cld_scores(train, val, train_classes, val_classes).cpu()
        return values

    def _diagnosed(self, values: Tensor) -> dict[str, Any]:
        """What the summary of the scores needs to know of the losses, as plain JSON values."""
        found: dict[str, Any] = {
            "reference_reliability": reliability_by_class(self.val_losses, self.val_classes, self.train_classes)
        }
        half = half_of(self.epochs, self.epochs[-1])
        if half is not None:
            try:
                earlier = best_tenth(self.values(half), self.train_classes)
                same = overlap(best_tenth(values, self.train_classes), earlier)
                found |= {"half_epoch": half, "half_overlap": round(same, 4)}
            except ValueError as error:  # too few checkpoints by then, or too few (scored) samples for a tenth
                found |= {"half_problem": f"with the checkpoints up to epoch {half} or with all, {error}"}
        return found

    def _values_of(self, by: Callable[[LossTrajectories], Tensor]) -> Tensor:
        """What `by` makes of all checkpoints, on the CPU; NaN outside of the sampler."""
        values = _checked_values(by(self), by, self._train.width).cpu()
        return values if self.train_classes is None else values.where(self.train_classes != OUTSIDE, torch.nan)

    def save(self, path: str | Path) -> Path:
        """Writes everything to `path` (an `.npz` archive) atomically and returns the path."""
        arrays = {
            "train_losses": self.train_losses.cpu().numpy(),
            "val_losses": self.val_losses.cpu().numpy(),
        }
        if self.train_classes is not None and self.val_classes is not None:
            arrays["train_classes"] = self.train_classes.numpy()
            arrays["val_classes"] = self.val_classes.numpy()
        header = {
            "epochs": self.epochs,
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_dict(),
            "from_steps": self.from_steps,
            "metadata": self.metadata,
        }
        return write_arrays(path, _KIND, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> LossTrajectories:
        """Reads what `save` wrote, without unpickling anything.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated, damaged, or not a trajectories file of a format that this version knows.

        Example:
            >>> import tempfile
            >>> from lightning_cld import LossTrajectories
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = LossTrajectories([[2.5, 1.0]], [[2.0]]).save(f"{folder}/losses.npz")
            ...     LossTrajectories.load(path).train_losses
            tensor([[2.5000, 1.0000]])
        """
        header, arrays = read_arrays(path, _KIND, "LossTrajectories.load")
        try:
            fingerprint = header["fingerprint"]
            return cls(
                typed_array(arrays["train_losses"], np.float32),
                typed_array(arrays["val_losses"], np.float32),
                typed_array(arrays["train_classes"], np.int64) if "train_classes" in arrays else None,
                typed_array(arrays["val_classes"], np.int64) if "val_classes" in arrays else None,
                header["epochs"],
                fingerprint=None if fingerprint is None else Fingerprint.from_dict(fingerprint),
                from_steps=header["from_steps"],
                metadata=header["metadata"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"LossTrajectories.load: {path} has been changed: {error}. Write it again.") from error

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and plain values, which `torch.load(weights_only=True)` reads.

        Example:
            >>> from lightning_cld import LossTrajectories
            >>> state = LossTrajectories([[2.5, 1.0]], [[2.0]]).state_dict()
            >>> state["epochs"], state["train_losses"]
            ([0], tensor([[2.5000, 1.0000]]))
            >>> LossTrajectories.from_state_dict(state).val_losses
            tensor([[2.]])
        """
        return {
            # clone: a view would drag its whole buffer into the checkpoint
            "train_losses": self.train_losses.detach().cpu().clone(),
            "val_losses": self.val_losses.detach().cpu().clone(),
            "train_classes": None if self.train_classes is None else self.train_classes.clone(),
            "val_classes": None if self.val_classes is None else self.val_classes.clone(),
            "epochs": list(self.epochs),
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_dict(),
            "from_steps": self.from_steps,
            "metadata": self.metadata,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> LossTrajectories:
        """The inverse of `state_dict`; see there."""
        arguments = dict(state)
        fingerprint = arguments.pop("fingerprint")
        return cls(**arguments, fingerprint=None if fingerprint is None else Fingerprint.from_dict(fingerprint))

    def _used_positions(self) -> Tensor:
        if self.train_classes is None:
            return torch.arange(self._train.width)
        return torch.nonzero(self.train_classes != OUTSIDE).flatten()


def trained_losses(trajectories: LossTrajectories) -> Tensor:
    """The training samples' losses at all checkpoints but theta_0, float32 `[T, N]` or `[T - 1, N]`."""
    return trajectories.train_losses[1 if trajectories.epochs[0] == 0 else 0 :]


def _checked_values(values: object, by: object, samples: int) -> Tensor:
    """Returns what `by` made of the losses, or raises unless it is one value a sample."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"by={_name_of(by)} must return a floating point tensor, got {kind_of(values)}.")
    if list(values.shape) != [samples]:
        raise ValueError(
            f"by={_name_of(by)} must return one value for each of the {samples:,} training samples, got shape "
            f"{list(values.shape)}."
        )
    return values


def _name_of(function: object) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _check_epochs(epochs: Sequence[int] | None, rows: int) -> list[int]:
    numbers = list(range(rows)) if epochs is None else [operator.index(epoch) for epoch in epochs]
    if len(numbers) != rows or numbers[0] < 0 or any(b <= a for a, b in pairwise(numbers)):
        raise ValueError(
            f"epochs must be {rows} increasing numbers of completed epochs, one a row, got {numbers[:10]}."
        )
    return numbers
