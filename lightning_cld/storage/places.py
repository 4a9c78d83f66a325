"""Files and folders of this machine, and those behind a URL that fsspec reads, such as `s3://bucket/runs`."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, TypeAlias, cast

# fsspec is Lightning's way to storage, and so is this function: what it can write to, we can.
from lightning.fabric.utilities.cloud_io import get_filesystem

Place: TypeAlias = Path | str
"""A path of this machine, or a URL as text."""

_URL = re.compile(r"[A-Za-z][\w+.-]+(://|::)")
_URL_AS_PATH = re.compile(r"([A-Za-z][\w+.-]+):/(?!/)")


def as_place(path: str | Path) -> Place:
    """Tells paths of this machine and URLs apart.

    Args:
        path: A path, or a URL. A `Path` made of a URL has lost slashes, which are put back. `~` is the user's home.

    Returns:
        A `Path`, or the URL without a slash at its end.

    Example:
        >>> from pathlib import Path
        >>> from lightning_cld.storage.places import as_place
        >>> as_place("s3://bucket/runs/"), as_place(Path("s3://bucket/runs"))
        ('s3://bucket/runs', 's3://bucket/runs')
        >>> as_place("file:///runs") == as_place("/runs") == Path("/runs")
        True
    """
    text = str(path)
    if isinstance(path, Path) and (lost := _URL_AS_PATH.match(text)):
        text = f"{lost[1]}:{'///' if lost[1] == 'file' else '//'}{text[lost.end() :]}"
    if text.startswith("file://"):
        return Path(get_filesystem(text)._strip_protocol(text))  # the one method of fsspec that does it
    if not _URL.match(text):
        return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises where there is no such user
    start, separator, end = text.rpartition("://")
    return start + separator + end.rstrip("/")  # the root of a storage keeps its slashes


def child(folder: Place, name: str) -> Place:
    """What has this name in a folder."""
    return folder / name if isinstance(folder, Path) else f"{folder}/{name}"


def parent(place: Place) -> Place:
    """The folder that a file is in."""
    return place.parent if isinstance(place, Path) else place.rpartition("/")[0]


def name_of(place: Place) -> str:
    """The last part of a path or URL."""
    return place.name if isinstance(place, Path) else place.rpartition("/")[2]


def exists(place: Place) -> bool:
    """Whether there is a file or a folder."""
    return place.exists() if isinstance(place, Path) else bool(get_filesystem(place).exists(place))


def is_folder(place: Place) -> bool:
    """Whether there is a folder."""
    return place.is_dir() if isinstance(place, Path) else bool(get_filesystem(place).isdir(place))


def size_of(place: Place) -> int:
    """The bytes of a file."""
    return place.stat().st_size if isinstance(place, Path) else int(get_filesystem(place).size(place))


def names_in(folder: Place) -> list[str]:
    """The names of what is in a folder, sorted; none if there is no folder."""
    if isinstance(folder, Path):
        return sorted(found.name for found in folder.iterdir()) if folder.is_dir() else []
    files = get_filesystem(folder)
    if not files.isdir(folder):
        return []
    files.invalidate_cache(folder)  # other processes write there
    return sorted(name_of(str(found).rstrip("/")) for found in files.ls(folder, detail=False))


def make_folder(folder: Place) -> None:
    """Makes a folder and those above it, where there are folders at all."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    else:
        get_filesystem(folder).makedirs(folder, exist_ok=True)


def delete(place: Place) -> None:
    """Deletes a file, or a folder with the files in it, if it is there."""
    if isinstance(place, Path):
        if place.is_dir():
            for file in place.iterdir():
                file.unlink()
            place.rmdir()
        else:
            place.unlink(missing_ok=True)
    elif (files := get_filesystem(place)).exists(place):
        files.rm(place, recursive=True)


@contextmanager
def reading(place: Place) -> Iterator[BinaryIO]:
    """Opens a file to be read."""
    with place.open("rb") if isinstance(place, Path) else get_filesystem(place).open(place, "rb") as file:
        yield cast(BinaryIO, file)


@contextmanager
def replacing(place: Place) -> Iterator[BinaryIO]:
    """Opens a temporary file. It replaces the file at `place` if the body succeeds, and is deleted if the body fails.

    Behind a URL it is uploaded in one piece, which object storages do atomically.
    """
    make_folder(parent(place))
    if not isinstance(place, Path):
        with TemporaryDirectory() as scratch_folder:
            upload = Path(scratch_folder) / "upload"
            with upload.open("xb") as own:
                yield own
            get_filesystem(place).put_file(str(upload), place)
        return
    scratch = _scratch(place)
    try:
        with scratch.open("xb") as own:
            yield own
            own.flush()
            os.fsync(own.fileno())
        scratch.replace(place)
    finally:
        scratch.unlink(missing_ok=True)


def check_writable(place: Place) -> None:
    """Makes the folder of a file, and a temporary file beside it, which is deleted again.

    Raises:
        OSError: If the file could not be written there. Behind a URL also what the storage raises.
    """
    make_folder(parent(place))
    if is_folder(place):
        raise IsADirectoryError(f"{place} is a directory")
    trial = _scratch(place) if isinstance(place, Path) else f"{place}.{secrets.token_hex(8)}.tmp"
    if isinstance(trial, Path):
        trial.touch(exist_ok=False)
    else:
        get_filesystem(trial).pipe_file(trial, b"-")
    delete(trial)


def delete_scratch(place: Place) -> None:
    """Deletes the temporary files that kills during `replacing` have left. Nobody may be writing the file meanwhile."""
    if isinstance(place, Path):
        pattern = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{16}}\.tmp")
        for name in filter(pattern.fullmatch, names_in(place.parent)):
            place.with_name(name).unlink(missing_ok=True)


def _scratch(place: Path) -> Path:
    return place.with_name(f".{place.name}.{secrets.token_hex(8)}.tmp")
