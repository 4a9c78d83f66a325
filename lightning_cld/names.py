"""`SampleNames`: the names of a stream's samples, by position."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor


class SampleNames:
    """The distinct names of samples, in order: the place of a name is the position of its sample.

    Streams know their samples by a key, a URL or an id. The scores of a stream hold these names, so that what is chosen
    by position can be found again in the stream.

    In memory a name takes its text in UTF-8 and 24 bytes, and up to twice that while the names are read.

    Args:
        names: Text, in order. A name that comes again is left out.

    Raises:
        TypeError: If a name is no text.

    Example:
        >>> import torch
        >>> from lightning_cld import SampleNames
        >>> names = SampleNames(["shard-0/cat", "shard-0/dog", "shard-1/owl"])
        >>> names[2]
        'shard-1/owl'
        >>> names[torch.tensor([2, 0])]
        ['shard-1/owl', 'shard-0/cat']
        >>> names.positions(["shard-0/dog"])
        tensor([1])
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._keep(*_joined(names))

    def _keep(self, text: np.ndarray, ends: np.ndarray) -> None:
        """Keeps the distinct ones among names."""
        digests = _digests_of(text, ends)
        order = np.argsort(digests, kind="stable")  # of equal ones the first comes first
        digests = digests[order]
        repeats = np.flatnonzero(digests[1:] == digests[:-1]) + 1
        if len(repeats):
            for place in repeats:
                one, other = (_name_at(text, ends, int(position)) for position in order[[place - 1, place]])
                if one != other:  # to be expected once in more than a billion names
                    raise ValueError(f"The names {one!r} and {other!r} can't be told apart. Change one of them.")
            kept = np.ones(len(ends), dtype=bool)
            kept[order[repeats]] = False
            lengths = np.diff(ends, prepend=0)
            text, ends = text[np.repeat(kept, lengths)], np.cumsum(lengths[kept])
            order = (np.cumsum(kept) - 1)[np.delete(order, repeats)]
            digests = np.delete(digests, repeats)
        self._text, self._ends = text, ends
        self._digests, self._order = digests, order  # sorted, and the positions of these names

    def __len__(self) -> int:
        return len(self._ends)

    def __repr__(self) -> str:
        return f"SampleNames({len(self):,} names)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SampleNames):
            return NotImplemented
        return np.array_equal(self._ends, other._ends) and np.array_equal(self._text, other._text)

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __iter__(self) -> Iterator[str]:
        return (_decoded(encoded) for encoded in _cut(self._text, self._ends))

    @overload
    def __getitem__(self, position: int) -> str: ...

    @overload
    def __getitem__(self, position: Tensor | np.ndarray | Sequence[int] | slice) -> list[str]: ...

    def __getitem__(self, position: Any) -> str | list[str]:
        """The name at a position, or the names at several."""
        if isinstance(position, slice):
            position = range(len(self))[position]
        if isinstance(position, (Tensor, np.ndarray, list, tuple, range)) and np.ndim(position) == 1:
            listed = position.tolist() if isinstance(position, (Tensor, np.ndarray)) else position
            return [self._name(each) for each in listed]
        return self._name(position)

    def positions(self, names: Iterable[str]) -> Tensor:
        """The positions of names, int64.

        Raises:
            TypeError: If a name is no text.
            ValueError: If a name is unknown.
        """
        asked = names if isinstance(names, Sequence) else list(names)
        found = self.find(asked)
        unknown = [asked[place] for place in torch.nonzero(found < 0).flatten().tolist()]
        if unknown:
            raise ValueError(
                f"{len(unknown):,} of {len(asked):,} names are not among the {len(self):,} known: "
                f"{', '.join(map(repr, unknown[:3]))}{', ...' if len(unknown) > 3 else ''}."
            )
        return found

    def find(self, names: Iterable[str]) -> Tensor:
        """The positions of names, int64; -1 for those that are unknown.

        Example:
            >>> from lightning_cld import SampleNames
            >>> SampleNames(["cat", "dog"]).find(["dog", "owl"])
            tensor([ 1, -1])
        """
        asked = _hashes(_encoded(names))
        if len(self) == 0:
            return torch.full((len(asked),), -1)
        places = np.searchsorted(self._digests, asked).clip(max=len(self) - 1)
        return torch.from_numpy(np.where(self._digests[places] == asked, self._order[places], -1))

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `torch.load(weights_only=True)` reads.

        They are the text of all names in UTF-8, uint8, and where each name ends in it, int64 `[N]`.

        Example:
            >>> from lightning_cld import SampleNames
            >>> SampleNames(["cat", "eagle"]).state_dict()["name_ends"]
            tensor([3, 8])
        """
        return {"names": torch.from_numpy(self._text), "name_ends": torch.from_numpy(self._ends)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> SampleNames:
        """The inverse of `state_dict`.

        Raises:
            ValueError: If the tensors hold no names, or one twice.

        Example:
            >>> from lightning_cld import SampleNames
            >>> SampleNames.from_state_dict(SampleNames(["cat", "eagle"]).state_dict())[1]
            'eagle'
        """
        text, ends = (state[part].cpu().numpy() for part in ("names", "name_ends"))
        for part, found, dtype in (("names", text, np.uint8), ("name_ends", ends, np.int64)):
            if found.dtype != dtype or found.ndim != 1:
                raise ValueError(f"{part} must be one row of {np.dtype(dtype)}, got {found.dtype} {list(found.shape)}")
        edges = np.concatenate([[0], ends])
        if (edges[1:] < edges[:-1]).any() or edges[-1] != len(text):
            raise ValueError("names and name_ends don't fit together")
        for encoded in _cut(text, ends):
            _decoded(encoded)  # raises a ValueError if it is no UTF-8
        names = cls()
        names._keep(text, ends)
        if len(names) < len(ends):
            raise ValueError("names repeat")
        return names

    def _name(self, position: Any) -> str:
        if isinstance(position, bool):
            raise TypeError("Positions must be whole numbers, got a bool. Of a mask, give mask.nonzero().flatten().")
        place = operator.index(position)
        if not -len(self) <= place < len(self):
            raise IndexError(f"Position {place} is outside of the {len(self):,} names.")
        return _name_at(self._text, self._ends, place % len(self))


def find_in_order(names: SampleNames, asked: Sequence[str], start: int) -> Tensor:
    """As `names.find(asked)`; many times as fast if these are the names from position `start` on, in ASCII."""
    known = names._ends[start : start + len(asked)]
    before = names._ends[start - 1] if start else 0
    if np.array_equal(before + np.cumsum([len(name) for name in asked]), known):  # false also where too few follow
        text = names._text[before : known[-1] if len(known) else before]
        # As many letters as the known ones have bytes: the same bytes in all are then the same in each.
        if text.tobytes() == "".join(asked).encode("utf-8", "surrogatepass"):
            return torch.arange(start, start + len(asked))
    return names.find(asked)


def checked_names(names: SampleNames | Iterable[str] | None, samples: int) -> SampleNames | None:
    """Returns names as `SampleNames`, or raises unless there is a name of its own for each sample."""
    found = names if names is None or isinstance(names, SampleNames) else SampleNames(names)
    if found is not None and len(found) != samples:
        raise ValueError(
            f"names must hold one name for each of the {samples:,} samples, all different, got {len(found):,} "
            "different names."
        )
    return found


def name_arrays(names: SampleNames | None) -> dict[str, np.ndarray]:
    """What a file holds of the names: no array if there are none."""
    return {} if names is None else {part: tensor.numpy() for part, tensor in names.state_dict().items()}


def names_in_arrays(arrays: Mapping[str, np.ndarray]) -> SampleNames | None:
    """The names that a file holds, if it does.

    Raises:
        KeyError: If one of the two arrays is missing.
        TypeError: If an array holds no numbers.
        ValueError: As `SampleNames.from_state_dict`.
    """
    if "names" not in arrays and "name_ends" not in arrays:
        return None
    return SampleNames.from_state_dict({part: torch.from_numpy(arrays[part]) for part in ("names", "name_ends")})


def _joined(names: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """The text of names in UTF-8, uint8, and where each ends in it, int64 `[N]`."""
    # A list of python strings would take several times the memory of their text.
    text, ends = bytearray(), array("q")
    for encoded in _encoded(names):
        text += encoded
        ends.append(len(text))
    return np.array(text, dtype=np.uint8), np.array(ends, dtype=np.int64)


def _encoded(names: Iterable[str]) -> Iterator[bytes]:
    """Each name, in UTF-8."""
    if isinstance(names, (str, bytes)):
        raise TypeError(f"names must be a list of text, got only {names!r}. Put it into a list.")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"The name of a sample must be text, got {name!r} of type {type(name).__name__}.")
        yield name.encode("utf-8", "surrogatepass")  # names of files may hold bytes that are no UTF-8


def _cut(text: np.ndarray, ends: np.ndarray) -> Iterator[memoryview]:
    """Each name, in UTF-8."""
    whole, start = text.data, 0
    for end in ends.data:
        yield whole[start:end]
        start = end


def _name_at(text: np.ndarray, ends: np.ndarray, position: int) -> str:
    start = ends[position - 1] if position else 0
    return _decoded(text.data[start : ends[position]])


def _decoded(encoded: memoryview) -> str:
    return str(encoded, "utf-8", "surrogatepass")


def _digests_of(text: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return _hashes(_cut(text, ends))


def _hashes(names: Iterable[bytes | memoryview]) -> np.ndarray:
    """A hash of each name, uint64 `[N]`: a number is compared faster than text, and takes less memory."""
    digests = bytearray()
    for encoded in names:
        digests += blake2b(encoded, digest_size=8).digest()
    return np.frombuffer(digests, dtype="<u8")
