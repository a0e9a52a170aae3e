"""CausalDecoder: Qwen2.5 and Llama-3 (RMSNorm, RoPE, grouped-query attention, SwiGLU).

Layout letters: B rows, H query heads, G key-value heads, S sequence, L cache slots, C width, D head width, V vocabulary.
"""
from pathlib import Path
from typing import Self

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from granvit.checkpoint.pretrained import open_pretrained, write_pretrained
from granvit.kernels import Kernels
from granvit.logs import log_kernels
from granvit.models import LanguageConfig, language_shapes
from ms_granvit.arrays import dtype_on_device, fill, to_numpy
from ms_granvit.distributed import use_device
from ms_granvit.layers import Embedding, Linear, RMSNorm, linear, stored_as
from ms_granvit.ops.table import PLAIN, kernels_for
from ms_granvit.taps import Module


class Rotary(nn.Cell):
    """Cosine and sine `[B, 1, S, D]` of rotary position embedding (rotate-half layout), computed in float32."""

    def __init__(self, head_dim: int, theta: float, dtype: ms.Type):
        super().__init__()
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        self.frequencies = Tensor(np.float32(theta) ** -exponent)
        self.dtype = dtype

    def construct(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        B, S = positions_BS.shape
        angles = ops.cast(positions_BS.reshape(B, 1, S, 1), ms.float32) * self.frequencies
        angles = ops.cat((angles, angles), -1)
        return ops.cast(ops.cos(angles), self.dtype), ops.cast(ops.sin(angles), self.dtype)


class LanguageAttention(Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, c: LanguageConfig, kernels: Kernels):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.rotate = kernels.pick("rope")
        self.attend = kernels.attention(head_dim=c.head_dim, masked=True, cached=False).attend
        self.attend_cached = kernels.attention(head_dim=c.head_dim, masked=True, cached=True).attend
        self.q_proj = Linear(c.width, c.heads * c.head_dim, c.qkv_bias)
        self.k_proj = Linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v_proj = Linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.o_proj = Linear(c.heads * c.head_dim, c.width, False)

    def project(self, x_BSC: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries `[B, H, S, D]`, rotated keys and values `[B, G, S, D]`."""
        B, S, _ = x_BSC.shape
        q = self.q_proj(x_BSC).reshape(B, S, self.heads, self.head_dim).transpose(0, 2, 1, 3)
        k = self.k_proj(x_BSC).reshape(B, S, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        v = self.v_proj(x_BSC).reshape(B, S, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin), v

    def output(self, out_BHSD: Tensor) -> Tensor:
        B, _, S, _ = out_BHSD.shape
        return self.o_proj(self.emit(out_BHSD).transpose(0, 2, 1, 3).reshape(B, S, self.heads * self.head_dim))


class LanguageMLP(Module):
    """SwiGLU: `down(silu(gate x) * up x)`."""

    def __init__(self, c: LanguageConfig, kernels: Kernels):
        super().__init__()
        self.swiglu = kernels.pick("swiglu")
        self.gate_proj = Linear(c.width, c.mlp, False)
        self.up_proj = Linear(c.width, c.mlp, False)
        self.down_proj = Linear(c.mlp, c.width, False)

    def construct(self, x: Tensor) -> Tensor:
        return self.down_proj(self.emit(self.swiglu(self.gate_proj(x), self.up_proj(x))))


class LanguageBlock(Module):
    """A pre-norm decoder block."""

    def __init__(self, c: LanguageConfig, kernels: Kernels):
        super().__init__()
        self.input_layernorm = RMSNorm(c.width, c.norm_eps, kernels)
        self.self_attn = LanguageAttention(c, kernels)
        self.post_attention_layernorm = RMSNorm(c.width, c.norm_eps, kernels)
        self.mlp = LanguageMLP(c, kernels)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.self_attn.project(self.input_layernorm(x), cos, sin)
        x = x + self.self_attn.output(self.self_attn.attend(q, k, v, mask))
        return self.emit(x + self.mlp(self.post_attention_layernorm(x)))

    def forward_cached(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, keys: Tensor, values: Tensor,
                       slots_BSL: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """As `construct`, with caches `[B, G, L, D]`; new keys and values are written to the one-hot slots."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), cos, sin)
        B, S, L = slots_BSL.shape
        one_hot_BGSL = ops.broadcast_to(ops.expand_dims(ops.cast(slots_BSL, x.dtype), 1), (B, k.shape[1], S, L))
        keys = keys + ops.BatchMatMul(transpose_a=True)(one_hot_BGSL, k)
        values = values + ops.BatchMatMul(transpose_a=True)(one_hot_BGSL, v)
        x = x + self.self_attn.output(self.self_attn.attend_cached(q, keys, values, mask))
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


class DecoderModel(nn.Cell):
    """Embeddings, blocks and the closing norm, under the canonical path `model`."""

    def __init__(self, c: LanguageConfig, kernels: Kernels):
        super().__init__()
        self.embed_tokens = Embedding(c.vocab, c.width)
        self.layers = nn.CellList([LanguageBlock(c, kernels) for _ in range(c.layers)])
        self.norm = RMSNorm(c.width, c.norm_eps, kernels)


class CausalDecoder(Module):
    """A decoder that takes input embeddings instead of token ids, so that image tokens can be placed between text tokens."""

    def __init__(self, c: LanguageConfig, dtype: ms.Type, kernels: Kernels = PLAIN, recompute: bool = False):
        super().__init__()
        self.config, self.dtype = c, dtype
        self.rotary = Rotary(c.head_dim, c.rope_theta, dtype)
        self.model = DecoderModel(c, kernels)
        self.mask = kernels.attention(head_dim=c.head_dim, masked=True, cached=False).mask
        self.lm_head = None if c.tied_head else Linear(c.width, c.vocab, False)
        if recompute:
            for block in self.model.layers:
                block.recompute()

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: ms.Type | None = None, device: str = "auto") -> Self:
        """Loads the decoder for evaluation from a publisher's directory (any layout that `parity/convert.py` reads), a run, or a
        directory that `save_pretrained` wrote. For `dtype`, `device`, warnings and errors see `VisionEncoder.from_pretrained`."""
        opened = open_pretrained(directory, "language")
        device = use_device(device)
        dtype = dtype or dtype_on_device(opened.dtype)
        kernels = kernels_for(device, dtype)
        with stored_as(dtype):
            decoder = cls(opened.language, dtype, kernels)
        fill(decoder, opened.tensors, "language.")
        log_kernels(kernels)
        return decoder

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors, which `from_pretrained` of either package reads."""
        tensors = ((f"language.{name}", to_numpy(parameter)) for name, parameter in self.parameters_and_names())
        write_pretrained(directory, None, self.config, language_shapes(self.config), tensors)

    def embed(self, token_ids_BS: Tensor) -> Tensor:
        """Token embeddings `[B, S, C]` in the compute dtype."""
        return ops.cast(self.model.embed_tokens(token_ids_BS), self.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states that have passed the closing norm."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return self.emit(linear(hidden, self.model.embed_tokens.weight, None))

    def head_weight(self) -> Tensor:
        """The head's weights `[V, C]`."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def construct(self, inputs_BSC: Tensor, positions_BS: Tensor, segments_BS: Tensor) -> Tensor:
        """Hidden states `[B, S, C]` after the closing norm, with the shared-prefix mask."""
        cos, sin = self.rotary(positions_BS)
        mask = self.mask(segments_BS)
        x = inputs_BSC
        for block in self.model.layers:
            x = block(x, cos, sin, mask)
        return self.model.norm(x)

    def forward_cached(self, inputs_BSC: Tensor, positions_BS: Tensor, valid_BS: Tensor, keys: Tensor,
                       values: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """As `construct`, for one causal segment a row, with caches `[layers, B, G, L, D]` of keys and of values.

        A token's position is also its slot in the caches. Tokens that are not valid (padding) are not written to them. Returns
        hidden states and the caches.
        """
        cos, sin = self.rotary(positions_BS)
        slots, positions_BS1 = ops.arange(keys.shape[3], dtype=positions_BS.dtype), ops.expand_dims(positions_BS, -1)
        mask = ops.expand_dims(slots <= positions_BS1, 1)
        slots_BSL = ops.logical_and(slots == positions_BS1, ops.expand_dims(valid_BS, -1))
        # Unstacked here, once: on CPU, slicing a tensor of five axes takes longer than the rest of a layer.
        x, keys, values = inputs_BSC, ops.unstack(keys, 0), ops.unstack(values, 0)
        all_keys, all_values = (), ()
        for i, block in enumerate(self.model.layers):
            x, k, v = block.forward_cached(x, cos, sin, mask, keys[i], values[i], slots_BSL)
            all_keys += (k,)
            all_values += (v,)
        return self.model.norm(x), ops.stack(all_keys), ops.stack(all_values)
