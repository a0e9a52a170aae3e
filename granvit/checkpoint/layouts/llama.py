"""Llama as transformers writes it. Its words are the canonical ones below `language.`."""
from typing import Any

from granvit.checkpoint.layouts import Layout, Spelling, one_of
from granvit.models import LanguageConfig, VisionConfig


def read_config(tree: dict[str, Any]) -> dict[str, Any]:
    """Fields of `LanguageConfig`; transformers 5 writes `rope_parameters`, 4 a flat `rope_theta`."""
    rope = tree.get("rope_parameters") or tree
    scaling = tree.get("rope_parameters") or tree.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))  # older files write `type`
    one_of({"default": ""}, kind, "rope_type")  # another scales the angles, which no decoder here does
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
    """What `read_config` reads, in transformers 4's words."""
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
LEFT_OUT = (("layers.{i}.self_attn.rotary_emb.inv_freq", "a constant: old files carry it"),)


def spelling(model: str = "model.", head: str = "lm_head.") -> Spelling:
    """The decoder's names with `model` before the blocks' and `head` before the head's."""
    rows = (
        ("embed_tokens.weight", "language.model.embed_tokens.weight"),
        *((f"layers.{{i}}.{m}.weight", f"language.model.layers.{{i}}.{m}.weight") for m in BLOCK),
        ("norm.weight", "language.model.norm.weight"),
    )
    return Spelling(rows, LEFT_OUT).prefixed(model) + Spelling(((f"{head}weight", "language.lm_head.weight"),))


def _write_config(vision: VisionConfig | None, language: LanguageConfig) -> dict[str, Any]:
    if language.qkv_bias:
        raise ValueError("this decoder has biases on queries, keys and values, which 'llama' has no names for: 'qwen2' has")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False} | write_config(language)


LLAMA = Layout(
    name="llama",
    model_types=("llama",),
    spellings=(spelling(),),
    read_config=lambda tree: {
        "language": read_config(tree) | {"qkv_bias": tree.get("attention_bias", False), "chat": "llama-3"}
    },
    write_config=_write_config,
    metadata=(("format", "pt"),),
)
