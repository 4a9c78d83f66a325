"""A proxy, its scores and a coreset, with the installed package alone; see `.ci/package`."""

import logging
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_cld
from lightning_cld import CLDCallback, CoresetDataModule

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
package = Path(lightning_cld.__file__).resolve().parent
if not package.is_relative_to(Path(sys.argv[1]).resolve()):
    sys.exit(f"This tests {package}, not the installed wheel.")
if not (package / "py.typed").exists():
    sys.exit("py.typed is not installed: type checkers will ignore the annotations.")


class Line(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Points(L.LightningDataModule):
    points = TensorDataset(torch.linspace(-1, 1, 20)[:, None], torch.arange(20) // 10)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.points, 4, shuffle=True)

    def cld_val_dataloader(self) -> DataLoader:
        return DataLoader(self.points, 4)


quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
cld = CLDCallback(dirpath="proxy")
L.Trainer(max_epochs=4, accelerator="cpu", callbacks=[cld], **quiet).fit(Line(), datamodule=Points())
coreset = CoresetDataModule(Points(), "proxy/cld-scores.npz", per_class=2)
L.Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(Line(), datamodule=coreset)
if len(coreset.train_dataloader().dataset) != 4:
    sys.exit("The coreset does not have two samples of each class.")
print("the installed wheel works")
