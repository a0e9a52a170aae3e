"""PyTorch as the selftest sees it (`selftest.calls.Side`): on CPU, CUDA or an NPU."""
import importlib.util
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from bench_kernels import Call

from granvit.kernels import Kernels, Operator
from pt_granvit import distributed
from pt_granvit.arrays import DTYPES, to_numpy
from pt_granvit.ops.table import kernels_for


class Tensors(NamedTuple):
    inputs: list[torch.Tensor]
    cotangent: torch.Tensor
    rest: list[Any]  # mask and constants


class Bound:
    """`selftest.calls.Bound`."""

    def __init__(self, device: str, operator: Operator, function: Callable, mask: Callable | None, call: Call):
        self.device, self.operator, self.function, self.mask = device, operator, function, mask

    def put(self, array: np.ndarray) -> torch.Tensor:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind == "i" else array).to(self.device)

    def tensors(self, call: Call) -> Tensors:
        inputs = [self.put(array) for array in call.arrays]
        for x in inputs[: call.differentiate]:
            x.requires_grad_()
        rest = list(call.constants)
        if self.operator == "attention":
            rest = [self.mask(self.put(call.segments_BS)) if self.mask else None]
        return Tensors(inputs, self.put(call.cotangent), rest)

    def forward(self, tensors: Tensors) -> list[torch.Tensor]:
        if self.operator == "adamw":  # in place
            p, g, m, v = (x.clone() for x in tensors.inputs)
            self.function(p, g, m, v, *tensors.rest)
            return [p, m, v]
        with torch.no_grad():
            return [self.function(*tensors.inputs, *tensors.rest)]

    def both(self, tensors: Tensors) -> list[torch.Tensor]:
        out = self.function(*tensors.inputs, *tensors.rest)
        differentiated = [x for x in tensors.inputs if x.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, differentiated, tensors.cotangent)]


class Torch:
    framework = "torch"

    def __init__(self, device: str):
        """`ValueError` if the device is not there."""
        self.device = distributed.join(device).device
        self.dtypes = ("float32", "bfloat16") if self.device == "cpu" else ("float32", "bfloat16", "float16")
        self.devices = 1 if self.device == "cpu" else getattr(torch, self.device).device_count()

    def kernels(self, dtype: str) -> Kernels:
        return kernels_for(self.device, DTYPES[dtype])

    def bind(self, operator: Operator, function: Callable, mask: Callable | None, call: Call) -> Bound:
        return Bound(self.device, operator, function, mask, call)

    def numpy(self, tensor: torch.Tensor) -> np.ndarray:
        return to_numpy(tensor)

    def wait(self, tensors: Sequence[torch.Tensor]) -> None:
        if self.device != "cpu":
            getattr(torch, self.device).synchronize()

    def product(self, dtype: str, side: int) -> Callable[[], Any]:
        a, b = (torch.rand(side, side, device=self.device).to(DTYPES[dtype]) for _ in range(2))
        return lambda: [a @ b]

    def copy(self, numbers: int) -> Callable[[], Any]:
        source = torch.zeros(numbers, device=self.device)
        target = torch.empty_like(source)
        return lambda: [target.copy_(source)]

    def facts(self) -> dict[str, str]:
        found = {"torch": torch.__version__, "device": self.device, "threads": str(torch.get_num_threads())}
        for name in ("torch_npu", "triton"):
            if importlib.util.find_spec(name):
                found[name] = metadata.version(name)
        if self.device == "cpu":
            return found | {"instruction set": torch.backends.cpu.get_cpu_capability()}
        properties = getattr(torch, self.device).get_device_properties(0)
        found |= {"name": properties.name, "memory": f"{properties.total_memory / 1e9:.1f} GB", "devices": str(self.devices)}
        if self.device == "cuda":
            found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version()),
                      "compute capability": f"{properties.major}.{properties.minor}",
                      "TF32 in products": str(torch.backends.cuda.matmul.allow_tf32)}  # fmt: skip
        return found


def sum_on_devices(device: str, values: np.ndarray) -> np.ndarray:
    """The sum over the ranks by the devices' own library (NCCL, HCCL; gloo on CPU), as gradients are summed."""
    return to_numpy(distributed.all_sum_(torch.from_numpy(values).to(device)))
