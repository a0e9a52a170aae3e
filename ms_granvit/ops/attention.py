"""Attention: one signature, several implementations, chosen by device when the model is built."""
import mindspore as ms
from mindspore import Tensor, ops


def shared_prefix_mask(segments_BS: Tensor) -> Tensor:
    """Boolean `[B, 1, S, S]`, true where query i may see key j: j <= i and the key's segment is 0 (the prefix) or i's own."""
    keys, queries = ops.expand_dims(segments_BS, 1), ops.expand_dims(segments_BS, 2)
    order = ops.arange(segments_BS.shape[1])
    causal = ops.expand_dims(order, 0) <= ops.expand_dims(order, 1)
    allowed = ops.logical_and(causal, ops.logical_or(keys == 0, keys == queries))
    return ops.expand_dims(allowed, 1)


def composed(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None) -> Tensor:
    """Matrix product, softmax in float32, matrix product."""
    groups = q_BHSD.shape[1] // k_BGLD.shape[1]
    if groups > 1:
        B, G, L, D = k_BGLD.shape
        k_BGLD = ops.broadcast_to(ops.expand_dims(k_BGLD, 2), (B, G, groups, L, D)).reshape(B, G * groups, L, D)
        v_BGLD = ops.broadcast_to(ops.expand_dims(v_BGLD, 2), (B, G, groups, L, D)).reshape(B, G * groups, L, D)
    scores = ops.BatchMatMul(transpose_b=True)(q_BHSD * q_BHSD.shape[-1] ** -0.5, k_BGLD)
    scores = ops.cast(scores, ms.float32)
    if mask is not None:  # added, for masked_fill is slow on CPU; -1e30 swallows any score, as the lowest float32 does
        scores = scores + ops.cast(ops.logical_not(mask), ms.float32) * -1e30
    return ops.BatchMatMul()(ops.cast(ops.softmax(scores, -1), v_BGLD.dtype), v_BGLD)


def flash(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None) -> Tensor:
    """CANN's fused kernel: fp16 or bf16, its mask is true where a key is discarded, grouped queries by the head counts.

    It takes head widths that are multiples of 16: others (SigLIP's 72) are padded with zeros, which changes neither scores
    nor outputs, and the scale stays that of the true width.
    """
    width = q_BHSD.shape[-1]
    padding = -width % 16
    if padding:
        q_BHSD, k_BGLD, v_BGLD = (
            ops.pad(q_BHSD, (0, padding)), ops.pad(k_BGLD, (0, padding)), ops.pad(v_BGLD, (0, padding)),
        )  # fmt: skip
    discarded = None if mask is None else ops.logical_not(mask)
    out = ops.flash_attention_score(
        q_BHSD, k_BGLD, v_BGLD, q_BHSD.shape[1], attn_mask=discarded, scalar_value=width**-0.5, input_layout="BNSD"
    )
    return out[..., :width] if padding else out


IMPLEMENTATIONS = ("composed", "flash")


def choose(name: str, device: str) -> str:
    """The implementation called `name`, or for `auto` the best that `device` (cpu, npu) supports."""
    if name == "auto":
        return "flash" if device == "npu" else "composed"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"runtime.attention {name!r} is not one of auto, {', '.join(IMPLEMENTATIONS)}")
    if name == "flash" and device != "npu":
        raise ValueError(f"runtime.attention 'flash' runs on npu alone, and this run's device is {device}; use auto")
    return name


def attention(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None, implementation: str) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v`, `[B, H, S, D]`; boolean mask `[B, 1, S, L]`, true where attention is allowed.

    Fewer key heads than query heads means grouped-query attention: query head h uses key head h // (H / G).
    """
    if implementation == "flash":
        return flash(q_BHSD, k_BGLD, v_BGLD, mask)
    return composed(q_BHSD, k_BGLD, v_BGLD, mask)
