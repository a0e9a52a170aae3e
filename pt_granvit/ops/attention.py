"""Attention: one signature, several implementations, chosen by device when the model is built.

Layout letters: B rows, H query heads, G key-value heads, S queries, L keys, D head width.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from pt_granvit.layers import to_float32_or_wider


def shared_prefix_mask(segments_BS: Tensor) -> Tensor:
    """Boolean `[B, 1, S, S]`, true where query i attends to key j: j <= i, and the key's segment is 0 (the prefix) or i's own."""
    keys, queries = segments_BS[:, None, :], segments_BS[:, :, None]
    order = torch.arange(segments_BS.shape[1], device=segments_BS.device)
    causal = order[None, :] <= order[:, None]
    return (causal & ((keys == 0) | (keys == queries)))[:, None]


def composed(q_BHSD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None) -> Tensor:
    """Matrix product, softmax in float32, matrix product."""
    scores = to_float32_or_wider(torch.matmul(q_BHSD, k_BHLD.transpose(-1, -2)) * q_BHSD.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.matmul(scores.softmax(-1).to(v_BHLD.dtype), v_BHLD)


def sdpa(q_BHSD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's fused kernel for the device at hand."""
    return F.scaled_dot_product_attention(q_BHSD, k_BHLD, v_BHLD, attn_mask=mask)


def npu_fusion(q_BHSD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None) -> Tensor:
    """CANN's fused kernel (`torch_npu.npu_fusion_attention`: float16 or bfloat16; its mask is true where a key is discarded)."""
    import torch_npu

    return torch_npu.npu_fusion_attention(
        q_BHSD, k_BHLD, v_BHLD, q_BHSD.shape[1], "BNSD", atten_mask=None if mask is None else ~mask,
        scale=q_BHSD.shape[-1] ** -0.5,
    )[0]  # fmt: skip


IMPLEMENTATIONS = {"composed": composed, "sdpa": sdpa, "npu_fusion": npu_fusion}


def choose(name: str, device: str, dtype: torch.dtype) -> str:
    """The implementation called `name`, or for `auto` the default of `device` (cpu, cuda, npu) and dtype."""
    fused = device == "npu" and dtype in (torch.bfloat16, torch.float16)
    if name == "auto":
        return "npu_fusion" if fused else "composed" if device == "npu" else "sdpa"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"runtime.attention {name!r} is not one of auto, {', '.join(IMPLEMENTATIONS)}")
    if name == "npu_fusion" and not fused:
        raise ValueError(f"runtime.attention {name!r} runs on npu in bfloat16 and float16, not on {device} in {dtype}; use auto")
    return name


def attention(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: Tensor | None, implementation: str) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v`, `[B, H, S, D]`; boolean mask `[B, 1, S, L]`, true where attention is allowed.

    Fewer key heads than query heads means grouped-query attention: query head h uses key head h // (H / G).
    """
    group_size = q_BHSD.shape[1] // k_BGLD.shape[1]
    k_BHLD, v_BHLD = k_BGLD, v_BGLD
    if group_size > 1:
        k_BHLD, v_BHLD = (heads.repeat_interleave(group_size, dim=1) for heads in (k_BGLD, v_BGLD))
    return IMPLEMENTATIONS[implementation](q_BHSD, k_BHLD, v_BHLD, mask)
