"""Which data a run is watched on: the callback's arguments, the `cld_*` methods, or the Trainer's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cld.data.fingerprint import Fingerprint
from lightning_cld.data.identity import Look, look_at, with_view
from lightning_cld.data.loaders import (
    changes_on_device,
    check_drawn,
    check_loader,
    reads_in_its_own_way,
    sampled_positions,
    unknown_sampler,
)
from lightning_cld.data.stream_loader import StreamLoader
from lightning_cld.guards import preserved_rng
from lightning_cld.recording.stream_reading import Seen
from lightning_cld.recording.stream_sweep import StreamSweep
from lightning_cld.recording.streams import Readings, dataset_of, readings_of_run, stream_in
from lightning_cld.recording.sweep import Sweep

_VIEW = (
    "train_dataloader=... of CLDCallback or trajectories_from_checkpoints, or cld_train_dataloader() on the datamodule "
    "or on a module that brings its own loaders"
)
_REFERENCE = (
    "CLD scores against validation losses: give the Trainer a validation dataloader, pass val_dataloader=... to "
    "CLDCallback or trajectories_from_checkpoints, or define cld_val_dataloader() on the datamodule. Not the test set: "
    "its accuracy would no longer mean anything (lightning_cld.proportional_holdout splits one off the train set)."
)


class Sources(NamedTuple):
    """What a run is watched on.

    Attributes:
        train: The sweep over the train set, or over its un-augmented view.
        val: The sweep over the validation set.
        fingerprint: The identity of the train set that the Trainer holds; None for a stream.
        val_fingerprint: The identity of the validation set; None for a stream.
        own_val: Whether that is the set that the run itself validates on.
        augmented: Whether samples of the train set look different from read to read. Of a stream the first sweep tells.
    """

    train: Sweep | StreamSweep
    val: Sweep | StreamSweep
    fingerprint: Fingerprint | None
    val_fingerprint: Fingerprint | None
    own_val: bool
    augmented: bool

    @property
    def is_known(self) -> bool:
        """Whether it is known how many samples there are. Of streams it is after the first sweep."""
        return not any(isinstance(sweep, StreamSweep) and sweep.seen is None for sweep in (self.train, self.val))


def find_sources(
    trainer: Trainer,
    train_dataloader: Any,
    val_dataloader: Any,
    batch_size: int | None,
    num_samples: int | None = None,
    seen: Mapping[str, Seen] | None = None,
    before: Sources | None = None,
) -> Sources:
    """Finds what a run is watched on.

    Args:
        trainer: The Trainer of the fit.
        train_dataloader: As in `CLDCallback`.
        val_dataloader: As in `CLDCallback`.
        batch_size: As in `CLDCallback`.
        num_samples: As in `CLDCallback`.
        seen: What earlier sweeps over streams saw, by "train" and "val"; None if there were none.
        before: What this fit was watched on until its data were loaded anew; None at its start. Streams are kept.

    Raises:
        TypeError: If a loader can't be read.
        ValueError: If there is none or are several, if the un-augmented view is of other data than the train set, or if
            the positions of a dataset mean nothing.
    """
    seen = seen or {}
    view = train_dataloader
    if view is None:
        view = _from_run(trainer, "cld_train_dataloader")
    given = trainer.train_dataloader if view is None else view
    stream = stream_in(given)
    if isinstance(stream, StreamLoader):
        raise TypeError(
            "The train loader serves a coreset of a stream, and CLD scores a stream in full. Train the proxy on the "
            "full stream, or leave the callback out."
        )
    if stream is not None:
        train: Sweep | StreamSweep = _stream_sweep(
            trainer, stream, "train", seen, before and before.train, own=view is None, num_samples=num_samples
        )
        fingerprint, augmented = None, False
    else:
        train, fingerprint, augmented = _map_style_train(trainer, view, batch_size)
        if num_samples is not None and num_samples != train.length:
            raise ValueError(
                f"num_samples={num_samples:,}, but the train set has {train.length:,} samples. Only streams need it: "
                "leave it out."
            )
    reference = val_dataloader
    if reference is None:
        reference = _from_run(trainer, "cld_val_dataloader")
    own_val = reference is None
    if reference is None:
        reference = _trainer_val_dataloader(trainer)
    if reference is None or (isinstance(reference, (list, tuple, dict)) and len(reference) == 0):
        raise ValueError(f"There is no validation data. {_REFERENCE}")
    stream = stream_in(reference)
    if stream is not None:
        val = _stream_sweep(trainer, stream, "val", seen, before and before.val, own=own_val)
        return Sources(train, val, fingerprint, None, own_val=own_val, augmented=augmented)
    reference = check_loader(reference, "val")
    if len(sampled_positions(reference)) == 0:
        raise ValueError(f"The validation set is empty. {_REFERENCE}")
    check_drawn(reference, "val")
    look = look_at(reference, "val")
    _warn_of_unknown_validation_sampler(reference)
    return Sources(
        train,
        _sweep(reference, sampled_positions(reference), look, batch_size, "val"),
        fingerprint,
        look.fingerprint.of_classes(None),
        own_val=own_val,
        augmented=augmented,
    )


def _map_style_train(trainer: Trainer, view: Any, batch_size: int | None) -> tuple[Sweep, Fingerprint, bool]:
    """The sweep over a map-style train set, its identity, and whether its samples change from read to read."""
    if view is None:
        given = view = check_loader(trainer.train_dataloader, "train")
        check_drawn(given, "train")
        look = look_at(given, "train")
        fingerprint = look.fingerprint
    else:
        view = check_loader(view, "train")
        look = look_at(view, "train")
        given, fingerprint = _viewed(trainer.train_dataloader, view, look.fingerprint)
    if len(sampled_positions(given)) == 0:
        raise ValueError("The train dataloader draws no samples. Are all weights of its sampler zero?")
    train = _sweep(view, sampled_positions(given), look, batch_size, "train")
    augmented = look.changes != "unknown" and not train.fixed
    _warn_of_surprises(given, view, augmented=augmented)
    return train, fingerprint, augmented


def _stream_sweep(
    trainer: Trainer,
    stream: Any,
    kind: str,
    seen: Mapping[str, Seen],
    before: Sweep | StreamSweep | None,
    *,
    own: bool,
    num_samples: int | None = None,
) -> StreamSweep:
    """The sweep over a stream, which is the run's own or was given for the sweeps alone."""
    if isinstance(before, StreamSweep):
        return before
    if not own:
        given = trainer.train_dataloader if kind == "train" else trainer.val_dataloaders
        readings = Readings(stream, is_own=dataset_of(stream) is not dataset_of(stream_in(given)), kind=kind)
        return StreamSweep(readings, kind=kind, num_samples=num_samples, seen=seen.get(kind))
    limit = trainer.limit_train_batches if kind == "train" else trainer.limit_val_batches
    # Where a stream says its length, a limit is for the training alone, as with map-style sets. Without a length it may
    # be what ends the stream.
    is_number = isinstance(limit, int) and limit > 0 and sized_len(stream) is None
    return StreamSweep(
        readings_of_run(trainer, stream, kind),
        kind=kind,
        num_samples=num_samples,
        limit=int(limit) if is_number else None,
        seen=seen.get(kind),
    )


