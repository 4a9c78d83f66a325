"""Signals that come during a sweep: it ends at its next batch, puts everything back, and only then are they handled."""

from __future__ import annotations

import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_cld.guards import StoppedError, is_a

IsStopped = Callable[[], bool]
"""Whether the sweep that asks should end now."""


def never() -> bool:
    """Lets a sweep run to its end."""
    return False


_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2")
"""What clusters send to a job that is to save its state and end. Not every system has them all."""

_PATIENCE = 5.0
"""Seconds for which a process waits for a signal that another one got, as all processes of a job do."""


def interruptible(trainer: Trainer, work: Callable[[IsStopped], None]) -> bool:
    """Does some work that signals may interrupt, on all ranks.

    Lightning handles SIGTERM and SLURM's requeue signal at once: in the middle of a sweep it would save a module whose
    buffers are those of the sweep, or wait for ranks that are elsewhere. So while the work goes on, its handlers, and
    those of users for SIGTERM, SIGUSR1 and SIGUSR2, are replaced. If a signal comes, the work is to end at its next
    step, and the handlers get the signal. Unless they end the run, the work begins again. So that it gets done however
    many signals come, it then ends for SIGTERM alone, and at the third time for nothing.

    Args:
        trainer: The Trainer, whose processes all get here.
        work: Asks before each step whether it should end, and if so raises `StoppedError` on all ranks.

    Returns:
        Whether the work was done. If not, the run has received a SIGTERM and Lightning is about to end it.
    """
    for ends_for in (signal.valid_signals(), {signal.SIGTERM}, set[int]()):
        try:
            with _held(trainer) as came:
                work(partial(_is_stopped, trainer, came, ends_for))
                return True
        except StoppedError:
            pass
        if _on_any_rank(trainer, trainer.received_sigterm):
            break
    return False


def _is_stopped(trainer: Trainer, came: list[int], ends_for: set[Any]) -> bool:
    return trainer.received_sigterm or not ends_for.isdisjoint(came)


@contextmanager
def _held(trainer: Trainer) -> Iterator[list[int]]:
    """Holds signals back while its body runs, then calls their handlers, on all ranks together.

    Yields:
        The signals that came so far.
    """
    came: list[int] = []
    launcher = trainer.strategy.launcher

    def note(signum: int, _: FrameType | None) -> None:
        first = signum not in came
        came.append(signum)
        if first and signum == signal.SIGTERM and launcher is not None:
            launcher.kill(signum)  # to the processes it started, as Lightning's handler does

    handlers = _handlers()
    try:
        for signum in handlers:
            signal.signal(signum, note)
        try:
            yield came
        except Exception:
            _handle(trainer, handlers, came)
            raise
        _handle(trainer, handlers, came)
    finally:
        for signum, handler in handlers.items():
            if signal.getsignal(signum) is note:  # else a handler has put another one in its place
                signal.signal(signum, handler)
        for signum in sorted(set(came)):  # where a handler raised, or that came later
            signal.raise_signal(signum)


def _handlers() -> dict[int, Callable[[int, FrameType | None], Any]]:
    """The functions to replace, by signal: none outside of the main thread, where Python allows no change."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    asking = {getattr(signal, name, None) for name in _NAMES}
    found = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
    return {
        signum: handler
        for signum, handler in found.items()
        # By name, since the class is private: it tells which signal SLURM was told to send.
        if callable(handler) and (signum in asking or is_a(handler, "_HandlersCompose"))
    }


def _handle(trainer: Trainer, handlers: dict[int, Callable[[int, FrameType | None], Any]], came: list[int]) -> None:
    """Calls the handlers of the signals that came to any rank, on every rank, and takes these signals out of `came`.

    Lightning's handlers wait for those of the other ranks, but a signal reaches the ranks at different times, or only
    rank 0, which passes it on. So each rank waits for its own, and what it gets twice is dropped.
    """
    asked = set(came)
    if trainer.world_size > 1:
        if not _on_any_rank(trainer, bool(came)):
            return
        everywhere: list[list[int]] = [[]] * trainer.world_size
        torch.distributed.all_gather_object(everywhere, came)
        asked.update(*everywhere)
        latest = time.monotonic() + _PATIENCE
        while not asked & handlers.keys() <= set(came) and time.monotonic() < latest:
            time.sleep(0.01)
    for signum in sorted(asked & handlers.keys()):
        _drop(came, signum)
        handlers[signum](signum, inspect.currentframe())
    if trainer.world_size > 1:
        trainer.strategy.barrier("CLD signals are handled")
        for signum in asked:
            _drop(came, signum)


def _drop(came: list[int], signum: int) -> None:
    while signum in came:  # not a new list, since another signal may come meanwhile
        came.remove(signum)


def _on_any_rank(trainer: Trainer, decision: bool) -> bool:
    return trainer.strategy.reduce_boolean_decision(decision, all=False) if trainer.world_size > 1 else decision
