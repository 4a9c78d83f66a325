"""What a sample is made of: a digest of its parts, and the small numbers among them, of which one may be its label."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image  # which torchvision brings
from torch import Tensor

from lightning_cld.data.labels import as_labels

_DEPTH = 8
"""How deep containers and objects are looked into."""

_SMALL = 64
"""The most elements of a part that may be a label."""

_PLAIN = (str, bytes, int, float, complex, type(None), PurePath)


class Parts(NamedTuple):
    """What is kept of a sample.

    Attributes:
        digest: A hash of everything in it.
        form: A hash of its structure alone: names, types, shapes and dtypes.
        numbers: The small numbers in it, int64 or float64, by the path to each, such as ".1" or ".label".
        known: Whether everything in it was of a type that can be compared.
    """

    digest: str
    form: str
    numbers: dict[str, Tensor]
    known: bool


def parts_of(sample: Any) -> Parts:
    """Looks at a sample: tensors, arrays, images, strings and numbers in tuples, mappings, dataclasses and objects.

    Example:
        >>> from lightning_cld.data.parts import parts_of
        >>> parts = parts_of({"text": "good", "sentiment": 1})
        >>> parts.numbers
        {'.sentiment': tensor(1)}
        >>> parts.digest == parts_of({"text": "bad", "sentiment": 1}).digest
        False
    """
    content, form = hashlib.sha256(), hashlib.sha256()
    numbers: dict[str, Tensor] = {}
    known = True
    for path, part in _walk(sample, "", ()):
        described = _describe(part)
        known = known and described is not None
        kind, buffer = described or (type(part).__name__, b"")
        for hashed in (content, form):
            hashed.update(f"{path}:{kind};".encode())
        content.update(buffer)
        small = _small_numbers(part) if described else None
        if small is not None:
            numbers[path] = small
    return Parts(content.hexdigest()[:16], form.hexdigest()[:8], numbers, known)


def _walk(value: Any, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """The parts of a value that hold no others, with the path to each."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        value = value.tolist()
    inner: Mapping[Any, Any] | None = None
    if isinstance(value, (Tensor, np.ndarray, np.generic, Image.Image, *_PLAIN)):
        inner = None
    elif isinstance(value, Mapping):
        inner = value
    elif isinstance(value, (list, tuple)):
        inner = dict(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    elif not callable(value) and hasattr(value, "__dict__"):
        inner = vars(value)
    if inner is None or len(above) >= _DEPTH:
        yield path, value
    elif id(value) not in above:
        for name, part in inner.items():
            yield from _walk(part, f"{path}.{name}", (*above, id(value)))


def _describe(part: Any) -> tuple[str, Any] | None:
    """The kind of a part and its content as bytes; None for a type that can't be compared."""
    if isinstance(part, Image.Image):
        array = np.asarray(part)
        return f"image {part.mode} {array.shape}", _bytes_of(array)
    if isinstance(part, Tensor):
        if part.layout != torch.strided or part.is_quantized or part.device.type == "meta":
            return None
        values = part.detach().cpu().contiguous().reshape(-1)
        return f"tensor {part.dtype} {tuple(part.shape)}", values.view(torch.uint8).numpy()
    if isinstance(part, (np.ndarray, np.generic)):
        array = np.asarray(part)
        return None if array.dtype.hasobject else (f"array {array.dtype.str} {array.shape}", _bytes_of(array))
    if isinstance(part, PurePath) or (isinstance(part, str) and part.startswith(os.sep)):
        return "file", PurePath(part).name.encode()  # folders differ between machines
    if isinstance(part, bytes):
        return "bytes", part
    if isinstance(part, _PLAIN):
        return type(part).__name__, repr(part).encode()
    return None


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _small_numbers(part: Any) -> Tensor | None:
    """A part as int64 or float64 in its own shape, if it is one number or a few."""
    if isinstance(part, (int, float)) or (
        isinstance(part, (Tensor, np.ndarray, np.generic)) and 0 < int(np.prod(part.shape)) <= _SMALL
    ):
        labels = as_labels([part])
        return None if labels is None else labels[0]
    return None
