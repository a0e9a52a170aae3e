"""numpy arrays in and out of PyTorch; bfloat16 is `ml_dtypes.bfloat16` in numpy."""
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def to_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A numpy array as a tensor of `dtype` on the host, rounded there: to the same bits whatever the device."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(dtype)
    return torch.from_numpy(array).to(dtype)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The reverse of `to_tensor`, bit for bit: a copy on the host."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()


@torch.no_grad()
def fill(module: nn.Module, tensors: Iterable[tuple[str, np.ndarray | Tensor]], prefix: str = "") -> None:
    """Gives every parameter its value, by its name behind `prefix`, in the dtype that the parameter has; rounded on the host,
    to the same bits whatever the device."""
    missing = {prefix + name: parameter for name, parameter in module.named_parameters()}
    for name, value in tensors:
        parameter = missing.pop(name)
        parameter.copy_(value if isinstance(value, Tensor) else to_tensor(value, parameter.dtype))
    assert not missing, f"no value for {sorted(missing)[:5]}"
