"""Device loaders: they wrap a DataLoader and carry its batches to the device, as timm's `PrefetchLoader` does."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override


class _Read(Exception):  # noqa: N818  # no error, but the answer to a question
    """Raised by a dataset that is read."""


class _Unreadable(Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise _Read


class DeviceBatches(DataLoader[Any]):
    """A DataLoader whose batches pass through a device loader, with the attributes of the DataLoader.

    Args:
        loader: The DataLoader that reads the samples.
        outer: The device loader. It is copied, and never iterated itself.
    """

    def __init__(self, loader: DataLoader[Any], outer: Any) -> None:
        vars(self).update(vars(loader))  # DataLoader's own constructor would make other samplers
        self.loader = loader
        self.outer = outer

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # any iterator serves
        return iter(around(self.outer, self.loader))


def loader_inside(loader: Any) -> Any:
    """The DataLoader that a device loader reads; any other loader is returned as it is.

    A device loader is not a DataLoader itself. It keeps one as `loader` and reads that one whenever it is iterated. A
    wrapper that reads something else, such as an iterator that it made earlier, can't be put around another DataLoader
    and does not count.
    """
    if isinstance(loader, DataLoader) or not isinstance(getattr(loader, "loader", None), DataLoader):
        return loader
    probe: DataLoader[Any] = DataLoader(_Unreadable(), generator=torch.Generator())  # draws no global random number
    try:
        next(iter(around(loader, probe)), None)
    except _Read:
        return loader.loader
    except Exception:  # noqa: BLE001  # whatever went wrong, the probe was not read
        pass
    return loader


def around(outer: Any, loader: Any) -> Any:
    """A copy of a device loader that reads another DataLoader. All its other settings stay."""
    copied = copy.copy(outer)
    copied.loader = loader
    return copied


def differs(first: Any, second: Any) -> bool:
    """Whether two batches of tensors, in tuples, lists or mappings, hold different values."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape != second.shape or not bool(((first == second) | (first != first)).all())
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return any(differs(first[key], second[key]) for key in first.keys() & second.keys())
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return any(differs(one, other) for one, other in zip(first, second, strict=False))
    return False
