"""Checks of losses, classes and counts, and the wording that their messages share."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex, TypeGuard

import torch
from torch import Tensor

from lightning_cld.functional.arrays import as_tensor, described

MIN_CHECKPOINTS = 4
"""The fewest checkpoints for a score. With only two differences every correlation is exactly +1 or -1."""


def check_checkpoints(count: int) -> None:
    """Raises if there are too few checkpoints for a score."""
    if count < MIN_CHECKPOINTS:
        raise ValueError(
            f"CLD needs at least {MIN_CHECKPOINTS} checkpoints (3 differences), got {count}. Log more epochs."
        )


def check_differences(most: int) -> None:
    """Raises if even the sample with the most logged differences has too few for a score."""
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


def check_rows(train_losses: Tensor, val_losses: Tensor) -> None:
    """Raises unless both have the same number of rows, and at least one."""
    if len(train_losses) != len(val_losses) or len(train_losses) == 0:
        raise ValueError(
            "train_losses and val_losses must both have a row for each checkpoint, got "
            f"{len(train_losses)} and {len(val_losses)} rows."
        )


def as_numbers(values: object, name: str) -> Tensor:
    """Returns numbers as a tensor, as `as_tensor` does, or raises. A list of arrays or tensors gives a row for each."""
    if isinstance(values, (list, tuple)) and values and getattr(values[0], "ndim", 0) > 0:
        rows = [as_numbers(row, name) for row in values]
        shapes = {tuple(row.shape) for row in rows}
        if len(shapes) > 1:
            raise ValueError(f"{name} must have rows of the same length, got shapes {sorted(shapes)[:3]}.")
        return torch.stack(rows)
    numbers = as_tensor(values)
    if numbers is None or numbers.is_complex():
        raise TypeError(f"{name} must be numbers, in rows of the same length, got {kind_of(values)}.")
    return numbers


def as_classes(values: object, name: str) -> Tensor:
    """Returns integers of any type that `as_tensor` reads as an int64 tensor, or raises."""
    classes = as_tensor(values)
    if classes is not None and classes.numel() == 0:  # the dtype of an empty list means nothing
        return classes.long()
    if is_integer(classes):
        if classes.dtype != torch.uint64 or (classes.long() >= 0).all():
            return classes.long().contiguous()  # which searchsorted asks for
        classes = None  # some are too large
    raise TypeError(
        f"{name} must be integers, one class per sample, got "
        f"{described(values) if classes is None else kind_of(classes)}. Number names with "
        "numpy.unique(names, return_inverse=True)[1]; number the train and validation names together. Leave out "
        "samples without a class (NaN, None or masked)."
    )


def check_classes(classes: object, samples: int, name: str) -> Tensor:
    """Returns `classes` as int64 `[samples]`, or raises."""
    classes = as_classes(classes, name)
    if classes.numel() == 0:
        raise ValueError(f"{name} is empty: there must be at least one sample.")
    if list(classes.shape) != [samples]:
        raise ValueError(f"{name} must have shape [{samples}], one class per sample, got {list(classes.shape)}.")
    if classes.min() < 0:
        raise ValueError(
            f"{name} must not be negative, got {int(classes.min())}. Number the classes from 0, and leave out "
            "samples without a class."
        )
    return classes


def labels_in(classes: Tensor) -> Tensor:
    """Returns the distinct classes, sorted, int64 `[C]`."""
    # Counting is ten times as fast as the sort in torch.unique.
    few = classes.max() < len(classes)
    labels: Tensor = torch.bincount(classes).nonzero().flatten() if few else torch.unique(classes)
    return labels


def distinct(classes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct classes, sorted, int64 `[C]`, and each sample's index into them, int64 `[N]`."""
    if classes.max() >= len(classes):
        labels, places = torch.unique(classes, return_inverse=True)
        return labels, places
    labels = labels_in(classes)
    places = torch.zeros_like(classes[: int(labels[-1]) + 1])
    places[labels] = torch.arange(len(labels), device=classes.device)
    return labels, places[classes]


def check_class_pair(
    train_classes: object, val_classes: object, train_samples: int, val_samples: int
) -> tuple[Tensor, Tensor]:
    """Returns both as int64 tensors (zeros for None). Raises if a train class has no validation samples."""
    if (train_classes is None) != (val_classes is None):
        raise ValueError(
            "Give both train_classes and val_classes, or neither (one class for all); got only "
            f"{'val_classes' if train_classes is None else 'train_classes'}."
        )
    if train_classes is None or val_classes is None:
        return torch.zeros(train_samples, dtype=torch.int64), torch.zeros(val_samples, dtype=torch.int64)
    train_classes = check_classes(train_classes, train_samples, "train_classes")
    val_classes = check_classes(val_classes, val_samples, "val_classes")
    present = labels_in(train_classes)
    missing = present[~torch.isin(present, val_classes.to(present.device))].tolist()
    if missing:
        raise ValueError(
            f"{listed(missing, 'class', 'classes')} {'has' if len(missing) == 1 else 'have'} training but no "
            "validation samples, so there is no reference to score against. Hold out some samples of each class "
            "(lightning_cld.proportional_holdout), or leave the class out of training."
        )
    return train_classes, val_classes


def check_reference(val_losses: Tensor, val_classes: Tensor, train_classes: Tensor, checkpoints: Sequence[str]) -> None:
    """Raises if a validation loss of a trained class is infinite; names the first such checkpoint and its classes."""
    val_classes, train_classes = val_classes.to(val_losses.device), train_classes.to(val_losses.device)
    diverged = val_losses.isinf() & torch.isin(val_classes, train_classes)
    if not diverged.any():
        return
    row = int(diverged.any(dim=1).int().argmax())
    classes = torch.unique(val_classes[diverged[row]]).tolist()
    raise ValueError(
        f"{divergence_message(classes, checkpoints[row])} Score the checkpoints before it "
        "(LossTrajectories.score(cutoff_epoch=...)), or train the proxy with a lower learning rate."
    )


def divergence_message(classes: Sequence[int], checkpoint: str) -> str:
    """The first sentence of the error about validation losses that are not finite."""
    return (
        f"The validation losses of {listed(classes, 'class', 'classes')} are not finite at {checkpoint}: training "
        "diverged there."
    )


def check_count(name: str, value: object) -> int:
    """Returns `value` as an int, or raises unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    count = operator.index(value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}.")
    return count


def is_integer(value: object) -> TypeGuard[Tensor]:
    """Whether `value` is a tensor of whole numbers."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return False
    return not (value.is_floating_point() or value.is_complex())


def listed(values: Sequence[object], one: str, many: str) -> str:
    """Up to ten values after their name, such as "classes 1, 2", for messages."""
    shown = ", ".join(map(str, values[:10])) + (f" and {len(values) - 10} more" if len(values) > 10 else "")
    return f"{one if len(values) == 1 else many} {shown}"


def kind_of(value: object) -> str:
    """The dtype of a tensor or the type of anything else, for messages."""
    return f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
