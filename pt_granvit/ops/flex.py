"""Attention of the decoder on CUDA: PyTorch's FlexAttention with a block mask made from the segments.

Masked blocks of 128 x 128 scores are skipped, forward and backward, and grouped keys are not repeated. What PyTorch 2.13 does by
device, from its sources (nothing here has run on a GPU):

- CUDA: `attention` compiles FlexAttention, because uncompiled it holds all scores `[B, H, S, L]`. Each combination of shapes,
  strides and dtypes is compiled once (`dynamic=False`), which in training is once per bucket. Dynamo keeps at most
  `torch._dynamo.config.recompile_limit` (8) of them, then it raises. Head widths below 16 are refused.
- CPU: forward pass only, uncompiled, for tests. Inputs that require a gradient are refused, compiled or not.
- NPU: refused.

Layout letters: B rows, H query heads, G key-value heads, S queries, L keys, D head width, n blocks, T tokens of a block.
"""
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # tokens per block; FlexAttention's default


def block_mask(segments_BS: Tensor) -> BlockMask:
    """The shared-prefix rule as a `BlockMask`: query i attends to key j if j <= i, and the key's segment is 0 or i's own.

    Segments are integers: 0 the prefix, 1 to K the questions, -1 padding. Made once per batch. The classes of the blocks (absent,
    partial, full) follow from the least and the greatest segment in each block, in O(S + n^2) memory and work;
    `create_block_mask` evaluates all S x S pairs, and uncompiled it also holds them. The classes are those of `create_block_mask`
    if each row's segments ascend, padding last, as the packer makes them. For other rows, some blocks without an allowed pair are
    computed too; the result is the same.

    If S is no multiple of 128, the last block is filled up with a segment that no token has.
    """
    S = segments_BS.shape[1]
    last = torch.iinfo(torch.int32).max  # exact as the float that F.pad makes of it
    ranked = torch.where(segments_BS < 0, last - 1, segments_BS)  # padding comes last
    blocks_BnT = F.pad(ranked, (0, -S % BLOCK), value=last).unflatten(1, (-1, BLOCK))
    n = blocks_BnT.shape[1]
    low, high = blocks_BnT.aminmax(dim=2)
    asked_low = torch.where(blocks_BnT == 0, last, blocks_BnT).amin(2)  # least segment apart from the prefix
    order = torch.arange(n, device=segments_BS.device)
    below = order[None, :] < order[:, None]
    query = lambda x: x[:, :, None]  # noqa: E731
    key = lambda x: x[:, None, :]  # noqa: E731
    overlap = (key(asked_low) <= query(high)) & (query(asked_low) <= key(high))
    single = query(low) == query(high)
    own = single & (key(asked_low) == query(low)) & (key(high) == query(low))
    full_Bnn = below & ((key(high) == 0) & (query(high) < last) | own)
    partial_Bnn = (below & (key(low) == 0) | below & overlap | (order[None, :] == order[:, None])) & ~full_Bnn

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((segments_BS[b, j] == 0) | (segments_BS[b, j] == segments_BS[b, i]))

    return BlockMask.from_kv_blocks(
        *listed(partial_Bnn), *listed(full_Bnn), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(S, S)
    )


def listed(blocks_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """Number `[B, 1, n]` and indices `[B, 1, n, n]` of the key blocks that are set for each query block, those first; int32."""
    indices = blocks_Bnn.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_Bnn.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None]


@cache
def compiled():
    """FlexAttention compiled for fixed shapes. Compilation starts at the first call."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def attention(q_BHSD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, mask: BlockMask | None) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v`, `[B, H, S, D]`, in float32, bfloat16 or float16; query head h uses key head h // (H / G).

    `mask` is that of `block_mask`. Without a mask (vision attention) PyTorch's `scaled_dot_product_attention` runs.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q_BHSD, k_BGLD, v_BGLD, enable_gqa=True)
    fused = q_BHSD.is_cuda and not torch.compiler.is_compiling()  # a step that is compiled as a whole compiles this too
    return (compiled() if fused else flex_attention)(q_BHSD, k_BGLD, v_BGLD, block_mask=mask, enable_gqa=True)
