"""The library's files: a JSON header and plain arrays in an `.npz`, written atomically, read without unpickling."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lightning_cld.storage.places import Place, as_place, exists, reading, replacing, size_of

FORMAT_VERSION = 1
_HEADER = "header"
_PIECE = 2**23
"""Bytes read at a time, so that a file is never in memory twice."""


class Contents(NamedTuple):
    """What is written into a file.

    Attributes:
        kind: What the file holds; checked on reading.
        header: Values that JSON can express.
        arrays: Numeric arrays by name.
    """

    kind: str
    header: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


def write(path: str | Path, contents: Contents) -> Place:
    """Writes a file atomically: readers see the old file or the new one, never a part.

    Args:
        path: The file's path or URL, used as it is. Missing parent directories are created.
        contents: What to write.

    Returns:
        The path, or the URL.

    Raises:
        TypeError: If JSON can't express the header.
        OSError: If the file can't be written. Behind a URL also what the storage raises.
    """
    place = as_place(path)
    write_together({place: contents})
    return place


def write_together(files: Mapping[Place, Contents]) -> None:
    """Writes several files, as `write` does; the old ones are replaced once all new ones are complete."""
    with ExitStack() as replaced:
        for place, (kind, header, arrays) in files.items():
            try:
                text = json.dumps({"kind": kind, "format": FORMAT_VERSION, "arrays": sorted(arrays), **header})
            except (TypeError, ValueError, RecursionError) as error:
                raise TypeError(
                    f"metadata must be plain JSON values (str, int, float, bool, list, dict): {error}"
                ) from error
            file = replaced.enter_context(replacing(place))
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name, array in {_HEADER: np.array(text), **arrays}.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def read(path: str | Path, kind: str, reader: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads a file that `write` wrote.

    Args:
        path: The file's path.
        kind: What the file must hold.
        reader: The user's call, named in errors.

    Returns:
        The header and the arrays.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, damaged, foreign, or of another kind or format.
    """
    place = as_place(path)
    if not exists(place):
        raise FileNotFoundError(f"{reader}: there is no file {place}. CLDCallback(dirpath=...) sets where it saves.")
    if isinstance(place, Path) and not place.is_file():  # reading a pipe could wait forever
        raise ValueError(f"{reader}: {place} is not a regular file.")
    try:
        arrays = _read_members(place)
        header = json.loads(str(arrays.pop(_HEADER)[()]))
        stored_kind, version = header["kind"], int(header["format"])
        if version <= FORMAT_VERSION:
            _check_header(header, sorted(arrays))
    except Exception as error:  # zipfile, numpy's header parser and json raise many types
        raise ValueError(
            f"{reader}: {place} is not a complete {kind} file ({type(error).__name__}: {error}). It was truncated, "
            "changed, or written by another program. Write it again with `.save(path)` or another run."
        ) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{reader}: {place} has format {version}, but this lightning-cld reads up to {FORMAT_VERSION}. "
            "Upgrade lightning-cld."
        )
    if stored_kind != kind:
        raise ValueError(
            f"{reader}: {place} holds {stored_kind!r}, not {kind!r}. Load it with the class that wrote it."
        )
    return header, arrays


def stored_checkpoints(path: str | Path) -> tuple[str | None, list[int]]:
    """The run and the epochs in a file that `write` wrote, without its arrays; None and none if it can't be read."""
    try:
        with reading(as_place(path)) as file, zipfile.ZipFile(file) as archive:
            name = f"{_HEADER}.npy"
            with archive.open(name) as stream:
                text = _read_array(stream, archive.getinfo(name).file_size)
            header = json.loads(str(text[()]))
            return header["metadata"].get("run"), list(header["epochs"])
    except Exception:  # noqa: BLE001  # whatever zipfile, numpy's header parser, json and a storage raise
        return None, []


def _check_header(header: dict[str, Any], arrays: list[str]) -> None:
    if header["arrays"] != arrays:
        raise ValueError(f"it holds {arrays}, but {header['arrays']} were written")
    epochs, metadata = header["epochs"], header["metadata"]
    if not isinstance(epochs, list) or not all(type(epoch) is int for epoch in epochs):
        raise ValueError(f"its epochs must be a list of whole numbers, got {epochs!r}")
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata must be a dictionary, got {metadata!r}")


def _read_members(place: Place) -> dict[str, np.ndarray]:
    """Reads the arrays. Sizes are checked before memory is allocated; zipfile checks each member's checksum."""
    with reading(place) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        stored = all(m.compress_type == zipfile.ZIP_STORED and m.compress_size == m.file_size for m in members)
        if not stored or sum(member.file_size for member in members) > size_of(place):
            raise ValueError("its members are compressed, or larger than the file itself")
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(set(names)) < len(names):
            raise ValueError("it has two members with the same name")
        arrays = {}
        for name, member in zip(names, members, strict=True):
            with archive.open(member) as stream:
                arrays[name] = _read_array(stream, member.file_size)
        return arrays


def _read_array(stream: IO[bytes], size: int) -> np.ndarray:
    """Reads one `.npy` member of `size` bytes. `np.load` would allocate the memory that a damaged header claims."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"array format {version} is unknown")
    left = size - stream.tell()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} does not fit its {left} bytes")
    content = np.empty(left, dtype=np.uint8)
    for start in range(0, left, _PIECE):
        piece = stream.read(min(_PIECE, left - start))
        content[start : start + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
    return content.view(dtype).reshape(shape, order="F" if fortran_order else "C")
