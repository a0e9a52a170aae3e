"""Small operators by their definitions in float64, with gradients, and the kernels called from numpy.

Both take and return the same: arguments, then the gradient at the output; the output, then the gradients."""
import numpy as np

from tests.native.oracle import call, normal

EPS = np.array([1e-5], np.float32)
TWICE = 2 * np.sqrt(2 / np.pi)
FACTORS = np.array([0.5, 0.99, 1e-3, 0.1, 0.9, 1 - 0.9, 0.98, 1 - 0.98, 1e-8], np.float32)


def wide(*arrays):
    return [x.astype(np.float64) for x in arrays]


def sigmoid(x):
    return np.where(x < 0, np.exp(-abs(x)), 1) / (1 + np.exp(-abs(x)))


def layer_norm(x, weight, bias, dout):
    x, weight, bias, dout = wide(x, weight, bias, dout)
    scale = 1 / np.sqrt(x.var(-1, keepdims=True) + EPS)
    y, g = (x - x.mean(-1, keepdims=True)) * scale, dout * weight
    dx = scale * (g - g.mean(-1, keepdims=True) - y * (g * y).mean(-1, keepdims=True))
    return y * weight + bias, dx, (dout * y).sum(0), dout.sum(0)


def rms_norm(x, weight, dout):
    x, weight, dout = wide(x, weight, dout)
    scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    y, g = x * scale, dout * weight
    return y * weight, scale * (g - y * (g * y).mean(-1, keepdims=True)), (dout * y).sum(0)


def rope(x_BHSD, cosine_BSD, sine_BSD, dout):
    x, cosine, sine, dout = wide(x_BHSD, cosine_BSD[:, None], sine_BSD[:, None], dout)
    turned = lambda a: np.concatenate(np.split(a, 2, -1)[::-1], -1)  # noqa: E731
    sign = np.repeat([-1.0, 1.0], x.shape[-1] // 2)
    return x * cosine + turned(x) * sign * sine, dout * cosine + turned(dout * sign * sine)


def swiglu(gate, up, dout):
    gate, up, dout = wide(gate, up, dout)
    s = sigmoid(gate)
    return gate * s * up, dout * up * s * (1 + gate * (1 - s)), dout * gate * s


def gelu(x, dout):
    x, dout = wide(x, dout)
    s, slope = sigmoid(TWICE * (x + 0.044715 * x**3)), TWICE * (1 + 3 * 0.044715 * x * x)
    return x * s, dout * (s + x * s * sigmoid(-TWICE * (x + 0.044715 * x**3)) * slope)


def adamw(p, g, m, v, dout):
    """The step has no gradient; `dout` is ignored."""
    scale, decay, rate, correction2, beta1, rest1, beta2, rest2, eps = FACTORS.astype(np.float64)
    p, g, m, v = wide(p, g, m, v)
    m, v = beta1 * m + rest1 * scale * g, beta2 * v + rest2 * (scale * g) ** 2
    return p * decay - rate * m / (np.sqrt(v / correction2) + eps), 0 * g, m, v


def run_layer_norm(x, weight, bias, dout):
    N, C = x.shape
    out, mean, scale, dx, dweight, dbias = (np.empty(s, np.float32) for s in ((N, C), N, N, (N, C), C, C))
    call("granvit_norm_forward", [x, weight, bias, EPS, out, mean, scale], (N, C))
    call("granvit_norm_backward", [dout, x, weight, mean, scale, dx, dweight, dbias], (N, C))
    return out, dx, dweight, dbias


def run_rms_norm(x, weight, dout):
    N, C = x.shape
    out, scale, dx, dweight = (np.empty(s, np.float32) for s in ((N, C), N, (N, C), C))
    call("granvit_norm_forward", [x, weight, None, EPS, out, None, scale], (N, C))
    call("granvit_norm_backward", [dout, x, weight, None, scale, dx, dweight, None], (N, C))
    return out, dx, dweight


def run_rope(x_BHSD, cosine_BSD, sine_BSD, dout):
    out, dx = np.empty_like(x_BHSD), np.empty_like(x_BHSD)
    call("granvit_rope", [x_BHSD, cosine_BSD, sine_BSD, out], (0, *x_BHSD.shape))
    call("granvit_rope", [dout, cosine_BSD, sine_BSD, dx], (1, *x_BHSD.shape))
    return out, dx


def run_swiglu(gate, up, dout):
    out, dgate, dup = (np.empty_like(gate) for _ in range(3))
    call("granvit_swiglu_forward", [gate, up, out], (gate.size,))
    call("granvit_swiglu_backward", [dout, gate, up, dgate, dup], (gate.size,))
    return out, dgate, dup


def run_gelu(x, dout):
    out, dx = np.empty_like(x), np.empty_like(x)
    call("granvit_gelu_forward", [x, out], (x.size,))
    call("granvit_gelu_backward", [dout, x, dx], (x.size,))
    return out, dx


def run_adamw(p, g, m, v, dout):
    p, g, m, v = (x.copy() for x in (p, g, m, v))
    call("granvit_adamw", [p, g, m, v, FACTORS], (p.size,))
    return p, g, m, v


def norm_case(rows, C, scale=1.0, arrays=1):
    x = scale * normal([rows, C], rows, C) + 0.5
    return x.astype(np.float32), *(1 + 0.3 * normal(n, C) for n in range(arrays)), normal(9, rows, C)


def rope_case(B, H, S, D):
    angles = np.arange(B * S, dtype=np.float64).reshape(B, S, 1) * 10.0 ** -np.linspace(0, 2, D // 2)
    cosine, sine = (np.concatenate([f(angles)] * 2, -1).astype(np.float32) for f in (np.cos, np.sin))
    return normal(1, B, H, S, D), cosine, sine, normal(2, B, H, S, D)


LINE = np.r_[np.linspace(-95, 95, 1001), np.linspace(-6, 6, 1001), 0].astype(np.float32)
OPERATORS = {
    "layer_norm": (run_layer_norm, layer_norm), "rms_norm": (run_rms_norm, rms_norm), "rope": (run_rope, rope),
    "swiglu": (run_swiglu, swiglu), "gelu": (run_gelu, gelu), "adamw": (run_adamw, adamw),
}  # fmt: skip
CASES = {
    "layer_norm": [norm_case(*size, arrays=2) for size in ((1, 1), (3, 5), (70, 16), (130, 33), (2, 100))],
    "rms_norm": [norm_case(*size) for size in ((1, 1), (3, 5), (70, 16), (130, 33), (2, 100))],
    "rope": [rope_case(*size) for size in ((1, 1, 1, 2), (2, 3, 7, 10), (1, 4, 33, 72))],
    "swiglu": [(LINE, normal(1, LINE.size), normal(2, LINE.size)), tuple(normal(n, 1) for n in range(3))],
    "gelu": [(LINE, normal(1, LINE.size)), (normal(0, 1), normal(1, 1))],
    "adamw": [(normal(0, n), normal(1, n), normal(2, n), normal(3, n) ** 2, None) for n in (1, 17, 40000)],
}
EVERY_CASE = [(operator, n) for operator, cases in CASES.items() for n in range(len(cases))]