def _sweep(loader: DataLoader[Any], positions: Tensor, look: Look, batch_size: int | None, kind: str) -> Sweep:
    """The sweep over the samples at `positions` of a loader that was looked at.

    Raises:
        ValueError: If its batches tell no order of samples.
    """
    if look.reorders:
        raise ValueError(
            f"The collate_fn of the {kind} loader makes the same batch of two samples whatever their order, as one "
            "that sorts or mixes them does. So it is unknown which loss belongs to which sample. Let it keep the order "
            "(pad without sorting; pack_padded_sequence and pack_sequence take enforce_sorted=False), or give "
            f"CLDCallback a loader that does: {kind}_dataloader=..."
        )
    unchanged = look.changes == "no"
    return Sweep(
        loader,
        positions,
        batch_size=batch_size,
        kind=kind,
        keep_workers=loader.persistent_workers and unchanged,
        fixed=unchanged and not changes_on_device(loader, kind),
        on_cpu=look.on_cpu,
    )


def _viewed(loaders: Any, view: DataLoader[Any], seen: Fingerprint) -> tuple[DataLoader[Any], Fingerprint]:
    """The one of the Trainer's train loaders that `view` is a view of, and the identity of its dataset.

    Raises:
        ValueError: If it is a view of none of them.
    """
    problems = []
    for given in _readable(loaders):
        try:
            check_drawn(given, "train")
            fingerprint = look_at(given, "train").fingerprint
        except (TypeError, ValueError):  # positions mean nothing there; in the view they do
            continue
        # Numbers in samples that are no labels may be other ones where a sample is augmented.
        problem = replace(fingerprint, numbers=()).mismatch(seen)
        if problem is None:
            return given, fingerprint if fingerprint.samples else with_view(fingerprint, seen)
        problems.append(problem)
    if not problems:  # none can be read, so it is for the user to say that they belong together
        return view, seen
    raise ValueError(
        f"The un-augmented view of the train set ({_VIEW}) is not of the dataset that is trained on: {problems[0]}. It "
        "must hold the same samples at the same positions."
    )


