"""Runs each small example as a reader would, only shorter."""

from __future__ import annotations

import importlib
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_cld import CLDScores, LossTrajectories

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

TINY = ["--epochs", "3", "--seeds", "1"]
EVERYTHING, TOP, DRAWN = "everything", "CLD, top", "CLD, drawn"
BY_CLASS = (EVERYTHING, "random per class", TOP, DRAWN)
# What is trained on, and of how many samples everything and a fifth of it are.
TABLES = {
    "text_batches": (BY_CLASS, None),
    "regression": ((EVERYTHING, "random", TOP, DRAWN), (288, 58)),
    "multilabel": (
        (EVERYTHING, "random", TOP, DRAWN, "CLD, top, groups", "CLD, drawn, groups"),
        (1200, 240),
    ),
    "dict_batches": (BY_CLASS, (1146, 229)),
    "image_folder": (BY_CLASS, (637, 127)),
    "fabric_loop": ((EVERYTHING, "random per class", TOP), (1146, 229)),
    "plain_loop": (BY_CLASS, (1146, 229)),
}


def rows(printed: str) -> dict[str, tuple[int, float]]:
    """The number of samples and the value in each line of the table."""
    found = re.findall(r"^(\S.*?) +([\d,]+)   (\d+\.\d\d)(?: \+- \d+\.\d\d)?$", printed, re.MULTILINE)
    return {name: (int(samples.replace(",", "")), float(value)) for name, samples, value in found}


def check_table(name: str, printed: str) -> None:
    methods, sizes = TABLES[name]
    table = rows(printed)
    assert tuple(table) == methods, printed
    everything, part = sizes or (table[EVERYTHING][0], round(0.2 * table[EVERYTHING][0]))
    assert [samples for samples, _ in table.values()] == [everything] + [part] * (len(methods) - 1)
    values = [value for _, value in table.values()]
    assert len(set(values)) > 1, "all came out the same"
    if name != "regression":
        assert all(10 < value <= 100 for value in values), printed


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in its own folder; returns its output and its module."""
    monkeypatch.chdir(tmp_path)
    logger, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    level = logger.level

    def run(name: str):
        module = importlib.import_module(name)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*differently when read twice.*")
            module.main(TINY)
        return capsys.readouterr().out, module

    yield run
    logger.setLevel(level)
    torch.set_num_threads(threads)


def test_every_example_is_here_and_in_the_guide():
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"_common", "_small", "cli", "quickstart"}
    assert names == set(TABLES)
    guide = (EXAMPLES / "guides" / "other_tasks.md").read_text()
    for name in names:
        assert f"(../{name}.py)" in guide, name
        assert f"python examples/{name}.py\n" in (EXAMPLES / f"{name}.py").read_text(), name


def test_text(run):
    printed, module = run("text_batches")
    check_table("text_batches", printed)
    (tokens, starts), targets = module.collate([(torch.tensor([5, 6, 7]), 1), (torch.tensor([8]), 0)])
    assert tokens.tolist() == [5, 6, 7, 8]
    assert starts.tolist() == [0, 3]
    assert targets.tolist() == [1, 0]
    scores = CLDScores.load("runs/text/cld-scores.npz")
    assert scores.num_classes == len(module.PACKAGES)


def test_regression(run):
    printed, module = run("regression")
    check_table("regression", printed)
    logged = LossTrajectories.load("runs/regression/cld-trajectories.npz")
    assert logged.train_classes is None
    # At theta_0 the outputs are near zero, so the losses are near the squared targets.
    targets = torch.stack([target for _, target in module.Patients(0).train])
    assert torch.corrcoef(torch.stack([logged.train_losses[0], targets**2]))[0, 1] > 0.9


def test_multilabel(run):
    printed, module = run("multilabel")
    check_table("multilabel", printed)
    images, present, left = module.Pairs(0).train.tensors
    assert images.shape == (1200, 8, 16)
    assert set(present.sum(1).tolist()) == {1, 2}
    assert present.gather(1, left[:, None]).all()
    assert LossTrajectories.load("runs/multilabel/cld-trajectories.npz").train_classes is None
    grouped = CLDScores.load("runs/multilabel/grouped.npz")
    assert torch.equal(grouped.classes, left)


def test_dictionaries(run):
    printed, module = run("dict_batches")
    check_table("dict_batches", printed)
    listed, caught, wrong = map(int, re.search(r"Of (\d+) suspects (\d+) .*; (\d+) labels are", printed).groups())
    assert wrong == 229
    assert caught <= min(listed, wrong)
    data = module.Digits(0)
    scores = CLDScores.load("runs/dict/cld-scores.npz")
    assert scores.classes.tolist() == [record["labels"] for record in data.train]
    assert len(scores.suspects()) == listed
    assert int(data.wrong[scores.suspects()].sum()) == caught


def test_fabric(run):
    check_table("fabric_loop", run("fabric_loop")[0])


def test_a_plain_loop(run):
    check_table("plain_loop", run("plain_loop")[0])


def test_an_image_folder_by_the_command_in_the_docs(tmp_path):
    command = [sys.executable, str(EXAMPLES / "image_folder.py"), *TINY]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    check_table("image_folder", result.stdout)
    assert result.stderr == ""  # no warning, for example about an augmented train set
    folders = tmp_path / "runs" / "image_folder"
    assert len(list(folders.glob("t*/*/*.png"))) == 1000
    scores = CLDScores.load(folders / "cld-scores.npz")
    assert scores.num_classes == 10
    labels = load_digits().target[:1000][[number for number in range(1000) if number % 4]]
    assert torch.bincount(scores.classes).tolist() == [round(0.85 * int((labels == c).sum())) for c in range(10)]


def test_the_spread_is_over_the_seeds(capsys):
    small = importlib.import_module("_small")
    small.print_table("points", [("a", 1200, 1.0), ("b", 5, 7.0), ("a", 1200, 4.0)])
    printed = capsys.readouterr().out
    assert rows(printed) == {"a": (1200, 2.5), "b": (5, 7.0)}
    assert "a                       1,200   2.50 +- 2.12\n" in printed


def test_shares_are_printed_in_percent(capsys):
    small = importlib.import_module("_small")
    small.print_table("accuracy", [("a", 5, 0.25), ("a", 5, 0.75)], percent=True)
    header, row = capsys.readouterr().out.splitlines()
    assert header.endswith("   accuracy (%)")
    assert row.endswith("   50.00 +- 35.36")
