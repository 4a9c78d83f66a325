"""`Rows`: losses in memory, a row per checkpoint, in a buffer that grows."""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """Rows of per-sample losses that can be added to.

    Args:
        losses: Floating point `[T, N]`. They are kept as float32, without a copy where that is possible, and copied
            before the first write.

    Example:
        >>> import torch
        >>> from lightning_cld.storage.rows import Rows
        >>> rows = Rows(torch.tensor([[2.5, 1.0]]))
        >>> rows.write(1, torch.tensor([1.5, 1.25]))
        >>> rows.losses
        tensor([[2.5000, 1.0000],
                [1.5000, 1.2500]])
    """

    def __init__(self, losses: Tensor) -> None:
        self._buffer = losses.detach().float()
        self._owned = False  # until then the buffer may be the caller's own
        self._count = len(losses)

    def __len__(self) -> int:
        return self._count

    @property
    def losses(self) -> Tensor:
        """Float32 `[T, N]`, a view of the buffer."""
        return self._buffer[: self._count]

    @property
    def width(self) -> int:
        """How many samples a row has."""
        return self._buffer.shape[1]

    def write(self, place: int, row: Tensor) -> None:
        """Writes a row at `place`: over one that is there, or behind the last."""
        if place >= len(self._buffer) or not self._owned:
            # The capacity doubles, because it is not always known how many rows there will be.
            self._buffer = torch.cat([self._buffer, torch.empty_like(self._buffer)])
            self._owned = True
        self._buffer[place] = row
        self._count = max(self._count, place + 1)

    def to(self, device: torch.device | str) -> None:
        """Moves the rows to `device`."""
        self._buffer = self._buffer.to(device)
