"""`RunningHistory`: the history that `CLDCallback(history="running")` keeps instead of `LossTrajectories`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_cld.data.fingerprint import Fingerprint
from lightning_cld.functional.diagnostics import best_tenth, half_of, overlap
from lightning_cld.functional.moments import (
    Classes,
    Moments,
    judged_by,
    reliability_by_class,
    scores,
    skip,
    update,
)
from lightning_cld.functional.selection import above_threshold
from lightning_cld.names import SampleNames, checked_names
from lightning_cld.scores import CLDScores
from lightning_cld.storage.provenance import provenance


class KeptTenth(NamedTuple):
    """The best tenth of an earlier checkpoint.

    Attributes:
        epoch: Completed epochs at that checkpoint.
        chosen: Positions of the best tenth, int32, on the CPU; None if it could not be chosen.
        problem: Why it could not be chosen.
    """

    epoch: int
    chosen: Tensor | None
    problem: str


class RunningHistory:
    """Keeps moments of the losses instead of the losses: 36 bytes per training sample, class included.

    It records rows and gives scores like `LossTrajectories`, but always from all checkpoints. It offers no earlier
    cutoff, no thinned timeline, and nothing else that needs the losses. It can keep the best tenth of one checkpoint,
    in 0.4 bytes more per training sample.

    Args:
        moments: Moments of the checkpoints so far.
        classes: Classes of the training and validation samples.
        epochs: Completed epochs at each checkpoint.
        one_class: Whether no classes were given, so that `classes` holds a single placeholder class.
        fingerprint: Identity of the train dataset.
        metadata: Plain JSON values about the run, copied into the scores.
        names: Names of the training samples by position, which the scores take over; None for map-style datasets.

    Example:
        >>> import torch
        >>> from lightning_cld.recording.running_history import RunningHistory
        >>> history = RunningHistory.of_losses(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0]]))
        >>> for epoch, (train, val) in enumerate([([2.0, 2.0], 1.0), ([1.7, 2.3], 0.7), ([1.6, 2.4], 0.6)], start=1):
        ...     history.record(epoch, torch.tensor(train), torch.tensor([val]))
        >>> history.score().values
        tensor([ 1., -1.])
    """

    # Here, because pickles of earlier versions have neither.
    _kept: KeptTenth | None = None
    names: SampleNames | None = None

    def __init__(
        self,
        moments: Moments,
        classes: Classes,
        epochs: Sequence[int],
        *,
        one_class: bool,
        fingerprint: Fingerprint | None = None,
        metadata: Mapping[str, Any] | None = None,
        names: SampleNames | None = None,
    ) -> None:
        self._recorded = moments, list(epochs)  # assigned together, so an interruption can't separate them
        self._holes: set[int] = set()
        self._classes = classes
        self._one_class = one_class
        self.fingerprint = fingerprint
        self.metadata = dict(metadata or {})
        self.names = names

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
        names: SampleNames | Iterable[str] | None = None,
        scores_only: bool = False,
    ) -> RunningHistory:
        """Makes a history from rows of losses, like `LossTrajectories`; the classes must be valid.

        With `scores_only` it can't tell how plausible labels and how reliable references are, and is faster.
        """
        one_class = train_classes is None or val_classes is None
        if train_classes is None or val_classes is None:
            train_classes = torch.zeros(train_losses.shape[1], dtype=torch.int64)
            val_classes = torch.zeros(val_losses.shape[1], dtype=torch.int64)
        classes = Classes.of(train_classes, val_classes)
        moments = Moments.empty(len(train_classes), len(val_classes), len(classes.labels), scores_only=scores_only)
        names = checked_names(names, len(train_classes))
        history = cls(moments, classes, [], one_class=one_class, fingerprint=fingerprint, names=names)
        history.to(train_losses.device)
        rows = range(len(train_losses)) if epochs is None else epochs
        for epoch, train_row, val_row in zip(rows, train_losses, val_losses, strict=True):
            history.record(epoch, train_row, val_row)
        return history

    @property
    def epochs(self) -> list[int]:
        """Completed epochs at each checkpoint, increasing; 0 means before training."""
        return self._recorded[1]

    @property
    def logged_epochs(self) -> list[int]:
        """The epochs of the checkpoints that were logged."""
        return [epoch for epoch in self.epochs if epoch not in self._holes]

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
        samples = f"{len(self._moments.last):,} train and {self.references:,} val samples"
        return f"RunningHistory({len(self.logged_epochs)} checkpoints, {samples})"

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
            moments = update(self._moments, train_row, val_row, self._classes, theta_0=epoch == 0)
            self._recorded = moments, [*self.epochs, epoch]

    def leave_hole(self, epoch: int) -> None:
        """Records that the checkpoint after `epoch` completed epochs is missing; no difference spans it."""
        if self._is_new(epoch):
            self._holes.add(epoch)
            self._recorded = skip(self._moments), [*self.epochs, epoch]

    def keep_best_tenth(self) -> None:
        """Keeps the best tenth of the newest checkpoint, so that `score` can compare it with that of the last one.

        It replaces the one that was kept before. If there is none yet, the reason for that is kept.
        """
        try:
            chosen, problem = best_tenth(self.values(), self.train_classes).int().cpu(), ""
        except ValueError as error:  # too few checkpoints, or too few (scored) samples for a tenth
            chosen, problem = None, str(error)
        self._kept = KeptTenth(self.epochs[-1], chosen, problem)

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
        """Scores from all checkpoints, on the CPU, with all that `LossTrajectories.score` gives.

        After a checkpoint of an earlier version, which kept less, the plausibility of labels or the reliability of the
        references are missing. `half_overlap` is missing if the best tenth at half of the epochs was not kept.

        Args:
            cutoff_epoch: Epoch that the last checkpoint must have reached; None accepts any.

        Raises:
            ValueError: If `cutoff_epoch` was not reached, or for the reasons given in `values`.
        """
        if cutoff_epoch is not None and cutoff_epoch > self.epochs[-1]:
            raise ValueError(
                f"cutoff_epoch={cutoff_epoch} was not reached: the last checkpoint is after {self.epochs[-1]} epochs."
            )
        values, classes = self.values(), self.train_classes
        judged = judged_by(self._moments, self._classes, values)
        confidence, plausible, shares = judged or (None, None, None)
        if plausible is not None and self.metadata.get("augmented"):  # not to be compared with validation samples
            plausible, shares = above_threshold(values.cpu()), None
        metadata = {
            **self.metadata,
            **provenance(classes, self.val_classes, self.references, int(self._moments.differences.max())),
            "record": "sweep",
            **self._diagnosed(values, classes),
            **({} if shares is None else {"implausible": shares}),
        }
        return CLDScores(
            values, classes, self.logged_epochs, self.fingerprint, metadata, plausible, confidence, self.names
        )

    def _diagnosed(self, values: Tensor, classes: Tensor | None) -> dict[str, Any]:
        """What the summary of the scores needs, as plain JSON values, under the names of `LossTrajectories`."""
        reliability = reliability_by_class(self._moments, self._classes)
        found: dict[str, Any] = {} if reliability is None else {"reference_reliability": reliability}
        half, kept = half_of(self.epochs, self.epochs[-1]), self._kept
        if half is None:
            return found
        if kept is None or kept.epoch != half:
            if isinstance(self.metadata.get("half_overlap"), float):  # computed for a logger
                return found
            problem = (
                f"the best tenth after {half} epochs was not kept: only a run that ends at its cutoff_epoch or "
                "max_epochs keeps it"
            )
            return found | {"half_problem": problem}
        problem = kept.problem
        if kept.chosen is not None:
            try:
                same = overlap(best_tenth(values, classes).cpu(), kept.chosen)
                return found | {"half_epoch": half, "half_overlap": round(same, 4)}
            except ValueError as error:  # too few scored samples for a tenth
                problem = str(error)
        return found | {"half_problem": f"with the checkpoints up to epoch {half} or with all, {problem}"}

    def state_dict(self) -> dict[str, Any]:
        """CPU tensors and plain values that `torch.load(weights_only=True)` reads."""
        return {
            # No clone is needed on the CPU: an update makes new moments and leaves these unchanged.
            "moments": {name: value.cpu() for name, value in self._moments._asdict().items()},
            "classes": {name: value.cpu() for name, value in self._classes._asdict().items()},
            "one_class": self._one_class,
            "kept_tenth": None if self._kept is None else self._kept._asdict(),
            "epochs": list(self.epochs),
            "holes": sorted(self._holes),
            "fingerprint": None if self.fingerprint is None else self.fingerprint.to_dict(),
            "metadata": self.metadata,
            "names": None if self.names is None else self.names.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RunningHistory:
        """The inverse of `state_dict`."""
        fingerprint = state["fingerprint"]
        kept, names = state.get("kept_tenth"), state.get("names")  # not in checkpoints of earlier versions
        history = cls(
            Moments(**{name: state["moments"][name] for name in Moments._fields if name in state["moments"]}),
            Classes(**state["classes"]),
            state["epochs"],
            one_class=state["one_class"],
            fingerprint=None if fingerprint is None else Fingerprint.from_dict(fingerprint),
            metadata=state["metadata"],
            names=None if names is None else SampleNames.from_state_dict(names),
        )
        history._holes = set(state.get("holes", ()))  # nor is this
        history._kept = None if kept is None else KeptTenth(**kept)
        return history

    @property
    def _moments(self) -> Moments:
        return self._recorded[0]

    def _is_new(self, epoch: int) -> bool:
        if self.epochs and epoch < self.epochs[-1]:
            raise ValueError(f"checkpoints must be recorded in order: got {epoch} after {self.epochs[-1]}.")
        return not self.epochs or epoch > self.epochs[-1]
