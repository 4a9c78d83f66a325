"""What a sample is made of: a digest of its parts, and the small numbers among them, of which one may be its label."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image  # which torchvision brings
from torch import Tensor
from torch.utils.data import Dataset

from lightning_cld.data.fingerprint import Sketch

_DEPTH = 8
"""How deep containers and objects are looked into."""

_MOST = 5_000
"""How many parts are looked at."""

_SMALL = 64
"""The most elements of a part that may be a label, and the most such parts."""

_PIECES = 8
"""In how many pieces an array is read, each with a mean of its own."""

_MOST_MEANS = 64
"""More than these are added to the last one."""

_TEXTS = (
    str,
    bytes,
    complex,
    type,
    type(None),
    PurePath,
    enum.Enum,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    uuid.UUID,
    torch.dtype,
    torch.device,
)
"""Types whose `repr` says all that they hold."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Dtypes by their bytes, for tensors of those that numpy does not have."""


@lru_cache(maxsize=2)  # the last piece of an array may be shorter
def _weights(length: int) -> np.ndarray:
    """Weights from 0.5 to 1.5 that tell the places of floats apart, float64, the same on every machine."""
    return 0.5 + np.random.RandomState(0).random_sample(length)  # which never changes between versions


class Parts(NamedTuple):
    """What is kept of a sample.

    Attributes:
        digest: A hash of everything in it.
        sketch: The same for a comparison between machines: floats by means, files without their folders.
        paths: The absolute paths in it, of which the sketch has the last name alone.
        numbers: The small numbers in it, int64 or float64, by the path to each, such as ".1" or ".label".
        known: Whether everything in it was of a type that can be compared.
        on_cpu: Whether all of its tensors are in the memory of the CPU.
    """

    digest: str
    sketch: Sketch
    paths: tuple[str, ...]
    numbers: dict[str, np.ndarray]
    known: bool
    on_cpu: bool


def parts_of(sample: Any) -> Parts:
    """Looks at a sample: tensors, arrays, images, strings and numbers in tuples, mappings, dataclasses and objects.

    Example:
        >>> from lightning_cld.data.parts import parts_of
        >>> parts = parts_of({"text": "good", "sentiment": 1})
        >>> parts.numbers
        {'.sentiment': array(1)}
        >>> parts.digest == parts_of({"text": "bad", "sentiment": 1}).digest
        False
    """
    seen = _Seen()
    seen.add("", "", sample, ())
    return seen.parts()


def digest_of(sample: Any) -> str:
    """The digest in `parts_of(sample)`, without the rest, which takes longer."""
    seen = _Seen(digest_only=True)
    seen.add("", "", sample, ())
    return seen.parts().digest


class _Seen:
    """What was seen of a sample so far; on request it keeps nothing but the digest."""

    def __init__(self, *, digest_only: bool = False) -> None:
        self.digest_only = digest_only
        self.digest, self.form, self.content = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        self.means: list[float] = []
        self.sizes: list[float] = []
        self.paths: list[str] = []
        self.numbers: dict[str, np.ndarray] = {}
        self.known = True
        self.on_cpu = True
        self.left = _MOST
        self.more = 0  # pieces of floats beyond `_MOST_MEANS`

    def parts(self) -> Parts:
        sketch = Sketch(self.form.hexdigest()[:8], self.content.hexdigest()[:16], tuple(self.means), tuple(self.sizes))
        paths = tuple(self.paths)
        return Parts(self.digest.hexdigest()[:16], sketch, paths, self.numbers, self.known, self.on_cpu)

    def add(self, name: str, path: str, value: Any, above: tuple[int, ...]) -> None:
        """Adds a part, and what is in it.

        Args:
            name: What it is called in what holds it.
            path: The names on the way to it.
            value: The part.
            above: The ids of what holds it.
        """
        self.left -= 1
        if self.left < 0:
            self.known = False
            return
        if isinstance(value, Tensor) and value.device.type != "cpu":
            self.on_cpu = False
        kind, content = _look_at(value, nested=bool(above))
        if id(value) in above:
            self._describe(name, f"what is {len(above) - above.index(id(value))} above")
        elif isinstance(content, list) and len(above) < _DEPTH:
            self._describe(name, f"{kind} {len(content)}")
            for key, part in content:
                key = key if isinstance(key, (int, *_TEXTS)) else type(key).__name__
                self.add(repr(key), f"{path}.{key!s}", part, (*above, id(value)))
        elif isinstance(content, np.ndarray):
            self._describe(name, f"{kind} {content.dtype.str} {content.shape}")
            self._add_array(path, content)
        elif isinstance(content, bytes):
            self._describe(name, kind)
            is_path = isinstance(value, PurePath) or (isinstance(value, str) and value.startswith(os.sep))
            self._add_text(content, str(value) if is_path else None)
        else:
            self._describe(name, f"unknown {kind}")
            self.known = False

    def _describe(self, name: str, kind: str) -> None:
        for hashed in (self.digest,) if self.digest_only else (self.digest, self.form, self.content):
            hashed.update(f"{name}:{kind}\n".encode())

    def _add_array(self, path: str, array: np.ndarray) -> None:
        if 0 < array.size <= _SMALL and array.dtype.kind in "biuf" and len(self.numbers) < _SMALL:
            self.numbers[path] = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
        for piece in _pieces(array):
            content = piece.view(np.uint8).data
            self.digest.update(content)
            if self.digest_only:
                continue
            if array.dtype.kind != "f":
                self.content.update(content)
            else:
                self._add_floats(piece)

    def _add_floats(self, piece: np.ndarray) -> None:
        finite = np.isfinite(piece)
        values = piece[finite].astype(np.float64)
        mean, size = _rounded(values * _weights(len(piece))[finite]), _rounded(np.abs(values))
        if len(self.means) < _MOST_MEANS:
            self.means.append(mean)
            self.sizes.append(size)
            return
        self.more += 1
        weight = 1 + self.more % 97 / 97  # tells the pieces apart
        self.means[-1] += weight * mean
        self.sizes[-1] += weight * size

    def _add_text(self, whole: bytes, path: str | None) -> None:
        self.digest.update(f"{len(whole)}:".encode() + whole)
        self.content.update(whole if path is None else repr(PurePath(path).name).encode())
        if path is not None:
            self.paths.append(path)


