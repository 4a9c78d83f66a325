"""Sweeps of modules in other precisions and memory formats, and of compiled ones, against plain evaluations."""

from __future__ import annotations

import copy
from typing import ClassVar

import lightning as L
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cld import CLDCallback
from tests.toys import Blobs, Classifier, fit, quiet_trainer

CAST = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


class Last(L.Callback):
    """Keeps a copy of the network as it is right before the last sweep."""

    network = None

    def on_train_epoch_end(self, trainer, pl_module):
        self.network = copy.deepcopy(pl_module.net)
        self.state = description(pl_module)


def description(module):
    """Where all weights and buffers are, and their types and strides."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: (each.dtype, each.stride(), each.data_ptr()) for name, each in tensors.items()}


def one_by_one(network, dataset, precision):
    """Losses of single samples under a network in evaluation mode."""
    network.eval()
    losses = []
    with torch.no_grad():
        for inputs, target in (dataset[i] for i in range(len(dataset))):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                logits = network(inputs[None].to(CAST.get(precision, torch.float32)))
            losses.append(F.cross_entropy(logits.float(), target[None]))
    return torch.cat([loss[None] for loss in losses])


def watched(tmp_path, module, data, **arguments):
    cld, last = CLDCallback(), Last()
    _, trained = fit(tmp_path, cld, module, data, callbacks=[last], **arguments)
    return cld.trajectories, last, trained


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_a_sweep_is_as_precise_as_the_run(tmp_path, precision):
    data = Blobs()
    logged, last, module = watched(tmp_path, Classifier, data, precision=precision)
    assert logged.train_losses.dtype == torch.float32
    for row, dataset in ((logged.train_losses[-1], data.train_set), (logged.val_losses[-1], data.val_set)):
        expected = one_by_one(last.network, dataset, precision)
        # Logits of half precision round differently in a batch.
        close = {"rtol": 0.05, "atol": 0.02} if "16" in precision else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(row, expected, **close)
    assert description(module) == last.state
    _, plain = fit(tmp_path, None, Classifier, Blobs(), precision=precision)
    assert_equal(weights(module), weights(plain))


class Images(Classifier):
    formats: ClassVar = []  # of all batches; an attribute of the module itself would be put back after a sweep

    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.net = nn.Sequential(*layers, nn.Linear(8, 3)).to(memory_format=torch.channels_last)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].contiguous(memory_format=torch.channels_last), batch[1]

    def forward(self, images):
        Images.formats.append(images.is_contiguous(memory_format=torch.channels_last))
        return super().forward(images)


def pictures():
    data = Blobs()
    data.train_set, data.val_set = (
        TensorDataset(torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 3)
        for n in (60, 30)
    )
    return data


def test_a_channels_last_module_stays_so_and_gets_such_batches(tmp_path):
    data = pictures()
    Images.formats.clear()
    logged, last, module = watched(tmp_path, Images, data)
    batches = 4 * (4 + 2) + 5 * (4 + 2)  # of training and validation, and of sweeps
    assert Images.formats == [True] * batches
    assert module.net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert description(module) == last.state
    expected = one_by_one(last.network, data.train_set, "32-true")
    torch.testing.assert_close(logged.train_losses[-1], expected, rtol=1e-5, atol=1e-6)
    _, plain = fit(tmp_path, None, Images, pictures())
    assert_equal(weights(module), weights(plain))


def compiled_net():
    module = Classifier()
    module.net = torch.compile(module.net, backend="eager")
    return module


def compiled_in_place():
    module = Classifier()
    module.net.compile(backend="eager")
    return module


def compiled_whole():
    return torch.compile(Classifier(), backend="eager")


@pytest.mark.parametrize("make", [compiled_net, compiled_in_place, compiled_whole])
def test_a_compiled_module_is_swept_and_not_compiled_again(tmp_path, make):
    def graphs(cld, *callbacks):
        torch._dynamo.reset()
        counters.clear()
        L.seed_everything(7, verbose=False)
        trainer = quiet_trainer(tmp_path, *([] if cld is None else [cld]), *callbacks)
        module = make()
        # All training batches have one size, all sweeps another.
        data = Blobs(drop_last=True)
        data.val_dataloader = lambda: DataLoader(data.val_set, 15)
        trainer.fit(module, datamodule=data)
        return trainer.lightning_module, counters["stats"]["unique_graphs"], dict(counters["frames"]), data

    cld, last = CLDCallback(batch_size=11), Last()
    module, *compiled, data = graphs(cld, last)
    plain, *expected, _ = graphs(None)
    assert expected[0] > 0  # it counts
    assert compiled == expected
    assert_equal(weights(module), weights(plain))
    network = getattr(last.network, "_orig_mod", last.network)
    with torch.compiler.set_stance("force_eager"):
        losses = one_by_one(network, data.train_set, "32-true")
    torch.testing.assert_close(cld.trajectories.train_losses[-1], losses, rtol=1e-5, atol=1e-6)
