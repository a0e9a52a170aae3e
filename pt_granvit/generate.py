"""Greedy generation with a key-value cache."""
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from granvit.data.batch import PromptBatch
from pt_granvit.model import GranViT


@torch.no_grad()
def greedy(model: GranViT, prompts: PromptBatch, max_new_tokens: int, stop_token: int, device: str,
           on_logits: Callable[[Tensor], None] = lambda logits_BV: None) -> np.ndarray:  # fmt: skip
    """Greedy continuation of each row, int32 `[B, max_new_tokens]`. After the first `stop_token` a row holds only `stop_token`.

    `on_logits` is called with the logits `[B, V]` of every step.
    """
    put = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    token_ids, lengths = put(prompts.token_ids_BS).long(), put(prompts.lengths_B).long()
    B, S = token_ids.shape
    c, decoder = model.language.config, model.language
    keys = torch.zeros(c.layers, B, c.kv_heads, S + max_new_tokens, c.head_dim, dtype=decoder.dtype, device=device)
    values = torch.zeros_like(keys)
    image_weights_B = torch.ones(B, device=device)
    inputs, _ = model.inputs(put(prompts.pixels_B3RR), image_weights_B, token_ids, put(prompts.image_positions_BN).long())
    positions = torch.arange(S, device=device).expand(B, S)
    hidden, keys, values = decoder.forward_cached(inputs, positions, positions < lengths[:, None], keys, values)
    hidden = hidden[torch.arange(B, device=device), lengths - 1]
    valid_B1 = torch.ones(B, 1, dtype=torch.bool, device=device)
    out = np.full((B, max_new_tokens), stop_token, np.int32)
    finished = np.zeros(B, bool)
    for t in range(max_new_tokens):
        logits = decoder.head(hidden)
        on_logits(logits)
        tokens = logits.argmax(-1)
        out[:, t] = np.where(finished, stop_token, tokens.cpu().numpy())
        finished |= out[:, t] == stop_token
        if finished.all() or t + 1 == max_new_tokens:
            break
        inputs = decoder.embed(tokens[:, None])
        hidden, keys, values = decoder.forward_cached(inputs, (lengths + t)[:, None], valid_B1, keys, values)
        hidden = hidden[:, 0]
    return out
