"""One parameter's step of AdamW (Loshchilov & Hutter 2019), bias-corrected, in float32."""
from mindspore import Tensor, ops


def composed(parameter: Tensor, gradient: Tensor, first_moment: Tensor, second_moment: Tensor, decay_factor: Tensor | None,
             rate: Tensor, correction2: Tensor, beta1: float, beta2: float, eps: float) -> tuple[Tensor, ...]:  # fmt: skip
    """The new parameter and moments. `decay_factor` is 1 - learning_rate * weight_decay (None: no decay), `rate` is learning_rate
    / (1 - beta1^t), `correction2` is 1 - beta2^t."""
    m = beta1 * first_moment + (1 - beta1) * gradient
    v = beta2 * second_moment + (1 - beta2) * ops.square(gradient)
    p = parameter if decay_factor is None else parameter * decay_factor
    return p - rate * m / (ops.sqrt(v / correction2) + eps), m, v
