"""Reading a stream for a sweep: the losses, and which samples they are of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cld.guards import StoppedError, in_lockstep, is_a
from lightning_cld.names import SampleNames, find_in_order
from lightning_cld.recording.batch_hooks import transfer_of
from lightning_cld.recording.batch_losses import Step, check_batch
from lightning_cld.recording.signals import IsStopped

_PASSES = 10
"""A stream that showed its samples so many times in one sweep will not end."""

READ = 10_000
"""Samples to read before it is asked whether a stream shows the same ones again and again."""

CALLED = {"train": "train", "val": "validation"}


_END = object()


class Seen(NamedTuple):
    """The samples that the first sweep over a stream saw.

    Attributes:
        length: Number of positions.
        positions: Those that were seen, sorted, int64 `[n]`, on the CPU.
        names: The name at each position; None if the samples say their positions.
        classes: Int64 `[length]` on the CPU, -1 where no sample was seen; None for one class.
    """

    length: int
    positions: Tensor
    names: SampleNames | None
    classes: Tensor | None

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors that `torch.load(weights_only=True)` reads."""
        return {**self._asdict(), "names": None if self.names is None else self.names.state_dict()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Seen:
        """The inverse of `state_dict`."""
        names = None if state["names"] is None else SampleNames.from_state_dict(state["names"])
        return cls(**{**state, "names": names})


class PackedNames:
    """The names of a batch. They take less memory than as python strings."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]  # as names of files may need
        self.text, self.ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])

    def names(self) -> Iterator[str]:
        """The names, in order."""
        for start, end in zip(self.ends, self.ends[1:], strict=False):
            yield self.text[start:end].decode("utf-8", "surrogatepass")

    def __len__(self) -> int:
        return len(self.ends) - 1


class Read(NamedTuple):
    """What one process read: losses, float32 `[n]`, classes, int64 `[n]`, and positions, int64 `[n]`, or names."""

    losses: Tensor
    classes: Tensor | None  # None also if there was no batch
    samples: Tensor | list[PackedNames] | None


class StreamReader:
    """Reads a stream and evaluates what it shows.

    Args:
        kind: "train" or "val", for errors.
        num_samples: As in `CLDCallback`, for a train stream.
    """

    def __init__(self, kind: str, num_samples: int | None) -> None:
        self.kind = kind
        self.num_samples = num_samples

    def read(
        self,
        stream: Any,
        trainer: Trainer,
        module: LightningModule,
        step: Step,
        prepare: Callable[[Any, int], None],
        *,
        show: Callable[[int, int | None], None],
        is_stopped: IsStopped,
        limit: int | None,
        seen: Seen | None,
    ) -> Read:
        """What this process reads, in the order of reading.

        Args:
            stream: The stream to read.
            trainer: The Trainer of the fit.
            module: Its module.
            step: From a batch on the device to losses, classes, and positions or names.
            prepare: What hooks do to a batch before that.
            show: Shows the progress, given the batches that are done and their number.
            is_stopped: Says before each batch whether to end early.
            limit: The number of batches; None reads to the end.
            seen: What the first sweep saw; None in the first sweep.
        """
        device = trainer.strategy.root_device
        total = sized_len(stream) or limit
        to_device, forward_context = transfer_of(trainer, module), trainer.precision_plugin.forward_context
        losses: list[Tensor] = []
        classes: list[Tensor | None] = []
        samples: list[Any] = []
        length = self.num_samples if seen is None else seen.length
        count, ask_at = 0, _PASSES * length if length else READ
        for done, (batch, is_last_again) in enumerate(self._batches(trainer, stream, limit, is_stopped)):
            show(done, total)
            on_device = to_device(batch)
            prepare(on_device, done)
            with forward_context():
                batch_losses, batch_classes, batch_samples = step(on_device)
            if is_last_again:
                continue
            which = self._check_samples(batch_samples, step.name, samples[-1] if samples else None, seen)
            check_batch(batch_losses, batch_classes, len(which))
            if classes and (batch_classes is None) != (classes[-1] is None):
                raise ValueError(
                    "cld_step (or step) returned classes for some batches and None for others. Return one or the other."
                )
            if samples and type(which) is not type(samples[-1]):
                raise TypeError(f"{step.name} returned positions for some batches and names for others.")
            losses.append(batch_losses.detach().float())
            classes.append(batch_classes)
            samples.append(which)
            count += len(which)
            if count >= ask_at:
                self._check_end(samples, count)
                ask_at *= 2
        if not losses:
            return Read(torch.zeros(0, device=device), None, None)
        return Read(
            torch.cat(losses).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf).to(device),
            None if classes[0] is None else torch.cat([each for each in classes if each is not None]).long().to(device),
            samples if isinstance(samples[0], PackedNames) else torch.cat(samples).long().to(device),
        )

    def _batches(
        self, trainer: Trainer, stream: Any, limit: int | None, is_stopped: IsStopped
    ) -> Iterator[tuple[Any, bool]]:
        """The batches, and whether one is the last one again.

        That comes where a rank's forward waits for the other ranks' (FSDP2), and these have batches left.
        """
        together = trainer.world_size > 1 and is_a(trainer.strategy, "ModelParallelStrategy")
        locked = in_lockstep(trainer, f"The {self.kind} sweep")
        batches, batch, done = iter(stream), None, 0
        while limit is None or done < limit:
            with locked():
                if is_stopped():
                    raise StoppedError
                following = next(batches, _END)
            is_over = following is _END
            if together:
                if trainer.strategy.reduce_boolean_decision(is_over, all=True):
                    return
                with locked():
                    if is_over and batch is None:
                        raise ValueError(f"The {CALLED[self.kind]} stream of this rank has no batch.")
            elif is_over:
                return
            batch = batch if is_over else following
            yield batch, is_over
            done += 1

    def _check_samples(self, samples: Any, name: str, before: Any, seen: Seen | None) -> Tensor | PackedNames:
        """The positions. In the first sweep names are packed.

        Args:
            samples: Positions or names.
            name: That of the step, for errors.
            before: What this returned for the batch before; None for the first one.
            seen: What the first sweep saw; None in the first sweep.
        """
        if samples is None:
            raise TypeError(
                f"The {CALLED[self.kind]} loader is a stream: its samples have no positions of their own. {name} must "
                "return them, or names, as a third value: (losses, classes, positions). Positions are integers [B] "
                "from 0 to num_samples - 1. Names are a list of B strings."
            )
        names = None if seen is None else seen.names
        if seen is not None and isinstance(samples, Tensor) != (names is None):
            raise TypeError(f"The {CALLED[self.kind]} stream had names in the first sweep, or positions, not both.")
        if names is not None:
            following = 0 if before is None or not len(before) else int(before[-1]) + 1
            return find_in_order(names, samples, following)
        if not isinstance(samples, Tensor):
            return PackedNames(samples)
        if self.kind == "train" and self.num_samples is None and seen is None:
            raise ValueError(
                f"{name} returned positions for a stream, so say how many samples there are: "
                "CLDCallback(num_samples=...). With names that isn't needed."
            )
        return samples

    def _check_end(self, samples: Sequence[Any], count: int) -> None:
        """Raises if the stream shows the same samples again and again."""
        if isinstance(samples[0], PackedNames):
            different = len(SampleNames(chain(*(packed.names() for packed in samples))))
        else:
            different = len(torch.unique(torch.cat(list(samples))))
        if count >= _PASSES * different:
            raise ValueError(
                f"The {CALLED[self.kind]} stream does not seem to end: a sweep has read {count:,} samples, of which "
                f"only {different:,} are different ones. Set a limit: Trainer(limit_{self.kind}_batches=...), or give "
                f"a stream that ends with {self.kind}_dataloader=... of CLDCallback."
            )


def positions_of(read: Read, names: SampleNames | None) -> Tensor:
    """The position of each sample that was read, int64, on the device; -1 for unknown names."""
    if read.samples is None:
        return torch.zeros(0, dtype=torch.int64, device=read.losses.device)
    if isinstance(read.samples, Tensor):
        return read.samples
    found = [(names or SampleNames()).find(packed.names()) for packed in read.samples]
    return torch.cat(found).to(read.losses.device)
