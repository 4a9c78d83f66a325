"""The tests' own device against what CUDA does: which devices may mix, and what makes the host wait."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_cld import cld_scores
from tests.fake_device import DEVICE, FakeCuda
from tests.oracles import losses

SAME_DEVICE = "Expected all tensors to be on the same device|indices should be either on cpu or on the same device"


def values(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def device():
    with FakeCuda() as device:
        yield device


@pytest.fixture
def there(device):
    """`[6, 4]` on the device."""
    there = values(6, 4).to(DEVICE)
    device.waits.clear()
    return there


def test_a_tensor_is_where_it_was_sent_or_made(device):
    sent = [values(3).to("cuda:0"), values(3).cuda(), values(3).to(DEVICE, torch.float64, non_blocking=True)]
    made = [
        torch.zeros(3, device="cuda:0"),
        torch.tensor([1.0, 2.0], device=DEVICE),
        torch.arange(3, device=DEVICE),
        torch.full((3,), 1.0, device=DEVICE),
        torch.randn(3, device=DEVICE),
    ]
    derived = [sent[0] + 1, sent[0][1:], sent[0][None], sent[0].new_ones(2), torch.empty_like(sent[0]), sent[0] > 0]
    for tensor in (*sent, *made, *derived):
        assert tensor.device == DEVICE
        assert tensor.is_cuda
    for tensor in (values(3), sent[0].cpu(), sent[0].to("cpu"), torch.zeros_like(sent[0], device="cpu")):
        assert tensor.device.type == "cpu"


def test_views_share_memory_and_writes_reach_it(there):
    row = there[2]
    row.mul_(0).add_(torch.ones((), device=DEVICE))
    there[0, 1:3] = torch.full((2,), 7.0, device=DEVICE)
    torch.add(there[1], 1, out=there[4])
    got = there.cpu()
    assert got[2].tolist() == [1, 1, 1, 1]
    assert got[0, 1:3].tolist() == [7, 7]
    assert torch.equal(got[4], got[1] + 1)


def test_a_module_moves_there_and_back(device):
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    before = module.state_dict()["0.weight"].clone()
    inputs = values(6, 4)
    with torch.no_grad():
        expected = module.eval()(inputs)
        module.to(DEVICE)
        outputs = module(inputs.to(DEVICE))
    assert all(tensor.device == DEVICE for tensor in (*module.parameters(), *module.buffers(), outputs))
    assert torch.equal(outputs.cpu(), expected)
    assert torch.equal(module.cpu().state_dict()["0.weight"], before)


def test_cuda_is_as_it_was_afterwards():
    with FakeCuda():
        torch.zeros(1, device=DEVICE)
    assert not torch._C._only_lift_cpu_tensors()
    assert not torch.__future__.get_swap_module_params_on_conversion()
    assert torch.tensor([1.0]).device.type == "cpu"


MIXED = {
    "arithmetic": lambda there, here: there + here,
    "one element, but of a dimension": lambda there, here: there + here[:1, :1],
    "comparison": lambda there, here: there > here,
    "into the host's number": lambda there, here: here[0, 0].add_(there[0, 0]),
    "cat": lambda there, here: torch.cat([there, here]),
    "stack": lambda there, here: torch.stack([there, here]),
    "matmul": lambda there, here: there @ here.T,
    "where": lambda there, here: torch.where(there > 0.5, there, here),
    "where, by a mask of the host": lambda there, here: there.where(here > 0.5, 0.0),
    "masked_fill": lambda there, here: there.masked_fill(here > 0.5, 0.0),
    "index_add_": lambda there, here: there.index_add_(0, torch.arange(6, device=DEVICE), here),
    "index_select": lambda there, here: there.index_select(0, torch.arange(3)),
    "gather": lambda there, here: there.gather(0, torch.zeros(1, 4, dtype=torch.int64)),
    "index the host's": lambda there, here: here[torch.arange(3, device=DEVICE)],
    "index the host's by a mask": lambda there, here: here[there > 0.5],
    "write the host's": lambda there, here: here.index_put_((torch.arange(3, device=DEVICE),), here[0]),
    "write values of the host": lambda there, here: there.index_put_((torch.arange(3, device=DEVICE),), here[0]),
    "searchsorted": lambda there, here: torch.searchsorted(there[0], here[0]),
    "isin": lambda there, here: torch.isin(there, here),
    "equal": lambda there, here: torch.equal(there, here),
    "cross_entropy": lambda there, here: F.cross_entropy(there, torch.zeros(6, dtype=torch.int64)),
    "linear": lambda there, here: F.linear(here, there),
    "batch_norm": lambda there, here: F.batch_norm(there, here[0], here[1].abs()),
}


@pytest.mark.parametrize("case", MIXED)
def test_mixed_devices_raise(there, case):
    with pytest.raises(RuntimeError, match=SAME_DEVICE):
        MIXED[case](there, values(6, 4, seed=1))


FREE = {
    "a python number": lambda there: 2.0 * there + 1,
    "a number of the host": lambda there: there * torch.tensor(2.0),
    "where, with a number": lambda there: there.where(there > 0.5, 0.0),
    "masked_fill": lambda there: there.masked_fill(there > 0.5, 0.0),
    "fill by a mask": lambda there: there.__setitem__(there > 0.5, 0.0),
    "fill rows by a mask": lambda there: there.__setitem__(there[:, 0] > 0.5, 0.0),
    "a row": lambda there: there[3].sum(),
    "write a row": lambda there: there.__setitem__(3, there[0]),
    "indices of the device": lambda there: there[torch.arange(3, device=DEVICE)],
    "write at indices": lambda there: there.__setitem__(torch.arange(3, device=DEVICE), there[3:].clone()),
    "sort": lambda there: there.sort(dim=0),
    "argsort": lambda there: there.argsort(dim=0, stable=True),
    "searchsorted": lambda there: torch.searchsorted(there[0].cumsum(0), there[0].contiguous()),
    "isin few": lambda there: torch.isin(there, torch.ones(3, device=DEVICE)),
    "repeat_interleave of a known size": lambda there: torch.repeat_interleave(
        torch.ones(3, dtype=torch.int64, device=DEVICE), output_size=3
    ),
    "send without waiting": lambda there: values(6).to(DEVICE, non_blocking=True),
    "copy without waiting": lambda there: there.copy_(values(6, 4), non_blocking=True),
    "copy on the device": lambda there: there.clone().copy_(there),
    "a dtype": lambda there: there.double(),
    "cross_entropy": lambda there: F.cross_entropy(there, torch.zeros(6, dtype=torch.int64, device=DEVICE)),
    "length and shape": lambda there: (len(there), there.shape, there.numel(), there.is_floating_point()),
}


@pytest.mark.parametrize("case", FREE)
def test_what_waits_for_nothing(device, there, case):
    FREE[case](there)
    assert device.waits == []


WAITS = {
    "item": (lambda there: there[0, 0].item(), ["_local_scalar_dense"]),
    "float": (lambda there: float(there[0, 0]), ["_local_scalar_dense"]),
    "int": (lambda there: int(there[0, 0]), ["_local_scalar_dense"]),
    "bool": (lambda there: bool((there > 2).any()), ["_local_scalar_dense"]),
    "if": (lambda there: 1 if (there > 2).any() else 0, ["_local_scalar_dense"]),
    "an index that is a tensor": (lambda there: there[torch.ones((), dtype=torch.int64, device=DEVICE)], None),
    "equal": (lambda there: torch.equal(there, there), ["equal"]),
    "allclose": (lambda there: torch.allclose(there, there), ["allclose"]),
    "nonzero": (lambda there: there.nonzero(), ["nonzero"]),
    "where of a condition": (lambda there: torch.where(there > 0.5), ["nonzero"]),
    "masked_select": (lambda there: there.masked_select(there > 0.5), ["masked_select"]),
    "a mask as index": (lambda there: there[there > 0.5], ["indexing by a mask"]),
    "values at a mask": (lambda there: there.__setitem__(there > 2, there[0, 0]), ["indexing by a mask"]),
    "masked_fill by a tensor": (lambda there: there.masked_fill(there > 2, there[0, 0]), ["masked_fill"]),
    "unique": (lambda there: there.unique(), ["_unique2"]),
    "bincount": (lambda there: torch.bincount(there[0].long()), ["bincount"]),
    "isin many": (lambda there: torch.isin(there, torch.rand(100, device=DEVICE)), ["isin"]),
    "repeat_interleave": (lambda there: torch.repeat_interleave(there[0].long()), ["repeat_interleave"]),
    "cpu": (lambda there: there.cpu(), ["copy to the host"]),
    "to cpu, also unless it waits": (lambda there: there.to("cpu", non_blocking=True), ["copy to the host"]),
    "to a dtype of the host": (lambda there: there.to("cpu", torch.float64), ["copy to the host"]),
    "tolist": (lambda there: there.tolist(), ["copy to the host"]),
    "copy_ to the host": (lambda there: torch.zeros(6, 4).copy_(there), ["copy to the host"]),
    "write into the host's": (lambda there: torch.zeros(6, 4).__setitem__(0, there[0]), ["copy to the host"]),
    "send": (lambda there: values(6).to(DEVICE), ["copy to the device"]),
    "a list": (lambda there: torch.tensor([1.0, 2.0], device=DEVICE), ["copy to the device"]),
    "copy_ from the host": (lambda there: there.copy_(values(6, 4)), ["copy to the device"]),
    "write a row of the host's": (lambda there: there.__setitem__(0, values(4)), ["copy to the device"]),
    "indices of the host": (lambda there: there[torch.arange(3)], ["copy to the device"]),
    "a list of indices": (lambda there: there[[0, 2]], ["copy to the device"]),
    "a number at indices": (lambda there: there.__setitem__(torch.arange(3, device=DEVICE), 0.0), None),
    "where, with the host's number": (lambda there: torch.where(there > 0.5, there, torch.tensor(0.0)), None),
}


@pytest.mark.parametrize("case", WAITS)
def test_what_makes_the_host_wait(device, there, case):
    call, expected = WAITS[case]
    call(there)
    counted = [wait.what for wait in device.waits if wait.what != "copy to the device" or expected != ["isin"]]
    assert counted == expected if expected else len(counted) == 1


def test_what_cuda_refuses_is_refused(there):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        np.asarray(there)
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        there.pin_memory()


def test_the_results_are_those_of_the_host(there):
    here = values(6, 4)
    for function in (
        lambda t: t.sort(dim=0, stable=True).values,
        lambda t: t.where(t > 0.5, torch.nan).nansum(dim=0),
        lambda t: torch.unique(t.mul(3).long(), return_counts=True)[1],
        lambda t: t[t > 0.5],
        lambda t: t.double().cumsum(1).diff(dim=0),
    ):
        assert torch.equal(function(there).cpu(), function(here))


def test_a_wait_names_the_place_in_the_library(device):
    train, val = losses(5, 6).to(DEVICE), losses(5, 4, 1).to(DEVICE)
    device.waits.clear()
    cld_scores(train, val)
    assert {wait.place for wait in device.waits} >= {"functional/checks.py:distinct"}
    assert all(wait.place and wait.line for wait in device.waits)
    device.waits.clear()
    train.sum().item()
    assert device.waits[0].place == ""