def _readable(loaders: Any) -> list[DataLoader[Any]]:
    """Those of the Trainer's train loaders that CLD can read."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    found = []
    for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        try:
            found.append(check_loader(loader, "train"))
        except (TypeError, ValueError):
            continue
    return found


def _from_run(trainer: Trainer, name: str) -> Any:
    """What a method of the datamodule returns, or of a module that brings its own loaders; None if there is none."""
    datamodule = getattr(trainer, "datamodule", None)
    method = getattr(trainer.lightning_module if datamodule is None else datamodule, name, None)
    if method is None:
        return None
    with preserved_rng():
        return method()


def _trainer_val_dataloader(trainer: Trainer) -> Any:
    """The validation loader, loaded or not.

    `trainer.val_dataloaders` is None before the first validation, with `limit_val_batches=0`, and without a
    `validation_step`. Lightning's private data source then gives the loader without changing the state of its loops.
    """
    if trainer.val_dataloaders is not None:
        return trainer.val_dataloaders
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if source.instance is None or not source.is_defined():
        return None
    with preserved_rng():
        return source.dataloader()


def _warn_of_surprises(given: DataLoader[Any], view: DataLoader[Any], *, augmented: bool) -> None:
    sampler = unknown_sampler(given)
    if sampler is not None:
        rank_zero_warn(
            f"CLD scores all {len(sampled_positions(given)):,} samples of the train set; whether {sampler} draws all "
            "of them in training is unknown."
        )
    if reads_in_its_own_way(view):
        rank_zero_warn(
            f"{type(view).__name__} iterates in a way of its own. CLD reads its dataset through a plain DataLoader, "
            "which leaves that out."
        )
    if augmented:
        warn_of_augmentation()


def _warn_of_unknown_validation_sampler(reference: DataLoader[Any]) -> None:
    sampler = unknown_sampler(reference)
    if sampler is not None:
        rank_zero_warn(
            f"CLD scores against all {len(sampled_positions(reference)):,} samples of the validation set; whether "
            f"{sampler} draws all of them is unknown. If it leaves some out, because they are trained on, give "
            "val_dataloader=... over a torch.utils.data.Subset of the others."
        )


def warn_of_augmentation() -> None:
    """Says that train samples change from read to read."""
    rank_zero_warn(
        "The train set shows the same sample differently when read twice (random augmentation?). CLD sweeps it as "
        "it is: from the same seed each time, as far as it draws from the global generators of torch, numpy and "
        "python. Its losses can't be compared with those of the validation set then, so no share of wrong labels "
        f"is told. Better give the un-augmented view: {_VIEW}."
    )
