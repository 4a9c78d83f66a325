"""Which dataset a loader reads, and whether it is the one that was scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_cld.data.fingerprint import Fingerprint, hash_of, probe_positions
from lightning_cld.data.labels import labels_of
from lightning_cld.data.loaders import sampled_positions
from lightning_cld.data.nesting import flat
from lightning_cld.data.origin import hash_of_files, hash_of_positions
from lightning_cld.data.probing import LABELS, probe
from lightning_cld.guards import preserved_rng

_FEW = 6
"""Samples that are read twice and kept as sketches: so many or a few more, evenly spaced."""


class Look(NamedTuple):
    """What a look at a dataset found.

    Attributes:
        fingerprint: Which dataset it is.
        changes: Whether a sample is another one when it is read twice, as with random augmentation.
        on_cpu: Whether its samples are in the memory of the CPU.
        reorders: Whether the loader's collate function brings the samples of a batch into an order of its own.
    """

    fingerprint: Fingerprint
    changes: Literal["yes", "no", "unknown"]
    on_cpu: bool
    reorders: bool = False


def look_at(loader: DataLoader[Any], kind: str) -> Look:
    """Looks at a loader's dataset: it reads a few samples, one at a time, and keeps a digest of each.

    Global random states, and the dataset's own in the main process, are left as they are.

    Args:
        loader: The user's loader. Only its dataset and settings are read.
        kind: "train" or "val", for errors.

    Raises:
        ValueError: If the sample at a position depends on what was read before.
        Exception: What the dataset raises if it can't give a single sample.
    """
    offered = offered_by(loader.dataset)
    drawn = sampled_positions(loader)
    if len(drawn) == 0:
        return Look(offered, "no", on_cpu=True)
    probes = probe_positions(offered.length).tolist()
    few = probes[:: max(1, len(probes) // _FEW)]
    # Workers can be kept only if no sample ever changes: then all probes are read twice.
    twice = probes if loader.persistent_workers else few
    once = twice if offered.labels else probes
    once = [*few, *(position for position in once if position not in few)]
    found = probe(loader, once, twice, few, int(drawn[0]))
    if found.moved is not None:
        name = type(loader.dataset).__name__
        raise ValueError(
            f"{name}, the {kind} dataset, does not give the same sample for the same position: {found.moved}. A "
            "dataset that ignores its index, such as a queue, has no samples to score or select: use the dataset that "
            "it draws from. If it gives labels at random, give a view of it that does not."
        )
    numbers = {} if offered.labels or len(found.numbers) < len(probes) else _stacked(found.numbers)
    usual = next((numbers[path] for path in LABELS if path in numbers), None)
    fingerprint = replace(
        offered,
        probe=offered.probe if usual is None else hash_of(usual),
        samples=found.samples,
        read=found.read,
        numbers=tuple((path, hash_of(n.flatten().long())) for path, n in numbers.items() if _may_be_classes(n)),
    )
    return Look(
        fingerprint, "yes" if found.changed else "no" if found.known else "unknown", found.on_cpu, found.reorders
    )


def offered_by(dataset: Dataset[Any]) -> Fingerprint:
    """What a dataset says of itself without reading samples: length, labels, positions and file names."""
    found = flat(dataset)
    labels = labels_of(found)
    length = len(dataset)  # type: ignore[arg-type]  # map-style, as checked
    known = Fingerprint(length) if labels is None else Fingerprint.of_labels(labels)
    return replace(known, positions=hash_of_positions(found), files=hash_of_files(found))


def with_view(given: Fingerprint, view: Fingerprint) -> Fingerprint:
    """The fingerprint of a train set, whose samples are those that an un-augmented view of it shows."""
    return replace(given, samples=view.samples, read=view.read)


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
    if make_view is not None and scored.samples and "samples" not in scored.compared(served):
        with preserved_rng():
            view = make_view()
        if isinstance(view, DataLoader):
            served = with_view(served, look_at(view, "train").fingerprint)
    problem, compared = scored.mismatch(served), scored.compared(served)
    # Positions without a gap are those of many splits.
    telling = {"files"} | ({"positions"} if "-" not in scored.positions else set())
    alike = len(scored.samples) > 1 and len(set(scored.samples)) == 1  # as those of another dataset may be
    if not alike and not scored.read.endswith("in part"):
        telling.add("samples")
    if problem is not None or telling & set(compared):
        return Comparison(problem, None)
    what = "the length and the labels" if "labels" in compared else "the length"
    why = ""
    if scored.former:
        why = " The scores are from an earlier version, which saved no more."
    elif scored.samples and served.samples:
        why = (
            " What can be compared of these is alike in all of them."
            if alike
            else " Something in these is of a type that can't be compared."
            if "samples" in compared
            else " These have other shapes or types than those that were scored."
        )
    return Comparison(
        None,
        f"CLD could compare only {what} of the train set with the scored one, not its samples.{why} Make sure that it "
        "has the same samples in the same order: seed what splits it.",
    )


def _stacked(samples: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """The small numbers that all samples have in one shape, by the path to them."""
    stacked = {}
    for path in sorted(set.intersection(*map(set, samples))):
        values = [numbers[path] for numbers in samples]
        if len({value.shape for value in values}) == 1:
            stacked[path] = torch.from_numpy(np.stack(values))
    return stacked


def _may_be_classes(numbers: Tensor) -> bool:
    """Whether these are whole numbers, one a sample."""
    return numbers.numel() == len(numbers) and bool((numbers == numbers.round()).all())
