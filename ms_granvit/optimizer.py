"""AdamW with clipping by global norm.

Parameter by parameter, so that the temporaries are one parameter large (the torch twin's flat buffer would be copied whole
in a static graph, where a parameter cannot be a view).
"""
import mindspore as ms
from mindspore import Tensor, nn, ops

from granvit.config import OptimizerSection
from granvit.models import PARTS, part_of


class Clear(nn.Cell):
    """Zeros the accumulated gradients in place, also where they are not finite."""

    def __init__(self, gradients: ms.ParameterTuple):
        super().__init__(auto_prefix=False)
        self.gradients = gradients

    def construct(self, done: Tensor) -> Tensor:
        for i in range(len(self.gradients)):
            ops.assign(self.gradients[i], ops.zeros_like(self.gradients[i]))
        return done


class AdamW(nn.Cell):
    """Decoupled weight decay (Loshchilov & Hutter 2019), bias-corrected, on float32 masters; decay on matrices alone.
    Parts may have their own learning rate and decay.

    Everything that changes from step to step is a tensor input, so the graph is compiled once.
    """

    def __init__(self, parameters: ms.ParameterTuple, gradients: ms.ParameterTuple, config: OptimizerSection):
        super().__init__(auto_prefix=False)
        self.parameters, self.gradients = parameters, gradients
        self.first_moment = parameters.clone("first_moment", init="zeros")
        self.second_moment = parameters.clone("second_moment", init="zeros")
        self.clip_norm, self.eps = config.clip_norm, config.eps
        self.beta1, self.beta2 = config.betas
        self.part = tuple(PARTS.index(part_of(p.name)) for p in parameters)
        self.decayed = tuple(config.of_part(part_of(p.name))[1] > 0 and p.ndim >= 2 for p in parameters)

    def construct(self, decay_factors: Tensor, rates: Tensor, correction2: Tensor, grad_norm: Tensor) -> Tensor:
        """One update from the accumulated gradients, which are clipped to `clip_norm` and then zeroed.

        `decay_factors` `[3]` holds 1 - learning_rate * weight_decay of each of `PARTS`, `rates` `[3]` their learning_rate /
        (1 - beta1^t); `correction2` is 1 - beta2^t.
        """
        decay_factor, rate = (decay_factors[0], decay_factors[1], decay_factors[2]), (rates[0], rates[1], rates[2])
        scale = ops.minimum(self.clip_norm / (grad_norm + 1e-6), ops.ones_like(grad_norm))
        for i in range(len(self.parameters)):
            g = self.gradients[i] * scale
            m = self.beta1 * self.first_moment[i] + (1 - self.beta1) * g
            v = self.beta2 * self.second_moment[i] + (1 - self.beta2) * ops.square(g)
            p = self.parameters[i] * decay_factor[self.part[i]] if self.decayed[i] else self.parameters[i]
            ops.assign(self.parameters[i], p - rate[self.part[i]] * m / (ops.sqrt(v / correction2) + self.eps))
            ops.assign(self.first_moment[i], m)
            ops.assign(self.second_moment[i], v)
            ops.assign(self.gradients[i], ops.zeros_like(g))
        return scale
