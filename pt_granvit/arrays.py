"""Conversion between numpy arrays and PyTorch tensors; bfloat16 is `ml_dtypes.bfloat16` in numpy."""
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def to_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A numpy array as a CPU tensor of `dtype`. It is rounded on the host, so the bits are the same for every device."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(dtype)
    return torch.from_numpy(array).to(dtype)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor as a numpy array with the same bits."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()


@torch.no_grad()
def fill(module: nn.Module, tensors: Iterable[tuple[str, np.ndarray | Tensor]], prefix: str = "") -> None:
    """Sets every parameter to the tensor called `prefix` + the parameter's name. numpy arrays are rounded on the host to the
    parameter's dtype.

    Names and parameters must match: `KeyError` for a tensor without a parameter.
    """
    missing = {prefix + name: parameter for name, parameter in module.named_parameters()}
    for name, value in tensors:
        parameter = missing.pop(name)
        parameter.copy_(value if isinstance(value, Tensor) else to_tensor(value, parameter.dtype))
    assert not missing, f"no value for {sorted(missing)[:5]}"


def to_float32_or_wider(x: Tensor) -> Tensor:
    """`x` in float32; float64 stays float64. Norms, softmax and losses are computed in this dtype."""
    return x if x.dtype == torch.float64 else x.float()
