"""`trajectories_from_checkpoints`: the losses of a finished run, from the checkpoints that Lightning saved in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cld.guards import preserved_module
from lightning_cld.recording.batch_losses import LossFunction
from lightning_cld.recording.checkpoint_files import files_by_epoch, read_checkpoint
from lightning_cld.recording.progress_bar import find_bar, progress
from lightning_cld.recording.recorder import Recorder
from lightning_cld.trajectories import LossTrajectories


def trajectories_from_checkpoints(
    trainer: Trainer,
    model: LightningModule,
    paths: Iterable[str | Path],
    datamodule: LightningDataModule | None = None,
    *,
    train_dataloader: DataLoader[Any] | None = None,
    val_dataloader: DataLoader[Any] | None = None,
    loss_fn: LossFunction | None = None,
    batch_size: int | None = None,
    buffer_device: str | torch.device | None = None,
    weights_only: bool = True,
) -> LossTrajectories:
    """Logs the losses of a run that is over, from its checkpoint files, without training.

    The rows are those that `CLDCallback` logs in such a run, bit for bit where the device, the precision, the batch
    size and the number of processes (one) are the same: one for each file, ordered by the number of epochs that were
    completed when it was saved. That may be in an epoch's last batch, after its validation, or at its very end, but
    not in mid-epoch, nor at the end of a last epoch that `max_steps` cut short. Differences are taken between one file
    and the next, so they should be evenly spaced. One should be from before the first step (theta_0), which
    `ModelCheckpoint` does not save by itself:

        class SaveStart(Callback):
            def on_train_start(self, trainer, pl_module):
                if trainer.global_step == 0:
                    trainer.save_checkpoint("checkpoints/start.ckpt")

    The Trainer sets the model and the data up as for `fit`: it calls `setup("fit")`, `configure_optimizers` and
    `on_fit_start`, but none of its own callbacks or loggers; only its progress bar shows how far the work has come.
    Afterwards the weights, buffers and modes of `model` are what they were (a copy of them is kept meanwhile), and the
    Trainer has its callbacks, loggers, progress and optimizers back.

    Args:
        trainer: A Trainer for one device, with the precision of the run. The one that trained will do.
        model: The LightningModule; its own weights don't matter.
        paths: Checkpoint files of one run, in any order, none from mid-epoch and one for each epoch at most.
        datamodule: The datamodule of the run. Without one, give `train_dataloader` and `val_dataloader`, unless the
            model has its own.
        train_dataloader: A loader over the train set, or an un-augmented view of the datamodule's.
        val_dataloader: A loader over the validation samples to score against.
        loss_fn: As in `CLDCallback`; a `cld_step` of the model is used as there, too.
        batch_size: Samples evaluated at a time; None takes the loader's.
        buffer_device: Where the losses are kept; None: the Trainer's device.
        weights_only: Load tensors and plain values only. False also runs whatever code a file contains, which some
            hyperparameters need: only for files that you trust.

    Returns:
        The losses, float32 `[T, N]` and `[T, M]`, for T files.

    Raises:
        TypeError: If an argument has the wrong type, or a loader can't be read.
        FileNotFoundError: If there is no file at one of `paths`.
        ValueError: If a file is no checkpoint of Lightning's, of another model, or from mid-epoch, two are of the same
            epoch, there is no data, or the Trainer uses several processes. All of this is found before the first sweep.

    Example:
        >>> import tempfile
        >>> import lightning as L
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_cld import trajectories_from_checkpoints
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
        ...     def on_train_epoch_end(self):
        ...         self.trainer.save_checkpoint(f"{folder}/{self.current_epoch}.ckpt")
        >>> loader = DataLoader(TensorDataset(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])))
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = L.Trainer(max_epochs=4, accelerator="cpu", enable_checkpointing=False, **quiet)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer.fit(model := Line(), loader)
        ...     files = [f"{folder}/{epoch}.ckpt" for epoch in range(4)]
        ...     trajectories_from_checkpoints(trainer, model, files, train_dataloader=loader, val_dataloader=loader)
        LossTrajectories(4 checkpoints, 2 train and 2 val samples)
    """
    recorder = Recorder(
        every_n_epochs=None,
        loss_fn=loss_fn,
        train_dataloader=train_dataloader,
        val_dataloader=val_dataloader,
        batch_size=batch_size,
        buffer_device=buffer_device,
    )
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a LightningModule, got {model!r}.")
    if trainer.world_size > 1 or trainer.strategy.launcher is not None:
        raise ValueError(
            f"trajectories_from_checkpoints runs in one process, but this Trainer has {trainer.world_size} with "
            f"{type(trainer.strategy).__name__}. Give it a Trainer(devices=1), without a strategy."
        )
    if datamodule is not None:
        data: dict[str, Any] = {"datamodule": datamodule}
    elif _has_train_dataloader(model):
        data = {"val_dataloaders": val_dataloader}
    elif train_dataloader is not None:
        data = {"train_dataloaders": train_dataloader, "val_dataloaders": val_dataloader}
    else:
        raise ValueError("There is no train set: give datamodule=..., or train_dataloader=... and val_dataloader=....")
    # Before the Trainer does anything; whether they are of this model is known once it has set the model up.
    files = files_by_epoch(paths, weights_only)

    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]  # Lightning sets it in a connector

    def sweep() -> None:
        module = trainer.lightning_module
        for path in files.values():
            _check_weights(module, _weights(module, read_checkpoint(path, weights_only)), path)
        recorder.start(trainer, module, callbacks)
        with progress(trainer, "CLD checkpoints", nested=False) as show:
            for done, (epoch, path) in enumerate(files.items()):
                show(done, len(files))
                _restore(trainer, module, read_checkpoint(path, weights_only), epoch)
                recorder.record(trainer, module, epoch)

    with preserved_module(model):
        try:
            _instead_of_training(sweep, trainer, model, last_epoch=max(files), **data)
        finally:
            recorder.release()
    trajectories = recorder.history
    if not isinstance(trajectories, LossTrajectories):
        raise RuntimeError("The Trainer did not get as far as to training. Does model.on_fit_start end the process?")
    trajectories.metadata.update(
        model=type(trainer.lightning_module).__name__,
        precision=str(trainer.precision),
        sweep_seconds=round(recorder.seconds, 3),
        checkpoints=[str(path) for path in files.values()],
    )
    return trajectories


def _has_train_dataloader(model: torch.nn.Module) -> bool:
    """Whether the model brings its own train set."""
    # By name, since the module may come from the package pytorch_lightning as well, or be compiled.
    return getattr(getattr(model, "train_dataloader", None), "__qualname__", "") != "DataHooks.train_dataloader"


def _weights(module: LightningModule, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The module's `state_dict` in a checkpoint, by the names that the module has for it now."""
    module.on_load_checkpoint(checkpoint)  # which may change what is loaded
    # WeightAveraging puts its average in the place of the weights that are trained, and these here.
    saved = checkpoint.get("current_model_state", checkpoint["state_dict"])
    names = {_uncompiled(name): name for name in module.state_dict()}
    return {names.get(_uncompiled(name), name): value for name, value in saved.items()}


