"""Conversion between numpy arrays and MindSpore tensors; bfloat16 is `ml_dtypes.bfloat16` in numpy."""
from collections.abc import Iterable

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Parameter, Tensor, nn

DTYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16}
HOST_DTYPES = {ms.float32: np.float32, ms.bfloat16: ml_dtypes.bfloat16, ms.float16: np.float16}


def dtype_on_device(stored: str) -> ms.Type:
    """The dtype called `stored`; on CPU always float32, the only dtype in which MindSpore computes there."""
    return ms.float32 if ms.get_context("device_target") == "CPU" else DTYPES[stored]


def to_tensor(array: np.ndarray, dtype: ms.Type) -> Tensor:
    """A numpy array as a tensor of `dtype`. It is rounded on the host, so the bits are the same for every device."""
    return Tensor(np.ascontiguousarray(array, HOST_DTYPES[dtype]))


def to_numpy(parameter: Parameter) -> np.ndarray:
    """A copy of a tensor as a numpy array with the same bits."""
    array = parameter.asnumpy()
    return (array.view(ml_dtypes.bfloat16) if parameter.dtype == ms.bfloat16 else array).copy()


def fill(cell: nn.Cell, tensors: Iterable[tuple[str, np.ndarray]], prefix: str = "") -> None:
    """Sets every parameter to the tensor called `prefix` + the parameter's name, rounded on the host to the parameter's dtype.

    Names and parameters must match: `KeyError` for a tensor without a parameter.
    """
    missing = {prefix + parameter.name: parameter for parameter in cell.get_parameters()}
    for name, value in tensors:
        parameter = missing.pop(name)
        parameter.set_data(to_tensor(value, parameter.dtype))
    assert not missing, f"no value for {sorted(missing)[:5]}"
