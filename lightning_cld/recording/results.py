"""`Results`: saves the losses and scores of a run, and marks the files with the run's identity."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.scores import CLDScores
from lightning_cld.trajectories import LossTrajectories


class Results:
    """Saves the losses and scores of a run.

    Args:
        dirpath: The folder; None uses the logger's, else the Trainer's `default_root_dir`.
        filename: Name of the scores file, with or without `.npz`.

    Raises:
        ValueError: If `filename` is empty or names a folder, or `dirpath` is a URL.
    """

    def __init__(self, dirpath: str | Path | None, filename: str) -> None:
        if not filename or Path(filename).name != filename:
            raise ValueError(f"filename must be a name without directories, got {filename!r}. Use dirpath for those.")
        self.dirpath = None if dirpath is None else _local(dirpath, "dirpath")
        self.filename = filename.removesuffix(".npz")
        self.folder = self.dirpath
        # Forked and spawned processes inherit this value, so their files carry it too.
        self.run = secrets.token_hex(8)

    def choose_folder(self, trainer: Trainer) -> None:
        """Uses `dirpath`, or else the Trainer's folder. Every rank must call it."""
        self.folder = self.dirpath or _local(
            trainer.log_dir or trainer.default_root_dir, "the folder of the logger or the Trainer"
        )

    @property
    def scores_path(self) -> Path | None:
        """Path of the scores file, saved already or later; None until a folder is chosen."""
        return None if self.folder is None else self._file(self.filename)

    def saved_scores(self) -> CLDScores | None:
        """Loads the scores that another process of this run saved; None if there are none."""
        if self.scores_path is None or not self.scores_path.exists():
            return None
        saved = CLDScores.load(self.scores_path)
        return saved if saved.metadata.get("run") == self.run else None  # else from an earlier run

    def note(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        recorded: LossTrajectories | RunningHistory,
        about: dict[str, Any],
    ) -> None:
        """Adds metadata to the history: model, Trainer, run, and plain values `about` the callback."""
        recorded.metadata.update(
            model=type(pl_module).__name__,
            max_epochs=trainer.max_epochs,
            precision=str(trainer.precision),
            run=self.run,
            **about,
        )

    def save_losses(self, history: LossTrajectories | RunningHistory) -> Path | None:
        """Saves the logged losses and returns the path; None if nothing is kept or saving failed with a warning."""
        if isinstance(history, RunningHistory):
            return None
        path = self._file(f"{self.filename.removesuffix('-scores')}-trajectories")
        try:
            return history.save(path)
        except Exception as error:  # noqa: BLE001  # must not hide the error that ended training
            rank_zero_warn(f"CLD: the logged losses could not be saved to {path}: {error}")
            return None

    def save_scores(self, scores: CLDScores, seconds: float) -> None:
        """Saves the scores and prints a summary line, with the total `seconds` of all sweeps."""
        path = scores.save(self._file(self.filename))
        pool = scores.values[scores.positions()]
        unscored = int(pool.isnan().sum())
        left_out = f" ({unscored:,} unscored)" if unscored else ""
        classes = "1 class" if scores.num_classes == 1 else f"{scores.num_classes} classes"
        rank_zero_info(
            f"CLD: scored {len(pool):,} samples{left_out} of {classes} from {len(scores.epochs)} checkpoints; sweeps "
            f"took {seconds:.1f} s. Saved to {path}"
        )

    def _file(self, name: str) -> Path:
        return (self.folder or Path()) / f"{name}.npz"


def _local(folder: str | Path, what: str) -> Path:
    """Returns a folder of this machine as a path, or raises: a URL would become a folder of that name."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(folder)):  # a Path has lost one of the two slashes
        raise ValueError(
            f"CLD saves to folders of this machine, and {what} is {folder}. Give CLDCallback(dirpath=...) a local "
            "folder, and copy the files when the run is over."
        )
    return Path(folder)
