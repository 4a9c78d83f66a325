"""A script that fits on several processes: `python distributed_runs.py STRATEGY DEVICES FOLDER PART...`.

Starting processes takes far longer than fitting such small models, so one start serves many fits, and one fit many
tests. Every rank of a fit saves its results in `FOLDER/<name>-<rank>.pt`, which `test_distributed.py` reads.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from toys import CLASSES, Classifier, quiet_trainer

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule
from lightning_cld.recording import settling

PATIENCE = timedelta(seconds=40)
"""How long a rank waits for the others before it fails; the default is half an hour."""

SIZES = [(49, 11), (7, 4), (2, 2)]
"""Train and validation samples. With batches of 8, 49 samples give some of 2 or 3 ranks one batch more."""

BROKEN = 11
"""The position of a bad sample. The last rank reads it, of 2 or 3."""

SUBSET = range(0, 49, 2)
FULL, KEPT = 48, 20
KEPT_BY_HAND = list(range(1, 41, 2))
"""Positions of a coreset of as many samples, not chosen by scores."""


class Points(Dataset[Any]):
    """Points in four dimensions, each with its class and position; lists the positions that are read."""

    def __init__(self, samples: int, seed: int) -> None:
        self.targets = torch.arange(samples) % CLASSES
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(samples, 4, generator=generator) + self.targets[:, None]
        self.reads: list[int] = []
        self.broken: int | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        if position == self.broken:
            raise OSError(f"sample {position} can't be read")
        self.reads.append(position)
        return self.inputs[position], self.targets[position], position


class Shards(IterableDataset[Any]):
    """Shows each rank samples of its own, rank 0 more than the others, with their positions or names.

    Args:
        points: All samples.
        named: Whether samples say names.
        split: Whether the ranks share the samples; else each rank reads all of them.
    """

    def __init__(self, points: Points, *, named: bool = False, split: bool = True) -> None:
        self.points, self.named, self.split = points, named, split

    def __iter__(self) -> Iterator[Any]:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        count = len(self.points)
        most = count - 4 * (world - 1)
        share = (
            range(count)[::-1]
            if not self.split
            else range(most)
            if rank == 0
            else range(most + rank - 1, count, world - 1)
        )
        for position in share:
            inputs, target, _ = self.points[position]
            yield inputs, target, f"sample {position}" if self.named else position


class Data(L.LightningDataModule):
    def __init__(self, train: int, val: int, sampler: Sampler[int] | None = None) -> None:
        super().__init__()
        self.train_set, self.val_set = Points(train, seed=0), Points(val, seed=1)
        self.sampler = sampler

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_set, batch_size=10, shuffle=self.sampler is None, sampler=self.sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, batch_size=1)


class OwnSampler(Data):
    """Makes its own distributed sampler, for `Trainer(use_distributed_sampler=False)`."""

    def train_dataloader(self) -> DataLoader[Any]:
        self.sampler = DistributedSampler(self.train_set, self.trainer.world_size, self.trainer.global_rank)
        return super().train_dataloader()


class ByHand(Data):
    """Makes its batch sampler by hand."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_set, batch_sampler=BatchSampler(RandomSampler(self.train_set), 10, False))


class OnDevice:
    """A loader around a DataLoader, as those are that prefetch to the device. Lightning leaves it as it is."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


class Prefetching(Data):
    def train_dataloader(self) -> Any:
        return OnDevice(super().train_dataloader())


class Two(Data):
    """Returns two train loaders."""

    def train_dataloader(self) -> Any:
        return {"first": super().train_dataloader(), "second": super().train_dataloader()}


class NoReference(Data):
    """Fails to load its validation data on the last rank."""

    def cld_val_dataloader(self) -> DataLoader[Any]:
        if self.trainer.global_rank == self.trainer.world_size - 1:
            raise OSError("the reference is on another disk")
        return self.val_dataloader()


class OtherSplit(Data):
    """Draws other samples on each rank, class after class, so that the labels are the same."""

    def setup(self, stage: str) -> None:
        pool = Points(90, seed=0)
        generator = torch.Generator().manual_seed(self.trainer.global_rank)
        drawn = [torch.randperm(30, generator=generator)[:16] * CLASSES + label for label in range(CLASSES)]
        self.train_set = Subset(pool, torch.cat(drawn).tolist())


class OtherSamples(Data):
    """Has other samples on each rank, with the same labels."""

    def setup(self, stage: str) -> None:
        self.train_set = Points(49, seed=10 + self.trainer.global_rank)


class Model(Classifier):
    """A `Classifier` that records the positions it trains on, and shards itself if there is a device mesh."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__(lr=0.05)
        if not norm:  # BatchNorm needs two samples per batch
            self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.Linear(16, CLASSES))
        self.served: list[list[int]] = []

    def configure_model(self) -> None:
        if self.device_mesh is not None and self.device_mesh["data_parallel"].size() > 1:
            for layer in [layer for layer in self.net if isinstance(layer, nn.Linear)]:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def on_train_epoch_start(self) -> None:
        self.served.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.served[-1] += batch[2].tolist()
        return super().training_step(batch, batch_idx)


