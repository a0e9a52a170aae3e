"""Multiply-accumulates of a forward pass, by formula (SPEC section 6); a FLOP count is twice as many.

A trained part costs three forward passes (forward, gradient of inputs, gradient of weights), a frozen one that gradients
pass through two, the teacher and a frozen encoder one.
"""
import math
import os
from collections.abc import Collection

from granvit.models import LanguageConfig, VisionConfig, parameter_shapes, part_of, vision_shapes


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
