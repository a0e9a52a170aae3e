"""Attention: `softmax(q k^T / sqrt(D)) v`, `[B, H, S, D]`, in the dtype of `q`.

The mask is boolean `[B, 1, S, L]`, true where attention is allowed, or None. Fewer key heads than query heads means grouped-query
attention: query head h uses key head h // (H / G). Layout letters: B rows, H query heads, G key-value heads, S queries, L keys, D
head width.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from pt_granvit.arrays import to_float32_or_wider

UNLIMITED = 2147483647  # the default of `next_tockens`


def shared_prefix_mask(segments_BS: Tensor) -> Tensor:
    """Boolean `[B, 1, S, S]`, true where query i attends to key j: j <= i, and the key's segment is 0 (the prefix) or i's own."""
    keys, queries = segments_BS[:, None, :], segments_BS[:, :, None]
    order = torch.arange(segments_BS.shape[1], device=segments_BS.device)
    causal = order[None, :] <= order[:, None]
    return (causal & ((keys == 0) | (keys == queries)))[:, None]


def repeated(heads_BGLD: Tensor, H: int) -> Tensor:
    """Key or value heads, each repeated for the query heads that use it, `[B, H, L, D]`."""
    return heads_BGLD if heads_BGLD.shape[1] == H else heads_BGLD.repeat_interleave(H // heads_BGLD.shape[1], dim=1)


def composed(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None) -> Tensor:
    """Matrix product, softmax in float32, matrix product. Queries are scaled first, so that float16 scores overflow later."""
    H = q_BHSD.shape[1]
    scores = to_float32_or_wider(torch.matmul(q_BHSD * q_BHSD.shape[-1] ** -0.5, repeated(k_BGLD, H).transpose(-1, -2)))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.matmul(scores.softmax(-1).to(v_BGLD.dtype), repeated(v_BGLD, H))


def sdpa(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's fused kernel for the device at hand."""
    H = q_BHSD.shape[1]
    return F.scaled_dot_product_attention(q_BHSD, repeated(k_BGLD, H), repeated(v_BGLD, H), attn_mask=mask)


def npu_fusion(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None) -> Tensor:
    """CANN's fused kernel (`torch_npu.npu_fusion_attention`: float16 or bfloat16). Its own mask is true where a key is discarded.
    It takes fewer key heads than query heads, so keys and values are not repeated.

    Head widths that are no multiple of 16 (SigLIP's 72) are padded with zeros, as in the MindSpore twin. This changes neither
    scores nor outputs; the scale is that of the unpadded width.

    Where a mask is square, no query attends to a later key (`shared_prefix_mask`; a prompt in caches of its own length). The
    kernel is told so by `next_tockens=0` and leaves out the blocks above the diagonal, 45% of a row of stage 1 (docs/kernels.md).
    """
    import torch_npu

    width = q_BHSD.shape[-1]
    padding = -width % 16
    q_BHSD, k_BGLD, v_BGLD = (F.pad(x, (0, padding)) if padding else x for x in (q_BHSD, k_BGLD, v_BGLD))
    discarded = None if mask is None else ~mask
    causal = mask is not None and q_BHSD.shape[2] == k_BGLD.shape[2]
    out = torch_npu.npu_fusion_attention(
        q_BHSD, k_BGLD, v_BGLD, q_BHSD.shape[1], "BNSD", atten_mask=discarded, scale=width**-0.5,
        next_tockens=0 if causal else UNLIMITED,
    )[0]  # fmt: skip
    return out[..., :width]
