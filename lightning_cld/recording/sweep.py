"""The sweep: one evaluation-mode pass over a dataset, and the row of losses that comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cld.data.generators import OwnGenerators
from lightning_cld.data.loaders import sequential_loader
from lightning_cld.data.parts import parts_of
from lightning_cld.guards import StoppedError, agreed, evaluation, in_lockstep, preserved_rng
from lightning_cld.recording.batch_hooks import BatchHooks, Prepare
from lightning_cld.recording.batch_losses import Step, check_batch
from lightning_cld.recording.progress_bar import progress
from lightning_cld.recording.signals import IsStopped


class Sweep:
    """Evaluates chosen samples of one dataset, again and again, each time under the weights of the moment.

    In a distributed run each rank evaluates an equal share (padded by repeats, which are dropped), and every rank gets
    the whole row.

    Args:
        loader: The user's loader, read for its dataset and settings and never iterated.
        positions: Positions to evaluate, sorted, int64 `[n]`.
        batch_size: Samples a batch; None takes the loader's.
        kind: "train" or "val", for errors.
        keep_workers: Whether worker processes wait for the next sweep instead of being started anew. They keep their
            random states meanwhile, so the dataset must show a sample the same way whenever it is read.
        fixed: Whether the dataset was seen to do so. Then it must still do so in later sweeps.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        positions: Tensor,
        *,
        batch_size: int | None,
        kind: str,
        keep_workers: bool = False,
        fixed: bool = False,
    ) -> None:
        self.loader = loader
        self.positions = positions
        self.length = len(loader.dataset)  # type: ignore[arg-type]  # map-style, as checked
        self.batch_size = batch_size
        self.kind = kind
        self.keep_workers = keep_workers
        self.fixed = fixed
        self._first_batch: str | None = None
        # Where there are workers these have copies of them.
        self._generators = OwnGenerators(*(() if loader.num_workers else (loader.dataset, loader.collate_fn)))
        self._reader: DataLoader[Any] | None = None

    def run(
        self, trainer: Trainer, module: LightningModule, step: Step, hooks: BatchHooks, is_stopped: IsStopped
    ) -> tuple[Tensor, Tensor | None]:
        """One pass.

        Args:
            trainer: The Trainer of the fit.
            module: Its module.
            step: From a batch on the device to losses and classes.
            hooks: What other callbacks and the module do to a batch before that.
            is_stopped: Says before each batch whether to end early.

        Returns:
            The losses, float32 `[N]` on the module's device: NaN at positions that are not evaluated, infinity where
            a loss was not finite; and the classes, int64 `[N]` there, -1 at those positions (None for one class).

        Raises:
            StoppedError: If it is to end early, on all ranks.
            Exception: What the dataset, the model or `step` raise; on the other ranks, that one rank failed.
        """
        rank, world = trainer.global_rank, trainer.world_size
        share = -(-len(self.positions) // world)
        places = (rank + world * torch.arange(share)) % len(self.positions)
        own = min(share, len(range(rank, len(self.positions), world)))
        showing = progress(trainer, f"CLD {self.kind}")
        with (
            agreed(trainer, f"The {self.kind} sweep"),
            preserved_rng(),
            self._generators.rewound(),
            evaluation(trainer, module),
            showing as show,
        ):
            prepare = hooks.of_sweep(trainer, module)
            losses, classes = self._evaluate(trainer, module, step, prepare, self.positions[places], show, is_stopped)

        row = torch.zeros(self.length, dtype=torch.float32, device=losses.device)
        where = self.positions[places[:own]].to(losses.device)
        row[where] = losses[:own].nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        class_row: Tensor | None = None
        if classes is not None:
            class_row = torch.zeros(self.length, dtype=torch.int64, device=losses.device)
            class_row[where] = classes[:own]
        if world > 1:
            row = trainer.strategy.reduce(row, reduce_op="sum")
            class_row = None if class_row is None else trainer.strategy.reduce(class_row, reduce_op="sum")
        unused = torch.ones(self.length, dtype=torch.bool, device=losses.device)
        unused[self.positions.to(losses.device)] = False
        row[unused] = torch.nan
        if class_row is not None:
            class_row[unused] = -1
        return row, class_row

    def _evaluate(
        self,
        trainer: Trainer,
        module: LightningModule,
        step: Step,
        prepare: Prepare,
        positions: Tensor,
        show: Callable[[int, int], None],
        is_stopped: IsStopped,
    ) -> tuple[Tensor, Tensor | None]:
        """Losses, float32, and classes at `positions`, in that order, on the device."""
        device = trainer.strategy.root_device
        losses = torch.empty(len(positions), dtype=torch.float32, device=device)
        classes: Tensor | None = None
        # Put back only at the end: after an error its workers are somewhere in the middle of a pass.
        loader, self._reader = self._reader or self._make_reader(positions, device), None
        start = 0
        batches = iter(loader)
        for done in range(len(loader)):
            show(done, len(loader))
            size = min(loader.batch_size or 1, len(positions) - start)
            with in_lockstep(trainer, f"The {self.kind} sweep"):
                if is_stopped():
                    raise StoppedError
                batch = next(batches)
                if done == 0 and self.fixed:
                    self._check_same(batch)
                on_device = _to_device(trainer, module, batch)
                prepare(on_device, done)
            with trainer.precision_plugin.forward_context():
                batch_losses, batch_classes = step(on_device)
            check_batch(batch_losses, batch_classes, size)
            losses[start : start + size] = batch_losses
            if start > 0 and (batch_classes is None) != (classes is None):
                raise ValueError(
                    "cld_step (or step) returned classes for some batches and None for others. Return one or the other."
                )
            if batch_classes is not None:
                if classes is None:
                    classes = torch.empty(len(positions), dtype=torch.int64, device=device)
                classes[start : start + size] = batch_classes
            start += size
        self._reader = loader
        return losses, classes

    def _check_same(self, batch: Any) -> None:
        """Raises if a sweep's first batch is another one than in the first sweep."""
        digest = parts_of(batch).digest
        self._first_batch = self._first_batch or digest
        if digest != self._first_batch:
            raise ValueError(
                f"the {self.kind} set shows other samples at the same positions than in the first sweep, as a dataset "
                "that replaces its data between epochs does, so positions mean nothing. Sweep a dataset that stays as "
                "it is."
            )

    def _make_reader(self, positions: Tensor, device: torch.device) -> DataLoader[Any]:
        return sequential_loader(
            self.loader,
            positions.tolist(),
            batch_size=self.batch_size,
            kind=self.kind,
            persistent_workers=self.keep_workers,
            # Only from pinned memory does a batch travel while the one before is computed.
            pin_memory=self.loader.pin_memory or device.type == "cuda",
        )


def _to_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """The batch as the evaluation loop would hand it to the module, through the user's transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    # Private, but the only way to the hook before the transfer; Lightning's evaluation loop makes the same call.
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
