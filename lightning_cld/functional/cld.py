"""Pure tensor functions: the CLD score and the checks of what it is computed from.

The score is that of M. Nagaraj, D. Ravikumar and K. Roy, "Coresets from Trajectories: Selecting Data via
Correlation of Loss Differences", TMLR 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

MIN_CHECKPOINTS = 4
"""Checkpoints that a score needs: with two differences every correlation is exactly +1 or -1."""

_SLICE_SAMPLES = 2**17
"""Samples scored at a time, row after row: seven float64 temporaries of 1 MiB, which stay in a processor's cache."""

_SLICE_ELEMENTS = 2**17
"""Losses scored at a time where some of them are missing: some twenty float64 temporaries of 1 MiB."""

_CANCELLED = 1e-6
"""Sums of squares that lose all but this share to their mean are formed again about the mean."""

FLAT = 1e-13
"""Differences that vary by less than this share of their size vary only by float64 rounding."""


def cld_scores(
    train_losses: Tensor,
    val_losses: Tensor,
    train_classes: Tensor | None = None,
    val_classes: Tensor | None = None,
) -> Tensor:
    """Scores every training sample by the Correlation of Loss Differences (CLD).

    The score of sample `z` of class `c` is the Pearson correlation, over checkpoints `t`, of its loss
    differences `l(t, z) - l(t-1, z)` with the class reference `m_t(c) - m_{t-1}(c)`, where `m_t(c)` is the mean
    loss of the validation samples of class `c` (Nagaraj et al., TMLR 2025, the definition of CLD). Row 0 should
    be theta_0, the model before its first step.

    NaN in the losses means *not logged*: differences that touch it are left out. Infinity means *not finite*:
    that sample is unscored.

    The arithmetic is float64 in slices, on the device of `train_losses` (on the CPU where the device has no
    float64), so offsets that all losses share do no harm and the temporaries stay small.

    Args:
        train_losses: Losses of the training samples, floating point, `[T, N]`: a row per checkpoint, `T >= 4`.
        val_losses: Losses of the validation samples at the same checkpoints, floating point, `[T, M]`.
        train_classes: The training samples' classes, integer, `[N]`; None puts all samples into one class.
        val_classes: The validation samples' classes, integer, `[M]`; None exactly where `train_classes` is.

    Returns:
        Scores in [-1, 1], float32, `[N]`, on the device of `train_losses`; NaN where a sample is unscored: a loss
        was not finite, fewer than 3 differences were logged, or its differences or its class's do not vary.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes don't match, there are fewer than 4 checkpoints or 3 usable differences, a class has
            training but no validation samples, or a validation loss is not finite.

    Example:
        >>> import torch
        >>> from lightning_cld import cld_scores
        >>> val = torch.tensor([[2.0, 2.2], [1.0, 1.2], [0.7, 0.9], [0.6, 0.8]])
        >>> falls_with_it = torch.tensor([3.0, 2.0, 1.7, 1.6])
        >>> rises = torch.tensor([1.0, 2.0, 2.3, 2.4])
        >>> cld_scores(torch.stack([falls_with_it, rises], dim=1), val)
        tensor([ 1., -1.])
    """
    check_losses(train_losses, "train_losses")
    check_losses(val_losses, "val_losses")
    train_losses, val_losses = train_losses.detach(), val_losses.detach()
    steps, samples = train_losses.shape
    if val_losses.shape[0] != steps:
        raise ValueError(
            f"train_losses and val_losses must have a row for each checkpoint, got {steps} and "
            f"{val_losses.shape[0]} rows."
        )
    check_checkpoints(steps)
    train_classes, val_classes = check_class_pair(train_classes, val_classes, samples, val_losses.shape[1])
    work_device = torch.device("cpu") if train_losses.device.type == "mps" else train_losses.device
    classes, groups = distinct(train_classes.to(work_device))
    check_reference(val_losses, val_classes, classes, [f"row {row}" for row in range(steps)])
    reference = class_reference(val_losses.to(work_device), val_classes.to(work_device), classes)
    scores = torch.empty(samples, dtype=torch.float32, device=work_device)
    doubtful = torch.empty(samples, dtype=torch.bool, device=work_device)
    unit_reference = _unit_columns(reference)
    for start in range(0, samples, _SLICE_SAMPLES):
        part = slice(start, start + _SLICE_SAMPLES)
        losses = train_losses[:, part].to(work_device)
        scores[part], doubtful[part] = _correlate_complete(losses, unit_reference, groups[part])

    again = doubtful.nonzero().flatten()
    most_differences = steps - 1 if len(again) < samples else 0
    width = max(1, _SLICE_ELEMENTS // steps)
    for start in range(0, len(again), width):
        columns = again[start : start + width]
        losses = train_losses[:, columns.to(train_losses.device)].to(work_device)
        values, differences = _correlate(losses, reference[:, groups[columns]])
        scores[columns] = values.float()
        most_differences = max(most_differences, int(differences.max()))
    check_differences(most_differences)
    return scores.to(train_losses.device)


def aleatoric_uncertainty(losses: Tensor) -> Tensor:
    """The mean over checkpoints of `p (1 - p)`, where `p = exp(-loss)` is the probability of the sample's label.

    High for samples whose label the model kept finding likely and unlikely at once; low for the easy ones (`p` near
    1) and for those it never agreed with, wrong labels among them (`p` near 0). Seedat et al., "Data-IQ: Characterizing
    Subgroups with Heterogeneous Outcomes in Tabular Data", NeurIPS 2022, aleatoric uncertainty.

    Args:
        losses: Losses, floating point, `[T, N]`; cross-entropy for `p` to be a probability. NaN (not logged) is left
            out.

    Returns:
        Float32, `[N]`, on the device of `losses`; in [0, 0.25] for losses that are not negative; NaN where nothing
        was logged or a loss is infinite (not finite).

    Raises:
        TypeError: If `losses` is not a floating point tensor.
        ValueError: If it is not `[T, N]` with at least one column.

    Example:
        >>> import torch
        >>> from lightning_cld.functional import aleatoric_uncertainty
        >>> aleatoric_uncertainty(-torch.tensor([[0.5, 0.9], [0.5, 1.0]]).log())
        tensor([0.2500, 0.0450])
    """
    check_losses(losses, "losses")
    values = torch.empty(losses.shape[1], dtype=torch.float32, device=losses.device)
    width = max(1, _SLICE_ELEMENTS // max(1, len(losses)))
    for start in range(0, losses.shape[1], width):
        part = losses[:, start : start + width].float()
        chances = (-part).exp()
        mean = (chances * (1 - chances)).nanmean(dim=0)
        values[start : start + width] = mean.where(~part.isinf().any(dim=0), torch.nan)
    return values


def class_reference(val_losses: Tensor, val_classes: Tensor, classes: Tensor) -> Tensor:
    """The mean validation loss difference of each of the sorted `classes`, float64, `[T-1, C]`.

    Equal to the difference of the class means where all samples were logged; NaN where none was.
    """
    wanted = torch.isin(val_classes, classes)
    if not wanted.all():
        val_losses, val_classes = val_losses[:, wanted], val_classes[wanted]
    groups = torch.searchsorted(classes, val_classes.contiguous())
    reference = torch.empty(val_losses.shape[0] - 1, len(classes), dtype=torch.float64, device=val_losses.device)
    whole = torch.bincount(groups, minlength=len(classes)).double()
    holes = bool(val_losses.isnan().any())
    for row in range(len(reference)):
        difference = val_losses[row + 1].double() - val_losses[row].double()
        counts = whole
        if holes:
            logged = ~difference.isnan()
            difference = difference.where(logged, 0.0)
            counts = reference.new_zeros(len(classes)).index_add_(0, groups, logged.double())
        reference[row] = reference.new_zeros(len(classes)).index_add_(0, groups, difference) / counts
    return reference


def _correlate(losses: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Pearson correlation down the columns of `losses.diff()` `[T-1, n]` with `reference` `[T-1, n]`.

    Returns:
        The correlations, float64 `[n]`, NaN where undefined; and the number of differences used, `[n]`.
    """
    difference = losses.double().diff(dim=0)
    missing = losses.isnan()
    logged = ~(missing[1:] | missing[:-1] | reference.isnan())
    count = logged.sum(dim=0)
    scores = (standardised(difference, logged, count) * standardised(reference, logged, count)).sum(dim=0)
    defined = (count >= MIN_CHECKPOINTS - 1) & ~losses.isinf().any(dim=0)
    return scores.clamp(-1.0, 1.0).where(defined, torch.nan), count


def _correlate_complete(losses: Tensor, unit_reference: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """`_correlate` at the speed of memory, where every loss is logged, finite and of a common size.

    One pass down the rows forms all sums, `sum (D - mean D)^2` as `sum D^2 - (sum D)^2 / n`. That goes wrong where a
    loss is missing or not finite, squares leave float64's range, or the mean takes nearly all of the sum of squares.
    Each of these shows in the sums, so that the losses need not be looked through for them.

    Args:
        losses: `[T, n]`.
        unit_reference: The references of all classes, with mean 0 and norm 1, float64 `[T-1, C]`.
        groups: The column of each sample's class in `unit_reference`, int64 `[n]`.

    Returns:
        The correlations, float64 `[n]`, and which of them are to be found by `_correlate` instead, bool `[n]`.
    """
    first = losses[0].double()
    before, now = first.clone(), torch.empty_like(first)
    difference, unit = torch.empty_like(first), torch.empty_like(first)
    squares, products = torch.zeros_like(first), torch.zeros_like(first)
    for row, unit_row in zip(losses[1:], unit_reference, strict=True):
        now.copy_(row)
        torch.sub(now, before, out=difference)
        squares.addcmul_(difference, difference)
        torch.index_select(unit_row, 0, groups, out=unit)
        products.addcmul_(difference, unit)
        before, now = now, before
    centred = squares - (before - first).square_().div_(len(unit_reference))
    values = (products / centred.sqrt()).clamp_(-1.0, 1.0)
    sure = (centred > _CANCELLED * squares) & (squares > torch.finfo(squares.dtype).tiny / FLAT) & values.isfinite()
    return values, ~sure


def _unit_columns(values: Tensor) -> Tensor:
    """Columns with mean 0 and norm 1; NaN columns where an entry is NaN or none varies."""
    everywhere = torch.ones_like(values, dtype=torch.bool)
    return standardised(values, everywhere, everywhere.sum(dim=0))


def standardised(values: Tensor, logged: Tensor, count: Tensor) -> Tensor:
    """Columns with mean 0 and norm 1 over their logged entries; NaN columns where the entries do not vary."""
    values = values.where(logged, 0.0)
    values = values / values.abs().amax(dim=0)  # so that squares neither overflow nor vanish
    values = (values - values.sum(dim=0) / count).where(logged, 0.0)
    norm = values.square().sum(dim=0).sqrt()
    return values / norm.where(norm > FLAT * count.sqrt(), torch.nan)


def check_checkpoints(count: int) -> None:
    """Raises unless there are as many checkpoints as a score needs."""
    if count < MIN_CHECKPOINTS:
        raise ValueError(
            f"CLD needs at least {MIN_CHECKPOINTS} checkpoints (3 differences), got {count}. Log more epochs."
        )


def check_differences(most: int) -> None:
    """Raises unless the sample with the most logged differences has as many as a score needs."""
    if most < MIN_CHECKPOINTS - 1:
        raise ValueError(
            f"CLD needs at least {MIN_CHECKPOINTS - 1} differences between consecutive checkpoints, but too many "
            f"losses are NaN (not logged): no sample has more than {most}."
        )


def check_losses(losses: Tensor, name: str) -> None:
    """Raises unless `losses` is a floating point tensor `[T, N]` with at least one column."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor [checkpoints, samples], got {kind_of(losses)}.")
    if losses.ndim != 2 or losses.shape[1] == 0:
        raise ValueError(
            f"{name} must have shape [checkpoints, samples] with at least one sample, got {list(losses.shape)}."
        )


def check_classes(classes: Tensor, samples: int, name: str) -> Tensor:
    """Returns `classes` as int64 `[samples]`, or raises."""
    if not is_integer(classes):
        raise TypeError(
            f"{name} must be an integer tensor (int64) with a class for each sample, got {kind_of(classes)}. "
            "NaN can't be a class: drop such samples first."
        )
    if list(classes.shape) != [samples] or samples == 0:
        raise ValueError(f"{name} must have shape [{samples}], one class a sample, got {list(classes.shape)}.")
    classes = classes.long()
    if classes.min() < 0:
        raise ValueError(
            f"{name} must not be negative, got {int(classes.min())}. Number the classes from 0, and leave samples "
            "without a class out."
        )
    return classes


def distinct(classes: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values of `classes`, sorted, and the place of each sample's among them, int64 `[C]` and `[N]`."""
    if classes.max() >= len(classes):
        labels, places = torch.unique(classes, return_inverse=True)
        return labels, places
    # Counting takes a tenth of the time of unique's sort.
    labels = torch.bincount(classes).nonzero().flatten()
    places = torch.zeros_like(classes[: int(labels[-1]) + 1])
    places[labels] = torch.arange(len(labels), device=classes.device)
    return labels, places[classes]


def check_class_pair(
    train_classes: Tensor | None, val_classes: Tensor | None, train_samples: int, val_samples: int
) -> tuple[Tensor, Tensor]:
    """Returns both as int64 tensors (one class of zeros for None), every train class with a reference; or raises."""
    if (train_classes is None) != (val_classes is None):
        raise ValueError(
            "Give train_classes and val_classes, or neither (one class for all); got only "
            f"{'val_classes' if train_classes is None else 'train_classes'}."
        )
    if train_classes is None or val_classes is None:
        return torch.zeros(train_samples, dtype=torch.int64), torch.zeros(val_samples, dtype=torch.int64)
    train_classes = check_classes(train_classes, train_samples, "train_classes")
    val_classes = check_classes(val_classes, val_samples, "val_classes")
    present, _ = distinct(train_classes)
    missing = present[~torch.isin(present, val_classes.to(present.device))].tolist()
    if missing:
        raise ValueError(
            f"{listed(missing, 'class', 'classes')} {'has' if len(missing) == 1 else 'have'} training but no "
            "validation samples, so there is no reference to score against. Hold some of each class out "
            "(lightning_cld.proportional_holdout), or leave the class out of training."
        )
    return train_classes, val_classes


def check_reference(val_losses: Tensor, val_classes: Tensor, train_classes: Tensor, checkpoints: Sequence[str]) -> None:
    """Raises if a validation loss of a trained class is infinite, naming the first such checkpoint and its classes."""
    val_classes, train_classes = val_classes.to(val_losses.device), train_classes.to(val_losses.device)
    diverged = val_losses.isinf() & torch.isin(val_classes, train_classes)
    if not diverged.any():
        return
    row = int(diverged.any(dim=1).int().argmax())
    classes = torch.unique(val_classes[diverged[row]]).tolist()
    raise ValueError(
        f"{told_divergence(classes, checkpoints[row])} Score the checkpoints before it "
        "(LossTrajectories.score(cutoff_epoch=...)), or train the proxy with a lower learning rate."
    )


def told_divergence(classes: Sequence[int], checkpoint: str) -> str:
    """What to say of classes whose validation losses are not finite."""
    return (
        f"The validation losses of {listed(classes, 'class', 'classes')} are not finite at {checkpoint}: training "
        "diverged there."
    )


def is_integer(value: object) -> TypeGuard[Tensor]:
    """Whether `value` is a tensor of whole numbers."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return False
    return not (value.is_floating_point() or value.is_complex())


def listed(values: Sequence[int], one: str, many: str) -> str:
    """Up to ten values behind their name, for messages."""
    shown = ", ".join(map(str, values[:10])) + (f" and {len(values) - 10} more" if len(values) > 10 else "")
    return f"{one if len(values) == 1 else many} {shown}"


def kind_of(value: object) -> str:
    """The dtype of a tensor or the type of anything else, for messages."""
    return f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
