"""What parity looks at inside a model: the named activations of a forward pass, in the order in which they are made, and the
protocol that each framework implements to hand them out.

A name is the path of the module that makes the activation, as in its parameters' names. What bears a module's name is what its
own mathematics makes and no submodule has named: an attention's heads before its output projection, an MLP's activated
hidden layer before the closing product, a block's sum with its residual, the decoder's logits. The merged sequence of text and
image tokens is called `inputs`.
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
    """Shapes of an encoder's activations for a batch of square images."""
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
    """Shapes of the decoder's activations from the first block on; logits at `answers` positions of each row."""
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

    `boxes` crops of `crop_size` pixels for each row pass through the teacher (`teacher.…`), where there are any.
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
    """What one forward and backward pass over one batch made, by name (this file's, `granvit.models`).

    The losses are those of `granvit.engine.LOSSES`. The teacher's activations have no gradient.
    """

    losses: dict[str, float]
    activations: dict[str, np.ndarray]
    activation_gradients: dict[str, np.ndarray]
    parameter_gradients: dict[str, np.ndarray]


Feed = Mapping[str, tuple[np.ndarray, np.ndarray]]  # activation -> what replaces it, and what replaces its gradient


class Introspection(Protocol):
    """One framework's model opened up for parity.

    The constructor of both implementations is `Introspector(config, vision, language, start, shapes, graph=True)`: `shapes` names
    the activations to capture (`activation_shapes` for the batches to come; none: for operators and generation alone), `graph`
    asks for the framework's static graph where it has one.
    """

    engine: TrainEngine

    def capture(self, batch: Batch, feed: Feed | None = None, backward: bool = True) -> Capture:
        """Forward and, unless told otherwise, backward over one batch, whose own counts divide its losses; gradients for every
        parameter, frozen or not.

        An activation in `feed` is captured, then replaced by the value given for it; so is the gradient that it hands
        back. Fed at all names, every module is judged by itself and not by what came before it.
        """

    def operate(self, operator: str, arrays: Sequence[np.ndarray], cotangent: np.ndarray, differentiate: int,
                **options: Any) -> tuple[np.ndarray, list[np.ndarray]]:  # fmt: skip
        """One operator's output, and the gradients of its first `differentiate` inputs under `cotangent`."""

    def generate(self, prompts: PromptBatch, max_new_tokens: int, stop_token: int) -> tuple[np.ndarray, np.ndarray]:
        """As `TrainEngine.generate`, and the logits `[B, T, V]` of the T steps it took; `shapes` must have been empty."""
