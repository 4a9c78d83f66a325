"""Datasets within datasets: what a dataset wraps, and which of its samples it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_cld.data.indexed import IndexedDataset


class Flat(NamedTuple):
    """A dataset without the `Subset`s and `ConcatDataset`s that it is made of.

    Attributes:
        roots: The datasets below all of these, one behind the other.
        positions: Which of their samples are taken, int64 `[N]`; None if all are, in order.
    """

    roots: list[Any]
    positions: Tensor | None

    def length(self) -> int:
        """The number of samples in the roots."""
        return sum(len(root) for root in self.roots)


def flat(dataset: Any) -> Flat:
    """Looks below all `Subset`s, `ConcatDataset`s and `IndexedDataset`s.

    Example:
        >>> import torch
        >>> from torch.utils.data import ConcatDataset, Subset, TensorDataset
        >>> from lightning_cld.data.nesting import flat
        >>> pool = TensorDataset(torch.rand(9, 2))
        >>> flat(ConcatDataset([Subset(Subset(pool, [8, 6, 4]), [2, 0]), Subset(pool, [1])])).positions
        tensor([ 4,  8, 10])
    """
    if isinstance(dataset, IndexedDataset):
        return flat(dataset.dataset)
    if isinstance(dataset, Subset):
        positions = whole_numbers(dataset.indices)
        if positions is None:  # names, say
            return Flat([dataset], None)
        inner = flat(dataset.dataset)
        if (positions < 0).any():
            positions = torch.where(positions < 0, positions + len(dataset.dataset), positions)  # type: ignore[arg-type]  # map-style
        return Flat(inner.roots, positions if inner.positions is None else inner.positions[positions])
    if isinstance(dataset, ConcatDataset):
        parts = [flat(part) for part in dataset.datasets]
        roots = [root for part in parts for root in part.roots]
        if all(part.positions is None for part in parts):
            return Flat(roots, None)
        taken, offset = [], 0
        for part in parts:
            length = part.length()
            taken.append(offset + (torch.arange(length) if part.positions is None else part.positions))
            offset += length
        return Flat(roots, torch.cat(taken))
    return Flat([dataset], None)


def whole_numbers(values: Any) -> Tensor | None:
    """A sequence of whole numbers as int64 `[N]` on the CPU; None for anything else."""
    if isinstance(values, range):
        return torch.arange(values.start, values.stop, values.step)
    try:
        # Of a list numpy makes an array several times faster than torch.
        array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except (TypeError, ValueError, RuntimeError):
        return None
    if array.ndim != 1 or (array.dtype.kind not in "iu" and len(array)):
        return None
    return torch.from_numpy(np.require(array, np.int64, ["C", "W"]))  # in memory that torch takes


def inner_datasets(dataset: Any) -> Iterator[tuple[str, list[Any]]]:
    """The attributes of a dataset that are datasets, or lists of them, whatever their names.

    Example:
        >>> import torch
        >>> from torch.utils.data import Subset, TensorDataset
        >>> from lightning_cld.data.nesting import inner_datasets
        >>> pool = TensorDataset(torch.rand(9, 2))
        >>> [name for name, _ in inner_datasets(Subset(pool, [1, 2]))]
        ['dataset']
    """
    for name, value in getattr(dataset, "__dict__", {}).items():
        inner = list(value[:1]) if isinstance(value, (list, tuple)) else [value]
        if inner and is_dataset(inner[0]):
            yield name, list(value) if isinstance(value, (list, tuple)) else inner


def is_dataset(value: Any) -> bool:
    """Whether it is a map-style dataset of torch or of Hugging Face."""
    return isinstance(value, Dataset) or hasattr(type(value), "with_format")


def all_datasets(dataset: Any) -> list[Any]:
    """A dataset and all that are within it, each once."""
    found, waiting = {id(dataset): dataset}, [dataset]
    while waiting:
        for _, parts in inner_datasets(waiting.pop()):
            fresh = [part for part in parts if id(part) not in found]
            found |= {id(part): part for part in fresh}
            waiting += fresh
    return list(found.values())
