"""Which dataset a loader reads: its positions, file names and labels, and a look at a few of its samples."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate

from lightning_cld.data.fingerprint import Fingerprint, hash_of, probe_positions
from lightning_cld.data.generators import OwnGenerators
from lightning_cld.data.indexed import IndexedDataset
from lightning_cld.data.labels import attribute_of, dataset_labels
from lightning_cld.data.parts import Parts, parts_of
from lightning_cld.guards import preserved_rng

_FEW = 6
"""Samples that are read twice and whose digests are kept: so many or a few more, evenly spaced."""

_TRANSFORMS = ("transform", "transforms", "target_transform")
"""Attributes of a dataset, as torchvision names them, that may be None."""

_FILES = ("samples", "imgs", "files")
"""Attributes of a dataset that hold file names, or tuples that begin with one, as torchvision names them."""

_LABELS = (".1", ".labels", ".label")
"""Where a sample usually has its label: second in `(input, label, ...)`, or under one of two keys."""


class Look(NamedTuple):
    """What a look at a dataset found.

    Attributes:
        fingerprint: Which dataset it is.
        changes: Whether a sample is another one when it is read twice, as with random augmentation.
    """

    fingerprint: Fingerprint
    changes: Literal["yes", "no", "unknown"]


def look_at(loader: DataLoader[Any], kind: str) -> Look:
    """Looks at a loader's dataset: it reads a few samples, one at a time, and keeps a digest of each.

    Where the loader has workers, one worker reads them: a dataset that opens files lazily must not open them in the
    main process, from which later workers are forked. Global random states are left as they are.

    Args:
        loader: The user's loader. Only its dataset and settings are read.
        kind: "train" or "val", for errors.

    Raises:
        ValueError: If the sample at a position depends on what was read before.
    """
    dataset = loader.dataset
    length = len(dataset)  # type: ignore[arg-type]  # map-style, as checked
    offered = offered_by(dataset)
    probes = probe_positions(length).tolist()
    few = probes[:: max(1, len(probes) // _FEW)]
    # Workers can be kept only if no sample ever changes: then all probes are read twice.
    twice = probes if loader.persistent_workers else few
    once = twice if offered.labels else probes
    plain, has_transforms = _without_transforms(dataset)
    bare = few if has_transforms else []
    found = iter(_read(loader, plain, [*once, *twice[::-1]], [*bare, *bare[::-1]]))
    first, again, without, anew = ({at: next(found) for at in part} for part in (once, twice[::-1], bare, bare[::-1]))
    _check_order(dataset, first, again, kind)

    changes: Literal["yes", "no", "unknown"] = "no"
    if any(first[at].batch != again[at].batch for at in twice):
        changes = "yes"
    elif not all(first[at].parts.known for at in twice):
        changes = "unknown"
    read = "given" if plain is None else "raw"
    if any(reading.failed for reading in without.values()):  # it can't do without its transforms
        read, bare = "given", []
    one, other = (without, anew) if bare else (first, again)
    stable = bool(few) and all(one[at].parts.digest == other[at].parts.digest for at in few)

    numbers = {} if offered.labels else _numbers([first[at].parts for at in probes])
    usual = next((numbers[path] for path in _LABELS if path in numbers), None)
    fingerprint = replace(
        offered,
        probe=offered.probe if usual is None else hash_of(usual),
        samples=tuple(one[at].parts.form + one[at].parts.digest for at in few) if stable else (),
        read=read if stable else "",
        numbers=tuple((path, hash_of(values)) for path, values in numbers.items()),
    )
    return Look(fingerprint, changes)


def offered_by(dataset: Dataset[Any]) -> Fingerprint:
    """What a dataset says of itself without reading samples: length, labels, positions and file names."""
    labels = dataset_labels(dataset)
    return replace(
        Fingerprint(len(dataset)) if labels is None else Fingerprint.of_labels(labels),  # type: ignore[arg-type]  # map-style
        positions=_hash_of_positions(dataset),
        files=_hash_of_files(dataset),
    )


def with_view(given: Fingerprint, view: Fingerprint) -> Fingerprint:
    """The fingerprint of a train set, its samples compared as an un-augmented view of it shows them if need be."""
    if given.samples or not view.samples:
        return given
    return replace(given, samples=view.samples, read="raw" if view.read == "raw" else "view")


class Comparison(NamedTuple):
    """How a dataset compares with the one that was scored.

    Attributes:
        problem: What tells them apart, in words that start with "it"; None if nothing known does.
        doubt: What could not be compared, as a sentence; None if the samples themselves were compared.
    """

    problem: str | None
    doubt: str | None


def compare(scored: Fingerprint, loader: DataLoader[Any], make_view: Callable[[], Any] | None = None) -> Comparison:
    """Compares the dataset of a train loader with the one that was scored.

    Args:
        scored: The identity of the dataset that was scored.
        loader: A loader over the dataset to compare.
        make_view: Makes a loader over an un-augmented view of it. It is called where the samples can only be compared
            with such a view.

    Raises:
        ValueError: As `look_at`.
    """
    served = look_at(loader, "train").fingerprint
    if make_view is not None and scored.samples and scored.read != "given" and not served.samples:
        with preserved_rng():
            view = make_view()
        if isinstance(view, DataLoader):
            served = with_view(served, look_at(view, "train").fingerprint)
    problem, compared = scored.mismatch(served), scored.compared(served)
    if problem is not None or {"positions", "files", "samples"} & set(compared):
        return Comparison(problem, None)
    what = "the length and the labels" if compared else "the length"
    why = " The scores are from an earlier version, which saved no more." if scored.former else ""
    return Comparison(
        None,
        f"CLD could compare only {what} of the train set with the scored one, not its samples.{why} Make sure that it "
        "has the same samples in the same order: seed what splits it.",
    )


# Reading samples


class _Reading(NamedTuple):
    """A sample that was read, the digest of the batch that the loader makes of it alone, and whether that failed."""

    parts: Parts
    batch: str = ""
    failed: bool = False


class _Reader(Dataset[_Reading]):
    """Reads samples at (whether without transforms, position), and keeps so little that a worker sends nothing large.

    Other attributes than its own are those of the dataset, for which a `worker_init_fn` may look.
    """

    def __init__(self, dataset: Dataset[Any], plain: Dataset[Any] | None, collate_fn: Any) -> None:
        self.dataset, self.plain, self.collate_fn = dataset, plain, collate_fn

    def __getitem__(self, read: tuple[bool, int]) -> _Reading:
        is_plain, position = read
        if is_plain:
            try:
                return _Reading(_parts_of_batch(_fetch(self.plain, position)))
            except Exception:  # noqa: BLE001  # whatever a dataset raises that needs its transforms
                return _Reading(parts_of(None), failed=True)
        batch = _fetch(self.dataset, position)
        parts = _parts_of_batch(batch)
        if self.collate_fn is default_collate:
            return _Reading(parts, parts.digest)
        try:
            return _Reading(parts, parts_of(self.collate_fn(batch)).digest)
        except Exception:  # noqa: BLE001  # one that wants more samples; a sweep tells of any other fault
            return _Reading(parts, parts.digest)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in vars(self):
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _read(
    loader: DataLoader[Any], plain: Dataset[Any] | None, positions: list[int], plain_positions: list[int]
) -> list[_Reading]:
    reads = [*((False, position) for position in positions), *((True, position) for position in plain_positions)]
    # Where there is a worker it has copies of them.
    own = OwnGenerators(*(() if loader.num_workers else (loader.dataset, loader.collate_fn)))
    with preserved_rng(), own.rewound():
        return list(
            DataLoader(
                _Reader(loader.dataset, plain, loader.collate_fn),
                batch_size=None,
                sampler=reads,
                collate_fn=_unchanged,
                num_workers=min(1, loader.num_workers),
                timeout=loader.timeout,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
            )
        )


def _fetch(dataset: Any, position: int) -> Any:
    """One sample as a DataLoader fetches it: in a list, or in a batch that the dataset makes itself."""
    if getattr(dataset, "__getitems__", None):
        return dataset.__getitems__([position])
    return [dataset[position]]


def _parts_of_batch(batch: Any) -> Parts:
    """The parts of the only sample in a batch."""
    if isinstance(batch, list) and len(batch) == 1:
        return parts_of(batch[0])
    parts = parts_of(batch)
    return parts._replace(numbers={path: n[0] if n.ndim and len(n) == 1 else n for path, n in parts.numbers.items()})


def _unchanged(reading: Any) -> Any:
    return reading


def _without_transforms(dataset: Dataset[Any]) -> tuple[Dataset[Any] | None, bool]:
    """A shallow copy of a dataset without transforms, and whether it has any; None if it is not made to have them."""
    try:
        copied: Any = copy.copy(dataset)
        known = active = False
        for name in _TRANSFORMS:
            if name in vars(copied):
                known = True
                active = active or getattr(copied, name) is not None
                setattr(copied, name, None)
        for name in ("dataset", "datasets"):
            inner = vars(copied).get(name)
            parts = inner if isinstance(inner, (list, tuple)) else [inner]
            if not parts or not all(isinstance(part, Dataset) for part in parts):
                continue
            plain = [_without_transforms(part) for part in parts]
            if any(part is None for part, _ in plain):
                return None, False
            known, active = True, active or any(has for _, has in plain)
            made = [part for part, _ in plain]
            setattr(copied, name, made if isinstance(inner, (list, tuple)) else made[0])
    except Exception:  # noqa: BLE001  # a dataset that can't be copied, or whose attributes can't be set
        return None, False
    return (copied, active) if known else (None, False)


def _check_order(dataset: Dataset[Any], first: dict[int, _Reading], again: dict[int, _Reading], kind: str) -> None:
    """Raises if a sample's label, or the sample itself, moved to another position when positions came in reverse."""
    moved = None
    places = {reading.parts.digest: at for at, reading in first.items()}
    distinct = len(places) == len(first)
    for at, reading in again.items():
        for path in _LABELS:
            before, now = (found.parts.numbers.get(path) for found in (first[at], reading))
            if before is not None and now is not None and not before.is_floating_point() and not now.equal(before):
                moved = f"the label of the sample at position {at} was {before.tolist()} and then {now.tolist()}"
        elsewhere = places.get(reading.parts.digest, at)
        if distinct and elsewhere != at:
            moved = f"the sample at position {at} was the one at position {elsewhere} before"
    if moved is not None:
        raise ValueError(
            f"{type(dataset).__name__}, the {kind} dataset, does not give the same sample for the same position: read "
            f"again in another order, {moved}. A dataset that ignores its index, such as a queue, has no samples to "
            "score or select: use the dataset that it draws from. If it mixes labels at random, give a view of it that "
            "does not."
        )


