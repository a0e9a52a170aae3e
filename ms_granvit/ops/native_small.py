"""Norms, rotary embedding, SwiGLU, GELU and AdamW by the C++ kernels (`granvit.native`): float32 on CPU, through `ops.Custom`.

Each function has the signature and the mathematics of its namesake in the other modules of `ms_granvit.ops`. They give the same
bits on every processor. PyTorch's own operators are fast, so its package has no such module. Import it after the device is set.
"""
import mindspore as ms
from mindspore import Parameter, Tensor, ops

from granvit import native
from ms_granvit.ops.native import MISSING, custom


def same(x, *others):
    """The shape or dtype of the first array."""
    return x


def checked(operator):
    """The operator. Raises ValueError, which says how to get the kernels, if there is none."""
    if operator is None:
        raise ValueError(MISSING)
    return operator


def float32(*dtypes):
    """All arrays, by position, are float32."""
    native.check_dtypes("float32", **{f"argument {number}": dtype for number, dtype in enumerate(dtypes, 1)})


def norm_shape(x, weight, *rest):
    native.check_norm(x, weight, *rest[:-1])
    return (x, x[:-1]) if len(rest) == 1 else (x, x[:-1], x[:-1])


def norm_dtype(x, weight, *rest):
    float32(x, weight, *rest)
    return (x,) * (2 if len(rest) == 1 else 3)


def rms_norm_gradients(dout, x, weight, scale):
    return x, weight


RMS_NORM_GRAD = custom("GranvitRmsNormGrad", rms_norm_gradients, rms_norm_gradients)


def rms_norm_bprop(x, weight, eps, outputs, gradients):
    return *RMS_NORM_GRAD(gradients[0], x, weight, outputs[1]), ops.zeros_like(eps)


RMS_NORM = custom("GranvitRmsNorm", norm_shape, norm_dtype, rms_norm_bprop)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis."""
    return checked(RMS_NORM)(x, weight, ops.full((1,), eps, dtype=ms.float32))[0]


def layer_norm_gradients(dout, x, weight, mean, scale):
    return x, weight, weight


LAYER_NORM_GRAD = custom("GranvitLayerNormGrad", layer_norm_gradients, layer_norm_gradients)


def layer_norm_bprop(x, weight, bias, eps, outputs, gradients):
    return *LAYER_NORM_GRAD(gradients[0], x, weight, outputs[1], outputs[2]), ops.zeros_like(eps)


LAYER_NORM = custom("GranvitLayerNorm", norm_shape, norm_dtype, layer_norm_bprop)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis."""
    return checked(LAYER_NORM)(x, weight, bias, ops.full((1,), eps, dtype=ms.float32))[0]


def rope_shape(x, cos, sin):
    native.check_rope(x, cos, sin)
    return x


def elementwise_dtype(x, *others):
    float32(x, *others)
    return x


ROPE_GRAD = custom("GranvitRopeGrad", same, same)


def rope_bprop(x_BHSD, cos_B1SD, sin_B1SD, out, dout):
    return ROPE_GRAD(dout, cos_B1SD, sin_B1SD), ops.zeros_like(cos_B1SD), ops.zeros_like(sin_B1SD)


ROPE = custom("GranvitRope", rope_shape, elementwise_dtype, rope_bprop)


def rope(x_BHSD: Tensor, cos_B1SD: Tensor, sin_B1SD: Tensor) -> Tensor:
    """`x cos + swapped(x) sin`; cosine and sine get a gradient of zero."""
    return checked(ROPE)(x_BHSD, cos_B1SD, sin_B1SD)


def swiglu_shape(gate, up):
    native.check_same_shape(gate=gate, up=up)
    return gate


def swiglu_gradients(dout, gate, up):
    return gate, up


SWIGLU_GRAD = custom("GranvitSwigluGrad", swiglu_gradients, swiglu_gradients)


def swiglu_bprop(gate, up, out, dout):
    return SWIGLU_GRAD(dout, gate, up)


SWIGLU = custom("GranvitSwiglu", swiglu_shape, elementwise_dtype, swiglu_bprop)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    return checked(SWIGLU)(gate, up)


GELU_GRAD = custom("GranvitGeluGrad", same, same)


def gelu_bprop(x, out, dout):
    return (GELU_GRAD(dout, x),)


GELU = custom("GranvitGelu", same, elementwise_dtype, gelu_bprop)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return checked(GELU)(x)


ADAMW = custom("GranvitAdamW", lambda p, g, m, v, factors: (1,), lambda p, g, m, v, factors: factors)


def adamw(parameter: Parameter, gradient: Parameter, first_moment: Parameter, second_moment: Parameter, scale: Tensor,
          decay_factor: Tensor | None, rate: Tensor, correction2: Tensor, beta1: float, beta2: float,
          eps: float) -> Tensor:  # fmt: skip
    """`ms_granvit.ops.adamw.composed`, bit for bit, in one pass over memory and without a temporary.

    MindSpore does not know that the operator writes to its inputs: a graph that also reads them elsewhere must order this itself.
    """
    changing = ops.stack((scale, ops.ones_like(scale) if decay_factor is None else decay_factor, rate, correction2))
    factors = ops.cat((changing, ms.Tensor([beta1, 1 - beta1, beta2, 1 - beta2, eps], ms.float32)))
    return checked(ADAMW)(parameter, gradient, first_moment, second_moment, factors)
