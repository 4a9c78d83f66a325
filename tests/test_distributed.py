"""Runs with several processes, each a script of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_cld import CLDScores, LossTrajectories

SCRIPT = """
import sys
import lightning as L
import torch
from torch.utils.data import Subset
from toys import Blobs, Classifier, blobs, quiet_trainer
from lightning_cld import CLDCallback

if __name__ == "__main__":
    devices, root = int(sys.argv[1]), sys.argv[2]
    L.seed_everything(7)
    data = Blobs()
    data.train_set = Subset(data.train_set, range(89))  # a size that does not divide
    cld = CLDCallback(dirpath=root)
    strategy = "ddp_fork" if devices > 1 else "auto"
    trainer = quiet_trainer(root, cld, devices=devices, strategy=strategy, max_epochs=3)
    trainer.fit(Classifier(lr=0.0), datamodule=data)
"""


def run(tmp_path: Path, devices: int) -> Path:
    root = tmp_path / str(devices)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, script, str(devices), root],
        cwd=Path(__file__).parent,
        env={"PYTHONPATH": str(Path(__file__).parent), "PATH": "", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="ddp_fork needs fork")
def test_every_number_of_processes_logs_the_same_losses(tmp_path):
    # The learning rate is 0, but BatchNorm statistics move, and move differently on each rank: only theta_0 is the
    # same for one process and two, and all ranks' samples must be seen with the statistics of one.
    alone, pair = (LossTrajectories.load(run(tmp_path, n) / "cld-trajectories.npz") for n in (1, 2))
    torch.testing.assert_close(alone.train_losses[0], pair.train_losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.val_losses[0], pair.val_losses[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(alone.train_classes, pair.train_classes)
    assert pair.epochs == [0, 1, 2, 3]
    assert pair.train_losses.isfinite().all()
    assert len(CLDScores.load(tmp_path / "2" / "cld-scores.npz")) == 89
