"""Which of my training data do I really need? Coresets from loss trajectories, as a PyTorch Lightning plugin."""

import sys

from lightning_cld import baselines
from lightning_cld.callback import CLDCallback
from lightning_cld.checkpoints import trajectories_from_checkpoints
from lightning_cld.data.indexed import IndexedDataset
from lightning_cld.datamodule import CoresetDataModule
from lightning_cld.functional.cld import cld_scores
from lightning_cld.functional.selection import proportional_holdout, select_top
from lightning_cld.metric import CLDMetric
from lightning_cld.names import SampleNames
from lightning_cld.scores import CLDScores
from lightning_cld.trajectories import LossTrajectories

__all__ = [
    "CLDCallback",
    "CLDMetric",
    "CLDScores",
    "CoresetDataModule",
    "IndexedDataset",
    "LossTrajectories",
    "SampleNames",
    "baselines",
    "cld_scores",
    "proportional_holdout",
    "select_top",
    "trajectories_from_checkpoints",
]

# Pickled scores, and checkpoints with scores among their hyperparameters, may name modules by their former paths.
for _former, _module in {
    "diagnostics": "functional.diagnostics",
    "fingerprint": "data.fingerprint",
    "selection": "functional.selection",
    "steps": "data.indexed",
}.items():
    sys.modules[f"{__name__}.{_former}"] = sys.modules[f"{__name__}.{_module}"]
