"""What a look at the model or the data must leave as it was: random states, modes, weights, the trainer's stage."""

from __future__ import annotations

import operator
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import NoneType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.parameter import Parameter, UninitializedBuffer, UninitializedParameter

_SEED = 0


def is_a(value: object, *names: str) -> bool:
    """Whether a value is of one of Lightning's classes of these names, or derived from it.

    By name, since it may be that of the package pytorch_lightning as well as that of lightning.pytorch.
    """
    return not {kind.__name__ for kind in type(value).__mro__}.isdisjoint(names)


@contextmanager
def preserved_rng(seed: int = _SEED) -> Iterator[None]:
    """Runs its body from a fixed seed and puts torch's, numpy's and python's global random states back.

    The same seed every time: a dataset that augments at random then shows each sample the same way in every sweep.
    """
    error: BaseException | None = None
    with isolate_rng():  # which restores nothing when its body raises
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # datasets draw from numpy's global state
        # Not torch.manual_seed, which would also seed devices whose state isolate_rng does not put back.
        torch.default_generator.manual_seed(seed)
        # Before that torch would keep the seed for later, when nothing puts it back.
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types for it
            torch.cuda.manual_seed_all(seed)
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

    Afterwards the stage is training, and what the body wrote into the module is put back, with the few exceptions that
    `_remember` names; every submodule has its own mode (a BatchNorm that the user froze stays frozen). In a distributed
    run all ranks use rank 0's buffers during the body, since BatchNorm statistics differ between ranks and the scores
    must not; then each has its own again.

    Raises:
        ValueError: If the module has lazy layers that no batch has given a shape.
    """
    _check_initialized(module)
    undo = _remember(module, sharded=is_a(trainer.strategy, "ModelParallelStrategy"))
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        for submodule, _ in modes:  # the flags alone: a module's own train() or eval() may do more than set them
            submodule.training = False
        if trainer.world_size > 1:
            _share_buffers(module)
        vars(module)["log"] = log_nothing  # log_dict calls it too
        # The stage decides which branch a datamodule's augmentation hooks take.
        trainer.validating = True
        # Another batch size would make a compiled module's training graph dynamic.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        trainer.training = True
        for put_back in undo:
            put_back()
        for submodule, mode in modes:  # again, since a scripted module's is not among its attributes
            submodule.training = mode


def _check_initialized(module: LightningModule) -> None:
    """Raises if a sweep would be what draws the initial weights: they would differ from those without a sweep."""
    weights = [*module.named_parameters(), *module.named_buffers()]
    lazy = [name for name, weight in weights if isinstance(weight, (UninitializedParameter, UninitializedBuffer))]
    if lazy:
        raise ValueError(
            f"{lazy[0]} of {type(module).__name__} has no shape before the first forward pass, and the first sweep "
            "must not be that pass. Call the module on a batch in `setup` or `configure_model`, or let the Trainer do "
            "it (num_sanity_val_steps=1)."
        )


def _remember(module: torch.nn.Module, sharded: bool) -> list[Callable[[], Any]]:
    """Looks at all that a forward pass can write, and returns functions that put it back.

    That is every attribute and buffer of the module and of the modules in it, and what they hold: tensors, arrays,
    random generators, and lists, dicts, sets, deques and tuples, which may hold more of these. So metric states,
    quantization observers, caches, counters and hooks are among it. Each object gets its own content back, so what was
    shared still is.

    Not put back are parameters that are written in place, the inside of objects of any other kind and of sparse and
    nested tensors, and attributes of scripted modules other than buffers.

    Args:
        module: The module.
        sharded: Whether FSDP2 is at work, which in a pass exchanges parameters and adds hooks, and relies on them.
    """
    empty: list[Any] = []  # most containers: a module has a dozen of them
    undo: list[Callable[[], Any]] = [partial(_clear, empty)]
    seen: set[int] = set()
    found: list[Any] = [module, *module.buffers()]  # a scripted module keeps its buffers elsewhere
    while found:
        thing = found.pop()
        if isinstance(thing, torch.nn.Module):
            thing = vars(thing)  # past properties and the module's own __setattr__
            if sharded:
                seen.update(id(inner) for name, inner in thing.items() if name.endswith(("_parameters", "_hooks")))
        if isinstance(thing, (str, int, float, NoneType)) or id(thing) in seen:  # most, as in a vocabulary
            continue
        seen.add(id(thing))
        if isinstance(thing, (dict, list, set, deque)):
            if len(thing) == 0:
                empty.append(thing)
                continue
            undo.append(partial(_refill, thing, dict(thing) if isinstance(thing, dict) else list(thing)))
            found += thing.values() if isinstance(thing, dict) else thing
        elif isinstance(thing, tuple):
            found += thing
        elif isinstance(thing, Parameter):
            if type(thing) is Parameter:  # not a sharded or quantized one
                undo.append(partial(setattr, thing, "data", thing.data))  # no copy, which would double the model
        elif hasattr(type(thing), "__tensor_flatten__"):  # a tensor made of others, as a DTensor is
            found += [getattr(thing, name) for name in thing.__tensor_flatten__()[0]]
        elif isinstance(thing, Tensor) and thing.layout is torch.strided and not (thing.is_meta or thing.is_nested):
            # Only its values tell whether a tensor was written: BatchNorm and what goes through `.data` do not count
            # in `_version`. So even a large table is copied.
            undo.append(partial(_rewrite, thing, thing.data, _each_once(thing.data).clone()))
        elif type(thing) is np.ndarray and thing.flags.writeable:  # not one that maps a file
            undo.append(partial(np.copyto, thing, thing.copy()))
        elif isinstance(thing, torch.Generator):
            undo.append(partial(thing.set_state, thing.get_state()))
        elif isinstance(thing, np.random.Generator):
            undo.append(partial(setattr, thing.bit_generator, "state", thing.bit_generator.state))
        elif isinstance(thing, random.Random):
            undo.append(partial(thing.setstate, thing.getstate()))
    return undo


def _clear(containers: list[Any]) -> None:
    """Empties those that were empty before."""
    for container in containers:
        if len(container):
            container.clear()


def _refill(container: Any, content: Any) -> None:
    """Puts the very objects of `content` back into a container, in their order, unless it has them."""
    now, before = ([*each, *each.values()] if isinstance(each, dict) else list(each) for each in (container, content))
    if len(now) != len(before) or not all(map(operator.is_, now, before)):
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(content)


def _rewrite(tensor: Tensor, own: Tensor, value: Tensor) -> None:
    """Gives a tensor its own memory back, and the memory its value."""
    _overwrite(_each_once(own), value)
    tensor.data = own


def _each_once(tensor: Tensor) -> Tensor:
    """A view that has each place in memory once: what is expanded from fewer values can't be written to."""
    for dim in range(tensor.ndim) if 0 in tensor.stride() else ():
        if tensor.stride(dim) == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


