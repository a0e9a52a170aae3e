"""Building blocks with the canonical parameter names. Every forward pass casts the weights to the dtype of the activations, so
float32 master weights can be used in a bfloat16 forward pass. Norms compute in float32."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from granvit.kernels import Kernels
from ms_granvit.ops import activations
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

    def __init__(self, width: int, eps: float, kernels: Kernels):
        super().__init__()
        self.weight = parameter(width)
        self.bias = parameter(width)
        self.eps, self.normalise = eps, kernels.pick("layer_norm")

    def construct(self, x: Tensor) -> Tensor:
        return self.emit(self.normalise(x, self.weight, self.bias, self.eps))


class RMSNorm(Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis."""

    def __init__(self, width: int, eps: float, kernels: Kernels):
        super().__init__()
        self.weight = parameter(width)
        self.eps, self.normalise = eps, kernels.pick("rms_norm")

    def construct(self, x: Tensor) -> Tensor:
        return self.emit(self.normalise(x, self.weight, self.eps))


def norm(kind: str, width: int, eps: float, kernels: Kernels) -> nn.Cell:
    """The norm that a configuration calls `layer` or `rms`."""
    return LayerNorm(width, eps, kernels) if kind == "layer" else RMSNorm(width, eps, kernels)


def activation(kind: str, kernels: Kernels) -> Callable[[Tensor], Tensor]:
    """The function that a configuration calls `gelu_tanh` (SigLIP), `gelu` (exact), `quick_gelu` (CLIP) or `silu`."""
    if kind == "gelu_tanh":
        return kernels.pick("gelu")
    return {"gelu": activations.exact_gelu, "quick_gelu": activations.quick_gelu, "silu": activations.silu}[kind]
