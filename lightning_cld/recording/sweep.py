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
from lightning_cld.data.parts import digest_of
from lightning_cld.guards import StoppedError, agreed, evaluation, in_lockstep, preserved_rng
from lightning_cld.recording.batch_hooks import BatchHooks, Prepare, transfer_of
from lightning_cld.recording.batch_losses import Step, check_batch
from lightning_cld.recording.progress_bar import progress
from lightning_cld.recording.signals import IsStopped, never


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
        on_cpu: Whether the dataset's samples are in the memory of the CPU, so that they can be pinned.
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
        on_cpu: bool = True,
    ) -> None:
        self.loader = loader
        self.positions = positions
        self.length = len(loader.dataset)  # type: ignore[arg-type]  # map-style, as checked
        self.batch_size = batch_size
        self.kind = kind
        self.keep_workers = keep_workers
        self.fixed = fixed
        self.on_cpu = on_cpu
        self._first_batch: str | None = None
        self._swept = False
        self._classes: Tensor | None = None  # of the first sweep
        # Where there are workers these have copies of them.
        self._generators = OwnGenerators(*(() if loader.num_workers else (loader.dataset, loader.collate_fn)))
        self._reader: DataLoader[Any] | None = None

    def run(
        self, trainer: Trainer, module: LightningModule, step: Step, hooks: BatchHooks, is_stopped: IsStopped = never
    ) -> tuple[Tensor, Tensor | None]:
        """One pass.

        The host waits for the device at most 4 times, in the first sweep 7 times, however many batches and samples
        there are. There it may also wait for each tensor of the first batch, which `hooks` look at before and after.

        Args:
            trainer: The Trainer of the fit.
            module: Its module.
            step: From a batch on the device to losses and classes.
            hooks: What other callbacks and the module do to a batch before that.
            is_stopped: Says before each batch whether to end early.

        Returns:
            The losses, float32 `[N]` on the module's device: NaN at positions that are not evaluated, infinity where
            a loss was not finite; and the classes, int64 `[N]` on the CPU, -1 at those positions (None for one class).
            The ranks exchange the classes in the first sweep only. In later ones each compares its share with them.

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
            where = self.positions[places[:own]]
            classes = None if classes is None else classes[:own]
            if self._swept:
                self._check_classes(where, classes)

        losses = losses[:own].nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        row = self._row_of_all(trainer, where, losses, outside=torch.nan)
        if not self._swept:
            self._swept = True
            self._classes = None if classes is None else self._row_of_all(trainer, where, classes, outside=-1).cpu()
        return row, self._classes

    def _row_of_all(self, trainer: Trainer, where: Tensor, values: Tensor, *, outside: float) -> Tensor:
        """A value for every position of the dataset, from all ranks' shares; `outside` where none was evaluated."""
        row = torch.zeros(self.length, dtype=values.dtype, device=values.device)
        row[where.to(row.device)] = values
        if trainer.world_size > 1:
            row = trainer.strategy.reduce(row, reduce_op="sum")
        if len(self.positions) < self.length:
            unused = torch.ones(self.length, dtype=torch.bool, device=row.device)
            unused[self.positions.to(row.device)] = False
            row[unused] = outside
        return row

    def _evaluate(
        self,
        trainer: Trainer,
        module: LightningModule,
        step: Step,
        prepare: Prepare,
        positions: Tensor,
        show: Callable[[int, int | None], None],
        is_stopped: IsStopped,
    ) -> tuple[Tensor, Tensor | None]:
        """Losses, float32, and classes at `positions`, in that order, on the device."""
        device = trainer.strategy.root_device
        losses = torch.empty(len(positions), dtype=torch.float32, device=device)
        classes: Tensor | None = None
        # Put back only at the end: after an error its workers are somewhere in the middle of a pass.
        loader, self._reader = self._reader or self._make_reader(positions, device), None
        # What is the same for all batches is found out once: small batches take less time than that.
        batches, total, batch_size = iter(loader), len(loader), loader.batch_size or 1
        locked = in_lockstep(trainer, f"The {self.kind} sweep")
        to_device, forward_context = transfer_of(trainer, module), trainer.precision_plugin.forward_context
        start = 0
        for done in range(total):
            show(done, total)
            end = min(start + batch_size, len(positions))
            with locked():
                if is_stopped():
                    raise StoppedError
                batch = next(batches)
                if done == 0 and self.fixed:
                    self._check_same(batch)
                on_device = to_device(batch)
                prepare(on_device, done)
            with forward_context():
                batch_losses, batch_classes, _ = step(on_device)  # here positions are those in the dataset
            check_batch(batch_losses, batch_classes, end - start)
            losses[start:end] = batch_losses
            if start > 0 and (batch_classes is None) != (classes is None):
                raise ValueError(
                    "cld_step (or step) returned classes for some batches and None for others. Return one or the other."
                )
            if batch_classes is not None:
                if classes is None:
                    classes = torch.empty(len(positions), dtype=torch.int64, device=device)
                classes[start:end] = batch_classes
            start = end
        self._reader = loader
        return losses, classes

    def _check_same(self, batch: Any) -> None:
        """Raises if a sweep's first batch is another one than in the first sweep."""
        digest = digest_of(batch)
        self._first_batch = self._first_batch or digest
        if digest != self._first_batch:
            raise ValueError(
                f"the {self.kind} set shows other samples at the same positions than in the first sweep, as a dataset "
                "that replaces its data between epochs does, so positions mean nothing. Sweep a dataset that stays as "
                "it is."
            )

    def _check_classes(self, where: Tensor, classes: Tensor | None) -> None:
        """Raises if the classes of this rank's share are other ones than in the first sweep."""
        known = None if self._classes is None else self._classes[where]
        if (classes is None) != (known is None):
            raise ValueError(
                f"the {self.kind} set gave classes in the first sweep and None in a later one, or the other way round. "
                "cld_step, step or the targets must give one or the other."
            )
        if classes is not None and known is not None and not torch.equal(classes.cpu(), known):
            name = "validation" if self.kind == "val" else self.kind
            raise ValueError(
                f"the {name} set gave its classes in another order than before, so positions mean nothing. Its "
                "__getitem__ must return the same sample for the same position."
            )

    def _make_reader(self, positions: Tensor, device: torch.device) -> DataLoader[Any]:
        return sequential_loader(
            self.loader,
            positions.tolist(),
            batch_size=self.batch_size,
            kind=self.kind,
            persistent_workers=self.keep_workers,
            # Only from pinned memory does a batch travel while the one before is computed.
            pin_memory=self.on_cpu and (self.loader.pin_memory or device.type == "cuda"),
        )
