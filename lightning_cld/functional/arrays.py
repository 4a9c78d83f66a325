"""Reads numbers and names from tensors, arrays of any layout, masked arrays, pandas objects and lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor


class Array(Protocol):
    """A numpy array, or what becomes one, such as a pandas Series."""

    def __array__(self) -> Any: ...


IntegersLike: TypeAlias = Tensor | Array | Sequence[int]
NumbersLike: TypeAlias = Tensor | Array | Sequence[float] | Sequence[Sequence[float]] | Sequence[Tensor | Array]


def as_tensor(values: object) -> Tensor | None:
    """Reads numbers as a tensor. Masked numbers become NaN.

    `torch.as_tensor` ignores the mask of an array and looks up a pandas Series by its index. It can't read object
    arrays, reversed views and foreign byte orders.

    Args:
        values: A tensor, an array, a pandas object or a sequence.

    Returns:
        The tensor, on the device of `values`. None if not all of them are numbers, or if an integer is masked.

    Example:
        >>> import numpy as np
        >>> from lightning_cld.functional.arrays import as_tensor
        >>> as_tensor(np.ma.masked_greater([0.5, 99.0], 10))
        tensor([0.5000,    nan], dtype=torch.float64)
        >>> as_tensor(["cat", "dog"]) is None
        True
    """
    if isinstance(values, Tensor):
        return values.detach()
    try:
        return torch.as_tensor(_plain(values))
    except (TypeError, ValueError, RuntimeError, OverflowError):  # whatever torch and numpy raise
        return None


def names_in(values: object) -> list[Any] | None:
    """Reads names, str or bytes, as a list; None if anything else is among the values.

    Example:
        >>> import numpy as np
        >>> from lightning_cld.functional.arrays import names_in
        >>> names_in(np.array(["cat", "dog"]))
        ['cat', 'dog']
        >>> names_in([0, 1]) is None
        True
    """
    found = _listed(values)
    for kind in (str, bytes):
        if found and all(isinstance(value, kind) for value in found):
            return found
    return None


def described(values: object) -> str:
    """What keeps `values` from being integers, in words that follow "got"."""
    if _is_masked(values):
        return "a masked array"
    found = _listed(values) or []
    for allowed in ((int, str, bytes), (int,)):  # what is missing among names says more than the names
        for position, value in enumerate(found):
            if not isinstance(value, allowed) or (isinstance(value, int) and not -(2**63) <= value < 2**63):
                return f"{repr(value)[:40]} at position {position}"
    return type(values).__name__


def _plain(values: Any) -> Any:
    """What torch can read: an array without a mask, lists for an object array, or the values themselves."""
    if hasattr(values, "to_numpy"):
        values = values.to_numpy()
    if not hasattr(values, "__array_interface__"):
        return values
    if _is_masked(values):
        values = values.filled(torch.nan)  # raises for integers
    if values.dtype.kind == "O":
        return values.tolist()
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    readable = values.flags.writeable and all(stride >= 0 for stride in values.strides)
    return values if readable else values.copy()


def _is_masked(values: Any) -> bool:
    return hasattr(values, "filled") and bool(values.mask.any())


def _listed(values: Any) -> list[Any] | None:
    """The values as a list; None if they are no sequence."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        return None
    return list(values)
