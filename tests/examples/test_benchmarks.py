"""What the benchmarks' tables rely on: each cell runs once and is kept, and the data have the faults they should."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import _grid
import _runs
import accuracy
import early
import grid_runs
import label_noise
import overhead
import path as curves
import quality
import report
import scale
import scoring
import startup
import streams
import transfer
import validation
from _common import Images, flip_labels, load

# The grid, with threads in place of processes, which are slow to start


@pytest.fixture(scope="module", autouse=True)
def _threads():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_grid, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
        yield


CELLS = [
    {"dataset": "digits", "fraction": fraction, "method": method, "seed": seed}
    for seed in (0, 1)
    for method in ("random", "CLD", "a, b", 'say "so"')
    for fraction in (10.0, 0.5, 2)
]


def work(cell):
    """Results that depend only on the cell."""
    return {"accuracy": cell["fraction"] / 3 + cell["seed"], "note": f"{cell['method']}\n2"}


def as_row(cell):
    return {name: str(value) for name, value in {**cell, **work(cell)}.items()}


def counted(seen):
    return lambda cell: seen.append(cell) or work(cell)


def run(path, cells=CELLS, work=work, jobs=1):
    return _grid.run_cells(path, cells, work, jobs=jobs)


@pytest.mark.parametrize("jobs", [1, 3])
def test_rows_are_returned_in_the_order_of_the_cells_and_read_from_the_file(tmp_path, jobs):
    path = tmp_path / "new" / "folder" / "out.csv"
    assert _grid.read_rows(path) == []
    assert run(path, jobs=jobs) == [as_row(cell) for cell in CELLS]
    assert sorted(_grid.read_rows(path), key=str) == sorted(map(as_row, CELLS), key=str)
    assert [file.name for file in path.parent.iterdir()] == ["out.csv"]


def test_the_file_is_sorted_numbers_by_their_value(tmp_path):
    path = tmp_path / "out.csv"
    mixed = [{"size": size, "seed": seed} for size in ("all", 10, 9.5, "10 %", -1) for seed in (10, 9)]
    run(path, mixed, lambda cell: {"accuracy": 1})
    lines = path.read_bytes().decode().split("\n")
    sizes = ["-1", "9.5", "10", "10 %", "all"]
    expected = [f"{size},{seed},1" for size in sizes for seed in (9, 10)]
    assert lines == ["size,seed,accuracy", *expected, ""]


def test_cells_that_are_finished_are_not_run_again(tmp_path):
    path, seen = tmp_path / "out.csv", []
    first = run(path, work=counted(seen))
    assert sorted(map(str, seen)) == sorted(map(str, CELLS))
    before, written = path.read_bytes(), path.stat().st_mtime_ns
    assert run(path, work=counted(seen)) == first
    assert len(seen) == len(CELLS)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, written)


@settings(max_examples=12, deadline=None)
@given(order=st.permutations(CELLS), cuts=st.lists(st.integers(1, len(CELLS) - 1), max_size=3), jobs=st.integers(1, 4))
def test_however_the_cells_come_the_file_is_the_same(order, cuts, jobs):
    with tempfile.TemporaryDirectory() as folder:
        once, parts, seen = Path(folder) / "once.csv", Path(folder) / "parts.csv", []
        run(once)
        for end in [*sorted(cuts), len(CELLS)]:
            rows = run(parts, order[:end], counted(seen), jobs)
            assert rows == [as_row(cell) for cell in order[:end]]
        assert Counter(map(str, seen)) == Counter(map(str, CELLS))
        assert parts.read_bytes() == once.read_bytes()


def test_rows_of_other_cells_stay(tmp_path):
    path, seen = tmp_path / "out.csv", []
    run(path, CELLS[:9])
    rows = run(path, CELLS[6:15], counted(seen))
    assert rows == [as_row(cell) for cell in CELLS[6:15]]
    assert sorted(map(str, seen)) == sorted(map(str, CELLS[9:15]))
    assert sorted(_grid.read_rows(path), key=str) == sorted(map(as_row, CELLS[:15]), key=str)


def test_a_row_that_is_there_is_believed(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("a,b,accuracy\n1,x,50\n", encoding="utf-8")
    rows = run(path, [{"a": 1, "b": "x"}, {"a": 1.0, "b": "x"}], lambda cell: {"accuracy": 60})
    assert [row["accuracy"] for row in rows] == ["50", "60"]


def wait_for(condition, what, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.01)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_was_finished_before_an_error_is_kept(tmp_path, error):
    path, seen = tmp_path / "out.csv", []

    def fails(cell):
        seen.append(cell)
        if cell == CELLS[4]:
            wait_for(lambda: len(_grid.read_rows(path)) == 4, "the rows of the cells before")
            raise error("power cut")
        if len(seen) > 5:
            time.sleep(0.05)
        return work(cell)

    with pytest.raises(error, match="power cut"):
        run(path, work=fails)
    assert sorted(_grid.read_rows(path), key=str) == sorted(map(as_row, CELLS[:4]), key=str)
    assert len(seen) < len(CELLS)  # cells that had not begun never begin
    seen.clear()
    assert run(path, work=counted(seen)) == [as_row(cell) for cell in CELLS]
    assert sorted(map(str, seen)) == sorted(map(str, CELLS[4:]))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "out.csv"
    run(path, CELLS[:5])
    before = path.read_bytes()

    def cut_short(writer, rows):
        writer.writerow(next(iter(rows)))
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", cut_short)
        with pytest.raises(OSError, match="disk full"):
            run(path, CELLS[:6])
    assert path.read_bytes() == before
    run(path)
    once = tmp_path / "once.csv"
    run(once)
    assert path.read_bytes() == once.read_bytes()


def test_means_spreads_and_tables():
    assert _grid.mean_and_spread([7.0]) == (7.0, 0.0)
    mean, spread = _grid.mean_and_spread([1.0, 2.0, 6.0])
    assert (mean, spread) == pytest.approx((np.mean([1, 2, 6]), np.std([1, 2, 6], ddof=1)))
    assert _grid.markdown(["a", "b"], [["1", "2"], ["3", "4"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"


# The grid, in real processes

posix = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")


def start(path, folder, jobs):
    command = [sys.executable, str(Path(__file__).with_name("grid_runs.py")), str(path), str(folder), str(jobs)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def end(process):
    try:
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, said


def begun(folder):
    """The numbers of the cells that were begun, in order."""
    return list(map(int, (folder / "log").read_text().split()))


def living(folder):
    """The workers that are alive: a live worker holds its lock, a zombie does not."""
    import fcntl

    found = []
    for path in folder.glob("*.lock"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(int(path.stem))
    return found


@posix
def test_a_run_that_is_killed_leaves_no_worker_and_is_completed_by_the_next(tmp_path):
    once, killed = tmp_path / "once", tmp_path / "killed"
    once.mkdir()
    killed.mkdir()
    (killed / "hold").touch()
    script = start(killed / "out.csv", killed, jobs=2)
    try:
        run(once / "out.csv", grid_runs.CELLS, partial(grid_runs.work, folder=once, jobs=1))
        wait_for(lambda: len(_grid.read_rows(killed / "out.csv")) == 5, "all cells but the last")
        wait_for(lambda: 5 in begun(killed), "the last cell")
        assert len(living(killed)) == 2
        os.kill(script.pid, signal.SIGKILL)
        # One worker is in the middle of a cell, the other waits for one.
        wait_for(lambda: not living(killed), "the end of the workers", seconds=20)
    finally:
        script.kill()
        script.wait()
        for worker in living(killed):  # leave none behind if the test fails
            os.kill(worker, signal.SIGKILL)
        script.communicate()
        (killed / "hold").unlink()
    whole = (once / "out.csv").read_bytes()
    assert len((killed / "out.csv").read_bytes()) < len(whole)
    assert sorted(begun(killed)) == [0, 1, 2, 3, 4, 5]

    end(start(killed / "out.csv", killed, jobs=2))
    assert (killed / "out.csv").read_bytes() == whole
    assert sorted(begun(killed)) == [0, 1, 2, 3, 4, 5, 5]
    assert sorted(begun(once)) == [0, 1, 2, 3, 4, 5]


# Label noise


@st.composite
def labels(draw):
    classes = draw(st.integers(2, 12))
    more = draw(st.lists(st.integers(0, classes - 1), max_size=60))
    return classes, torch.tensor([*range(classes), *more])


@settings(max_examples=100, deadline=None)
@given(case=labels(), rate=st.floats(0, 1), seed=st.integers(0, 9999), kind=st.sampled_from(["symmetric", "pair"]))
def test_an_exact_share_of_the_labels_is_flipped_and_none_to_itself(case, rate, seed, kind):
    classes, targets = case
    before = targets.tolist()
    flipped = flip_labels(targets, rate, seed, kind).tolist()
    assert targets.tolist() == before
    changed = [(a, b) for a, b in zip(before, flipped, strict=True) if a != b]
    assert abs(len(changed) - rate * len(before)) <= 0.5 + 1e-9
    assert set(flipped) <= set(range(classes))
    if kind == "pair":
        assert all(b == (a + 1 if a + 1 < classes else 0) for a, b in changed)


def test_symmetric_flips_go_to_every_other_class_alike():
    targets = torch.arange(5).repeat(4000)
    flipped = flip_labels(targets, 0.5, 3)
    assert torch.equal(flip_labels(targets, 0.5, 3, "symmetric"), flipped)
    counts = Counter((a, b) for a, b in zip(targets.tolist(), flipped.tolist(), strict=True) if a != b)
    assert len(counts) == 20
    assert all(abs(count - 500) < 120 for count in counts.values())


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_flips_follow_from_their_seed_alone(kind):
    targets = torch.arange(4).repeat(50)
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    drawn = [tuple(flip_labels(targets, 0.3, seed, kind).tolist()) for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (repr(np.random.get_state()), random.getstate()) == before[1:]
    torch.rand(3)
    assert [tuple(flip_labels(targets, 0.3, seed, kind).tolist()) for seed in range(20)] == drawn
    assert len(set(drawn)) == 20


# Class imbalance


@pytest.mark.parametrize(
    ("sizes", "factor", "expected"),
    [
        ([100, 100, 100], 1.0, [100, 100, 100]),
        ([100, 100, 100], 4.0, [100, 50, 25]),
        ([100, 100, 100, 100], 1000.0, [100, 10, 1, 0]),
        ([80, 200, 50], 100.0, [80, 20, 0]),
        ([64, 64], 64.0, [64, 1]),
    ],
    ids=str,
)
def test_class_sizes_fall_geometrically(sizes, factor, expected):
    targets = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
    kept = _runs._imbalanced(targets, factor, 0)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert torch.bincount(targets[kept], minlength=len(sizes)).tolist() == expected


def test_which_samples_of_a_class_are_kept_follows_from_the_seed_alone():
    targets = torch.arange(3).repeat(100)
    before = torch.get_rng_state()
    kept = [tuple(_runs._imbalanced(targets, 10.0, seed).tolist()) for seed in range(100)]
    assert torch.equal(torch.get_rng_state(), before)
    assert tuple(_runs._imbalanced(targets, 10.0, 7).tolist()) == kept[7]
    assert len(set(kept)) == 100
    drawn = torch.bincount(torch.tensor(sum(kept, ())), minlength=300)
    assert (drawn[targets == 0] == 100).all()
    # 10 of the last class's 100 samples are drawn, 100 times: each 10 times, give or take 3.
    assert drawn[targets == 2].max() < 30


# The splits

CASE = _runs.Case("digits", "mlp", 3, noise=0.0, noise_kind="symmetric", val_noise=0.0, imbalance=1.0, seed=0)
POOL, TEST = load("digits", None)


def splits(**changes):
    """Makes the splits and the mask of wrong train labels, without the cache."""
    return _runs.make_splits.__wrapped__(replace(CASE, **changes), Path("nowhere"))


@pytest.fixture
def _numbered(monkeypatch):
    """Replaces each image of the pool by its position."""
    pool = Images(torch.arange(len(POOL))[:, None, None, None], POOL.targets)
    monkeypatch.setattr(_runs, "_load", lambda name, root: (pool, TEST))


def positions(part):
    return part.images.flatten()


CHANGES = [
    {},
    {"seed": 3},
    {"noise": 0.2},
    {"noise": 0.4, "noise_kind": "pair", "seed": 1},
    {"val_noise": 0.3},
    {"noise": 0.4, "val_noise": 0.4, "noise_kind": "pair"},
    {"imbalance": 10.0, "noise": 0.2, "val_noise": 0.1},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.usefixtures("_numbered")
def test_train_and_validation_samples_are_disjoint_and_together_the_pool(changes):
    made, _ = splits(**changes)
    both = torch.cat([positions(made.train), positions(made.val)]).sort().values
    case = replace(CASE, **changes)
    assert torch.equal(both, _runs._imbalanced(POOL.targets, case.imbalance, case.seed))
    assert len(both) == len(both.unique())
    assert (len(both) == len(POOL)) == (case.imbalance == 1)
    sizes = torch.bincount(POOL.targets[both], minlength=10)
    assert abs(float(sizes[0] / sizes[9]) - case.imbalance) < 0.1 * case.imbalance
    assert abs(len(made.val) / len(both) - 0.15) < 0.01


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.usefixtures("_numbered")
def test_only_labels_that_should_be_are_wrong(changes):
    made, wrong = splits(**changes)
    case = replace(CASE, **changes)
    for part, share in ((made.train, case.noise), (made.val, case.val_noise)):
        true = POOL.targets[positions(part)]
        changed = part.targets != true
        assert abs(int(changed.sum()) - share * len(part)) <= 0.5 + 1e-9
        if part is made.train:
            assert torch.equal(wrong, changed)
        shifts = set(((part.targets - true) % 10)[changed].tolist())
        if share == 0 or case.noise_kind == "pair":
            assert shifts == ({1} if share else set())
        else:
            assert len(shifts) > 2  # out of nine possible ones


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_test_set_is_as_it_was_loaded(changes):
    made, _ = splits(**changes)
    assert torch.equal(made.test.images, TEST.images)
    assert torch.equal(made.test.targets, TEST.targets)


@pytest.mark.usefixtures("_numbered")
def test_noise_changes_neither_the_split_nor_the_labels_of_the_other_part():
    plain, noisy, both = (splits(**noise)[0] for noise in ({}, {"noise": 0.3}, {"noise": 0.3, "val_noise": 0.3}))
    for part in ("train", "val"):
        assert torch.equal(positions(getattr(plain, part)), positions(getattr(both, part)))
    assert torch.equal(noisy.train.targets, both.train.targets)
    assert torch.equal(noisy.val.targets, plain.val.targets)


@pytest.mark.parametrize("imbalance", [1.0, 2.0])
@pytest.mark.usefixtures("_numbered")
def test_splits_and_flips_follow_from_the_seed_alone(imbalance):
    before = torch.get_rng_state()
    made = [splits(noise=0.2, imbalance=imbalance, seed=seed)[0] for seed in (0, 1, 0)]
    assert torch.equal(torch.get_rng_state(), before)
    for part in ("train", "val"):
        first, other, again = (getattr(splits, part) for splits in made)
        assert torch.equal(positions(first), positions(again))
        assert torch.equal(first.targets, again.targets)
        assert not torch.equal(positions(first), positions(other))


def test_the_pool_and_the_test_set_of_digits_are_disjoint():
    assert (len(POOL), len(TEST)) == (1348, 449)
    assert Counter(POOL.targets.tolist()).keys() == Counter(TEST.targets.tolist()).keys() == set(range(10))


# Proxies


@pytest.mark.filterwarnings("ignore")
def test_a_proxy_is_trained_once_and_anew_where_it_was_not_finished(tmp_path, monkeypatch):
    setup, write_text = _runs.Settings(Path("nowhere"), tmp_path, 40), Path.write_text

    def cut_short(path, text, **options):
        write_text(path, text[:5], **options)
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut_short)
        with pytest.raises(OSError, match="disk full"):
            _runs.run_proxy(CASE, setup)
    proxy = _runs.run_proxy(CASE, setup)
    assert proxy.trajectories.epochs == [0, 1, 2, 3]
    assert 0 < proxy.sweep_seconds < proxy.fit_seconds
    assert proxy.epochs_paid == pytest.approx(3 * proxy.fit_seconds / (proxy.fit_seconds - proxy.sweep_seconds))

    _runs._read_proxy.cache_clear()
    monkeypatch.setattr(_runs, "Classifier", None)
    again = _runs.run_proxy(CASE, setup)
    assert torch.equal(again.trajectories.train_losses, proxy.trajectories.train_losses)
    (done,) = tmp_path.glob("*/proxy.json")
    assert json.loads(done.read_text()) == {"fit_seconds": proxy.fit_seconds, "sweep_seconds": proxy.sweep_seconds}


# The scripts


TINY = ["--dataset", "digits", "--seeds", "1", "--epochs", "9", "--steps", "40"]


@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        (accuracy, ["--noise", "0.2", "--fractions", "0.5", "--methods", "random", "CLD, drawn"], 4),
        (accuracy, ["--noise", "0", "--fractions", "0.5", "--methods", "CLD", "--budget", "epochs"], 3),
        (early, ["--noise", "0"], 4),
        (label_noise, ["--noise", "0.2"], 4),
        (validation, ["--noise", "0"], 17),
        (curves, ["--noise", "0"], 6),
        (transfer, ["--noise", "0", "--fractions", "0.5", "--targets", "cnn8"], 5),
        (quality, ["--fractions", "0.5", "--modes", "every epoch", "step", "running"], 6),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_script_runs_and_prints_its_table(tmp_path, capsys, script, arguments, rows):
    results = tmp_path / "out.csv"
    figure = ["--figure", str(tmp_path / "path.png")] if script is curves else []
    script.main([*TINY, *arguments, "--csv", str(results), "--work", str(tmp_path / "work"), *figure])
    assert len(_grid.read_rows(results)) == rows
    if script is not label_noise:  # its cells are proxies; others train proxies first
        first = _grid.read_rows(tmp_path / "work" / "out_proxies.csv")
        assert len(first) == len(list((tmp_path / "work").glob("*/proxy.json")))
    printed = capsys.readouterr().out
    assert "| --- |" in printed
    assert "nan" not in printed
    for name in [line.removeprefix("Figure: ") for line in printed.splitlines() if line.startswith("Figure: ")]:
        assert Path(name).read_bytes().startswith(b"\x89PNG")


def rows_of(path, *arguments):
    accuracy.main([*TINY, "--noise", "0.2", "--fractions", "0.5", "--methods", "CLD", *arguments, "--csv", str(path)])
    return {(row["method"], row["of_steps"]): row for row in _grid.read_rows(path)}


def test_rows_of_another_number_of_steps_are_not_taken_for_finished(tmp_path, capsys):
    work = ["--work", str(tmp_path / "work")]
    first = rows_of(tmp_path / "a.csv", *work)
    both = rows_of(tmp_path / "a.csv", *work, "--steps", "60")
    assert {steps for _, steps in first} == {"40"}
    assert {row["steps"] for (_, steps), row in both.items() if steps == "60"} == {"60"}
    assert {key: both[key] for key in first} == first


def test_the_validation_split_is_trained_on_by_itself(tmp_path, capsys):
    rows = rows_of(tmp_path / "a.csv", "--noisy-validation", "--work", str(tmp_path / "work"))
    alone, everything = rows["the validation split", "40"], rows["everything", "40"]
    assert (alone["samples"], alone["steps"], alone["wrong"]) == ("202", "40", "0.2")
    assert alone["training_epochs"] == everything["training_epochs"]  # counted in epochs of the full train set
    assert float(alone["selection_seconds"]) == 0
    assert "the validation split: " in capsys.readouterr().out


def test_each_folder_of_images_has_its_own_proxies(tmp_path):
    for name in ("a", "b"):
        args = accuracy.parse(["--dataset", "folder", "--work", str(tmp_path), "--csv", f"{name}.csv"])
        assert _runs.complete(args).work == args.work == tmp_path / name


@pytest.mark.parametrize("shift", [-30.0, 0.0, 30.0])
def test_detectors_are_judged_by_their_order_alone(shift):
    generator = np.random.default_rng(0)
    wrong = generator.random(500) < 0.3
    values = generator.normal(size=500) + wrong + shift
    auroc, precision = label_noise.judge(torch.tensor(values), torch.tensor(wrong))
    assert auroc == pytest.approx(roc_auc_score(wrong, values), abs=1e-6)
    assert precision == pytest.approx(wrong[np.argsort(-values)[: wrong.sum()]].mean(), abs=1e-6)


def test_images_in_folders_are_read_in_the_order_of_their_classes(tmp_path):
    colours = {"cat": (200, 10, 10), "dog": (10, 10, 200)}
    for part, count in (("train", 3), ("test", 2)):
        for name, colour in colours.items():
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20 + number, 30), colour).save(tmp_path / part / name / f"{number}.png")
    pool, test = load("folder", tmp_path)
    assert pool.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.targets.tolist() == [0, 0, 1, 1]
    assert (pool.images.dtype, pool.images.shape[1:]) == (torch.uint8, (3, 64, 64))
    assert [tuple(image[:, 5, 5].tolist()) for image in pool.images[[0, 5]]] == list(colours.values())


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(SystemExit, match="ROOT/train/CLASS/ and ROOT/test/CLASS/"):
        load("folder", tmp_path)


# Published results


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_published_tables_are_those_of_the_csvs(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- end of table -->") > 0
    assert report.render(text) == text


def test_making_tables_anew_leaves_the_text_between_them(monkeypatch):
    monkeypatch.setattr(report, "TABLES", {"a": lambda: "| 1 |", "b": lambda: "| 2 |"})
    empty, old = "<!-- table: a -->\n<!-- end of table -->", "<!-- table: b -->\n| 0 |\n<!-- end of table -->"
    text = report.render(f"before\n\n{empty}\n\nbetween\n\n{old}\n\nafter\n")
    assert text.split("\n\n") == [
        "before",
        "<!-- table: a -->\n| 1 |\n<!-- end of table -->",
        "between",
        "<!-- table: b -->\n| 2 |\n<!-- end of table -->",
        "after\n",
    ]
    assert report.render(text) == text


def test_a_published_mean_is_that_of_its_rows():
    with (report.RESULTS / "fashion_mnist.csv").open(newline="", encoding="utf-8") as file:
        values = [
            float(row["accuracy"])
            for row in csv.DictReader(file)
            if (row["noise"], row["fraction"], row["method"]) == ("0.2", "0.1", "random")
        ]
    assert len(values) == 3
    shown = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    line = next(
        line
        for line in accuracy.table(_grid.read_rows(report.RESULTS / "fashion_mnist.csv"), "0.2", "steps").splitlines()
        if "| random |" in line
    )
    assert shown in line


def test_scoring_compares_three_ways_that_agree(capsys):
    scoring.main(["--samples", "300", "--checkpoints", "6", "--classes", "3", "--repeats", "1"])
    line = capsys.readouterr().out.splitlines()[-1]
    cells = line.split("|")[1:-1]
    assert cells[0].strip() == "300"
    assert float(cells[5]) < 1e-6
    assert float(cells[8]) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_overhead_is_measured_apart_and_printed(tmp_path, capsys):
    path, arguments = tmp_path / "out.csv", ["--case", "cnn", "--samples", "160", "--rounds", "2", "--fits", "1"]
    overhead.main([*arguments, "--csv", str(path)])
    command, _, *tables, settling = capsys.readouterr().out.strip().split("\n\n")
    assert command == f"python examples/benchmarks/overhead.py {' '.join(arguments)}"
    rows = _grid.read_rows(path)
    for part, printed, lines in zip(("run", "sweep", "fit"), tables, (3, 6, 5), strict=True):
        of_part = [row for row in rows if row["part"] == part]
        assert len(of_part) == len(printed.strip().splitlines()) - 2 == lines
        assert sorted(printed.strip().splitlines()) == sorted(overhead.table(rows, part).splitlines())
        for row in of_part:
            assert 0 < float(row["lower_quartile"]) <= float(row["ratio"]) <= float(row["upper_quartile"])
    measured = {row["what"]: row["measured"] for row in rows if row["part"] == "run"}
    assert measured == {"start": "2", "sweeps": "10", "end": "2"}
    assert settling.startswith('cutoff_epoch="auto": 0.0')

    overhead.main([*arguments[:-1], "0", "--rounds", "1", "--csv", str(path)])
    again = _grid.read_rows(path)
    assert len(again) == len(rows)
    assert [row for row in again if row["part"] == "fit"] == [row for row in rows if row["part"] == "fit"]
    assert {row["measured"] for row in again if row["part"] == "sweep"} == {"1"}


def test_the_seconds_of_processes_that_ended_count_too():
    def busy():
        deadline = time.process_time() + 0.2
        while time.process_time() < deadline:
            pass

    def in_a_child():
        process = multiprocessing.get_context("fork").Process(target=busy)
        process.start()
        process.join()

    assert overhead.seconds_of(busy) >= 0.2
    assert overhead.seconds_of(in_a_child) >= 0.2
    assert overhead.seconds_of(lambda: time.sleep(0.2)) < 0.2


def test_the_bare_loop_keeps_the_losses_of_an_evaluation():
    splits = overhead.make_splits("cnn", 20)
    model = overhead.make_model("cnn", splits)
    losses = overhead.bare_pass(model, DataLoader(overhead.OneByOne(splits.train), 7))
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = model(splits.train.images).double().numpy()
    right = logits[np.arange(20), splits.train.targets.numpy()]
    expected = np.log(np.exp(logits).sum(axis=1)) - right
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-4)


def test_the_start_of_a_run_is_measured(capsys):
    startup.main(["--samples", "500", "--classes", "10", "--repeats", "1"])
    command, table = capsys.readouterr().out.strip().split("\n\n")
    assert command == "python examples/benchmarks/startup.py --samples 500 --classes 10 --repeats 1"
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["folders", "500"], ["subset of folders", "450"], ["tensors", "500"]]
    assert all(float(row[2]) > 0 for row in rows)


SMALL = ["--samples", "300", "3000", "--checkpoints", "6", "8", "--classes", "3"]


def test_scale_runs_each_call_once_and_prints_a_table(tmp_path, capsys, monkeypatch):
    calls = ["--calls", "LossTrajectories.values", "CLDScores.select, top", "--csv", str(tmp_path / "scale.csv")]
    monkeypatch.setattr(scale, "in_own_process", scale.measure)
    scale.main([*SMALL, *calls])
    printed = capsys.readouterr().out
    monkeypatch.setattr(scale, "in_own_process", pytest.fail)
    scale.main([*SMALL, *calls])
    assert capsys.readouterr().out == printed
    command, table = printed.strip().split("\n\n")
    assert command.startswith(f"python examples/benchmarks/scale.py {' '.join(SMALL)}")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        ["LossTrajectories.values", "6"],
        ["LossTrajectories.values", "8"],
        ["CLDScores.select, top", ""],
    ]
    measured = _grid.read_rows(tmp_path / "scale.csv")
    shown = [figure for row in rows for figure in (row[2], row[4])]
    assert sorted(shown) == sorted(f"{float(row['seconds']):.3f}" for row in measured)


def test_scale_measures_in_a_process_of_its_own_and_says_what_failed():
    cell = {"samples": 30_000, "checkpoints": 6, "classes": 3, "call": "LossTrajectories.values"}
    assert scale.in_own_process(cell)["seconds"] > 0
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        scale.in_own_process({**cell, "call": "nothing"})


def test_sweeps_over_streams_are_measured_and_printed(tmp_path, capsys):
    arguments = ["--samples", "600", "--networks", "mlp", "--rounds", "2"]
    streams.main([*arguments, "--csv", str(tmp_path / "streams.csv")])
    command, table = capsys.readouterr().out.strip().split("\n\n")
    assert command.startswith(f"python examples/benchmarks/streams.py {' '.join(arguments)}  # ")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[:3] for row in rows] == [["mlp", "600", "positions"], ["mlp", "600", "names"]]
    assert all(float(row[place]) > 0 for row in rows for place in (3, 4, 5, 7, 8))


@pytest.mark.parametrize("kind", streams.KINDS)
def test_a_stream_and_its_set_show_the_same_samples(kind):
    samples, stream = (each(streams.make_images(300), kind) for each in (streams.Samples, streams.Stream))
    told = [sample[2] for sample in DataLoader(stream, None)]
    assert told == [samples[place][2] for place in range(300)]
    assert len(set(told)) == 300
    assert kind == "positions" or {len(name) for name in told} == {20}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", scale.CALLS)
def test_scale_measures_every_call(monkeypatch, call):
    monkeypatch.setattr(scale, "_ROUNDS", 1)
    found = scale.measure({"samples": 300, "checkpoints": 8, "classes": 2, "call": call})
    assert found["seconds"] >= 0


def test_growth_is_the_exponent_of_the_samples():
    seconds = {100: 0.5, 1_000: 1.0, 10_000: 50.0}
    rows = [
        {"call": "np.save", "checkpoints": "30", "samples": str(n), "seconds": str(s), "extra_bytes": "2097152"}
        for n, s in seconds.items()
    ]
    assert scale.table(rows).splitlines()[-1] == "| np.save | 30 | 0.500 | 2 | 1.000 | 2 | 50.000 | 2 | 1.00 |"
