"""LLaVA as transformers writes it (`LlavaForConditionalGeneration`): SigLIP, CLIP or AIMv2, the projector, Qwen2 or Llama.

Published files, and those that transformers 4 writes, spell the parts `vision_tower`, `multi_modal_projector` and
`language_model`; the other spellings are those of the modules in memory since transformers 4.52, and of transformers 5, whose
SigLIP and CLIP have no `vision_model` inside. transformers 4.57 takes no InternViT here: it asks the tower for hidden states,
which `InternVLVisionModel` does not hand out.
"""
from typing import Any

from granvit.checkpoint.layouts import Layout, Spelling, aimv2, clip, one_of, qwen2, siglip
from granvit.checkpoint.layouts.llama import LLAMA
from granvit.checkpoint.layouts.qwen2 import QWEN2
from granvit.models import LanguageConfig, VisionConfig

# What a published `text_config` leaves unsaid: transformers' LlamaConfig and Qwen2Config.
TEXT_DEFAULTS = {
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
    "qwen2": {"hidden_size": 4096, "intermediate_size": 22016, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
}
TEXT_LAYOUTS = {"llama": LLAMA, "qwen2": QWEN2}
TOWERS = {"siglip_vision_model": siglip, "clip_vision_model": clip, "aimv2_vision_model": aimv2}
PIXELS = {
    "siglip_vision_model": siglip.SIGLIP.pixels, "clip_vision_model": clip.CLIP.pixels, "aimv2_vision_model": aimv2.AIMV2.pixels,
}  # fmt: skip
# `vision_feature_layer`. In transformers 4.57 the last hidden state is behind the closing norm, but CLIP's is before it. See
# `FINAL_DIFFERS`: other readers take `final` before the norm.
LEVELS = {
    "siglip_vision_model": {-2: "penultimate", -1: "final"},
    "clip_vision_model": {-2: "penultimate", -1: "last"},
    "aimv2_vision_model": {-2: "penultimate", -1: "final"},
}
# No weights make `final` the same to all: a pre-norm block adds to its input and cannot replace it by a norm of it.
FINAL_DIFFERS = (
    "this LLaVA reads the level 'final' as its tower's last hidden state. transformers 4.57 hands that out behind the closing "
    "norm, as it was trained; transformers 5 and vLLM hand it out before that norm, and give other answers without an error"
)
PROJECTOR = Spelling(
    tuple((f"multi_modal_projector.linear_{n}.{{p}}", f"projector.linear_{n}.{{p}}") for n in (1, 2)),
)


def _read_text(tree: dict[str, Any], tied: bool | None) -> dict[str, Any]:
    family = tree.get("model_type", "llama")
    layout = TEXT_LAYOUTS[one_of(dict.fromkeys(TEXT_LAYOUTS, family), family, "text_config.model_type")]
    full = TEXT_DEFAULTS[family] | {"num_hidden_layers": 32, "num_attention_heads": 32} | tree
    full["num_key_value_heads"] = full.get("num_key_value_heads") or full["num_attention_heads"]
    if tied is not None:
        full.setdefault("tie_word_embeddings", tied)
    return layout.read_config(full)["language"]


def _read_config(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    vision = tree.get("vision_config", {})
    tower = vision.get("model_type", "clip_vision_model")
    one_of(dict.fromkeys(TOWERS, tower), tower, "vision_config.model_type")
    one_of({"gelu": ""}, tree.get("projector_hidden_act", "gelu"), "projector_hidden_act")
    layer = tree.get("vision_feature_layer", -2)
    if isinstance(layer, list) or layer not in LEVELS[tower]:
        raise ValueError(f"vision_feature_layer {layer!r} has no counterpart; known: {', '.join(map(str, LEVELS[tower]))}")
    fields = TOWERS[tower].read_config(vision)
    strategies = {"default" if fields.get("class_token") else "full": ""}  # default drops the first token, the class token
    one_of(strategies, tree.get("vision_feature_select_strategy", "default"), "vision_feature_select_strategy")
    return {
        "vision": fields | PIXELS[tower] | {"level": LEVELS[tower][layer]},
        "language": _read_text(tree.get("text_config", {}), tree.get("tie_word_embeddings")),
    }


def _write_config(vision: VisionConfig, language: LanguageConfig) -> dict[str, Any]:
    if vision.tiles:
        raise ValueError("the model was trained with vision.tiling, and this LLaVA shows an image as one view")
    if vision.layer_scale:
        raise ValueError("LLaVA asks the vision tower for its hidden states, which InternViT's in transformers does not hand out")
    tower = "aimv2_vision_model" if vision.gated_mlp else "clip_vision_model" if vision.class_token else "siglip_vision_model"
    layers = {level: layer for layer, level in LEVELS[tower].items()}
    text = (QWEN2 if language.qkv_bias else LLAMA).write_config(None, language)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_config": TOWERS[tower].write_config(vision),
        "text_config": text,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": layers[one_of(dict.fromkeys(layers, vision.level), vision.level, "vision level")],
        "vision_feature_select_strategy": "default" if vision.class_token else "full",  # default drops the first token
        "image_seq_length": vision.patches,
        "tie_word_embeddings": language.tied_head,
    }


def _spellings(tower: Spelling, inside: str) -> tuple[Spelling, Spelling]:
    """A tower's, whose names begin with `inside` within it, on disk and in memory."""
    return (
        tower.prefixed(f"vision_tower.{inside}")
        + PROJECTOR
        + qwen2.spelling("language_model.model.", "language_model.lm_head."),
        tower.prefixed(f"model.vision_tower.{inside}")
        + PROJECTOR.prefixed("model.")
        + qwen2.spelling("model.language_model.", "lm_head."),
    )


LLAVA = Layout(
    name="llava",
    model_types=("llava",),
    spellings=_spellings(clip.TOWER, "vision_model.") + _spellings(aimv2.TOWER, "") + _spellings(clip.TOWER, ""),
    read_config=_read_config,
    write_config=_write_config,
    metadata=(("format", "pt"),),
)
