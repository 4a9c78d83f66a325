"""From a batch to per-sample losses and classes: cross-entropy, the user's loss function, or the user's step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from lightning_cld.functional.checks import is_integer

# The return types are Any, because jsonargparse refuses functions without annotations for anything narrower.
LossFunction = torch.nn.Module | Callable[[Any, Any], Any]
StepFunction = Callable[[Any, Any], Any]

_STEP = (
    "Give step=..., a function of (module, batch) that returns (losses, classes), to CLDCallback or "
    "trajectories_from_checkpoints, or define `cld_step(self, batch) -> (losses, classes)` on the LightningModule."
)
_LOSS_OR_STEP = f"Give loss_fn=..., a function of (outputs, targets) that returns one loss per sample. Or: {_STEP}"
_VIEW = (
    "the un-augmented view of the train set: train_dataloader=... of CLDCallback or trajectories_from_checkpoints, or "
    "cld_train_dataloader() on the datamodule"
)

_FAR_MORE = 4
"""A warning is due from this many columns per class. ResNet-20, a small network, has 64 features for 10 classes."""

_SUM_TOLERANCE = 0.01
"""How far a row of probabilities may be from a sum of 1. In bfloat16 it may be off by 0.4 %."""


def check_loss(loss_fn: LossFunction | None, step: StepFunction | None) -> None:
    """Checks `loss_fn` and `step` as far as that is possible without a batch.

    Raises:
        TypeError: If one of them is not a function, or not an instance of a module.
        ValueError: If both are given, or `loss_fn` is a loss of torch that reduces.
    """
    for name, given, arguments in (("loss_fn", loss_fn, "(outputs, targets)"), ("step", step, "(module, batch)")):
        if given is not None and (isinstance(given, type) or not callable(given)):
            raise TypeError(f"{name} must be a function of {arguments}, or an instance of a module, got {given!r}.")
    if step is not None and loss_fn is not None:
        raise ValueError("step=... and loss_fn=... are both given. Remove loss_fn: step already returns the losses.")
    # Only torch's own losses are sure to go by this attribute. What others return shows at the first batch.
    of_torch = getattr(getattr(type(loss_fn), "forward", None), "__module__", "") == "torch.nn.modules.loss"
    reduction = getattr(loss_fn, "reduction", "none")
    if of_torch and reduction != "none":
        raise ValueError(
            f"loss_fn={type(loss_fn).__name__}(reduction={reduction!r}) does not return one loss per sample, which CLD "
            "needs. Give it reduction='none', as an argument or an attribute."
        )


class Step:
    """Turns a batch on the device into losses `[B]` and classes `[B]`, which are None for one class.

    Args:
        function: Does this for one batch.
        name: What the user calls the function, for errors.
    """

    def __init__(self, function: Callable[[Any], Any], name: str) -> None:
        self._function = function
        self._name = name

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Evaluates one batch."""
        result = self._function(batch)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"{self._name} must return (losses, classes), with None as classes for one class; got "
                f"{_describe(result)}."
            )
        losses, classes = result
        if isinstance(classes, Tensor) and classes.dtype == torch.bool:  # two classes
            classes = classes.long()
        if classes is not None and not _are_classes(classes):
            raise TypeError(f"{self._name} must return classes as integers [B] (or None), got {_describe(classes)}.")
        return losses, classes

    def check_sets(self, train_classes: Tensor | None, val_classes: Tensor | None) -> None:
        """Checks what only the classes of both sets show, after a sweep over each.

        Args:
            train_classes: The classes of the train set, int64, negative for positions that are not in use; or None.
            val_classes: The classes of the validation set, likewise.

        Raises:
            ValueError: If only one of the sets has classes.
        """
        if train_classes is None and val_classes is not None:
            raise ValueError(self._describe_lack("train", "validation"))
        if val_classes is None and train_classes is not None:
            raise ValueError(self._describe_lack("validation", "train"))

    def _describe_lack(self, lacking: str, having: str) -> str:
        """The error about classes that one set lacks and the other one has."""
        return (
            f"{self._name} returned classes for the {having} set, but None for the {lacking} set. Return classes for "
            "both sets, or None for both: then all samples form one class."
        )


