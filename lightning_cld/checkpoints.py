"""`trajectories_from_checkpoints`: the losses of a finished run, computed from its Lightning checkpoint files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cld.guards import StoppedError, preserved_module
from lightning_cld.recording.batch_losses import LossFunction, StepFunction
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
    step: StepFunction | None = None,
    batch_size: int | None = None,
    num_samples: int | None = None,
    buffer_device: str | torch.device | None = None,
    weights_only: bool = True,
) -> LossTrajectories:
    """Computes the losses of a finished run from its checkpoint files, without training.

    Each file gives one checkpoint, ordered by completed epochs. Its losses are bit for bit those that `CLDCallback`
    logs, if the device, precision, batch size and number of processes (one) are the same.

    A file may be saved in the last batch of an epoch, after validation, or at the epoch's end. It may not be saved in
    mid-epoch, or at the end of a last epoch that `max_steps` cut short. Differences are taken between consecutive
    files, so the files should be evenly spaced. One file should be from before the first step (theta_0).
    `ModelCheckpoint` does not save it; this callback does:

        class SaveStart(Callback):
            def on_train_start(self, trainer, pl_module):
                if trainer.global_step == 0:
                    trainer.save_checkpoint("checkpoints/start.ckpt")

    The Trainer sets up the model and the data as in `fit`: it calls `setup("fit")`, `configure_optimizers` and
    `on_fit_start`. It calls no callbacks and no loggers, except that its progress bar shows the progress. Afterwards
    the weights, buffers and modes of `model` are restored from a copy. The Trainer gets its callbacks, loggers,
    progress and optimizers back.

    Args:
        trainer: A Trainer for one device, with the precision of the run. The Trainer that trained is fine.
        model: The LightningModule. Its current weights don't matter.
        paths: Checkpoint files of one run, in any order, at most one per epoch and none from mid-epoch.
        datamodule: The datamodule of the run. Without it, give `train_dataloader` and `val_dataloader`, unless the
            model defines its own.
        train_dataloader: A loader over the train set, or over an un-augmented view of the datamodule's train set.
        val_dataloader: A loader over the validation samples to score against.
        loss_fn: As in `CLDCallback`, and so is a `cld_step` method of the model.
        step: As in `CLDCallback`.
        batch_size: Samples evaluated at a time; None uses the loader's.
        num_samples: As in `CLDCallback`.
        buffer_device: Device that stores the losses; None uses the Trainer's.
        weights_only: Load only tensors and plain values. Some hyperparameters need False, which also runs any code in
            the files: use it only for files that you trust.

    Returns:
        The losses, float32 `[T, N]` and `[T, M]`, for T files.

    Raises:
        TypeError: If an argument has the wrong type, or a loader can't be read.
        FileNotFoundError: If a file in `paths` does not exist.
        ValueError: If a file is not a Lightning checkpoint, is from another model or from mid-epoch, two files are from
            the same epoch, there is no data, or the Trainer uses several processes. All these errors come before the
            first sweep.

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
        step=step,
        train_dataloader=train_dataloader,
        val_dataloader=val_dataloader,
        batch_size=batch_size,
        num_samples=num_samples,
        buffer_device=buffer_device,
    )
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a LightningModule, got {model!r}.")
    if trainer.world_size > 1 or trainer.strategy.launcher is not None:
        raise ValueError(
            f"trajectories_from_checkpoints runs in one process, but this Trainer has {trainer.world_size} with "
            f"{type(trainer.strategy).__name__}. Use Trainer(devices=1) without a strategy."
        )
    if datamodule is not None:
        data: dict[str, Any] = {"datamodule": datamodule}
    elif _has_train_dataloader(model):
        data = {"val_dataloaders": val_dataloader}
    elif train_dataloader is not None:
        data = {"train_dataloaders": train_dataloader, "val_dataloaders": val_dataloader}
    else:
        raise ValueError("There is no train set: give datamodule=..., or train_dataloader=... and val_dataloader=....")
    # Bad files raise before the Trainer does anything. Weights can be compared only once it has set up the model.
    files = files_by_epoch(paths, weights_only)

    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]  # Lightning sets it in a connector

    def sweep() -> None:
        module = trainer.lightning_module
        for path in files.values():
            _check_weights(module, _weights(module, read_checkpoint(path, weights_only)), path)
        # The module brings some with it (configure_callbacks), which the Trainer has besides the progress bar.
        brought = [callback for callback in trainer.callbacks if callback not in callbacks]  # type: ignore[attr-defined]  # the same
        recorder.start(trainer, module, [*callbacks, *brought])
        recorder.checkpoints = len(files)
        with progress(trainer, "CLD checkpoints", nested=False) as show:
            for done, (epoch, path) in enumerate(files.items()):
                show(done, len(files))
                _restore(trainer, module, read_checkpoint(path, weights_only), epoch)
                try:
                    recorder.record(trainer, module, epoch)
                except StoppedError:
                    raise SIGTERMException from None  # as Lightning does where it finds that it got a SIGTERM

    with preserved_module(model):
        try:
            _instead_of_training(sweep, trainer, model, last_epoch=max(files), **data)
        finally:
            recorder.release()
    trajectories = recorder.history
    if not isinstance(trajectories, LossTrajectories):
        raise RuntimeError("The Trainer never reached the training loop. Does model.on_fit_start end the process?")
    trajectories.metadata.update(
        model=type(trainer.lightning_module).__name__,
        precision=str(trainer.precision),
        sweep_seconds=round(recorder.seconds, 3),
        checkpoints=[str(path) for path in files.values()],
    )
    return trajectories


