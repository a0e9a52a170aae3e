"""Qwen2 and Qwen2.5 in the layout of transformers: Llama with biases on queries, keys and values."""
from typing import Any

from granvit.checkpoint.layouts import Layout, Spelling, llama
from granvit.models import LanguageConfig, VisionConfig

BIASES = tuple((f"layers.{{i}}.self_attn.{p}_proj.bias", f"language.model.layers.{{i}}.self_attn.{p}_proj.bias") for p in "qkv")


def spelling(model: str = "model.", head: str = "lm_head.") -> Spelling:
    """The decoder's names with the prefix `model`, and the head's with the prefix `head`."""
    return llama.spelling(model, head) + Spelling(BIASES).prefixed(model)


def _write_config(vision: VisionConfig | None, language: LanguageConfig) -> dict[str, Any]:
    if not language.qkv_bias:
        raise ValueError("this decoder has no biases on queries, keys and values, which 'qwen2' needs: use 'llama'")
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"} | llama.write_config(language)


QWEN2 = Layout(
    name="qwen2",
    model_types=("qwen2",),
    spellings=(spelling(),),
    read_config=lambda tree: {"language": llama.read_config(tree) | {"qkv_bias": True}},
    write_config=_write_config,
    pairs=(("language.model.layers.{i}.self_attn.q_proj.weight", "language.model.layers.{i}.self_attn.q_proj.bias"),),
)
