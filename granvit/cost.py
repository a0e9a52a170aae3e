"""Compute and memory by formula: multiply-accumulates (MACs) of a forward pass (one MAC is two FLOPs), and bytes of
states and activations.

A training step costs, in forward passes: 3 for a trained part (forward, gradients of inputs, gradients of weights), 2 for a
frozen part that gradients pass through, 1 for the teacher and for a frozen encoder. Attention has no weights: both factors of its
two products are activations, so where gradients pass through it costs 3, in a frozen part too.
"""
import math
import os
from collections.abc import Collection

from granvit.models import PARTS, LanguageConfig, VisionConfig, parameter_shapes, part_of, vision_shapes

LOGITS_IN_CHUNK = 1 << 24  # of the cross-entropy `chunked` (64 MB in float32), unless that would make more than
MOST_CHUNKS = 16  # chunks: MindSpore compiles each
NUMBERS_IN_UPDATE = 1 << 26  # that PyTorch's AdamW updates at a time on a device


def vision_macs(c: VisionConfig, image_size: int | None = None) -> float:
    """MACs of one image (with tiling: one view): `L [N (4 h^2 + k h m) + 2 N^2 h] + 3 p^2 h N`, k = 2, or 3 with a gated MLP."""
    patches = ((image_size or c.image_size) // c.patch_size) ** 2
    tokens, h = patches + c.class_token, c.width
    block = tokens * (4 * h * h + (3 if c.gated_mlp else 2) * h * c.mlp) + 2 * tokens**2 * h
    return c.built_layers * block + 3 * c.patch_size**2 * h * patches


def language_macs(c: LanguageConfig, length: int, logits: int) -> float:
    """MACs of one row: `L [S (2 h q + 2 h kv + 3 h m) + 2 S^2 q] + n_logits h V`, without the saving of a causal mask."""
    h, q, kv = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim
    block = length * (2 * h * q + 2 * h * kv + 3 * h * c.mlp)
    return c.layers * block + attention_macs(c, length) + logits * h * c.vocab


def attention_macs(c: LanguageConfig, length: int) -> float:
    """The part of `language_macs` that the two products of activations take, QK^T and its softmax with V: `L 2 S^2 q`."""
    return c.layers * 2 * length**2 * c.heads * c.head_dim


def projector_macs(vision: VisionConfig, language: LanguageConfig) -> float:
    """MACs of the two-layer MLP on the tokens of one image: `tokens (token_width h + h^2)`, h the decoder's width."""
    return vision.image_tokens * (vision.token_width * language.width + language.width**2)


def forward_flops(
    vision: VisionConfig, language: LanguageConfig, length: int, logits: int, crops: float = 0, crop_size: int | None = None
) -> dict[str, float]:
    """FLOPs of a forward pass over one row, by module: the encoder on all views of the image, the projector, the decoder on
    `length` tokens with logits at `logits` of them, the teacher on `crops` crops of `crop_size` pixels (default: the image size).

    Counted are matrix products and the patch embedding; norms, activations, softmax, ROIAlign and the loss are not. Attention is
    counted in full: the causal mask saves nothing.
    """
    return {
        "vision": 2 * vision.views * vision_macs(vision),
        "projector": 2 * projector_macs(vision, language),
        "language": 2 * language_macs(language, length, logits),
        "teacher": 2 * crops * vision_macs(vision, crop_size),
    }


def training_flops(
    vision: VisionConfig, language: LanguageConfig, trains: Collection[str], length: int, logits: int, crops: float = 0,
    crop_size: int | None = None, recompute: bool = False,
) -> dict[str, float]:  # fmt: skip
    """FLOPs of a training step for one row, by module: those of `forward_flops`, times the factors at the head of this file.

    `recompute` adds a second forward pass of the blocks of encoder and decoder that gradients pass through; the head is not
    computed again. Optimizer and EMA are not counted: they do not depend on the number of rows.
    """
    cost = forward_flops(vision, language, length, logits, crops, crop_size)
    blocks = {"vision": cost["vision"], "language": 2 * language_macs(language, length, 0)}
    for number, part in enumerate(PARTS):
        reached = any(earlier in trains for earlier in PARTS[: number + 1])  # gradients pass through this part
        factor = 1 if not reached else 3 if part in trains else 2
        cost[part] *= factor
        if factor == 2 and part == "language":
            cost[part] += 2 * attention_macs(language, length)
        if recompute and reached and part in blocks:
            cost[part] += blocks[part]
    return cost


def host_memory() -> int:
    """Physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def state_bytes(
    vision: VisionConfig, language: LanguageConfig, trains: Collection[str], teacher: bool, compute_bytes: int
) -> int:
    """Bytes of weights, gradients and optimizer states on every device, all of them replicated: 16 per trained parameter (master,
    gradient, two moments), `compute_bytes` per frozen parameter, 4 per parameter of the teacher."""
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(vision, language).items()}
    held = sum(size * (16 if part_of(name) in trains else compute_bytes) for name, size in sizes.items())
    return held + 4 * sum(map(math.prod, vision_shapes(vision).values())) * teacher


def rows_in_chunk(rows: int, vocab: int) -> int:
    """Positions whose logits the cross-entropy `chunked` computes at a time: 2^24 logits, or a sixteenth of all positions."""
    by_size, by_number = LOGITS_IN_CHUNK // vocab, -(-rows // MOST_CHUNKS)
    return by_size if by_size > by_number else by_number


def few_logits(positions: int, vocab: int, trained: bool) -> str:
    """Why the cross-entropy is not computed in chunks by default, or "". The gradient of a trained head is summed over the
    chunks, which takes more memory than the logits of few positions."""
    if positions <= rows_in_chunk(positions, vocab):
        return "all logits fit one chunk"
    return "the head is trained, and its gradient would exist twice" if trained and positions * vocab < 1 << 28 else ""


def logits_bytes(positions: int, vocab: int, width: int, trained: bool) -> tuple[int, int]:
    """What the default cross-entropy keeps, and the most that its backward pass needs in addition, in bfloat16.

    From all logits: they are kept in bfloat16 and float32, and the backward pass begins with three float32 arrays of their size.
    In chunks: nothing is kept, and one chunk exists in bfloat16 and twice in float32. A trained head's gradient is summed in
    float32; each chunk's share comes in bfloat16 and is converted.
    """
    if few_logits(positions, vocab, trained):
        return 6 * positions * vocab, 12 * positions * vocab
    return 0, max(10 * rows_in_chunk(positions, vocab) * vocab, 10 * vocab * width * trained)


def activation_bytes(
    vision: VisionConfig, language: LanguageConfig, trains: Collection[str], rows: int, length: int, answers: int,
    recompute: bool = False, framework: str = "torch",
) -> tuple[int, int]:  # fmt: skip
    """Activation memory of one micro-batch in bfloat16 with fused attention, by formula. Two numbers of bytes: what the forward
    pass keeps for the backward pass, and the largest amount that the backward pass needs in addition.

    The micro-batch has `rows` rows of `length` tokens, `answers` of them supervised. Kept are the tensors that the derivatives
    read: the float32 input of a norm (and its output before the weight, if that is trained), the input of a trained linear layer,
    q, k, v and output of attention, the inputs of the MLP's activation function and product, and a bfloat16 copy of every trained
    weight. With `recompute` a block keeps only its input, and while its gradients are computed, all of its activations exist. For
    the logits see `logits_bytes`.

    MindSpore differs: its tanh-GELU keeps seven tensors, keys and values are not repeated over the heads of a group, and the head
    dimension is padded to a multiple of 16. The formula ignores what MindSpore's compiler fuses or recomputes by itself.
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
    mask = 2 * rows * length**2 if torch else 0  # per block: PyTorch converts the boolean mask to bfloat16
    block_copies = sum(size for name, size in sizes["language"].items() if ".layers." in name) * 2 * t
    language_block = tokens * (8 * c + heads + 6 * m + t * (12 * c + 2 * m)) + mask + block_copies // language.layers
    kept_bytes += language.layers * (2 * tokens * c if recompute else language_block)
    kept_bytes += copies["language"] - block_copies  # of embeddings and head
    kept_bytes += copies["projector"] + rows * vision.image_tokens * (4 * c + 2 * vision.token_width)
    of_logits, at_logits = logits_bytes(rows * answers, language.vocab, c, t)
    kept_bytes += of_logits + rows * length**2  # and the mask
    return kept_bytes, max(at_logits, language_block if recompute else 0, vision_block if recompute else 0)
