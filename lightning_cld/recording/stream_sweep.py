"""The sweep over a stream: its samples say which they are, by a position or a name."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_cld.guards import agreed, evaluation, preserved_rng
from lightning_cld.names import SampleNames
from lightning_cld.recording.batch_hooks import BatchHooks
from lightning_cld.recording.batch_losses import Step
from lightning_cld.recording.progress_bar import progress
from lightning_cld.recording.signals import IsStopped, never
from lightning_cld.recording.stream_reading import CALLED, READ, Read, Seen, StreamReader, positions_of
from lightning_cld.recording.streams import Readings, reseeded

_AGAIN = 4
"""So many batches are evaluated twice in the first sweep, to see whether samples change."""

_OTHER_SEED = 1
"""Of the random states from which they are read the second time."""

_SPARSE = 100
"""A row has a place for every position up to the highest. So many times as many places as samples are too many."""

_REPEATS = 1.5
"""A stream that shows its samples so many times in one sweep may be read in full by several workers or ranks."""


class StreamSweep:
    """Evaluates a stream as it is, again and again, each time under the weights of the moment.

    A sample that one sweep shows several times gets the mean of its losses. In a distributed run each rank evaluates
    what its own stream shows, and every rank gets the whole row.

    Args:
        readings: Gives the stream for each sweep.
        kind: "train" or "val", for errors.
        num_samples: As in `CLDCallback`, for a train stream.
        limit: The number of batches of a sweep; None reads to the end.
        seen: What an earlier sweep over the same samples saw.

    Attributes:
        augmented: Whether samples looked different when a few were read again in the first sweep.
    """

    def __init__(
        self,
        readings: Readings,
        *,
        kind: str,
        num_samples: int | None = None,
        limit: int | None = None,
        seen: Seen | None = None,
    ) -> None:
        self.readings = readings
        self.kind = kind
        self.num_samples = num_samples
        self.limit = limit
        self.seen = seen
        self.augmented = False
        self._reader = StreamReader(kind, num_samples)
        self._warned: set[str] = set()

    @property
    def length(self) -> int | None:
        """The number of positions; None if that is not known before the first sweep."""
        return self.num_samples if self.seen is None else self.seen.length

    @property
    def positions(self) -> Tensor:
        """The positions that the first sweep saw, sorted, int64."""
        return torch.zeros(0, dtype=torch.int64) if self.seen is None else self.seen.positions

    def run(
        self, trainer: Trainer, module: LightningModule, step: Step, hooks: BatchHooks, is_stopped: IsStopped = never
    ) -> tuple[Tensor, Tensor | None]:
        """One pass. The host waits for the device a few times, however many batches and samples there are.

        Args:
            trainer: The Trainer of the fit.
            module: Its module.
            step: From a batch on the device to losses, classes, and positions or names.
            hooks: What other callbacks and the module do to a batch before that.
            is_stopped: Says before each batch whether to end early.

        Returns:
            The losses, float32 `[N]` on the module's device: NaN where a sample was not seen, infinity where a loss was
            not finite; and the classes, int64 `[N]` on the CPU, -1 at positions that the first sweep did not see (None
            for one class).

        Raises:
            StoppedError: If it is to end early, on all ranks.
            Exception: What the stream, the model or `step` raise; on the other ranks, that one rank failed.
        """
        showing = progress(trainer, f"CLD {self.kind}")
        again: Read | None = None
        with agreed(trainer, f"The {self.kind} sweep"), evaluation(trainer, module), showing as show:
            prepare = hooks.of_sweep(trainer, module)
            with preserved_rng(), self.readings.begin() as stream:
                reads = partial(self._reader.read, stream, trainer, module, step, prepare, is_stopped=is_stopped)
                read = reads(show=show, limit=self.limit, seen=self.seen)
                if self.seen is None:
                    with preserved_rng(_OTHER_SEED), reseeded(stream, _OTHER_SEED):
                        again = reads(show=_show_nothing, limit=_AGAIN, seen=None)
                if again is not None and again.samples is None and read.samples is not None:
                    raise ValueError(
                        f"The {CALLED[self.kind]} stream can be read only once: it gave no batch when it was read "
                        "again. Give a loader that begins anew each time it is iterated."
                    )
        if self.seen is None:
            row = self._first_row(trainer, read)
            self.augmented = again is not None and self._changes(trainer, again, row)
        else:
            row = self._later_row(trainer, read, self.seen)
        return row, None if self.seen is None else self.seen.classes

    # From what was read to a row

    def _first_row(self, trainer: Trainer, read: Read) -> Tensor:
        """The row of the first sweep, which also settles what the samples are. The checks are the same on all ranks."""
        parts = _gathered(trainer, _about(read))
        kinds = {part["named"] for part in parts} - {None}
        if not kinds:
            raise ValueError(f"The {CALLED[self.kind]} stream is empty.")
        if len(kinds) > 1 or len({part["classes"] for part in parts} - {None}) > 1:
            raise ValueError("The ranks differ in whether the step returns names or positions, or classes or None.")
        names = SampleNames(chain(*(part["names"] for part in parts))) if kinds == {True} else None
        lowest, highest = min(part["lowest"] for part in parts), max(part["highest"] for part in parts)
        length = len(names) if names is not None else highest + 1
        if self.num_samples is not None and (length > self.num_samples or lowest < 0):
            raise ValueError(
                f"The train stream has {length:,} different names, more than num_samples={self.num_samples:,}."
                if names is not None
                else f"With num_samples={self.num_samples:,} positions must be from 0 to {self.num_samples - 1:,}, but "
                f"the train stream has positions from {lowest:,} to {highest:,}."
            )
        if lowest < 0:
            raise ValueError(f"Positions must not be negative, but the {CALLED[self.kind]} stream has {lowest}.")
        count = sum(part["count"] for part in parts)
        if names is None and self.num_samples is None and length > _SPARSE * max(count, READ):
            raise ValueError(
                f"The {CALLED[self.kind]} stream has positions up to {highest:,}, but only {count:,} samples. Count "
                "positions from 0, or return names: str(position) for each."
            )
        if self.num_samples is not None and names is None:
            length = self.num_samples
        where = positions_of(read, names)
        row, counts, ranks = _row_of_all(trainer, where, read.losses, length)
        seen = counts > 0
        positions = torch.nonzero(seen).flatten().cpu()
        self._warn_of_coverage(trainer, positions, counts, ranks)
        has_classes = {part["classes"] for part in parts} - {None} == {True}
        classes = self._classes_of_all(trainer, where, read.classes, length, seen, names) if has_classes else None
        self._check_spread(trainer, where, read.losses, row, seen)
        self.seen = Seen(length, positions, names, classes)
        return row

    def _later_row(self, trainer: Trainer, read: Read, seen: Seen) -> Tensor:
        """The row of another sweep, of the samples that the first one saw."""
        device = read.losses.device
        with agreed(trainer, f"The {self.kind} sweep"):
            where = positions_of(read, seen.names)
            known = torch.zeros(seen.length + 1, dtype=torch.bool, device=device)  # the last place is for other samples
            known[seen.positions.to(device)] = True
            is_known = known[where.where((where >= 0) & (where < seen.length), seen.length)]
            where, losses = where[is_known], read.losses[is_known]
            if read.samples is not None and (read.classes is None) != (seen.classes is None):
                raise ValueError(
                    f"The {CALLED[self.kind]} stream gave classes in the first sweep and None in a later one, or the "
                    "other way round. Return one or the other."
                )
            if read.classes is not None and seen.classes is not None:
                others = read.classes[is_known] != seen.classes.to(device)[where]
                if others.any():
                    first = int(where[others.int().argmax()])
                    raise ValueError(
                        f"{int(others.sum()):,} samples of the {CALLED[self.kind]} stream have other classes than in "
                        f"the first sweep, such as {_called(first, seen.names)}. Positions and names must mean the "
                        "same samples in every sweep."
                    )
        row, counts, _ = _row_of_all(trainer, where, losses, seen.length)
        self._check_spread(trainer, where, losses, row, counts > 0)  # the first losses may all be equal
        missing = len(seen.positions) - int((counts > 0).sum())
        if missing == len(seen.positions):
            raise ValueError(
                f"no sample of the {CALLED[self.kind]} stream was in the first sweep: this is another stream, or its "
                "positions or names are other ones"
            )
        if missing and self.kind == "val":
            raise ValueError(
                f"the validation stream showed only {len(seen.positions) - missing:,} of the {len(seen.positions):,} "
                "samples of the first sweep, so their means can't be compared"
            )
        if missing:
            self._warn(
                "missing",
                f"{missing:,} of the {len(seen.positions):,} samples of the first sweep did not come in a later one. "
                "They have no loss there. If the stream goes on where it was left, give the sweeps one of their own: "
                "train_dataloader=... of CLDCallback.",
            )
        others_read = _sum(trainer, (~is_known).sum())
        if others_read:
            self._warn(
                "others", f"{others_read:,} samples in a later sweep were not in the first one. They get no scores."
            )
        return row

    def _classes_of_all(
        self,
        trainer: Trainer,
        where: Tensor,
        classes: Tensor | None,
        length: int,
        seen: Tensor,
        names: SampleNames | None,
    ) -> Tensor:
        """The class of every position; raises if one position has several."""
        classes = torch.zeros_like(where) if classes is None else classes  # this rank read nothing
        limits = torch.iinfo(torch.int64)
        highest = torch.full((length,), limits.min, device=where.device).scatter_reduce(0, where, classes, "amax")
        lowest = torch.full((length,), limits.max, device=where.device).scatter_reduce(0, where, classes, "amin")
        if trainer.world_size > 1:
            highest = trainer.strategy.reduce(highest, reduce_op="max")
            lowest = trainer.strategy.reduce(lowest, reduce_op="min")
        several = seen & (highest != lowest)
        if several.any():
            first = int(several.int().argmax())
            raise ValueError(
                f"{int(several.sum()):,} positions or names of the {CALLED[self.kind]} stream belong to several "
                f"samples: {_called(first, names)} has the classes {int(lowest[first])} and {int(highest[first])}. "
                "Each sample needs a position or name of its own."
            )
        return highest.where(seen, -1).cpu()

    def _warn_of_coverage(self, trainer: Trainer, positions: Tensor, counts: Tensor, ranks: Tensor) -> None:
        """Says which samples did not come, or came several times."""
        unseen = (self.num_samples or 0) - len(positions)
        if unseen > 0:
            self._warn(
                "unseen",
                f"{unseen:,} of num_samples={self.num_samples:,} train samples did not come in the first sweep, "
                f"{unseen / (self.num_samples or 1):.0%} of them. They get no scores.",
            )
        shared = int((ranks > 1).sum())
        if shared > trainer.world_size:  # a few may pad the ranks to one length
            self._warn(
                "shared",
                f"{shared:,} of the {len(positions):,} samples of the {CALLED[self.kind]} stream came on several "
                "ranks. Their losses are averaged, but sweeps and epochs take longer than they need to. Split the "
                "stream by rank.",
            )
        elif (read := int(counts.sum())) > _REPEATS * len(positions):
            self._warn(
                "repeated",
                f"a sweep over the {CALLED[self.kind]} stream showed {len(positions):,} different samples, but read "
                f"{read:,}. Do several workers read the same ones? Split the stream by worker.",
            )

    def _check_spread(self, trainer: Trainer, where: Tensor, losses: Tensor, row: Tensor, seen: Tensor) -> None:
        """Warns if one position has losses in one sweep that can't be those of one sample."""
        far = torch.zeros_like(row).index_put((where,), _differ(losses, row[where], trainer).float(), accumulate=True)
        if trainer.world_size > 1:
            far = trainer.strategy.reduce(far, reduce_op="sum")
        several = int((far > 0).sum())
        if several:
            self._warn(
                "spread",
                f"{several:,} of the {int(seen.sum()):,} samples of the {CALLED[self.kind]} stream came several times "
                "in one sweep, with losses that differ. They are averaged. Each sample needs a position or name of its "
                "own.",
            )

    def _changes(self, trainer: Trainer, again: Read, row: Tensor) -> bool:
        """Whether samples that are read from other random states have other losses."""
        where = positions_of(again, None if self.seen is None else self.seen.names)
        inside = (where >= 0) & (where < len(row))
        losses, before = again.losses[inside], row[where[inside]]
        others = _sum(trainer, (~inside).sum() + before.isnan().sum())
        if others and self.limit is None:
            self._warn(
                "again",
                f"when the {CALLED[self.kind]} stream was read once more, the first {_AGAIN} batches held {others:,} "
                "samples that had not come before. It goes on where it was left, or draws at random. Samples that the "
                "first sweep did not show get no scores. If it goes on where it was left, give the sweeps one of their "
                f"own: {self.kind}_dataloader=... of CLDCallback.",
            )
        differ = _differ(losses, before, trainer) & before.isfinite()
        return 2 * _sum(trainer, differ.sum()) > _sum(trainer, before.isfinite().sum())

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(f"CLD: {message}")


