"""A step of AdamW (Loshchilov & Hutter 2019), bias-corrected, in place over flat float32 buffers."""
from torch import Tensor

CHUNK = {"cpu": 1 << 22}  # numbers updated at a time, so that temporaries are small whatever the size of the buffers
ON_DEVICES = 1 << 26  # few launches; temporaries of 256 MB


def composed(values: Tensor, gradients: Tensor, first_moment: Tensor, second_moment: Tensor, decay_factor: float | None,
             rate: float, correction2: float, beta1: float, beta2: float, eps: float) -> None:  # fmt: skip
    """Updates values and moments. `decay_factor` is 1 - learning_rate * weight_decay (None: no decay), `rate` is learning_rate /
    (1 - beta1^t), `correction2` is 1 - beta2^t."""
    buffers = (values, gradients, first_moment, second_moment)
    for p, g, m, v in zip(*(buffer.split(CHUNK.get(values.device.type, ON_DEVICES)) for buffer in buffers), strict=True):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if decay_factor is not None:
            p.mul_(decay_factor)
        p.addcdiv_(m, (v / correction2).sqrt_().add_(eps), value=-rate)
