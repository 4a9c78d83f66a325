"""Which samples of a stream are in the coreset, asked where they are read."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from lightning_cld.names import SampleNames

_UNSEEN = -1
"""The class of a position that no sample had while the stream was scored."""

_MOST = 255
"""So often is a member counted at most."""

_PATIENCE = 10
"""A stream that went on for so many times its length has no end."""


class Gate:
    """Says of each sample of a stream whether it is in the coreset, and counts those that are.

    It is asked inside workers, each of which has its own copy. What it counts lies in shared memory, so that the main
    process sees what all workers let pass.

    Args:
        identify: A function from a sample to its position or name, or to a tuple of that and its class.
        positions: Positions of the coreset, whole numbers `[k]`; with `names` places among them.
        length: The number of positions that were scored; None if it is unknown.
        names: The names of all scored samples, if samples are known by name.
        classes: The class of each position, int64 `[length]`, or -1 where there was no sample; None if unknown.
        strangers: Whether a name that is not among `names` is passed over. Otherwise it is an error.
        rows: The number of workers, at least 1.

    Attributes:
        needed: How many members have to pass before a stream may go on without an end.
        once: Whether a member that passes again before `reset` is an error.

    Example:
        >>> from lightning_cld.data.gate import Gate
        >>> gate = Gate(lambda sample: sample["index"], [1, 3], length=4)
        >>> [gate({"index": index}) for index in (3, 2, 1)]
        [True, False, True]
        >>> gate.passed()
        tensor([1, 1])
    """

    def __init__(
        self,
        identify: Callable[[Any], Any],
        positions: Any,
        *,
        length: int | None = None,
        names: SampleNames | None = None,
        classes: Tensor | None = None,
        strangers: bool = False,
        rows: int = 1,
    ) -> None:
        self.identify = identify
        self.positions = _shared(torch.as_tensor(positions).long().sort().values)
        self.length = length
        self.names = names
        self.classes = None if classes is None else _shared(classes)
        self.strangers = strangers
        self.once = False
        self.needed = len(self.positions)
        # A row for each worker: they don't wait for each other to count.
        self._passed = _shared(torch.zeros(max(1, rows), len(self.positions), dtype=torch.uint8))
        self._asked = _shared(torch.zeros(max(1, rows), dtype=torch.int64))

    def __call__(self, sample: Any) -> bool:
        """Whether a sample is in the coreset."""
        position = self.locate(sample)
        worker = get_worker_info()
        row = 0 if worker is None else worker.id % len(self._passed)
        self._check_end(row)
        if position is None:
            return False
        positions, passed = self.positions.numpy(), self._passed.numpy()  # kept, these would not be shared
        slot = int(np.searchsorted(positions, position))
        if slot == len(positions) or positions[slot] != position:
            return False
        if self.once and passed[:, slot].any():
            raise ValueError(
                f"{self._described(position)} came twice in one pass over the stream. {REPEATED} A stream without an "
                'end has no passes: give it a limit, or count batches with epoch_length="full".'
            )
        if passed[row, slot] < _MOST:
            passed[row, slot] += 1
        return True

    def locate(self, sample: Any) -> int | None:
        """The position of a sample, or None for a name that is passed over.

        Raises:
            TypeError: If `identify` gives something else.
            ValueError: If the sample is not among the scored ones, or its class is another.
        """
        found = self.identify(sample)
        label = None
        if isinstance(found, tuple):
            if len(found) != 2:
                raise TypeError(f"identify must give (position or name, class), but gave {found!r}.")
            found, label = found[0], _whole(found[1], "class")
        position = self._by_name(found) if isinstance(found, str) else self._by_position(found)
        if label is not None and position is not None and self.classes is not None:
            scored = int(self.classes[position])
            if scored not in (_UNSEEN, label):
                raise ValueError(
                    f"{self._described(position)} of the stream has the class {label}, but {scored} when it was "
                    f"scored. {ANOTHER}"
                )
        return position

    def passed(self) -> Tensor:
        """How often each member passed since the last `reset`, int64 `[k]`."""
        passed: Tensor = self._passed.sum(0, dtype=torch.int64)
        return passed

    def reset(self) -> None:
        """Begins to count anew."""
        self._passed.zero_()
        self._asked.zero_()

    def _by_name(self, name: str) -> int | None:
        if self.names is None:
            raise TypeError(
                f"identify gave the name {name!r}, but the coreset holds positions without names. Let it give the "
                "position, or score the stream by name."
            )
        position = int(self.names.find([name])[0])
        if position < 0 and not self.strangers:
            raise ValueError(
                f"Sample {name!r} is not among the {len(self.names):,} that were scored, such as {self.names[0]!r}. "
                f"{ANOTHER}"
            )
        return position if position >= 0 else None

    def _by_position(self, found: Any) -> int:
        position = _whole(found, "position")
        if self.names is not None:
            raise TypeError(
                f"identify gave the position {position}, but the coreset holds names, such as {self.names[0]!r}. Let "
                "it give the name."
            )
        if position < 0 or (self.length is not None and position >= self.length):
            among = "" if self.length is None else f" of the {self.length:,} that were scored"
            raise ValueError(f"Sample {position} is outside{among}. {ANOTHER}")
        return position

    def _check_end(self, row: int) -> None:
        """Raises if a stream comes to no end, and what is waited for does not come."""
        asked = self._asked.numpy()
        asked[row] += 1
        if self.length is None or asked[row] % (_PATIENCE * self.length):
            return
        passed = int((self.passed() > 0).sum())
        if passed < self.needed:
            raise ValueError(
                f"After {asked[row]:,} samples the stream has not come to an end, and {passed:,} of the "
                f"{len(self.positions):,} samples of the coreset have passed; {self.length:,} samples were scored. "
                f"{ANOTHER} If it has no end, give it a limit."
            )

    def _described(self, position: int) -> str:
        return f"Sample {position}" if self.names is None else f"Sample {self.names[position]!r}"


ANOTHER = "This is another stream than the one that was scored."

REPEATED = "Several workers or processes read the same samples, unless the stream repeats them itself."


def _shared(values: Tensor) -> Tensor:
    """A copy in shared memory."""
    return values.clone().share_memory_()  # type: ignore[no-untyped-call, no-any-return]  # torch has no types for it


def _whole(value: Any, kind: str) -> int:
    is_flag = isinstance(value, (bool, np.bool_))
    if kind == "class" and is_flag:  # the step takes these for two classes too
        return int(value)
    if not is_flag:
        try:
            return operator.index(value)
        except (TypeError, RuntimeError):  # the second by tensors
            pass
    hint = " Decode bytes to text." if isinstance(value, bytes) else ""
    wanted = "a position (a whole number) or a name (text)"
    if kind == "class":
        wanted, hint = "a whole number as the class", " It must be the number that the step returned."
    raise TypeError(f"identify must give {wanted}, but gave {value!r}, which is a {type(value).__name__}.{hint}")
