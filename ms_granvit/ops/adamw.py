"""One parameter's step of AdamW (Loshchilov & Hutter 2019), bias-corrected, in float32, in place."""
from mindspore import Parameter, Tensor, ops


def composed(parameter: Parameter, gradient: Parameter, first_moment: Parameter, second_moment: Parameter, scale: Tensor,
             decay_factor: Tensor | None, rate: Tensor, correction2: Tensor, beta1: float, beta2: float,
             eps: float) -> Tensor:  # fmt: skip
    """Updates parameter and moments from `scale` times the gradient, and sets the gradient to zero.

    `decay_factor` is 1 - learning_rate * weight_decay (None: no decay), `rate` is learning_rate / (1 - beta1^t), `correction2` is
    1 - beta2^t. Returns a tensor that the graph's output must depend on, so that the step is not left out.
    """
    g = gradient * scale
    m = beta1 * first_moment + (1 - beta1) * g
    v = beta2 * second_moment + (1 - beta2) * ops.square(g)
    p = parameter if decay_factor is None else parameter * decay_factor
    ops.assign(parameter, p - rate * m / (ops.sqrt(v / correction2) + eps))
    ops.assign(first_moment, m)
    ops.assign(second_moment, v)
    ops.assign(gradient, ops.zeros_like(g))
    return rate
