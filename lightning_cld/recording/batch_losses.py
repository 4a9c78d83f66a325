"""Turns a batch into per-sample losses and classes: by cross-entropy, the user's loss function, or the user's step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from lightning_cld.functional.checks import is_integer

# If the return types were narrower than Any, jsonargparse would refuse functions without annotations.
LossFunction = torch.nn.Module | Callable[[Any, Any], Any]
StepFunction = Callable[[Any, Any], Any]

_STEP = (
    "give CLDCallback or trajectories_from_checkpoints step=..., a function of (module, batch) that returns (losses, "
    "classes), or define `cld_step(self, batch) -> (losses, classes)` on the LightningModule."
)
_LOSS_OR_STEP = (
    "For another loss, give loss_fn=..., a function of (outputs, targets) that returns one loss per sample. For "
    f"anything else, {_STEP}"
)
_VIEW = (
    "the un-augmented view of the train set: train_dataloader=... of CLDCallback or trajectories_from_checkpoints, or "
    "cld_train_dataloader() on the datamodule"
)

_FAR_MORE = 4
"""This many columns per class cause a warning. Even small networks have more features: ResNet-20 64 for 10 classes."""

_WATCHED = 8
"""In how many batches the outputs are looked at, to see whether they are probabilities."""

_SUM_TOLERANCE = 0.01
"""How much the sum of a row of probabilities may differ from 1, since bfloat16 rounds each value by up to 0.2 %."""


def check_loss(loss_fn: LossFunction | None, step: StepFunction | None) -> None:
    """Checks what can be checked without a batch.

    Raises:
        TypeError: If one of them is neither a function nor an instance of a module.
        ValueError: If both are given, or if `loss_fn` is a loss of torch that reduces the batch.
    """
    for name, given, arguments in (("loss_fn", loss_fn, "(outputs, targets)"), ("step", step, "(module, batch)")):
        if given is not None and (isinstance(given, type) or not callable(given)):
            raise TypeError(f"{name} must be a function of {arguments}, or an instance of a module, got {given!r}.")
    if step is not None and loss_fn is not None:
        raise ValueError("step=... and loss_fn=... are both given. Remove loss_fn: step already returns the losses.")
    # Other losses may ignore or inherit the attribute. The first batch shows what they return.
    of_torch = getattr(getattr(type(loss_fn), "forward", None), "__module__", "") == "torch.nn.modules.loss"
    reduction = getattr(loss_fn, "reduction", "none")
    if of_torch and reduction != "none":
        raise ValueError(
            f"loss_fn={type(loss_fn).__name__}(reduction={reduction!r}) does not return one loss per sample, which CLD "
            "needs. Give it reduction='none', as an argument or an attribute."
        )


class Step:
    """Turns a batch on the device into losses `[B]`, classes `[B]` (None for one class), and which samples these are.

    Args:
        function: Turns one batch into the first two or all three.
        name: The name of the function in errors.
    """

    def __init__(self, function: Callable[[Any], Any], name: str) -> None:
        self._function = function
        self.name = name

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | list[str] | None]:
        """The losses and classes of one batch, and positions or names, or None where the step doesn't tell."""
        result = self._function(batch)
        if not isinstance(result, tuple) or len(result) not in (2, 3):
            raise TypeError(
                f"{self.name} must return (losses, classes), where None for classes means one class for all, or for a "
                f"stream (losses, classes, positions); got {_describe(result)}."
            )
        losses, classes = result[:2]
        samples = _samples_in(result[2], losses, self.name) if len(result) == 3 else None
        if isinstance(classes, Tensor) and classes.dtype == torch.bool:  # two classes
            classes = classes.long()
        if classes is not None and not _are_classes(classes):
            raise TypeError(f"{self.name} must return classes as integers [B] or None, got {_describe(classes)}.")
        return losses, classes, samples

    def check_sets(self, train_classes: Tensor | None, val_classes: Tensor | None) -> None:
        """Checks the classes that the sweeps over both sets gave.

        Args:
            train_classes: Int64, negative for positions that are not in use; None if the set has no classes.
            val_classes: The same for the validation set.

        Raises:
            ValueError: If only one of the sets has classes.
        """
        if train_classes is None and val_classes is not None:
            raise ValueError(self._describe_lack("train", "validation"))
        if val_classes is None and train_classes is not None:
            raise ValueError(self._describe_lack("validation", "train"))

    def _describe_lack(self, lacking: str, having: str) -> str:
        """The error message if one set lacks classes and the other has them."""
        return (
            f"{self.name} returned classes for the {having} set, but None for the {lacking} set. Return classes for "
            "both sets. Or return None for both, which puts all samples into one class."
        )


