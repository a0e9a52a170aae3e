"""RMS normalisation: `x / sqrt(mean(x^2) + eps) * weight` over the last axis, computed in float32, in the dtype of `x`."""
import torch
from torch import Tensor

from pt_granvit.arrays import to_float32_or_wider


def composed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula, in ordinary operators."""
    h = to_float32_or_wider(x)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * weight.to(h.dtype)).to(x.dtype)


def fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """CANN's kernel. The weight is rounded to the dtype of `x`, as the MindSpore twin's must be."""
    import torch_npu

    return torch_npu.npu_rms_norm(x, weight.to(x.dtype), eps)[0]
