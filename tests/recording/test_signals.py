"""Signals that come while interruptible work goes on, in one process; `tests/processes` has those of real runs."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_cld import trajectories_from_checkpoints
from lightning_cld.guards import StoppedError
from lightning_cld.recording.signals import interruptible
from tests.toys import Blobs, fit, quiet_trainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")

TERM, USR1, USR2, HUP = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP


class Run:
    """Work of ten steps that gets signals at some of them, and what became of it.

    Args:
        signals: The signals by number of the step, counted over all attempts.
        error: What the work raises at step 5.
    """

    def __init__(self, signals=None, error=None):
        self.signals = signals or {}
        self.error = error
        self.steps = 0
        self.begun = 0
        self.finished = 0
        self.at_work = False
        self.heard = []  # which handler got which signal, and whether the work still went on
        self.trainer = SimpleNamespace(received_sigterm=False, world_size=1, strategy=SimpleNamespace(launcher=None))

    def hears(self, *signums, ends=False, raises=None):
        """Sets handlers that note what they get; `ends` makes them tell the Trainer to end, as Lightning's do."""

        def handler(signum, frame):
            self.heard.append((signum, self.at_work))
            self.trainer.received_sigterm |= ends
            assert frame is not None
            if raises is not None:
                raise raises

        for signum in signums:
            signal.signal(signum, handler)
        return handler

    def work(self, is_stopped):
        self.begun += 1
        self.at_work = True
        try:
            for step in range(10):
                if is_stopped():
                    raise StoppedError
                if self.steps in self.signals:
                    signal.raise_signal(self.signals[self.steps])
                self.steps += 1
                if step == 5 and self.error is not None:
                    raise self.error
            self.finished += 1
        finally:
            self.at_work = False

    def do(self):
        return interruptible(self.trainer, self.work)


@pytest.fixture(autouse=True)
def _own_handlers():
    """Restores all handlers after a test."""
    kinds = (TERM, USR1, USR2, HUP, signal.SIGINT, signal.SIGALRM, signal.SIGCHLD)
    before = {signum: signal.getsignal(signum) for signum in kinds}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_work_without_a_signal_is_done_once():
    run = Run()
    handlers = [run.hears(signum) for signum in (TERM, USR1, USR2)]
    assert run.do()
    assert (run.begun, run.finished, run.steps, run.heard) == (1, 1, 10, [])
    assert [signal.getsignal(signum) for signum in (TERM, USR1, USR2)] == handlers


@pytest.mark.parametrize("signum", [TERM, USR1, USR2])
def test_a_signal_ends_the_work_before_its_next_step_and_is_handled_then(signum):
    run = Run({3: signum})
    run.hears(signum, ends=True)
    assert not run.do()
    assert (run.begun, run.finished, run.steps) == (1, 0, 4)
    assert run.heard == [(signum, False)]


def test_work_begins_again_unless_the_signal_ends_the_run():
    run = Run({3: TERM})
    run.hears(TERM)
    assert run.do()
    assert (run.begun, run.finished, run.steps, run.heard) == (2, 1, 14, [(TERM, False)])


def test_at_its_last_step_the_work_is_done_before_the_signal_is_handled():
    run = Run({9: TERM})
    run.hears(TERM, ends=True)
    assert run.do()
    assert (run.finished, run.heard) == (1, [(TERM, False)])


def test_work_does_not_begin_where_the_run_is_told_to_end():
    run = Run()
    run.trainer.received_sigterm = True
    assert not run.do()
    assert run.steps == 0


@pytest.mark.parametrize(("signum", "begun"), [(USR1, 2), (TERM, 3)])
def test_work_gets_done_however_many_signals_come(signum, begun):
    run = Run(dict.fromkeys(range(0, 100, 2), signum))
    run.hears(signum)
    assert run.do()
    assert (run.begun, run.finished) == (begun, 1)
    assert len(run.heard) >= begun
    assert {at_work for _, at_work in run.heard} == {False}


def test_each_signal_of_several_is_handled():
    run = Run({3: USR1, 4: TERM})  # the second ends the work that began again
    run.hears(USR1)
    run.hears(TERM, ends=True)
    assert not run.do()
    assert run.heard == [(USR1, False), (TERM, False)]


def test_the_signal_to_save_is_handled_before_the_one_to_end():
    run = Run()

    def both(is_stopped):
        signal.raise_signal(TERM)
        signal.raise_signal(USR1)

    run.hears(USR1)
    run.hears(TERM, ends=True)
    assert interruptible(run.trainer, both)
    assert run.heard == [(USR1, False), (TERM, False)]


