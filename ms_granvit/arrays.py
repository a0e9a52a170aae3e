"""numpy arrays in and out of MindSpore; bfloat16 is `ml_dtypes.bfloat16` in numpy."""
from collections.abc import Iterable

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Parameter, Tensor, nn

DTYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16}
HOST_DTYPES = {ms.float32: np.float32, ms.bfloat16: ml_dtypes.bfloat16, ms.float16: np.float16}


def dtype_on_device(stored: str) -> ms.Type:
    """The dtype called `stored`, or float32 on CPU, where MindSpore computes in no other."""
    return ms.float32 if ms.get_context("device_target") == "CPU" else DTYPES[stored]


def to_tensor(array: np.ndarray, dtype: ms.Type) -> Tensor:
    """A numpy array as a tensor of `dtype`, rounded on the host: to the same bits whatever the device."""
    return Tensor(np.ascontiguousarray(array, HOST_DTYPES[dtype]))


def to_numpy(parameter: Parameter) -> np.ndarray:
    """The reverse of `to_tensor`, bit for bit: a copy on the host."""
    array = parameter.asnumpy()
    return (array.view(ml_dtypes.bfloat16) if parameter.dtype == ms.bfloat16 else array).copy()


def fill(cell: nn.Cell, tensors: Iterable[tuple[str, np.ndarray]], prefix: str = "") -> None:
    """Gives every parameter its value, by its name behind `prefix`, in the dtype that the parameter has."""
    missing = {prefix + parameter.name: parameter for parameter in cell.get_parameters()}
    for name, value in tensors:
        parameter = missing.pop(name)
        parameter.set_data(to_tensor(value, parameter.dtype))
    assert not missing, f"no value for {sorted(missing)[:5]}"
