"""Llama as transformers writes it. Its words are the canonical ones below `language.`."""
from typing import Any

from granvit.checkpoint.layouts import Layout


def read_config(tree: dict[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageConfig`; transformers 5 writes `rope_parameters`, 4 a flat `rope_theta`."""
    rope = tree.get("rope_parameters") or tree
    return {
        "width": tree["hidden_size"],
        "mlp": tree["intermediate_size"],
        "layers": tree["num_hidden_layers"],
        "heads": tree["num_attention_heads"],
        "kv_heads": tree["num_key_value_heads"],
        "head_dim": tree.get("head_dim") or tree["hidden_size"] // tree["num_attention_heads"],
        "vocab": tree["vocab_size"],
        "norm_eps": tree["rms_norm_eps"],
        "rope_theta": float(rope["rope_theta"]),
        "tied_head": tree.get("tie_word_embeddings", False),
    }


BLOCK = (
    *(f"self_attn.{p}_proj" for p in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "input_layernorm", "post_attention_layernorm",
)  # fmt: skip

ROWS = (
    ("model.embed_tokens.weight", "language.model.embed_tokens.weight"),
    *((f"model.layers.{{i}}.{m}.weight", f"language.model.layers.{{i}}.{m}.weight") for m in BLOCK),
    ("model.norm.weight", "language.model.norm.weight"),
    ("lm_head.weight", "language.lm_head.weight"),
)
LEFT_OUT = (("model.layers.{i}.self_attn.rotary_emb.inv_freq", "a constant: old files carry it"),)

LLAMA = Layout(
    name="llama",
    model_types=("llama",),
    rows=ROWS,
    left_out=LEFT_OUT,
    read_config=lambda tree: read_config(tree) | {"qkv_bias": tree.get("attention_bias", False)},
)
