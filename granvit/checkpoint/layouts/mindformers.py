"""Llama, Qwen2 and Qwen2.5 in the layout of MindFormers (`LlamaForCausalLM`, with separate queries, keys and values).

The keys of config.json are those of MindFormers' `LlamaConfig`. MindFormers itself reads them from a YAML file.
"""
from typing import Any

from granvit.checkpoint.layouts import Layout, Spelling
from granvit.models import LanguageConfig, VisionConfig

FIELDS = {
    "width": "hidden_size", "mlp": "intermediate_size", "layers": "num_layers", "heads": "num_heads", "kv_heads": "n_kv_heads",
    "vocab": "vocab_size", "norm_eps": "rms_norm_eps", "rope_theta": "theta", "qkv_bias": "qkv_has_bias",
    "tied_head": "tie_word_embeddings",
}  # fmt: skip
BLOCK = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def _read_config(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    fields = {ours: tree[theirs] for ours, theirs in FIELDS.items()}
    return {"language": fields | {"rope_theta": float(tree["theta"]), "head_dim": tree["hidden_size"] // tree["num_heads"]}}


def _write_config(vision: VisionConfig | None, language: LanguageConfig) -> dict[str, Any]:
    if language.heads * language.head_dim != language.width:
        raise ValueError(
            f"this decoder has {language.heads} heads of {language.head_dim} in a width of {language.width}; "
            f"MindFormers needs heads of width / heads"
        )
    return {"model_type": "llama"} | {theirs: getattr(language, ours) for ours, theirs in FIELDS.items()}


MINDFORMERS = Layout(
    name="mindformers",
    model_types=("llama",),
    spellings=(
        Spelling(
            rows=(
                ("model.tok_embeddings.embedding_weight", "language.model.embed_tokens.weight"),
                *((f"model.layers.{{i}}.{m}.weight", f"language.model.layers.{{i}}.{o}.weight") for m, o in BLOCK.items()),
                *((f"model.layers.{{i}}.{m}.bias", f"language.model.layers.{{i}}.{BLOCK[m]}.bias") for m in list(BLOCK)[:3]),
                ("model.norm_out.weight", "language.model.norm.weight"),
                ("lm_head.weight", "language.lm_head.weight"),
            ),
            left_out=(
                *((f"{moment}.{{*}}", "the optimizer's moments") for moment in ("adam_m", "adam_v", "exp_avg", "exp_avg_sq")),
                *((name, "the training loop's state") for name in ("epoch_num", "step_num", "global_step", "loss_scale")),
            ),
        ),
    ),
    read_config=_read_config,
    write_config=_write_config,
    metadata=(),
)
