"""`Rows`: losses in memory, a row per checkpoint, in a buffer that grows."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Rows:
    """Rows of per-sample losses that can be added to.

    With `reserve` rows are written into one buffer and never copied again. Without it the buffer doubles on the CPU,
    which gives memory only as it is written. On other devices each new row has a tensor of its own, until `losses` is
    read and puts all of them into one. Either way memory peaks at twice the losses at most.

    If a device has no memory left, the rows move to the CPU with a warning, and stay there.

    Args:
        losses: Floating point `[T, N]`. They are kept as float32, without a copy where that is possible, and copied
            before the first write.

    Example:
        >>> import torch
        >>> from lightning_cld.storage.rows import Rows
        >>> rows = Rows(torch.tensor([[2.5, 1.0]]))
        >>> rows.reserve(2)
        >>> rows.write(1, torch.tensor([1.5, 1.25]))
        >>> rows.losses
        tensor([[2.5000, 1.0000],
                [1.5000, 1.2500]])
    """

    def __init__(self, losses: Tensor) -> None:
        self._buffer = losses.detach().float()
        self._owned = False  # until then the buffer may be the caller's own
        self._count = len(losses)
        # Rows that the buffer has no room for, by their place. One in both places is the same, so an interruption
        # between two statements does no harm.
        self._behind: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        losses = self.losses
        # Pickling a view would pickle its whole buffer.
        whole = len(losses) == len(self._buffer)
        return {"_buffer": losses if whole else losses.clone(), "_owned": self._owned, "_count": self._count}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"_behind": {}, **state})

    def __len__(self) -> int:
        return self._count

    @property
    def losses(self) -> Tensor:
        """Float32 `[T, N]`, a view of the buffer."""
        if self._behind:
            self._gather(self._count)
        return self._buffer[: self._count]

    @property
    def width(self) -> int:
        """How many samples a row has."""
        return self._buffer.shape[1]

    def row(self, place: int) -> Tensor:
        """One row, float32 `[N]`, without a copy of the others."""
        return self._behind[place] if place in self._behind else self._buffer[place]

    def reserve(self, rows: int) -> None:
        """Makes room for so many rows in all, so that writing them copies nothing.

        On the CPU the system gives the memory only as rows are written. If it does not promise that much, rows go on
        growing one by one.
        """
        if rows > len(self._buffer):
            with suppress(MemoryError, RuntimeError, ValueError, OverflowError):
                self._gather(rows)

    def write(self, place: int, row: Tensor) -> None:
        """Writes a row at `place`: over one that is there, or behind the last."""
        if not self._owned:
            self._gather(len(self._buffer))
        if place >= len(self._buffer) and _commits_late(self._buffer.device):
            self.reserve(2 * len(self._buffer))
        if place < len(self._buffer) and place not in self._behind:
            self._buffer[place] = row
        else:
            kept = self._allocate(1)[0]
            kept.copy_(row)
            self._behind[place] = kept
        self._count = max(self._count, place + 1)

    def to(self, device: torch.device | str) -> None:
        """Moves the rows to `device`. What was reserved is free again."""
        losses = self.losses
        try:
            moved = losses.to(device)
        except torch.OutOfMemoryError:
            _warn(torch.device(device))
            moved = losses.cpu()
        if moved.device != losses.device:
            self._buffer, self._owned = moved, True

    def _gather(self, rows: int) -> None:
        """Puts all rows into one new buffer with room for `rows`."""
        buffer = self._allocate(rows)
        known = min(self._count, len(self._buffer))
        buffer[:known] = self._buffer[:known]
        for place, row in self._behind.items():
            buffer[place] = row
        self._buffer, self._owned = buffer, True
        self._behind = {}

    def _allocate(self, rows: int) -> Tensor:
        """Memory for so many rows, float32 `[rows, N]`, on the device of the others if it has any left."""
        device = self._buffer.device
        try:
            return _empty(rows, self.width, device)
        except torch.OutOfMemoryError:
            _warn(device)
            self._buffer = self._buffer[: self._count].cpu()
            self._behind = {place: row.cpu() for place, row in self._behind.items()}
            return _empty(rows, self.width, self._buffer.device)


def _empty(rows: int, width: int, device: torch.device) -> Tensor:
    if _commits_late(device):
        # torch.empty writes into all of it if torch.use_deterministic_algorithms is on.
        return torch.from_numpy(np.empty((rows, width), dtype=np.float32))
    return torch.empty(rows, width, dtype=torch.float32, device=device)


def _commits_late(device: torch.device) -> bool:
    """Whether memory counts only once it is written into."""
    return device.type == "cpu"


def _warn(device: torch.device) -> None:
    warnings.warn(
        f"CLD: the device {device} has no memory left for the logged losses, so they are kept in the CPU's memory from "
        'now on. CLDCallback(buffer_device="cpu") keeps them there from the start, and history="running" keeps less.',
        stacklevel=2,
    )
