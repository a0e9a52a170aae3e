"""Every operator of `granvit.kernels` in float64 in numpy, outputs and gradients, from its definition.

The implementations are compared with these, so that no framework is its own judge. A formula takes the arrays of a call, its
constants and the gradient of the first output, and returns the outputs and the gradients of its first arrays.

Layout letters: B rows or images, H query heads, G key-value heads, S queries, L keys, D head width; H x W feature cells, C width,
K boxes, g output cells along a side, p = 2 g samples along it; A positions, V vocabulary.
"""
from collections.abc import Callable, Mapping

import numpy as np

from granvit.kernels import Operator

Arrays = list[np.ndarray]
Results = tuple[Arrays, Arrays]  # outputs, gradients
TANH_SCALE, CUBE = (2 / np.pi) ** 0.5, 0.044715  # of GELU's tanh form


def allowed(segments_BS: np.ndarray) -> np.ndarray:
    """Boolean `[B, 1, S, S]`: query i sees key j if j <= i, and the key's segment is 0 or i's own."""
    keys, queries = segments_BS[:, None, None, :], segments_BS[:, None, :, None]
    return np.tri(segments_BS.shape[1], dtype=bool) & ((keys == 0) | (keys == queries))


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def attention(q_BHSD, k_BGLD, v_BGLD, mask, dout) -> Results:
    B, H, _, D = q_BHSD.shape
    G, L = k_BGLD.shape[1:3]
    k, v = (np.repeat(x, H // G, 1) for x in (k_BGLD, v_BGLD))
    scores = q_BHSD @ k.swapaxes(-1, -2) * D**-0.5
    p = softmax(scores if mask is None else np.where(mask, scores, -np.inf))
    dp = dout @ v.swapaxes(-1, -2)
    dscores = p * (dp - (dp * p).sum(-1, keepdims=True)) * D**-0.5
    dk, dv = ((x.swapaxes(-1, -2) @ y).reshape(B, G, H // G, L, D).sum(2) for x, y in ((dscores, q_BHSD), (p, dout)))
    return [p @ v], [dscores @ k, dk, dv]


def sampling(low_BK, high_BK, grid: int, cells: int) -> np.ndarray:
    """Weights `[B, K, g, cells]`: bilinear at two samples for each bin, clamped to the centres of the border cells, averaged."""
    ticks = (np.arange(2 * grid) + 0.5) / (2 * grid)
    points = (low_BK[..., None] + (high_BK - low_BK)[..., None] * ticks) * cells - 0.5
    weights = np.maximum(1 - np.abs(np.clip(points, 0, cells - 1)[..., None] - np.arange(cells)), 0)
    return weights.reshape(*low_BK.shape, grid, 2, cells).mean(-2)


def roi_align(features_BHWC, boxes_BK4, grid: int, dout) -> Results:
    x1, y1, x2, y2 = np.moveaxis(boxes_BK4, -1, 0)
    rows, columns = sampling(y1, y2, grid, features_BHWC.shape[1]), sampling(x1, x2, grid, features_BHWC.shape[2])
    out = np.einsum("bkyh,bhwc,bkxw->bkyxc", rows, features_BHWC, columns, optimize=True)
    return [out], [np.einsum("bkyh,bkyxc,bkxw->bhwc", rows, dout, columns, optimize=True)]


def layer_norm(x, weight, bias, eps: float, dout) -> Results:
    (out,), (dx, dweight) = rms_norm(x - x.mean(-1, keepdims=True), weight, eps, dout)
    return [out + bias], [dx - dx.mean(-1, keepdims=True), dweight, over_rows(dout)]


def rms_norm(x, weight, eps: float, dout) -> Results:
    r = (np.square(x).mean(-1, keepdims=True) + eps) ** -0.5
    y, dy = x * r, dout * weight
    return [y * weight], [r * (dy - y * (dy * y).mean(-1, keepdims=True)), over_rows(dout * y)]


def over_rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1]).sum(0)


def rope(x, cos, sin, dout) -> Results:
    first, second = np.split(x, 2, -1)
    dfirst, dsecond = np.split(dout * sin, 2, -1)
    return [x * cos + np.concatenate([-second, first], -1) * sin], [dout * cos + np.concatenate([dsecond, -dfirst], -1)]


def swiglu(gate, up, dout) -> Results:
    s = 1 / (1 + np.exp(-gate))
    return [gate * s * up], [dout * up * s * (1 + gate * (1 - s)), dout * gate * s]


def gelu(x, dout) -> Results:
    t = np.tanh(TANH_SCALE * (x + CUBE * x**3))
    slope = (1 + t) / 2 + x * (1 - t**2) / 2 * TANH_SCALE * (1 + 3 * CUBE * x**2)
    return [x * (1 + t) / 2], [dout * slope]


def cross_entropy(hidden_AC, head_VC, targets_A, weights_A, dout) -> Results:
    p, at = softmax(hidden_AC @ head_VC.T), (np.arange(len(targets_A)), targets_A)
    out = -(np.log(p[at]) * weights_A).sum()
    p[at] -= 1
    dlogits = p * (weights_A * dout)[:, None]
    return [out], [dlogits @ head_VC, dlogits.T @ hidden_AC]


def adamw(p, g, m, v, decay_factor, rate, correction2, beta1, beta2, eps, dout) -> Results:
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    return [p * decay_factor - rate * m / (np.sqrt(v / correction2) + eps), m, v], []


FORMULAS: Mapping[Operator, Callable[..., Results]] = {
    "attention": attention,
    "roi_align": roi_align,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "rope": rope,
    "swiglu": swiglu,
    "gelu": gelu,
    "cross_entropy": cross_entropy,
    "adamw": adamw,
}
