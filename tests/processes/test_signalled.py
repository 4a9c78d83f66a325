"""Signals reach real processes in the middle of a sweep: `signalled_runs.py` makes the runs."""

from __future__ import annotations

import json
import multiprocessing
import signal
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_script
from signalled_runs import EPOCHS, batches, one_life

from lightning_cld import CLDScores, LossTrajectories

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, which is safe with torch there")

TERM, USR1 = int(signal.SIGTERM), int(signal.SIGUSR1)
EPOCH_END = {"save_on_train_epoch_end": True}
VALIDATION_END = {"save_on_train_epoch_end": False}
LAST_BATCH = {"every_n_train_steps": 6}
MID_EPOCH = {"every_n_train_steps": 4}
TRAIN, VAL = batches()
SWEEP = TRAIN + VAL
STEP = {"record": "step"}
RUNNING = {"history": "running"}


class Life:
    """What became of the processes of one life of a run."""

    def __init__(self, root: Path, name: str, world: int, log: str = "") -> None:
        files = [root / f"{name}-{rank}.json" for rank in range(world)]
        missing = [file.name for file in files if not file.exists()]
        assert not missing, f"the processes did not get to {missing}.\n{log[-6000:]}"
        self.ranks: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
        self.root = root
        self.name = name

    def each(self, key: str) -> list[Any]:
        return [rank[key] for rank in self.ranks]

    @property
    def scores(self) -> CLDScores:
        return CLDScores.load(self.root / f"{self.name}-scores.npz")

    @property
    def logged(self) -> LossTrajectories:
        return LossTrajectories.load(self.root / "results" / "cld-trajectories.npz")


