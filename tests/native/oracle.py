"""Attention and ROIAlign by their definitions in float64, with gradients, and the kernels called from numpy."""
import numpy as np

from granvit import native


def seen_by_segments(segments_BS):
    """Boolean `[B, 1, S, S]`: query i sees key j."""
    B, S = segments_BS.shape
    seen = np.zeros((B, 1, S, S), bool)
    for b, row in enumerate(segments_BS.tolist()):
        for i in range(S):
            seen[b, 0, i, : i + 1] = [segment in (0, row[i]) for segment in row[: i + 1]]
    return seen


def attention(q_BHSD, k_BGLD, v_BGLD, segments_BS, dout):
    """The output and the gradients of q, k, v."""
    q, dout = q_BHSD.astype(np.float64), dout.astype(np.float64)
    B, H, _, D = q.shape
    G, L = k_BGLD.shape[1:3]
    k, v = (np.repeat(x.astype(np.float64), H // G, axis=1) for x in (k_BGLD, v_BGLD))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(D)
    if segments_BS is not None:
        scores = np.where(seen_by_segments(segments_BS), scores, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
    p = weights / weights.sum(-1, keepdims=True)
    out = p @ v
    dp = dout @ v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(D)
    dk, dv = (x.reshape(B, G, H // G, L, D).sum(2) for x in (ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout))
    return out, ds @ k, dk, dv


def sampled_cells(boxes_BK4, grid, H, W):
    """Weights `[B, K, grid, grid, H, W]` of the cells in each output: the mean of 2x2 bilinear samples, one sample at a time."""
    B, K, _ = boxes_BK4.shape
    weights = np.zeros((B, K, grid, grid, H, W))
    for b, k in np.ndindex(B, K):
        x1, y1, x2, y2 = boxes_BK4[b, k].astype(np.float64)
        for i, j, a, c in np.ndindex(grid, grid, 2, 2):
            y = np.clip((y1 + (y2 - y1) * (i + (a + 0.5) / 2) / grid) * H - 0.5, 0, H - 1)
            x = np.clip((x1 + (x2 - x1) * (j + (c + 0.5) / 2) / grid) * W - 0.5, 0, W - 1)
            if np.isnan(y + x):
                weights[b, k] = np.nan
                continue
            top, left = int(y), int(x)
            for row, share_y in ((top, top + 1 - y), (top + 1, y - top)):
                for column, share_x in ((left, left + 1 - x), (left + 1, x - left)):
                    if share_y * share_x:
                        weights[b, k, i, j, row, column] += share_y * share_x / 4
    return weights


def roi_align(features_BHWC, boxes_BK4, grid, dout):
    """The output and the gradient of the features."""
    weights = sampled_cells(boxes_BK4, grid, *features_BHWC.shape[1:3])
    out = np.einsum("bkijhw,bhwc->bkijc", weights, features_BHWC.astype(np.float64))
    return out, np.einsum("bkijhw,bkijc->bhwc", weights, dout.astype(np.float64))


def run_attention(q_BHSD, k_BGLD, v_BGLD, segments_BS, dout):
    """The kernels' output and gradients."""
    sizes = native.check_attention(q_BHSD.shape, k_BGLD.shape, v_BGLD.shape, None if segments_BS is None else segments_BS.shape)
    inputs = [q_BHSD, k_BGLD, v_BGLD, segments_BS]
    out, lse_BHS = np.empty_like(q_BHSD), np.empty(q_BHSD.shape[:-1], np.float32)
    gradients = [np.empty_like(x) for x in inputs[:3]]
    call("granvit_attention_forward", [*inputs, out, lse_BHS], sizes)
    call("granvit_attention_backward", [*inputs, out, lse_BHS, dout, None, *gradients], sizes)
    return out, *gradients


def run_roi_align(features_BHWC, boxes_BK4, grid, dout):
    """The kernels' output and gradient."""
    out = np.empty(native.check_roi_align(features_BHWC.shape, boxes_BK4.shape, grid), np.float32)
    dfeatures = np.empty_like(features_BHWC)
    sizes = (*out.shape[:2], *features_BHWC.shape[1:], grid)
    call("granvit_roi_align_forward", [features_BHWC, boxes_BK4, out], sizes)
    call("granvit_roi_align_backward", [dout, boxes_BK4, dfeatures], sizes)
    return out, dfeatures


def call(name, arrays, sizes):
    native.call(name, [None if array is None else array.ctypes.data for array in arrays], sizes)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention_case(B, H, G, S, L, D, segments=None, seed=0):
    """Arguments of `attention`; `segments` is one row for all images, or a row for each."""
    segments_BS = None if segments is None else np.broadcast_to(np.array(segments, np.int32), (B, S)).copy()
    shapes = ((B, H, S, D), (B, G, L, D), (B, G, L, D), (B, H, S, D))
    q, k, v, dout = (normal([seed, n], *shape) for n, shape in enumerate(shapes))
    return q, k, v, segments_BS, dout


def packed(prefix, *lengths, padding=0):
    """Segments of a row: a prefix, questions of these lengths, padding."""
    return [0] * prefix + [n for n, length in enumerate(lengths, 1) for _ in range(length)] + [-1] * padding


ATTENTION = {
    "one row, one key": attention_case(1, 1, 1, 1, 1, 8),
    "head width 72": attention_case(1, 2, 2, 45, 45, 72),
    "odd sizes": attention_case(2, 3, 1, 33, 33, 5),
    "more keys than queries": attention_case(1, 2, 1, 7, 130, 20),
    "more queries than keys": attention_case(1, 2, 2, 70, 3, 16),
    "shared prefix": attention_case(2, 6, 2, 210, 210, 24, packed(101, 30, 40, 20, padding=19)),
    "rows of different segments": attention_case(2, 2, 1, 40, 40, 12, [packed(20, 10, 10), packed(0, 3, 30, padding=7)]),
    "each query sees itself alone": attention_case(1, 2, 2, 37, 37, 8, range(1, 38)),
    "causal": attention_case(1, 1, 1, 131, 131, 16, packed(131)),
    "segments in no order": attention_case(1, 2, 1, 120, 120, 8, np.random.default_rng(0).integers(-1, 4, 120)),
    "one query": attention_case(1, 4, 2, 1, 1, 6, [3]),
}


def boxes(*rows, images=1):
    return np.broadcast_to(np.array(rows, np.float32).reshape(-1, 4), (images, len(rows), 4)).copy()


def roi_align_case(B, H, W, C, grid, boxes_BK4, seed=0):
    return normal([seed, 0], B, H, W, C), boxes_BK4, grid, normal([seed, 1], B, boxes_BK4.shape[1], grid, grid, C)


NAN, INF = np.nan, np.inf
ROI_ALIGN = {
    "one box": roi_align_case(1, 6, 5, 7, 3, boxes((0.1, 0.2, 0.7, 0.9))),
    "two images": roi_align_case(2, 5, 8, 130, 4, boxes((0.1, 0.2, 0.35, 0.3), (0, 0, 1, 1), (0.5, 0.4, 0.9, 0.5), images=2)),
    "one cell": roi_align_case(1, 1, 1, 3, 2, boxes((0.2, 0.2, 0.8, 0.8))),
    "grid finer than the features": roi_align_case(1, 3, 3, 17, 9, boxes((0, 0, 1, 1), (0.4, 0.4, 0.6, 0.6))),
    "grid of one": roi_align_case(1, 9, 9, 4, 1, boxes((0, 0, 1, 1))),
    "zero width": roi_align_case(1, 4, 4, 5, 3, boxes((0.5, 0.1, 0.5, 0.8), (0.3, 0.3, 0.3, 0.3))),
    "on the border": roi_align_case(1, 4, 4, 5, 3, boxes((0, 0, 0, 1), (1, 1, 1, 1), (0.9, 0, 1, 0.1))),
    "inverted": roi_align_case(1, 4, 6, 5, 3, boxes((0.8, 0.9, 0.1, 0.3))),
    "outside": roi_align_case(1, 4, 6, 5, 3, boxes((-1, -2, 3, 0.5), (2, 2, 3, 3), (1e30, -1e30, 1e38, 0.5))),
    "infinite": roi_align_case(1, 4, 6, 5, 3, boxes((0.1, 0.1, INF, 0.9))),
    "NaN": roi_align_case(2, 4, 6, 5, 3, np.concatenate([boxes((0.1, 0.2, NAN, 0.9)), boxes((0.1, 0.2, 0.3, 0.9))])),
    "no box": roi_align_case(2, 4, 6, 5, 3, np.zeros((2, 0, 4), np.float32)),
    "no image": roi_align_case(0, 4, 6, 5, 3, np.zeros((0, 2, 4), np.float32)),
}


def assert_near(found, expected, roundings=24):
    """Equal but for so many roundings of float32 of the largest number (of 1, if all are less); NaN in the same places."""
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        assert np.array_equal(np.isnan(got), np.isnan(want))
        if np.isfinite(want).any():
            error = np.nanmax(np.abs(got - want)) / max(np.nanmax(np.abs(want)), 1)
            assert error <= roundings * 2.0**-24, f"{error * 2.0**24:.1f} roundings"
