"""`Results`: the files of a run, which carry its id: losses as they are logged, and losses and scores at the end."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_cld.guards import agreed
from lightning_cld.recording.rows_folders import SCORES_SO_FAR, named_losses, tell_of_others, warn_on_error
from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.scores import CLDScores, scores_contents
from lightning_cld.storage.files import Contents, stored_checkpoints, write_together
from lightning_cld.storage.places import Place, as_place, check_writable, child, delete_scratch, exists, names_in
from lightning_cld.storage.row_files import RowFiles, digest_of
from lightning_cld.trajectories import LossTrajectories, losses_contents, shared_parts

KEPT_IN_CHECKPOINTS = 2**24
"""Bytes of losses and names that a Lightning checkpoint holds. Where there are more it names the folder that they are
in, so that what an epoch costs does not grow with the epochs."""

History: TypeAlias = LossTrajectories | RunningHistory


class Results:
    """Saves the losses and scores of a run.

    Args:
        dirpath: The folder, or a URL that fsspec can write to; None uses the logger's, else the Trainer's
            `default_root_dir`.
        filename: Name of the scores file, with or without `.npz`.

    Attributes:
        run: The id of the run. A run that is resumed from a Lightning checkpoint keeps it.

    Raises:
        ValueError: If `filename` is empty or names a folder.
    """

    def __init__(self, dirpath: str | Path | None, filename: str) -> None:
        if not filename or Path(filename).name != filename:
            raise ValueError(f"filename must be a name without directories, got {filename!r}. Use dirpath for those.")
        self.dirpath = None if dirpath is None else as_place(dirpath)
        self.filename = filename.removesuffix(".npz")
        self.folder = self.dirpath
        # Forked and spawned processes inherit this value, so their files carry it too.
        self._launch = secrets.token_hex(8)
        self._writes = True
        self._rows: RowFiles | None = None
        self.forget()

    def forget(self) -> None:
        """Begins another run, unless a tuner restores a checkpoint in the middle of one."""
        if self._rows is None:
            self.run = secrets.token_hex(4)
        self._written: set[int] = set()
        self._digests: dict[int, int] = {}
        self._told = False

    def choose_folder(self, trainer: Trainer) -> None:
        """Uses `dirpath`, or else the Trainer's folder. Every rank must call it."""
        folder = self.dirpath or as_place(trainer.log_dir or trainer.default_root_dir)
        # Absolute, because the process may go to another folder during the fit.
        self.folder = folder.absolute() if isinstance(folder, Path) else folder
        self._writes = trainer.is_global_zero

    def begin(self, trainer: Trainer, history: History | None) -> None:
        """Finds out, by writing, whether the files of a fit that starts can be saved. Every rank must call it.

        Args:
            trainer: The Trainer of the fit.
            history: What was logged before, if the fit resumes a run.

        Raises:
            OSError: If they can't be saved.
            ValueError: If what is behind a URL refuses them.
        """
        self.run = trainer.strategy.broadcast(self.run)
        with agreed(trainer, "Preparing the folder of the scores"):
            if not self._writes:
                return
            try:
                for place in (self._scores_place, self._losses_place):
                    check_writable(place)
                if not tell_of_others(self.folder or Path(), self._rows_name(""), self._rows_name(self.run)):
                    for place in (self._scores_place, self._losses_place):
                        delete_scratch(place)
                self._rows = self._rows_of_run()
                self._rows.take()
                if isinstance(history, LossTrajectories):  # a killed run may have gone on behind its checkpoint
                    self._rows.keep_only(history.epochs)
                    # Others, of a run that went on from an earlier checkpoint, are written again.
                    self._written &= set(self._rows.epochs())
            except Exception as error:  # storages raise what they like
                kind = (
                    type(error) if isinstance(error, OSError) and type(error).__module__ == "builtins" else ValueError
                )
                raise kind(
                    f"CLD can't save {self.filename}.npz and the losses to {self.folder}: {error}. Give "
                    "CLDCallback(dirpath=...) a folder that can be written to, or a shorter filename=..."
                ) from error

    @property
    def scores_path(self) -> Place | None:
        """Path or URL of the scores file, saved already or later; None until a folder is chosen."""
        return None if self.folder is None else self._scores_place

    def saved_scores(self) -> CLDScores | None:
        """Loads the scores that another process of this run saved; None if there are none."""
        if self.folder is None or not exists(self._scores_place):
            return None
        saved = CLDScores.load(self._scores_place)
        return saved if saved.metadata.get("launch") == self._launch else None  # else from an earlier run

    def note(self, trainer: Trainer, pl_module: LightningModule, recorded: History, about: dict[str, Any]) -> None:
        """Adds metadata to the history: model, Trainer, run, and plain values `about` the callback."""
        recorded.metadata.update(
            model=type(pl_module).__name__,
            precision=str(trainer.precision),
            run=self.run,
            launch=self._launch,
            **about,
        )

    def keep(self, history: History) -> None:
        """Writes the newest checkpoint, on rank 0, so that a kill loses no more than the sweep that is going on.

        A running history has no losses: its scores so far are written instead, once there are any.
        """
        if self._rows is None:
            return
        try:
            if isinstance(history, RunningHistory):
                self._keep_scores(self._rows, history)
            else:
                self._keep_rows(self._rows, history)
        except Exception as error:  # noqa: BLE001  # watching must not stop a run
            if not self._told:
                self._told = True
                rank_zero_warn(
                    f"CLD: what was logged after {history.epochs[-1]} epochs could not be written to "
                    f"{self._rows.folder}: {error}. It is in memory, and a kill would lose it."
                )

    def _keep_rows(self, rows: RowFiles, history: LossTrajectories) -> None:
        if not self._written:
            rows.write_about(*shared_parts(history))
        for place, epoch in enumerate(history.epochs):
            if epoch not in self._written or epoch == history.epochs[-1]:
                train_row, val_row = (row.cpu().numpy() for row in history.row(place))
                rows.write(epoch, train_row, val_row)
                self._digests[epoch] = digest_of(train_row, val_row)
                self._written.add(epoch)

    def _keep_scores(self, rows: RowFiles, history: RunningHistory) -> None:
        try:
            scores = history.score()
        except ValueError:  # too few checkpoints so far, or diverged, and then the scores before are kept
            return
        scores.save(child(rows.folder, SCORES_SO_FAR))

    def state_dict(self, history: History | None) -> dict[str, Any]:
        """What a Lightning checkpoint holds of the run and what it logged. Only rank 0 writes checkpoints."""
        return {"run": self.run, "trajectories": self._state_of(history) if self._writes else None}

    def _state_of(self, history: History | None) -> dict[str, Any] | None:
        if history is None:
            return None
        if isinstance(history, RunningHistory) or _bytes_of(history) <= KEPT_IN_CHECKPOINTS:
            return history.state_dict()
        if not (self._has_rows(history) or self._has_file(history)):
            return history.state_dict()
        places = (self._rows_of_run().folder, self._losses_place)
        folder, file = (str(place.resolve()) if isinstance(place, Path) else place for place in places)
        return {
            "folder": folder,
            "file": file,
            "epochs": list(history.epochs),
            "digests": self._digests_of(history),
        }

    def _digests_of(self, history: LossTrajectories) -> list[int]:
        """The digest of each checkpoint's losses, each computed once."""
        for place, epoch in enumerate(history.epochs):
            if epoch not in self._digests:
                self._digests[epoch] = digest_of(*(row.cpu().numpy() for row in history.row(place)))
        return [self._digests[epoch] for epoch in history.epochs]

    def load_state_dict(self, state: Mapping[str, Any]) -> History | None:
        """Takes over the run of a checkpoint, and returns what it had logged."""
        self.run = state.get("run", self.run)  # not in checkpoints of earlier versions
        recorded = state["trajectories"]
        if recorded is None:
            return None
        if "folder" in recorded:
            found, losses = named_losses(recorded, self.run)
            if self._digests_of(losses) != recorded["digests"]:
                raise ValueError(
                    f"The checkpoint names losses in {found}, but by now other ones are there: the run was resumed "
                    "from an earlier checkpoint and logged those epochs anew. Resume from the newest checkpoint."
                )
            if as_place(found) == self._rows_of_run().folder:
                self._written = set(losses.epochs)
            return losses
        kind = RunningHistory if state["history"] == "running" else LossTrajectories
        return kind.from_state_dict(recorded)

    def save(self, history: History, scores: CLDScores, seconds: float) -> None:
        """Saves losses and scores, which replace those of an earlier run together, and prints a summary line.

        What can't be saved is warned of.

        Args:
            history: What was logged.
            scores: The scores.
            seconds: The time that all sweeps took.
        """
        contents = {self._scores_place: scores_contents(scores)}
        if isinstance(history, LossTrajectories):
            contents[self._losses_place] = losses_contents(history)
        failed: list[Place] = []
        try:
            write_together(contents)
        except Exception:  # noqa: BLE001  # storages raise what they like; each file is tried by itself
            failed = [place for place, content in contents.items() if not self._save_one(place, content)]
        if self._losses_place not in failed:
            self._drop_rows()
        if self._scores_place in failed:
            return
        pool = scores.values[scores.positions()]
        unscored = int(pool.isnan().sum())
        left_out = f" ({unscored:,} unscored)" if unscored else ""
        classes = "1 class" if scores.num_classes == 1 else f"{scores.num_classes} classes"
        rank_zero_info(
            f"CLD: scored {len(pool):,} samples{left_out} of {classes} from {len(scores.epochs)} checkpoints; sweeps "
            f"took {seconds:.1f} s. Saved to {self._scores_place}"
        )

    def save_losses(self, history: History) -> Place | None:
        """Saves the losses of a run that has no scores. Returns where they are; None if nowhere."""
        if isinstance(history, RunningHistory):
            return None
        place: Place | None = None
        with warn_on_error("the logged losses could not be saved"):
            place = self._save_unscored(history)
            if place == self._losses_place:
                self._drop_rows()
        return place

    def save_interrupted(self, history: History) -> None:
        """Saves the losses of a run that an error or a signal has ended. An error of its own must not hide that one."""
        with warn_on_error("what was logged could not be saved"):
            self._save_interrupted(history)

    def _save_interrupted(self, history: History) -> None:
        place: Place | None = None
        if isinstance(history, LossTrajectories):
            if _bytes_of(history) > KEPT_IN_CHECKPOINTS and self._has_rows(history) and self._rows is not None:
                place = self._rows.folder  # which Lightning's checkpoints name; a second copy would take time
            else:
                place = self._save_unscored(history)
            if place == self._losses_place:
                self._drop_rows()
        elif self._rows is not None:
            place = child(self._rows.folder, SCORES_SO_FAR)
        if place is not None and exists(place):
            rank_zero_info(f"CLD: training was interrupted. What was logged until then is in {place}")

    def _save_unscored(self, history: LossTrajectories) -> Place | None:
        """Saves losses that have no scores, beside the files of a finished or another run if there are any.

        Returns where they are; None if nowhere.
        """
        is_own = not exists(self._losses_place) or stored_checkpoints(self._losses_place)[0] == self.run
        if is_own and not exists(self._scores_place) and self._save_one(self._losses_place, losses_contents(history)):
            return self._losses_place
        if self._has_file(history) and not self._written:
            return self._losses_place  # a run that had finished went on, and logged nothing
        if self._rows is not None and not self._has_rows(history):
            self.keep(history)
        return self._rows.folder if self._rows is not None and self._has_rows(history) else None

    def _has_rows(self, history: History) -> bool:
        """Whether all checkpoints are in files of their own."""
        return self._rows is not None and self._written.issuperset(history.epochs)

    def _has_file(self, history: History) -> bool:
        """Whether all checkpoints are in the file of the losses."""
        run, epochs = stored_checkpoints(self._losses_place)
        return run == self.run and epochs[: len(history.epochs)] == history.epochs

    def close(self) -> None:
        """Says that this process writes no more, and leaves no folder in which nothing was logged."""
        if self._rows is None:
            return
        rows, self._rows = self._rows, None
        with warn_on_error(f"{rows.folder} could not be cleared"):
            rows.release()
            if not names_in(rows.folder):
                rows.delete()

    def _save_one(self, place: Place, content: Contents) -> bool:
        try:
            write_together({place: content})
        except Exception as error:  # noqa: BLE001  # must not hide the error that ended training
            what, kept = "logged losses", "" if self._rows is None else f" They are in {self._rows.folder}."
            if place == self._scores_place:
                what, kept = "scores", " They are in the callback's .scores as long as this process lives."
            rank_zero_warn(f"CLD: the {what} could not be saved to {place}: {error}.{kept}")
            return False
        return True

    def _drop_rows(self) -> None:
        """Deletes the files of single checkpoints, once all is in one file."""
        # A run that was killed at its end has left them, and trains no more when it is resumed.
        rows, self._rows = self._rows or self._rows_of_run(), None
        with warn_on_error(f"{rows.folder} could not be deleted"):
            if exists(rows.folder) and not rows.owner():
                rows.delete()

    @property
    def names(self) -> set[str]:
        """The names of the files, without `.npz`."""
        return {self.filename, f"{self._stem}-trajectories"}

    @property
    def _scores_place(self) -> Place:
        return self._file(self.filename)

    @property
    def _losses_place(self) -> Place:
        return self._file(f"{self._stem}-trajectories")

    @property
    def _stem(self) -> str:
        return self.filename.removesuffix("-scores")

    def _rows_of_run(self) -> RowFiles:
        return RowFiles(child(self.folder or Path(), self._rows_name(self.run)))

    def _rows_name(self, run: str) -> str:
        return f"{self._stem}-rows-{run}"

    def _file(self, name: str) -> Place:
        return child(self.folder or Path(), f"{name}.npz")


def _bytes_of(history: LossTrajectories) -> int:
    names = {} if history.names is None else history.names.state_dict()
    return 4 * len(history) * sum(len(row) for row in history.row(0)) + sum(part.nbytes for part in names.values())
