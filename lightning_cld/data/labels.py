"""The labels that a dataset offers without reading its samples."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lightning_cld.data.nesting import Flat
from lightning_cld.functional.arrays import as_tensor, names_in


def labels_of(found: Flat) -> Tensor | None:
    """The labels that a dataset offers without reading its samples: numbers `[N, ...]` on the CPU, or None.

    Looks for `targets`, then `labels`, and at the second tensor of a `TensorDataset`. Names are numbered in their
    sorted order, as `numpy.unique` does.

    Args:
        found: The dataset, seen through `Subset`, `ConcatDataset` and `IndexedDataset`.

    Example:
        >>> import torch
        >>> from torch.utils.data import Subset, TensorDataset
        >>> from lightning_cld.data.labels import labels_of
        >>> from lightning_cld.data.nesting import flat
        >>> pool = TensorDataset(torch.rand(4, 2), torch.tensor([5, 6, 7, 8]))
        >>> labels_of(flat(Subset(pool, [3, 1])))
        tensor([8, 6])
    """
    parts = [_root_labels(root) for root in found.roots]
    known = [labels for labels in parts if labels is not None]
    if len(known) < len(parts):
        return None
    labels = known[0] if len(known) == 1 else torch.cat(known)
    return labels if found.positions is None else labels[found.positions]


def _root_labels(dataset: Any) -> Tensor | None:
    if isinstance(dataset, TensorDataset):
        candidates: list[Any] = list(dataset.tensors[1:2])
    else:
        candidates = [attribute_of(dataset, name) for name in ("targets", "labels")]
    for candidate in candidates:
        labels = as_labels(candidate)
        if labels is None:
            labels = _numbered(candidate)
        if labels is not None and len(labels) == len(dataset):
            return labels
    return None


def as_labels(values: Any) -> Tensor | None:
    """`values` as int64 or float64 on the CPU if they are numbers, one or several a sample; else None."""
    if isinstance(values, (list, tuple)) and values and type(values[0]) in (int, float):
        # Of a list numpy makes an array several times faster than torch.
        with suppress(ValueError):
            array = np.asarray(values)
            values = array if array.dtype.kind in "if" else values
    labels = as_tensor(values)
    if labels is None or labels.ndim == 0 or labels.is_complex():
        return None
    return labels.cpu().double() if labels.is_floating_point() else labels.cpu().long()


def attribute_of(dataset: Dataset[Any], name: str) -> Any:
    """An attribute of a dataset; None if it has none, or none that can be read."""
    try:
        return getattr(dataset, name, None)
    except Exception:  # noqa: BLE001  # a property that can't be read, for whatever reason, offers nothing
        return None


def _numbered(values: Any) -> Tensor | None:
    """Names as int64, in their sorted order; None for anything else."""
    names = names_in(values)
    if names is None:
        return None
    numbers = {name: number for number, name in enumerate(sorted(set(names), key=lambda name: (str(type(name)), name)))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64)
