"""A look at a few samples of a loader's dataset, read where the loader reads them."""

from __future__ import annotations

import hashlib
import os
import random
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_cld.data.fingerprint import Sketch
from lightning_cld.data.generators import OwnGenerators
from lightning_cld.data.nesting import inner_datasets
from lightning_cld.data.parts import Parts, parts_of
from lightning_cld.guards import preserved_rng

LABELS = (".1", ".labels", ".label")
"""Where a sample usually has its label: second in `(input, label, ...)`, or under one of two keys."""

_TRANSFORMS = ("transform", "transforms", "target_transform")
"""Attributes of a dataset, as torchvision names them. They may begin with an underscore."""

_IN_PAIRS = 7
"""How many samples are put into batches of two, to see whether a batch keeps their order."""

_REPLAYED = 7
"""How many of the first reads are repeated from the same random states, where samples change."""


class Probed(NamedTuple):
    """What was found.

    Attributes:
        numbers: For each sample that could be read, by position, the small numbers in it that did not change.
        samples: Those that were to be read twice, without what could not be read. Empty if they changed, or if nothing
            in them can be compared.
        read: "raw" if `samples` are without the dataset's transforms, else "given"; followed by ", in part" if
            something in them can't be compared.
        changed: Positions of samples that were other ones when they were read again.
        known: Whether all of the samples that were read twice could be compared.
        moved: What shows that positions mean nothing; None if nothing does.
        on_cpu: Whether all tensors in them, and in batches of them, are in the memory of the CPU.
        reorders: Whether the collate function makes the same batch of two samples whatever their order.
    """

    numbers: list[dict[str, np.ndarray]]
    samples: tuple[Sketch, ...]
    read: str
    changed: list[int]
    known: bool
    moved: str | None
    on_cpu: bool
    reorders: bool


def probe(loader: DataLoader[Any], once: list[int], twice: list[int], few: list[int], first: int) -> Probed:
    """Reads samples, one at a time, and keeps a digest of each.

    Where the loader has workers, one worker reads them: a dataset that opens files lazily must not open them in the
    main process, from which later workers are forked. Global random states are left as they are.

    Args:
        loader: The user's loader. Only its dataset and settings are read.
        once: Positions to read, such as tell most first: where samples change, those are read again.
        twice: Those of them to read again, in reverse order.
        few: Those of these that are read without transforms too.
        first: A position that can be read for sure. A position that nobody draws may hold a broken sample.

    Raises:
        Exception: What the dataset raises if it can't give a single sample.
    """
    prober = _Prober(loader.dataset, loader.collate_fn, once, twice, few)
    # Where there is a worker it has copies of them.
    own = OwnGenerators(*(() if loader.num_workers else (loader.dataset, loader.collate_fn)))
    with preserved_rng(), own.rewound():
        found: list[Probed] = list(
            DataLoader(
                loader.dataset,
                sampler=[first],
                collate_fn=prober,
                num_workers=min(1, loader.num_workers),
                timeout=loader.timeout
                * (len(once) + len(twice) + 2 * len(few) + 4 * (_REPLAYED + _IN_PAIRS)),  # all in one batch
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
            )
        )
    return found[0]


class _Reading(NamedTuple):
    """A sample that was read.

    Attributes:
        parts: What is in it.
        batch: The digest of a batch of it alone.
        known: Whether all of both could be compared.
        on_cpu: Whether all tensors in both are in the memory of the CPU.
        raw: What is in it without transforms; None if it could not be read so.
    """

    parts: Parts
    batch: str
    known: bool
    on_cpu: bool
    raw: Parts | None


