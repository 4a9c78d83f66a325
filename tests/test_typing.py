"""A user's mypy sees our annotations: right use passes, and every ignore on wrong use is needed."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import lightning_cld

pytest.importorskip("mypy", reason="mypy is not needed to use or to test the rest; .ci/run has it")

SNIPPET = """
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import CrossEntropyLoss
from typing_extensions import assert_type

from lightning_cld import (
    CLDCallback,
    CLDMetric,
    CLDScores,
    CoresetDataModule,
    LossTrajectories,
    baselines,
    cld_scores,
    plotting,
    proportional_holdout,
    select_top,
    trajectories_from_checkpoints,
)


def step(module: L.LightningModule, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    return batch["losses"], None


def use(data: L.LightningDataModule, model: L.LightningModule, losses: Tensor) -> None:
    cld = CLDCallback(cutoff_epoch="auto", history="full", loss_fn=CrossEntropyLoss(reduction="none"), dirpath="runs")
    trainer = L.Trainer(callbacks=[cld])
    CLDCallback(step=step)
    trajectories_from_checkpoints(trainer, model, ["a.ckpt"], datamodule=data, step=lambda module, batch: (batch, None))
    assert_type(cld.scores, CLDScores)
    assert_type(cld.trajectories, LossTrajectories)
    assert_type(cld.scores.select(fraction=0.1, rule="draw"), Tensor)
    assert_type(cld.trajectories.score(by=partial(baselines.random_values, seed=0)), CLDScores)
    assert_type(CoresetDataModule(data, "runs/cld-scores.npz", fraction=0.1, epoch_length="full").indices, list[int])
    assert_type(CoresetDataModule(data, [1, 2]).scores, CLDScores | None)
    CoresetDataModule(data, {"labelled": "runs/cld-scores.npz", "other": None}, size=3)
    assert_type(trajectories_from_checkpoints(trainer, model, ["a.ckpt"], datamodule=data), LossTrajectories)
    assert_type(select_top(cld_scores(losses, losses), size=2), Tensor)
    assert_type(proportional_holdout(losses, 0.1, seed=0), tuple[Tensor, Tensor])
    assert_type(proportional_holdout(["cat", "dog"], 0.1), tuple[Tensor, Tensor])
    array = np.zeros(4, dtype=np.uint8)
    CLDScores(np.ma.masked_less(array.astype(float), 0), array, plausibility=[0.1, 0.2])
    LossTrajectories([losses, losses], [array, array], array, [0, 1])
    CLDMetric(array, [0, 1])
    select_top(losses, array, size=2)
    cld_scores(losses, losses, array, array)
    assert_type(CLDMetric().compute(), Tensor)
    assert_type(plotting.plot_scores(cld.scores, fraction=0.1, classes=[3]), tuple[Figure, np.ndarray])
    assert_type(plotting.plot_agreement(cld.trajectories), tuple[Figure, Axes])
    assert_type(cld.scores.to_csv("scores.csv"), Path | str)
    assert_type(cld.scores.report("report.html", trajectories=cld.trajectories), Path | str)

    CLDScores([0.1], ["cat"])  # type: ignore[list-item]
    select_top([0.1], size=1)  # type: ignore[arg-type]
    CLDCallback(cutof_epoch=3)  # type: ignore[call-arg]
    CLDCallback(cutoff_epoch="soon")  # type: ignore[arg-type]
    CLDCallback(history="short")  # type: ignore[arg-type]
    CLDCallback(step=0.5)  # type: ignore[arg-type]
    CLDCallback(loss_fn=0.5)  # type: ignore[arg-type]
    CoresetDataModule(model, "runs/cld-scores.npz")  # type: ignore[arg-type]
    CoresetDataModule(data, cld, size=3)  # type: ignore[arg-type]
    CoresetDataModule(data, [1], rule="best")  # type: ignore[arg-type]
    cld.scores.selekt(fraction=0.1)  # type: ignore[attr-defined]
    baselines.variability(losses)  # type: ignore[arg-type]
    plotting.plot_scores(cld.scores, classes=3)  # type: ignore[arg-type]
    cld.scores.to_csv("scores.csv", "images")  # type: ignore[arg-type]
    plotting.plot_agreement(cld.scores)  # type: ignore[arg-type]
    cld.scores.report("report.html", trajectories="losses.npz")  # type: ignore[arg-type]
"""


def test_a_users_mypy_sees_the_annotations(tmp_path):
    # mypy must find the package as installed, because only then does py.typed matter.
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    (purelib / "lent.pth").write_text(f"{Path(lightning_cld.__file__).parents[1]}\n{sysconfig.get_path('purelib')}\n")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    # Reuse the checkout's cache, which may hold torch already.
    cache = Path(__file__).parent.parent / ".mypy_cache"
    options = [
        "--strict",
        "--config-file=",
        "--no-error-summary",
        f"--python-executable={python}",
        f"--cache-dir={cache}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "snippet.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
