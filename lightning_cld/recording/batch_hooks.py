"""What the module, the datamodule and other callbacks do to a batch before it is evaluated."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_cld.data.parts import parts_of
from lightning_cld.guards import is_a, log_nothing

_HOOK = "on_validation_batch_start"

_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")

_PLAIN = {str, bytes, int, float, bool}
"""What is on no device."""

Prepare = Callable[[Any, int], None]
"""Changes a batch in place, given its number."""


class BatchHooks:
    """Runs the hooks `on_validation_batch_start` that prepare batches, as the evaluation loop would.

    The module's own sees every batch. Those of callbacks see the first batch of each sweep, and those that leave it as
    it was (they print, log or measure) not the others. Callbacks run as copies, so that the originals stay as they are.
    A callback that is a part of the module runs itself, since what it changes is put back with the module.

    Args:
        callbacks: The callbacks of the run; those of Lightning and progress bars prepare no batches.
        module: The module of the run.
    """

    def __init__(self, callbacks: Sequence[Callback], module: LightningModule) -> None:
        self._owners: list[Callback | LightningModule] = [
            callback for callback in callbacks if _is_own_hook(callback) and not is_a(callback, "ProgressBar")
        ]
        if _is_own_hook(module):
            self._owners.append(module)

    def of_sweep(self, trainer: Trainer, module: LightningModule) -> Prepare:
        """The function that prepares the batches of one sweep.

        Raises:
            TypeError: If a callback that prepares batches can't be copied.
        """
        if not self._owners:
            return _prepare_nothing
        parts_of_module = {id(part): part for part in (trainer, module, *module.modules(), *module.parameters())}
        hooks = [self._hook_of(owner, trainer, module, dict(parts_of_module)) for owner in self._owners]

        chosen: list[Prepare] | None = None

        def prepare(batch: Any, number: int) -> None:
            nonlocal chosen
            if chosen is not None:
                for hook in chosen:
                    hook(batch, number)
                return
            before, chosen = parts_of(batch), []
            for owner, hook in zip(self._owners, hooks, strict=True):
                hook(batch, number)
                after = parts_of(batch)
                if owner is module or not after.known or after.digest != before.digest:
                    chosen.append(hook)
                before = after

        return prepare

    def _hook_of(
        self, owner: Callback | LightningModule, trainer: Trainer, module: LightningModule, shared: dict[int, Any]
    ) -> Prepare:
        hook: Any
        if isinstance(owner, Callback):
            if id(owner) not in shared:
                try:
                    owner = copy.deepcopy(owner, shared)
                except Exception as error:
                    raise TypeError(
                        f"{type(owner).__name__}.{_HOOK} may prepare the batches. A sweep runs it on a copy of the "
                        f"callback, so that the callback stays as it is, but it can't be copied: {error}. Prepare the "
                        "batches in on_after_batch_transfer of the module or the datamodule instead."
                    ) from error
            if owner is not shared.get(id(owner)):
                vars(owner).update(log=log_nothing, log_dict=log_nothing)  # bound to the module's by Lightning
            hook = getattr(owner, _HOOK)
            given = _needed(hook)
            return lambda batch, number: hook(trainer, module, batch, number, **given)
        hook = getattr(owner, _HOOK)
        given = _needed(hook)
        return lambda batch, number: hook(batch, number, **given)


def _needed(hook: Any) -> dict[str, int]:
    """The number of the dataloader, if the hook can't do without."""
    parameter = inspect.signature(hook).parameters.get("dataloader_idx")
    return {"dataloader_idx": 0} if parameter is not None and parameter.default is parameter.empty else {}


def _prepare_nothing(batch: Any, number: int) -> None:
    """Leaves the batch as it is: there are no hooks."""


def transfer_of(trainer: Trainer, module: LightningModule) -> Callable[[Any], Any]:
    """How the evaluation loop would bring a batch to the device, through the user's transfer hooks.

    Where there are none, Lightning's way is cut short: it would look for them again for every batch.
    """
    convert, strategy = trainer.precision_plugin.convert_input, trainer.strategy
    owners = [owner for owner in (module, getattr(trainer, "datamodule", None)) if owner is not None]
    plain = type(strategy).batch_to_device.__qualname__ == "Strategy.batch_to_device"
    if plain and not any(_is_overridden(owner, name) for owner in owners for name in _TRANSFER):
        device = strategy.root_device
        return lambda batch: _moved(convert(batch), device)

    def transfer(batch: Any) -> Any:
        # Private, but the only way to the hook before the transfer; Lightning's evaluation loop makes the same call.
        batch = module._on_before_batch_transfer(convert(batch), dataloader_idx=0)
        return strategy.batch_to_device(batch, dataloader_idx=0)

    return transfer


def _moved(batch: Any, device: torch.device) -> Any:
    """What Lightning's own hook makes of a batch; quicker for names, and for tensors that are where they belong."""
    if type(batch) is Tensor and batch.device == device:
        return batch
    if type(batch) is dict:
        return {key: _moved(part, device) for key, part in batch.items()}
    if type(batch) in (tuple, list):
        return batch[:] if set(map(type, batch)) <= _PLAIN else type(batch)(_moved(part, device) for part in batch)
    return move_data_to_device(batch, device)


def _is_overridden(owner: Any, name: str) -> bool:
    """Whether a transfer hook is another one than that of `DataHooks`, in whichever of Lightning's packages."""
    base = next((kind for kind in type(owner).__mro__ if kind.__name__ == "DataHooks"), None)
    return base is None or getattr(getattr(owner, name), "__code__", None) is not vars(base)[name].__code__


def _is_own_hook(owner: Callback | LightningModule) -> bool:
    """Whether the hook is not Lightning's."""
    hook = getattr(type(owner), _HOOK, None)
    return not getattr(hook, "__module__", "").startswith(("lightning.", "pytorch_lightning.", "lightning_cld."))
