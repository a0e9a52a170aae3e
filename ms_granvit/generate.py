"""Greedy generation with a key-value cache. One graph reads the prompts, another generates one token; all shapes are fixed."""
from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from granvit.data.batch import PromptBatch
from granvit.models import LanguageConfig
from ms_granvit.model import GranViT, take


class Prefill(nn.Cell):
    """Prompts -> the first token of each answer, its logits `[B, 1, V]` and the caches `[layers, B, G, S + new_tokens, D]`."""

    def __init__(self, model: GranViT, language: LanguageConfig):
        super().__init__(auto_prefix=False)
        self.model = model
        self.layers, self.kv_heads, self.head_dim = language.layers, language.kv_heads, language.head_dim

    def construct(self, pixels_B3RR: Tensor, token_ids_BS: Tensor, lengths_B: Tensor, image_positions_BN: Tensor,
                  new_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        B, S = token_ids_BS.shape
        decoder = self.model.language
        empty = ops.zeros((self.layers, B, self.kv_heads, S + new_tokens, self.head_dim), decoder.dtype)
        image_weights_B = ops.ones((B,), ms.float32)
        inputs, _ = self.model.inputs(pixels_B3RR, image_weights_B, token_ids_BS, image_positions_BN)
        positions = ops.broadcast_to(ops.expand_dims(ops.arange(S, dtype=ms.int32), 0), (B, S))
        valid = positions < ops.expand_dims(lengths_B, 1)
        hidden, keys, values = decoder.forward_cached(inputs, positions, valid, empty, empty)
        logits = decoder.head(take(hidden, ops.expand_dims(lengths_B - 1, 1)))
        return choose_token(logits), logits, keys, values


class Decode(nn.Cell):
    """One token of each row at its position, and the caches -> the next token, its logits `[B, 1, V]` and the caches."""

    def __init__(self, model: GranViT):
        super().__init__(auto_prefix=False)
        self.decoder = model.language

    def construct(self, tokens_B1: Tensor, positions_B1: Tensor, keys: Tensor,
                  values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        inputs = self.decoder.embed(tokens_B1)
        hidden, keys, values = self.decoder.forward_cached(inputs, positions_B1, positions_B1 >= 0, keys, values)
        logits = self.decoder.head(hidden)
        return choose_token(logits), logits, keys, values


def choose_token(logits_B1V: Tensor) -> Tensor:
    """The most probable token, int32 `[B, 1]`."""
    return ops.Argmax(-1, ms.int32)(ops.cast(logits_B1V, ms.float32))


def greedy(prefill: Prefill, decode: Decode, prompts: PromptBatch, max_new_tokens: int, stop_token: int,
           on_logits: Callable[[Tensor], None] = lambda logits_B1V: None) -> np.ndarray:  # fmt: skip
    """Greedy continuation of each row, int32 `[B, max_new_tokens]`. After the first `stop_token` a row holds only `stop_token`.

    `on_logits` is called with the logits `[B, 1, V]` of every step; they stay on the device unless `on_logits` reads them.
    """
    tokens, logits, keys, values = prefill(
        Tensor(prompts.pixels_B3RR), Tensor(prompts.token_ids_BS), Tensor(prompts.lengths_B), Tensor(prompts.image_positions_BN),
        max_new_tokens,
    )  # fmt: skip
    out = np.full((len(prompts.lengths_B), max_new_tokens), stop_token, np.int32)
    finished = np.zeros(len(out), bool)
    for t in range(max_new_tokens):
        on_logits(logits)
        out[:, t] = np.where(finished, stop_token, tokens.asnumpy()[:, 0])
        finished |= out[:, t] == stop_token
        if finished.all() or t + 1 == max_new_tokens:
            break
        tokens, logits, keys, values = decode(tokens, Tensor((prompts.lengths_B + t)[:, None].astype(np.int32)), keys, values)
    return out
