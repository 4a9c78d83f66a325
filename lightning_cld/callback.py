"""`CLDCallback`: when to sweep, score, save and stop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import ReferenceType, ref

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_cld.guards import StoppedError
from lightning_cld.recording.batch_losses import LossFunction, StepFunction
from lightning_cld.recording.loggers import log_checkpoint, log_scores
from lightning_cld.recording.own_validation import OwnValidation
from lightning_cld.recording.recorder import Recorder
from lightning_cld.recording.results import Results
from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.recording.signals import IsStopped, interruptible
from lightning_cld.recording.timeline import Timeline
from lightning_cld.scores import CLDScores
from lightning_cld.trajectories import LossTrajectories

_FILENAME = "cld-scores"


class CLDCallback(Callback):
    """Logs the loss of every train and validation sample during training and scores the train set by CLD.

    Before the first step (theta_0) and then after every n-th epoch it evaluates the train and the validation set,
    without touching the training: weights, random states, logs and metrics stay those of a run without it. Scores
    are computed when training finishes, or once `cutoff_epoch` epochs are complete. They are saved to
    `cld-scores.npz`, and the logged losses to `cld-trajectories.npz` beside it. Files of an earlier run are replaced.

    Several callbacks, with two losses or two cutoffs for example, can be in one Trainer if each has a `filename` of its
    own. If the same Trainer then fits another module, as in cross-validation, a new timeline begins.

    By default batches are `(inputs, targets, ...)`, targets are integer classes `[B]`, the module returns logits
    `[B, C]`, and the loss is cross-entropy. A method `cld_step(self, batch) -> (losses, classes)` on the
    LightningModule replaces all of that, for any batch layout and task. With None as `classes` all samples form one
    class. A datamodule, or a module that brings its own loaders, may define `cld_train_dataloader()`, an un-augmented
    view of the train set, and `cld_val_dataloader()`, the validation samples to score against.

    A loader over an `IterableDataset`, or any other iterable, is a *stream*: its samples have no positions of their
    own. There the step returns a third value: the positions of the samples in the batch, integers `[B]`, or their
    names, a list of B strings. Sweeps then read a copy of the loader as it is, in whatever order. Names get positions
    in the order of first sight, see `SampleNames`.

    Bad input raises when `fit` starts, before the first step. After that the callback only warns. What can't be
    computed raises when `scores` is read.

    Args:
        cutoff_epoch: Score once this many epochs are complete, and log nothing after that. None scores at the end.
            "auto" scores once the coreset has settled: at three checkpoints in a row, the coreset of a tenth shares
            85 % of its samples with the one at half the epochs so far. If that never happens, it scores at the end. The
            scores' metadata hold the epoch, or None, as `settled_epoch`. "auto" needs `history="full"`, because a
            resumed run compares the earlier checkpoints again.
        stop_at_cutoff: End training at `cutoff_epoch`.
        every_n_epochs: Log after every n-th epoch; `cutoff_epoch` must be a multiple of it.
        loss_fn: A function of (outputs, targets), or a loss module, that returns one loss per sample. Integer targets
            `[B]` are the classes. Other targets put all samples into one class.
        step: A function `(module, batch) -> (losses, classes)`, or for streams `(losses, classes, positions)`, that
            does what a `cld_step` does, for a module that you can't change. It gets the LightningModule in evaluation
            mode, and the batch on the device. Not with `loss_fn`, nor for a module that has a `cld_step`.
        train_dataloader: A loader over the same train samples at the same positions, for example without augmentation.
            Of a map-style dataset the callback reads the loader's dataset and settings, and never iterates the loader.
            A stream that is given here is read itself, or a copy of it if the training reads the same dataset.
        val_dataloader: A loader over the validation samples to score against.
        batch_size: Number of samples evaluated at a time; None uses the loader's. Larger batches are faster. Streams
            make their own.
        num_samples: The number of train samples, for a stream whose step returns positions: these are 0 to
            `num_samples - 1`. Not needed for names, nor for map-style datasets.
        history: "full" keeps all losses, 4 bytes per sample and checkpoint. "running" keeps only what the scores and
            their summary need: 36 bytes per training sample for any number of epochs (38 with more than 32,767
            classes), 52 per validation sample, and 0.4 bytes for the best tenth at half of the epochs. The scores are
            the same within 1e-5, and so is what the rule "draw" goes by, but for samples at the edge of a bin. There
            are no `trajectories`, no file of them, and no scores of an earlier cutoff; and a sample that has no
            loss at a checkpoint which others have is unscored. A warning at the start names "running" where the losses
            will take more than 1 GiB.
        record: "sweep" evaluates the train set at every checkpoint. "step" evaluates it only before the first step, and
            takes the losses of each epoch from its training steps. These must return {"loss": ...,
            "sample_losses": ..., "sample_index": ...}, the last two with shape `[B]`; see `IndexedDataset`. The
            validation set is still evaluated at every checkpoint. A sample that an epoch's steps did not see has no
            loss there. Use such scores for `select(rule="draw")` and `suspects()`. The rule "top" refuses them: they
            share only a fifth of the best tenth with the scores of sweeps. "step" excludes `history="running"`,
            `cutoff_epoch="auto"` and `every_n_epochs`.
        buffer_device: Device that stores the history; None uses the training device.
        dirpath: Folder for the files, or a URL that fsspec can write to, such as `s3://bucket/runs`. None uses the
            logger's folder, or else the Trainer's `default_root_dir`.
        filename: Name of the scores file, without `.npz`. The losses get the same name with "-trajectories" in place of
            "-scores" or at its end. Your own name also becomes a part of the keys in loggers: `cld/<filename>/...`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or they contradict each other.

    Example:
        >>> import tempfile
        >>> import lightning as L
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_cld import CLDCallback
        >>> class Line(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(1, 2)
        ...     def forward(self, inputs):
        ...         return self.net(inputs)
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> points = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> train = DataLoader(TensorDataset(points, labels), shuffle=True)
        >>> val = DataLoader(TensorDataset(points + 0.5, labels))
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cld = CLDCallback(cutoff_epoch=4, stop_at_cutoff=True, val_dataloader=val, dirpath=folder)
        ...     L.Trainer(max_epochs=8, callbacks=[cld], accelerator="cpu", enable_checkpointing=False, **quiet).fit(
        ...         Line(), train
        ...     )
        ...     cld.scores_path.name, cld.scores_path.exists()
        ('cld-scores.npz', True)
        >>> cld.scores
        CLDScores(4 samples, 2 classes, 5 checkpoints)
        >>> cld.trajectories
        LossTrajectories(5 checkpoints, 4 train and 4 val samples)
    """

    def __init__(
        self,
        *,
        cutoff_epoch: int | Literal["auto"] | None = None,
        stop_at_cutoff: bool = False,
        every_n_epochs: int = 1,
        loss_fn: LossFunction | None = None,
        step: StepFunction | None = None,
        train_dataloader: DataLoader[Any] | None = None,
        val_dataloader: DataLoader[Any] | None = None,
        batch_size: int | None = None,
        num_samples: int | None = None,
        history: Literal["full", "running"] = "full",
        record: Literal["sweep", "step"] = "sweep",
        buffer_device: str | torch.device | None = None,
        dirpath: str | Path | None = None,
        filename: str = _FILENAME,
    ) -> None:
        self._timeline = Timeline(
            cutoff_epoch, every_n_epochs, stop_at_cutoff=stop_at_cutoff, history=history, record=record
        )
        self._results = Results(dirpath, filename)
        self._recorder = Recorder(
            every_n_epochs=self._timeline.every_n_epochs,
            loss_fn=loss_fn,
            step=step,
            train_dataloader=train_dataloader,
            val_dataloader=val_dataloader,
            batch_size=batch_size,
            num_samples=num_samples,
            buffer_device=buffer_device,
            running=history == "running",
            from_steps=record == "step",
        )
        self.cutoff_epoch = self._timeline.cutoff_epoch
        self.stop_at_cutoff = stop_at_cutoff
        self.every_n_epochs = self._timeline.every_n_epochs
        self.history = history
        self.record = record
        self.dirpath = self._results.dirpath
        self.filename = self._results.filename
        self._fitted_here = False
        self._fitting = False
        self._finished = False
        self._restored = False
        self._module: ReferenceType[LightningModule] | None = None
        self._forget()
        self._scores: CLDScores | None = None
        self._scored: list[int] = []  # the checkpoints at that time

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None}  # a weak reference can't be pickled

    # What the user reads

    @property
    def trajectories(self) -> LossTrajectories:
        """The losses logged so far.

        Raises:
            RuntimeError: If nothing was logged in this process, or `history` is "running".
        """
        recorded = self._recorded
        if isinstance(recorded, RunningHistory):
            raise RuntimeError(
                "CLDCallback(history='running') keeps no losses, only what the scores need, so there are no "
                "trajectories. Read .scores, or log with history='full'."
            )
        return recorded

    @property
    def scores(self) -> CLDScores:
        """The scores, computed when first asked for.

        After a fit whose processes are gone (ddp_spawn, ddp_fork) they are read from the file in `dirpath`.

        Raises:
            RuntimeError: If nothing was logged in this process.
            ValueError: If the logged losses give no scores: too few checkpoints, the cutoff not reached, or a
                validation loss that was not finite.
        """
        saved = None if self._fitted_here else self._results.saved_scores()
        if saved is not None:
            return saved
        if self._scores is None or self._scored != self._recorded.epochs:  # asked for before, while training
            self._scores, self._scored = self._recorded.score(self._timeline.cutoff), list(self._recorded.epochs)
        return self._scores

    @property
    def scores_path(self) -> Path | str | None:
        """Where the scores are (or will be) saved; None until a fit decides it, if `dirpath` was not given.

        A URL is text.
        """
        return self._results.scores_path

    @property
    def _recorded(self) -> LossTrajectories | RunningHistory:
        if self._recorder.history is None:
            raise RuntimeError(
                "CLDCallback has logged nothing in this process. Fit a Trainer that has it among its callbacks; if its "
                "processes were spawned or forked (ddp_spawn, ddp_fork), what they logged is only in the files: give "
                "CLDCallback(dirpath=...) and load them from there."
            )
        return self._recorder.history

    # When to do what

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # `trainer.test(ckpt_path=...)` restores callbacks too, and must not disturb what a fit logged.
        self._fitting = stage == "fit" and not _is_dev_run(trainer)
        if not self._fitting:
            return
        self._fitted_here = True
        self._scores, self._finished, self._restored = None, False, False
        is_same_module = self._module is not None and self._module() is pl_module
        self._module = ref(pl_module)
        if _is_untrained(trainer) or not is_same_module:
            self._forget()
            # Another module in the same Trainer, as in cross-validation: its epochs are counted from here.
            self._timeline.epochs_before = trainer.current_epoch
        self._check_names(trainer)
        self._results.choose_folder(trainer)
        self._timeline.begin(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._fitting:
            rank_zero_info("CLD: fast_dev_run has too few epochs for scores, so nothing is logged.")
            return
        self._timeline.check_max_steps(trainer, pl_module)
        self._recorder.start(trainer, pl_module)
        self._recorder.checkpoints = len(self._timeline.planned) or None
        self._results.begin(trainer, self._recorder.history)  # now, so that what can't be written costs no training
        self._warn_of_size()
        epoch = self._timeline.completed(trainer)
        if _is_untrained(trainer) or (epoch == 0 and not self._restored):
            is_known = self._recorder.sources.is_known
            self._sweep_or_end(trainer, pl_module, epoch=0)
            if not is_known:
                self._warn_of_size()
        elif self._recorder.history is None:
            rank_zero_warn(
                f"CLD: training goes on at step {trainer.global_step} without losses logged before, so theta_0 is "
                "missing from the timeline. Scores are better with it: start the proxy anew if you can."
            )
        elif self._timeline.is_due(epoch) and epoch > self._swept:
            # A checkpoint written in an epoch's last batch resumes behind that epoch's end. A sweep that was tried
            # and failed then is no such case: the weights may be of any later step by now.
            self._sweep_or_end(trainer, pl_module, epoch)
        self._timeline.look_whether_settled(trainer, self._recorder.history)
        if self.stop_at_cutoff and self._timeline.is_past_cutoff(epoch):
            trainer.should_stop = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder.step_losses is not None and self._fitting and not self._finished:
            self._recorder.step_losses.add(trainer, outputs)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._own_validation.start()

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._fitting and not trainer.sanity_checking:
            self._own_validation.add(outputs)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fitting and not trainer.sanity_checking:
            self._own_validation.end(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = self._timeline.completed(trainer) + 1
        if not self._fitting or not self._timeline.is_due(epoch):
            return
        if _trained_batches(trainer) == self._swept_at:
            # Lightning skips an epoch when it resumes from a checkpoint that an exception wrote before its first batch.
            self._recorder.leave_holes(epoch)
        elif not interruptible(trainer, partial(self._sweep_or_warn, trainer, pl_module, epoch)):
            return  # Lightning ends the run once the other callbacks had their turn, which may save a checkpoint
        self._timeline.look_whether_settled(trainer, self._recorder.history)
        if self._timeline.is_past_cutoff(epoch):
            self._finish(trainer, pl_module)
            self._recorder.release()  # of the sweeps' workers too, though training may go on
            if self.stop_at_cutoff:
                trainer.should_stop = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fitting and not self._finished:
            self._finish(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A finished run that is resumed trains no more, but its files may be missing, and its last row.
        if self._fitting and not self._finished:
            self._make_up_at_end(trainer, pl_module)
            self._finish(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._recorder.release()
        self._results.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # No collectives here: the other ranks may be elsewhere.
        if self._fitting and not self._finished and trainer.is_global_zero and self._recorder.history is not None:
            self._note(trainer, pl_module)
            self._results.save_interrupted(self._recorded)
        self._results.close()

    # What a checkpoint of Lightning's holds

    @property
    @override
    def state_key(self) -> str:
        # The names of their files tell several callbacks in one Trainer apart.
        return super().state_key if self.filename == _FILENAME else self._generate_state_key(filename=self.filename)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in _OF_THE_TIMELINE},
            "settled": self._timeline.settled,
            "swept": self._swept,
            "swept_at": self._swept_at,
            "epochs_before": self._timeline.epochs_before,
            **self._recorder.state_dict(),
            **self._results.state_dict(self._recorder.history),
        }

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # What an earlier fit of the same Trainer logged is not this checkpoint's past, even if it has no state of ours.
        if self._fitting:
            self._forget()
            self._restored = True

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._fitting:
            return
        for name in _OF_THE_TIMELINE:
            if state_dict[name] != getattr(self, name):
                raise ValueError(
                    f"The checkpoint was logged with CLDCallback({name}={state_dict[name]!r}), this run has "
                    f"{name}={getattr(self, name)!r}: their timelines don't fit together. Use the former value, or "
                    "resume without the callback."
                )
        self._recorder.load_state_dict(state_dict, self._results.load_state_dict(state_dict))
        self._swept = state_dict["swept"]
        self._swept_at = state_dict.get("swept_at", -1)  # not in checkpoints of earlier versions
        self._timeline.epochs_before = state_dict.get("epochs_before", 0)
        self._timeline.settled = state_dict["settled"]

    def _forget(self) -> None:
        self._recorder.forget()
        self._results.forget()
        self._timeline.forget()
        self._own_validation = OwnValidation()
        self._swept = 0  # the newest due epoch whose sweep was tried, whether or not it could be logged
        self._swept_at = -1  # how many batches had been trained on then

    # What is done then

    def _warn_of_size(self) -> None:
        sources = self._recorder.sources
        if self.history == "full" and self.record == "sweep" and sources.is_known:
            self._timeline.warn_of_size(sources.train.length or 0, len(sources.val.positions))

    def _sweep_or_end(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        if not interruptible(trainer, partial(self._sweep, trainer, pl_module, epoch)):
            raise SIGTERMException  # before a step moves the weights, so that nothing is lost

    def _make_up_at_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the last checkpoint of a run that trains no more.

        A signal had stopped that sweep, or the run was resumed from where `max_steps` ends it, in mid-epoch or in an
        epoch's last batch: Lightning then ends it without the end of that epoch.
        """
        epoch = _begun_epochs(trainer) - self._timeline.epochs_before
        if self._recorder.history is None or not self._timeline.is_due(epoch) or epoch <= self._swept:
            return
        device = pl_module.device
        pl_module.to(trainer.strategy.root_device)  # from where Lightning has just moved it to the CPU
        try:
            self._recorder.start(trainer, pl_module)
            self._sweep_or_end(trainer, pl_module, epoch)
            self._timeline.look_whether_settled(trainer, self._recorder.history)
        except Exception as error:  # noqa: BLE001  # the training has succeeded
            rank_zero_warn(f"CLD: the losses after {epoch} epochs could not be logged: {error}")
        finally:
            pl_module.to(device)

    def _sweep_or_warn(self, trainer: Trainer, pl_module: LightningModule, epoch: int, is_stopped: IsStopped) -> None:
        try:
            self._sweep(trainer, pl_module, epoch, is_stopped)
        except StoppedError:
            raise
        except Exception as error:  # noqa: BLE001  # watching must not end a training that runs
            rank_zero_warn(f"CLD: the losses after {epoch} epochs could not be logged: {error}")

    def _sweep(self, trainer: Trainer, pl_module: LightningModule, epoch: int, is_stopped: IsStopped) -> None:
        tried = epoch, _trained_batches(trainer)
        try:
            checkpoint = self._recorder.record(trainer, pl_module, epoch, is_stopped)
        except StoppedError:  # like Ctrl-C, after which a resumed run makes up for this sweep
            raise
        except Exception:
            self._swept, self._swept_at = tried
            raise
        self._swept, self._swept_at = tried
        if isinstance(self._recorded, RunningHistory) and epoch == self._timeline.half_epoch:
            self._recorded.keep_best_tenth()
        self._note(trainer, pl_module)
        self._results.keep(self._recorded)
        log_checkpoint(trainer, checkpoint, self._recorded, self._timeline.settling, self._prefix)
        if self._recorder.sources.own_val:
            self._own_validation.compare(trainer, checkpoint.val_loss)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores, saves and says so, on rank 0, while the other ranks wait. Figures are drawn when they go on."""
        self._finished = True
        scores = self._score_and_save(trainer, pl_module) if trainer.is_global_zero else None
        trainer.strategy.barrier("CLD scores are saved")  # the next thing that a rank does may be to load them
        if scores is not None:
            log_scores(trainer, scores, self._recorded, self._prefix)

    def _score_and_save(self, trainer: Trainer, pl_module: LightningModule) -> CLDScores | None:
        if self._recorder.history is None:
            rank_zero_warn("CLD: training ended before anything was logged; there are no scores.")
            return None
        self._note(trainer, pl_module)
        try:
            scores = self.scores
        except Exception as error:  # noqa: BLE001  # the training that was watched has succeeded
            saved = self._results.save_losses(self._recorded)
            kept = "" if saved is None else f" The logged losses are in {saved}: LossTrajectories.load(...).score()."
            rank_zero_warn(f"CLD: no scores were saved. {error}{kept}")
            return None
        self._results.save(self._recorded, scores, self._recorder.seconds)
        return scores

    @property
    def _prefix(self) -> str:
        """What the keys of this callback's values begin with in loggers."""
        return "cld" if self.filename == _FILENAME else f"cld/{self.filename.removesuffix('-scores')}"

    def _check_names(self, trainer: Trainer) -> None:
        """Raises if another CLDCallback of the Trainer would write a file of the same name."""
        for other in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it in a connector
            if not isinstance(other, CLDCallback) or other is self or other._results.dirpath != self._results.dirpath:
                continue
            shared = sorted(other._results.names & self._results.names)
            if shared:
                raise ValueError(
                    f"Two CLDCallbacks would write {shared[0]}.npz: filename={self.filename!r} and "
                    f"filename={other.filename!r}. Give them names that differ by more than such an ending."
                )

    def _note(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes into the history what made it."""
        about: dict[str, Any] = {
            "cutoff_epoch": self.cutoff_epoch,
            "every_n_epochs": self.every_n_epochs,
            "max_epochs": self._timeline.max_epochs,
            "history": self.history,
            "sweep_seconds": round(self._recorder.seconds, 3),
        }
        settling = self._timeline.settling
        if self.cutoff_epoch == "auto":
            about["settled_epoch"] = self._timeline.settled
        if self.history == "running":  # known if they were looked at for a logger
            shared = settling.overlaps.half
            about |= {
                "half_epoch": settling.half_epoch,
                "half_overlap": None if shared is None else round(shared, 4),
            }
        self._results.note(trainer, pl_module, self._recorded, about)


_OF_THE_TIMELINE = ("every_n_epochs", "cutoff_epoch", "history", "record")
"""Arguments that must be the same where a run goes on."""


def _is_dev_run(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _is_untrained(trainer: Trainer) -> bool:
    """Whether the weights are theta_0.

    `global_step` alone does not say: with manual optimization it may stay 0.
    """
    return trainer.global_step == 0 and _trained_batches(trainer) == 0


def _begun_epochs(trainer: Trainer) -> int:
    return trainer.fit_loop.epoch_progress.current.ready


def _trained_batches(trainer: Trainer) -> int:
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready
