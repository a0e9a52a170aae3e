"""Layer normalisation over the last axis: `(x - mean) / sqrt(variance + eps) * weight + bias` in float32, in the dtype of `x`."""
import mindspore as ms
from mindspore import Tensor, ops


def composed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """MindSpore's operator."""
    weight, bias = ops.cast(weight, ms.float32), ops.cast(bias, ms.float32)
    return ops.cast(ops.LayerNorm(-1, -1, eps)(ops.cast(x, ms.float32), weight, bias)[0], x.dtype)
