"""Activation functions of the MLPs."""
import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (SigLIP), `x (1 + tanh u) / 2` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`."""
    return F.gelu(x, approximate="tanh")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020)."""
    return F.silu(gate) * up


def exact_gelu(x: Tensor) -> Tensor:
    """`x Phi(x)`."""
    return F.gelu(x)


def quick_gelu(x: Tensor) -> Tensor:
    """`x sigmoid(1.702 x)` (CLIP)."""
    return x * torch.sigmoid(1.702 * x)


def silu(x: Tensor) -> Tensor:
    """`x sigmoid(x)`."""
    return F.silu(x)
