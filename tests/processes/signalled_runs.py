"""Runs that get signals: `one_life` is one process of a run, which sends itself signals in the middle of its sweeps.

As a script, `python signalled_runs.py FOLDER PLAN`, it starts a run on two processes as Lightning does.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from toys import CLASSES, Blobs, Classifier, fit

from lightning_cld import CLDCallback, IndexedDataset

EPOCHS = 5
TRAIN, VAL = 90, 30
BATCH = 4
"""Samples a batch of a sweep."""


def batches(world: int = 1) -> tuple[int, int]:
    """How many batches a process evaluates of the train and of the validation set in one sweep."""
    train, val = (math.ceil(math.ceil(samples / world) / BATCH) for samples in (TRAIN, VAL))
    return train, val


class Watched(Classifier):
    """Trains the same whenever it is resumed; its forward passes change buffers and the state of a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3] = nn.Identity()
        self.register_buffer("passes", torch.zeros(()))
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.accuracy.persistent(True)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        self.passes += 1
        self.accuracy.update(outputs.detach(), outputs.detach().argmax(dim=1))
        return outputs

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        each = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return {"loss": each.mean(), "sample_losses": each.detach(), "sample_index": batch[-1]}


class Sharded(Classifier):
    """Is sharded over the processes, so each of its forward passes waits for those of the other processes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Indexed(Blobs):
    def __init__(self) -> None:
        super().__init__(shuffle=False)
        self.train_set = IndexedDataset(self.train_set)


class Signals:
    """A step for `CLDCallback` that sends its own process signals at some of its calls.

    Args:
        at: The signals by number of the call, from 0.
        sent: A file that it makes once it has sent a signal.
        waits_at: The call at which it waits for that file, made by another process.
        late_at: The call a second after which it sends a SIGTERM.

    Attributes:
        calls: How often it was called.
        after: How often it was called after the last signal.
    """

    def __init__(self, at: dict[int, int], sent: Path, waits_at: int | None, late_at: int | None) -> None:
        self.at = at
        self.sent = sent
        self.waits_at = waits_at
        self.late_at = late_at
        self.late = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
        self.calls = 0
        self.after = 0

    def __call__(self, module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
        self.after += 1
        if self.calls in self.at:
            self.after = 0
            os.kill(os.getpid(), self.at[self.calls])
            self.sent.touch()
        if self.calls == self.late_at:
            self.late.start()
        if self.calls == self.waits_at:
            for _ in range(2000):
                if self.sent.exists():
                    break
                time.sleep(0.02)
        self.calls += 1
        return losses, batch[1]


class Elsewhere(Callback):
    """Sends the process a signal at the n-th call of a hook in an epoch."""

    def __init__(self, hook: str, epoch: int, call: int, signum: int) -> None:
        calls = []

        def send(trainer: Any, *args: Any) -> None:
            if trainer.current_epoch == epoch:
                calls.append(1)
                if len(calls) == call:
                    os.kill(os.getpid(), signum)

        setattr(self, hook, send)


class Children(Callback):
    """Counts the processes that there are once the callbacks before it have done their work after an epoch."""

    def __init__(self) -> None:
        self.most = 0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.most = max(self.most, len(multiprocessing.active_children()))


def slurm(root: Path, rank: int, world: int) -> None:
    """Makes the environment look like that of a SLURM job whose `scontrol` notes its arguments in `requeued`."""
    scontrol = root / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True, parents=True)
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> "{root}/requeued"\n')
    scontrol.chmod(0o755)
    os.environ["PATH"] = f"{scontrol.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.update(
        SLURM_JOB_ID="123",
        SLURM_JOB_NAME="train",
        SLURM_NTASKS=str(world),
        SLURM_PROCID=str(rank),
        SLURM_LOCALID=str(rank),
        SLURM_NODEID="0",
        SLURM_NTASKS_PER_NODE=str(world),
    )


def one_life(
    root: Path,
    name: str,
    *,
    at: dict[int, int] | None = None,
    elsewhere: tuple[str, int, int, int] | None = None,
    saver: dict[str, Any] | None = None,
    rank: int = 0,
    world: int = 1,
    port: int | None = None,
    sharded: bool = False,
    scheduler: bool = False,
    watched: bool = True,
    resume: bool = True,
    workers: int = 0,
    waits_at: int | None = None,
    late_at: int | None = None,
    **arguments: Any,
) -> None:
    """One process of a run, which goes on from the last checkpoint in `root`, if there is one.

    It writes what became of it into `<name>-<rank>.json`, and the scores, if there are some, into `<name>-scores.npz`.

    Args:
        root: The folder of the run.
        name: What this life of the run is called.
        at: The signals to send, by number of the batch of a sweep.
        elsewhere: A hook, an epoch, a number of the call in that epoch, and a signal to send there.
        saver: Arguments of a ModelCheckpoint; None keeps no checkpoints.
        rank: The rank of the process.
        world: The number of processes.
        port: Where they meet; None lets Lightning start the others.
        sharded: FSDP2 instead of DDP.
        scheduler: Whether SLURM runs the process.
        watched: Whether there is a callback.
        resume: Whether to resume from `last.ckpt`.
        workers: The number of worker processes that read for a sweep.
        waits_at: The batch of a sweep at which to wait until another process has got a signal.
        late_at: The batch of a sweep a second after which to send a SIGTERM.
        arguments: Of the callback.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    root.mkdir(exist_ok=True, parents=True)
    if scheduler:
        slurm(root, rank, world)
    if port is not None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    own: dict[str, Any] = {"plugins": [SLURMEnvironment() if scheduler else LightningEnvironment()]}
    if world > 1:
        patience = timedelta(seconds=40)
        own["devices"] = world
        own["strategy"] = (
            ModelParallelStrategy(world, 1, save_distributed_checkpoint=False, timeout=patience)
            if sharded
            else DDPStrategy(process_group_backend="gloo", timeout=patience)
        )
    data = Indexed()
    if workers:
        gc.disable()  # no processes are to live on until then
        arguments["train_dataloader"] = DataLoader(data.train_set, num_workers=workers, multiprocessing_context="fork")
    signals = Signals(at or {}, root / f"{name}-sent", waits_at, late_at)
    cld = CLDCallback(step=signals, batch_size=BATCH, dirpath=root / "results", **arguments) if watched else None
    children = Children()
    callbacks: list[Callback] = [children, *([] if elsewhere is None else [Elsewhere(*elsewhere)])]
    if saver is not None:
        callbacks.append(ModelCheckpoint(root, save_last=True, enable_version_counter=False, **saver))
    before = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
    last = root / "last.ckpt"
    ended = ""
    try:
        fit(
            root,
            cld,
            Sharded if sharded else Watched,
            data,
            callbacks=callbacks,
            max_epochs=EPOCHS,
            enable_checkpointing=saver is not None,
            ckpt_path=last if resume and not scheduler and last.exists() else None,
            **own,
        )
    except SystemExit as error:
        ended = type(error).__name__
    if late_at is not None:
        signals.late.join()
    result = {
        "calls": signals.calls,
        "after": signals.after,
        "ended": ended,
        "handlers": all(signal.getsignal(signum) == handler for signum, handler in before.items()),
        "children": children.most,
    }
    if cld is not None and not ended:
        cld.scores.save(root / f"{name}-scores.npz")
    (root / f"{name}-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    folder, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    mine = int(os.environ.get("LOCAL_RANK", "0"))
    sent = {int(call): signum for call, signum in plan.pop("at", {}).items()}
    waits = plan.pop("waits_at", None)
    one_life(folder, rank=mine, world=2, **({"at": sent} if mine == 0 else {"waits_at": waits}), **plan)
