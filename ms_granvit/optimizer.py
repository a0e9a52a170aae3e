"""AdamW with clipping by global norm.

Parameters are updated one by one, so that temporaries are as large as one parameter. The PyTorch twin updates one flat buffer; in
a static graph, where a parameter cannot be a view, that buffer would be copied as a whole.
"""
import mindspore as ms
from mindspore import Tensor, nn, ops

from granvit.config import OptimizerSection
from granvit.kernels import Kernels
from granvit.models import PARTS, part_of
from ms_granvit.ops.table import PLAIN


class Clear(nn.Cell):
    """Sets the accumulated gradients to zero in place, even if they are not finite."""

    def __init__(self, gradients: ms.ParameterTuple):
        super().__init__(auto_prefix=False)
        self.gradients = gradients

    def construct(self, done: Tensor) -> Tensor:
        for i in range(len(self.gradients)):
            ops.assign(self.gradients[i], ops.zeros_like(self.gradients[i]))
        return done


class AdamW(nn.Cell):
    """Decoupled weight decay (Loshchilov & Hutter 2019), bias-corrected, on float32 master weights. Only parameters of
    two or more axes decay. Parts may have their own learning rate and decay.

    All values that change from step to step are tensor inputs, so the graph is compiled once.
    """

    def __init__(self, parameters: ms.ParameterTuple, gradients: ms.ParameterTuple, config: OptimizerSection,
                 kernels: Kernels = PLAIN):  # fmt: skip
        super().__init__(auto_prefix=False)
        self.parameters, self.gradients, self.move = parameters, gradients, kernels.pick("adamw")
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
        done = ()
        for i in range(len(self.parameters)):
            part = self.part[i]
            done += (self.move(self.parameters[i], self.gradients[i], self.first_moment[i], self.second_moment[i], scale,
                               decay_factor[part] if self.decayed[i] else None, rate[part], correction2, self.beta1, self.beta2,
                               self.eps),)  # fmt: skip
        return ops.depend(scale, done)
