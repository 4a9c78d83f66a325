"""Whether the data of a fit are those of the other processes and those whose losses were recorded before."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer

from lightning_cld.data.fingerprint import Fingerprint, hash_of
from lightning_cld.guards import agreed
from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.recording.sources import Sources, warn_of_augmentation
from lightning_cld.recording.stream_sweep import StreamSweep
from lightning_cld.recording.sweep import Sweep
from lightning_cld.scores import OUTSIDE
from lightning_cld.trajectories import LossTrajectories

_VAL_FINGERPRINT = "validation_fingerprint"
"""Where the identity of the validation set stands in the metadata of a history."""


def check_ranks(trainer: Trainer, found: Sources) -> None:
    """Raises, on all ranks, unless every process has the data of rank 0."""
    if trainer.world_size == 1:
        return
    # Numbers in samples that are no labels may differ between ranks.
    train_print = None if found.fingerprint is None else found.fingerprint.of_classes(None)
    own = [train_print, found.val_fingerprint]
    drawn = [hash_of(sweep.positions) for sweep in (found.train, found.val) if isinstance(sweep, Sweep)]
    with agreed(trainer, "Comparing the data of the ranks"):
        first, first_drawn = trainer.strategy.broadcast((own, drawn))
        if drawn != first_drawn or any(map(_differs, first, own)):
            raise ValueError(
                f"Rank {trainer.global_rank} has other data than rank 0. Every process must make the same "
                "split in the same order: seed it (random_split takes a generator)."
            )


def _differs(one: Fingerprint | None, other: Fingerprint | None) -> bool:
    """Whether two ranks have other data. A stream has no fingerprint: its first sweep compares what the ranks read."""
    if one is None or other is None:
        return one is not other
    return one.positions != other.positions or one.mismatch(other, same_code=True) is not None


def check_recorded(history: LossTrajectories | RunningHistory, found: Sources) -> None:
    """Raises unless the data are those whose losses were logged so far."""
    recorded, val_recorded = history.fingerprint, history.metadata.get(_VAL_FINGERPRINT)
    problem, kind = None, "train"
    if recorded is not None and found.fingerprint is not None:
        problem = recorded.mismatch(found.fingerprint, same_code=True)
    elif recorded is not None or found.fingerprint is not None:
        problem = "one is a stream, and the other is not"
    if problem is None and isinstance(found.train, Sweep):
        known = history.train_classes
        before = torch.arange(found.train.length) if known is None else torch.nonzero(known != OUTSIDE).flatten()
        if not torch.equal(before, found.train.positions):
            problem = (
                f"its sampler draws {len(found.train.positions):,} positions that are not the {len(before):,} of "
                "before. Resume with the sampler that was logged"
            )
    if problem is None and len(found.val.positions) != history.references:
        problem, kind = f"it has {len(found.val.positions):,} samples, not {history.references:,}", "validation"
    if problem is None and val_recorded is not None and found.val_fingerprint is not None:
        scored = Fingerprint.from_dict(val_recorded)
        problem, kind = scored.mismatch(found.val_fingerprint, same_code=True), "validation"
    if problem is not None:
        raise ValueError(
            f"The {kind} set is not the one whose losses were logged so far: {problem}. Seed what splits or orders it "
            "(random_split takes a generator), or start anew."
        )


def describe(history: LossTrajectories | RunningHistory, data: Sources) -> None:
    """Writes into a new history what is known of the data, for `check_recorded` and whoever reads its scores."""
    augmented = data.augmented
    if isinstance(data.train, StreamSweep) and data.train.augmented:
        augmented = True
        warn_of_augmentation()
    if history.fingerprint is None:
        history.metadata["identity"] = [] if history.names is None else ["names"]
    else:
        history.metadata["identity"] = history.fingerprint.known()
    history.metadata["augmented"] = augmented
    if data.val_fingerprint is not None:
        history.metadata[_VAL_FINGERPRINT] = data.val_fingerprint.to_dict()
