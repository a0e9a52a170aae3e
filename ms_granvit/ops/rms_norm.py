"""RMS normalisation: `x / sqrt(mean(x^2) + eps) * weight` over the last axis, computed in float32, in the dtype of `x`."""
import mindspore as ms
from mindspore import Tensor, nn, ops


class UnitRMS(nn.Cell):
    """`y = x r` with `r = 1 / sqrt(mean(x^2) + eps)` over the last axis, in float32. Returns `y` and `r`.

    The gradient, `r (dy - y mean(dy y))`, is written by hand because it takes fewer kernels than the derived one. With
    `by_product` the mean is a matrix product with a vector of 1 / width.
    """

    def __init__(self, by_product: bool):
        super().__init__()
        self.by_product, self.product, self.reduction = by_product, ops.MatMul(), ops.ReduceMean(keep_dims=True)

    def mean(self, x: Tensor) -> Tensor:
        if not self.by_product:
            return self.reduction(x, -1)
        width = x.shape[-1]
        shares = ops.full((width, 1), 1 / width, dtype=ms.float32)
        return self.product(x.reshape(-1, width), shares).reshape((*x.shape[:-1], 1))

    def construct(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        r = ops.rsqrt(self.mean(ops.square(x)) + eps)
        return x * r, r

    def bprop(self, x, eps, outputs, gradients):
        y, r = outputs
        dy, _ = gradients
        return r * (dy - y * self.mean(dy * y)), 0.0


UNIT, UNIT_BY_PRODUCT = UnitRMS(False), UnitRMS(True)


def composed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`UnitRMS` with a reduction."""
    return weighted(UNIT(ops.cast(x, ms.float32), eps)[0], weight, x.dtype)


def product(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`UnitRMS` with a matrix product: MindSpore's reductions over the last axis take 4 ns an element on CPU."""
    return weighted(UNIT_BY_PRODUCT(ops.cast(x, ms.float32), eps)[0], weight, x.dtype)


def weighted(y: Tensor, weight: Tensor, dtype: ms.Type) -> Tensor:
    return ops.cast(y * ops.cast(weight, ms.float32), dtype)


def fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """CANN's kernel. It takes the weight in the dtype of `x`, to which a float32 weight is rounded."""
    return ops.rms_norm(x, ops.cast(weight, x.dtype), eps)[0]
