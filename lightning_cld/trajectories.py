"""`LossTrajectories`: the logged losses, one row per checkpoint, from which scores are computed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, SupportsIndex

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
    check_count,
    check_differences,
    check_losses,
    check_reference,
    check_rows,
    kind_of,
    labels_in,
)
from lightning_cld.functional.cld import scores_at
from lightning_cld.functional.confidence import early_confidence, is_missing
from lightning_cld.functional.diagnostics import best_tenth, half_of, overlap, reliability_by_class
from lightning_cld.functional.held_out import held_out_scores
from lightning_cld.functional.plausibility import judged
from lightning_cld.functional.selection import above_threshold
from lightning_cld.functional.step_losses import at_epoch_ends
from lightning_cld.names import SampleNames, checked_names, name_arrays, names_in_arrays
from lightning_cld.scores import OUTSIDE, CLDScores, check_pool_classes, typed_array
from lightning_cld.storage.files import Contents, read, write
from lightning_cld.storage.places import Place, as_place, is_folder
from lightning_cld.storage.provenance import provenance
from lightning_cld.storage.row_files import RowFiles
from lightning_cld.storage.rows import Rows

_KIND = "cld-trajectories"


class LossTrajectories:
    """The losses of every train and validation sample at each checkpoint. CLD is computed from them.

    `CLDCallback` fills one during training. You can also make one from losses that you logged yourself. Losses are kept
    as float32, on their device. Tensors and arrays are not copied where that is possible, so don't change them later.
    NaN means *not logged*, infinity means *not finite*.

    Args:
        train_losses: Losses of the training samples, floating point, `[T, N]`, one row per checkpoint: a tensor, an
            array, a pandas DataFrame, or a list of rows. Masked numbers become NaN.
        val_losses: Losses of the validation samples at the same checkpoints, `[T, M]`.
        train_classes: Classes of the training samples, `[N]`: integers of any type, in a tensor, an array, a pandas
            Series or a list; -1 for positions that are not in use. None puts all samples into one class.
        val_classes: Classes of the validation samples, `[M]`; None if `train_classes` is None.
        epochs: The number of completed epochs at each row, increasing; 0 is before training. None numbers the rows
            from 0.
        fingerprint: The identity of the train dataset; None uses its length and the classes.
        from_steps: Whether the rows after the first hold the losses of an epoch's training steps, as
            `CLDCallback(record="step")` logs them, instead of the losses at the end of the epoch. For scores, the loss
            at a checkpoint is then the mean of the epochs before and after it.
        metadata: Plain JSON values about the run, which the scores take over.
        names: What the training samples are called in a stream, such as keys or URLs: text, all different, one for
            each position. They are kept as `SampleNames`, and the scores take them over. None for map-style datasets.

    Raises:
        TypeError: If losses are not floating point, classes or epochs are not integers, or names are no text.
        ValueError: If shapes don't match, a class is negative or has no validation samples, epochs don't increase, or
            two names are the same.

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
        names: SampleNames | Iterable[str] | None = None,
    ) -> None:
        train, val = as_numbers(train_losses, "train_losses"), as_numbers(val_losses, "val_losses")
        check_losses(train, "train_losses")
        check_losses(val, "val_losses")
        check_rows(train, val)
        self._train, self._val = Rows(train), Rows(val)
        self.epochs = _check_epochs(epochs, len(train))

        samples, val_samples = train.shape[1], val.shape[1]
        self.train_classes = (
            None if train_classes is None else check_pool_classes(train_classes, samples, "train_classes")
        )
        self.val_classes = None if val_classes is None else as_classes(val_classes, "val_classes").cpu()
        in_use = self.train_classes
        if in_use is not None and (in_use == OUTSIDE).any():
            in_use = in_use[in_use != OUTSIDE]
        check_class_pair(in_use, self.val_classes, samples if in_use is None else len(in_use), val_samples)
        if fingerprint is not None and fingerprint.length != samples:
            raise ValueError(
                f"The fingerprint belongs to {fingerprint.length:,} samples, but train_losses has {samples:,} columns."
            )
        self.fingerprint = fingerprint
        self.from_steps = from_steps
        self.metadata = dict(metadata or {})
        self.names = checked_names(names, samples)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"names": None} | state)  # which a former version did not pickle
        if isinstance(self._train, Tensor):  # a former version pickled plain tensors
            self._train, self._val = Rows(self._train), Rows(self._val)

    @property
    def train_losses(self) -> Tensor:
        """Float32 `[T, N]`, a view of the buffer."""
        return self._train.losses[: len(self.epochs)]

    @property
    def val_losses(self) -> Tensor:
        """Float32 `[T, M]`, a view of the buffer."""
        return self._val.losses[: len(self.epochs)]

    def row(self, place: int) -> tuple[Tensor, Tensor]:
        """One row of the train and of the validation losses, float32 `[N]` and `[M]`, without reading the others.

        Example:
            >>> from lightning_cld import LossTrajectories
            >>> LossTrajectories([[2.5, 1.0]], [[2.0]]).row(0)
            (tensor([2.5000, 1.0000]), tensor([2.]))
        """
        return self._train.row(place), self._val.row(place)

    @property
    def references(self) -> int:
        """The number of validation samples.

        Example:
            >>> from lightning_cld import LossTrajectories
            >>> LossTrajectories([[2.2]], [[2.0, 1.9, 2.3]]).references
            3
        """
        return self._val.width

    @property
    def logged_epochs(self) -> list[int]:
        """The epochs of the checkpoints that were logged. A row of NaN stands for one that was not.

        Example:
            >>> from lightning_cld import LossTrajectories
            >>> trajectories = LossTrajectories([[2.5, 1.0]], [[2.0]])
            >>> trajectories.leave_hole(1)
            >>> trajectories.epochs, trajectories.logged_epochs
            ([0, 1], [0])
        """
        missing = self.val_losses.isnan().all(dim=1).tolist()
        return [epoch for epoch, hole in zip(self.epochs, missing, strict=True) if not hole]

    def __len__(self) -> int:
        return len(self.epochs)

    def __repr__(self) -> str:
        samples = f"{self._train.width:,} train and {self.references:,} val samples"
        return f"LossTrajectories({len(self.logged_epochs)} checkpoints, {samples})"

    def record(self, epoch: int, train_row: NumbersLike, val_row: NumbersLike) -> None:
        """Adds the checkpoint after `epoch` completed epochs. If that is the newest one already, replaces it.

        Args:
            epoch: The number of completed epochs, at least that of the newest checkpoint.
            train_row: Losses of the training samples, `[N]`.
            val_row: Losses of the validation samples, `[M]`.

        Raises:
            TypeError: If a row holds no numbers, or `epoch` is not a whole one.
            ValueError: If `epoch` is before the newest checkpoint, or a row has the wrong shape.

        Example:
            >>> import torch
            >>> from lightning_cld import LossTrajectories
            >>> trajectories = LossTrajectories([[2.5, 1.0]], [[2.0]])  # before training
            >>> trajectories.record(1, torch.tensor([1.5, 1.25]), torch.tensor([1.0]))
            >>> trajectories.train_losses
            tensor([[2.5000, 1.0000],
                    [1.5000, 1.2500]])
        """
        if isinstance(epoch, bool) or not isinstance(epoch, SupportsIndex):
            raise TypeError(f"epoch must be a whole number, got {epoch!r}.")
        epoch = operator.index(epoch)
        if epoch < self.epochs[-1]:
            raise ValueError(f"Checkpoints must be recorded in order: got {epoch} after {self.epochs[-1]}.")
        train, val = as_numbers(train_row, "train_row"), as_numbers(val_row, "val_row")
        for name, row, rows in (("train_row", train, self._train), ("val_row", val, self._val)):
            if list(row.shape) != [rows.width]:
                raise ValueError(f"{name} must have shape {[rows.width]}, got {list(row.shape)}.")
        place = len(self) if epoch > self.epochs[-1] else len(self) - 1
        self._train.write(place, train)
        self._val.write(place, val)
        if place == len(self):  # comes last, so that an interruption before it leaves the timeline as it was
            self.epochs.append(epoch)

    def leave_hole(self, epoch: int) -> None:
        """Records that the checkpoint after `epoch` completed epochs was not logged, as NaN. No difference spans it.

        If that is the newest checkpoint already, it stays.

        Example:
            >>> from lightning_cld import LossTrajectories
            >>> trajectories = LossTrajectories([[2.5, 1.0]], [[2.0]])
            >>> trajectories.leave_hole(1)
            >>> trajectories.val_losses
            tensor([[2.],
                    [nan]])
        """
        if epoch == self.epochs[-1]:
            return
        train_row, val_row = (torch.full((rows.width,), torch.nan) for rows in (self._train, self._val))
        self.record(epoch, train_row, val_row)

    def reserve(self, checkpoints: int) -> None:
        """Makes room for so many checkpoints in all, if it is known how many there will be.

        Recording then copies no losses. Otherwise the losses recorded so far are copied into one tensor whenever they
        are read, and memory peaks at twice the losses. If the device has too little memory left, the losses move to the
        CPU with a warning.

        Args:
            checkpoints: Their number, or fewer than there are, which changes nothing.

        Example:
            >>> from lightning_cld import LossTrajectories
            >>> trajectories = LossTrajectories([[2.5, 1.0]], [[2.0]])
            >>> trajectories.reserve(91)
            >>> len(trajectories)
            1
        """
        self._train.reserve(checkpoints)
        self._val.reserve(checkpoints)

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
        """Computes scores from all checkpoints, or from some of them.

        Args:
            cutoff_epoch: Use only checkpoints after at most this many completed epochs; None uses all.
            every_n_epochs: Use only checkpoints whose epoch is a multiple of this.
            by: A function that computes other scores than CLD. It takes `LossTrajectories` and returns a value for each
                training sample, floating point, `[N]`: higher for samples to keep, NaN for unscored ones.
                `lightning_cld.baselines` has such functions.

        Returns:
            The scores, on the CPU.

        Raises:
            TypeError: If `by` does not return a floating point tensor.
            ValueError: If the timeline ends before `cutoff_epoch`, no checkpoint is left, or `by` returns the wrong
                shape. For CLD also if fewer than 4 checkpoints are left, or a validation loss is not finite.
        """
        part = self._thinned(cutoff_epoch, every_n_epochs)
        logged = part.logged_epochs
        if by is None and len(logged) < MIN_CHECKPOINTS:
            raise ValueError(
                f"CLD needs at least {MIN_CHECKPOINTS} checkpoints, got {len(logged)} (after {logged} epochs) with "
                f"cutoff_epoch={cutoff_epoch} and every_n_epochs={every_n_epochs}. Use more of them."
            )
        half, at_half = None, None
        if by is None:
            half = half_of(part.epochs, part.epochs[-1])
            values, at_half, differences = part._cld(half)
        else:
            values, differences = part._values_of(by), None
        scored_by = "CLD" if by is None else _name_of(by)
        origin = provenance(
            self.train_classes,
            self.val_classes,
            self.references,
            differences,
            scored_by=scored_by,
            every_n_epochs=every_n_epochs,
        )
        confidence, plausible, shares = part._judged(values, self.from_steps) if by is None else (None, None, {})
        metadata = {
            **self.metadata,
            **origin,
            "record": "step" if self.from_steps else "sweep",
            **({} if by is not None else part._diagnosed(values, half, at_half)),
            **shares,
        }
        return CLDScores(
            values, self.train_classes, logged, self.fingerprint, metadata, plausible, confidence, self.names
        )

    def _thinned(self, cutoff_epoch: int | None, every_n_epochs: int) -> LossTrajectories:
        """The checkpoints up to a cutoff whose epoch is a multiple of n, on the same memory if possible.

        Rows of training steps are turned into losses at checkpoints.
        """
        every_n_epochs = check_count("every_n_epochs", every_n_epochs)
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
                f"No checkpoint is left with cutoff_epoch={cutoff_epoch} and every_n_epochs={every_n_epochs}. There "
                f"are checkpoints after {self.epochs} epochs. Use more of them."
            )
        # The first rows are a view. Other choices of rows need a copy.
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
            names=self.names,
        )

    def values(self, cutoff_epoch: int | None = None) -> Tensor:
        """CLD from the checkpoints up to a cutoff. Faster than `score`, because it computes nothing else.

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
        return self._thinned(cutoff_epoch, 1)._cld()[0]

    def _cld(self, early: int | None = None) -> tuple[Tensor, Tensor | None, int]:
        """CLD from all checkpoints, as in `values`, and from those up to the epoch `early`, in one pass.

        The second is None if that is too few checkpoints or differences. The third is the number of differences.
        """
        train, val = self.train_losses, self.val_losses
        used = self._used_positions()
        train_classes, val_classes = check_class_pair(
            None if self.train_classes is None else self.train_classes[used], self.val_classes, len(used), val.shape[1]
        )
        checkpoints = [f"the checkpoint after {epoch} epochs" for epoch in self.epochs]
        check_reference(val, val_classes, train_classes, checkpoints)
        if len(used) < train.shape[1]:
            train = train[:, used.to(train.device)]
        rows = [] if early is None else [self.epochs.index(early) + 1]
        rows = [count for count in rows if MIN_CHECKPOINTS <= count < len(self)]
        *at_early, (final, differences) = scores_at([*rows, len(self)], train, val, train_classes, val_classes)
        check_differences(differences)
        at_early = [found for found in at_early if found[1] >= MIN_CHECKPOINTS - 1]
        values = torch.full((1 + len(at_early), self._train.width), torch.nan, dtype=torch.float32)
        for row, scores in zip(values, [final, *(scores for scores, _ in at_early)], strict=True):
            row[used] = scores.cpu()
        return values[0], values[1] if at_early else None, differences

    def _judged(self, values: Tensor, from_steps: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The early confidence, the plausibility of the labels, and what the metadata say of it."""
        val, val_classes = self.val_losses, self.val_classes
        if self.train_classes is None or val_classes is None:
            val_classes = torch.zeros(self.references, dtype=torch.int64)
        else:
            wanted = torch.isin(val_classes, labels_in(self.train_classes[self.train_classes != OUTSIDE]))
            if not wanted.all():
                val, val_classes = val[:, wanted.to(val.device)], val_classes[wanted]
        holes = [row for row, losses in enumerate(self.train_losses) if is_missing(losses)]
        if holes:  # of the training samples, so that validation is not compared by more rows
            val = val.clone()
            val[holes] = torch.nan
        start = 1 if self.epochs[0] == 0 else 0
        confidence, of_val = early_confidence(self.train_losses[start:], val[start:])
        # In training mode, or of augmented samples, losses can't be compared with those of validation samples.
        if from_steps or self.metadata.get("augmented"):
            return confidence.cpu(), above_threshold(values), {}
        both = None if self.train_classes is None else val_classes
        plausible, shares = judged(
            (values, held_out_scores(val, val_classes)), (confidence, of_val), (self.train_classes, both)
        )
        return confidence.cpu(), plausible, {"implausible": shares}

    def _diagnosed(self, values: Tensor, half: int | None, at_half: Tensor | None) -> dict[str, Any]:
        """What the summary of the scores needs from the losses, as plain JSON values.

        Args:
            values: The scores from all checkpoints.
            half: The checkpoint at half the epochs.
            at_half: The scores from the checkpoints up to it, where they are known.
        """
        found: dict[str, Any] = {
            "reference_reliability": reliability_by_class(self.val_losses, self.val_classes, self.train_classes)
        }
        if half is not None:
            try:
                earlier = best_tenth(self.values(half) if at_half is None else at_half, self.train_classes)
                same = overlap(best_tenth(values, self.train_classes), earlier)
                found |= {"half_epoch": half, "half_overlap": round(same, 4)}
            except ValueError as error:  # too few checkpoints, or too few (scored) samples for a tenth
                found |= {"half_problem": f"with the checkpoints up to epoch {half} or with all, {error}"}
        return found

    def _values_of(self, by: Callable[[LossTrajectories], Tensor]) -> Tensor:
        """The values that `by` computes from all checkpoints, on the CPU; NaN outside of the sampler."""
        values = _checked_values(by(self), by, self._train.width).cpu()
        return values if self.train_classes is None else values.where(self.train_classes != OUTSIDE, torch.nan)

    def save(self, path: str | Path) -> Place:
        """Writes the losses and all else to `path` (an `.npz` archive) atomically and returns the path.

        The path may be a URL that fsspec can write to, such as `s3://bucket/losses.npz`.
        """
        return write(path, losses_contents(self))

    @classmethod
    def load(cls, path: str | Path) -> LossTrajectories:
        """Reads a file that `save` wrote, or the folder `cld-rows-...` of a run that goes on or was killed.

        Nothing is unpickled. The path may be a URL.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a file is truncated or damaged, holds no trajectories, or has a newer format; or if nothing
                was logged into the folder.

        Example:
            >>> import tempfile
            >>> from lightning_cld import LossTrajectories
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = LossTrajectories([[2.5, 1.0]], [[2.0]]).save(f"{folder}/losses.npz")
            ...     LossTrajectories.load(path).train_losses
            tensor([[2.5000, 1.0000]])
        """
        reader = "LossTrajectories.load"
        place = as_place(path)
        header, arrays = RowFiles(place).read(reader) if is_folder(place) else read(place, _KIND, reader)
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
                names=names_in_arrays(arrays),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{reader}: {place} has been changed: {error}. Write it again.") from error

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
            # Cloned, because saving a view would save its whole buffer.
            "train_losses": self.train_losses.detach().cpu().clone(),
            "val_losses": self.val_losses.detach().cpu().clone(),
            "train_classes": None if self.train_classes is None else self.train_classes.clone(),
            "val_classes": None if self.val_classes is None else self.val_classes.clone(),
            "epochs": list(self.epochs),
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_dict(),
            "from_steps": self.from_steps,
            "metadata": self.metadata,
            "names": None if self.names is None else self.names.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> LossTrajectories:
        """The inverse of `state_dict`, which has an example."""
        arguments = dict(state)
        fingerprint, names = arguments.pop("fingerprint"), arguments.pop("names", None)  # not in former states
        return cls(
            **arguments,
            fingerprint=None if fingerprint is None else Fingerprint.from_dict(fingerprint),
            names=None if names is None else SampleNames.from_state_dict(names),
        )

    def _used_positions(self) -> Tensor:
        if self.train_classes is None:
            return torch.arange(self._train.width)
        return torch.nonzero(self.train_classes != OUTSIDE).flatten()