def _show_nothing(done: int, total: int | None) -> None:
    """Ignores the progress."""


def _about(read: Read) -> dict[str, Any]:
    """What the ranks tell each other of what they read."""
    named = isinstance(read.samples, list)
    positions = read.samples if isinstance(read.samples, Tensor) and len(read.samples) else None
    return {
        "named": None if read.samples is None else named,
        "classes": None if read.samples is None else read.classes is not None,
        "names": SampleNames(chain(*(packed.names() for packed in read.samples)))
        if isinstance(read.samples, list)
        else (),
        "count": len(read.losses),
        "lowest": 0 if positions is None else int(positions.min()),
        "highest": -1 if positions is None else int(positions.max()),
    }


def _gathered(trainer: Trainer, value: Any) -> list[Any]:
    if trainer.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def _sum(trainer: Trainer, value: Tensor) -> int:
    return int(trainer.strategy.reduce(value, reduce_op="sum") if trainer.world_size > 1 else value)


def _row_of_all(trainer: Trainer, where: Tensor, losses: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss at each position, how many losses it is the mean of, and how many ranks had them."""
    totals = torch.zeros(3, length, device=losses.device)
    totals[:2].index_add_(1, where, torch.stack([losses, torch.ones_like(losses)]))
    totals[2] = totals[1] > 0
    if trainer.world_size > 1:
        totals = trainer.strategy.reduce(totals, reduce_op="sum")
    sums, counts, ranks = totals
    return sums / counts, counts, ranks  # 0 / 0 is NaN, not logged


def _differ(losses: Tensor, others: Tensor, trainer: Trainer) -> Tensor:
    """Whether losses are of other inputs. Batches of other sizes may round differently."""
    tolerance = 1e-3 if str(trainer.precision).startswith(("32", "64")) else 2e-2
    return (losses - others).abs() > tolerance * torch.maximum(losses.abs(), others.abs())


def _called(position: int, names: SampleNames | None) -> str:
    return f"position {position}" if names is None else repr(names[position])