def _uncompiled(name: str) -> str:
    """The name of a weight without what torch.compile adds to it."""
    return name.replace("_orig_mod.", "")


def _check_weights(module: LightningModule, weights: dict[str, Any], path: Path) -> None:
    """Raises unless `weights` have the names and shapes of the module's own."""
    own = module.state_dict()
    problems = [
        f"{name} has shape {list(weights[name].shape)}, not {list(value.shape)}"
        for name, value in own.items()
        if isinstance(value, Tensor) and isinstance(weights.get(name), Tensor) and weights[name].shape != value.shape
    ]
    if module.strict_loading:
        problems += [f"{name} is missing" for name in own if name not in weights]
        problems += [f"{name} is not a weight of this model" for name in weights if name not in own]
    elif not own.keys() & weights.keys():
        problems.append("it has none of this model's weights")
    if problems:
        more = f" and {len(problems) - 3} more differences" if len(problems) > 3 else ""
        raise ValueError(
            f"{path} is of another model than {type(module).__name__}: {'; '.join(problems[:3])}{more}. Make the model "
            "with the hyperparameters of the run, and give files of that run only."
        )


def _restore(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], epoch: int) -> None:
    """Puts a checkpoint's weights into the module, and its progress into the Trainer."""
    module.load_state_dict(_weights(module, checkpoint), strict=module.strict_loading)
    # A loss may depend on the epoch or the step. The callback sweeps while the epoch still counts as the current one.
    trainer.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])
    trainer.fit_loop.epoch_progress.current.completed = max(epoch - 1, 0)


def _instead_of_training(
    work: Callable[[], None], trainer: Trainer, model: LightningModule, *, last_epoch: int, **data: Any
) -> None:
    """Calls `work` where `trainer.fit(model, **data)` would train, between its set-up and its teardown.

    Lightning has no public call that only sets a model and its data up, on their device and in their precision. So
    `fit` is called, and meanwhile the Trainer has another fit loop, made from the private class of its own, whose
    `run` does the work. No callback or logger takes part, which would take it for a training; the progress bar is only
    set up and torn down.
    """
    own = trainer.fit_loop
    loop = type(own)(trainer, min_epochs=own.min_epochs, max_epochs=own.max_epochs or last_epoch)
    loop.epoch_loop.max_steps = own.max_steps

    def run() -> None:
        loop.setup_data()
        loop.teardown()  # lets the workers go that it has started; the loaders stay
        work()

    loop.run = run  # type: ignore[method-assign]  # the loop of this run only: it trains nothing
    bar = find_bar(trainer)
    meanwhile = {
        "fit_loop": loop,
        "callbacks": [] if bar is None else [bar],
        "loggers": [DummyLogger() for _ in trainer.loggers],
        "num_sanity_val_steps": 0,
        "datamodule": None,  # of an earlier fit
    }
    before = {name: getattr(trainer, name) for name in meanwhile}
    optimizers, schedulers = trainer.optimizers, trainer.lr_scheduler_configs
    try:
        for name, value in meanwhile.items():
            setattr(trainer, name, value)
        trainer.fit(model, **data)
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
        trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = optimizers, schedulers
