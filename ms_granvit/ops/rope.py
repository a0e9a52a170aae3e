"""Rotary position embedding in the rotate-half layout: channel i of a head is paired with channel i + D / 2."""
from mindspore import Tensor, ops


def composed(x_BHSD: Tensor, cos_B1SD: Tensor, sin_B1SD: Tensor) -> Tensor:
    """`x cos + swapped(x) sin`, in the dtype of `x`; `swapped` exchanges the halves of a head and negates the second."""
    half = x_BHSD.shape[-1] // 2
    swapped = ops.cat((-x_BHSD[..., half:], x_BHSD[..., :half]), -1)
    return x_BHSD * cos_B1SD + swapped * sin_B1SD
