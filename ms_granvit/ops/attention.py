"""Attention: `softmax(q k^T / sqrt(D)) v`, `[B, H, S, D]`, in the dtype of `q`.

The mask is boolean `[B, 1, S, L]`, true where attention is allowed, or None. Fewer key heads than query heads means grouped-query
attention: query head h uses key head h // (H / G). Layout letters: B rows, H query heads, G key-value heads, S queries, L keys, D
head width.
"""
import mindspore as ms
from mindspore import Tensor, nn, ops

UNLIMITED = 2147483647  # the default of `next_tokens`


def shared_prefix_mask(segments_BS: Tensor) -> Tensor:
    """Boolean `[B, 1, S, S]`, true where query i attends to key j: j <= i, and the key's segment is 0 (the prefix) or i's own.

    Both sides are broadcast before they are compared: on CPU a comparison that broadcasts takes several times as long.
    """
    B, S = segments_BS.shape
    keys = ops.broadcast_to(ops.expand_dims(segments_BS, 1), (B, S, S))
    queries = ops.broadcast_to(ops.expand_dims(segments_BS, 2), (B, S, S))
    order = ops.arange(S, dtype=segments_BS.dtype)
    causal = ops.broadcast_to(ops.expand_dims(order, 0) <= ops.expand_dims(order, 1), (B, S, S))
    return ops.expand_dims(ops.logical_and(causal, ops.logical_or(keys == 0, keys == queries)), 1)


class Composed(nn.Cell):
    """Matrix product, softmax in float32, matrix product; returns the output and the probabilities.

    The backward pass is written by hand because MindSpore's CPU backend splits the gradient of softmax into reductions and
    broadcasts over `[B, H, S, L]`. With O the output, P the probabilities and D = sum(dO * O) for each query, the gradient of the
    scores is P * (dO V^T - D). One matrix product computes the bracket: dO has -D as an additional column, V a column of ones.
    """

    def __init__(self):
        super().__init__()
        self.nn, self.nt, self.tn = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True), ops.BatchMatMul(transpose_a=True)

    def construct(self, q_BHSD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = ops.cast(self.nt(q_BHSD, k_BHLD), ms.float32) + bias
        p_BHSL = ops.cast(ops.softmax(scores, -1), v_BHLD.dtype)
        return self.nn(p_BHSL, v_BHLD), p_BHSL

    def bprop(self, q_BHSD, k_BHLD, v_BHLD, bias, outputs, gradients):
        out, p_BHSL = outputs
        dout, _ = gradients
        product = ops.cast(dout, ms.float32) * ops.cast(out, ms.float32)
        B, H, _, D = product.shape
        minus_D = ops.cast(self.nn(product, ops.full((B, H, D, 1), -1.0, dtype=ms.float32)), dout.dtype)
        dscores = p_BHSL * self.nt(ops.cat((dout, minus_D), -1), ops.cat((v_BHLD, ops.ones_like(v_BHLD[..., :1])), -1))
        return self.nn(dscores, k_BHLD), self.tn(dscores, q_BHSD), self.tn(p_BHSL, dout), ops.zeros_like(bias)


COMPOSED = Composed()


def composed(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None) -> Tensor:
    """`Composed` for any number of key heads. The mask is added to the scores as -1e30 where attention is not allowed; any
    score added to that is lost to rounding. masked_fill is slow on CPU, and so is a broadcast: the mask is broadcast once for all
    layers."""
    B, H, S, D = q_BHSD.shape
    G, L = k_BGLD.shape[1], k_BGLD.shape[2]
    if G < H:
        k_BGLD = ops.broadcast_to(ops.expand_dims(k_BGLD, 2), (B, G, H // G, L, D)).reshape(B, H, L, D)
        v_BGLD = ops.broadcast_to(ops.expand_dims(v_BGLD, 2), (B, G, H // G, L, D)).reshape(B, H, L, D)
    bias = Tensor(0.0, ms.float32)
    if mask is not None:
        bias = ops.broadcast_to(ops.cast(ops.logical_not(mask), ms.float32) * -1e30, (B, H, S, L))
    return COMPOSED(q_BHSD * D**-0.5, k_BGLD, v_BGLD, bias)[0]


def flash(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None) -> Tensor:
    """CANN's fused kernel (float16 or bfloat16). Its own mask is true where a key is discarded. It takes fewer key heads than
    query heads, so keys and values are not repeated.

    The kernel takes head widths that are multiples of 16. Others (SigLIP's 72) are padded with zeros, which changes neither
    scores nor outputs; the scale is that of the unpadded width.

    Where a mask is square, no query attends to a later key (`shared_prefix_mask`; a prompt in caches of its own length). The
    kernel is told so by `next_tokens=0` and leaves out the blocks above the diagonal, 45% of a row of stage 1 (docs/kernels.md).
    """
    width = q_BHSD.shape[-1]
    padding = -width % 16
    if padding:
        q_BHSD, k_BGLD, v_BGLD = zero_padded(q_BHSD, padding), zero_padded(k_BGLD, padding), zero_padded(v_BGLD, padding)
    discarded = None if mask is None else ops.logical_not(mask)
    causal = mask is not None and q_BHSD.shape[2] == k_BGLD.shape[2]
    out = ops.flash_attention_score(
        q_BHSD, k_BGLD, v_BGLD, q_BHSD.shape[1], attn_mask=discarded, scalar_value=width**-0.5, input_layout="BNSD",
        next_tokens=0 if causal else UNLIMITED,
    )  # fmt: skip
    return out[..., :width] if padding else out


def zero_padded(x_BHSD: Tensor, padding: int) -> Tensor:
    """`x` with `padding` zeros appended along its last axis (`ops.pad` does not compile in bfloat16)."""
    return ops.cat((x_BHSD, ops.zeros((*x_BHSD.shape[:-1], padding), x_BHSD.dtype)), -1)