@pytest.fixture(scope="module")
def live():
    """A function that lets the processes of a run live and waits for their ends."""
    # From a process that has imported Lightning, because each import takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "lightning_cld", "torch.distributed.fsdp", "pytest"])

    def live(root: Path, name: str, at: Any = None, *, world: int = 1, late_at: Any = None, **plan: Any) -> Life:
        if world > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                plan["port"] = free.getsockname()[1]
        sent = [at] if world == 1 else at or [None] * world
        late = late_at or [None] * world
        processes = [
            context.Process(
                target=one_life,
                args=(root, name),
                kwargs={**plan, "at": sent[rank], "late_at": late[rank], "rank": rank, "world": world},
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join(60)
        return Life(root, name, world)

    return live


@pytest.fixture(scope="module")
def whole(tmp_path_factory, live):
    """A function that gives the scores of the run that gets no signal."""

    @cache
    def run(kind: str = "", world: int = 1, sharded: bool = False) -> CLDScores:
        plan = {"": {}, "step": STEP, "running": RUNNING}[kind]
        folder = tmp_path_factory.mktemp("whole")
        life = live(folder, "whole", world=world, sharded=sharded, **plan)
        assert life.each("ended") == [""] * world
        return life.scores

    return run


def assert_same(life: Life, expected: CLDScores) -> None:
    assert life.scores.epochs == expected.epochs == list(range(EPOCHS + 1))
    assert torch.equal(life.scores.values, expected.values)


def known(life: Life) -> list[int]:
    """The epochs that are on disk."""
    file = life.root / "results" / "cld-trajectories.npz"
    return LossTrajectories.load(file).epochs if file.exists() else []


# SIGTERM


@pytest.mark.parametrize(
    ("call", "epochs"),
    [
        (0, []),
        (TRAIN - 1, []),
        (TRAIN, []),
        (SWEEP - 2, []),
        (2 * SWEEP, [0, 1]),
        (2 * SWEEP + TRAIN + 1, [0, 1]),
        (2 * SWEEP + SWEEP - 1, [0, 1, 2]),  # this was its last batch
        (EPOCHS * SWEEP + 3, [0, 1, 2, 3, 4]),
    ],
)
def test_sigterm_ends_a_sweep_within_a_batch_and_loses_nothing(tmp_path, live, whole, call, epochs):
    first = live(tmp_path, "first", {call: TERM}, saver=EPOCH_END)
    assert first.ranks == [
        {"calls": call + 1, "after": 0, "ended": "SIGTERMException", "handlers": True, "children": 0}
    ]
    assert known(first) == epochs
    assert_same(live(tmp_path, "second", saver=EPOCH_END), whole())


@pytest.mark.parametrize("saver", [VALIDATION_END, LAST_BATCH, MID_EPOCH], ids=str)
@pytest.mark.parametrize("call", [3, 2 * SWEEP + 5, EPOCHS * SWEEP + TRAIN + 1])
def test_a_run_that_sigterm_ended_resumes_from_any_checkpoint(tmp_path, live, whole, saver, call):
    assert live(tmp_path, "first", {call: TERM}, saver=saver).each("after") == [0]
    second = live(tmp_path, "second", saver=saver)
    if saver is not MID_EPOCH:  # from where Lightning resumes otherwise than it trained
        assert_same(second, whole())
    assert second.logged.epochs == list(range(EPOCHS + 1))
    assert not second.logged.train_losses.isnan().any()


@pytest.mark.parametrize(
    ("hook", "call"), [("on_train_batch_start", 3), ("on_train_batch_end", 6), ("on_validation_end", 1)]
)
def test_no_sweep_begins_after_sigterm(tmp_path, live, whole, hook, call):
    saver = {"every_n_train_steps": 6, "save_on_train_epoch_end": False}
    first = live(tmp_path, "first", elsewhere=(hook, 2, call, TERM), saver=saver)
    assert first.each("ended") == ["SIGTERMException"]
    assert first.each("calls") == [3 * SWEEP]  # theta_0 and two epochs
    assert known(first) == [0, 1, 2]
    assert_same(live(tmp_path, "second", saver=saver), whole())


@pytest.mark.parametrize(("kind", "plan"), [("running", RUNNING), ("step", STEP)])
@pytest.mark.parametrize("back", [1, VAL - 1])
def test_sigterm_loses_nothing_of_other_recordings(tmp_path, live, whole, kind, plan, back):
    call = 3 * SWEEP - 1 - back if kind == "running" else SWEEP + 2 * VAL - 1 - back
    first = live(tmp_path, "first", {call: TERM}, saver=EPOCH_END, **plan)
    assert (first.each("calls"), first.each("ended")) == ([call + 1], ["SIGTERMException"])
    assert_same(live(tmp_path, "second", saver=EPOCH_END, **plan), whole(kind))


def test_a_sweep_that_ended_leaves_no_workers(tmp_path, live):
    first = live(tmp_path, "first", {SWEEP + 5: TERM}, workers=2)
    assert (first.each("children"), first.each("calls")) == ([0], [SWEEP + 6])


def test_sigterm_at_the_sweep_that_makes_up_for_one_loses_nothing(tmp_path, live, whole):
    live(tmp_path, "first", {2 * SWEEP + 5: TERM}, saver=EPOCH_END)
    again = live(tmp_path, "again", {4: TERM}, saver=EPOCH_END)
    assert (again.each("calls"), again.each("ended")) == ([5], ["SIGTERMException"])
    assert_same(live(tmp_path, "second", saver=EPOCH_END), whole())


# SLURM's requeue signal


@pytest.mark.parametrize("call", [3, TRAIN + 1, 2 * SWEEP, 2 * SWEEP + TRAIN + 1, EPOCHS * SWEEP + 3])
def test_a_requeued_run_has_every_row_and_so_has_the_one_that_lives_on(tmp_path, live, whole, call):
    first = live(tmp_path, "first", {call: USR1}, scheduler=True)
    assert first.each("calls") == [(EPOCHS + 1) * SWEEP + call % SWEEP + 1]  # that sweep began again
    assert first.each("handlers") == [True]
    assert_same(first, whole())
    assert (tmp_path / "requeued").read_text() == "requeue 123\n"
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
    assert_same(live(tmp_path, "second", scheduler=True), whole())


def test_a_checkpoint_for_a_requeue_holds_the_module_as_training_left_it(tmp_path, live):
    live(tmp_path / "plain", "plain", saver=EPOCH_END | {"save_top_k": -1, "filename": "{epoch}"}, watched=False)
    live(tmp_path, "first", {2 * SWEEP + TRAIN + 1: USR1}, scheduler=True)
    plain, saved = (
        torch.load(tmp_path / name, weights_only=True) for name in ("plain/epoch=1.ckpt", "hpc_ckpt_1.ckpt")
    )
    assert plain["state_dict"].keys() == saved["state_dict"].keys() >= {"passes", "accuracy.tp", "net.1.running_mean"}
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in plain["state_dict"].items())
    torch.testing.assert_close(plain["optimizer_states"], saved["optimizer_states"], rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "plan"), [("running", RUNNING), ("step", STEP)])
def test_a_requeued_run_has_every_row_of_other_recordings(tmp_path, live, whole, kind, plan):
    call = 2 * SWEEP + 3 if kind == "running" else SWEEP + VAL + 3
    assert_same(live(tmp_path, "first", {call: USR1}, scheduler=True, **plan), whole(kind))
    assert_same(live(tmp_path, "second", scheduler=True, **plan), whole(kind))


def test_sigterm_after_the_requeue_ends_the_sweep_that_began_again(tmp_path, live, whole):
    first = live(tmp_path, "first", {2 * SWEEP + 5: USR1, 2 * SWEEP + 9: TERM}, scheduler=True)
    assert (first.each("calls"), first.each("ended")) == ([2 * SWEEP + 10], ["SIGTERMException"])
    assert_same(live(tmp_path, "second", scheduler=True), whole())


@pytest.mark.parametrize("call", [4, 2 * SWEEP + 4])
def test_a_sweep_gets_done_however_many_signals_come(tmp_path, live, whole, call):
    sent = {call + 3 * step: USR1 for step in range(10)}
    first = live(tmp_path, "first", sent, scheduler=True)
    assert first.each("calls") == [(EPOCHS + 1) * SWEEP + call % SWEEP + 1]
    assert (tmp_path / "requeued").read_text().count("requeue") >= 2
    assert_same(first, whole())