class OutputsStep(Step):
    """A step for batches `(inputs, targets, ...)`: the loss of the module's outputs and the targets.

    Args:
        module: The LightningModule.
        loss_fn: As in `CLDCallback`.
    """

    def __init__(self, module: LightningModule, loss_fn: LossFunction | None) -> None:
        super().__init__(self._evaluate, "loss_fn")
        self._module = module
        self._loss_fn = _on_device(loss_fn, module)
        self._other_targets = "something else"  # targets that are not classes, in words
        self._watching = True  # until the first sweeps are over
        self._columns = 0
        # A tensor, so that no batch waits for the device. It is read once, after the first sweeps.
        self._are_probabilities: Tensor | None = None

    def _evaluate(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(f"CLD expects batches (inputs, targets, ...), got {_describe(batch)}. {_STEP}")
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
        """Notes, on the device, whether all logits so far look like probabilities."""
        if self._watching:
            rows = logits.detach().float()
            found = ((rows >= 0).all(dim=1) & ((rows.sum(dim=1) - 1).abs() < _SUM_TOLERANCE)).all()
            self._are_probabilities = found if self._are_probabilities is None else found & self._are_probabilities
            self._columns = logits.shape[1]

    def check_sets(self, train_classes: Tensor | None, val_classes: Tensor | None) -> None:
        """As `Step.check_sets`. The first call also warns if the default loss seems to get something else than logits.

        Raises:
            ValueError: If only one of the sets has classes.
        """
        super().check_sets(train_classes, val_classes)
        if self._watching and train_classes is not None and val_classes is not None:
            self._watching = False
            self._warn_of_no_logits(highest=int(max(train_classes.max(), val_classes.max())))

    def _describe_lack(self, lacking: str, having: str) -> str:
        return (
            f"The targets of the {having} set are integer classes, but the targets of the {lacking} set are "
            f"{self._other_targets}. If a collate function mixes samples or softens targets (MixUp, CutMix), give "
            f"{_VIEW}. Otherwise give both sets integer classes [B], or neither: then all samples form one class."
        )

    def _warn_of_no_logits(self, highest: int) -> None:
        name = type(self._module).__name__
        if self._are_probabilities is not None and self._are_probabilities:
            rank_zero_warn(
                f"CLD: {name}.forward seems to return probabilities: no value is negative, and each row sums to 1. "
                "The default loss takes them for logits. If your training does not, give its loss, such as "
                "loss_fn=lambda outputs, targets: torch.nn.functional.nll_loss(outputs.clamp(min=1e-9).log(), "
                "targets, reduction='none')."
            )
        elif self._columns >= _FAR_MORE * (highest + 1):
            rank_zero_warn(
                f"CLD: {name}.forward returns {self._columns:,} columns, but no class in the train and validation set "
                f"is higher than {highest}. The default loss takes the columns for the logits of classes 0 to "
                f"{self._columns - 1:,}. That is right for a model that was made for more classes. If the columns are "
                "something else, features for example, give loss_fn=..., step=... or a method cld_step."
            )


def make_step(module: LightningModule, loss_fn: LossFunction | None, step: StepFunction | None = None) -> Step:
    """Chooses how a batch becomes losses and classes.

    Args:
        module: The LightningModule.
        loss_fn: As in `CLDCallback`.
        step: As in `CLDCallback`.

    Raises:
        TypeError: If the module has no `forward`, and nothing else to use in its place.
        ValueError: If the module has a `cld_step`, and `loss_fn` or `step` is given as well.
    """
    cld_step = getattr(module, "cld_step", None)
    name = type(module).__name__
    for argument, given in (("step", step), ("loss_fn", loss_fn)):
        if cld_step is not None and given is not None:
            raise ValueError(
                f"{name} defines cld_step, and {argument}=... is given as well. Remove {argument} to use cld_step, or "
                f"remove cld_step from {name} to use {argument}."
            )
    if cld_step is not None:
        return Step(cld_step, f"{name}.cld_step")
    if step is not None:
        function = _on_device(step, module)
        return Step(lambda batch: function(module, batch), "step")
    # By name, since the module may come from the package pytorch_lightning as well.
    if getattr(module.forward, "__qualname__", "") == "LightningModule.forward":
        raise TypeError(f"{name} has no forward method, so CLD can't compute its outputs. Define forward. Or: {_STEP}")
    return OutputsStep(module, loss_fn)


def check_batch(losses: Any, classes: Tensor | None, samples: int) -> None:
    """Raises unless there is one loss, and one class if any, for each of the batch's `samples`."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point() or list(losses.shape) != [samples]:
        raise ValueError(
            f"CLD needs one loss per sample, floating point [{samples}] for this batch, but got {_describe(losses)}. "
            f"{_remedy(losses, samples)}"
        )
    if classes is not None and list(classes.shape) != [samples]:
        raise ValueError(
            f"CLD needs one class per sample, [{samples}] for this batch, but got {_describe(classes)}. Return one "
            f"class for each loss. {_STEP}"
        )


def _remedy(losses: Any, samples: int) -> str:
    """What to do about losses that are not floating point `[samples]`."""
    if not isinstance(losses, Tensor):
        return "Return the losses alone, as one tensor."
    shape = list(losses.shape)
    if math.prod(shape) == 1 != samples or not shape:
        return (
            "The loss reduces the batch to one number. Use reduction='none' if the loss takes that. If not, call it "
            "for one sample at a time: loss_fn=lambda outputs, targets: torch.stack([loss(o[None], t[None]) for o, t "
            "in zip(outputs, targets)])."
        )
    if shape == [samples]:
        return "Convert the losses to floating point numbers: losses.float()."
    if shape[0] == samples:
        return (
            "There are several losses per sample, such as one for each pixel, token or label. Average them: "
            "losses.flatten(1).mean(1). Leave out padding and ignored pixels."
        )
    if shape[0] % samples == 0 and shape[0] > 0:
        each = shape[0] // samples
        average = "losses.flatten(1).mean(1)" if len(shape) > 1 else "losses"
        return (
            f"There are {each} losses per sample. If the batch holds {each} views of each sample (crops, for example), "
            "give loaders with one view per sample: train_dataloader=... and val_dataloader=.... Or average the "
            f"losses of each sample, which may also be tokens: {average}.view(-1, {each}).mean(1) if the losses of a "
            "sample follow each other."
        )
    if samples in shape:
        place = shape.index(samples)
        return (
            f"The samples are in dimension {place}, not 0. Average over the other dimensions: "
            f"losses.movedim({place}, 0).flatten(1).mean(1)."
        )
    return (
        "Return a loss for every sample of the batch, in the order of the batch, also for those that the model or the "
        "loss leaves out. NaN leaves a training sample unscored."
    )


def _cross_entropy(outputs: Any, targets: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        many = isinstance(outputs, Tensor) and outputs.ndim > 2
        average = (
            " For logits [B, C, ...] of pixels or tokens that is loss_fn=lambda outputs, targets: "
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
            f"{_VIEW}. Otherwise: {_LOSS_OR_STEP}"
        )
    if len(outputs) != len(targets):
        raise ValueError(
            f"forward returned logits for {len(outputs)} samples, but there are {len(targets)} targets. If it returns "
            f"several rows per sample (crops, for example), average their losses. {_STEP}"
        )
    return F.cross_entropy(outputs.float(), targets.long(), reduction="none")


def _on_device(function: Any, module: LightningModule) -> Any:
    return function.to(module.device) if isinstance(function, torch.nn.Module) else function


def _are_classes(targets: Any) -> bool:
    return is_integer(targets) and targets.ndim == 1


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
