"""Named activations: `Module` passes its output to a tap, if it has one. `Tap` records the output and its gradient, and can
replace both."""
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


class Module(nn.Module):
    """A module whose output is a named activation; the name is the path of the module (see `granvit.introspection`). `tap`, if
    set, gets the output and returns what replaces it. In training there is no tap."""

    tap: Callable[[Tensor], Tensor] | None = None

    def emit(self, result: Tensor) -> Tensor:
        """The module's output, after the tap if there is one."""
        return result if self.tap is None else self.tap(result)


class Swap(torch.autograd.Function):
    """Forward: `replacement`. Backward: `replacement` gets the gradient that arrives, `x` gets `gradient` instead of it."""

    @staticmethod
    def forward(ctx, replacement: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return replacement.clone()

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor, None]:
        return d, ctx.saved_tensors[0], None


class Tap:
    """Records an activation and adds a tensor of zeros, the probe, whose gradient is the gradient of the activation. `fed`, if
    given, holds the value and the gradient that replace the activation's."""

    def __init__(self, fed: tuple[np.ndarray, np.ndarray] | None):
        self.fed = fed

    def __call__(self, x: Tensor) -> Tensor:
        self.value, self.probe = x.detach(), torch.zeros_like(x, requires_grad=True)
        if self.fed is None:
            return x + self.probe
        value, gradient = (torch.from_numpy(array).to(x) for array in self.fed)
        return Swap.apply(value + self.probe, x, gradient)