class ModelOfTwo(Model):
    """Is trained on the first loader of two, and remembers what the second one gives, as negative numbers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.served[-1] += (-1 - batch["second"][2]).tolist()
        return super().training_step(batch["first"], batch_idx)


class ModelWithStep(Model):
    broken: int | None = None

    def cld_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        outputs = self(batch[0])
        # Fails after the forward, like a label out of range. If a rank skipped the forward of a sharded module, the
        # others would wait in it.
        if self.broken in batch[2].tolist():
            raise OSError(f"sample {self.broken} can't be evaluated")
        return F.cross_entropy(outputs, batch[1], reduction="none"), batch[1]


class ModelOfStreams(ModelWithStep):
    def cld_step(self, batch: Any) -> Any:
        outputs = self(batch[0])
        if self.broken is not None and str(self.broken) in [str(each).split()[-1] for each in _plain(batch[2])]:
            raise OSError(f"sample {self.broken} can't be evaluated")
        return F.cross_entropy(outputs, batch[1], reduction="none"), batch[1], batch[2]


def _plain(samples: Any) -> list[Any]:
    return samples.tolist() if isinstance(samples, Tensor) else list(samples)


class ModelThatReturns(Model):
    """Returns its losses for `record="step"` and records them; if `forgetful`, the last rank returns none."""

    forgetful = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[tuple[int, float]]] = []

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.seen.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        self.seen[-1] += zip(batch[2].tolist(), losses.tolist(), strict=True)
        if self.forgetful and self.trainer.global_rank == self.trainer.world_size - 1:
            return losses.mean()
        return {"loss": losses.mean(), "sample_losses": losses, "sample_index": batch[2]}


class ModelThatForgets(ModelThatReturns):
    forgetful = True


class ModelWithColumn(Model):
    """Has a buffer that is not contiguous in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4, 3)[:, 1])

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs * self.scale)


class ModelWithOneForAll(Model):
    """Has an expanded buffer, whose values share one place in memory. DDP refuses such a module, FSDP2 does not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.zeros(1).expand(5), persistent=False)


class ModelThatWrites(Model):
    """Writes in every forward pass what is no buffer too; all of it is in its `state_dict`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.total, self.passes, self.sizes = torch.zeros(4), 0, []
        self.metric = torchmetrics.MeanMetric()

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0)
        self.total += inputs.sum(0)
        self.passes += 1
        self.sizes.append(len(inputs))
        self.metric.update(inputs)
        return super().forward(inputs - self.mean)

    def cld_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        self.net.train()
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none"), batch[1]

    def get_extra_state(self) -> Tensor:
        return torch.cat([self.total, self.metric.mean_value[None], torch.tensor([self.passes, *self.sizes])])

    def set_extra_state(self, state: Tensor) -> None:
        pass


