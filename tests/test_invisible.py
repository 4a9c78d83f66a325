"""Watching changes nothing: each way of training is compared bit for bit with and without the callback."""

import random
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, Dataset
from toys import Blobs, Classifier, quiet_trainer

from lightning_cld import CLDCallback


class Seen(DummyLogger):
    """A logger that keeps all metrics except those under `cld/`."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        theirs = {name: value for name, value in metrics.items() if not name.startswith("cld/")}
        if theirs:
            self.logged.append((step, theirs))


class Watched(Classifier):
    """Keeps the labels of its batches, and counts the validation steps, which a sweep must not call."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[int]] = []
        self.validations = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch[1].tolist())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validations += 1
        super().validation_step(batch, batch_idx)


class Frozen(Watched):
    def on_train_start(self) -> None:
        self.net[1].eval()
        for parameter in self.net[1].parameters():
            parameter.requires_grad_(False)


class Manual(Watched):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class DrawsEverywhere(Dataset):
    """Adds noise from the global RNGs of torch, numpy and python at every read."""

    def __init__(self, inner: Dataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        inputs, label = self.inner[index]
        return inputs + 0.1 * torch.randn(4) + 0.1 * np.random.rand() + 0.1 * random.random(), label


class Augmenting(Blobs):
    """Augments in the transfer hook, but only while the Trainer trains."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            return [batch[0] + torch.randn_like(batch[0]), batch[1]]
        assert not self.trainer.training
        return batch


class Drawing(Blobs):
    def __init__(self, **loader: Any) -> None:
        super().__init__(**loader)
        self.train_set = DrawsEverywhere(self.train_set)
        self.val_set = DrawsEverywhere(self.val_set)


class LateValidation(Blobs):
    """Draws from the global RNG when its validation loader is created."""

    def val_dataloader(self) -> DataLoader:
        torch.rand(1)
        return super().val_dataloader()


def own_generator() -> Blobs:
    return Blobs(generator=torch.Generator().manual_seed(11))


WAYS: dict[str, tuple[Callable[[], L.LightningModule], Callable[[], L.LightningDataModule], dict[str, Any]]] = {
    "dropout and batchnorm": (Watched, Blobs, {}),
    "frozen batchnorm": (Frozen, Blobs, {}),
    "not shuffled": (Watched, lambda: Blobs(shuffle=False), {}),
    "workers": (Watched, lambda: Drawing(num_workers=2), {}),
    "persistent workers": (Watched, lambda: Drawing(num_workers=2, persistent_workers=True), {}),
    "own generator": (Watched, own_generator, {}),
    "dataset that draws": (Watched, Drawing, {}),
    "accumulation": (Watched, Blobs, {"accumulate_grad_batches": 2}),
    "bf16-mixed": (Watched, Blobs, {"precision": "bf16-mixed"}),
    "manual optimization": (Manual, Blobs, {}),
    "stochastic weight averaging": (Watched, Blobs, {"callbacks": lambda: [StochasticWeightAveraging(1e-2, 2)]}),
    "augmentation hook": (Watched, Augmenting, {}),
    "late validation": (Watched, LateValidation, {"check_val_every_n_epoch": 2}),
    "overfit_batches": (Watched, Blobs, {"overfit_batches": 2}),
    "limit_train_batches": (Watched, Blobs, {"limit_train_batches": 3}),
    "reload": (Watched, Blobs, {"reload_dataloaders_every_n_epochs": 1}),
    "check_val_every_n_epoch": (Watched, Blobs, {"check_val_every_n_epoch": 3}),
    "val_check_interval": (Watched, Blobs, {"val_check_interval": 0.25}),
    "sanity checking": (Watched, Blobs, {"num_sanity_val_steps": 2}),
    "fast_dev_run": (Watched, Blobs, {"fast_dev_run": True}),
    "no validation loop": (Watched, Blobs, {"limit_val_batches": 0}),
}
if hasattr(lightning_callbacks, "WeightAveraging"):  # since lightning 2.6
    WAYS["weight averaging"] = (Watched, Blobs, {"callbacks": lambda: [lightning_callbacks.WeightAveraging()]})


def train(tmp_path, way: str, watch: bool, **watching: Any) -> dict[str, Any]:
    module, datamodule, arguments = WAYS[way]
    arguments = dict(arguments)
    callbacks: list[Callback] = arguments.pop("callbacks", list)()
    if watch:
        callbacks.insert(0, CLDCallback(dirpath=tmp_path, **watching))
    L.seed_everything(7, verbose=False)
    logger = Seen()
    trainer = quiet_trainer(tmp_path, *callbacks, **{"logger": logger, "log_every_n_steps": 1, **arguments})
    model, data = module(), datamodule()
    trainer.fit(model, datamodule=data)
    generator = data.loader.get("generator")
    return {
        "weights": model.state_dict(),
        "modes": [submodule.training for submodule in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "generator": None if generator is None else generator.get_state(),
        "metrics": trainer.callback_metrics,
        "logged": logger.logged,
        "batches": model.batches,
        "validations": model.validations,
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
    }


def assert_same(plain: Any, watched: Any, what: str) -> None:
    if isinstance(plain, torch.Tensor):
        assert torch.equal(plain, watched), what
    elif isinstance(plain, dict):
        assert plain.keys() == watched.keys(), what
        for name in plain:
            assert_same(plain[name], watched[name], f"{what} {name}")
    else:
        assert plain == watched, what


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore")
def test_training_is_the_same_bit_for_bit(tmp_path, way):
    assert_same(train(tmp_path, way, watch=False), train(tmp_path, way, watch=True), way)


@pytest.mark.parametrize("way", ["dropout and batchnorm", "dataset that draws"])
@pytest.mark.parametrize("watching", [{"history": "running"}, {"cutoff_epoch": "auto"}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_training_is_the_same_however_it_is_watched(tmp_path, way, watching):
    assert_same(train(tmp_path, way, watch=False), train(tmp_path, way, watch=True, **watching), way)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("fast_dev_run",)])
@pytest.mark.filterwarnings("ignore")
def test_every_way_of_training_gives_scores(tmp_path, way):
    train(tmp_path, way, watch=True)
    assert (tmp_path / "cld-scores.npz").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_learning_rate_search_before_fit(tmp_path):
    def search(callbacks):
        L.seed_everything(7, verbose=False)
        model, data = Watched(), Blobs()
        trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=4)
        Tuner(trainer).lr_find(model, datamodule=data, num_training=5)
        trainer.fit(model, datamodule=data)
        return {"weights": model.state_dict(), "torch": torch.get_rng_state(), "lr": model.lr}

    cld = CLDCallback()
    assert_same(search([]), search([cld]), "lr_find")
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_module_is_not_compiled_again(tmp_path):
    graphs: list[Any] = []

    def count(graph, inputs):
        graphs.append([tuple(value.shape) for value in inputs if isinstance(value, torch.Tensor)])
        return graph

    def compiled(watch):
        torch._dynamo.reset()
        graphs.clear()
        L.seed_everything(7, verbose=False)
        model = Watched()
        model.net = torch.compile(model.net, backend=count)
        cld = [CLDCallback(batch_size=50, dirpath=tmp_path)] if watch else []
        # With one shape and one mode, any second graph would come from the sweep.
        trainer = quiet_trainer(tmp_path, *cld, limit_val_batches=0)
        trainer.fit(model, datamodule=Blobs(drop_last=True))
        return {"weights": model.state_dict(), "torch": torch.get_rng_state(), "graphs": len(graphs)}

    assert_same(compiled(watch=False), compiled(watch=True), "compile")


@pytest.mark.filterwarnings("ignore")
def test_the_modules_own_steps_and_metrics_are_not_called_by_a_sweep(tmp_path):
    watched = train(tmp_path, "dropout and batchnorm", watch=True)
    assert watched["validations"] == 4 * 2
    assert len(watched["batches"]) == 4 * 6
