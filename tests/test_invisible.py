"""Watching changes nothing: each way of training is compared bit for bit with and without the callback."""

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.ao import quantization
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, Dataset
from toys import CLASSES, Blobs, Classifier, quiet_trainer

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


class Held(Callback):
    """Keeps what the module holds after each sweep; to come after the callback."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(held(pl_module))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(held(pl_module))


def held(value: Any) -> Any:
    """A copy, in plain values, of what a module or a container holds."""
    if isinstance(value, nn.Module):
        return {
            name: len(inner) if name.endswith("_hooks") else held(inner)  # they are numbered on from fit to fit
            for name, inner in vars(value).items()
        }
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return {name: held(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [type(value).__name__, *map(held, value)]
    if isinstance(value, set):
        return sorted(map(repr, value))
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__


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


# What a forward pass can write


class InTrainMode(Watched):
    """Is evaluated in train mode, as models that return losses only there must be."""

    def cld_step(self, batch: Any) -> Any:
        self.net.train()
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none"), batch[1]


class FrozenInTrainMode(InTrainMode, Frozen):
    pass


class Quantized(Watched):
    def __init__(self) -> None:
        super().__init__()
        self.net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        quantization.prepare_qat(self.net.train(), inplace=True)


class Normed(InTrainMode):
    """Its weights are divided by norms that passes in train mode estimate."""

    def __init__(self, of: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        of(self.net[0])


class Scripted(InTrainMode):
    def __init__(self) -> None:
        super().__init__()
        self.net[1] = torch.jit.script(self.net[1])


class Hidden(Watched):
    """Has a BatchNorm that is not registered, so that nobody puts it into evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = [nn.BatchNorm1d(4)]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norms[0](inputs))


