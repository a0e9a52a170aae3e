"""A simulated device: PyTorch's backend for third-party devices, registered as `npu`, over CPU memory.

Its tensors are computed by CPU kernels, but follow the rules of an accelerator: an operator on a host tensor and a device tensor
raises, float64 is not supported, and every wait of the host for a value is recorded. It is called `npu` because `torch_npu`
registers its device in the same way under that name. So the engine runs the same code as on an NPU, with `torch_npu`'s attention.
It cannot show the kernels of a real device: their rounding, and operators that they do not support.
"""
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from parity.documented import torch_npu

_registered = False
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_IN_PLACE_METADATA = {"t_", "transpose_", "unsqueeze_", "squeeze_", "resize_", "set_", "as_strided_", "swapaxes_"}


class DeviceTensor(Tensor):
    """A tensor of the device. `host` is the CPU tensor of the same shape and strides that holds its values."""

    @staticmethod
    def __new__(cls, host: Tensor) -> "DeviceTensor":
        if host.dtype == torch.float64:
            raise TypeError("float64 does not exist on this device")
        return Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, device="npu:0"
        )

    def __init__(self, host: Tensor):
        self.host = host

    def __repr__(self) -> str:
        return f"DeviceTensor({self.host})"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, DeviceTensor):
            raise RuntimeError(f"incompatible tensor type: {value.device} in place of {self.device}")
        Tensor.data.__set__(self, value)
        self.host = value.host

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside `attached`")


class Device(TorchDispatchMode):
    """Runs every operator on host tensors and on device tensors. `reads` has a line for every time the host waited for a value of
    the device: the operator, and the source line that called it."""

    def __init__(self):
        super().__init__()
        self.reads: list[str] = []
        self.deferred: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.raise_deferred()
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        into = kwargs.get("device")
        here = bool(ours) if into is None else torch.device(into).type == "npu"
        if func in _COPIES:
            here = isinstance(args[0], DeviceTensor) if func is torch.ops.aten.copy_.default else here
        elif ours and self._mixes(func, tensors):
            message = f"Expected all tensors to be on the same device, but {func} was given npu:0 and cpu"
            self.deferred = self.deferred or message
            self.raise_deferred()
        if ours and self._waits(func, args, here):
            self.reads.append(f"{func} at {_caller()}")
        if not ours and not here:
            return func(*args, **kwargs)
        assert func.overloadpacket.__name__ not in _IN_PLACE_METADATA, f"the stand-in does not follow {func}"
        if into is not None:
            kwargs = {**kwargs, "device": "cpu"}
        out = func(*tree_map(_host, args), **tree_map(_host, kwargs))
        if func._schema.is_mutable and isinstance(out, Tensor):  # in place: return the argument itself
            return next(tensor for tensor in tensors if _host(tensor) is out)
        return tree_map(lambda leaf: DeviceTensor(leaf) if here and isinstance(leaf, Tensor) else leaf, out)

    def raise_deferred(self) -> None:
        """Raises the error that was found. Inside a backward pass it waits for the end of the pass: there, an exception on a
        device that was registered from Python would end the process."""
        if self.deferred and torch._C._current_graph_task_id() < 0:
            message, self.deferred = self.deferred, None
            raise RuntimeError(message)

    @staticmethod
    def _mixes(func, tensors: list[Tensor]) -> bool:
        """Whether tensors of host and device are mixed. As in PyTorch, pointwise operators may get host tensors without axes."""
        pointwise = torch.Tag.pointwise in func.tags
        return any(not isinstance(tensor, DeviceTensor) and not (pointwise and tensor.ndim == 0) for tensor in tensors)

    @staticmethod
    def _waits(func, args, here: bool) -> bool:
        if func in _COPIES:
            return not here
        if func is torch.ops.aten.index.Tensor:  # with a mask, the host must know the number of true elements
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, DeviceTensor) else leaf


def _caller() -> str:
    frame = sys._getframe(1)
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "backward"


class _Backend(backend_registration._DummyBackendModule):
    """`torch.npu`, as far as it is used."""

    _initialized = True

    def set_device(self, index: int) -> None:
        assert index == 0

    def get_device_properties(self, index: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(total_memory=64 << 30)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def device(self, index: int) -> nullcontext:
        return nullcontext()

    def get_rng_state(self, index: int = 0) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, index: int = 0) -> None:
        pass


class _Hook(backend_registration._DummyPrivateUse1Hook):
    """The device is available only inside `attached`, so that other tests in this process do not find it."""

    attached = False

    def is_available(self) -> bool:
        return _Hook.attached


@contextmanager
def attached() -> Iterator[Device]:
    """Inside the block the device is available, and `runtime.device: npu` runs on it."""
    global _registered
    if not _registered:  # cannot be undone in this process
        backend_registration._setup_privateuseone_for_python_backend("npu", _Backend(), _Hook())
        _registered = True
    with mock.patch.object(_Hook, "attached", True), Device() as device:
        sys.modules["torch_npu"] = torch_npu.module()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) then copies by an operator that `Device` records
        try:
            yield device
            device.raise_deferred()
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            del sys.modules["torch_npu"]
