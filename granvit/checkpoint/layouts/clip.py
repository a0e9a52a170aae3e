"""CLIP (OpenAI's) in the layout of transformers: only the vision tower, or both towers.

The names are those of SigLIP, and in addition a class embedding and a norm before the blocks.

The config.json states only values that differ from the defaults of transformers' `CLIPVisionConfig`.
"""
from typing import Any

from granvit.checkpoint.layouts import OPENAI_PIXELS, Layout, Spelling, refuse_unlike, siglip
from granvit.models import VisionConfig

DEFAULTS = siglip.DEFAULTS | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
BEYOND = {"class_token": True, "pre_norm": True, "patch_bias": False}  # where a CLIP tower differs from SigLIP's


def read_config(tree: dict[str, Any]) -> dict[str, Any]:
    """Fields of `VisionConfig` from the tower's config."""
    return siglip.read_config(DEFAULTS | tree) | BEYOND


def write_config(vision: VisionConfig) -> dict[str, Any]:
    """The tower's config; `ValueError` for an encoder with another architecture than CLIP."""
    refuse_unlike(vision, BEYOND, "CLIP")
    like_siglip = {field: siglip.STRUCTURE[field] for field in BEYOND}
    tree = siglip.write_config(VisionConfig(**{**vision.model_dump(), **like_siglip}))
    del tree["vision_use_head"]
    return tree | {"model_type": "clip_vision_model"}


EXTRA = Spelling(
    (
        ("embeddings.class_embedding", "vision.embeddings.class_embedding"),
        ("pre_layrnorm.{p}", "vision.pre_layernorm.{p}"),  # [sic]
    )
)
OTHER_TOWER = Spelling(
    rows=(),
    left_out=(
        ("text_model.{*}", "the text tower"),
        ("text_projection.weight", "the text tower"),
        ("visual_projection.weight", "the towers' contrastive loss"),
        ("logit_scale", "the towers' contrastive loss"),
    ),
)
TOWER = siglip.TOWER + EXTRA
PAIRS = (("vision.embeddings.position_embedding.weight", "vision.embeddings.class_embedding"),)

CLIP = Layout(
    name="clip",
    model_types=("clip", "clip_vision_model"),
    spellings=(TOWER.prefixed("vision_model.") + OTHER_TOWER, TOWER + OTHER_TOWER),
    read_config=lambda tree: {"vision": read_config(tree.get("vision_config", tree))},
    write_config=lambda vision, language: {"architectures": ["CLIPVisionModel"]} | write_config(vision),
    pairs=PAIRS,
    pixels=OPENAI_PIXELS,
)
