"""Layer normalisation over the last axis: `(x - mean) / sqrt(variance + eps) * weight + bias` in float32, in the dtype of `x`."""
import torch.nn.functional as F
from torch import Tensor

from pt_granvit.arrays import to_float32_or_wider


def composed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PyTorch's operator."""
    h = to_float32_or_wider(x)
    return F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), bias.to(h.dtype), eps).to(x.dtype)