class _Prober:
    """Does the work of `probe` in the place of a collate function: there a worker has the dataset, ready for use."""

    def __init__(
        self, dataset: Dataset[Any], collate_fn: Any, once: list[int], twice: list[int], few: list[int]
    ) -> None:
        self.dataset, self.collate_fn = dataset, collate_fn
        self.once, self.twice, self.few = once, twice, few
        # Every read starts from a seed of its own, so that it can be repeated.
        self.seeds = {at: seed for seed, at in enumerate(once)}

    def __call__(self, batch: Any) -> Probed:
        if not getattr(self.dataset, "__getitems__", None):
            batch.clear()  # only the sample at hand takes memory
        own = OwnGenerators(self.dataset, self.collate_fn)
        first: dict[int, _Reading] = {}
        failures: list[Exception] = []
        for at in self.once:
            try:
                first[at] = self._read(at, self.seeds[at])
            except Exception as error:  # noqa: BLE001  # the sweep raises it, if it ever comes to this sample
                failures.append(error)
        if not first:
            raise failures[0]
        again = {at: self._read(at, len(self.seeds) + at) for at in reversed(self.twice) if at in first}
        changed = [at for at in again if first[at].batch != again[at].batch]
        samples, read = _sketches([(first[at], again[at]) for at in self.few if at in first])
        return Probed(
            numbers=_steady_numbers(first, again),
            samples=samples,
            read=read,
            changed=changed,
            known=all(first[at].known for at in again),
            moved=self._moved(first, again, own) if changed else None,
            on_cpu=all(reading.on_cpu for reading in (*first.values(), *again.values())),
            reorders=self._reorders([at for at in self.few if at in first][:_IN_PAIRS]),
        )

    def _read(self, position: int, seed: int) -> _Reading:
        _seed(seed)
        batch = _fetch(self.dataset, position)
        parts = _parts_of_batch(batch)
        digest, known, on_cpu = parts.digest, parts.known, parts.on_cpu
        if position in self.twice and self.collate_fn is not default_collate:
            try:
                of_batch = parts_of(self.collate_fn(batch))
                digest, known, on_cpu = of_batch.digest, known and of_batch.known, on_cpu and of_batch.on_cpu
            except Exception:  # noqa: BLE001  # it may want more samples; a sweep tells of any other fault
                known = False
        del batch
        raw = self._read_raw(position, parts) if position in self.few else None
        return _Reading(parts, digest, known, on_cpu, raw)

    def _reorders(self, positions: list[int]) -> bool:
        """Whether a batch of two samples is the same in either order, as of a function that sorts them."""
        if self.collate_fn is default_collate:
            return False
        try:
            return any(self._pair(one, other) == self._pair(other, one) != "" for one, other in pairwise(positions))
        except Exception:  # noqa: BLE001  # it may want more samples; a sweep tells of any other fault
            return False

    def _pair(self, *positions: int) -> str:
        """The digest of a batch of two samples; empty if they are alike, or not all in it can be compared."""
        samples: list[Any] = []
        for at in positions:
            _seed(self.seeds[at])
            samples += list(_fetch(self.dataset, at))
        if len({parts_of(sample).digest for sample in samples}) < len(positions):
            return ""
        _seed(0)
        batch = parts_of(self.collate_fn(samples))
        return batch.digest if batch.known else ""

    def _read_raw(self, position: int, given: Parts) -> Parts | None:
        try:
            # Copied only now: reading may have opened the dataset's files.
            plain, active = without_transforms(self.dataset)
            if plain is None:
                return None
            return _parts_of_batch(_fetch(plain, position)) if active else given
        except Exception:  # noqa: BLE001  # whatever a dataset raises that can't do without its transforms
            return None

    def _moved(self, first: dict[int, _Reading], again: dict[int, _Reading], own: OwnGenerators) -> str | None:
        """What shows that positions mean nothing, where samples change; None if nothing does."""
        start = list(first)[:_REPLAYED]
        before = [first[at].parts.digest for at in start]

        def replay(positions: list[int]) -> list[str]:
            """Reads from the random states of the first reads."""
            with own.rewound():
                return [self._read(at, self.seeds[of]).parts.digest for at, of in zip(positions, start, strict=True)]

        if replay(start) == before:  # chance alone changes samples
            if len(set(before)) > 1 and replay(start[:1] * len(start)) == before:
                return f"position {start[0]} gave the samples of others when it was read from the same random states"
            return None
        places = {reading.parts.digest: at for at, reading in first.items()}
        for at, reading in again.items():
            for path in LABELS:
                was, now = (found.parts.numbers.get(path) for found in (first[at], reading))
                if was is not None and now is not None and was.size == now.size == 1 and was != now:
                    return f"the label of the sample at position {at} was {was.item()} and then {now.item()}"
            elsewhere = places.get(reading.parts.digest, at)
            if elsewhere != at and len(places) == len(first):
                return f"the sample at position {at} was the one at position {elsewhere} before"
        return None


