"""What a look at the model or the data must leave as it was: random states, modes, weights, the trainer's stage."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

_SEED = 0


def is_a(value: object, *names: str) -> bool:
    """Whether a value is of one of Lightning's classes of these names, or derived from it.

    By name, since it may be that of the package pytorch_lightning as well as that of lightning.pytorch.
    """
    return not {kind.__name__ for kind in type(value).__mro__}.isdisjoint(names)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Runs its body from a fixed seed and puts torch's, numpy's and python's global random states back.

    The same seed every time: a dataset that augments at random then shows each sample the same way in every sweep.
    """
    error: BaseException | None = None
    with isolate_rng():  # which restores nothing when its body raises
        random.seed(_SEED)
        np.random.seed(_SEED)  # noqa: NPY002  # datasets draw from numpy's global state
        # Not torch.manual_seed, which would also seed devices whose state isolate_rng does not put back.
        torch.default_generator.manual_seed(_SEED)
        torch.cuda.manual_seed_all(_SEED)
        try:
            yield
        except BaseException as raised:  # noqa: BLE001  # raised again below, once the states are restored
            error = raised
    if error is not None:
        raise error


@contextmanager
def preserved_module(module: torch.nn.Module) -> Iterator[None]:
    """Runs its body and puts the module's weights, buffers and train/eval modes back, as they were and where they were.

    That takes a copy of the weights. Weights that the body adds to the module stay.
    """
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    weights = [(weight, weight.data, weight.data.clone()) for weight in module.parameters()]
    buffers = [
        (submodule, name, buffer, buffer.detach().clone())
        for submodule in module.modules()
        for name, buffer in submodule.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        # Another device or dtype gives a parameter other memory, and a module another buffer.
        for weight, own, value in weights:
            _overwrite(own, value)
            weight.data = own
        for submodule, name, own, value in buffers:
            _overwrite(own, value)
            setattr(submodule, name, own)
        for submodule, mode in modes:
            submodule.training = mode


@contextmanager
def evaluation(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Runs its body with the module in evaluation mode, without gradients, in the trainer's validation stage.

    Afterwards every submodule has its own mode back (a BatchNorm that the user froze stays frozen), the stage is
    training, and in a distributed run every rank has its own buffers back; during the body all ranks use rank 0's,
    since BatchNorm statistics differ between ranks and the scores must not.
    """
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    buffers = _share_buffers(module) if trainer.world_size > 1 else []
    for submodule, _ in modes:  # the flags alone: a module's own train() or eval() may do more than set them
        submodule.training = False
    own_log = vars(module).get("log")  # a module may keep something of its own under that name
    module.log = _log_nothing  # type: ignore[method-assign]  # log_dict calls it too
    # The stage decides which branch a datamodule's augmentation hooks take.
    trainer.validating = True
    try:
        # Another batch size would make a compiled module's training graph dynamic.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        trainer.training = True
        del module.log
        if own_log is not None:
            module.log = own_log  # type: ignore[method-assign]  # as it was
        for submodule, mode in modes:
            submodule.training = mode
        for buffer, own in buffers:
            _overwrite(buffer, own)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `LightningModule.log`: what a forward pass logs in a sweep is not the training's."""


@contextmanager
def agreed(trainer: Trainer, what: str) -> Iterator[None]:
    """Runs its body on every rank and raises on all of them if it raised on one, before anyone waits for the others.

    Args:
        trainer: The Trainer, whose processes all get here.
        what: What the body does, for the error on the ranks where it went well.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if trainer.world_size == 1 or getattr(error, "is_agreed_on", False):  # by a block within this one
            raise
        failure = error
    if trainer.world_size == 1 or trainer.strategy.reduce_boolean_decision(failure is None, all=True):
        return
    # Whose error is shown is up to the launcher, so each rank has the message.
    said: list[str | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(said, None if failure is None else f"{type(failure).__name__}: {failure}")
    rank, message = next((rank, message) for rank, message in enumerate(said) if message is not None)
    failure = failure or RuntimeError(f"{what} failed on rank {rank}: {message}")
    failure.is_agreed_on = True  # type: ignore[attr-defined]  # a mark for the block around this one
    raise failure


@contextmanager
def in_lockstep(trainer: Trainer, what: str) -> Iterator[None]:
    """`agreed` before a forward that waits for the other ranks' (FSDP2): where one rank stops, all must.

    A rank that fails elsewhere within an outer `agreed` meets the others there.
    """
    with agreed(trainer, what) if is_a(trainer.strategy, "ModelParallelStrategy") else nullcontext():
        yield


def _share_buffers(module: LightningModule) -> list[tuple[Tensor, Tensor]]:
    """Gives every rank rank 0's buffers; returns pairs of buffer and the rank's own value."""
    # Collectives want contiguous memory, which a buffer that is a view need not have.
    own = [(buffer, buffer.detach().clone(memory_format=torch.contiguous_format)) for buffer in module.buffers()]
    for buffer, value in own:
        shared = value.clone()
        torch.distributed.broadcast(shared, src=0)
        _overwrite(buffer, shared)
    return own


def _overwrite(tensor: Tensor, value: Tensor) -> None:
    """Writes only what differs: a constant that was expanded from one value can't be written to."""
    if not torch.equal(tensor, value):
        with torch.no_grad():
            tensor.copy_(value)
