"""Building blocks with the canonical parameter names. Every forward pass casts the weights to the dtype of the activations, so
float32 master weights can be used in a bfloat16 forward pass. Norms compute in float32 (in float64 for float64 activations)."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granvit.kernels import Kernels
from pt_granvit.ops import activations
from pt_granvit.taps import Module

_stored_as = torch.float32


@contextmanager
def stored_as(dtype: torch.dtype) -> Iterator[None]:
    """Parameters that are created inside the block have this dtype."""
    global _stored_as
    before, _stored_as = _stored_as, dtype
    try:
        yield
    finally:
        _stored_as = before


def parameter(*shape: int) -> nn.Parameter:
    """A parameter whose values are set later (`pt_granvit.arrays.fill`); float32 unless created inside `stored_as`."""
    return nn.Parameter(torch.empty(shape, dtype=_stored_as))


class Linear(Module):
    """`x @ weight.T + bias`, weight `[out, in]`."""

    def __init__(self, n_in: int, n_out: int, bias: bool):
        super().__init__()
        self.weight = parameter(n_out, n_in)
        self.bias = parameter(n_out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.emit(F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)))


class Embedding(Module):
    """A table `[rows, width]`."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = parameter(rows, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.emit(F.embedding(ids, self.weight))


class LayerNorm(Module):
    """Layer normalisation over the last axis."""

    def __init__(self, width: int, eps: float, kernels: Kernels):
        super().__init__()
        self.weight = parameter(width)
        self.bias = parameter(width)
        self.eps, self.normalise = eps, kernels.pick("layer_norm")

    def forward(self, x: Tensor) -> Tensor:
        return self.emit(self.normalise(x, self.weight, self.bias, self.eps))


class RMSNorm(Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis."""

    def __init__(self, width: int, eps: float, kernels: Kernels):
        super().__init__()
        self.weight = parameter(width)
        self.eps, self.normalise = eps, kernels.pick("rms_norm")

    def forward(self, x: Tensor) -> Tensor:
        return self.emit(self.normalise(x, self.weight, self.eps))


def norm(kind: str, width: int, eps: float, kernels: Kernels) -> nn.Module:
    """The norm that a configuration calls `layer` or `rms`."""
    return LayerNorm(width, eps, kernels) if kind == "layer" else RMSNorm(width, eps, kernels)


def activation(kind: str, kernels: Kernels) -> Callable[[Tensor], Tensor]:
    """The function that a configuration calls `gelu_tanh` (SigLIP), `gelu` (exact), `quick_gelu` (CLIP) or `silu`."""
    if kind == "gelu_tanh":
        return kernels.pick("gelu")
    return {"gelu": activations.exact_gelu, "quick_gelu": activations.quick_gelu, "silu": activations.silu}[kind]
