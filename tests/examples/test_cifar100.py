"""The run of the paper's network: what is trained is what its cells say, and a killed run goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import _runs
import cifar100
from _common import Images
from _networks import NETWORKS, make_network

CLASSES = 5
CELL = {"network": "resnet18", "width": 2, "epochs": 4, "noise": 0.4, "seed": 0}


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    """Images in place of CIFAR-100: 20 of each of five classes, whose brightness tells the class."""
    targets = torch.arange(CLASSES).repeat(20)
    images = (40 * targets[:, None, None, None] + torch.randint(40, (len(targets), 3, 32, 32))).to(torch.uint8)
    monkeypatch.setattr(_runs, "_load", lambda name, root: (Images(images, targets), Images(images, targets)))
    _runs.make_splits.cache_clear()
    yield
    _runs.make_splits.cache_clear()
    cifar100.losses_of.cache_clear()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_small_images_at_any_width(name):
    network = make_network(name, CLASSES, width=4)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, CLASSES)
    widths = [sum(p.numel() for p in make_network(name, CLASSES, width).parameters()) for width in (4, 8)]
    assert 3 < widths[1] / widths[0] < 4.2  # parameters grow with the square of the width


@pytest.mark.parametrize("method", ["everything", "random, anew", "CLD, drawn", "lowest CLD"])
@pytest.mark.parametrize("budget", ["epochs", "steps"])
def test_a_proxy_and_its_targets_are_trained(tmp_path, method, budget):
    row = cifar100.train_proxy(CELL, tmp_path, tmp_path, "32-true")
    assert 0 <= row["accuracy"] <= 100
    folder = cifar100.folder_of(CELL, tmp_path)
    assert cifar100.losses_of(folder).epochs == [0, 1, 2, 3, 4]
    fraction = 1.0 if method == "everything" else 0.3
    target = {**CELL, "target": "vgg16", "budget": budget, "steps": 6 if budget == "steps" else 0}
    found = cifar100.train_target({**target, "fraction": fraction, "method": method}, tmp_path, tmp_path, "32-true")
    assert found["samples"] == round(90 * fraction)  # a tenth of each class is held out
    assert found["taken"] == (6 if budget == "steps" else 4)  # batches are larger than the sets
    assert 0 < found["wrong"] < 1


def test_choices_by_some_checkpoints_are_compared_with_those_by_all(tmp_path):
    cell = {**CELL, "epochs": 8}
    cifar100.train_proxy(cell, tmp_path, tmp_path, "32-true")
    losses = cifar100.losses_of(cifar100.folder_of(cell, tmp_path))
    found = cifar100.compare_choices({**cell, "part": "first half"}, tmp_path)
    chosen = [set(losses.score(cutoff).select(fraction=0.1).tolist()) for cutoff in (None, 4)]
    assert found["checkpoints"] == 5
    assert found["top"] == pytest.approx(len(chosen[0] & chosen[1]) / 9, abs=1e-4)
    row = {name: str(value) for name, value in {**cell, "part": "first half", **found}.items()}
    assert f"| 40% | first half | 5 | {found['spearman']:.2f} |" in cifar100.choices_table(
        [row], cell["width"], cell["epochs"]
    )
    assert len(cifar100.choices_table([row]).splitlines()) == 2  # the head alone


def test_the_table_has_every_method_and_what_everything_gives():
    size = {"width": "16", "epochs": "30"}
    rows = [
        {
            **{**size, "noise": noise, "fraction": kept, "steps": steps},
            **{"target": target, "method": method, "accuracy": accuracy},
        }
        for noise, kept, steps, target, method, accuracy in (
            ("0.0", "0.1", "1056", "resnet18", "random", "20"),
            ("0.0", "0.1", "1056", "resnet18", "random", "24"),
            ("0.0", "0.1", "2112", "resnet18", "random", "29"),
            ("0.0", "0.1", "1056", "vgg16", "random", "7"),
            ("0.4", "0.1", "0", "resnet18", "CLD, drawn", "11"),
            ("0.0", "1.0", "1056", "resnet18", "everything", "31"),
            ("0.0", "1.0", "1056", "vgg16", "everything", "8"),
        )
    ]
    proxies = [{**size, "network": "resnet18", "noise": "0.4", "accuracy": "41"}]
    rows, proxies = ([*of, {**of[0], "width": "64", "accuracy": "99"}] for of in (rows, proxies))
    table = cifar100.table(rows, proxies)
    head = "| trained on | clean, 10%, 1,056 steps | clean, 10%, 2,112 steps | 40% wrong, 10%, all epochs |"
    assert table.splitlines()[0] == head
    assert "| random | 22.0 ± 2.8 | 29.0 |  |" in table
    assert "| CLD, drawn |  |  | 11.0 |" in table
    assert "| everything, as long | 31.0 |  |  |" in table
    assert "| everything, all epochs (the proxy) |  |  | 41.0 |" in table
    assert "99" not in table
    assert "| random | 99.0 |" in cifar100.table(rows, proxies, width=64)
    assert cifar100.table(rows, proxies, "vgg16").splitlines()[2:] == [
        "| random | 7.0 |",
        "| everything, as long | 8.0 |",
    ]


def test_a_killed_run_goes_on_from_its_last_epoch(tmp_path, monkeypatch):
    def killed(self):
        if self.current_epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(cifar100.Recipe, "on_train_epoch_start", killed, raising=False)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cifar100.train_proxy(CELL, tmp_path, tmp_path, "32-true")
    begun = []
    monkeypatch.setattr(cifar100.Recipe, "on_train_epoch_start", lambda self: begun.append(self.current_epoch))
    cifar100.train_proxy(CELL, tmp_path, tmp_path, "32-true")
    assert begun == [2, 3]
    folder = cifar100.folder_of(CELL, tmp_path)
    assert cifar100.losses_of(folder).epochs == [0, 1, 2, 3, 4]
    assert not (folder / "last.ckpt").exists()
