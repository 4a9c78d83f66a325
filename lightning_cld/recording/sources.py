"""Which data a run is watched on: the callback's arguments, the datamodule's `cld_*` methods, or the Trainer's own."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_cld.data.fingerprint import Fingerprint
from lightning_cld.data.loaders import (
    changes_between_reads,
    check_loader,
    fingerprint_of,
    sampled_positions,
    unknown_sampler,
)
from lightning_cld.guards import preserved_rng
from lightning_cld.recording.sweep import Sweep

_VIEW = (
    "train_dataloader=... of CLDCallback or trajectories_from_checkpoints, or cld_train_dataloader() on the datamodule"
)
_REFERENCE = (
    "CLD scores against validation losses: give the Trainer a validation dataloader, pass val_dataloader=... to "
    "CLDCallback or trajectories_from_checkpoints, or define cld_val_dataloader() on the datamodule. Not the test set: "
    "its accuracy would no longer mean anything (lightning_cld.proportional_holdout splits one off the train set)."
)


def find_sweeps(
    trainer: Trainer, train_dataloader: Any, val_dataloader: Any, batch_size: int | None
) -> tuple[Sweep, Sweep, Fingerprint]:
    """The sweeps over the train and the validation set, and the identity of the train set that the Trainer holds.

    Raises:
        TypeError: If a loader can't be read.
        ValueError: If there is none or are several, or the un-augmented view is of other data than the train set.
    """
    view = train_dataloader
    if view is None:
        view = _from_datamodule(trainer, "cld_train_dataloader")
    if view is None:
        given = view = check_loader(trainer.train_dataloader, "train")
        fingerprint = fingerprint_of(given, "train")
    else:
        view = check_loader(view, "train")
        given = _one_loader(trainer.train_dataloader, otherwise=view)
        fingerprint = fingerprint_of(given, "train")
        problem = fingerprint.mismatch(fingerprint_of(view, "train"))
        if problem:
            raise ValueError(
                f"The un-augmented view of the train set ({_VIEW}) is not of the dataset that is trained on: "
                f"{problem}. It must hold the same samples at the same positions."
            )
    train_changes = changes_between_reads(view, "train")
    reference = val_dataloader
    if reference is None:
        reference = _from_datamodule(trainer, "cld_val_dataloader")
    if reference is None:
        reference = _trainer_val_dataloader(trainer)
    if reference is None or (isinstance(reference, (list, tuple, dict)) and len(reference) == 0):
        raise ValueError(f"There is no validation data. {_REFERENCE}")
    reference = check_loader(reference, "val")
    if len(sampled_positions(reference)) == 0:
        raise ValueError(f"The validation set is empty. {_REFERENCE}")
    _warn_of_surprises(given, view, reference, train_changes)
    keep_train = view.persistent_workers and not train_changes
    keep_val = reference.persistent_workers and not changes_between_reads(reference, "val")
    return (
        Sweep(view, sampled_positions(given), batch_size=batch_size, kind="train", keep_workers=keep_train),
        Sweep(reference, sampled_positions(reference), batch_size=batch_size, kind="val", keep_workers=keep_val),
        fingerprint,
    )


def _one_loader(loaders: Any, otherwise: DataLoader[Any]) -> DataLoader[Any]:
    """The Trainer's train loader if CLD can read it."""
    try:
        return check_loader(loaders, "train")
    except (TypeError, ValueError):
        return otherwise


def _from_datamodule(trainer: Trainer, name: str) -> Any:
    method = getattr(getattr(trainer, "datamodule", None), name, None)
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


def _warn_of_surprises(
    given: DataLoader[Any], view: DataLoader[Any], reference: DataLoader[Any], changes: bool
) -> None:
    sampler = unknown_sampler(given)
    if sampler is not None:
        rank_zero_warn(
            f"CLD scores all {len(sampled_positions(given)):,} samples of the train set; whether {sampler} draws all "
            "of them in training is unknown."
        )
    sampler = unknown_sampler(reference)
    if sampler is not None:
        rank_zero_warn(
            f"CLD scores against all {len(sampled_positions(reference)):,} samples of the validation set; whether "
            f"{sampler} draws all of them is unknown. If it leaves some out, because they are trained on, give "
            "val_dataloader=... over a torch.utils.data.Subset of the others."
        )
    if type(view).__iter__ is not DataLoader.__iter__:
        rank_zero_warn(
            f"{type(view).__name__} has an __iter__ of its own; CLD reads its dataset through a plain DataLoader, "
            "which leaves out what that does."
        )
    if changes:
        rank_zero_warn(
            "The train set shows the same sample differently when read twice (random augmentation?). CLD sweeps it as "
            f"it is, from the same seed each time. Better give the un-augmented view: {_VIEW}."
        )
