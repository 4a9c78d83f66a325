"""`CLDMetric`: CLD in constant memory, as a metric that is updated with one checkpoint after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_cld.functional.checks import check_class_pair, kind_of
from lightning_cld.functional.moments import Classes, Moments, scores, update


class CLDMetric(Metric):
    """CLD of every training sample without keeping the losses, for those who have their own loop or use Fabric.

    Each `update` takes the losses of all samples at one checkpoint, the first from before the first step, in the same
    order every time. What is kept is the newest loss and moments of the differences: with the class 20 bytes a training
    sample (22 with more than 32,767 classes), however many checkpoints there are. `compute` gives the scores of
    `cld_scores` within 1e-5, at any time and as often as you like.

    A row of training losses that is NaN throughout stands for a checkpoint that was not logged: no difference spans it.
    Unlike in `cld_scores`, a single sample's NaN in a row leaves it unscored from then on. Losses are taken as float32.

    In a distributed run every process must be given the losses of *all* samples (gather them first) and then has all
    scores. The states of different processes can't be merged, so there is no synchronisation, and asking for it raises.
    The state is float64 in part, which MPS devices lack: keep the metric on the CPU there. Changing the dtype of a
    module that holds the metric leaves it as it is.

    Args:
        train_classes: The training samples' classes, integer, `[N]`; None puts all samples into one class.
        val_classes: The validation samples' classes, integer, `[M]`; None exactly where `train_classes` is.
        kwargs: Of `torchmetrics.Metric`, but for those that synchronise.

    Raises:
        TypeError: If the classes are not integers.
        ValueError: If shapes don't match, a class has training but no validation samples, or synchronisation is asked
            for.

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
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = True  # so that torchmetrics refuses to merge states

    labels: Tensor | None
    groups: Tensor | None
    val_classes: Tensor | None

    def __init__(self, train_classes: Tensor | None = None, val_classes: Tensor | None = None, **kwargs: Any) -> None:
        for name in ("sync_on_compute", "dist_sync_on_step"):
            if kwargs.get(name):
                raise ValueError(f"{name}=True: {_NO_SYNC}")
        super().__init__(**{**kwargs, "sync_on_compute": False})
        known = None
        if train_classes is not None or val_classes is not None:
            pair = check_class_pair(train_classes, val_classes, _length(train_classes), _length(val_classes))
            known = Classes.of(*(classes.cpu() for classes in pair))
        for name in Classes._fields:
            self.register_buffer(name, None if known is None else getattr(known, name))
        # Empty until the first update: torchmetrics keeps a copy of every default.
        for name, value in Moments.empty(0, 0, 0)._asdict().items():
            self.add_state(name, value, persistent=True)

    def update(self, train_losses: Tensor, val_losses: Tensor) -> None:
        """Takes the losses of one checkpoint.

        Args:
            train_losses: Of all training samples, floating point, `[N]`.
            val_losses: Of all validation samples, floating point, `[M]`.

        Raises:
            TypeError: If they are not floating point tensors.
            ValueError: If their lengths are not those of the classes or of the checkpoints before.
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
        moments = update(moments, train_losses, val_losses, self._classes(moments))
        for name, value in moments._asdict().items():
            setattr(self, name, value)

    def compute(self) -> Tensor:
        """The scores of the checkpoints so far.

        Returns:
            Scores in [-1, 1], float32, `[N]`, on the metric's device; NaN where a sample is unscored (see
            `cld_scores`).

        Raises:
            ValueError: If there are fewer than 4 checkpoints or 3 usable differences, or a validation loss was not
                finite at one of them.
        """
        moments = self._moments()
        return scores(moments, self._classes(moments))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not defined: one checkpoint alone has no score."""
        raise NotImplementedError(
            "One checkpoint alone has no score, so CLDMetric can't be called: call update(train_losses, val_losses) at "
            "each checkpoint, and compute() for the scores."
        )

    def _moments(self) -> Moments:
        # Moved, since a state that was loaded lies where the file had it.
        return Moments(*(getattr(self, name).to(self.device) for name in Moments._fields))

    def _classes(self, moments: Moments) -> Classes:
        device = moments.last.device
        if self.labels is None or self.groups is None or self.val_classes is None:
            samples = torch.zeros(1, dtype=torch.int16).expand(len(moments.last))  # takes no memory
            references = torch.zeros(1, dtype=torch.int64).expand(len(moments.val_last))
            return Classes(torch.zeros(1, dtype=torch.int64), samples, references).to(device)
        return Classes(self.labels, self.groups, self.val_classes).to(device)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = ()) -> Any:
        # Devices change, dtypes must not: `module.to(torch.bfloat16)` reaches the metrics that a module holds.
        moved = super()._apply(fn, exclude_state=list(self._defaults))
        for name, default in self._defaults.items():
            self._defaults[name] = default.to(self.device)  # type: ignore[union-attr]  # all are tensors
            setattr(self, name, getattr(self, name).to(self.device))
        return moved

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(_NO_SYNC)


_NO_SYNC = (
    "the states of different processes can't be merged into one CLDMetric. Give each process the losses of all samples "
    "(gather them before update), and it has all scores."
)


def _length(classes: object) -> int:
    return len(classes) if isinstance(classes, Tensor) and classes.ndim else 0


def _check_row(row: object, name: str, samples: int | None) -> None:
    """Raises unless `row` holds one loss for each of `samples` (None: of any number)."""
    if not isinstance(row, Tensor) or not row.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor with a loss for each sample, got {kind_of(row)}.")
    if row.ndim != 1 or len(row) == 0 or len(row) != (samples or len(row)):
        raise ValueError(
            f"{name} must have shape [{'N' if samples is None else samples}], a loss for each sample in the same order "
            f"at every checkpoint, got {list(row.shape)}."
        )
