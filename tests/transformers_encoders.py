"""Independent encoders to compare with: transformers' vision models with random weights, written as their publishers do.

`peer` builds the model for an encoder row of `configs/models`; `publish` writes it as transformers does, or with the names of a
remote-code repository; `levels` computes its features at the levels of our encoders.
"""
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from granvit.checkpoint.layouts import Layout
from granvit.checkpoint.layouts.aimv2 import AIMV2
from granvit.checkpoint.layouts.clip import CLIP
from granvit.checkpoint.layouts.internvit import INTERNVIT
from granvit.checkpoint.layouts.siglip import SIGLIP
from granvit.models import VisionConfig

ROWS = (
    "clip-vit-large-patch14-336", "siglip-so400m-patch14-384", "siglip2-so400m-patch16-512", "aimv2-huge-patch14-448",
    "sailvit-huge-448", "internvit-300m-448",
)  # fmt: skip
HUB = {"sailvit-huge-448": "apple", "internvit-300m-448": "opengvlab"}  # rows with the names of a remote-code repository
# The paths of a family's blocks and of its closing norm.
BLOCKS = {
    "siglip": "vision_model.encoder.layers", "clip": "vision_model.encoder.layers", "aimv2": "encoder.layers",
    "internvit": "encoder.layer",
}  # fmt: skip
CLOSING = {"siglip": "vision_model.post_layernorm", "clip": "vision_model.post_layernorm", "aimv2": "rms_norm", "internvit": None}


def family(vision: VisionConfig) -> Layout:
    """The layout in which transformers writes an encoder of this structure."""
    if vision.layer_scale:
        return INTERNVIT
    if vision.gated_mlp:
        return AIMV2
    return CLIP if vision.class_token else SIGLIP


def peer(vision: VisionConfig, seed: int = 0) -> PreTrainedModel:
    """transformers' model of this structure with random weights. No norm weight is 1; no bias and no position embedding is 0."""
    tree = family(vision).write_config(vision, None)
    torch.manual_seed(seed)
    model_class = getattr(transformers, tree["architectures"][0])
    model = model_class(model_class.config_class.from_dict(tree)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def publish(model: PreTrainedModel, directory: Path, hub: str | None = None) -> None:
    """Writes config.json and model.safetensors as transformers does, or with the names of the remote-code repository `hub`
    (apple, opengvlab). The names are written out here again, independently of the layouts that read them."""
    model.save_pretrained(directory)
    if hub is None:
        return
    rename, config = HUBS[hub]
    tensors = rename(load_file(directory / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config(model.config)))


def _apple_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers."))
    found = {
        "preprocessor.patchifier.proj.weight": tensors["embeddings.patch_embed.weight"],
        "preprocessor.patchifier.proj.bias": tensors["embeddings.patch_embed.bias"],
        "preprocessor.patchifier.norm.weight": tensors["embeddings.rms_norm.weight"],
        "preprocessor.pos_embed": tensors["embeddings.position_embedding.weight"][None],
        "trunk.post_trunk_norm.weight": tensors["rms_norm.weight"],
    }
    for i in range(layers):
        own, theirs = f"trunk.blocks.{i}", f"encoder.layers.{i}"
        found |= {
            f"{own}.attn.qkv.weight": torch.cat([tensors[f"{theirs}.attention.{p}_proj.weight"] for p in "qkv"]),
            f"{own}.attn.proj.weight": tensors[f"{theirs}.attention.out_proj.weight"],
            f"{own}.mlp.fc1.weight": tensors[f"{theirs}.ffn.gate_proj.weight"],
            f"{own}.mlp.fc2.weight": tensors[f"{theirs}.ffn.down_proj.weight"],
            f"{own}.mlp.fc3.weight": tensors[f"{theirs}.ffn.up_proj.weight"],
            f"{own}.norm_1.weight": tensors[f"{theirs}.rms_norm1.weight"],
            f"{own}.norm_2.weight": tensors[f"{theirs}.rms_norm2.weight"],
        }
    return found


def _apple_config(c: PretrainedConfig) -> dict:
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
            "patch_size", "rms_norm_eps", "qkv_bias")  # fmt: skip
    return {"model_type": "aimv2", "use_bias": False} | {key: getattr(c, key) for key in same}


def _opengvlab_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer."))
    found = {
        "embeddings.class_embedding": tensors["embeddings.cls_token"],
        "embeddings.position_embedding": tensors["embeddings.position_embeddings"],
        "embeddings.patch_embedding.weight": tensors["embeddings.patch_embeddings.projection.weight"],
        "embeddings.patch_embedding.bias": tensors["embeddings.patch_embeddings.projection.bias"],
    }
    for i in range(layers):
        own, theirs = f"encoder.layers.{i}", f"encoder.layer.{i}"
        found |= {f"{own}.ls{n}": tensors[f"{theirs}.lambda_{n}"] for n in (1, 2)}
        for p in ("weight", "bias"):
            found |= {
                f"{own}.attn.qkv.{p}": torch.cat([tensors[f"{theirs}.attention.{x}_proj.{p}"] for x in "qkv"]),
                f"{own}.attn.proj.{p}": tensors[f"{theirs}.attention.projection_layer.{p}"],
                f"{own}.mlp.fc1.{p}": tensors[f"{theirs}.mlp.fc1.{p}"],
                f"{own}.mlp.fc2.{p}": tensors[f"{theirs}.mlp.fc2.{p}"],
                f"{own}.norm1.{p}": tensors[f"{theirs}.layernorm_before.{p}"],
                f"{own}.norm2.{p}": tensors[f"{theirs}.layernorm_after.{p}"],
            }
    return found


def _opengvlab_config(c: PretrainedConfig) -> dict:
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps", "norm_type",
            "hidden_act")  # fmt: skip
    sides = {"image_size": c.image_size[0], "patch_size": c.patch_size[0]}
    kind = {"model_type": "intern_vit_6b", "architectures": ["InternVisionModel"], "qkv_bias": True, "qk_normalization": False}
    return kind | sides | {key: getattr(c, key) for key in same}


HUBS = {"apple": (_apple_names, _apple_config), "opengvlab": (_opengvlab_names, _opengvlab_config)}


@torch.no_grad()
def levels(model: PreTrainedModel, vision: VisionConfig, pixels_B3RR: Tensor, **options) -> dict[str, Tensor]:
    """Patch features `[B, N, C]` of normalised pixels: after the last block but one, the last block, and the closing norm."""
    name, kept = family(vision).name, []
    blocks = model.get_submodule(BLOCKS[name])
    hooks = [block.register_forward_hook(lambda _, args, out: kept.append(out)) for block in (blocks[-2], blocks[-1])]
    model(pixel_values=pixels_B3RR, **options)
    for hook in hooks:
        hook.remove()
    kept = [out[0] if isinstance(out, tuple) else out for out in kept]
    found = {"penultimate": kept[0], "last": kept[1]}
    if CLOSING[name]:
        norm: nn.Module = model.get_submodule(CLOSING[name])
        found["final"] = norm(kept[1])
    return {level: tokens[:, int(vision.class_token) :] for level, tokens in found.items()}
