"""SigLIP and SigLIP2 (`model_type: siglip`) as transformers writes them: the vision tower alone or both towers.

Their words are the canonical ones. Their config.json states only what differs from transformers' `SiglipVisionConfig`.
"""
from typing import Any

from granvit.checkpoint.layouts import Layout

DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
    "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}


def _read_config(tree: dict[str, Any]) -> dict[str, Any]:
    stated = DEFAULTS | tree.get("vision_config", tree)
    return {
        "width": stated["hidden_size"],
        "mlp": stated["intermediate_size"],
        "layers": stated["num_hidden_layers"],
        "heads": stated["num_attention_heads"],
        "image_size": stated["image_size"],
        "patch_size": stated["patch_size"],
        "activation": ACTIVATIONS.get(stated["hidden_act"], stated["hidden_act"]),
        "norm_eps": stated["layer_norm_eps"],
    }


BLOCK = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in "qkv"), "self_attn.out_proj")

SIGLIP = Layout(
    name="siglip",
    model_types=("siglip", "siglip_vision_model"),
    rows=(
        ("embeddings.patch_embedding.{p}", "vision.embeddings.patch_embedding.{p}"),
        ("embeddings.position_embedding.weight", "vision.embeddings.position_embedding.weight"),
        *((f"encoder.layers.{{i}}.{m}.{{p}}", f"vision.encoder.layers.{{i}}.{m}.{{p}}") for m in BLOCK),
        ("post_layernorm.{p}", "vision.post_layernorm.{p}"),
    ),
    left_out=(
        ("head.{*}", "the pooling head: the projector reads patch tokens"),
        ("text_model.{*}", "the text tower"),
        ("logit_scale", "the towers' contrastive loss"),
        ("logit_bias", "the towers' contrastive loss"),
        ("embeddings.position_ids", "0, 1, 2, ...: old files carry it"),
    ),
    read_config=_read_config,
    prefixes=("vision_model.", ""),
)
