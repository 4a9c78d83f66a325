"""`RowFiles`: the losses of a run that goes on, a small file for each checkpoint, so that a kill loses none.

The folder `cld-rows-<run>` holds `about.npz` with what all rows share, a file for each checkpoint such as
`after-000012.npz`, and `owner.json`, which says which process writes there.
"""

from __future__ import annotations

import json
import os
import socket
import zlib
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cld.storage import files
from lightning_cld.storage.files import Contents
from lightning_cld.storage.places import Place, as_place, child, delete, exists, names_in, reading, replacing

_ABOUT, _ROW = "cld-rows", "cld-row"
_OWNER = "owner.json"


class RowFiles:
    """The files of one run.

    Args:
        folder: Their folder, which need not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = as_place(folder)

    def take(self) -> None:
        """Makes the folder, as this process's own."""
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        owner = {"host": socket.gethostname(), "process": os.getpid(), "started": started}
        with replacing(child(self.folder, _OWNER)) as file:
            file.write(json.dumps(owner).encode())

    def release(self) -> None:
        """Says that no process writes there any more."""
        delete(child(self.folder, _OWNER))

    def owner(self) -> str:
        """Which process writes there, or may do so, in words; empty if none does, or it is this one."""
        place = child(self.folder, _OWNER)
        if not exists(place):
            return ""
        try:
            with reading(place) as file:
                owner = json.loads(file.read())
            host, process, started = owner["host"], int(owner["process"]), owner["started"]
            if host == socket.gethostname() and not _is_another_that_lives(process):
                return ""
        except FileNotFoundError:  # it ended just now
            return ""
        except Exception:  # noqa: BLE001  # whatever a file of somebody else holds, and a storage raises
            return "an unknown process"
        return f"process {process} on {host}, started {started}"

    def is_taken(self) -> bool:
        """Whether a process took the folder and did not release it."""
        return exists(child(self.folder, _OWNER))

    def epochs(self) -> list[int]:
        """The checkpoints that can be read, in order."""
        return self._on_disk() if exists(self._about) else []

    def write_about(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Writes what all rows share."""
        files.write(self._about, Contents(_ABOUT, {**header, "epochs": []}, arrays))

    def write(self, epoch: int, train_row: np.ndarray, val_row: np.ndarray) -> None:
        """Writes the losses of a checkpoint, float32 `[N]` and `[M]`."""
        rows = {"train_row": train_row, "val_row": val_row}
        files.write(self._row(epoch), Contents(_ROW, {"epochs": [epoch], "metadata": {}}, rows))

    def keep_only(self, epochs: Iterable[int]) -> None:
        """Deletes the files of all other checkpoints."""
        for epoch in set(self._on_disk()).difference(epochs):
            delete(self._row(epoch))

    def delete(self) -> None:
        """Deletes the folder."""
        delete(self._about)  # first, so that what a kill leaves of the rows is not taken for all of them
        delete(self.folder)

    def _on_disk(self) -> list[int]:
        names = [name.removeprefix("after-").removesuffix(".npz") for name in names_in(self.folder)]
        return sorted(int(name) for name in names if name.isdecimal())

    def read(self, reader: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Reads the header and the arrays as `files.read` does, with all rows in one array.

        Args:
            reader: The user's call, named in errors.

        Raises:
            ValueError: If it is another folder, or a file is damaged.
        """
        epochs = self.epochs()
        if not epochs:
            raise ValueError(
                f"{reader}: {self.folder} is a folder without logged losses. Give the .npz file, or the folder with "
                '"-rows-" in its name that a run which was killed has left.'
            )
        header, arrays = files.read(self._about, _ABOUT, reader)
        for place, epoch in enumerate(epochs):
            for name, row in files.read(self._row(epoch), _ROW, reader)[1].items():
                losses = name.replace("_row", "_losses")
                if losses not in arrays:
                    arrays[losses] = np.empty((len(epochs), *row.shape), row.dtype)
                if row.shape != arrays[losses].shape[1:] or row.dtype != arrays[losses].dtype:
                    raise ValueError(f"{reader}: {self._row(epoch)} does not fit the files beside it.")
                arrays[losses][place] = row
        return {**header, "epochs": epochs}, arrays

    @property
    def _about(self) -> Place:
        return child(self.folder, "about.npz")

    def _row(self, epoch: int) -> Place:
        return child(self.folder, f"after-{epoch:06}.npz")


def digest_of(train_row: np.ndarray, val_row: np.ndarray) -> int:
    """A checksum of a checkpoint's losses."""
    train, val = (np.ascontiguousarray(row).data for row in (train_row, val_row))
    return zlib.crc32(val, zlib.crc32(train))


def _is_another_that_lives(process: int) -> bool:
    """Whether a process of this machine is running and not this one; where that can't be asked, whether it may be."""
    if process == os.getpid() or os.name == "nt":  # on Windows the question would end it
        return process != os.getpid()
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, but belongs to somebody else
        return True
    return True