class Apart(L.Callback):
    """Gives each rank its own RNG states and buffers before training; runs before the sweeps."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(100 + trainer.global_rank)
        for buffer in pl_module.buffers():
            buffer.add_(trainer.global_rank + 1)


class Breaks(L.Callback):
    """Makes a sample bad during the sweep after the second epoch; runs before the sweeps.

    Args:
        dataset: The dataset that can't read the sample; None makes the module fail on it.
    """

    def __init__(self, dataset: Points | None = None) -> None:
        self.dataset = dataset

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (self.dataset or pl_module).broken = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (self.dataset or pl_module).broken = BROKEN if trainer.current_epoch == 1 else None


class Relabels(L.Callback):
    """Gives a sample another class in the last rank's dataset during the sweep after the second epoch.

    It is in the rank's second batch, since the first one is compared as a whole. Runs before the sweeps.
    """

    def __init__(self, dataset: Points) -> None:
        self.dataset = dataset

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch in (1, 2) and trainer.global_rank == trainer.world_size - 1:
            place = trainer.global_rank + 9 * trainer.world_size
            self.dataset.targets[place] = (place + (trainer.current_epoch == 1)) % CLASSES


class Exchanged(L.Callback):
    """Counts what the ranks reduce in each epoch: the type and the number of values of each tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: list[list[tuple[str, int]]] = [[]]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reduce = trainer.strategy.reduce

        def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.tensors[-1].append((str(tensor.dtype), tensor.numel()))
            return reduce(tensor, *args, **kwargs)

        trainer.strategy.reduce = counted

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tensors.append([])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(self.tensors, f"{self.path}-exchanged-{trainer.global_rank}.pt")


