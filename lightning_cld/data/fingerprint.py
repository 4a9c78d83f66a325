"""Which dataset is this? Its length and labels, without reading samples where that can be avoided."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_cld.data.indexed import IndexedDataset

PROBES = 64
"""Samples compared where a dataset does not offer its labels."""


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a dataset, as far as it was learned.

    Labels are here any targets, the numbers of a regression too.

    Args:
        length: Number of samples.
        labels: Hash of all labels in order; empty if they could not be read without reading every sample.
        probe: Hash of the labels at `probe_positions(length)`; empty if unknown.

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

    @classmethod
    def of_labels(cls, labels: Tensor) -> Fingerprint:
        """The fingerprint of a dataset with these labels, `[N, ...]`."""
        return cls(len(labels), _hash(labels), _hash(labels[probe_positions(len(labels))]))

    @classmethod
    def of_probe(cls, length: int, probed: Tensor | None) -> Fingerprint:
        """The fingerprint of a dataset whose labels are known at `probe_positions(length)`, or not at all."""
        return cls(length, probe=_hash(probed) if probed is not None else "")

    def mismatch(self, other: Fingerprint) -> str | None:
        """What tells `other` from this dataset, in words that start with "it"; None if nothing known does."""
        if other.length != self.length:
            return f"it has {other.length:,} samples, not {self.length:,}"
        if self.labels and other.labels:
            differs = self.labels != other.labels
        else:
            differs = self.shares_labels(other) and self.probe != other.probe
        return "it has other labels, or the same in another order" if differs else None

    def shares_labels(self, other: Fingerprint) -> bool:
        """Whether `mismatch` compares more than lengths: both know all labels, or those at the same positions."""
        return bool((self.labels and other.labels) or (self.probe and other.probe))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """The inverse of `to_dict`.

        Raises:
            TypeError: If a value is missing, unknown or of another type.
        """
        fingerprint = cls(**values)
        types = [type(value) for value in fingerprint.to_dict().values()]
        if types != [int, str, str]:
            raise TypeError(f"a fingerprint is a length and two hashes, not {dict(values)}")
        return fingerprint

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for files and checkpoints."""
        return asdict(self)


def probe_positions(length: int) -> Tensor:
    """Up to `PROBES` evenly spaced positions of a dataset with `length` samples, int64."""
    count = min(PROBES, length)
    return torch.arange(count) * length // max(count, 1)


def dataset_labels(dataset: Dataset[Any]) -> Tensor | None:
    """The labels that a dataset offers without reading its samples: numbers `[N, ...]` on the CPU, or None.

    Looks for `targets`, then `labels`, at a `TensorDataset`'s second tensor, and through `Subset`, `ConcatDataset`
    and `IndexedDataset`.

    Example:
        >>> import torch
        >>> from torch.utils.data import Subset, TensorDataset
        >>> pool = TensorDataset(torch.rand(4, 2), torch.tensor([5, 6, 7, 8]))
        >>> dataset_labels(Subset(pool, [3, 1]))
        tensor([8, 6])
    """
    if isinstance(dataset, Subset):
        labels = dataset_labels(dataset.dataset)
        return labels[torch.as_tensor(dataset.indices, dtype=torch.int64)] if labels is not None else None
    if isinstance(dataset, IndexedDataset):
        return dataset_labels(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        parts: list[Tensor] = []
        for part in dataset.datasets:
            part_labels = dataset_labels(part)
            if part_labels is None:
                return None
            parts.append(part_labels)
        return torch.cat(parts)
    if isinstance(dataset, TensorDataset):
        candidates: list[Any] = list(dataset.tensors[1:2])
    else:
        candidates = [_attribute(dataset, name) for name in ("targets", "labels")]
    for candidate in candidates:
        labels = as_labels(candidate)
        if labels is not None and len(labels) == len(dataset):  # type: ignore[arg-type]  # map-style has a length
            return labels
    return None


def as_labels(values: Any) -> Tensor | None:
    """`values` as int64 or float64 on the CPU if they are numbers, one or several a sample; else None."""
    try:
        labels = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.ndim == 0 or labels.is_complex():
        return None
    return labels.double() if labels.is_floating_point() else labels.long()


def _attribute(dataset: Dataset[Any], name: str) -> Any:
    try:
        return getattr(dataset, name, None)
    except Exception:  # noqa: BLE001  # a property that can't be read, for whatever reason, offers no labels
        return None


def _hash(labels: Tensor) -> str:
    values = labels.cpu().numpy()
    # Single precision, since an array of targets and the samples made of it often differ in theirs.
    kind = "<f4" if labels.is_floating_point() else "<i8"
    return hashlib.sha256(str(values.shape).encode() + values.astype(kind).tobytes()).hexdigest()
