"""Multiply-accumulates of a forward pass, by formula (SPEC section 6); a FLOP count is twice as many.

A trained part costs three forward passes (forward, gradient of inputs, gradient of weights), a frozen one that gradients
pass through two, the teacher and a frozen encoder one.
"""
import math
import os
from collections.abc import Collection

from granvit.models import PARTS, LanguageConfig, VisionConfig, parameter_shapes, part_of, vision_shapes


def vision_macs(c: VisionConfig, image_size: int | None = None) -> float:
    """One image, or with tiling one of its views: `L [N (4 h^2 + k h m) + 2 N^2 h] + 3 p^2 h N`, k = 2, or 3 with a gated MLP."""
    patches = ((image_size or c.image_size) // c.patch_size) ** 2
    tokens, h = patches + c.class_token, c.width
    block = tokens * (4 * h * h + (3 if c.gated_mlp else 2) * h * c.mlp) + 2 * tokens**2 * h
    return c.built_layers * block + 3 * c.patch_size**2 * h * patches


def language_macs(c: LanguageConfig, length: int, logits: int) -> float:
    """One row: `L [S (2 h q + 2 h kv + 3 h m) + 2 S^2 q] + n_logits h V`, attention counted in full."""
    h, q, kv = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim
    block = length * (2 * h * q + 2 * h * kv + 3 * h * c.mlp) + 2 * length**2 * q
    return c.layers * block + logits * h * c.vocab


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def state_bytes(
    vision: VisionConfig, language: LanguageConfig, trains: Collection[str], teacher: bool, compute_bytes: int
) -> int:
    """What every device holds before the first activation, with all states replicated: 16 bytes for each number that is
    trained (master, gradient, two moments), `compute_bytes` for a frozen one, 4 for one of the teacher."""
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(vision, language).items()}
    held = sum(size * (16 if part_of(name) in trains else compute_bytes) for name, size in sizes.items())
    return held + 4 * sum(map(math.prod, vision_shapes(vision).values())) * teacher


def activation_bytes(
    vision: VisionConfig, language: LanguageConfig, trains: Collection[str], rows: int, length: int, answers: int,
    recompute: bool = False, framework: str = "torch",
) -> tuple[int, int]:  # fmt: skip
    """What a forward pass of `rows` rows keeps for its backward pass in bfloat16 with fused attention, by formula, and what the
    backward pass holds beside it at its most: `length` tokens a row, `answers` of them supervised.

    Per token of a block of width h, by what the derivatives read: a norm its float32 input (and, where its weight is trained, its
    output before the weight), a trained linear its input, attention q, k, v and its output, the activations of the MLP theirs; a
    trained weight's bfloat16 copy is kept as well. With `recompute` a block keeps its input alone; all of one block's activations
    are there while its gradients are made. The backward pass begins with three arrays as large as the logits in float32.
    MindSpore differs where its graph derives otherwise: tanh-GELU is seven products, keys and values are not repeated, heads are
    padded to 16. What its compiler fuses or recomputes by itself is not in the formula.
    """
    torch, trained = framework == "torch", {part: part in trains for part in PARTS}
    sizes: dict[str, dict[str, int]] = {part: {} for part in PARTS}
    for name, shape in parameter_shapes(vision, language).items():
        sizes[part_of(name)][name] = math.prod(shape) if len(shape) > 1 else 0
    copies = {part: 2 * sum(sizes[part].values()) * trained[part] for part in PARTS}

    h, m, D = vision.width, vision.mlp, vision.width // vision.heads
    heads = 8 * h if torch else 8 * h * (-(-D // 16) * 16) // D + 64 * vision.heads  # padded to 16; two statistics of 8 float32
    mlp = (8 * m if vision.gated_mlp else 4 * m) if torch or vision.activation != "gelu_tanh" else 14 * m
    tokens = rows * vision.views * (vision.patches + vision.class_token)
    vision_block = trained["vision"] * (tokens * (12 * h + heads + mlp) + copies["vision"] // vision.built_layers)
    kept_bytes = vision.built_layers * (2 * tokens * h * trained["vision"] if recompute else vision_block)

    c, m, t = language.width, language.mlp, trained["language"]
    q, kv = language.heads * language.head_dim, language.kv_heads * language.head_dim
    heads = 8 * q if torch else 4 * q + 4 * kv + 64 * language.heads
    tokens = rows * length
    mask = 2 * rows * length**2 if torch else 0  # of every block: PyTorch turns a boolean mask into numbers
    block_copies = sum(size for name, size in sizes["language"].items() if ".layers." in name) * 2 * t
    language_block = tokens * (8 * c + heads + 6 * m + t * (12 * c + 2 * m)) + mask + block_copies // language.layers
    kept_bytes += language.layers * (2 * tokens * c if recompute else language_block)
    kept_bytes += copies["language"] - block_copies  # of embeddings and head
    kept_bytes += copies["projector"] + rows * vision.image_tokens * (4 * c + 2 * vision.token_width)
    logits = rows * answers * language.vocab
    kept_bytes += 6 * logits + rows * length**2  # in bfloat16 and float32; the mask
    return kept_bytes, max(12 * logits, language_block if recompute else 0, vision_block if recompute else 0)
