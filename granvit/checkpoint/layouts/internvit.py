"""InternViT-300M: the layout of its publisher's repository on the Hugging Face hub (whose remote code is not used here), and that
of transformers (`InternVLVisionModel`)."""
from typing import Any

from granvit.checkpoint.layouts import Layout, Spelling, one_of, refuse_unlike
from granvit.models import LanguageConfig, VisionConfig

DEFAULTS = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448,
    "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
}  # fmt: skip
FIELDS = {
    "width": "hidden_size", "mlp": "intermediate_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
}  # fmt: skip
STRUCTURE = {
    "norm": "layer", "activation": "gelu", "gated_mlp": False, "bias": True, "patch_bias": True, "patch_norm": False,
    "class_token": True, "pre_norm": False, "layer_scale": True,
}  # fmt: skip
IMAGENET_PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "resize": "bicubic"}


def _side(size: int | list[int], key: str) -> int:
    sides = size if isinstance(size, list) else [size]
    if len(set(sides)) != 1:
        raise ValueError(f"{key} {size} is not square")
    return sides[0]


def _read(tree: dict[str, Any]) -> dict[str, Any]:
    stated: dict[str, Any] = DEFAULTS | tree
    one_of({"gelu": ""}, stated["hidden_act"], "hidden_act")
    one_of({"layer_norm": ""}, stated.get("norm_type", "layer_norm"), "norm_type")
    sides = {key: _side(stated[key], key) for key in ("image_size", "patch_size")}
    return {ours: stated[theirs] for ours, theirs in FIELDS.items()} | sides | STRUCTURE


def _read_config(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    one_of({False: ""}, tree.get("use_qk_norm", False), "use_qk_norm")
    one_of({True: ""}, tree.get("attention_bias", False), "attention_bias")
    return {"vision": _read(tree) | {"closing_norm": not tree.get("use_mean_pooling", True)}}


def _read_hub_config(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    one_of({False: ""}, tree.get("qk_normalization", False), "qk_normalization")
    one_of({True: ""}, tree.get("qkv_bias", True), "qkv_bias")
    return {"vision": _read(tree) | {"closing_norm": False}}


def _sizes(vision: VisionConfig) -> dict[str, Any]:
    refuse_unlike(vision, STRUCTURE, "InternViT")
    return {theirs: getattr(vision, ours) for ours, theirs in FIELDS.items()} | {"hidden_act": "gelu", "norm_type": "layer_norm"}


def _write_config(vision: VisionConfig, language: LanguageConfig | None) -> dict[str, Any]:
    named = {"architectures": ["InternVLVisionModel"], "model_type": "internvl_vision", "attention_bias": True}
    sides = {"image_size": [vision.image_size] * 2, "patch_size": [vision.patch_size] * 2}
    return named | _sizes(vision) | sides | {"use_qk_norm": False, "use_mean_pooling": not vision.closing_norm}


def _write_hub_config(vision: VisionConfig, language: LanguageConfig | None) -> dict[str, Any]:
    named = {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "qkv_bias": True, "qk_normalization": False}
    refuse_unlike(vision, {"closing_norm": False}, "InternViT's hub layout")
    return named | _sizes(vision) | {"image_size": vision.image_size, "patch_size": vision.patch_size}


BLOCK = {
    **{f"attention.{p}_proj.{{p}}": f"self_attn.{p}_proj.{{p}}" for p in "qkv"},
    "attention.projection_layer.{p}": "self_attn.out_proj.{p}", "mlp.fc1.{p}": "mlp.fc1.{p}", "mlp.fc2.{p}": "mlp.fc2.{p}",
    "layernorm_before.{p}": "layer_norm1.{p}", "layernorm_after.{p}": "layer_norm2.{p}",
    "lambda_1": "layer_scale1", "lambda_2": "layer_scale2",
}  # fmt: skip
HUB_BLOCK = {
    **{f"attn.qkv.{{p}}@{part}/3": f"self_attn.{p}_proj.{{p}}" for part, p in enumerate("qkv")},
    "attn.proj.{p}": "self_attn.out_proj.{p}", "mlp.fc1.{p}": "mlp.fc1.{p}", "mlp.fc2.{p}": "mlp.fc2.{p}",
    "norm1.{p}": "layer_norm1.{p}", "norm2.{p}": "layer_norm2.{p}", "ls1": "layer_scale1", "ls2": "layer_scale2",
}  # fmt: skip

INTERNVIT = Layout(
    name="internvit",
    model_types=("internvl_vision",),
    spellings=(
        Spelling(
            rows=(
                ("embeddings.patch_embeddings.projection.{p}", "vision.embeddings.patch_embedding.{p}"),
                ("embeddings.cls_token@[1,1]", "vision.embeddings.class_embedding"),
                ("embeddings.position_embeddings@[1]", "vision.embeddings.position_embedding.weight"),
                *((f"encoder.layer.{{i}}.{m}", f"vision.encoder.layers.{{i}}.{o}") for m, o in BLOCK.items()),
                ("layernorm.{p}", "vision.post_layernorm.{p}"),
            ),
        ),
    ),
    read_config=_read_config,
    write_config=_write_config,
    pixels=IMAGENET_PIXELS,
)
INTERNVIT_HUB = Layout(
    name="internvit-hub",
    model_types=("intern_vit_6b", "intern_vit_300m"),
    spellings=(
        Spelling(
            rows=(
                ("embeddings.patch_embedding.{p}", "vision.embeddings.patch_embedding.{p}"),
                ("embeddings.class_embedding@[1,1]", "vision.embeddings.class_embedding"),
                ("embeddings.position_embedding@[1]", "vision.embeddings.position_embedding.weight"),
                *((f"encoder.layers.{{i}}.{m}", f"vision.encoder.layers.{{i}}.{o}") for m, o in HUB_BLOCK.items()),
            ),
        ),
    ),
    read_config=_read_hub_config,
    write_config=_write_hub_config,
    pixels=IMAGENET_PIXELS,
)
