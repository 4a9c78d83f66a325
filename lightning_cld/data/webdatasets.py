"""webdataset's pipelines, filtered where samples are still undecoded bytes."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch.utils.data import DataLoader

from lightning_cld.data.gate import Gate
from lightning_cld.data.narrowing import made_again

_MAKE_SAMPLES = ("group_by_keys", "tarfile_samples", "check_empty")
"""The stages that make samples of files. The last one only checks that there are some, so it must not miss any."""


def is_pipeline(thing: Any) -> bool:
    """Whether a dataset or loader is one of webdataset's pipelines, which a `WebLoader` is too."""
    module = sys.modules.get("webdataset")  # it is there if the user has a pipeline
    return module is not None and isinstance(thing, module.DataPipeline)


def sample_key(sample: Any) -> Any:
    """The name of a sample in webdataset: its path in the shard without the extension."""
    return sample["__key__"]


def filtered(pipeline: Any, gate: Gate | None) -> Any:
    """A copy of a pipeline that passes on only the samples that the gate lets pass, once each.

    Epochs that were set with `with_epoch` or `repeat` are undone.

    Args:
        pipeline: For which `is_pipeline` is true.
        gate: Gets samples as they are in the shards, in the workers. None for a copy without a filter.

    Returns:
        The copy, or None if no stage is known to make samples.
    """
    copied = copy.copy(pipeline)
    copied.pipeline = stages = list(pipeline.pipeline)
    copied.repetitions, copied.nsamples = 1, -1
    first = stages[0] if stages else None
    if isinstance(first, DataLoader) and is_pipeline(first.dataset):
        inner = filtered(first.dataset, gate)
        if inner is None:
            return None
        stages[0] = made_again(first, inner, batch_size=first.batch_size, drop_last=first.drop_last)
        return copied
    places = [place for place, stage in enumerate(stages) if _name(stage) in _MAKE_SAMPLES]
    if places:
        if gate is not None:
            stages.insert(places[-1] + 1, sys.modules["webdataset"].filters.select(gate))
        return copied
    if is_pipeline(first):
        stages[0] = filtered(first, gate)
        return copied if stages[0] is not None else None
    return None


def workers_of(loader: Any) -> int:
    """The number of workers that read a pipeline's shards."""
    if isinstance(loader, DataLoader):
        return loader.num_workers
    first = loader.pipeline[0] if loader.pipeline else None
    return workers_of(first) if isinstance(first, DataLoader) or is_pipeline(first) else 0


def only_loader(loader: Any) -> Any:
    """The DataLoader in a `WebLoader` that has no stage behind it; any other loader as it is."""
    if is_pipeline(loader) and len(loader.pipeline) == 1 and isinstance(loader.pipeline[0], DataLoader):
        return loader.pipeline[0]
    return loader


def own_length(loader: Any) -> int | None:
    """How many batches an epoch of a loader has that makes its own, if the user said so; else None."""
    if isinstance(loader, DataLoader):
        in_each = own_length(loader.dataset)
        if in_each is None:
            return None
        # With workers, each of them has an epoch of its own. A length is that of all.
        return in_each if hasattr(loader.dataset, "__len__") else in_each * max(1, loader.num_workers)
    if hasattr(loader, "__len__"):
        return len(loader)
    return loader.nsamples if loader.repetitions > 1 and loader.nsamples > 0 else None


def _name(stage: Any) -> str:
    """The name of the function that a stage calls."""
    return str(getattr(getattr(stage, "f", stage), "__name__", ""))