class OutputsStep(Step):
    """The step for batches `(inputs, targets, ...)`. It takes the loss of the module's outputs and the targets.

    Args:
        module: The LightningModule.
        loss_fn: As in `CLDCallback`.
    """

    def __init__(self, module: LightningModule, loss_fn: LossFunction | None) -> None:
        super().__init__(self._evaluate, "loss_fn")
        self._module = module
        self._loss_fn = _on_device(loss_fn, module)
        self._other_targets = "something else"  # a description of targets that are not classes
        self._watching = True  # during the first sweeps
        self._watched = 0
        self._columns = 0
        # A tensor that is read once, after the first sweeps: reading it for each batch would wait for the device.
        self._are_probabilities: Tensor | None = None

    def _evaluate(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(
                f"CLD expects batches (inputs, targets, ...), got {_describe(batch)}. For other batches, {_STEP}"
            )
        inputs, targets = batch[0], batch[1]
        outputs = self._module(inputs)
        if self._loss_fn is None:
            losses = _cross_entropy(outputs, targets)
            self._watch(outputs)
            return losses, targets
        if isinstance(outputs, Tensor) and outputs.is_floating_point():
            outputs = outputs.float()
        if _are_classes(targets):
            return self._loss_fn(outputs, targets), targets
        self._other_targets = _describe(targets)
        return self._loss_fn(outputs, targets), None

    def _watch(self, logits: Tensor) -> None:
        """Remembers whether the first logits all look like probabilities, without waiting for the device."""
        if self._watching and self._watched < _WATCHED:
            self._watched += 1
            rows = logits.detach().float()
            found = ((rows >= 0).all(dim=1) & ((rows.sum(dim=1) - 1).abs() < _SUM_TOLERANCE)).all()
            self._are_probabilities = found if self._are_probabilities is None else found & self._are_probabilities
            self._columns = logits.shape[1]

    def check_sets(self, train_classes: Tensor | None, val_classes: Tensor | None) -> None:
        """As `Step.check_sets`. The first call also warns if the outputs do not look like logits.

        Raises:
            ValueError: If only one of the sets has classes.
        """
        super().check_sets(train_classes, val_classes)
        if self._watching and train_classes is not None and val_classes is not None:
            self._watching = False
            self._warn_unless_logits(highest=int(max(train_classes.max(), val_classes.max())))

    def _describe_lack(self, lacking: str, having: str) -> str:
        return (
            f"The targets of the {having} set are integer classes, but the targets of the {lacking} set are "
            f"{self._other_targets}. If a collate function mixes samples or softens targets (MixUp, CutMix), give "
            f"{_VIEW}. Otherwise give both sets integer classes [B], or neither, which puts all samples into one class."
        )

    def _warn_unless_logits(self, highest: int) -> None:
        name = type(self._module).__name__
        if self._are_probabilities is not None and self._are_probabilities:
            rank_zero_warn(
                f"CLD: {name}.forward seems to return probabilities: no value is negative, and each row sums to 1. "
                "The default loss treats them as logits. If your training does not, give the loss that it uses, such "
                "as loss_fn=lambda outputs, targets: torch.nn.functional.nll_loss(outputs.clamp(min=1e-9).log(), "
                "targets, reduction='none')."
            )
        elif self._columns >= _FAR_MORE * (highest + 1):
            rank_zero_warn(
                f"CLD: {name}.forward returns {self._columns:,} columns, but no class in the train and validation set "
                f"is higher than {highest}. The default loss treats the columns as logits of the classes 0 to "
                f"{self._columns - 1:,}. That is right if the model was made for more classes. If the columns are "
                "something else, such as features, give loss_fn=..., step=... or a cld_step method."
            )


def make_step(module: LightningModule, loss_fn: LossFunction | None, step: StepFunction | None = None) -> Step:
    """Chooses how a batch becomes losses and classes.

    Args:
        module: The LightningModule.
        loss_fn: As in `CLDCallback`.
        step: As in `CLDCallback`.

    Raises:
        TypeError: If there is no step, and the module has no `forward`.
        ValueError: If `loss_fn` or `step` is given although the module has a `cld_step`.
    """
    cld_step = getattr(module, "cld_step", None)
    name = type(module).__name__
    for argument, given in (("step", step), ("loss_fn", loss_fn)):
        if cld_step is not None and given is not None:
            raise ValueError(
                f"{name} has a cld_step, but {argument}=... is given as well. Remove {argument} to use cld_step, or "
                f"remove cld_step from {name} to use {argument}."
            )
    if cld_step is not None:
        return Step(cld_step, f"{name}.cld_step")
    if step is not None:
        function = _on_device(step, module)
        return Step(lambda batch: function(module, batch), "step")
    # Compared by name, because the module may also come from the package pytorch_lightning.
    if getattr(module.forward, "__qualname__", "") == "LightningModule.forward":
        raise TypeError(f"{name} has no forward method, so CLD can't compute its outputs. Define forward, or {_STEP}")
    return OutputsStep(module, loss_fn)


def check_batch(losses: Any, classes: Tensor | None, samples: int) -> None:
    """Raises unless a batch of so many samples has one loss for each sample, and one class if it has classes."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point() or losses.shape != (samples,):
        raise ValueError(
            f"CLD needs one loss per sample, floating point [{samples}] for this batch, but got {_describe(losses)}. "
            f"{_remedy(losses, samples)}"
        )
    if classes is not None and classes.shape != (samples,):
        raise ValueError(
            f"CLD needs one class per sample, [{samples}] for this batch, but got {_describe(classes)}. Return "
            f"one class for each loss: {_STEP}"
        )


def _remedy(losses: Any, samples: int) -> str:
    """Says how losses that are not floating point `[samples]` can become so."""
    if not isinstance(losses, Tensor):
        return "Return the losses alone, as one tensor."
    shape = list(losses.shape)
    if math.prod(shape) == 1 != samples or not shape:
        return (
            "The loss reduces the batch to one number. Use reduction='none' if the loss has that argument. Otherwise "
            "call the loss for each sample: loss_fn=lambda outputs, targets: torch.stack([loss(o[None], t[None]) for "
            "o, t in zip(outputs, targets)])."
        )
    if shape == [samples]:
        return "Convert the losses to floating point numbers: losses.float()."
    if shape[0] == samples:
        return (
            "There are several losses per sample, for example one per pixel, token or label. Average them: "
            "losses.flatten(1).mean(1). Leave out padding and ignored pixels."
        )
    if shape[0] % samples == 0 and shape[0] > 0:
        each = shape[0] // samples
        average = "losses.flatten(1).mean(1)" if len(shape) > 1 else "losses"
        return (
            f"There are {each} losses per sample. If the batch holds {each} views of each sample (crops, for example), "
            "give loaders with one view per sample: train_dataloader=... and val_dataloader=.... Otherwise average the "
            f"losses of each sample: {average}.view(-1, {each}).mean(1), if they follow each other."
        )
    if samples in shape:
        place = shape.index(samples)
        return (
            f"The samples are in dimension {place} instead of 0. Average over the other dimensions: "
            f"losses.movedim({place}, 0).flatten(1).mean(1)."
        )
    return (
        "Return a loss for every sample of the batch, in the order of the batch. If a training sample has none, return "
        "NaN for it: the sample is then unscored."
    )


def _samples_in(value: Any, losses: Any, name: str) -> Tensor | list[str] | None:
    """What a step returned as its third value: positions, integers `[B]`, or names; None if it is None."""
    if value is None:
        return None
    if isinstance(value, np.ndarray) and value.dtype.kind in "UOT":
        value = value.tolist()
    is_named = isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
    if not is_named and not (is_integer(value) and value.ndim == 1):
        raise TypeError(
            f"{name} must return positions as an integer tensor [B], or names as a list of B strings, got "
            f"{_describe(value)}."
        )
    if isinstance(losses, Tensor) and losses.ndim == 1 and len(value) != len(losses):
        raise ValueError(
            f"{name} returned {len(losses)} losses, but {len(value)} {'names' if is_named else 'positions'}. Return "
            "one for each loss."
        )
    return list(value) if is_named else value


def _cross_entropy(outputs: Any, targets: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        many = isinstance(outputs, Tensor) and outputs.ndim > 2
        average = (
            " If these are logits [B, C, ...] of pixels or tokens, give loss_fn=lambda outputs, targets: "
            "torch.nn.functional.cross_entropy(outputs, targets, reduction='none').flatten(1).mean(1)."
        )
        raise TypeError(
            f"CLD's default loss is cross-entropy of logits [B, C] with C >= 2, but forward returned "
            f"{_describe(outputs)}. {_LOSS_OR_STEP}{average if many else ''}"
        )
    if not _are_classes(targets):
        raise TypeError(
            f"CLD's default loss is cross-entropy with integer classes [B], but the targets are "
            f"{_describe(targets)}. If a collate function mixes samples or softens targets (MixUp, CutMix), give "
            f"{_VIEW}. {_LOSS_OR_STEP}"
        )
    if outputs.shape[0] != targets.shape[0]:
        raise ValueError(
            f"forward returned logits for {len(outputs)} samples, but there are {len(targets)} targets. If it returns "
            f"several rows per sample, for example of crops, average their losses: {_STEP}"
        )
    return F.cross_entropy(outputs.float(), targets.long(), reduction="none")


def _on_device(function: Any, module: LightningModule) -> Any:
    """The function; a module moved to the device of `module`, and evaluated, not trained, if it is no part of it."""
    if not isinstance(function, torch.nn.Module):
        return function
    moved = function.to(module.device)
    if any(part is function for part in module.modules()):  # which a sweep evaluates with the rest
        return moved

    def evaluated(*arguments: Any) -> Any:
        modes = [(part, part.training) for part in moved.modules()]
        try:
            for part, _ in modes:
                part.training = False
            return moved(*arguments)
        finally:
            for part, mode in modes:
                part.training = mode

    return evaluated


def _are_classes(targets: Any) -> bool:
    return is_integer(targets) and targets.ndim == 1


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
