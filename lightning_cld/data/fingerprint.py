"""`Fingerprint`: which dataset this is, as far as it can be told from one like it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PROBES = 64
"""Samples whose labels are compared where a dataset does not offer them."""

_TOLERANCE = 1e-4
"""How far floats may differ, relative to their size: the same code may give other last digits on another machine."""


class Sketch(NamedTuple):
    """What is kept of a sample, to recognise it on another machine.

    Attributes:
        form: Hash of its structure: names, types, shapes and dtypes.
        content: Hash of all of it but the floats.
        means: Weighted means of pieces of the floats. The weights tell their order.
        sizes: Means of their absolute values.
    """

    form: str
    content: str
    means: tuple[float, ...] = ()
    sizes: tuple[float, ...] = ()

    def is_like(self, other: Sketch) -> bool:
        """Whether they are of the same sample, as far as can be told."""
        if self[:2] != other[:2] or len(self.means) != len(other.means):
            return False
        pairs = zip(self.means, other.means, self.sizes, other.sizes, strict=True)
        return all(max(abs(a - b), abs(c - d)) <= _TOLERANCE * max(c, d) for a, b, c, d in pairs)


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
        samples: What a few samples look like, read one at a time.
        read: How these were read: "raw" (without the dataset's transforms) or "given" (with them); with ", in part"
            behind it if something in them is of a type that can't be compared.
        numbers: Paths to numbers in the samples at `probe_positions(length)`, and their hashes. After a run these
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
    samples: tuple[Sketch, ...] = ()
    read: str = ""
    numbers: tuple[tuple[str, str], ...] = ()
    former: bool = False

    @classmethod
    def of_labels(cls, labels: Tensor) -> Fingerprint:
        """The fingerprint of a dataset with these labels, `[N, ...]`."""
        return cls(len(labels), hash_of(labels), hash_of(labels[probe_positions(len(labels))]))

    def of_classes(self, classes: Tensor | None) -> Fingerprint:
        """The same, where the classes that a run logged (int64 `[N]`, None for one class) say which numbers are labels.

        Numbers that are no labels may change from read to read, and are dropped.
        """
        if classes is None:
            return replace(self, numbers=())
        labels = hash_of(classes[probe_positions(self.length)])
        return replace(self, numbers=tuple(number for number in self.numbers if number[1] == labels))

    def known(self) -> list[str]:
        """What is known of the dataset beside its length, for people to read.

        "labels" are all that the dataset offers, "some labels" those of `PROBES` samples.
        """
        named = {
            "labels": self.labels,
            "some labels": not self.labels and (self.probe or self.numbers),
            "positions": self.positions,
            "files": self.files,
            "samples": self.samples,
        }
        return [name for name, value in named.items() if value]

    def mismatch(self, other: Fingerprint, *, same_code: bool = False) -> str | None:
        """What tells `other` from this dataset, in words that start with "it" or "some"; None if nothing known does.

        Args:
            other: The other dataset.
            same_code: Whether the same code prepares both. Otherwise samples of other shapes or types may be the same
                ones, prepared for another model, and are not compared.
        """
        if other.length != self.length:
            return f"it has {other.length:,} samples, not {self.length:,}"
        differs = self._compare(other, same_code)
        if differs.get("positions"):
            return "it takes other positions of a larger dataset, or in another order, as another split does"
        if differs.get("files"):
            return "it has files of other names, or the same in another order"
        if differs.get("labels"):
            return "it has other labels, or the same in another order"
        if differs.get("samples"):
            return "some of its samples are other ones, in another order, or prepared in another way"
        return None

    def compared(self, other: Fingerprint) -> list[str]:
        """What `mismatch` compares beside lengths: some of "positions", "files", "labels" and "samples"."""
        return list(self._compare(other))

    def _compare(self, other: Fingerprint, same_code: bool = False) -> dict[str, bool]:
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
            if same_code or all(one.form == its.form for one, its in pairs):
                found["samples"] = not all(one.is_like(its) for one, its in pairs)
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
            values["samples"] = tuple(Sketch(form, text, tuple(a), tuple(b)) for form, text, a, b in values["samples"])
            values["numbers"] = tuple((path, value) for path, value in values["numbers"])
        fingerprint = cls(**values)
        types = [type(value) for value in asdict(fingerprint).values()]
        sketches = fingerprint.samples
        strings = [text for part in (*fingerprint.numbers, *(sketch[:2] for sketch in sketches)) for text in part]
        floats = [number for sketch in sketches for part in sketch[2:] for number in part]
        if (
            types != [int, str, str, str, str, tuple, str, tuple, bool]
            or not all(type(text) is str for text in strings)
            or not all(type(number) is float for number in floats)
            or not all(len(sketch.means) == len(sketch.sizes) for sketch in sketches)
        ):
            raise TypeError(f"a fingerprint is a length, hashes and means, not {values}")
        return fingerprint

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for files and checkpoints."""
        plain = {name: getattr(self, name) for name in ("length", "labels", "probe", "positions", "files", "read")}
        return {
            **plain,
            "samples": [[form, content, list(means), list(sizes)] for form, content, means, sizes in self.samples],
            "numbers": [list(number) for number in self.numbers],
            "former": self.former,
        }


def probe_positions(length: int, count: int = PROBES) -> Tensor:
    """Up to `count` evenly spaced positions of a dataset with `length` samples, int64."""
    count = min(count, length)
    return torch.arange(count) * length // max(count, 1)


def hash_of(labels: Tensor) -> str:
    """A hash of numbers and their shape."""
    values = labels.cpu().numpy()
    # Single precision, because an array of targets and the samples made of it often differ in theirs.
    values = np.ascontiguousarray(values, dtype="<f4" if labels.is_floating_point() else "<i8")
    hashed = hashlib.sha256(str(tuple(labels.shape)).encode())
    hashed.update(values.reshape(-1).view(np.uint8).data)
    return hashed.hexdigest()
