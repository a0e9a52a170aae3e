"""MindSpore as the selftest sees it (`selftest.calls.Side`): on CPU or an NPU, in graph mode."""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import bench_kernels
import mindspore as ms
import numpy as np
from bench_kernels import Call
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from granvit.kernels import Kernels, Operator
from ms_granvit import distributed
from ms_granvit.arrays import DTYPES, to_numpy
from ms_granvit.ops.table import kernels_for


class Tensors(NamedTuple):
    inputs: list[Tensor]  # with the mask
    cotangent: Tensor


def plus_one(x: Tensor) -> Tensor:
    return x + 1.0


class Update(nn.Cell):
    """A step of AdamW on four parameters, in place."""

    def __init__(self, move: Callable, parameters: ParameterTuple, constants: tuple):
        super().__init__(auto_prefix=False)
        self.move, self.parameters, self.constants = move, parameters, constants

    def construct(self) -> Tensor:
        return self.move(*self.parameters, *self.constants)


class Bound:
    """`selftest.calls.Bound`. The graphs are compiled when they are first called, and not again for other arrays."""

    def __init__(self, cells: bench_kernels.MindSpore, operator: Operator, function: Callable, mask: Callable | None, call: Call):
        constants, self.mask, self.updated = call.constants, cells.Forward(mask, ()) if mask else None, None
        if operator == "attention":
            constants = () if mask else (None,)
        if operator == "adamw":
            scale, *changing = (Tensor(c, ms.float32) for c in (1.0, *constants[:3]))
            names = ("parameter", "gradient", "first_moment", "second_moment")
            self.updated = ParameterTuple(Parameter(Tensor(x), name=name) for name, x in zip(names, call.arrays, strict=True))
            self.cell = Update(function, self.updated, (scale, *changing, *constants[3:]))
        else:
            self.cell = cells.Forward(function, constants)
        positions = tuple(range(1, call.differentiate + 1))
        self.differentiate = ms.value_and_grad(cells.Both(self.cell), positions, None, has_aux=True) if positions else None

    def tensors(self, call: Call) -> Tensors:
        inputs = [Tensor(array) for array in call.arrays]
        if self.updated is not None:
            for parameter, value in zip(self.updated, inputs, strict=True):
                parameter.set_data(value)
            return Tensors([], Tensor(call.cotangent))
        if self.mask is not None:
            inputs.append(self.mask(Tensor(call.segments_BS)))
        return Tensors(inputs, Tensor(call.cotangent))

    def forward(self, tensors: Tensors) -> list[Tensor]:
        out = self.cell(*tensors.inputs)
        if self.updated is None:
            return [out]
        out.asnumpy()  # the step is done
        p, _, m, v = self.updated
        return [p, m, v]

    def both(self, tensors: Tensors) -> list[Tensor]:
        (_, out), gradients = self.differentiate(tensors.cotangent, *tensors.inputs)
        return [out, *(gradients if isinstance(gradients, tuple) else (gradients,))]


class MindSpore:
    framework = "mindspore"

    def __init__(self, device: str):
        """`ValueError` if the device is not there."""
        self.device = distributed.join(device).device  # before ms_granvit.ops.native is imported
        self.cells = bench_kernels.MindSpore()
        self.dtypes = ("float32",) if self.device == "cpu" else ("float32", "bfloat16", "float16")
        self.devices = 1 if self.device == "cpu" else ms.device_context.ascend.device_count()

    def kernels(self, dtype: str) -> Kernels:
        return kernels_for(self.device, DTYPES[dtype])

    def bind(self, operator: Operator, function: Callable, mask: Callable | None, call: Call) -> Bound:
        return Bound(self.cells, operator, function, mask, call)

    def numpy(self, tensor: Tensor) -> np.ndarray:
        return to_numpy(tensor)

    def wait(self, tensors: Sequence[Tensor]) -> None:
        if self.device == "cpu":  # `synchronize` is for devices only
            for tensor in tensors:
                tensor.asnumpy()
        else:
            ms.runtime.synchronize()

    def product(self, dtype: str, side: int) -> Callable[[], Any]:
        rng = np.random.default_rng(0)
        a, b = (Tensor(rng.random((side, side), np.float32)).astype(DTYPES[dtype]) for _ in range(2))
        cell = self.cells.Forward(ops.matmul, ())
        return lambda: [cell(a, b)]

    def copy(self, numbers: int) -> Callable[[], Any]:
        source, cell = Tensor(np.zeros(numbers, np.float32)), self.cells.Forward(plus_one, ())
        return lambda: [cell(source)]

    def facts(self) -> dict[str, str]:
        found = {"mindspore": ms.__version__, "device": self.device}
        if self.device == "npu":
            properties = ms.hal.get_device_properties(0)
            found |= {"name": ms.hal.get_device_name(0), "memory": f"{properties.total_memory / 1e9:.1f} GB",
                      "devices": str(self.devices)}  # fmt: skip
        return found


def sum_on_devices(device: str, values: np.ndarray) -> np.ndarray:
    """The sum over the ranks by the devices' own library (HCCL; MindSpore's own on CPU), as gradients are summed."""
    return distributed.AllSum()(Tensor(values)).asnumpy()