@pytest.mark.parametrize(
    ("hook", "call"), [("on_train_batch_start", 3), ("on_train_batch_end", 4), ("on_validation_end", 1)]
)
@pytest.mark.parametrize("plan", [{}, STEP], ids=str)
def test_a_requeue_in_training_has_every_row(tmp_path, live, hook, call, plan):
    live(tmp_path, "first", elsewhere=(hook, 2, call, USR1), scheduler=True, **plan)
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
    second = live(tmp_path, "second", scheduler=True, **plan)
    assert second.scores.epochs == list(range(EPOCHS + 1))
    assert not second.logged.val_losses.isnan().any()
    assert not second.logged.train_losses[[0, 1, 2, 4, 5]].isnan().any()


# Several processes


SHARES = batches(2)
SHARE = sum(SHARES)


FSDP2 = pytest.mark.skipif(
    not hasattr(torch.cpu.current_stream(), "record_event"), reason="this torch has none on CPUs"
)
LAUNCHES = [pytest.param(False, id="ddp"), pytest.param(True, id="fsdp2", marks=FSDP2)]


@pytest.mark.parametrize("sharded", LAUNCHES)
@pytest.mark.parametrize("calls", [(2, 2), (2 * SHARE + 1, 2 * SHARE + 5), (EPOCHS * SHARE + SHARES[0] + 2,) * 2])
def test_sigterm_ends_a_sweep_on_all_ranks(tmp_path, live, whole, calls, sharded):
    first = live(tmp_path, "first", [{call: TERM} for call in calls], world=2, saver=EPOCH_END, sharded=sharded)
    assert first.each("ended") == ["SIGTERMException"] * 2
    # With FSDP2 all end at the same batch.
    assert first.each("calls") == ([min(calls) + 1] * 2 if sharded else [call + 1 for call in calls])
    assert first.each("handlers") == [True] * 2
    assert known(first) == list(range(min(calls) // SHARE))
    assert_same(live(tmp_path, "second", world=2, saver=EPOCH_END, sharded=sharded), whole("", 2, sharded))


@pytest.mark.parametrize("sharded", LAUNCHES)
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_that_one_rank_gets_ends_the_run_on_all(tmp_path, live, whole, rank, sharded):
    call = 2 * SHARE + 5
    sent = [{call: TERM} if rank == own else None for own in range(2)]
    first = live(tmp_path, "first", sent, world=2, saver=EPOCH_END, sharded=sharded)
    assert first.each("ended") == ["SIGTERMException"] * 2
    assert first.ranks[rank]["calls"] == call + 1
    assert first.ranks[1 - rank]["calls"] == (call + 1 if sharded else 2 * SHARE + SHARES[0])
    assert_same(live(tmp_path, "second", world=2, saver=EPOCH_END, sharded=sharded), whole("", 2, sharded))


@pytest.mark.parametrize("sharded", LAUNCHES)
def test_a_signal_may_reach_a_rank_after_the_sweep_has_ended_for_it(tmp_path, live, whole, sharded):
    sent, late_at = [{2 * SHARE + 5: TERM}, None], [None, 2 * SHARE + 4]
    first = live(tmp_path, "first", sent, world=2, saver=EPOCH_END, sharded=sharded, late_at=late_at)
    assert first.each("ended") == ["SIGTERMException"] * 2
    assert_same(live(tmp_path, "second", world=2, saver=EPOCH_END, sharded=sharded), whole("", 2, sharded))


@pytest.mark.parametrize("calls", [(3, 3), (2 * SHARE + 1, 2 * SHARE + 5), (2 * SHARE + 5, None)], ids=str)
def test_a_requeued_run_of_several_processes_has_every_row(tmp_path, live, whole, calls):
    sent = [None if call is None else {call: USR1} for call in calls]
    first = live(tmp_path, "first", sent, world=2, scheduler=True)
    assert_same(first, whole("", 2))
    assert (tmp_path / "requeued").read_text() == "requeue 123\n"
    assert_same(live(tmp_path, "second", world=2, scheduler=True), whole("", 2))


def test_a_requeued_run_of_several_processes_has_every_row_of_its_steps(tmp_path, live, whole):
    call = SHARE + SHARES[1] + 2
    assert_same(live(tmp_path, "first", [{call: USR1}] * 2, world=2, scheduler=True, **STEP), whole("step", 2))
    assert_same(live(tmp_path, "second", world=2, scheduler=True, **STEP), whole("step", 2))


def test_rank_0_passes_sigterm_on_at_once(tmp_path):
    # Lightning starts the other process itself, and only the first gets the signal.
    call = 5
    plan = json.dumps({"name": "first", "at": {call: TERM}, "waits_at": 2})
    log = run_script("signalled_runs.py", tmp_path, plan, log=tmp_path / "log.txt", timeout=180)
    life = Life(tmp_path, "first", 2, log)
    assert life.each("ended") == ["SIGTERMException"] * 2
    first, other = life.each("calls")
    assert first == call + 1
    assert other <= 3  # it may not have come as far as where it waits; without the signal it evaluates its whole share
