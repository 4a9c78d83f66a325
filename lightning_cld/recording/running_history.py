"""`RunningHistory`: the history that `CLDCallback(history="running")` keeps instead of `LossTrajectories`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cld.data.fingerprint import Fingerprint
from lightning_cld.functional.moments import Classes, Moments, scores, skip, update
from lightning_cld.scores import CLDScores
from lightning_cld.storage.provenance import provenance


class RunningHistory:
    """Keeps moments of the losses instead of the losses: 20 bytes per training sample, class included.

    It records rows and gives scores like `LossTrajectories`, but always from all checkpoints. It offers no earlier
    cutoff, no thinned timeline, and nothing else that needs the losses.

    Args:
        moments: Moments of the checkpoints so far.
        classes: Classes of the training and validation samples.
        epochs: Completed epochs at each checkpoint.
        one_class: Whether no classes were given, so that `classes` holds a single placeholder class.
        fingerprint: Identity of the train dataset.
        metadata: Plain JSON values about the run, copied into the scores.

    Example:
        >>> import torch
        >>> from lightning_cld.recording.running_history import RunningHistory
        >>> history = RunningHistory.of_losses(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0]]))
        >>> for epoch, (train, val) in enumerate([([2.0, 2.0], 1.0), ([1.7, 2.3], 0.7), ([1.6, 2.4], 0.6)], start=1):
        ...     history.record(epoch, torch.tensor(train), torch.tensor([val]))
        >>> history.score().values
        tensor([ 1., -1.])
    """

    def __init__(
        self,
        moments: Moments,
        classes: Classes,
        epochs: Sequence[int],
        *,
        one_class: bool,
        fingerprint: Fingerprint | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._recorded = moments, list(epochs)  # assigned together, so an interruption can't separate them
        self._classes = classes
        self._one_class = one_class
        self.fingerprint = fingerprint
        self.metadata = dict(metadata or {})

    @classmethod
    def of_losses(
        cls,
        train_losses: Tensor,
        val_losses: Tensor,
        train_classes: Tensor | None = None,
        val_classes: Tensor | None = None,
        epochs: Sequence[int] | None = None,
        *,
        fingerprint: Fingerprint | None = None,
    ) -> RunningHistory:
        """Makes a history from rows of losses, like `LossTrajectories`; the classes must be valid."""
        one_class = train_classes is None or val_classes is None
        if train_classes is None or val_classes is None:
            train_classes = torch.zeros(train_losses.shape[1], dtype=torch.int64)
            val_classes = torch.zeros(val_losses.shape[1], dtype=torch.int64)
        classes = Classes.of(train_classes, val_classes)
        moments = Moments.empty(len(train_classes), len(val_classes), len(classes.labels))
        history = cls(moments, classes, [], one_class=one_class, fingerprint=fingerprint).to(train_losses.device)
        rows = range(len(train_losses)) if epochs is None else epochs
        for epoch, train_row, val_row in zip(rows, train_losses, val_losses, strict=True):
            history.record(epoch, train_row, val_row)
        return history

    @property
    def epochs(self) -> list[int]:
        """Completed epochs at each checkpoint, increasing; 0 means before training."""
        return self._recorded[1]

    @property
    def references(self) -> int:
        """The number of validation samples."""
        return len(self._moments.val_last)

    @property
    def train_classes(self) -> Tensor | None:
        """Classes of the training samples, int64 `[N]`, on the CPU; -1 for unused positions; None for one class."""
        if self._one_class:
            return None
        groups = self._classes.groups.long()
        return self._classes.labels[groups.clamp(min=0)].where(groups >= 0, groups).cpu()

    @property
    def val_classes(self) -> Tensor | None:
        """Classes of the validation samples, int64 `[M]`, on the CPU; None for one class."""
        return None if self._one_class else self._classes.val_classes.cpu()

    def __repr__(self) -> str:
        samples = len(self._moments.last)
        return f"RunningHistory({len(self.epochs)} checkpoints, {samples:,} train and {self.references:,} val samples)"

    def record(self, epoch: int, train_row: Tensor, val_row: Tensor) -> None:
        """Adds the checkpoint after `epoch` completed epochs; ignores it if that epoch is already recorded.

        A recorded checkpoint can't be replaced and need not be: a resumed run that reaches the same epoch end again
        has the same weights there.

        Args:
            epoch: Completed epochs, not fewer than at the newest checkpoint.
            train_row: Losses of the training samples, `[N]`.
            val_row: Losses of the validation samples, `[M]`.

        Raises:
            ValueError: If `epoch` is before the newest checkpoint.
        """
        if self._is_new(epoch):
            self._recorded = update(self._moments, train_row, val_row, self._classes), [*self.epochs, epoch]

    def leave_hole(self, epoch: int) -> None:
        """Records that the checkpoint after `epoch` completed epochs is missing; no difference spans it."""
        if self._is_new(epoch):
            self._recorded = skip(self._moments), [*self.epochs, epoch]

    def to(self, device: torch.device | str) -> RunningHistory:
        """Moves the history to `device`, in place, and returns it; MPS has no float64, so there it goes to the CPU."""
        device = torch.device(device)
        if device.type == "mps":
            device = torch.device("cpu")
        self._recorded, self._classes = (self._moments.to(device), self.epochs), self._classes.to(device)
        return self

    def values(self) -> Tensor:
        """CLD scores from all checkpoints, float32 `[N]`, on the history's device; NaN for unscored samples.

        Raises:
            ValueError: If there are fewer than 4 checkpoints or 3 usable differences, or a validation loss was not
                finite at a checkpoint.
        """
        named = [f"the checkpoint after {epoch} epochs" for epoch in self.epochs]
        return scores(self._moments, self._classes, named)

    def score(self, cutoff_epoch: int | None = None) -> CLDScores:
        """Scores from all checkpoints, on the CPU.

        Args:
            cutoff_epoch: Epoch that the last checkpoint must have reached; None accepts any.

        Raises:
            ValueError: If `cutoff_epoch` was not reached, or for the reasons given in `values`.
        """
        if cutoff_epoch is not None and cutoff_epoch > self.epochs[-1]:
            raise ValueError(
                f"cutoff_epoch={cutoff_epoch} was not reached: the last checkpoint is after {self.epochs[-1]} epochs."
            )
        origin = {**self.metadata, **provenance(self.val_classes, self.references), "record": "sweep"}
        return CLDScores(self.values(), self.train_classes, self.epochs, self.fingerprint, origin)

    def state_dict(self) -> dict[str, Any]:
        """CPU tensors and plain values that `torch.load(weights_only=True)` reads."""
        return {
            # No clone is needed on the CPU: an update makes new moments and leaves these unchanged.
            "moments": {name: value.cpu() for name, value in self._moments._asdict().items()},
            "classes": {name: value.cpu() for name, value in self._classes._asdict().items()},
            "one_class": self._one_class,
            "epochs": list(self.epochs),
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_dict(),
            "metadata": self.metadata,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RunningHistory:
        """The inverse of `state_dict`."""
        fingerprint = state["fingerprint"]
        return cls(
            Moments(**state["moments"]),
            Classes(**state["classes"]),
            state["epochs"],
            one_class=state["one_class"],
            fingerprint=None if fingerprint is None else Fingerprint.from_dict(fingerprint),
            metadata=state["metadata"],
        )

    @property
    def _moments(self) -> Moments:
        return self._recorded[0]

    def _is_new(self, epoch: int) -> bool:
        if self.epochs and epoch < self.epochs[-1]:
            raise ValueError(f"checkpoints must be recorded in order: got {epoch} after {self.epochs[-1]}.")
        return not self.epochs or epoch > self.epochs[-1]