def _has_train_dataloader(model: torch.nn.Module) -> bool:
    """Whether the model defines its own train set."""
    # Compared by name: the module may come from the package pytorch_lightning, or be compiled.
    return getattr(getattr(model, "train_dataloader", None), "__qualname__", "") != "DataHooks.train_dataloader"


def _weights(module: LightningModule, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The module's `state_dict` from a checkpoint, under the module's current names for its weights."""
    module.on_load_checkpoint(checkpoint)  # may change the checkpoint
    # WeightAveraging saves its average as `state_dict`, and the trained weights as `current_model_state`.
    saved = checkpoint.get("current_model_state", checkpoint["state_dict"])
    names = {_uncompiled(name): name for name in module.state_dict()}
    return {names.get(_uncompiled(name), name): value for name, value in saved.items()}


def _uncompiled(name: str) -> str:
    """The name of a weight without the prefix that torch.compile adds."""
    return name.replace("_orig_mod.", "")


def _check_weights(module: LightningModule, weights: dict[str, Any], path: Path) -> None:
    """Raises ValueError if `weights` differ from the module's own in names or shapes."""
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
            f"{path} does not fit this {type(module).__name__}: {'; '.join(problems[:3])}{more}. Make the model with "
            "the hyperparameters of the run, and give files of that run only."
        )


def _restore(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], epoch: int) -> None:
    """Loads a checkpoint's weights into the module, and its progress into the Trainer."""
    module.load_state_dict(_weights(module, checkpoint), strict=module.strict_loading)
    # A loss may depend on the epoch or the step. When the callback sweeps, the finished epoch is still the current one.
    trainer.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])
    trainer.fit_loop.epoch_progress.current.completed = max(epoch - 1, 0)


def _instead_of_training(
    work: Callable[[], None], trainer: Trainer, model: LightningModule, *, last_epoch: int, **data: Any
) -> None:
    """Calls `work` in place of training in `trainer.fit(model, **data)`, between set-up and teardown.

    Lightning has no public call that only sets up a model and its data, with their device and precision. So this
    function calls `fit` and gives the Trainer another fit loop meanwhile, a private class, whose `run` does the work.
    Callbacks and loggers are taken out, because they would mistake the work for training. The progress bar is only set
    up and torn down.
    """
    own = trainer.fit_loop
    loop = type(own)(trainer, min_epochs=own.min_epochs, max_epochs=own.max_epochs or last_epoch)
    loop.epoch_loop.max_steps = own.max_steps

    def run() -> None:
        loop.setup_data()
        loop.teardown()  # stops the workers that setup_data started; the loaders stay
        work()

    loop.run = run  # type: ignore[method-assign]  # on this instance only
    bar = find_bar(trainer)
    meanwhile = {
        "fit_loop": loop,
        "callbacks": [] if bar is None else [bar],
        "loggers": [DummyLogger() for _ in trainer.loggers],
        "num_sanity_val_steps": 0,
        "datamodule": None,  # drops the datamodule of an earlier fit
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