class Ends(L.Callback):
    """Saves each rank's records and final state; runs after the sweeps."""

    def __init__(self, path: Path, cld: CLDCallback | None, views: list[Points]) -> None:
        self.path = path
        self.cld = cld
        self.views = views
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.reads: dict[int, list[list[int]]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights[trainer.current_epoch] = _whole_state(pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for view in self.views:
            view.reads = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights[trainer.current_epoch + 1] = _whole_state(pl_module)
        self.reads[trainer.current_epoch + 1] = [list(view.reads) for view in self.views]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        history = None if self.cld is None else self.cld._recorder.history
        self._save(
            trainer,
            weights=self.weights,
            reads=self.reads,
            served=pl_module.served,
            seen=getattr(pl_module, "seen", None),
            steps=trainer.global_step,
            metrics={name: float(value) for name, value in trainer.logged_metrics.items()},
            random=[torch.get_rng_state().tolist(), np.random.get_state()[1:3], random.getstate()],
            rows=None if history is None else history.state_dict(),
        )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if torch.distributed.is_initialized():  # the main process of ddp_fork also gets here
            self._save(trainer, error=str(exception))

    def _save(self, trainer: L.Trainer, **values: Any) -> None:
        torch.save(values, f"{self.path}-{trainer.global_rank}.pt")


def _whole_state(module: L.LightningModule) -> dict[str, Tensor]:
    """All weights, gathered if they are sharded, and this rank's buffers."""
    state = module.state_dict()
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone() for name, value in state.items()
    }


class Runs:
    """Fits under one strategy.

    Args:
        strategy: "ddp_fork", "ddp", "ddp_spawn" or "fsdp2"; ignored for one process.
        devices: The number of processes.
        root: The folder for results and files.
    """

    def __init__(self, strategy: str, devices: int, root: Path) -> None:
        self.strategy = strategy
        self.devices = devices
        self.root = root

    def fit(
        self,
        name: str,
        data: L.LightningDataModule,
        *callbacks: L.Callback,
        model: Callable[[], Model] = Model,
        cld: CLDCallback | None = None,
        views: list[Points] | None = None,
        **arguments: Any,
    ) -> None:
        """Seeds, makes the model and trains; an error ends only this fit. `callbacks` run before `cld`."""
        L.seed_everything(7, verbose=False)
        ckpt_path = arguments.pop("ckpt_path", None)
        trainer = quiet_trainer(
            self.root / name,
            *callbacks,
            *([] if cld is None else [cld]),
            Ends(self.root / name, cld, views or []),
            **{
                "devices": self.devices,
                "strategy": arguments.pop("strategy", None) or self._make_strategy(),
                "max_epochs": 3,
                "limit_val_batches": 0,  # a validation epoch would make the buffers equal before the sweep
                **arguments,
            },
        )
        started = time.monotonic()
        try:
            trainer.fit(model(), datamodule=data, ckpt_path=ckpt_path)
        except Exception as error:  # noqa: BLE001
            if trainer.is_global_zero:
                self.save(name, error=str(error), seconds=time.monotonic() - started)

    def save(self, name: str, **values: Any) -> None:
        """Saves values of the main process, which started the others."""
        torch.save(values, self.root / f"{name}-main.pt")

    def _make_strategy(self) -> Strategy | str:
        if self.devices == 1:
            return "auto"
        if self.strategy == "fsdp2":
            return ModelParallelStrategy(self.devices, 1, save_distributed_checkpoint=False, timeout=PATIENCE)
        method = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork"}[self.strategy]
        return DDPStrategy(start_method=method, timeout=PATIENCE)

    def watched(
        self,
        name: str,
        train: int = 49,
        val: int = 11,
        *callbacks: L.Callback,
        watching: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> CLDCallback:
        """Trains with the callback on separate views of the data, which only sweeps read."""
        views = [Points(train, seed=0), Points(val, seed=1)]
        cld = CLDCallback(
            dirpath=self.root / name,
            train_dataloader=DataLoader(views[0], batch_size=8),
            val_dataloader=DataLoader(views[1], batch_size=1),
            **(watching or {}),
        )
        if name == "later-sample":
            callbacks = (Breaks(views[0]),)
        if name == "later-class":
            callbacks = (Relabels(views[0]), Exchanged(self.root / name))
        self.fit(name, Data(train, val), Apart(), *callbacks, cld=cld, views=views, **arguments)
        return cld

    # The parts, as named on the command line

    def once(self) -> None:
        cld = self.watched("sizes-49")
        narrowed = CoresetDataModule(Data(49, 11), cld.scores_path, fraction=0.5)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            self.save("scores", scores=cld.scores.values, kept=narrowed.indices)

    def sizes(self) -> None:
        for train, val in SIZES:
            self.watched(f"sizes-{train}", train, val, model=partial(Model, norm=train > 2))

    def models(self) -> None:
        self.fit("unwatched", Data(49, 11), Apart())
        self.watched("with-step", model=ModelWithStep)
        self.fit("writes-unwatched", Data(49, 11), Apart(), model=ModelThatWrites)
        # Every batch has two samples at least, which BatchNorm in train mode needs.
        self.watched("writes", 49, 12, model=ModelThatWrites, watching={"batch_size": 7})
        self.watched("with-column", model=ModelWithColumn)
        self.watched("running", watching={"history": "running"})
        level, settling.OVERLAP = settling.OVERLAP, 0.0  # 10 % of 49 samples changes in large jumps
        self.watched("settled", watching={"cutoff_epoch": "auto", "stop_at_cutoff": True}, max_epochs=10)
        settling.OVERLAP = level

    def shared_place(self) -> None:
        self.fit("shared-place", Data(49, 11), model=ModelWithOneForAll, cld=CLDCallback(dirpath=self.root))

    def start(self) -> None:
        checkpoints = ModelCheckpoint(self.root, filename="{epoch}", save_top_k=-1)
        self.watched("started", 49, 11, checkpoints, max_epochs=5, enable_checkpointing=True)

    def resume(self) -> None:
        started = self.root.parent / f"{self.strategy}-2" / "epoch=1.ckpt"
        self.watched("resumed", max_epochs=5, ckpt_path=started)

    def samplers(self) -> None:
        weighted = WeightedRandomSampler(torch.linspace(0.1, 1, 49).tolist(), 30)
        for name, sampler in (("subset", SubsetRandomSampler(SUBSET)), ("weighted", weighted)):
            self.fit(name, Data(49, 11, sampler), cld=CLDCallback(dirpath=self.root / name))

    def coresets(self) -> None:
        """Scores a full set, then trains on its coresets, in a script that all ranks run; rank 0 has a slow disk."""
        save = CLDScores.save

        def save_slowly(scores: CLDScores, path: Path) -> Path:
            time.sleep(1)
            return save(scores, path)

        data = Data(FULL, 11)
        cld = CLDCallback(dirpath=self.root / "full-set")
        CLDScores.save = save_slowly
        self.fit("full-set", data, cld=cld)
        CLDScores.save = save
        self.fit("half", CoresetDataModule(data, cld.scores_path, fraction=0.5))
        self.fit("long", CoresetDataModule(data, cld.scores_path, size=KEPT, epoch_length="full"))
        own = CoresetDataModule(OwnSampler(FULL, 11), cld.scores_path, fraction=0.5)
        self.fit("half-own-sampler", own, use_distributed_sampler=False)
        anew = {"size": KEPT, "rule": "draw", "redraw": True}
        self.fit("anew", CoresetDataModule(data, cld.scores_path, **anew))
        self.fit("anew-long", CoresetDataModule(data, cld.scores_path, epoch_length="full", **anew))
        own = CoresetDataModule(OwnSampler(FULL, 11), cld.scores_path, **anew)
        self.fit("anew-own-sampler", own, use_distributed_sampler=False)
        self.fit("anew-apart", CoresetDataModule(data, cld.scores_path, **anew), use_distributed_sampler=False)

    def loaders(self) -> None:
        """Trains on coresets of loaders whose samples Lightning splits between the processes, or does not."""
        data, long = Data(FULL, 11), {"epoch_length": "full"}
        apart = {"use_distributed_sampler": False}
        self.fit("apart-full-set", data, **apart)
        self.fit("apart-half", CoresetDataModule(data, KEPT_BY_HAND), **apart)
        self.fit("apart-long", CoresetDataModule(data, KEPT_BY_HAND, **long), **apart)
        self.fit("by-hand", CoresetDataModule(ByHand(FULL, 11), KEPT_BY_HAND))
        self.fit("by-hand-long", CoresetDataModule(ByHand(FULL, 11), KEPT_BY_HAND, **long))
        self.fit("device-full-set", Prefetching(FULL, 11))
        self.fit("device-half", CoresetDataModule(Prefetching(FULL, 11), KEPT_BY_HAND))
        self.fit("device-long", CoresetDataModule(Prefetching(FULL, 11), KEPT_BY_HAND, **long))
        two = {"first": KEPT_BY_HAND, "second": None}
        self.fit("two", CoresetDataModule(Two(FULL, 11), two), model=ModelOfTwo)

    def streams(self) -> None:
        for name, how, num_samples in (
            ("stream", {}, 49),
            ("stream-names", {"named": True}, None),
            ("stream-shared", {"split": False}, 49),
            ("stream-small", {}, 20),
            ("stream-broken", {}, 49),
        ):
            views = [Points(49, seed=0), Points(11, seed=1)]
            loaders = [DataLoader(Shards(view, **how), batch_size=8) for view in views]
            cld = CLDCallback(
                dirpath=self.root / name,
                train_dataloader=loaders[0],
                val_dataloader=loaders[1],
                num_samples=num_samples,
            )
            before = (Apart(), Breaks()) if name == "stream-broken" else (Apart(),)
            self.fit(name, Data(49, 11), *before, cld=cld, views=views, model=ModelOfStreams)

    def later_errors(self) -> None:
        self.watched("later-sample", max_epochs=6)
        self.watched("later-step", 49, 11, Breaks(), model=ModelWithStep, max_epochs=6)
        self.watched("later-class", max_epochs=6)

    def steps(self) -> None:
        self.watched("returned", model=ModelThatReturns, watching={"record": "step"})
        self.watched("forgotten", model=ModelThatForgets, watching={"record": "step"})

    def no_reference(self) -> None:
        self.fit("no-reference", NoReference(49, 11), cld=CLDCallback(dirpath=self.root))

    def other_data(self) -> None:
        for name, kind in (("other-split", OtherSplit), ("other-samples", OtherSamples)):
            self.fit(name, kind(49, 11), cld=CLDCallback(dirpath=self.root))

    def bad_sample(self) -> None:
        view = Points(49, seed=0)
        view.broken = BROKEN
        cld = CLDCallback(dirpath=self.root, train_dataloader=DataLoader(view, batch_size=8))
        self.fit("bad-sample", Data(49, 11), cld=cld)

    def without_dirpath(self) -> None:
        cld = CLDCallback()
        self.fit("without-dirpath", Data(49, 11), cld=cld)
        try:
            _ = cld.scores
        except RuntimeError as error:
            self.save("without-dirpath", error=str(error), path=cld.scores_path)

    def tensor_parallel(self) -> None:
        layout = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=self.devices, timeout=PATIENCE)
        self.fit("tensor-parallel", Data(49, 11), cld=CLDCallback(dirpath=self.root), strategy=layout)


if __name__ == "__main__":
    runs = Runs(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    for part in sys.argv[4:]:
        getattr(runs, part)()