def losses_contents(trajectories: LossTrajectories) -> Contents:
    """What `LossTrajectories.save` writes."""
    header, arrays = shared_parts(trajectories)
    losses = {"train_losses": trajectories.train_losses, "val_losses": trajectories.val_losses}
    return Contents(
        _KIND,
        {**header, "epochs": trajectories.epochs},
        {**{name: rows.cpu().numpy() for name, rows in losses.items()}, **arrays},
    )


def shared_parts(trajectories: LossTrajectories) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a file holds beside losses and epochs: the other values of its header, and arrays of classes and names."""
    arrays = {}
    if trajectories.train_classes is not None and trajectories.val_classes is not None:
        arrays = {
            "train_classes": trajectories.train_classes.numpy(),
            "val_classes": trajectories.val_classes.numpy(),
        }
    fingerprint = trajectories.fingerprint
    header = {
        "fingerprint": None if fingerprint is None else fingerprint.to_dict(),
        "from_steps": trajectories.from_steps,
        "metadata": trajectories.metadata,
    }
    return header, {**arrays, **name_arrays(trajectories.names)}


def trained_losses(trajectories: LossTrajectories) -> Tensor:
    """The losses of the training samples at all checkpoints except theta_0, float32 `[T, N]` or `[T - 1, N]`."""
    return trajectories.train_losses[1 if trajectories.epochs[0] == 0 else 0 :]


def _checked_values(values: object, by: object, samples: int) -> Tensor:
    """Returns the values that `by` computed, or raises unless there is one value per sample."""
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
            f"epochs must be {rows} increasing numbers of completed epochs, one per row, got {numbers[:10]}."
        )
    return numbers
