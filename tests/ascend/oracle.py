"""Attention and its gradients in float64, written from the definition, for arrays `[B, N, S, D]`."""
import numpy as np


def attention(q, k, v, discarded, scale, cotangent):
    """The output, and the gradients of `sum(output * cotangent)` for q, k and v.

    `k` and `v` have `G` heads; query head h uses key head `h // (N / G)`. `discarded` is boolean, broadcast to `[B, N, S, L]`.
    """
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.where(discarded, -np.inf, q @ wide_k.swapaxes(-1, -2) * scale)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = cotangent @ wide_v.swapaxes(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    dk, dv = ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ cotangent
    B, _, L, D = wide_k.shape
    dk, dv = (x.reshape(B, k.shape[1], group, L, D).sum(2) for x in (dk, dv))
    return p @ wide_v, (ds @ wide_k, dk, dv)


def shared_prefix(segments):
    """What the shared-prefix mask discards, `[B, 1, S, S]`, row by row from its definition."""
    B, S = segments.shape
    discarded = np.ones((B, 1, S, S), bool)
    for b, i, j in np.ndindex(B, S, S):
        discarded[b, 0, i, j] = not (j <= i and segments[b, j] in (0, segments[b, i]))
    return discarded


SEGMENTS = np.array([[0] * 6 + [1] * 5 + [2] * 4 + [-1] * 2, [0] * 5 + [1] * 3 + [2] * 4 + [3] * 5], np.int32)


def inputs(width, heads=(4, 2, 2), seed=0):
    """Queries, keys, values and a cotangent as float16 can hold them, for the rows of `SEGMENTS`."""
    rng, (B, S) = np.random.default_rng(seed), SEGMENTS.shape
    made = [rng.standard_normal((B, n, S, width)).astype(np.float16) for n in heads]
    return (*made, rng.standard_normal((B, heads[0], S, width)).astype(np.float16))


# A result that was computed in float32 and rounded to float16 once.
ROUNDED = {"rtol": 2**-10, "atol": 2e-6}
