"""A device for tests: tensors that claim to be on `cuda:0` but lie on the CPU.

Within `FakeCuda()` what is sent to or made on "cuda:0" is a `FakeCudaTensor`. An operation that mixes devices raises
where CUDA would, and all that makes the host wait for the device is counted, with the place in the library that
asked. There is no autograd: a backward pass needs the real device.

What waits, and which devices may mix, is what torch's CUDA kernels do; `test_fake_device.py` lists it.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

import lightning_cld

DEVICE = torch.device("cuda:0")

_PACKAGE = str(Path(lightning_cld.__file__).parent)

# The result is a number of Python's, or has a size that depends on values.
_READS = {"_local_scalar_dense", "equal", "allclose", "is_nonzero", "nonzero", "masked_select", "bincount", "histc"}
_READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}
_COPIES = {"_to_copy", "copy_", "copy"}
_INDEXED = {"index", "_unsafe_index"}
_WRITES_INDEXED = {"index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
_TAKE_HOST_SCALARS = {"where", "fill", "fill_", "masked_fill", "masked_fill_"}


class Wait(NamedTuple):
    """Something that made the host wait for the device.

    Attributes:
        what: The operation, or "copy to the host", "copy to the device".
        place: The innermost file and function of the library that caused it; "" if none did.
        line: The line in that file.
    """

    what: str
    place: str
    line: int


class FakeCudaTensor(Tensor):
    """A tensor that claims to be on `cuda:0`; its values are in `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> FakeCudaTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=DEVICE,
        )
        made.host = host.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"FakeCudaTensor({self.host!r})"

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
            "first."
        )

    def tolist(self) -> list[Any]:
        return self.cpu().tolist()  # torch's own copies likewise, but refuses subclasses

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {}, None)


class FakeCuda(TorchDispatchMode):
    """The device, as a context; `waits` is what the host waited for within it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        # The first use of a CUDA device would look for a driver.
        self._no_driver = mock.patch("torch.cuda._lazy_init")

    def __enter__(self) -> FakeCuda:
        torch._C._ensureCUDADeviceGuardSet()
        self._no_driver.start()
        self._before = torch._C._only_lift_cpu_tensors(), torch.__future__.get_swap_module_params_on_conversion()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device=) copies where a mode sees it
        torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to would keep only the claim
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        lifts, swaps = self._before
        torch._C._set_only_lift_cpu_tensors(lifts)
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        self._no_driver.stop()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {}, self.waits)

    def places(self) -> Counter[str]:
        """How often each place in the library waited."""
        return Counter(f"{wait.place}: {wait.what}" for wait in self.waits)


def _run(operation: Any, args: Any, kwargs: dict[str, Any], waits: list[Wait] | None) -> Any:
    """Runs an operation on the host's memory, as far as CUDA would run it."""
    tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    asked = kwargs.get("device")
    if asked is None:
        onto_device = any(_is_on_device(tensor) for tensor in tensors)
    else:
        onto_device = torch.device(asked).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    name = operation.overloadpacket.__name__
    if name in _COPIES:
        what = _wait_of_copy(name, args, kwargs, onto_device)
    elif any(_is_on_device(tensor) for tensor in tensors):
        what = _wait_of(operation, name, args, kwargs, tensors)
    else:
        what = None
    if what is not None and waits is not None:
        waits.append(Wait(what, *_place()))

    result = operation(*_on_host(args), **_on_host(kwargs))
    written = _written(operation, args, kwargs)
    if written is not None:
        if written.shape != _on_host(written).shape:
            raise NotImplementedError(f"The fake device can't change a shape in place, as {operation} does.")
        return written
    if name == "copy_":
        return args[0]
    return tree_map_only(Tensor, FakeCudaTensor, result) if onto_device else result


def _wait_of(operation: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> str | None:
    """What an operation on the device waits for. Raises if devices mix as CUDA doesn't allow."""
    on_host = [tensor for tensor in tensors if not _is_on_device(tensor)]
    if name == "_pin_memory":
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    if name in _INDEXED or name in _WRITES_INDEXED:
        return _wait_of_indexing(name, args)
    if on_host:
        scalars = torch.Tag.pointwise in operation.tags or name in _TAKE_HOST_SCALARS
        first = _written(operation, args, kwargs)
        if not scalars or any(tensor.ndim > 0 or tensor is first for tensor in on_host):
            raise _mixed()
        # Arithmetic hands a number to its kernel. These move it to the device first.
        return "copy to the device" if name in ("where", "fill", "fill_") else None
    if name in ("masked_fill", "masked_fill_") and isinstance(args[2], Tensor):
        return name
    if name == "isin":
        elements, tests = args[0].numel(), args[1].numel() if isinstance(args[1], Tensor) else 1
        return name if tests >= 10 * elements**0.145 else None  # few are compared one by one, many sorted
    if name == "repeat_interleave":
        return name if kwargs.get("output_size") is None else None
    return name if name in _READS else None


def _wait_of_indexing(name: str, args: Any) -> str | None:
    """The same of `tensor[indices]` and `tensor[indices] = value`."""
    indexed, indices = args[0], [index for index in args[1] if index is not None]
    if not _is_on_device(indexed):
        if any(_is_on_device(index) for index in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        raise _mixed()
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    if name in _WRITES_INDEXED:
        value = args[2]
        accumulate = len(args) > 3 and args[3]
        one_mask = len(masks) == len(indices) == 1 and _is_on_device(masks[0])
        if not _is_on_device(value):
            if value.numel() == 1 and one_mask and not accumulate:
                return None  # a masked fill
            if value.ndim > 0:
                raise _mixed()
            return "copy to the device"
    if masks:
        return "indexing by a mask"
    return None if all(_is_on_device(index) for index in indices) else "copy to the device"


def _wait_of_copy(name: str, args: Any, kwargs: Any, onto_device: bool) -> str | None:
    source = args[0] if name == "_to_copy" else args[1]
    if name != "_to_copy":
        onto_device = _is_on_device(args[0])
    if _is_on_device(source) and not onto_device:
        return "copy to the host"
    blocking = not kwargs.get("non_blocking") and not (name != "_to_copy" and len(args) > 2 and args[2])
    return "copy to the device" if onto_device and not _is_on_device(source) and blocking else None


def _written(operation: Any, args: Any, kwargs: Any) -> Any:
    """The tensor that an operation writes to and returns; None if it returns new ones."""
    for place, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return kwargs[argument.name] if argument.name in kwargs else args[place] if place < len(args) else None
    return None


def _place() -> tuple[str, int]:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            return f"{Path(path).relative_to(_PACKAGE).as_posix()}:{frame.f_code.co_name}", frame.f_lineno
        frame = frame.f_back
    return "", 0


def _on_host(tree: Any) -> Any:
    return tree_map_only(FakeCudaTensor, lambda tensor: tensor.host, tree)


def _is_on_device(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeCudaTensor)


def _mixed() -> RuntimeError:
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
    )