@pytest.mark.parametrize("second", [USR1, USR2])
def test_a_signal_that_comes_while_another_is_handled_is_handled_too(second):
    run = Run({3: USR1})
    heard = []

    def handler(signum, frame):
        heard.append(signum)
        if len(heard) == 1:
            signal.raise_signal(second)

    signal.signal(USR1, handler)
    signal.signal(USR2, handler)
    assert run.do()
    assert heard == [USR1, second]


@pytest.mark.parametrize("raised", [ValueError("bad"), KeyboardInterrupt()], ids=repr)
def test_an_error_loses_no_signal_and_leaves_the_handlers(raised):
    run = Run({5: TERM}, error=raised)
    handler = run.hears(TERM)
    with pytest.raises(type(raised)):
        run.do()
    assert run.heard == [(TERM, False)]
    assert signal.getsignal(TERM) is handler


def test_what_a_handler_raises_is_raised_and_the_other_signals_are_handled():
    run = Run()
    run.hears(USR1, raises=SystemExit(3))
    run.hears(TERM)

    def both(is_stopped):
        signal.raise_signal(TERM)
        signal.raise_signal(USR1)

    with pytest.raises(SystemExit, match="3"):
        interruptible(run.trainer, both)
    assert run.heard == [(USR1, False), (TERM, False)]


def test_a_handler_that_another_one_sets_stays():
    run = Run({9: TERM})
    signal.signal(TERM, lambda *_: signal.signal(TERM, signal.SIG_IGN))
    assert run.do()
    assert signal.getsignal(TERM) is signal.SIG_IGN


def test_handlers_that_have_another_purpose_are_not_touched():
    run = Run()
    handlers = {signum: run.hears(signum) for signum in (signal.SIGINT, signal.SIGALRM, signal.SIGCHLD, HUP)}
    signal.signal(USR1, signal.SIG_IGN)
    signal.signal(USR2, signal.SIG_DFL)

    def work(is_stopped):
        for signum, handler in handlers.items():
            assert signal.getsignal(signum) is handler
        assert signal.getsignal(USR1) is signal.SIG_IGN
        assert signal.getsignal(USR2) is signal.SIG_DFL
        signal.raise_signal(HUP)
        assert run.heard == [(HUP, False)]  # at once
        assert not is_stopped()

    assert interruptible(run.trainer, work)


def test_a_signal_that_slurm_was_told_to_send_is_held_too():
    run = Run({3: HUP})
    signal.signal(HUP, _HandlersCompose([run.hears(USR1)]))
    assert run.do()
    assert (run.begun, run.heard) == (2, [(HUP, False)])


def test_a_handler_outside_of_python_works_on(tmp_path):
    run = Run({3: USR1})
    stacks = tmp_path / "stacks.txt"
    with stacks.open("w") as file:
        faulthandler.register(USR1, file)
        try:
            assert run.do()
        finally:
            faulthandler.unregister(USR1)
    assert "in work" in stacks.read_text()
    assert run.begun == 1


def test_another_thread_changes_no_handler():
    run = Run()
    handler = run.hears(TERM)
    seen = []

    def work(is_stopped):
        seen.append(signal.getsignal(TERM))
        run.work(is_stopped)

    done = []
    other = threading.Thread(target=lambda: done.append(interruptible(run.trainer, work)))
    other.start()
    other.join()
    assert (done, seen, run.finished) == ([True], [handler], 1)


def test_sigterm_is_passed_on_at_once_to_processes_that_lightning_started():
    run = Run({3: TERM, 5: USR1})
    passed = []
    run.trainer.strategy.launcher = SimpleNamespace(kill=lambda signum: passed.append((signum, run.at_work)))
    run.hears(TERM, USR1)
    assert run.do()
    assert passed == [(TERM, True)]


def test_sigterm_ends_trajectories_from_checkpoints_within_a_batch(tmp_path):
    calls = []

    def step(module, batch):
        calls.append(len(calls))
        if len(calls) == 3:
            signal.raise_signal(TERM)
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none"), batch[1]

    trainer, module = fit(tmp_path, None, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    data = Blobs()
    loader = DataLoader(data.train_set, batch_size=16)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(SystemExit):
        trajectories_from_checkpoints(
            quiet_trainer(tmp_path),
            module,
            [tmp_path / "one.ckpt"],
            step=step,
            train_dataloader=loader,
            val_dataloader=loader,
        )
    assert len(calls) == 3
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
