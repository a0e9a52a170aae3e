"""Named activations: modules whose results a tap may see, and the tap, which keeps such a result, replaces it and has its
gradient."""
import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ms_granvit.arrays import to_tensor


class Module(nn.Cell):
    """A cell whose result has a name, its path (`granvit.introspection`). A `tap` sees the result on its way and may replace
    it; without one, which is how a model trains, nothing is there."""

    def __init__(self):
        super().__init__()
        self.tap = None

    def emit(self, result: Tensor) -> Tensor:
        """The result as it leaves the module."""
        return result if self.tap is None else self.tap(result)


class Swap(nn.Cell):
    """Where `fed` is 1: `value` forward, `gradient` backward. Where it is 0: `x` and its own gradient."""

    def construct(self, x: Tensor, fed: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return ops.select(fed > 0, value, x)

    def bprop(self, x, fed, value, gradient, out, d):
        return ops.select(fed > 0, gradient, d), ops.zeros_like(fed), ops.zeros_like(value), ops.zeros_like(gradient)


class Tap(nn.Cell):
    """Keeps the activation that passes, and adds a probe of zeros whose gradient is the activation's. What is fed enters
    through parameters, so that one compiled graph serves every feed."""

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
        """What the next passes find in place of the activation and of its gradient (None: themselves)."""
        ops.assign(self.fed, ops.full_like(self.fed, 0.0 if fed is None else 1.0))
        for parameter, array in zip((self.fed_value, self.fed_gradient), fed or (), strict=False):
            ops.assign(parameter, to_tensor(array, parameter.dtype))
