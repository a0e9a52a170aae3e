"""Named activations: modules whose results a tap may see, and the tap, which keeps such a result, replaces it and has its
gradient."""
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


class Module(nn.Module):
    """A module whose result has a name, its path (`granvit.introspection`). A `tap` sees the result on its way and may replace
    it; without one, which is how a model trains, nothing is there."""

    tap: Callable[[Tensor], Tensor] | None = None

    def emit(self, result: Tensor) -> Tensor:
        """The result as it leaves the module."""
        return result if self.tap is None else self.tap(result)


class Swap(torch.autograd.Function):
    """Forward: `replacement`. Backward: the gradient to `replacement`, and `gradient` to `x` in its stead."""

    @staticmethod
    def forward(ctx, replacement: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return replacement.clone()

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor, None]:
        return d, ctx.saved_tensors[0], None


class Tap:
    """Keeps the activation that passes, and adds a probe of zeros whose gradient is the activation's."""

    def __init__(self, fed: tuple[np.ndarray, np.ndarray] | None):
        self.fed = fed

    def __call__(self, x: Tensor) -> Tensor:
        self.value, self.probe = x.detach(), torch.zeros_like(x, requires_grad=True)
        if self.fed is None:
            return x + self.probe
        value, gradient = (torch.from_numpy(array).to(x) for array in self.fed)
        return Swap.apply(value + self.probe, x, gradient)
