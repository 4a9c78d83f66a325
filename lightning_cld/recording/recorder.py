"""`Recorder`: takes one checkpoint after the other, of a running fit or from files, into a history of losses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cld.data.indexed import check_indexed
from lightning_cld.functional.checks import check_class_pair, check_count, listed
from lightning_cld.guards import agreed, is_a
from lightning_cld.recording.agreement import check_ranks, check_recorded, describe
from lightning_cld.recording.batch_hooks import BatchHooks
from lightning_cld.recording.batch_losses import LossFunction, OutputsStep, Step, StepFunction, check_loss, make_step
from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.recording.signals import IsStopped
from lightning_cld.recording.sources import Sources, find_sources
from lightning_cld.recording.stream_reading import Seen
from lightning_cld.recording.stream_sweep import StreamSweep
from lightning_cld.recording.training_steps import StepLosses
from lightning_cld.scores import OUTSIDE
from lightning_cld.trajectories import LossTrajectories

_RESERVED = 2**30
"""Bytes of a device (1 GiB) that are reserved for losses which are not logged yet, at most."""


class Checkpoint(NamedTuple):
    """What a sweep came to.

    Attributes:
        epoch: Completed epochs.
        train_loss: Mean of the finite losses; NaN if there is none.
        val_loss: The same of the validation samples.
        seconds: How long it took.
    """

    epoch: int
    train_loss: float
    val_loss: float
    seconds: float


class Recorder:
    """Sweeps the train and the validation set and keeps the losses, or the moments of them that scores need.

    The arguments are those of `CLDCallback`, and the checks of them are here; `running` is whether its `history` is.
    `every_n_epochs` None means that no checkpoint is due at an epoch of its own, so none can be missing. With
    `from_steps` only the train set's first row is swept; for the others `step_losses` takes what training steps return.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
    """

    # Of the fit that goes on.
    step: Step
    sources: Sources
    _hooks: BatchHooks
    _found_for: Any

    def __init__(
        self,
        *,
        every_n_epochs: int | None,
        loss_fn: LossFunction | None,
        step: StepFunction | None,
        train_dataloader: DataLoader[Any] | None,
        val_dataloader: DataLoader[Any] | None,
        batch_size: int | None,
        buffer_device: str | torch.device | None,
        num_samples: int | None = None,
        running: bool = False,
        from_steps: bool = False,
    ) -> None:
        if batch_size is not None:
            batch_size = check_count("batch_size", batch_size)
        if num_samples is not None:
            num_samples = check_count("num_samples", num_samples)
        if buffer_device is not None:
            buffer_device = torch.device(buffer_device)
        check_loss(loss_fn, step)
        self.every_n_epochs = every_n_epochs
        self.loss_fn = loss_fn
        self.step_fn = step
        self.train_dataloader = train_dataloader
        self.val_dataloader = val_dataloader
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.buffer_device = buffer_device
        self.running = running
        self.step_losses = StepLosses() if from_steps else None
        self.checkpoints: int | None = None  # of the whole run, where that is known
        self.forget()

    def forget(self) -> None:
        """Drops what was recorded."""
        self.history: LossTrajectories | RunningHistory | None = None
        self.seconds = 0.0
        self._seen: dict[str, Seen] = {}  # what sweeps over streams saw
        self._diverged = False
        if self.step_losses is not None:
            self.step_losses.forget()

    def start(self, trainer: Trainer, module: LightningModule, callbacks: Sequence[Callback] | None = None) -> None:
        """Finds the data and the loss of a fit that is about to take its first step.

        Args:
            trainer: The Trainer of the fit.
            module: Its module.
            callbacks: Those that may prepare batches; None takes the Trainer's.

        Raises:
            TypeError: If the module or a loader can't be used.
            ValueError: If there is no reference, or the data are not those recorded so far.
        """
        _check_strategy(trainer)
        with agreed(trainer, "Finding the loss"):
            self.step = make_step(module, self.loss_fn, self.step_fn)
        self._hooks = BatchHooks(trainer.callbacks if callbacks is None else callbacks, module)  # type: ignore[attr-defined]  # Lightning sets it in a connector
        self._find_data(trainer)
        if self.history is not None:
            self.history.to(self.buffer_device or module.device)
        self._start_steps(trainer, module)

    def record(
        self, trainer: Trainer, module: LightningModule, epoch: int, is_stopped: IsStopped | None = None
    ) -> Checkpoint:
        """Takes the checkpoint after `epoch` completed epochs, from the weights of the moment.

        It can be taken again after an error.

        Args:
            trainer: The Trainer of the fit.
            module: Its module.
            epoch: The number of completed epochs.
            is_stopped: Says before each batch whether to end early; None asks the Trainer whether it got a SIGTERM.

        Raises:
            StoppedError: If it is to end early, on all ranks.
        """
        is_stopped = is_stopped or (lambda: trainer.received_sigterm)
        started = time.perf_counter()
        if trainer.train_dataloader is not self._found_for:  # reload_dataloaders_every_n_epochs
            self._find_data(trainer)
        train_row, val_row, train_classes, val_classes = self._sweep(trainer, module, is_stopped)
        self._check_val(epoch, val_row, train_classes, val_classes)
        if self.history is None:
            self._begin(module, epoch, train_row, val_row, train_classes, val_classes)
            self._start_steps(trainer, module)
        else:
            _check_order(self.history, train_classes, val_classes)
            self._reserve()
            self.leave_holes(epoch - 1)
            self.history.record(epoch, train_row, val_row)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return Checkpoint(epoch, _mean(train_row), _mean(val_row), seconds)

    def _sweep(
        self, trainer: Trainer, module: LightningModule, is_stopped: IsStopped
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The losses of the train and the validation set, and the classes of both."""
        step_row = None if self.step_losses is None else self.step_losses.row(trainer)
        if step_row is None or self.history is None:
            train_row, train_classes = self.sources.train.run(trainer, module, self.step, self._hooks, is_stopped)
            val_row, val_classes = self.sources.val.run(trainer, module, self.step, self._hooks, is_stopped)
        else:
            train_row = step_row
            val_row, val_classes = self.sources.val.run(trainer, module, self.step, self._hooks, is_stopped)
            # Without classes the history has at most marks of what the sampler draws, which are made again below.
            train_classes = None if val_classes is None else self.history.train_classes
        self._note_seen()
        val_row = val_row[self.sources.val.positions.to(val_row.device)]
        self.step.check_sets(train_classes, val_classes)
        return train_row, val_row, *self._check_classes(train_classes, val_classes)

    def _check_val(self, epoch: int, row: Tensor, train_classes: Tensor | None, val_classes: Tensor | None) -> None:
        """Raises if a validation loss of a trained class is not finite before the first step; later it warns once."""
        infinite = row.isinf().cpu()
        if self._diverged or not infinite.any():
            return
        if train_classes is not None and val_classes is not None:
            infinite &= torch.isin(val_classes, train_classes)
        if not infinite.any():
            return
        losses = f"validation losses{_classes_at(infinite, val_classes)} are not finite"
        if epoch == 0:
            first = int(self.sources.val.positions[int(infinite.int().argmax())])
            seen = self._seen.get("val")
            which = repr(seen.names[first]) if seen is not None and seen.names is not None else f"position {first}"
            raise ValueError(
                f"Before the first step {losses} ({which} of the validation set, say), so nothing could be scored. "
                "Repair or leave out those samples."
            )
        self._diverged = True
        rank_zero_warn(f"CLD: {losses} after {epoch} epochs; checkpoints from here on can't be scored.")

    def _begin(
        self,
        module: LightningModule,
        epoch: int,
        train_row: Tensor,
        val_row: Tensor,
        train_classes: Tensor | None,
        val_classes: Tensor | None,
    ) -> None:
        """Begins a history with its first checkpoint."""
        begin: Callable[..., LossTrajectories | RunningHistory] = (
            RunningHistory.of_losses
            if self.running
            else partial(LossTrajectories, from_steps=self.step_losses is not None)
        )
        fingerprint, names = self.sources.fingerprint, None
        if fingerprint is not None:
            fingerprint = fingerprint.of_classes(train_classes)
        elif "train" in self._seen:
            names = self._seen["train"].names
        self.history = begin(
            train_row[None],
            val_row[None],
            train_classes,
            val_classes,
            [epoch],
            fingerprint=fingerprint,
            names=names,
        ).to(self.buffer_device or module.device)
        self._reserve()
        describe(self.history, self.sources)

    def _start_steps(self, trainer: Trainer, module: LightningModule) -> None:
        """Prepares for the losses of training steps, once it is known how many samples there are."""
        if self.step_losses is not None and self.sources.train.length is not None:
            names = None if self.history is None else self.history.names
            self.step_losses.start(trainer, self.sources.train.length, module.device, names)

    def _note_seen(self) -> None:
        """Keeps what sweeps over streams saw, for later ones and for a run that goes on."""
        for kind, sweep in (("train", self.sources.train), ("val", self.sources.val)):
            if isinstance(sweep, StreamSweep) and sweep.seen is not None:
                self._seen[kind] = sweep.seen

    def leave_holes(self, epoch: int) -> None:
        """Marks due checkpoints up to `epoch` that are missing: no difference spans them."""
        if self.history is None or self.every_n_epochs is None:
            return
        for missed in range(self.history.epochs[-1] + 1, epoch + 1):
            if missed % self.every_n_epochs == 0:
                self.history.leave_hole(missed)

    def release(self) -> None:
        """Lets go of the data and the module of a fit that is over; what was recorded stays."""
        for name in ("step", "sources", "_hooks", "_found_for"):
            vars(self).pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """What there is beside the history: plain values and tensors that `torch.load(weights_only=True)` reads."""
        return {
            "sweep_seconds": self.seconds,
            "loss": self._loss_name(),
            "step_losses": None if self.step_losses is None else self.step_losses.state_dict(),
            "streams": {kind: self._state_of(kind, seen) for kind, seen in self._seen.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], history: LossTrajectories | RunningHistory | None) -> None:
        """The inverse of `state_dict`, with the history that belongs to it."""
        self.history = history
        before, now = state.get("loss"), self._loss_name()
        if before != now and "loss" in state:  # not in checkpoints of earlier versions
            rank_zero_warn(
                f"CLD: the losses before this checkpoint were logged with {before or 'the default loss'}, those from "
                f"here on are with {now or 'the default loss'}. Scores need one loss: resume with the same."
            )
        self.seconds = state["sweep_seconds"]
        streams = state.get("streams", {})  # not in checkpoints of earlier versions
        self._seen = {}
        if history is not None and "val" in streams:
            self._seen["val"] = Seen.from_state_dict(streams["val"])
        if history is not None and "train" in streams:
            self._seen["train"] = _seen_train(history, **streams["train"])
        if self.step_losses is not None:
            self.step_losses.load_state_dict(state["step_losses"])

    def _loss_name(self) -> str | None:
        """What `loss_fn` or `step` is called; None for the default."""
        given = self.loss_fn if self.step_fn is None else self.step_fn
        return None if given is None else str(getattr(given, "__qualname__", type(given).__qualname__))

    def _state_of(self, kind: str, seen: Seen) -> dict[str, Any]:
        """What is kept of a stream's samples. Those of the train stream are in the history."""
        return seen.state_dict() if kind == "val" else {"length": seen.length, "one_class": seen.classes is None}

    def _reserve(self) -> None:
        """Makes room for the losses of the whole run, so that none are copied while it grows.

        A device gives the room at once, not as it is filled, so there it is no more than `_RESERVED`: the Trainer's
        default of 1,000 epochs must not take the memory from the training. Later rows get room one by one.
        """
        if self.checkpoints is None or not isinstance(self.history, LossTrajectories):
            return
        train_row, val_row = self.history.row(0)
        most = self.checkpoints if train_row.device.type == "cpu" else _RESERVED // (train_row.nbytes + val_row.nbytes)
        self.history.reserve(min(self.checkpoints, most))

    def _find_data(self, trainer: Trainer) -> None:
        with agreed(trainer, "Finding the data to sweep"):
            found = find_sources(
                trainer,
                self.train_dataloader,
                self.val_dataloader,
                self.batch_size,
                self.num_samples,
                self._seen,
                vars(self).get("sources"),
            )
            self._check_step(found)
            if self.step_losses is not None:
                check_indexed(getattr(trainer.train_dataloader, "dataset", None))
        check_ranks(trainer, found)
        if self.history is not None:
            check_recorded(self.history, found)
        self.sources = found
        self._found_for = trainer.train_dataloader

    def _check_step(self, found: Sources) -> None:
        """Raises if there is a stream, but a step that can't say which samples a batch holds."""
        for kind, sweep in (("train", found.train), ("validation", found.val)):
            if isinstance(sweep, StreamSweep) and isinstance(self.step, OutputsStep):
                raise TypeError(
                    f"The {kind} loader, a {sweep.readings.name}, is a stream: its samples have no positions of their "
                    "own, so the batches must say which samples they hold. Give CLDCallback step=..., a function of "
                    "(module, batch) that returns (losses, classes, positions), or define cld_step(self, batch) on the "
                    "LightningModule. Positions are integers [B] from 0 to num_samples - 1, or a list of B names. Or "
                    "give a DataLoader over a map-style dataset with the same samples: "
                    f"{'val' if kind == 'validation' else kind}_dataloader=... of CLDCallback."
                )

    def _check_classes(
        self, train_classes: Tensor | None, val_classes: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The sweeps' classes on the CPU, those of validation at evaluated positions only; raises if they can't serve.

        Here the user's classes are still apart from the mark of positions that are not evaluated, so negative ones
        can be refused.
        """
        used = self.sources.train.positions
        if val_classes is not None:
            val_classes = val_classes.cpu()[self.sources.val.positions]
        length = self.sources.train.length or 0
        if train_classes is None and val_classes is None and len(used) < length:
            # One class, but positions that the sampler never draws are to be told apart.
            train_classes = torch.full((length,), OUTSIDE).index_fill(0, used, 0)
            val_classes = torch.zeros(len(self.sources.val.positions), dtype=torch.int64)
        train_classes = None if train_classes is None else train_classes.cpu()
        check_class_pair(
            None if train_classes is None else train_classes[used],
            val_classes,
            len(used),
            len(self.sources.val.positions),
        )
        return train_classes, val_classes


def _check_strategy(trainer: Trainer) -> None:
    """Raises unless the module can be evaluated by itself, each process on its own share of the samples."""
    name = type(trainer.strategy).__name__
    if is_a(trainer.strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        raise TypeError(
            f"CLD does not support {name}, under which a module can't be evaluated outside of its wrapper. "
            "Train the proxy on one device, with DDP, or with ModelParallelStrategy."
        )
    layout = trainer.distributed_sampler_kwargs
    if layout is not None and layout["num_replicas"] != trainer.world_size:
        raise TypeError(
            f"CLD needs each process to take its own samples, but {name} has {layout['num_replicas']} data "
            f"parallel groups for {trainer.world_size} processes. Use ModelParallelStrategy(tensor_parallel_size=1)."
        )


def _check_order(
    history: LossTrajectories | RunningHistory, train_classes: Tensor | None, val_classes: Tensor | None
) -> None:
    """Raises unless a sweep gave the classes in the order of the first one."""
    for name, classes, known in (
        ("train", train_classes, history.train_classes),
        ("validation", val_classes, history.val_classes),
    ):
        if known is not None and (classes is None or not torch.equal(classes, known)):
            raise ValueError(
                f"the {name} set gave its classes in another order than before, so positions mean nothing. "
                "Its __getitem__ must return the same sample for the same position."
            )


def _seen_train(history: LossTrajectories | RunningHistory, *, length: int, one_class: bool) -> Seen:
    """What the first sweep over a train stream saw, from what was recorded."""
    classes = history.train_classes
    positions = torch.arange(length) if classes is None else torch.nonzero(classes != OUTSIDE).flatten()
    return Seen(length, positions, history.names, None if one_class else classes)


def _mean(losses: Tensor) -> float:
    return float(losses[losses.isfinite()].mean())


def _classes_at(chosen: Tensor, classes: Tensor | None) -> str:
    """The classes of the chosen samples for a message, as in " of class 3"; nothing where there is only one."""
    if classes is None:
        return ""
    return f" of {listed(torch.unique(classes[chosen]).tolist(), 'class', 'classes')}"
