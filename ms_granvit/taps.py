"""Named activations: `Module` passes its output to a tap, if it has one. `Tap` records the output and its gradient, and can
replace both."""
import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ms_granvit.arrays import to_tensor


class Module(nn.Cell):
    """A cell whose output is a named activation; the name is the path of the cell (see `granvit.introspection`). `tap`, if set,
    gets the output and returns what replaces it. In training there is no tap."""

    def __init__(self):
        super().__init__()
        self.tap = None

    def emit(self, result: Tensor) -> Tensor:
        """The module's output, after the tap if there is one."""
        return result if self.tap is None else self.tap(result)


class Swap(nn.Cell):
    """Where `fed` is 1: `value` in the forward pass, `gradient` in the backward pass. Where it is 0: `x` and its own gradient."""

    def construct(self, x: Tensor, fed: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return ops.select(fed > 0, value, x)

    def bprop(self, x, fed, value, gradient, out, d):
        return ops.select(fed > 0, gradient, d), ops.zeros_like(fed), ops.zeros_like(value), ops.zeros_like(gradient)


class Tap(nn.Cell):
    """Records an activation and adds a tensor of zeros, the probe, whose gradient is the gradient of the activation. Replacement
    values are parameters, so that one compiled graph serves all of them."""

    def __init__(self, shape: tuple[int, ...], dtype: ms.Type):
        super().__init__()
        zeros = lambda grad: Parameter(ops.zeros(shape, dtype), requires_grad=grad)  # noqa: E731
        self.value, self.probe = zeros(False), zeros(True)
        self.fed, self.fed_value, self.fed_gradient = zeros(False), zeros(False), zeros(False)
        self.swap = Swap()

    def construct(self, x: Tensor) -> Tensor:
        ops.assign(self.value, x)
        return self.swap(x, self.fed, self.fed_value, self.fed_gradient) + self.probe

    def feed(self, fed: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Sets the value and the gradient that replace the activation's in the passes that follow (None: no replacement)."""
        ops.assign(self.fed, ops.full_like(self.fed, 0.0 if fed is None else 1.0))
        for parameter, array in zip((self.fed_value, self.fed_gradient), fed or (), strict=False):
            ops.assign(parameter, to_tensor(array, parameter.dtype))
