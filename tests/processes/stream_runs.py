"""Fits on coresets of streams, on two processes: `python stream_runs.py folder`. Each rank saves what it was served."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from toy_streams import SAMPLES, Data, Stream, index_of, scores_of
from toys import quiet_trainer

from lightning_cld import CoresetDataModule

SIZE, BATCH, EPOCHS = 15, 4, 8
DEVICES = 2
CUT = 22
"""The first process reads so many samples, the second the rest."""


class Parts(Data):
    """Gives each process a part of the stream.

    Args:
        parts: The first and the last position, plus one, of each process.
        **loader: As for `Data`.
    """

    def __init__(self, parts: list[tuple[int, int]], **loader: Any) -> None:
        super().__init__(**loader)
        self.parts = parts

    def setup(self, stage: str) -> None:
        first, end = self.parts[self.trainer.global_rank]
        self.stream = Stream(end - first, first)


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.served: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.served.append(batch["index"].tolist())
        return nn.functional.cross_entropy(self.net(batch["inputs"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(root: Path, name: str, parts: list[tuple[int, int]], ckpt_path: Path | None = None, **settings: Any) -> None:
    """A fit whose results are saved under `name`, also if it fails."""
    arguments = {"epoch_length": settings.pop("epoch_length", "coreset"), "identify": index_of}
    data = Watching(Parts(parts, batch_size=BATCH, **settings), scores_of(), size=SIZE, **arguments)
    data.place = root / name
    saved = ModelCheckpoint(root / name, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer(
        root,
        saved,
        Results(root, name),
        max_epochs=EPOCHS,
        devices=DEVICES,
        strategy=DDPStrategy(start_method="fork", timeout=timedelta(seconds=40)),
        enable_checkpointing=True,
    )
    with contextlib.suppress(ProcessRaisedException):  # what went wrong lies in the files of each rank
        trainer.fit(Model(), datamodule=data, ckpt_path=ckpt_path)


class Results(L.Callback):
    """Saves what the model was served when the fit ends."""

    def __init__(self, root: Path, name: str) -> None:
        self.place = root / name

    def on_train_end(self, trainer: L.Trainer, pl_module: Model) -> None:
        save(self.place, trainer.global_rank, served=pl_module.served, length=trainer.num_training_batches, error="")


class Watched:
    """A loader that saves the error that ends it. It waits for the other process, which ends with this one."""

    def __init__(self, loader: Any, place: Path, rank: int) -> None:
        self.loader, self.place, self.rank = loader, place, rank
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        with self.watching():
            batches = iter(self.loader)
        return self.watched(batches)

    def watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        with self.watching():
            yield from batches

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            save(self.place, self.rank, error=f"{type(error).__name__}: {error}")
            deadline = time.monotonic() + 20
            while not all(path_of(self.place, rank).exists() for rank in range(DEVICES)):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            raise


class Watching(CoresetDataModule):
    place: Path

    def train_dataloader(self) -> Any:
        return Watched(super().train_dataloader(), self.place, self.trainer.global_rank)


def path_of(place: Path, rank: int) -> Path:
    return place.with_name(f"{place.name}-{rank}.pt")


def save(place: Path, rank: int, **results: Any) -> None:
    path = path_of(place, rank)
    torch.save(results, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    unequal = [(0, CUT), (CUT, SAMPLES)]
    run(root, "unequal", unequal)
    run(root, "workers", unequal, num_workers=2)
    run(root, "full", unequal, epoch_length="full")
    for step in (3, 4, 9):
        run(root, f"resumed-{step}", unequal, root / "unequal" / f"step={step}.ckpt")
    run(root, "same", [(0, SAMPLES), (0, SAMPLES)])
    run(root, "overlap", [(0, CUT), (CUT - 6, SAMPLES)])
    run(root, "missing", [(0, CUT), (CUT + 6, SAMPLES)])
    run(root, "none", [(0, SAMPLES), (0, 0)])
    run(root, "another", [(0, CUT), (CUT + 20, SAMPLES + 20)])


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    main()
