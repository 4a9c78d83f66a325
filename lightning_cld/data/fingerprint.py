"""`Fingerprint`: which dataset this is, as far as it can be told from one like it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

PROBES = 64
"""Samples whose labels are compared where a dataset does not offer them."""


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a dataset. What could not be learned is left empty, and is not compared.

    Labels are here any targets, the numbers of a regression too.

    Args:
        length: Number of samples.
        labels: Hash of all labels in order, if the dataset offers them.
        probe: Hash of the labels at `probe_positions(length)`.
        positions: Hash of the positions in the dataset that this one is a `Subset` of, behind the length of that one.
        files: Hash of the file names, in order.
        samples: Digests of a few samples, read one at a time.
        read: What those samples are: "raw" (without the dataset's transforms), "given" (as the dataset gives them) or
            "view" (as its un-augmented view gives them).
        numbers: Paths to small numbers in the samples at `probe_positions(length)`, and their hashes. After a run these
            are only the numbers that are the classes which it logged.
        former: Whether it was saved by a version that knew only `length`, `labels` and `probe`.

    Example:
        >>> import torch
        >>> from lightning_cld.data.fingerprint import Fingerprint
        >>> scored = Fingerprint.of_labels(torch.tensor([0, 1, 1, 0]))
        >>> scored.mismatch(Fingerprint.of_labels(torch.tensor([1, 0, 1, 0])))
        'it has other labels, or the same in another order'
        >>> scored.mismatch(scored) is None
        True
    """

    length: int
    labels: str = ""
    probe: str = ""
    positions: str = ""
    files: str = ""
    samples: tuple[str, ...] = ()
    read: str = ""
    numbers: tuple[tuple[str, str], ...] = ()
    former: bool = False

    @classmethod
    def of_labels(cls, labels: Tensor) -> Fingerprint:
        """The fingerprint of a dataset with these labels, `[N, ...]`."""
        return cls(len(labels), hash_of(labels), hash_of(labels[probe_positions(len(labels))]))

    @classmethod
    def of_probe(cls, length: int, probed: Tensor | None) -> Fingerprint:
        """The fingerprint of a dataset whose labels are known at `probe_positions(length)`, or not at all."""
        return cls(length, probe=hash_of(probed) if probed is not None else "")

    def of_classes(self, classes: Tensor | None) -> Fingerprint:
        """The same, where the classes that a run logged (int64 `[N]`, None for one class) say which numbers are labels.

        Numbers that are no labels may change from read to read, and are dropped.
        """
        if classes is None:
            return replace(self, numbers=())
        probed = classes[probe_positions(self.length)]
        hashes = {hash_of(probed), hash_of(probed[:, None])}
        return replace(self, numbers=tuple(number for number in self.numbers if number[1] in hashes))

    def mismatch(self, other: Fingerprint) -> str | None:
        """What tells `other` from this dataset, in words that start with "it"; None if nothing known does."""
        if other.length != self.length:
            return f"it has {other.length:,} samples, not {self.length:,}"
        differs = self._compare(other)
        if differs.get("positions"):
            return "it takes other positions of the dataset that it is a part of, as another split does"
        if differs.get("files"):
            return "it has files of other names, or the same in another order"
        if differs.get("labels"):
            return "it has other labels, or the same in another order"
        if differs.get("samples"):
            return "its labels are the same, but some of its samples are not, or they are in another order"
        return None

    def compared(self, other: Fingerprint) -> list[str]:
        """What `mismatch` compares beside lengths: some of "positions", "files", "labels" and "samples"."""
        return list(self._compare(other))

    def _compare(self, other: Fingerprint) -> dict[str, bool]:
        """Whether what both know differs, by its name."""
        found: dict[str, bool] = {}
        if self.positions.partition(":")[0] == other.positions.partition(":")[0] != "":
            found["positions"] = self.positions != other.positions
        if self.files and other.files:
            found["files"] = self.files != other.files
        own, its = dict(self.numbers), dict(other.numbers)
        shared = own.keys() & its.keys()
        if self.labels and other.labels:
            found["labels"] = self.labels != other.labels
        elif shared:
            found["labels"] = any(own[path] != its[path] for path in shared)
        elif self.probe and other.probe:
            found["labels"] = self.probe != other.probe
        if self.samples and self.read == other.read and len(self.samples) == len(other.samples):
            pairs = list(zip(self.samples, other.samples, strict=True))
            # Samples of other shapes or types may be the same ones, transformed otherwise.
            if self.read == "raw" or all(one[:8] == other[:8] for one, other in pairs):
                found["samples"] = self.samples != other.samples
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """The inverse of `to_dict`; reads also what a former version wrote.

        Raises:
            TypeError: If a value is missing, unknown or of another type.
        """
        values = dict(values)
        if values.keys() == {"length", "labels", "probe"}:
            values["former"] = True
        else:
            for name in ("samples", "numbers"):
                if not isinstance(values.get(name), list):
                    raise TypeError(f"{name} of a fingerprint must be a list, got {values.get(name)!r}")
            values["samples"] = tuple(values["samples"])
            values["numbers"] = tuple((path, value) for path, value in values["numbers"])
        fingerprint = cls(**values)
        types = [type(value) for value in asdict(fingerprint).values()]
        strings = [*fingerprint.samples, *(text for number in fingerprint.numbers for text in number)]
        if types != [int, str, str, str, str, tuple, str, tuple, bool] or not all(type(s) is str for s in strings):
            raise TypeError(f"a fingerprint is a length and hashes, not {values}")
        return fingerprint

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for files and checkpoints."""
        return {**asdict(self), "samples": list(self.samples), "numbers": [list(number) for number in self.numbers]}


def probe_positions(length: int, count: int = PROBES) -> Tensor:
    """Up to `count` evenly spaced positions of a dataset with `length` samples, int64."""
    count = min(count, length)
    return torch.arange(count) * length // max(count, 1)


def hash_of(labels: Tensor) -> str:
    """A hash of numbers and their shape."""
    values = labels.cpu().numpy()
    # Single precision, because an array of targets and the samples made of it often differ in theirs.
    kind = "<f4" if labels.is_floating_point() else "<i8"
    return hashlib.sha256(str(values.shape).encode() + values.astype(kind).tobytes()).hexdigest()
