"""Checkpoint files of a run: reading them, and telling after how many epochs each was saved."""

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
    """The files by the number of epochs that were completed when they were saved, in that order.

    Raises:
        TypeError: If `paths` is a single path.
        FileNotFoundError: If there is no file at one of them.
        ValueError: If there are none, one can't be used, or two are of the same epoch.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise TypeError(
            f"paths must be a list of checkpoint files, got the single path {str(paths)!r}. For the files of a folder: "
            "Path(folder).glob('*.ckpt')."
        )
    files: dict[int, Path] = {}
    for path in map(Path, paths):
        epoch = completed_epochs(read_checkpoint(path, weights_only), path)
        if epoch in files:
            raise ValueError(
                f"{files[epoch]} and {path} are both from after {epoch} completed epochs. Leave one out (last.ckpt, "
                "which ModelCheckpoint(save_last=True) saves, is a second copy), and give files of one run only."
            )
        files[epoch] = path
    if not files:
        raise ValueError("paths is empty: give the checkpoint files of a run. Did a glob find nothing?")
    if 0 not in files:
        rank_zero_warn(
            "CLD: none of the files is from before the first step, so theta_0 is missing from the timeline. Scores are "
            "better with it: in runs to come call trainer.save_checkpoint(...) in on_train_start of a callback."
        )
    if len(files) < MIN_CHECKPOINTS:
        rank_zero_warn(
            f"CLD: {len(files)} files give {len(files)} checkpoints, and a CLD score needs at least {MIN_CHECKPOINTS}."
        )
    return dict(sorted(files.items()))


def read_checkpoint(path: Path, weights_only: bool) -> dict[str, Any]:
    """What is in a checkpoint file, its tensors left on the disk until they are looked at.

    Raises:
        FileNotFoundError: If there is no file at `path`.
        ValueError: If it is no checkpoint, or holds types that `weights_only=True` refuses.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"The checkpoint {path} {what}. paths must name files on this machine, each of a whole checkpoint."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    except Exception as error:
        refused = _refused_types(path) if weights_only and isinstance(error, pickle.UnpicklingError) else ""
        if not refused:
            raise ValueError(f"{path} is damaged, or no checkpoint file: {error}") from error
        raise ValueError(
            f"{path} holds more than tensors and plain values, among its hyperparameters perhaps: {refused}. If you "
            "trust the file, allow these types with torch.serialization.add_safe_globals, or give weights_only=False."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(
            f"{path} is no checkpoint of a Trainer: it holds a {type(checkpoint).__name__} without a state_dict. Give "
            "files that ModelCheckpoint or trainer.save_checkpoint wrote."
        )
    return checkpoint


def _refused_types(path: Path) -> str:
    """The types in a file that `weights_only=True` does not load, for a message; nothing if they can't be listed."""
    with suppress(Exception):  # raised for a damaged file, of which the caller tells
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    return ""


def completed_epochs(checkpoint: dict[str, Any], path: Path) -> int:
    """How many epochs the weights in a checkpoint have behind them, as `CLDCallback` counts them in the run itself.

    `checkpoint["epoch"]` does not tell: it is the same in mid-epoch and at the epoch's end. The progress of the loops
    tells, though in a run that was resumed some of Lightning's counters lag behind; then two of them must agree.

    Raises:
        ValueError: If the progress of the training is not in the checkpoint, or is in mid-epoch.
    """
    try:
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        completed, started, processed = int(epochs["completed"]), epochs["started"], epochs["processed"]
        taken, in_all = batches["current"]["processed"], batches["total"]["processed"]
        in_a_batch = batches["current"]["ready"] != taken
        is_batch_end = batches["current"]["completed"] < taken  # in on_train_batch_end
        is_last_batch, is_untrained = batches["is_last_batch"], batches["total"]["started"] == 0
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not say how many epochs were completed: it holds no progress of a training loop. Give files "
            "that ModelCheckpoint or trainer.save_checkpoint wrote in Lightning 2 or newer."
        ) from error
    if is_untrained:
        return 0
    # Had all epochs as many batches as the newest one, so many would be complete.
    is_between_epochs, is_full = in_all == completed * taken, in_all == (completed + 1) * taken
    is_being_ended = processed > completed  # in on_train_epoch_end
    if not in_a_batch and completed < started and processed <= started:
        # Lightning does not know the last batch for one in an epoch that was resumed in the middle.
        if is_last_batch or (is_full and is_being_ended):
            return completed + 1
    elif not in_a_batch and is_between_epochs:
        return completed
    elif not in_a_batch and is_full and (is_being_ended or is_batch_end):  # in a run with counters that lag behind
        return completed + 1
    raise ValueError(
        f"{path} was saved in mid-epoch, as far as its progress tells: after {taken} batches of epoch {completed + 1}. "
        "A timeline has only weights from before training and from ends of epochs. Leave it out."
    )
