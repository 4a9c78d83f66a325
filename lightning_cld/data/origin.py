"""Where a dataset's samples come from: their positions in a larger dataset, and the names of their files."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from torch import Tensor

from lightning_cld.data.fingerprint import hash_of, probe_positions
from lightning_cld.data.labels import attribute_of
from lightning_cld.data.nesting import Flat, flat

_FILES = ("samples", "imgs", "files")
"""Attributes of a dataset that hold file names, or tuples that begin with one, as torchvision names them."""

_MOST = 2**13
"""How many file names are looked at, evenly spaced where there are more."""


def hash_of_positions(found: Flat) -> str:
    """The positions that `Subset`s take from the datasets below them; empty without a `Subset`.

    That is the length of those, a colon, and a hash, or "first-last" where none is left out between the two.

    Example:
        >>> import torch
        >>> from torch.utils.data import Subset, TensorDataset
        >>> from lightning_cld.data.nesting import flat
        >>> from lightning_cld.data.origin import hash_of_positions
        >>> hash_of_positions(flat(Subset(Subset(TensorDataset(torch.rand(9, 2)), range(3, 9)), range(4))))
        '9:3-6'
    """
    positions = found.positions
    if positions is None:
        return ""
    unbroken = len(positions) > 0 and torch.equal(positions, torch.arange(len(positions)) + positions[0])
    return f"{found.length()}:{f'{positions[0]}-{positions[-1]}' if unbroken else hash_of(positions)}"


def hash_of_files(found: Flat) -> str:
    """A hash of the names of the files that datasets of folders read, in order; empty if they are unknown.

    The names are relative to the folder that all files of a dataset are in: it may stand elsewhere on another machine.
    """
    length = found.length() if found.positions is None else len(found.positions)
    names = _names(found, probe_positions(length, _MOST), relative=True)
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass")).hexdigest() if names else ""


def file_names(dataset: Any) -> list[str] | None:
    """The name of each sample's file as a dataset of folders holds it; None if the names are unknown."""
    return _names(flat(dataset), torch.arange(len(dataset)), relative=False)


def _names(found: Flat, probed: Tensor, *, relative: bool) -> list[str] | None:
    """The names of the files of the samples at `probed`; None if they are unknown."""
    positions = probed if found.positions is None else found.positions[probed]
    names: list[str] = [""] * len(positions)
    offset = 0
    for root in found.roots:
        here = torch.nonzero((positions >= offset) & (positions < offset + len(root))).flatten()
        if len(here):
            of_root = _names_in(root, positions[here] - offset, relative=relative)
            if of_root is None:
                return None
            for place, name in zip(here.tolist(), of_root, strict=True):
                names[place] = name
        offset += len(root)
    return names


def _names_in(dataset: Any, positions: Tensor, *, relative: bool) -> list[str] | None:
    """The names of the files at `positions`, on request relative to their common folder; None if unknown."""
    for attribute in _FILES:
        listed = attribute_of(dataset, attribute)
        if not isinstance(listed, (list, tuple)) or len(listed) != len(dataset):
            continue
        try:
            entries = [listed[position] for position in positions.tolist()]
            names = [os.fsdecode(entry[0] if isinstance(entry, (list, tuple)) else entry) for entry in entries]
        except (TypeError, IndexError):  # no file names, or not all of one kind
            continue
        if not relative:
            return names
        # All names lie between these two, so what both begin with all do. Not commonpath, which drops a "./".
        folder = os.path.commonprefix([min(names), max(names)]).rfind(os.sep) + 1  # noqa: RUF071  # see above
        return [name[folder:] for name in names]
    return None