def log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `LightningModule.log`: what a forward pass logs in a sweep is not the training's."""


class StoppedError(Exception):
    """Raised where work ends early because a signal came. Raised in `agreed` on one rank, it is raised on all."""


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
    if trainer.strategy.reduce_boolean_decision(isinstance(failure, StoppedError), all=False):
        failure = StoppedError(f"{what} was stopped.")
    rank, message = next((rank, message) for rank, message in enumerate(said) if message is not None)
    failure = failure or RuntimeError(f"{what} failed on rank {rank}: {message}")
    failure.is_agreed_on = True  # type: ignore[attr-defined]  # a mark for the block around this one
    raise failure


def in_lockstep(trainer: Trainer, what: str) -> Callable[[], AbstractContextManager[None]]:
    """`agreed` before each forward, where one waits for the other ranks' (FSDP2): where one rank stops, all must.

    A rank that fails elsewhere within an outer `agreed` meets the others there.

    Args:
        trainer: As in `agreed`.
        what: As in `agreed`.

    Returns:
        A function that makes the context of one batch.
    """
    return partial(agreed, trainer, what) if is_a(trainer.strategy, "ModelParallelStrategy") else nullcontext


def _share_buffers(module: LightningModule) -> None:
    """Gives every rank rank 0's buffers."""
    for buffer in module.buffers():
        # Collectives want contiguous memory, which a buffer that is a view need not have.
        shared = buffer.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.broadcast(shared, src=0)
        _overwrite(buffer, shared)


def _overwrite(tensor: Tensor, value: Tensor) -> None:
    """Writes to memory of the CPU only what differs: a constant may lie in memory that can't be written to.

    On another device there is no such memory, and a comparison would wait for the device.
    """
    same = tensor.device.type == "cpu" and (
        torch.equal(tensor, value)
        or (tensor.is_floating_point() and torch.allclose(tensor, value, rtol=0, atol=0, equal_nan=True))
    )
    if not same:
        tensor.data.copy_(value)  # past autograd, and into inference tensors too
