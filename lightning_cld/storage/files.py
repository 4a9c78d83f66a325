"""The library's files: a JSON header and plain arrays in an `.npz`, written atomically, read without unpickling."""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT_VERSION = 1
_HEADER = "header"


def write_arrays(path: str | Path, kind: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """Writes `arrays` and a JSON `header` to `path` atomically: readers see the old file or the new one, never a part.

    Args:
        path: The file's path, used as it is. Missing parent directories are created.
        kind: What the file holds; checked on reading.
        header: Values that JSON can express.
        arrays: Numeric arrays by name.

    Returns:
        The path written.

    Raises:
        TypeError: If JSON can't express the header.
        OSError: If the file can't be written.
    """
    path = Path(path)
    try:
        text = json.dumps({"kind": kind, "format": FORMAT_VERSION, "arrays": sorted(arrays), **header})
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata must be plain JSON values (str, int, float, bool, list, dict): {error}") from error
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in {_HEADER: np.array(text), **arrays}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    return path


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file. It replaces `path` if the body succeeds, and is deleted if the body fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with scratch.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read_arrays(path: str | Path, kind: str, reader: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads a file that `write_arrays` wrote.

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
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{reader}: there is no file {path}. CLDCallback(dirpath=...) sets where it saves.")
    if not path.is_file():  # reading a pipe could wait forever
        raise ValueError(f"{reader}: {path} is not a regular file.")
    try:
        arrays = _read_members(path)
        header = json.loads(str(arrays.pop(_HEADER)[()]))
        stored_kind, version = header["kind"], int(header["format"])
        if version <= FORMAT_VERSION:
            _check_header(header, sorted(arrays))
    except Exception as error:  # zipfile, numpy's header parser and json raise many types
        raise ValueError(
            f"{reader}: {path} is not a complete {kind} file ({type(error).__name__}: {error}). It was truncated, "
            "changed, or written by another program. Write it again with `.save(path)` or another run."
        ) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{reader}: {path} has format {version}, but this lightning-cld reads up to {FORMAT_VERSION}. "
            "Upgrade lightning-cld."
        )
    if stored_kind != kind:
        raise ValueError(f"{reader}: {path} holds {stored_kind!r}, not {kind!r}. Load it with the class that wrote it.")
    return header, arrays


def _check_header(header: dict[str, Any], arrays: list[str]) -> None:
    if header["arrays"] != arrays:
        raise ValueError(f"it holds {arrays}, but {header['arrays']} were written")
    epochs, metadata = header["epochs"], header["metadata"]
    if not isinstance(epochs, list) or not all(type(epoch) is int for epoch in epochs):
        raise ValueError(f"its epochs must be a list of whole numbers, got {epochs!r}")
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata must be a dictionary, got {metadata!r}")


def _read_members(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays. Sizes are checked before memory is allocated; zipfile checks each member's checksum."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        stored = all(m.compress_type == zipfile.ZIP_STORED and m.compress_size == m.file_size for m in members)
        if not stored or sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("its members are compressed, or larger than the file itself")
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(set(names)) < len(names):
            raise ValueError("it has two members with the same name")
        return {name: _parse_array(archive.read(member)) for name, member in zip(names, members, strict=True)}


def _parse_array(content: bytes) -> np.ndarray:
    """Reads one `.npy` member. `np.load` would first allocate the memory that a damaged header claims."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"array format {version} is unknown")
    data = content[stream.tell() :]
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} and dtype {dtype} does not fit its {len(data)} bytes")
    return np.array(np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C"))
