"""The folders `cld-rows-...` beside the files of a run: those of other runs, and those that a checkpoint names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_cld.storage.files import stored_checkpoints
from lightning_cld.storage.places import Place, child, exists, names_in
from lightning_cld.storage.row_files import RowFiles
from lightning_cld.trajectories import LossTrajectories

SCORES_SO_FAR = "scores.npz"
"""The file in such a folder that stands for the losses where none are kept."""


def tell_of_others(folder: Place, start: str, own: str) -> bool:
    """Tells of other runs that save to the same files: those that go on, and those that were killed.

    Args:
        folder: The folder of the files.
        start: What the names of all folders of rows begin with.
        own: The name of this run's.

    Returns:
        Whether any may be going on.
    """
    told = False
    for name in names_in(folder):
        if not name.startswith(start) or name == own:  # its own, which another machine may have taken before
            continue
        rows, scores = RowFiles(child(folder, name)), child(child(folder, name), SCORES_SO_FAR)
        owner = rows.owner()
        if owner:
            told = True
            rank_zero_warn(
                f"CLD: another run saves to {folder} too, unless it was killed: {owner}. The one that ends last "
                "replaces the files of the other. Give CLDCallback(dirpath=...) or filename=... of its own."
            )
        elif rows.epochs() or exists(scores):
            read = "LossTrajectories.load" if rows.epochs() else f"CLDScores.load({str(scores)!r})"
            rank_zero_info(
                f"CLD: {rows.folder} holds what an interrupted run had logged. Resume that run from its checkpoint, "
                f"read it with {read}, or delete it."
            )
        elif rows.is_taken():  # by a run that was killed before it logged anything
            with warn_on_error(f"{rows.folder} could not be deleted"):
                rows.delete()
    return told


def named_losses(kept: Mapping[str, Any], run: str) -> tuple[Place, LossTrajectories]:
    """Reads the losses that a checkpoint names instead of holding them.

    Args:
        kept: What `Results.state_dict` says of them.
        run: The run.

    Returns:
        The place that they were read from, and the losses.

    Raises:
        ValueError: If they are not there any more, or damaged.
    """
    folder, file, epochs = kept["folder"], kept["file"], kept["epochs"]
    place = folder if set(epochs) <= set(RowFiles(folder).epochs()) else file
    if place == folder or stored_checkpoints(file)[0] == run:
        whole, count = LossTrajectories.load(place), len(epochs)
        if whole.epochs[:count] == epochs:
            return place, LossTrajectories(
                whole.train_losses[:count],
                whole.val_losses[:count],
                whole.train_classes,
                whole.val_classes,
                epochs,
                fingerprint=whole.fingerprint,
                from_steps=whole.from_steps,
                metadata=whole.metadata,
                names=whole.names,
            )
    raise ValueError(
        f"The checkpoint names the losses of {len(epochs)} checkpoints instead of holding them, but they are neither "
        f"in {folder} nor in {file}. Bring that folder back to where it was, or resume without CLDCallback."
    )


@contextmanager
def warn_on_error(what_failed: str) -> Iterator[None]:
    """Turns an error in its body into a warning."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # storages raise what they like, and the results are saved
        rank_zero_warn(f"CLD: {what_failed}: {error}")
