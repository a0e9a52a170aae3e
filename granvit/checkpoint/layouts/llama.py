"""Llama in the layout of transformers. The canonical names are the same with the prefix `language.`."""
from typing import Any

from granvit.checkpoint.layouts import Layout, Spelling, one_of
from granvit.models import LanguageConfig, VisionConfig


def read_config(tree: dict[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageConfig` from a config.json. transformers 5 writes `rope_parameters`, transformers 4 `rope_theta`."""
    rope = tree.get("rope_parameters") or tree
    scaling = tree.get("rope_parameters") or tree.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))  # older files write `type`
    one_of({"default": ""}, kind, "rope_type")  # other types scale the angles, which is not implemented here
    one_of({False: ""}, tree.get("use_sliding_window", False), "use_sliding_window")
    one_of({"silu": ""}, tree.get("hidden_act", "silu"), "hidden_act")
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


def write_config(language: LanguageConfig) -> dict[str, Any]:
    """The inverse of `read_config`, with the keys of transformers 4."""
    return {
        "hidden_act": "silu",
        "hidden_size": language.width,
        "intermediate_size": language.mlp,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "head_dim": language.head_dim,
        "vocab_size": language.vocab,
        "rms_norm_eps": language.norm_eps,
        "rope_theta": language.rope_theta,
        "tie_word_embeddings": language.tied_head,
    }


BLOCK = (
    *(f"self_attn.{p}_proj" for p in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
LEFT_OUT = (("layers.{i}.self_attn.rotary_emb.inv_freq", "a constant that old files carry"),)


def spelling(model: str = "model.", head: str = "lm_head.") -> Spelling:
    """The decoder's names with the prefix `model`, and the head's with the prefix `head`."""
    rows = (
        ("embed_tokens.weight", "language.model.embed_tokens.weight"),
        *((f"layers.{{i}}.{m}.weight", f"language.model.layers.{{i}}.{m}.weight") for m in BLOCK),
        ("norm.weight", "language.model.norm.weight"),
    )
    return Spelling(rows, LEFT_OUT).prefixed(model) + Spelling(((f"{head}weight", "language.lm_head.weight"),))


def _write_config(vision: VisionConfig | None, language: LanguageConfig) -> dict[str, Any]:
    if language.qkv_bias:
        raise ValueError("this decoder has biases on queries, keys and values, which 'llama' does not have: use 'qwen2'")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False} | write_config(language)


LLAMA = Layout(
    name="llama",
    model_types=("llama",),
    spellings=(spelling(),),
    read_config=lambda tree: {
        "language": read_config(tree) | {"qkv_bias": tree.get("attention_bias", False), "chat": "llama-3"}
    },
    write_config=_write_config,
)
