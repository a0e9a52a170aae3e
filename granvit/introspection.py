"""The activations that parity/ compares: their names and shapes, in order of execution, and the interface that each framework
implements to return them.

An activation has the name of the module that computes it, as in the module's parameter names. For a module with submodules it is
the tensor that the module computes itself: the heads of attention before the output projection, the hidden layer of an MLP after
the activation function (and the gate), the output of a block after the residual addition, the decoder's logits. The merged
sequence of text and image tokens is called `inputs`.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from granvit.data.batch import Batch, PromptBatch
from granvit.engine import TrainEngine
from granvit.models import LanguageConfig, Shapes, VisionConfig

INPUTS = "inputs"


def vision_activations(c: VisionConfig, images: int, image_size: int, prefix: str = "vision.") -> Shapes:
    """Shapes of an encoder's activations for `images` images of `image_size` x `image_size` pixels."""
    patches = (image_size // c.patch_size) ** 2
    tokens = (images, patches + c.class_token, c.width)
    hidden, heads = (*tokens[:2], c.mlp), (images, c.heads, tokens[1], c.head_dim)
    found: Shapes = {f"{prefix}embeddings.patch_embedding": (images, patches, c.width)}
    if c.patch_norm:
        found[f"{prefix}embeddings.patch_norm"] = (images, patches, c.width)
    found[f"{prefix}embeddings"] = tokens
    if c.pre_norm:
        found[f"{prefix}pre_layernorm"] = tokens
    for i in range(c.built_layers):
        block = f"{prefix}encoder.layers.{i}"
        found[f"{block}.layer_norm1"] = tokens
        found |= {f"{block}.self_attn.{name}": tokens for name in ("q_proj", "k_proj", "v_proj")}
        found[f"{block}.self_attn"] = heads
        found[f"{block}.self_attn.out_proj"] = tokens
        found[f"{block}.layer_norm2"] = tokens
        if c.gated_mlp:
            found[f"{block}.mlp.gate_proj"] = hidden
        found |= {f"{block}.mlp.fc1": hidden, f"{block}.mlp": hidden, f"{block}.mlp.fc2": tokens, block: tokens}
    if c.built_level == "final":
        found[f"{prefix}post_layernorm"] = tokens
    return found


def projector_activations(vision: VisionConfig, language: LanguageConfig, rows: int) -> Shapes:
    """Shapes of the projector's activations."""
    tokens = (rows * vision.views, vision.view_tokens, language.width)
    return {f"projector{name}": tokens for name in (".linear_1", "", ".linear_2")}


def language_activations(c: LanguageConfig, rows: int, length: int, answers: int) -> Shapes:
    """Shapes of the decoder's activations from the first block on; the logits are at `answers` positions of each row."""
    tokens, hidden = (rows, length, c.width), (rows, length, c.mlp)
    queries, keys = (rows, length, c.heads * c.head_dim), (rows, length, c.kv_heads * c.head_dim)
    found: Shapes = {}
    for i in range(c.layers):
        block = f"language.model.layers.{i}"
        found[f"{block}.input_layernorm"] = tokens
        found |= {f"{block}.self_attn.q_proj": queries, f"{block}.self_attn.k_proj": keys, f"{block}.self_attn.v_proj": keys}
        found[f"{block}.self_attn"] = (rows, c.heads, length, c.head_dim)
        found[f"{block}.self_attn.o_proj"] = tokens
        found[f"{block}.post_attention_layernorm"] = tokens
        found |= {f"{block}.mlp.gate_proj": hidden, f"{block}.mlp.up_proj": hidden, f"{block}.mlp": hidden}
        found |= {f"{block}.mlp.down_proj": tokens, block: tokens}
    found["language.model.norm"] = tokens
    found["language" if c.tied_head else "language.lm_head"] = (rows, answers, c.vocab)
    return found


def activation_shapes(vision: VisionConfig, language: LanguageConfig, rows: int, length: int, answers: int,
                      boxes: int = 0, crop_size: int = 0) -> Shapes:  # fmt: skip
    """Shapes of every named activation of a training step's forward pass over `rows` rows, in order of execution.

    With `boxes` above 0 the teacher's activations (`teacher.…`) for that many crops of `crop_size` pixels per row are included.
    """
    tokens = (rows, length, language.width)
    found: Shapes = {"language.model.embed_tokens": tokens}
    found |= vision_activations(vision, rows * vision.views, vision.image_size)
    found |= projector_activations(vision, language, rows)
    found[INPUTS] = tokens
    found |= language_activations(language, rows, length, answers)
    if boxes:
        found |= vision_activations(vision, rows * boxes, crop_size, "teacher.")
    return found


@dataclass(frozen=True)
class Capture:
    """Losses, activations and gradients of one forward and backward pass over one batch, by name.

    Losses are named as in `granvit.engine.LOSSES`, activations as in this file, parameters as in `granvit.models`. The teacher's
    activations have no gradient.
    """

    losses: dict[str, float]
    activations: dict[str, np.ndarray]
    activation_gradients: dict[str, np.ndarray]
    parameter_gradients: dict[str, np.ndarray]


Feed = Mapping[str, tuple[np.ndarray, np.ndarray]]  # activation -> replacements of its value and of its gradient


class Introspection(Protocol):
    """One framework's model with access to its activations and gradients, for parity/.

    Both implementations are constructed as `Introspector(config, vision, language, start, shapes, graph=True)`. `shapes` are the
    activations to capture (`activation_shapes` of the batches); it is empty if only `operate` and `generate` are used. `graph`
    selects the framework's static graph, if it has one.
    """

    engine: TrainEngine

    def capture(self, batch: Batch, feed: Feed | None = None, backward: bool = True) -> Capture:
        """Forward pass and (with `backward`) backward pass over one batch. Losses are divided by the batch's own counts of tokens
        and boxes. Gradients are computed for all parameters, frozen ones included.

        Each activation in `feed` is captured and then replaced by the given value; its gradient likewise in the backward pass.
        With a replacement for every name, each module is compared on equal inputs, without the errors of the modules before it.
        """

    def operate(self, operator: str, arrays: Sequence[np.ndarray], cotangent: np.ndarray, differentiate: int,
                named: Mapping[str, str] | None = None, documented: bool = False,
                **options: Any) -> tuple[np.ndarray, list[np.ndarray]]:  # fmt: skip
        """One operator's output, and the gradients of its first `differentiate` inputs for the output gradient `cotangent`.
        `named` names implementations, as `runtime.kernels` does. With `documented` they are those of an NPU in float16, on
        stand-ins that follow CANN's documents (`parity.documented`)."""

    def generate(self, prompts: PromptBatch, max_new_tokens: int, stop_token: int) -> tuple[np.ndarray, np.ndarray]:
        """As `TrainEngine.generate`; also returns the logits `[B, T, V]` of its T steps. `shapes` must have been empty."""