def _look_at(value: Any, *, nested: bool) -> tuple[str, np.ndarray | list[tuple[Any, Any]] | bytes | None]:
    """The kind of a part, and it as an array, as what is in it by name, or as bytes; None if it can't be compared."""
    kind = type(value).__name__
    if type(value).__module__.startswith("pandas") and hasattr(value, "to_numpy"):
        value = value.to_numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if not array.dtype.hasobject:
            return "array", array
        value = array.tolist() if array.ndim else [array.item()]
    if isinstance(value, Tensor):
        return f"tensor {value.dtype}", _array_of(value)
    if isinstance(value, Image.Image):
        return f"image {value.mode}", np.asarray(value)
    if isinstance(value, bytes):
        return kind, value
    if isinstance(value, _TEXTS):
        return kind, repr(value).encode()
    if isinstance(value, (int, float)):
        dtype = bool if isinstance(value, bool) else np.float64 if isinstance(value, float) else np.int64
        try:
            return kind, np.asarray(value, dtype)
        except OverflowError:
            return kind, f"{value:x}".encode()
    if isinstance(value, (list, tuple)) and (nested or len(value) > _SMALL):
        # Tokens, say: an array is read faster than its numbers one by one.
        types = set(map(type, value))
        if types == {float} or types == {int}:
            try:
                return "numbers", np.asarray(value, dtype=np.float64 if types == {float} else np.int64)
            except OverflowError:
                pass
    return _within(value)


def _within(value: Any) -> tuple[str, list[tuple[Any, Any]] | None]:
    """The kind of something that holds parts, and these by name; None for a type that can't be compared."""
    if isinstance(value, Mapping):
        return "mapping", sorted(value.items(), key=lambda item: repr(item[0]))
    if isinstance(value, (set, frozenset)):
        return "set", list(enumerate(sorted(value, key=repr)))
    if isinstance(value, Sequence):
        return "sequence", list(enumerate(value))
    kind = type(value).__name__
    if isinstance(value, Dataset):
        return kind, None
    if dataclasses.is_dataclass(value):
        return kind, [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    return kind, sorted(vars(value).items()) or None if hasattr(value, "__dict__") else None


def _array_of(tensor: Tensor) -> np.ndarray | None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta":
        return None
    values = tensor.detach().as_subclass(Tensor).cpu().resolve_conj().resolve_neg()
    try:
        return values.numpy()
    except TypeError:  # numpy has no such dtype
        return values.view(_INTEGERS[values.itemsize]).numpy().view(f"V{values.itemsize}")


def _rounded(values: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        return float(f"{np.nan_to_num(values.mean()):.7g}") if values.size else 0.0


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """Its elements in order, in a few contiguous pieces: no copy of the whole is needed."""
    if array.size * array.itemsize == 0:
        return
    flat: Any = array.reshape(-1) if array.flags.c_contiguous else array.flat
    length = -(-array.size // _PIECES)
    for start in range(0, array.size, length):
        yield flat[start : start + length]