def _numbers(samples: Sequence[Parts]) -> dict[str, Tensor]:
    """The small numbers that all samples have in one shape, stacked, by the path to them."""
    shared = set.intersection(*(set(parts.numbers) for parts in samples)) if samples else set()
    found = {}
    for path in sorted(shared):
        values = [parts.numbers[path] for parts in samples]
        if len({value.shape for value in values}) == 1:
            found[path] = torch.stack([value.double() if values[0].is_floating_point() else value for value in values])
    return found


# Positions and file names


def _hash_of_positions(dataset: Dataset[Any]) -> str:
    """The length of the datasets that `Subset`s take their samples from, and a hash of the positions in them."""
    found = _root_positions(dataset)
    return "" if found is None else f"{found[0]}:{hash_of(found[1])}"


def _root_positions(dataset: Any) -> tuple[int, Tensor] | None:
    """How many samples are below all `Subset`s, and which of them are here, int64 `[N]`; None without a `Subset`."""
    if isinstance(dataset, IndexedDataset):
        return _root_positions(dataset.dataset)
    if isinstance(dataset, Subset):
        positions = torch.as_tensor(dataset.indices, dtype=torch.int64)
        below = _root_positions(dataset.dataset)
        return (len(dataset.dataset), positions) if below is None else (below[0], below[1][positions])  # type: ignore[arg-type]  # map-style
    if isinstance(dataset, ConcatDataset):
        found = [_root_positions(part) for part in dataset.datasets]
        if all(part is None for part in found):
            return None
        offset, parts = 0, []
        for part, below in zip(dataset.datasets, found, strict=True):
            length, own = below or (len(part), torch.arange(len(part)))  # type: ignore[arg-type]  # map-style
            parts.append(offset + own)
            offset += length
        return offset, torch.cat(parts)
    return None


