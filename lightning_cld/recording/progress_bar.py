"""`progress`: a line in the Trainer's own progress bar, for work of ours that takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_cld.guards import is_a

_INTERVAL = 0.5
"""Seconds between two refreshes, at the least: rich takes two milliseconds to draw."""


@contextmanager
def progress(trainer: Trainer, what: str, *, nested: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (done, total) that shows how far the work in the body has come, on rank 0.

    It shows it in the `TQDMProgressBar` or `RichProgressBar` of the Trainer, and not at all where that is disabled,
    absent or of another kind. What was shown is gone afterwards.

    Args:
        trainer: The Trainer.
        what: What to call the work.
        nested: Whether it is part of other work, be it the training, whose line is above; False for work that takes the
            training's place.
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
    """The Trainer's progress bar, if `progress` can show something in it."""
    bar: Any = trainer.progress_bar_callback
    known = is_a(bar, "TQDMProgressBar", "RichProgressBar")
    # The bars of Lightning disable themselves on all ranks but 0; one is not set up yet when this is asked early.
    return bar if known and bar.is_enabled and trainer.is_global_zero else None


def _show_nothing(done: int, total: int) -> None:
    """Stands in where there is no bar."""


class _TqdmLine:
    """A tqdm bar where Lightning has those of training and validation."""

    def __init__(self, bar: Any, what: str, nested: bool) -> None:
        self.bar, self.what, self.nested = bar, what, nested
        self.tqdm: Tqdm | None = None

    def show(self, done: int, total: int) -> None:
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
    """Whether the line of the training is on the screen; before the first step it may not be yet."""
    try:
        return not bar.train_progress_bar.disable
    except TypeError:  # there has been none
        return False


class _RichLine:
    """A task in the display of Lightning's own tasks."""

    def __init__(self, bar: Any, what: str, trainer: Trainer) -> None:
        self.bar, self.what, self.trainer = bar, what, trainer
        self.progress: Any = None
        self.drawn = 0.0

    def show(self, done: int, total: int) -> None:
        if self.progress is None:
            self.progress = _started(self.bar, self.trainer)
            self.task = self.progress.add_task(self.what, total=total)
        if time.monotonic() - self.drawn > _INTERVAL:
            self.drawn = time.monotonic()
            self.progress.update(self.task, completed=done, refresh=True)

    def close(self) -> None:
        if self.progress is not None:
            # Hidden, not removed: Lightning finds its own tasks by their place among all that there were.
            self.progress.reset(self.task, start=False, visible=False)


def _started(bar: Any, trainer: Trainer) -> Any:
    """The `rich.progress.Progress` of a `RichProgressBar`, which shows something only once it is started."""
    # Private, but what each of the bar's own hooks calls first, and it does nothing where the display has been
    # started: before the first step that depends on whether there was a sanity check and on the callbacks' order. A
    # display of our own would be another look, and rich allows only one at a time.
    bar._init_progress(trainer)
    return bar.progress