def _steady_numbers(first: dict[int, _Reading], again: dict[int, _Reading]) -> list[dict[str, np.ndarray]]:
    """The small numbers in each sample, by position, without those that change in any of the samples."""
    pairs = [(first[at].parts.numbers, again[at].parts.numbers) for at in again]
    moving = {
        path
        for own, its in pairs
        for path in own
        if path not in its or not np.array_equal(own[path], its[path], equal_nan=True)
    }
    found = [first[at].parts.numbers for at in sorted(first)]
    return [{path: number for path, number in numbers.items() if path not in moving} for numbers in found]


def _sketches(readings: list[tuple[_Reading, _Reading]]) -> tuple[tuple[Sketch, ...], str]:
    """The sketches of samples that were read twice, and whether these are "raw" or "given"; none if they changed."""
    raw = [(first.raw, again.raw) for first, again in readings if first.raw is not None and again.raw is not None]
    if any(_is_number(one) for one, _ in raw):  # by which a transform reads the sample
        raw = []
    given = [(first.parts, again.parts) for first, again in readings]
    pairs, read = (raw, "raw") if len(raw) == len(given) else (given, "given")
    sketches = _with_paths([one for one, _ in pairs])
    known = all(one.known for one, _ in pairs)
    if not (known or len(set(sketches)) > 1) or any(one.digest != other.digest for one, other in pairs):
        return (), ""
    return sketches, read if known else f"{read}, in part"


def _is_number(sample: Parts) -> bool:
    """Whether a sample is a single number."""
    return not sample.paths and sample.numbers.keys() == {""} and sample.numbers[""].size == 1


def _with_paths(samples: list[Parts]) -> tuple[Sketch, ...]:
    """The sketches of samples, with the paths in them from the folder on that all have in common.

    On another machine that folder may stand elsewhere.
    """
    paths = [path for parts in samples for path in parts.paths]
    common = os.path.commonprefix([min(paths), max(paths)]).rfind(os.sep) + 1 if paths else 0  # noqa: RUF071  # as in origin.py
    sketches = []
    for parts in samples:
        own = "\0".join(path[common:] for path in parts.paths)
        content = hashlib.sha256(f"{parts.sketch.content}{own}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
        sketches.append(parts.sketch._replace(content=content) if parts.paths else parts.sketch)
    return tuple(sketches)


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


def _seed(seed: int) -> None:
    """Seeds the generators that datasets draw from, in a worker or where they are put back afterwards."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # datasets draw from numpy's global state
    torch.default_generator.manual_seed(seed)


def without_transforms(dataset: Any, above: tuple[int, ...] = ()) -> tuple[Any, bool]:
    """A shallow copy of a dataset without its transforms and those of datasets within, and whether it has any.

    The copy is None if the dataset is not made to have transforms.
    """
    if hasattr(type(dataset), "with_format"):  # of Hugging Face
        return dataset.with_format(None), dataset.format["type"] is not None
    own = getattr(dataset, "__dict__", {})
    transforms = {name: value for name, value in own.items() if name.strip("_") in _TRANSFORMS}
    changes: dict[str, Any] = {name: _unchanged if callable(value) else value for name, value in transforms.items()}
    active = _unchanged in changes.values()
    for name, inner in [] if id(dataset) in above else inner_datasets(dataset):
        found = [without_transforms(part, (*above, id(dataset))) for part in inner]
        if any(plain is not None for plain, _ in found):
            plain = [part if bare is None else bare for part, (bare, _) in zip(inner, found, strict=True)]
            changes[name] = plain if isinstance(own[name], (list, tuple)) else plain[0]
            active = active or any(has for _, has in found)
    if not changes:
        return None, False
    copied = object.__new__(type(dataset))  # which runs no code of the dataset's
    vars(copied).update(own, **changes)
    return copied, active


def _unchanged(*given: Any, **named: Any) -> Any:
    """Stands in for a transform, whether it is called with a sample, with its parts, or with named parts."""
    return named or (given[0] if len(given) == 1 else given)
