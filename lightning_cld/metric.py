"""`CLDMetric`: CLD in constant memory, as a metric that is updated with one checkpoint at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_cld.functional.arrays import IntegersLike
from lightning_cld.functional.checks import as_classes, check_class_pair, kind_of
from lightning_cld.functional.moments import (
    Classes,
    Moments,
    judged_by,
    reliability_by_class,
    scores,
    update,
)
from lightning_cld.scores import CLDScores
from lightning_cld.storage.provenance import provenance

_FORMER = ("uncertainty", "uncertainty_rows")
"""What earlier versions kept."""


class CLDMetric(Metric):
    """Computes the CLD of every training sample without keeping the losses, for Fabric and your own training loops.

    Each `update` takes the losses of all samples at one checkpoint, always in the same order. The first checkpoint must
    be the model before its first step. The metric keeps the newest loss, moments of the differences, the confidence
    and the class: 36 bytes per training sample (38 with more than 32,767 classes), for any number of checkpoints.
    `compute` returns the scores of `cld_scores` within 1e-5, at any time and as often as you like. `score` returns them
    as `CLDScores`, which choose coresets, list suspects and can be saved.

    If all training losses of an update are NaN, the checkpoint was not logged, and no difference spans it. If only some
    are NaN, these samples are unscored from then on, unlike in `cld_scores`. Losses are converted to float32.

    In a distributed run, give every process the losses of *all* samples (gather them first); every process then has all
    scores. States of different processes can't be merged, so a request to synchronize raises an error. Part of the
    state is float64, which MPS devices lack: keep the metric on the CPU there. If a module holds the metric, changing
    the module's dtype does not change the state.

    Args:
        train_classes: The training samples' classes, `[N]`: integers of any type, in a tensor, an array, a pandas
            Series or a list. None puts all samples into one class.
        val_classes: The validation samples' classes, `[M]`, likewise; None if `train_classes` is None.
        kwargs: Arguments of `torchmetrics.Metric`, except those that synchronize.

    Raises:
        TypeError: If the classes are not integers.
        ValueError: If shapes don't match, a class has training but no validation samples, or an argument asks to
            synchronize.

    Example:
        >>> import torch
        >>> from lightning_cld import CLDMetric
        >>> cld = CLDMetric(train_classes=torch.tensor([0, 0]), val_classes=torch.tensor([0]))
        >>> for train_losses, val_losses in [
        ...     ([3.0, 1.0], [2.0]),
        ...     ([2.0, 2.0], [1.0]),
        ...     ([1.7, 2.3], [0.7]),
        ...     ([1.6, 2.4], [0.6]),
        ... ]:
        ...     cld.update(torch.tensor(train_losses), torch.tensor(val_losses))
        >>> cld.compute()
        tensor([ 1., -1.])
        >>> cld.score().select(size=1, rule="draw")
        tensor([0])
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = True  # makes torchmetrics refuse to merge states

    labels: Tensor | None
    groups: Tensor | None
    val_classes: Tensor | None

    def __init__(
        self, train_classes: IntegersLike | None = None, val_classes: IntegersLike | None = None, **kwargs: Any
    ) -> None:
        for name in ("sync_on_compute", "dist_sync_on_step"):
            if kwargs.get(name):
                raise ValueError(f"{name}=True: {_NO_SYNC}")
        super().__init__(**{**kwargs, "sync_on_compute": False})
        known = None
        if train_classes is not None or val_classes is not None:
            train = None if train_classes is None else as_classes(train_classes, "train_classes").cpu()
            val = None if val_classes is None else as_classes(val_classes, "val_classes").cpu()
            known = Classes.of(*check_class_pair(train, val, _length(train), _length(val)))
        for name in Classes._fields:
            self.register_buffer(name, None if known is None else getattr(known, name))
        # Empty until the first update, because torchmetrics keeps a copy of every default.
        for name, value in Moments.empty(0, 0, 0)._asdict().items():
            self.add_state(name, value, persistent=True)

    def update(self, train_losses: Tensor, val_losses: Tensor) -> None:
        """Takes the losses of one checkpoint.

        Args:
            train_losses: Losses of all training samples, floating point, `[N]`.
            val_losses: Losses of all validation samples, floating point, `[M]`.

        Raises:
            TypeError: If the losses are not floating point tensors.
            ValueError: If their lengths differ from the classes or from earlier checkpoints.
        """
        moments = self._moments()
        started = int(moments.rows) > 0
        for name, row, classes, newest in (
            ("train_losses", train_losses, self.groups, moments.last),
            ("val_losses", val_losses, self.val_classes, moments.val_last),
        ):
            _check_row(row, name, len(newest) if started else None if classes is None else len(classes))
        if not started:
            labels = 1 if self.labels is None else len(self.labels)
            moments = Moments.empty(len(train_losses), len(val_losses), labels, moments.last.device)
        moments = update(moments, train_losses, val_losses, self._classes(moments), theta_0=not started)
        for name, value in moments._asdict().items():
            setattr(self, name, value)

    def compute(self) -> Tensor:
        """The scores of the checkpoints so far.

        Returns:
            Scores in [-1, 1], float32, `[N]`, on the metric's device; NaN where a sample is unscored (see
            `cld_scores`).

        Raises:
            ValueError: If there are fewer than 4 checkpoints or 3 usable differences, or a validation loss was not
                finite.
        """
        moments = self._moments()
        return scores(moments, self._classes(moments))

    def score(self) -> CLDScores:
        """The scores of the checkpoints so far, to choose coresets from, list suspects, or save.

        The checkpoints count as epochs 0, 1, 2, and so on, those that were not logged too. For the summary the
        reliability of the references is known, but not whether the coreset has settled.

        Returns:
            The scores, on the CPU, with the plausibility of each label for `select(rule="draw")` and `suspects`. It is
            None if the state was saved by an earlier version, which did not keep what it needs.

        Raises:
            ValueError: As `compute`.
        """
        moments = self._moments()
        classes = self._classes(moments)
        known = None if self.labels is None or self.groups is None else self.labels[self.groups.long()]
        reliability = reliability_by_class(moments, classes)
        metadata = {
            **provenance(known, self.val_classes, len(moments.val_last), int(moments.differences.max())),
            "record": "sweep",
            "history": "running",
            "half_problem": "CLDMetric keeps no coreset of an earlier checkpoint",
            **({} if reliability is None else {"reference_reliability": reliability}),
        }
        values = scores(moments, classes)
        confidence, plausible, shares = judged_by(moments, classes, values) or (None, None, None)
        if shares is not None:
            metadata["implausible"] = shares
        return CLDScores(values, known, range(int(moments.rows)), None, metadata, plausible, confidence)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: one checkpoint alone has no score."""
        raise NotImplementedError(
            "One checkpoint alone has no score, so CLDMetric can't be called. Use update(train_losses, val_losses) at "
            "each checkpoint, and compute() for the scores."
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in [name for name in self._defaults if name not in Moments._fields]:  # only earlier versions keep it
            for kept in (vars(self), self._defaults, self._persistent, self._reductions):
                del kept[name]
        for name, value in Moments._field_defaults.items():
            if name not in self._defaults:  # pickled by an earlier version
                self.add_state(name, value, persistent=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}last" in state_dict:
            for name, value in Moments._field_defaults.items():  # what an earlier version did not save
                state_dict.setdefault(f"{prefix}{name}", value.to(self.device))
            for name in _FORMER:
                state_dict.pop(f"{prefix}{name}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _moments(self) -> Moments:
        # load_state_dict leaves the state on the device that it was saved from.
        return Moments(*(getattr(self, name).to(self.device) for name in Moments._fields))

    def _classes(self, moments: Moments) -> Classes:
        device = moments.last.device
        if self.labels is None or self.groups is None or self.val_classes is None:
            samples = torch.zeros(1, dtype=torch.int16).expand(len(moments.last))  # takes no memory
            references = torch.zeros(1, dtype=torch.int64).expand(len(moments.val_last))
            return Classes(torch.zeros(1, dtype=torch.int64), samples, references).to(device)
        return Classes(self.labels, self.groups, self.val_classes).to(device)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = ()) -> Any:
        # Moves the state but keeps its dtypes: `module.to(torch.bfloat16)` also reaches the metrics in a module, and
        # `set_dtype` the classes as well.
        classes = {name: getattr(self, name) for name in Classes._fields}
        moved = super()._apply(fn, exclude_state=list(self._defaults))
        for name, value in classes.items():
            setattr(self, name, None if value is None else value.to(self.device))
        for name, default in self._defaults.items():
            self._defaults[name] = default.to(self.device)  # type: ignore[union-attr]  # all are tensors
            setattr(self, name, getattr(self, name).to(self.device))
        return moved

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(_NO_SYNC)


_NO_SYNC = (
    "the states of different processes can't be merged into one CLDMetric. Give each process the losses of all samples "
    "(gather them before update); each then has all scores."
)


def _length(classes: Tensor | None) -> int:
    return 0 if classes is None or classes.ndim == 0 else len(classes)


def _check_row(row: object, name: str, samples: int | None) -> None:
    """Raises unless `row` holds one loss for each of `samples` (None allows any number)."""
    if not isinstance(row, Tensor) or not row.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor with a loss for each sample, got {kind_of(row)}.")
    if row.ndim != 1 or len(row) == 0 or len(row) != (samples or len(row)):
        raise ValueError(
            f"{name} must have shape [{'N' if samples is None else samples}], a loss for each sample in the same order "
            f"at every checkpoint, got {list(row.shape)}."
        )
