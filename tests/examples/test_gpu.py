"""The benchmark for a GPU, in miniature on the CPU: all pieces run, what is done is kept, and what travels arrives."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import _gpu_pieces
import _gpu_runs
import _runs
import gpu

from lightning_cld import LossTrajectories

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's, about small data


def call_of(work, ends=None):
    work.mkdir(exist_ok=True)
    return _gpu_runs.Run(
        work=work,
        sizes=_gpu_runs.TINY,
        device=torch.device("cpu"),
        workers=1,
        epochs=5,
        training_minutes=1.0,
        precision="32-true",
        ends=time.monotonic() + 600 if ends is None else ends,
    )


def run(work, *arguments):
    gpu.main(["run", "--device", "cpu", "--tiny", "--epochs", "4", "--workers", "1", "--work", str(work), *arguments])


def test_every_piece_runs_and_is_not_run_again(tmp_path, capsys):
    run(tmp_path)
    said = capsys.readouterr().out
    assert "Everything is done." in said
    ledger = (tmp_path / "results.jsonl").read_text()
    rows = [json.loads(line) for line in ledger.splitlines()]
    for piece, columns in gpu.TABLES.items():
        own = [row for row in rows if row["piece"] == piece]
        assert own, piece
        assert all(set(columns) <= set(row) for row in own), piece
        assert f"| {' | '.join(columns)} |" in said
    assert all(row["identical"] for row in rows if row["piece"] == "identity")
    trained = {(row["method"], row["fraction"]) for row in rows if row["piece"] == "training"}
    methods = {(method, fraction) for method in _gpu_pieces.METHODS for fraction in (0.1, 0.3)}
    assert trained == methods | {("everything", 1.0)}
    running = next(row for row in rows if row["piece"] == "memory" and row["history"] == "running")
    assert running["history_bytes"] == pytest.approx(36 * 2_000 + 52 * 1_000 + 520 * 10, rel=0.01)

    run(tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == ledger
    assert "Everything is done." in capsys.readouterr().out


def test_without_time_the_next_call_is_named(tmp_path, capsys):
    run(tmp_path, "--minutes", "0", "--pieces", "scores")
    said = capsys.readouterr().out
    assert "The same command goes on" in said
    assert f"--work {tmp_path} --minutes 0 --pieces scores" in said
    assert not (tmp_path / "results.jsonl").exists()


def test_a_piece_that_fails_leaves_the_others_their_time(tmp_path, monkeypatch, capsys):
    def fails(call):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(_gpu_pieces, "scores", fails)
    with pytest.raises(SystemExit, match="failed: scores"):
        run(tmp_path, "--pieces", "scores", "memory")
    assert "scores failed: RuntimeError: no kernel image" in capsys.readouterr().err
    assert len(call_of(tmp_path).rows("memory")) == 2


def test_training_goes_on_where_a_call_ended(tmp_path):
    splits = _gpu_runs.made_up_splits(call_of(tmp_path))
    folder = tmp_path / "proxy"
    for _ in range(4):  # each call has time for one epoch
        with pytest.raises(_gpu_runs.OutOfTimeError):
            _gpu_pieces._proxy(call_of(tmp_path, ends=0.0), splits, 5, folder)
    row = _gpu_pieces._proxy(call_of(tmp_path, ends=0.0), splits, 5, folder)
    assert (row["epochs"], row["steps"]) == (5, 5)
    assert LossTrajectories.load(folder / "cld-trajectories.npz").epochs == [0, 1, 2, 3, 4, 5]
    assert not (folder / "last.ckpt").exists()


def test_a_fresh_subset_is_drawn_for_each_epoch(tmp_path):
    call, seen = call_of(tmp_path), []
    splits = _gpu_runs.made_up_splits(call)

    class Sees(_gpu_runs.L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(sorted(batch[0].flatten(1).sum(1).tolist()))

    data = _gpu_runs.SplitsThere(splits, call.device, _gpu_runs.DrawnAnew(splits[0].targets, 0.3, seed=1))
    _gpu_pieces._fit(call, data, data, 3, tmp_path / "target", Sees())
    assert [len(batch) for batch in seen] == [18, 18, 18]
    assert seen[0] != seen[1] != seen[2]


def test_the_epochs_are_as_many_as_there_is_time_for(tmp_path):
    for name, minutes, expected in (("some", 1.0, 21), ("all", 60.0, 164)):
        call = call_of(tmp_path / name)
        call.epochs, call.training_minutes = None, minutes
        call.once("epoch", {}, lambda: {"epoch_seconds": 1.0})
        call.once("sweep", {}, lambda: {"per_epoch": 0.2})
        assert _gpu_pieces._settle_epochs(call) == expected
        call.epochs = 7  # comes too late: what was trained has the others
        assert _gpu_pieces._settle_epochs(call) == expected


def test_what_is_packed_arrives(tmp_path, monkeypatch, capsys):
    pool, test = _gpu_runs.made_up(300, classes=100), _gpu_runs.made_up(40, seed=1)
    monkeypatch.setattr(_runs, "load", lambda name, root: (pool, test))
    packed, work = tmp_path / "packed", tmp_path / "work"
    gpu.main(["pack", "--packed", str(packed), "--lot-bytes", "400000"])
    lots = sorted(packed.glob("lot-*"))
    assert len(lots) == 3
    said = capsys.readouterr().out
    for lot in lots:
        assert sum(file.stat().st_size for file in lot.iterdir()) <= 400_000
        assert f"{lot}: " in said

    later = tmp_path / "later"
    lots[1].rename(later)
    gpu.take_in(packed, work)
    assert _gpu_runs.cifar_splits(work) is None
    for lot in (lots[0], lots[2]):
        (lot / f"cifar100-{lot.name[-1]}.npz").unlink()
    later.rename(lots[1])
    gpu.take_in(packed, work)
    train, val, tested = _gpu_runs.cifar_splits(work)
    assert (len(train), len(val), len(tested)) == (200, 100, 40)  # one of each class at least
    assert torch.equal(tested.images, test.images)
    assert torch.equal(tested.targets, test.targets)
    together = torch.cat([train.images, val.images]).flatten(1).long().sum(1).sort().values
    assert torch.equal(together, pool.images.flatten(1).long().sum(1).sort().values)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(SystemExit, match=r"Missing here: no_such_package\. Name them to `gpu.py pack --wheels`"):
        gpu.take_in(None, tmp_path)
