"""AIMv2 at a fixed resolution: the layout of transformers, and that of Apple's own code, which SAILViT uses too.

Both kinds of config.json state only sizes. The rest is fixed (`STRUCTURE`): RMS norms, one of them after the patch embedding,
gated SiLU MLPs, no biases except in the patch embedding.
"""
from typing import Any

from granvit.checkpoint.layouts import OPENAI_PIXELS, Layout, Spelling, one_of, refuse_unlike
from granvit.models import VisionConfig

DEFAULTS = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 8, "image_size": 224,
    "patch_size": 14, "rms_norm_eps": 1e-5,
}  # fmt: skip
FIELDS = {
    "width": "hidden_size", "mlp": "intermediate_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "image_size": "image_size", "patch_size": "patch_size", "norm_eps": "rms_norm_eps",
}  # fmt: skip
STRUCTURE = {
    "norm": "rms", "activation": "silu", "gated_mlp": True, "bias": False, "patch_bias": True, "patch_norm": True,
    "class_token": False, "pre_norm": False, "layer_scale": False, "closing_norm": True,
}  # fmt: skip


def read_config(tree: dict[str, Any]) -> dict[str, Any]:
    """Fields of `VisionConfig` from the encoder's config, in either layout."""
    stated = DEFAULTS | tree
    one_of({"silu": ""}, stated.get("hidden_act", "silu"), "hidden_act")
    for key in ("qkv_bias", "mlp_bias", "use_bias", "is_native"):
        one_of({False: ""}, stated.get(key, False), key)
    return {ours: stated[theirs] for ours, theirs in FIELDS.items()} | STRUCTURE


def _sizes(vision: VisionConfig) -> dict[str, Any]:
    refuse_unlike(vision, STRUCTURE, "AIMv2")
    return {theirs: getattr(vision, ours) for ours, theirs in FIELDS.items()} | {"num_channels": 3, "qkv_bias": False}


def write_config(vision: VisionConfig) -> dict[str, Any]:
    """The encoder's config of transformers; `ValueError` for an encoder with another architecture than AIMv2."""
    named = {"model_type": "aimv2_vision_model", "use_head": False, "is_native": False}
    return named | _sizes(vision) | {"mlp_bias": False, "hidden_act": "silu"}


BLOCK = {
    **{f"attention.{p}_proj": f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")}, "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.fc1", "ffn.down_proj": "mlp.fc2", "rms_norm1": "layer_norm1", "rms_norm2": "layer_norm2",
}  # fmt: skip
APPLE_BLOCK = {
    **{f"attn.qkv.weight@{part}/3": f"self_attn.{p}_proj.weight" for part, p in enumerate("qkv")},
    "attn.proj.weight": "self_attn.out_proj.weight", "norm_1.weight": "layer_norm1.weight", "norm_2.weight": "layer_norm2.weight",
    "mlp.fc1.weight": "mlp.gate_proj.weight", "mlp.fc2.weight": "mlp.fc2.weight", "mlp.fc3.weight": "mlp.fc1.weight",
}  # fmt: skip

TOWER = Spelling(
    rows=(
        ("embeddings.patch_embed.{p}", "vision.embeddings.patch_embedding.{p}"),
        ("embeddings.rms_norm.weight", "vision.embeddings.patch_norm.weight"),
        ("embeddings.position_embedding.weight", "vision.embeddings.position_embedding.weight"),
        *((f"encoder.layers.{{i}}.{m}.weight", f"vision.encoder.layers.{{i}}.{o}.weight") for m, o in BLOCK.items()),
        ("rms_norm.weight", "vision.post_layernorm.weight"),
    ),
    left_out=(("head.{*}", "the pooling head: the projector reads patch tokens"),),
)

AIMV2 = Layout(
    name="aimv2",
    model_types=("aimv2_vision_model",),
    spellings=(TOWER,),
    read_config=lambda tree: {"vision": read_config(tree)},
    write_config=lambda vision, language: {"architectures": ["Aimv2VisionModel"]} | write_config(vision),
    pixels=OPENAI_PIXELS,
)
AIMV2_APPLE = Layout(
    name="aimv2-apple",
    model_types=("aimv2",),
    spellings=(
        Spelling(
            rows=(
                ("preprocessor.patchifier.proj.{p}", "vision.embeddings.patch_embedding.{p}"),
                ("preprocessor.patchifier.norm.weight", "vision.embeddings.patch_norm.weight"),
                ("preprocessor.pos_embed@[1]", "vision.embeddings.position_embedding.weight"),
                *((f"trunk.blocks.{{i}}.{m}", f"vision.encoder.layers.{{i}}.{o}") for m, o in APPLE_BLOCK.items()),
                ("trunk.post_trunk_norm.weight", "vision.post_layernorm.weight"),
            ),
        ),
    ),
    read_config=lambda tree: {"vision": read_config(tree)},
    write_config=lambda vision, language: (
        {"architectures": ["AIMv2Model"], "model_type": "aimv2"} | _sizes(vision) | {"use_bias": False}
    ),
    pixels=OPENAI_PIXELS,
)
