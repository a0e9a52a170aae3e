"""Activation functions of the MLPs."""
from mindspore import Tensor, ops


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (SigLIP), `x (1 + tanh u) / 2` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`.

    (1 + tanh u) / 2 = sigmoid(2 u), with 2 sqrt(2 / pi) = 1.5958. On CPU the GeLU kernel is five times as slow, and the tanh
    kernel has errors of 1e-5 (its gradient of 1e-4) where it saturates.
    """
    return x * ops.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * (x * x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020)."""
    return ops.silu(gate) * up


def exact_gelu(x: Tensor) -> Tensor:
    """`x Phi(x)`."""
    return ops.gelu(x)


def quick_gelu(x: Tensor) -> Tensor:
    """`x sigmoid(1.702 x)` (CLIP)."""
    return x * ops.sigmoid(1.702 * x)


def silu(x: Tensor) -> Tensor:
    """`x sigmoid(x)`."""
    return ops.silu(x)


def fused_gelu(x: Tensor) -> Tensor:
    """`gelu` as one kernel, which on CPU is slower and less accurate."""
    return ops.gelu(x, approximate="tanh")