def _hash_of_files(dataset: Dataset[Any]) -> str:
    names = file_names(dataset, relative=True)
    if not names:
        return ""
    hashed = hashlib.sha256()
    for start in range(0, len(names), 2**16):  # so that there is no second copy of all names
        hashed.update("\0".join(names[start : start + 2**16]).encode("utf-8", "surrogateescape") + b"\0")
    return hashed.hexdigest()


def file_names(dataset: Any, *, relative: bool = False) -> list[str] | None:
    """The name of each sample's file, where a dataset lists them as torchvision's folder datasets do; else None.

    Args:
        dataset: A map-style dataset. `Subset`, `ConcatDataset` and `IndexedDataset` are looked through.
        relative: Whether names start at the common folder of all files, so that they are the same on every machine.
    """
    if isinstance(dataset, IndexedDataset):
        return file_names(dataset.dataset, relative=relative)
    if isinstance(dataset, Subset):
        names = file_names(dataset.dataset, relative=relative)
        return None if names is None else [names[position] for position in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [file_names(part, relative=relative) for part in dataset.datasets]
        return None if None in parts else [name for part in parts for name in part or ()]
    for attribute in _FILES:
        listed = attribute_of(dataset, attribute)
        if not isinstance(listed, (list, tuple)) or len(listed) != len(dataset) or not listed:
            continue
        try:
            names = [os.fsdecode(entry[0] if isinstance(entry, (list, tuple)) else entry) for entry in listed]
            folder = len(os.path.commonpath([min(names), max(names)]))  # all names lie between these two
        except (TypeError, IndexError, ValueError):  # they are no file names, or not all of one kind
            continue
        return [name[folder:] for name in names] if relative else names
    return None
