"""The loader of a coreset of a stream: epochs of known length over passes of unknown length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_cld.data.gate import ANOTHER, REPEATED, Gate
from lightning_cld.data.gated_batches import rewind
from lightning_cld.data.random_access import library_of
from lightning_cld.data.samplers import processes
from lightning_cld.guards import agreed

_END = object()


class Batching(NamedTuple):
    """How batches are made of the samples that workers had too few of."""

    size: int
    collate_fn: Callable[[list[Any]], Any]
    drop_last: bool


class StreamLoader:
    """Serves the samples of a stream that pass a gate.

    A *pass* reads the stream once, from its beginning to its end. Where an epoch is one pass, each iterator reads one.
    Otherwise an epoch is a number of batches, the same on all processes, and the next epoch goes on where it stopped.

    There is one pass at a time. An iterator that is used after a newer one has begun raises, since the newer one has
    taken its samples.

    Args:
        make: Makes a gate and a loader that asks it, whose items are those of `GatedBatches`; or, without `batching`,
            the stream's own batches.
        stream: The user's dataset.
        batching: How batches are made; None for a stream that makes its own.
        length: Batches an epoch; None if that is unknown.
        is_pass: Whether an epoch is one pass. Only one process can have that.
        trainer: The Trainer to serve; None for one process.
    """

    def __init__(
        self,
        make: Callable[[], tuple[Gate, Any]],
        stream: Any,
        *,
        batching: Batching | None,
        length: int | None,
        is_pass: bool,
        trainer: Trainer | None,
    ) -> None:
        self.stream = stream
        self._make = make
        self._batching = batching
        self._length = length
        self._is_pass = is_pass
        self._trainer = trainer
        self._world = processes(trainer)["num_replicas"]
        self._gate, self._reader = self._made()
        # Lightning sets the attribute of this name to None to end a loader's workers.
        self._iterator: Iterator[Any] | None = None
        self._resumed: dict[str, Any] | None = None
        self._is_new = True
        self._turn = 0
        self._is_partial = False
        self._held: list[Any] = []
        self._came = 0  # samples to the batches of this pass
        self._passes = self._batches = self._served = self._total = 0
        self._ahead: list[Any] = []
        self._problem: ValueError | None = None
        self._first: Tensor | None = None
        self._is_compared = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_iterator": None, "_ahead": []}  # a pass that is going on can't be pickled

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("The stream makes its own batches, so their number is unknown.")
        return self._length

    def __iter__(self) -> Iterator[Any]:
        # Nothing is read before the first batch is asked for: until then Lightning may still restore its progress.
        if self._world > 1:
            self._meet()
        else:
            self._find_place()
        self._turn += 1
        yield from self._pass_epoch(self._turn) if self._is_pass else self._counted_epoch(self._turn)

    def _find_place(self) -> None:
        """Goes to where the epoch begins."""
        is_new, self._is_new = self._is_new, False
        if self._resumed is not None:
            state, self._resumed = self._resumed, None
            self._go_to(state)
            return
        self._served = 0
        if self._batches and (self._is_pass or self._iterator is None):  # it was left in the middle of a pass
            self._begin_anew()
            self._passes += 1
        if is_new and self._trainer is not None and self._trainer.training:  # else somebody reads it by hand
            # Lightning restores no loader's state from the end of an epoch, nor where `configure_optimizers` asks for
            # the number of steps, and reloads loaders. Its own progress tells what was served before.
            progress = _progress_of(self._trainer)
            self._served, self._total = progress.current.ready, progress.total.ready
            self._skip(self._served if self._is_pass else self._total)

    # An epoch

    def _pass_epoch(self, turn: int) -> Iterator[Any]:
        while True:
            self._check_turn(turn)
            batch = self._next_of_pass()
            if batch is _END and self._length is None:
                self._end_pass()
                return
            if batch is _END:
                raise ValueError(
                    f"All samples of the coreset were read, but only {self._served} of {self._length} batches came of "
                    "them. What lies between reading and batches must not drop samples, for instance broken ones."
                )
            is_last = self._served + 1 == self._length
            if is_last and self._next_of_pass() is not _END:
                raise ValueError(f"The stream gave more batches than the coreset has, {self._length}. {REPEATED}")
            self._count()
            if is_last:
                self._end_pass()
                self._served = 0
            yield batch
            if is_last:
                return

    def _counted_epoch(self, turn: int) -> Iterator[Any]:
        while self._length is not None:
            self._check_turn(turn)
            batch = self._ahead.pop() if self._ahead else self._next()
            self._count()
            is_last = self._served == self._length
            if is_last:
                self._served = 0
            yield batch
            if is_last:
                return

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise RuntimeError(
                "The loader of the coreset was iterated anew in the middle of an epoch, which begins another pass over "
                "the stream. To look at a batch, iterate a loader of its own: datamodule.train_dataloader()."
            )

    def _count(self) -> None:
        self._batches += 1
        self._served += 1
        self._total += 1

    # A pass

    def _next(self) -> Any:
        """The next batch, of the next pass if this one is over."""
        batch = self._next_of_pass()
        if batch is _END:
            self._end_pass()
            batch = self._next_of_pass()
        if batch is _END:
            passed = int(self._gate.passed().sum())
            dropped = self._batching is not None and self._batching.drop_last
            raise ValueError(
                f"A pass over the stream{self._on_rank()} gives no batch: {passed} of the coreset's "
                f"{len(self._gate.positions):,} samples are in it. "
                + (
                    "With drop_last=True that is too few. Keep more samples or lower the batch size."
                    if passed and dropped
                    else "Every process needs some: give each a part of every shard, or use fewer processes."
                    if self._world > 1
                    else ANOTHER
                )
            )
        return batch

    def _next_of_pass(self) -> Any:
        if self._iterator is None:
            self._iterator = self._read()
        return next(self._iterator, _END)

    def _read(self) -> Iterator[Any]:
        """The batches of one pass."""
        self._gate.reset()
        _tell_epoch(self.stream, self._passes)
        if self._batching is None:
            yield from self._reader
        else:
            size, collate_fn, drop_last = self._batching
            self._held, self._came = [], 0
            for count, is_batch, content in self._reader:
                self._came += count
                if is_batch:
                    yield content
                    continue
                self._held += content
                while len(self._held) >= size:
                    batch, self._held = self._held[:size], self._held[size:]
                    yield collate_fn(batch)
            if self._held and not drop_last:
                yield collate_fn(self._held)
            self._held = []
        if not self._is_partial:
            self._check_pass()
        self._is_partial = False

    def _check_pass(self) -> None:
        """Looks at what passed in a whole pass, and raises if it is wrong.

        One of several processes only notes it: the others would wait for it.
        """
        passed = self._gate.passed()
        if self._first is None:
            self._first = passed
        lost = int(passed.sum()) - self._came if self._batching is not None else 0
        if lost > 0:
            self._problem = ValueError(
                f"{lost:,} of the coreset's {len(passed):,} samples were read{self._on_rank()}, but did not come to "
                "the batches. What lies between reading and batches must not drop samples: a filter, or a decoder that "
                "passes over broken ones. Score the stream as it is trained on."
            )
            if self._world == 1:
                raise self._problem
        repeated = int((passed > 1).sum())
        missing = int((passed == 0).sum()) if self._world == 1 else 0
        if not repeated and not missing:
            return
        said = f"A pass over the stream{self._on_rank()} served not every sample of the coreset once: " + _numbers(
            missing, repeated, len(passed)
        )
        self._problem = ValueError(said)
        if self._world == 1:
            raise self._problem

    def _end_pass(self) -> None:
        self._passes += 1
        self._batches = 0
        self._iterator = None

    def _begin_anew(self) -> None:
        self._iterator = None
        self._batches = self._served = 0
        self._is_partial = False
        rewind(self._reader)
        # Workers that are kept may still read for the pass that was left, and would count it to the next.
        self._gate, self._reader = self._made()

    def _made(self) -> tuple[Gate, Any]:
        gate, reader = self._make()
        gate.once = self._is_pass
        gate.needed = len(gate.positions) if self._world == 1 else 1
        return gate, reader

    # Several processes

    def _meet(self) -> None:
        """What all processes agree on before an epoch: an error of one, and whether together they have all samples."""
        trainer = self._trainer
        if trainer is None or trainer.world_size != self._world:
            # Processes that share a part of the stream would count it twice.
            if self._problem is not None:
                raise self._problem
            self._find_place()
            return
        with agreed(trainer, "Serving the coreset of a stream"):
            if self._problem is not None:
                raise self._problem
            self._find_place()
            if not self._ahead:  # here it shows whether each process has samples, and the right ones
                self._ahead = [self._next()]
        if self._is_compared:
            return
        # Two processes that have the same sample show early. What none of them has shows after a pass.
        mine = self._gate.passed() if self._first is None else self._first
        had = trainer.strategy.reduce((mine > 0).int().to(trainer.strategy.root_device), reduce_op="sum")
        self._is_compared = trainer.strategy.reduce_boolean_decision(self._first is not None, all=True)
        missing, repeated = int((had == 0).sum()) if self._is_compared else 0, int((had > 1).sum())
        if missing or repeated:
            raise ValueError(
                f"The {self._world} processes together served not every sample of the coreset once in a pass over the "
                f"stream: {_numbers(missing, repeated, len(mine))}"
            )

    def _on_rank(self) -> str:
        return f" on rank {processes(self._trainer)['rank']}" if self._world > 1 else ""

    # State

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: passes and batches, and the state of the user's loader if that has one.

        Lightning saves the state of one process. What is the same on all is the number of batches that were served.
        """
        state: dict[str, Any] = {**self._identity(), "total": self._total}
        passes, batches, served = self._passes, self._batches, self._served
        progress = None if self._trainer is None else _progress_of(self._trainer)
        if progress is not None and progress.is_last_batch:  # of fewer than planned, with limit_train_batches
            served = 0
            if self._is_pass and batches:
                passes, batches = passes + 1, 0
        elif progress is not None and self._length is None:  # Lightning asks for one batch more than it trains on
            batches = served = min(batches, progress.current.ready)
        state |= {"passes": passes, "batches": batches, "served": served}
        is_exact = batches == self._batches > 0 and self._batching is not None and not self._held
        if self._world == 1 and is_exact and callable(getattr(self._reader, "state_dict", None)):
            state["loader"] = self._reader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where another loader of the same coreset stood."""
        if any(state.get(name) != value for name, value in self._identity().items()):
            rank_zero_warn(
                "The checkpoint was saved with another coreset, batch size, epoch length or number of processes, so "
                "its place in the stream means nothing here. As many batches are skipped as were trained on: in this "
                "epoch samples may be left out or repeated."
            )
            return
        self._resumed = state

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a place to be the same."""
        return {
            "coreset": len(self._gate.positions),
            "batch_size": None if self._batching is None else self._batching.size,
            "length": self._length,
            "world": self._world,
        }

    def _go_to(self, state: dict[str, Any]) -> None:
        self._begin_anew()
        self._ahead = []
        if self._world > 1:
            self._passes = 0
            self._skip(state["total"])
        else:
            self._passes = state["passes"]
            if "loader" in state and callable(getattr(self._reader, "load_state_dict", None)):
                self._reader.load_state_dict(state["loader"])
                self._is_partial = True
                self._batches = state["batches"]
            else:
                self._skip(state["batches"])
        self._served, self._total = state["served"], state["total"]

    def _skip(self, batches: int) -> None:
        """Reads so many batches and drops them. Of whole passes one is read."""
        while self._batches < batches:
            if self._next_of_pass() is _END:
                if self._batches == 0:
                    return  # `_next` says what is wrong
                passes, batches = divmod(batches, self._batches)
                self._end_pass()
                self._passes += passes - 1
            else:
                self._batches += 1


def _progress_of(trainer: Trainer) -> Any:
    """The batches of the epoch and of all epochs so far. Lightning offers no public count of batches."""
    return trainer.fit_loop.epoch_loop.batch_progress


def _numbers(missing: int, repeated: int, size: int) -> str:
    said = []
    if missing:
        said.append(f"{missing:,} of {size:,} were not in it. It is another or a shorter stream, or drops samples.")
    if repeated:
        said.append(f"{repeated:,} of {size:,} came several times. {REPEATED}")
    return " ".join(said)


def _tell_epoch(stream: Any, number: int) -> None:
    """Tells litdata's datasets the epoch, by which they shuffle: their own loader does, which is not used here."""
    if library_of(stream) == "litdata":
        stream.set_epoch(number + 1)