class Measured(Watched):
    """Updates a metric in every forward pass, and logs it at the end of the epoch."""

    def __init__(self, metric: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.metric = metric()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(inputs)
        self.measure(outputs.detach())
        return outputs

    def measure(self, outputs: torch.Tensor) -> None:
        self.metric(outputs.mean())

    def on_train_epoch_end(self) -> None:
        value = self.metric.compute()
        self.log_dict(value if isinstance(value, dict) else {"metric": value.mean()})
        self.metric.reset()


class Classified(Measured):
    def measure(self, outputs: torch.Tensor) -> None:
        self.metric.update(outputs, outputs.argmin(1))


def compositional() -> nn.Module:
    return torchmetrics.MeanMetric() / (torchmetrics.MaxMetric() + 1)


def collection() -> nn.Module:
    metrics = torchmetrics.classification
    return torchmetrics.MetricCollection(
        [metrics.MulticlassAccuracy(CLASSES), metrics.MulticlassPrecision(CLASSES), metrics.MulticlassAUROC(CLASSES)]
    )


class Writes(Watched):
    """Does to itself what `write` says, before each forward pass."""

    def write(self, inputs: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(self.write(inputs))


class Averages(Writes):
    """Moves a running mean, in a new buffer each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def write(self, inputs: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0)
        return inputs - self.mean


class KeepsTensors(Writes):
    """Sums its inputs in attributes that are tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.rebound, self.moved, self.grown = torch.zeros(4, 4).unbind()
        self.pair = (torch.zeros(4), [torch.zeros(4)])
        self.cache = {"sums": {"all": torch.zeros(4)}}

    def write(self, inputs: torch.Tensor) -> torch.Tensor:
        total = inputs.sum(0)
        self.written += total
        self.rebound = self.rebound + total
        self.moved.data = self.moved + total
        self.grown = torch.cat([self.grown, total])
        self.pair[0].add_(total)
        self.pair[1][0].add_(total)
        self.pair[1].append(total)
        self.cache["sums"]["all"] += total
        self.cache["last"] = total
        return inputs + 1e-3 * (self.written + self.moved + self.grown[-4:] + self.pair[0] + self.cache["sums"]["all"])


class KeepsCounts(Writes):
    """Counts in attributes that are numbers, strings, containers and arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.said, self.warned, self.largest = 0, "none", False, None
        self.sizes, self.recent, self.kinds = [], deque(maxlen=3), set()
        self.by_size: dict[int, list[int]] = {}
        self.counts = np.zeros(20, dtype=int)

    def write(self, inputs: torch.Tensor) -> torch.Tensor:
        size = len(inputs)
        self.passes += 1
        self.said, self.warned, self.largest = f"pass {self.passes}", True, float(inputs.max())
        self.sizes.append(size)
        self.recent.append(self.passes)
        self.kinds.add((size, self.training))
        self.by_size.setdefault(size, []).append(self.passes)
        self.counts[size] += 1
        return inputs / (1 + 1e-3 * self.passes)


class Draws(Writes):
    """Draws noise from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.torch, self.numpy, self.python = torch.Generator(), np.random.default_rng(0), random.Random(0)

    def write(self, inputs: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(4, generator=self.torch)
        return inputs + 0.1 * (noise + self.numpy.normal() + self.python.random())


class Adds(Writes):
    """Makes in its first pass what it needs."""

    def write(self, inputs: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "scale"):
            self.scale = torch.rand(())
            self.first = nn.Linear(4, 4)
            self.shift = nn.Parameter(torch.randn(4))
            self.register_buffer("offset", torch.randn(4))
            self.first.register_forward_hook(lambda module, inputs, outputs: outputs * self.scale)
        return self.first(inputs) + self.shift + self.offset


class Clips(Writes):
    """Bounds the norm of its weights, as constrained layers do."""

    def write(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = self.net[0].weight
        weight.data = torch.renorm(weight.data, 2, 0, maxnorm=0.5)
        return inputs


class Fails(KeepsCounts):
    """Fails in the middle of a sweep after the second epoch, in train mode and with its own `log` at work."""

    def cld_step(self, batch: Any) -> Any:
        self.net.train()
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        if self.current_epoch == 1 and len(self.sizes) % 3 == 0:
            raise RuntimeError("in the middle")
        return losses, batch[1]


WRITERS: dict[str, Callable[[], L.LightningModule]] = {
    "batchnorm in train mode": InTrainMode,
    "frozen batchnorm in train mode": FrozenInTrainMode,
    "quantization observers": Quantized,
    "spectral norm": partial(Normed, parametrizations.spectral_norm),
    "spectral norm by hook": partial(Normed, nn.utils.spectral_norm),
    "weight norm by hook": partial(Normed, nn.utils.weight_norm),
    "scripted batchnorm": Scripted,
    "hidden batchnorm": Hidden,
    "metric with sums": partial(Measured, torchmetrics.MeanMetric),
    "metric with lists": partial(Measured, torchmetrics.CatMetric),
    "metric of metrics": partial(Measured, compositional),
    "collection of metrics": partial(Classified, collection),
    "buffer bound anew": Averages,
    "tensors": KeepsTensors,
    "counts": KeepsCounts,
    "own generators": Draws,
    "attributes made in the pass": Adds,
    "weights bound anew": Clips,
    "error in the middle": Fails,
}

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
    **{name: (module, Blobs, {}) for name, module in WRITERS.items()},
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
    logger, after = Seen(), Held()
    callbacks.append(after)
    trainer = quiet_trainer(tmp_path, *callbacks, **{"logger": logger, "log_every_n_steps": 1, **arguments})
    model, data = module(), datamodule()
    trainer.fit(model, datamodule=data)
    generator = data.loader.get("generator")
    return {
        "weights": model.state_dict(),
        "held": after.seen,
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
    elif isinstance(plain, list):
        assert len(plain) == len(watched), what
        for place, (own, other) in enumerate(zip(plain, watched, strict=True)):
            assert_same(own, other, f"{what} {place}")
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


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("fast_dev_run", "error in the middle")])
@pytest.mark.filterwarnings("ignore")
def test_every_way_of_training_gives_scores(tmp_path, way):
    train(tmp_path, way, watch=True)
    assert (tmp_path / "cld-scores.npz").exists()


def test_the_error_in_the_middle_does_happen(tmp_path):
    with pytest.warns(UserWarning, match="after 2 epochs could not be logged: in the middle"):
        train(tmp_path, "error in the middle", watch=True)


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
