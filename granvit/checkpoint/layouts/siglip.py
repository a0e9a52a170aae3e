"""SigLIP and SigLIP2 (`model_type: siglip`) in the layout of transformers: only the vision tower, or both towers.

The canonical names are the same with another prefix. config.json states only values that differ from the defaults of
transformers' `SiglipVisionConfig`.
"""
from typing import Any

from granvit.checkpoint.layouts import Layout, Spelling, one_of, refuse_unlike
from granvit.models import VisionConfig

DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
    "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
WORDS = {activation: word for word, activation in ACTIVATIONS.items()}
FIELDS = {
    "width": "hidden_size", "mlp": "intermediate_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "image_size": "image_size", "patch_size": "patch_size", "norm_eps": "layer_norm_eps",
}  # fmt: skip
STRUCTURE = {
    "norm": "layer", "gated_mlp": False, "bias": True, "patch_bias": True, "patch_norm": False, "class_token": False,
    "pre_norm": False, "layer_scale": False, "closing_norm": True,
}  # fmt: skip


def read_config(tree: dict[str, Any]) -> dict[str, Any]:
    """Fields of `VisionConfig` from the tower's config."""
    stated = DEFAULTS | tree
    fields = {ours: stated[theirs] for ours, theirs in FIELDS.items()}
    return fields | STRUCTURE | {"activation": one_of(ACTIVATIONS, stated["hidden_act"], "hidden_act")}


def write_config(vision: VisionConfig) -> dict[str, Any]:
    """The tower's config, without the pooling head; `ValueError` for an encoder with another architecture than SigLIP."""
    refuse_unlike(vision, STRUCTURE, "SigLIP")
    tree = {theirs: getattr(vision, ours) for ours, theirs in FIELDS.items()}
    activation = one_of(WORDS, vision.activation, "activation")
    return {"model_type": "siglip_vision_model", "vision_use_head": False, "num_channels": 3, "hidden_act": activation} | tree


BLOCK = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in "qkv"), "self_attn.out_proj")
TOWER = Spelling(
    rows=(
        ("embeddings.patch_embedding.{p}", "vision.embeddings.patch_embedding.{p}"),
        ("embeddings.position_embedding.weight", "vision.embeddings.position_embedding.weight"),
        *((f"encoder.layers.{{i}}.{m}.{{p}}", f"vision.encoder.layers.{{i}}.{m}.{{p}}") for m in BLOCK),
        ("post_layernorm.{p}", "vision.post_layernorm.{p}"),
    ),
    left_out=(
        ("head.{*}", "the pooling head: the projector reads patch tokens"),
        ("embeddings.position_ids", "the constant 0, 1, 2, ... that old files carry"),
    ),
)
OTHER_TOWER = Spelling(
    rows=(),
    left_out=(
        ("text_model.{*}", "the text tower"),
        ("logit_scale", "the towers' contrastive loss"),
        ("logit_bias", "the towers' contrastive loss"),
    ),
)

SIGLIP = Layout(
    name="siglip",
    model_types=("siglip", "siglip_vision_model"),
    spellings=(TOWER.prefixed("vision_model.") + OTHER_TOWER, TOWER + OTHER_TOWER),
    read_config=lambda tree: {"vision": read_config(tree.get("vision_config", tree))},
    write_config=lambda vision, language: {"architectures": ["SiglipVisionModel"]} | write_config(vision),
    pixels={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize": "bilinear"},  # as SigLIP2; the first SigLIP is bicubic
)
