"""`progress`: a line in the Trainer's progress bar for long work such as a sweep."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_cld.guards import is_a

_INTERVAL = 0.5
"""Minimum seconds between two refreshes. One refresh takes rich two milliseconds."""


@contextmanager
def progress(trainer: Trainer, what: str, *, nested: bool = True) -> Iterator[Callable[[int, int | None], None]]:
    """Yields a function `(done, total)` that shows the progress of the work in the body, on rank 0.

    The line appears in the Trainer's `TQDMProgressBar` or `RichProgressBar` and disappears afterwards. Nothing is shown
    if the Trainer has neither, or if its bar is disabled.

    A total of None stands for work whose length is not known.

    Args:
        trainer: The Trainer.
        what: The label of the line.
        nested: True puts the line below the training's. False puts it in the training's place.
    """
    bar = find_bar(trainer)
    if bar is None:
        yield _show_nothing
        return
    line = _RichLine(bar, what, trainer) if is_a(bar, "RichProgressBar") else _TqdmLine(bar, what, nested)
    try:
        yield line.show
    finally:
        line.close()


def find_bar(trainer: Trainer) -> Callback | None:
    """The Trainer's progress bar; None if `progress` can't use it."""
    bar: Any = trainer.progress_bar_callback
    known = is_a(bar, "TQDMProgressBar", "RichProgressBar")
    # Lightning's bars disable themselves on all ranks but 0, but a bar that is not set up yet has not done so.
    return bar if known and bar.is_enabled and trainer.is_global_zero else None


def _show_nothing(done: int, total: int | None) -> None:
    """Ignores the progress: there is no bar."""


class _TqdmLine:
    """A tqdm bar on the lines of Lightning's training and validation bars."""

    def __init__(self, bar: Any, what: str, nested: bool) -> None:
        self.bar, self.what, self.nested = bar, what, nested
        self.tqdm: Tqdm | None = None

    def show(self, done: int, total: int | None) -> None:
        if self.tqdm is None:
            self.tqdm = Tqdm(
                desc=self.what,
                total=total,
                position=2 * self.bar.process_position + (self.nested and _is_training_shown(self.bar)),
                leave=False,
                dynamic_ncols=True,
                file=sys.stdout,
                bar_format=self.bar.BAR_FORMAT,
                mininterval=_INTERVAL,
                miniters=self.bar.refresh_rate,
            )
            if not self.nested:
                self.bar.train_progress_bar = self.tqdm
        self.tqdm.update(done - self.tqdm.n)

    def close(self) -> None:
        if self.tqdm is not None:
            self.tqdm.close()


def _is_training_shown(bar: Any) -> bool:
    """Whether the training's line is on the screen. Before the first step it may not be."""
    try:
        return not bar.train_progress_bar.disable
    except TypeError:  # the bar has not been created yet
        return False


class _RichLine:
    """A task in Lightning's own rich display."""

    def __init__(self, bar: Any, what: str, trainer: Trainer) -> None:
        self.bar, self.what, self.trainer = bar, what, trainer
        self.progress: Any = None
        self.drawn = 0.0

    def show(self, done: int, total: int | None) -> None:
        if self.progress is None:
            self.progress = _started(self.bar, self.trainer)
            self.task = self.progress.add_task(self.what, total=math.inf if total is None else total)
        if time.monotonic() - self.drawn > _INTERVAL:
            self.drawn = time.monotonic()
            self.progress.update(self.task, completed=done, refresh=True)

    def close(self) -> None:
        if self.progress is not None:
            # Hidden, not removed: Lightning finds its own tasks by their position in the list of all tasks.
            self.progress.reset(self.task, start=False, visible=False)


def _started(bar: Any, trainer: Trainer) -> Any:
    """The `rich.progress.Progress` of a `RichProgressBar`, started if it was not."""
    # Private, but each of the bar's own hooks calls it first, and it does nothing if the display has been started.
    # Before the first step that depends on the sanity check and on the order of the callbacks. A display of our own is
    # no way out: it would look different, and rich allows only one at a time.
    bar._init_progress(trainer)
    return bar.progress
