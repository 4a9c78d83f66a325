"""Checkpoint files of a run: reads them and finds how many epochs were complete when each was saved."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_cld.functional.checks import MIN_CHECKPOINTS


def files_by_epoch(paths: Iterable[str | Path], weights_only: bool) -> dict[int, Path]:
    """Maps the number of completed epochs to the file saved then, in increasing order.

    Raises:
        TypeError: If `paths` is a single path.
        FileNotFoundError: If a file does not exist.
        ValueError: If `paths` is empty, a file can't be used, or two files are from the same epoch.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise TypeError(
            f"paths must be a list of checkpoint files, got the single path {str(paths)!r}. For all files in a folder, "
            "use Path(folder).glob('*.ckpt')."
        )
    files: dict[int, Path] = {}
    for path in map(Path, paths):
        epoch = completed_epochs(read_checkpoint(path, weights_only), path)
        if epoch in files:
            raise ValueError(
                f"{files[epoch]} and {path} were both saved after {epoch} completed epochs. Leave one out, and give "
                "files of one run only. ModelCheckpoint(save_last=True) saves a second copy as last.ckpt."
            )
        files[epoch] = path
    if not files:
        raise ValueError("paths is empty. Give the checkpoint files of a run. Did a glob find nothing?")
    if 0 not in files:
        rank_zero_warn(
            "CLD: no file was saved before the first step, so theta_0 is missing from the timeline. Scores are better "
            "with it. In future runs, call trainer.save_checkpoint(...) in on_train_start of a callback."
        )
    if len(files) < MIN_CHECKPOINTS:
        rank_zero_warn(
            f"CLD: {len(files)} files give {len(files)} checkpoints, and a CLD score needs at least {MIN_CHECKPOINTS}."
        )
    return dict(sorted(files.items()))


def read_checkpoint(path: Path, weights_only: bool) -> dict[str, Any]:
    """Loads a checkpoint file, memory-mapped: its tensors stay on disk until they are used.

    Raises:
        FileNotFoundError: If there is no file at `path`.
        ValueError: If the file is not a checkpoint, or holds types that `weights_only=True` refuses.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"The checkpoint {path} {what}. paths must name files on this machine, one whole checkpoint per file."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    except Exception as error:
        refused = _refused_types(path) if weights_only and isinstance(error, pickle.UnpicklingError) else ""
        if not refused:
            raise ValueError(f"{path} is damaged or not a checkpoint file: {error}") from error
        raise ValueError(
            f"{path} holds more than tensors and plain values, perhaps in its hyperparameters: {refused}. If you trust "
            "the file, allow these types with torch.serialization.add_safe_globals, or give weights_only=False."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(
            f"{path} is not a checkpoint of a Trainer: it holds a {type(checkpoint).__name__} without a state_dict. "
            "Give files that ModelCheckpoint or trainer.save_checkpoint wrote."
        )
    return checkpoint


def _refused_types(path: Path) -> str:
    """Lists the types in a file that `weights_only=True` refuses, for a message; empty if they can't be listed."""
    with suppress(Exception):  # the file is damaged, and the caller reports that
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    return ""


def completed_epochs(checkpoint: dict[str, Any], path: Path) -> int:
    """How many epochs were complete when a checkpoint was saved, counted as `CLDCallback` counts them.

    `checkpoint["epoch"]` can't answer this: it is the same in mid-epoch and at the epoch's end. The progress of the
    loops can. In a resumed run some of Lightning's counters lag behind, so two of them must agree.

    Raises:
        ValueError: If the checkpoint has no training progress, or was saved in mid-epoch.
    """
    try:
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        completed, started, processed = int(epochs["completed"]), epochs["started"], epochs["processed"]
        epoch_batches, run_batches = batches["current"]["processed"], batches["total"]["processed"]
        in_a_batch = batches["current"]["ready"] != epoch_batches
        is_batch_end = batches["current"]["completed"] < epoch_batches  # in on_train_batch_end
        is_last_batch, is_untrained = batches["is_last_batch"], batches["total"]["started"] == 0
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not say how many epochs were completed: it has no progress of a training loop. Give files "
            "that ModelCheckpoint or trainer.save_checkpoint wrote in Lightning 2 or newer."
        ) from error
    if is_untrained:
        return 0
    # These two assume that every epoch has as many batches as the newest one.
    is_between_epochs = run_batches == completed * epoch_batches
    is_full = run_batches == (completed + 1) * epoch_batches
    is_being_ended = processed > completed  # in on_train_epoch_end
    if not in_a_batch and completed < started and processed <= started:
        # Lightning does not mark the last batch as the last in an epoch that was resumed in the middle.
        if is_last_batch or (is_full and is_being_ended):
            return completed + 1
    elif not in_a_batch and is_between_epochs:
        return completed
    elif not in_a_batch and is_full and (is_being_ended or is_batch_end):  # a resumed run, whose counters lag behind
        return completed + 1
    raise ValueError(
        f"{path} was saved in mid-epoch, according to its progress: after {epoch_batches} batches of epoch "
        f"{completed + 1}. Leave it out: CLD uses only weights from before training and from epoch ends."
    )
