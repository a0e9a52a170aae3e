"""Rotary position embedding in the rotate-half layout: channel i of a head is paired with channel i + D / 2."""
import torch
from torch import Tensor


def composed(x_BHSD: Tensor, cos_B1SD: Tensor, sin_B1SD: Tensor) -> Tensor:
    """`x cos + swapped(x) sin`, in the dtype of `x`; `swapped` exchanges the halves of a head and negates the second."""
    half = x_BHSD.shape[-1] // 2
    swapped = torch.cat([-x_BHSD[..., half:], x_BHSD[..., :half]], dim=-1)
    return x_BHSD * cos_B1SD + swapped * sin_B1SD


def fused(x_BHSD: Tensor, cos_B1SD: Tensor, sin_B1SD: Tensor) -> Tensor:
    """CANN's kernel (`npu_rotary_mul`, mode `half`). MindSpore's is deprecated since 2.9, so its twin has none."""
    import torch_npu

    return torch_npu.npu_rotary_mul(x_BHSD, cos_B1SD, sin_B1SD)
