"""From a batch to per-sample losses and classes: cross-entropy, the user's loss function, or `cld_step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F

from lightning_cld.functional.checks import is_integer

# Returns a Tensor. It is not said here, since jsonargparse would then refuse functions without annotations.
LossFunction = torch.nn.Module | Callable[[Any, Any], Any]
Step = Callable[[Any], tuple[Tensor, Tensor | None]]

_WAYS = (
    "Give CLDCallback or trajectories_from_checkpoints loss_fn=..., a function of (outputs, targets) that returns one "
    "loss per sample, or define `cld_step(self, batch) -> (losses, classes)` on the LightningModule."
)


def check_loss_fn(loss_fn: LossFunction | None) -> None:
    """Raises if `loss_fn` can be seen not to return a loss per sample."""
    if loss_fn is None:
        return
    if isinstance(loss_fn, type) or not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function or an instance of a loss module, got {loss_fn!r}.")
    reduction = getattr(loss_fn, "reduction", "none")
    if reduction != "none":
        raise ValueError(
            f"loss_fn={type(loss_fn).__name__}(reduction={reduction!r}) returns one loss a batch; CLD needs one per "
            "sample. Use reduction='none'."
        )


def make_step(module: LightningModule, loss_fn: LossFunction | None) -> Step:
    """The function from a batch on the device to (losses `[B]`, classes `[B]` or None).

    Raises:
        TypeError: If the module has neither `cld_step` nor `forward`.
        ValueError: If both `cld_step` and `loss_fn` are given.
    """
    cld_step = getattr(module, "cld_step", None)
    name = type(module).__name__
    if cld_step is not None and loss_fn is not None:
        raise ValueError(
            f"{name} defines cld_step, and loss_fn={loss_fn!r} is given as well: which one decides? Remove one of them."
        )
    if cld_step is not None:
        return lambda batch: _check_step_output(cld_step(batch), name)
    # By name, since the module may come from the package pytorch_lightning as well.
    if getattr(module.forward, "__qualname__", "") == "LightningModule.forward":
        raise TypeError(
            f"{name} has no forward method, so CLD can't compute its outputs. Define forward, or define "
            "`cld_step(self, batch) -> (losses, classes)` on it."
        )
    if isinstance(loss_fn, torch.nn.Module):
        loss_fn = loss_fn.to(module.device)

    def step(batch: Any) -> tuple[Tensor, Tensor | None]:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(
                f"CLD expects batches (inputs, targets, ...), got {_describe(batch)}. For other layouts "
                "define `cld_step(self, batch) -> (losses, classes)` on the LightningModule."
            )
        inputs, targets = batch[0], batch[1]
        outputs = module(inputs)
        if loss_fn is None:
            return _cross_entropy(outputs, targets)
        if isinstance(outputs, Tensor) and outputs.is_floating_point():
            outputs = outputs.float()
        return loss_fn(outputs, targets), targets if _are_classes(targets) else None

    return step


def _cross_entropy(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        raise TypeError(
            f"CLD's default loss is cross-entropy of logits [B, C] with C >= 2, but forward returned "
            f"{_describe(outputs)}. {_WAYS}"
        )
    if not _are_classes(targets):
        raise TypeError(
            f"CLD's default loss is cross-entropy with integer classes [B], but the targets are "
            f"{_describe(targets)}. {_WAYS}"
        )
    return F.cross_entropy(outputs.float(), targets.long(), reduction="none"), targets


def _check_step_output(result: Any, name: str) -> tuple[Tensor, Tensor | None]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"{name}.cld_step must return (losses, classes), classes None for one class; got {_describe(result)}."
        )
    losses, classes = result
    if classes is not None and not _are_classes(classes):
        raise TypeError(f"{name}.cld_step must return classes as integers [B] (or None), got {_describe(classes)}.")
    return losses, classes


def check_batch(losses: Any, classes: Tensor | None, samples: int) -> None:
    """Raises unless there is one loss, and one class if any, for each of the batch's `samples`."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point() or list(losses.shape) != [samples]:
        raise ValueError(
            f"CLD needs one loss per sample, floating point [{samples}] for this batch, but got {_describe(losses)}. "
            "Does the loss function reduce (use reduction='none'), or the module drop samples?"
        )
    if classes is not None and list(classes.shape) != [samples]:
        raise ValueError(f"CLD needs one class per sample, [{samples}] for this batch, but got {_describe(classes)}.")


def _are_classes(targets: Any) -> bool:
    return is_integer(targets) and targets.ndim == 1


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
