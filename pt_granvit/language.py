"""CausalDecoder: Qwen2.5 and Llama-3 (RMSNorm, RoPE, grouped-query attention, SwiGLU).

Layout letters: B rows, H query heads, G key-value heads, S sequence, L cache slots, C width, D head width, V vocabulary.
"""
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from granvit.checkpoint.pretrained import open_pretrained, write_pretrained
from granvit.kernels import Kernels
from granvit.logs import log_kernels
from granvit.models import LanguageConfig, language_shapes
from pt_granvit.arrays import DTYPES, fill, to_numpy
from pt_granvit.distributed import choose_device
from pt_granvit.layers import Embedding, Linear, RMSNorm, stored_as
from pt_granvit.ops.table import PLAIN, kernels_for
from pt_granvit.taps import Module


def rotary(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[B, 1, S, D]` of rotary position embedding (rotate-half layout), computed in float32 at least."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=exact) / head_dim
    angles = positions_BS[:, None, :, None].to(exact) * theta**-exponent
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class LanguageAttention(Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, c: LanguageConfig, kernels: Kernels):
        super().__init__()
        self.head_dim = c.head_dim
        self.rotate = kernels.pick("rope")
        self.attend = kernels.attention(head_dim=c.head_dim, masked=True, cached=False).attend
        self.attend_cached = kernels.attention(head_dim=c.head_dim, masked=True, cached=True).attend
        self.q_proj = Linear(c.width, c.heads * c.head_dim, c.qkv_bias)
        self.k_proj = Linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v_proj = Linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.o_proj = Linear(c.heads * c.head_dim, c.width, False)

    def project(self, x_BSC: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries `[B, H, S, D]`, rotated keys and values `[B, G, S, D]`."""
        q, k, v = (p(x_BSC).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin), v

    def output(self, out_BHSD: Tensor) -> Tensor:
        return self.o_proj(self.emit(out_BHSD).transpose(1, 2).flatten(2))


class LanguageMLP(Module):
    """SwiGLU: `down(silu(gate x) * up x)`."""

    def __init__(self, c: LanguageConfig, kernels: Kernels):
        super().__init__()
        self.swiglu = kernels.pick("swiglu")
        self.gate_proj = Linear(c.width, c.mlp, False)
        self.up_proj = Linear(c.width, c.mlp, False)
        self.down_proj = Linear(c.mlp, c.width, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.emit(self.swiglu(self.gate_proj(x), self.up_proj(x))))


class LanguageBlock(Module):
    """A pre-norm decoder block."""

    def __init__(self, c: LanguageConfig, kernels: Kernels):
        super().__init__()
        self.input_layernorm = RMSNorm(c.width, c.norm_eps, kernels)
        self.self_attn = LanguageAttention(c, kernels)
        self.post_attention_layernorm = RMSNorm(c.width, c.norm_eps, kernels)
        self.mlp = LanguageMLP(c, kernels)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.self_attn.project(self.input_layernorm(x), cos, sin)
        x = x + self.self_attn.output(self.self_attn.attend(q, k, v, mask))
        return self.emit(x + self.mlp(self.post_attention_layernorm(x)))

    def forward_cached(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, keys: Tensor, values: Tensor,
                       slots_BSL: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """As `forward`, with caches `[B, G, L, D]`; new keys and values are written to the one-hot slots."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), cos, sin)
        one_hot_B1LS = slots_BSL.transpose(1, 2)[:, None].to(x.dtype)
        keys, values = keys + one_hot_B1LS @ k, values + one_hot_B1LS @ v
        x = x + self.self_attn.output(self.self_attn.attend_cached(q, keys, values, mask))
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


class DecoderModel(nn.Module):
    """Embeddings, blocks and the closing norm, under the canonical path `model`."""

    def __init__(self, c: LanguageConfig, kernels: Kernels):
        super().__init__()
        self.embed_tokens = Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(LanguageBlock(c, kernels) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.norm_eps, kernels)


class CausalDecoder(Module):
    """A decoder that takes input embeddings instead of token ids, so that image tokens can be placed between text tokens."""

    def __init__(self, c: LanguageConfig, dtype: torch.dtype, kernels: Kernels = PLAIN, recompute: bool = False):
        super().__init__()
        self.config, self.dtype, self.recompute = c, dtype, recompute
        self.model = DecoderModel(c, kernels)
        self.mask = kernels.attention(head_dim=c.head_dim, masked=True, cached=False).mask
        self.lm_head = None if c.tied_head else Linear(c.width, c.vocab, False)

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | None = None, device: str = "auto") -> Self:
        """Loads the decoder for evaluation from a publisher's directory (any layout that `parity/convert.py` reads), a run, or a
        directory that `save_pretrained` wrote. For `dtype`, `device`, warnings and errors see `VisionEncoder.from_pretrained`."""
        opened = open_pretrained(directory, "language")
        dtype = dtype or DTYPES[opened.dtype]
        device = choose_device(device)
        kernels = kernels_for(device, dtype)
        with torch.device(device), stored_as(dtype):
            decoder = cls(opened.language, dtype, kernels)
        fill(decoder, opened.tensors, "language.")
        log_kernels(kernels)
        return decoder.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors, which `from_pretrained` of either package reads."""
        tensors = ((f"language.{name}", to_numpy(parameter)) for name, parameter in self.named_parameters())
        write_pretrained(directory, None, self.config, language_shapes(self.config), tensors)

    def embed(self, token_ids_BS: Tensor) -> Tensor:
        """Token embeddings `[B, S, C]` in the compute dtype."""
        return self.model.embed_tokens(token_ids_BS).to(self.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states that have passed the closing norm."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return self.emit(torch.nn.functional.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype)))

    def head_weight(self) -> Tensor:
        """The head's weights `[V, C]`."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, inputs_BSC: Tensor, positions_BS: Tensor, segments_BS: Tensor) -> Tensor:
        """Hidden states `[B, S, C]` after the closing norm, with the shared-prefix mask."""
        cos, sin = rotary(positions_BS, self.config.head_dim, self.config.rope_theta, self.dtype)
        mask = self.mask(segments_BS)
        x = inputs_BSC
        for block in self.model.layers:
            if self.recompute and self.training:
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask)
        return self.model.norm(x)

    def forward_cached(self, inputs_BSC: Tensor, positions_BS: Tensor, valid_BS: Tensor, keys: Tensor,
                       values: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """As `forward`, for one causal segment a row, with caches `[layers, B, G, L, D]` of keys and of values.

        A token's position is also its slot in the caches. Tokens that are not valid (padding) are not written to them. Returns
        hidden states and the caches.
        """
        cos, sin = rotary(positions_BS, self.config.head_dim, self.config.rope_theta, self.dtype)
        slots = torch.arange(keys.shape[3], device=keys.device)
        positions_BS1 = positions_BS[..., None]
        mask = (slots <= positions_BS1)[:, None]
        slots_BSL = (slots == positions_BS1) & valid_BS[..., None]
        x, all_keys, all_values = inputs_BSC, [], []
        for i, block in enumerate(self.model.layers):
            x, k, v = block.forward_cached(x, cos, sin, mask, keys[i], values[i], slots_BSL)
            all_keys.append(k)
            all_values.append(v)
        return self.model.norm(x), torch.stack(all_keys), torch.stack(all_values)
