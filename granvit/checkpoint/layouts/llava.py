"""LLaVA in the layout of transformers (`LlavaForConditionalGeneration`): SigLIP, CLIP or AIMv2, the projector, Qwen2 or Llama.

In published files and those of transformers 4, names begin with `vision_tower`, `multi_modal_projector` and `language_model`. The
other spellings are those of the modules in memory since transformers 4.52, and of transformers 5, where SigLIP and CLIP have no
`vision_model` level. InternViT is not supported: transformers 4.57 reads hidden states of the vision tower, which
`InternVLVisionModel` does not return.
"""
from typing import Any

from granvit.checkpoint.layouts import Layout, Spelling, aimv2, clip, one_of, qwen2, siglip
from granvit.checkpoint.layouts.llama import LLAMA
from granvit.checkpoint.layouts.qwen2 import QWEN2
from granvit.models import LanguageConfig, VisionConfig

# Defaults for keys that a published `text_config` omits: those of transformers' LlamaConfig and Qwen2Config.
TEXT_DEFAULTS = {
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
    "qwen2": {"hidden_size": 4096, "intermediate_size": 22016, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
}
TEXT_LAYOUTS = {"llama": LLAMA, "qwen2": QWEN2}
TOWERS = {"siglip_vision_model": siglip, "clip_vision_model": clip, "aimv2_vision_model": aimv2}
PIXELS = {
    "siglip_vision_model": siglip.SIGLIP.pixels, "clip_vision_model": clip.CLIP.pixels, "aimv2_vision_model": aimv2.AIMV2.pixels,
}  # fmt: skip
# The level of each `vision_feature_layer`. In transformers 4.57 the last hidden state is the output of the closing norm, for CLIP
# its input. Other readers differ: see `FINAL_DIFFERS`.
LEVELS = {
    "siglip_vision_model": {-2: "penultimate", -1: "final"},
    "clip_vision_model": {-2: "penultimate", -1: "last"},
    "aimv2_vision_model": {-2: "penultimate", -1: "final"},
}
# This cannot be fixed by adding a filler block that applies the norm: a pre-norm block can only add to its input.
FINAL_DIFFERS = (
    "this LLaVA reads the level 'final', the last hidden state of its vision tower. transformers 4.57 returns it after the "
    "closing norm, as in training; transformers 5 and vLLM return it before that norm and give other answers without an error"
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
        raise ValueError(f"vision_feature_layer {layer!r} is not supported; supported: {', '.join(map(str, LEVELS[tower]))}")
    fields = TOWERS[tower].read_config(vision)
    strategies = {"default" if fields.get("class_token") else "full": ""}  # default drops the first token, the class token
    one_of(strategies, tree.get("vision_feature_select_strategy", "default"), "vision_feature_select_strategy")
    return {
        "vision": fields | PIXELS[tower] | {"level": LEVELS[tower][layer]},
        "language": _read_text(tree.get("text_config", {}), tree.get("tie_word_embeddings")),
    }


def _write_config(vision: VisionConfig, language: LanguageConfig) -> dict[str, Any]:
    if vision.tiles:
        raise ValueError("the model was trained with vision.tiling, but this LLaVA has one view per image")
    if vision.layer_scale:
        raise ValueError("LLaVA reads hidden states of the vision tower, which InternViT in transformers does not return")
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
    """The spellings in files and of modules in memory, for a tower whose names have the prefix `inside`."""
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
)
