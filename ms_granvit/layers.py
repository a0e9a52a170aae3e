"""Building blocks with the canonical parameter names. Every forward pass casts the weights to the dtype of the activations, so
float32 master weights can be used in a bfloat16 forward pass. Norms compute in float32."""
from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from ms_granvit.taps import Module

_stored_as = ms.float32


@contextmanager
def stored_as(dtype: ms.Type) -> Iterator[None]:
    """Parameters that are created inside the block have this dtype. (MindSpore allocates their memory when they are created.)"""
    global _stored_as
    before, _stored_as = _stored_as, dtype
    try:
        yield
    finally:
        _stored_as = before


def parameter(*shape: int) -> Parameter:
    """A parameter whose values are set later (`ms_granvit.arrays.fill`); float32 unless created inside `stored_as`. MindSpore
    names it after the attribute that it is assigned to."""
    return Parameter(initializer("zeros", shape, _stored_as))


class Linear(Module):
    """`x @ weight.T + bias`, weight `[out, in]`."""

    def __init__(self, n_in: int, n_out: int, bias: bool):
        super().__init__()
        self.weight = parameter(n_out, n_in)
        self.bias = parameter(n_out) if bias else None

    def construct(self, x: Tensor) -> Tensor:
        return self.emit(linear(x, self.weight, self.bias))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` over the last axis, as one two-dimensional product; the weight is not copied to be transposed."""
    y = ops.MatMul(transpose_b=True)(x.reshape(-1, x.shape[-1]), ops.cast(weight, x.dtype))
    if bias is not None:
        y = y + ops.cast(bias, x.dtype)
    return y.reshape((*x.shape[:-1], weight.shape[0]))


class Embedding(Module):
    """A table `[rows, width]`."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = parameter(rows, width)

    def construct(self, ids: Tensor) -> Tensor:
        return self.emit(ops.gather(self.weight, ids, 0))


class LayerNorm(Module):
    """Layer normalisation over the last axis."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = parameter(width)
        self.bias = parameter(width)
        self.normalise = ops.LayerNorm(-1, -1, eps)

    def construct(self, x: Tensor) -> Tensor:
        weight, bias = ops.cast(self.weight, ms.float32), ops.cast(self.bias, ms.float32)
        return self.emit(ops.cast(self.normalise(ops.cast(x, ms.float32), weight, bias)[0], x.dtype))


class UnitRMS(nn.Cell):
    """`y = x r` with `r = 1 / sqrt(mean(x^2) + eps)` over the last axis, in float32. Returns `y` and `r`.

    The gradient, `r (dy - y mean(dy y))`, is written by hand because it takes fewer kernels than the derived one. On CPU the mean
    is a matrix product with a vector of 1 / width, because a reduction over the last axis takes 4 ns an element there.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.eps = width, eps
        self.product, self.reduction = ops.MatMul(), ops.ReduceMean(keep_dims=True)
        self.shares = Tensor(np.full((width, 1), 1 / width, np.float32)) if ms.get_context("device_target") == "CPU" else None

    def mean(self, x: Tensor) -> Tensor:
        if self.shares is None:
            return self.reduction(x, -1)
        return self.product(x.reshape(-1, self.width), self.shares).reshape((*x.shape[:-1], 1))

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = ops.rsqrt(self.mean(ops.square(x)) + self.eps)
        return x * r, r

    def bprop(self, x, outputs, gradients):
        y, r = outputs
        dy, _ = gradients
        return (r * (dy - y * self.mean(dy * y)),)


class RMSNorm(Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = parameter(width)
        self.unit = UnitRMS(width, eps)

    def construct(self, x: Tensor) -> Tensor:
        y = self.unit(ops.cast(x, ms.float32))[0]
        return self.emit(ops.cast(y * ops.cast(self.weight, ms.float32), x.dtype))


def norm(kind: str, width: int, eps: float) -> nn.Cell:
    """The norm that a configuration calls `layer` or `rms`."""
    return LayerNorm(width, eps) if kind == "layer" else RMSNorm(width, eps)


def activate(kind: str, x: Tensor) -> Tensor:
    """`gelu_tanh` (SigLIP), `gelu` (exact), `quick_gelu` (CLIP: x sigmoid(1.702 x)), `silu`."""
    if kind == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2 u), with 2 sqrt(2 / pi) = 1.5958. On CPU the GeLU kernel is five times as slow, and the
        # tanh kernel has errors of 1e-5 (its gradient of 1e-4) where it saturates.
        return x * ops.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * (x * x)))
    if kind == "gelu":
        return ops.gelu(x)
    if kind == "quick_gelu":
        return x * ops.sigmoid(1.702 * x)
    return ops.silu(x)
