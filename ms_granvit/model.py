"""GranViT: encoder, projector, decoder (paper Fig. 3).

With tiling the pixels are `[B, T, 3, R, R]`, T views of each row's image; the encoder processes them as B T images.
Layout letters: B rows, T views, N patches or image tokens, S sequence, A supervised positions, C width, V vocabulary.
"""
from pathlib import Path
from typing import Self

import mindspore as ms
from mindspore import Tensor, ops

from granvit.checkpoint.pretrained import open_pretrained, write_pretrained
from granvit.kernels import Kernels
from granvit.logs import log_kernels
from granvit.models import PARTS, LanguageConfig, VisionConfig, parameter_shapes
from ms_granvit.arrays import dtype_on_device, fill, to_numpy
from ms_granvit.distributed import use_device
from ms_granvit.language import CausalDecoder
from ms_granvit.layers import stored_as
from ms_granvit.ops.table import PLAIN, kernels_for
from ms_granvit.projector import Projector
from ms_granvit.taps import Module
from ms_granvit.vision import VisionEncoder


def row_offsets(positions_BN: Tensor, length: int) -> Tensor:
    """Converts positions in rows of `length` tokens to indices `[B N]` into the flattened rows."""
    rows = ops.expand_dims(ops.arange(positions_BN.shape[0], dtype=positions_BN.dtype), 1)
    return (positions_BN + rows * length).reshape(-1)


def take(hidden_BSC: Tensor, positions_BA: Tensor) -> Tensor:
    """`hidden[b, positions[b, a]]`, `[B, A, C]`."""
    B, S, C = hidden_BSC.shape
    return ops.gather(hidden_BSC.reshape(B * S, C), row_offsets(positions_BA, S), 0).reshape(B, -1, C)


class GranViT(Module):
    """An image and questions about it -> logits of the answers.

    With `zero_image_tokens` the image tokens are zeros, so the decoder has the text alone (stage `guesser`).
    """

    def __init__(self, vision: VisionConfig, language: LanguageConfig, dtype: ms.Type, kernels: Kernels = PLAIN,
                 recompute: bool = False, zero_image_tokens: bool = False):  # fmt: skip
        super().__init__()
        self.zero_image_tokens = zero_image_tokens
        self.vision = VisionEncoder(vision, dtype, kernels=kernels, recompute=recompute)
        self.projector = Projector(vision, language)
        self.language = CausalDecoder(language, dtype, kernels, recompute)

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: ms.Type | None = None, device: str = "auto") -> Self:
        """Loads the model for evaluation from a run, a LLaVA directory, or a directory that `save_pretrained` wrote. For
        `dtype`, `device`, warnings and errors see `VisionEncoder.from_pretrained`."""
        opened = open_pretrained(directory, *PARTS)
        device = use_device(device)
        dtype = dtype or dtype_on_device(opened.dtype)
        kernels = kernels_for(device, dtype)
        with stored_as(dtype):
            model = cls(opened.vision, opened.language, dtype, kernels)
        fill(model, opened.tensors)
        log_kernels(kernels)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors, which `from_pretrained` of either package reads."""
        vision, language = self.vision.config, self.language.config
        tensors = ((name, to_numpy(parameter)) for name, parameter in self.parameters_and_names())
        write_pretrained(directory, vision, language, parameter_shapes(vision, language), tensors)

    def inputs(self, pixels_B3RR: Tensor, image_weights_B: Tensor, token_ids_BS: Tensor,
               image_positions_BN: Tensor) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Input embeddings `[B, S, C]` with image tokens in their places, and the encoder's features at its `built_level`.

        Position -1 marks an absent image token: its features are multiplied by 0 and added at position 0.
        """
        embeddings = self.language.embed(token_ids_BS)
        B, S, C = embeddings.shape
        offsets = ops.expand_dims(row_offsets(ops.maximum(image_positions_BN, 0), S), -1)
        present = ops.cast(image_positions_BN >= 0, image_weights_B.dtype)
        weights_BN = ops.cast(image_weights_B.reshape(B, 1) * present, self.language.dtype)
        text_weights_BS1 = 1 - ops.scatter_nd(offsets, weights_BN.reshape(-1), (B * S,)).reshape(B, S, 1)
        if self.zero_image_tokens:
            return self.emit(embeddings * text_weights_BS1), None
        R = pixels_B3RR.shape[-1]
        features, built_features = self.vision.encode(pixels_B3RR.reshape(-1, 3, R, R))
        tokens_BNC = self.projector(features).reshape(B, -1, C) * ops.expand_dims(weights_BN, -1)
        placed_BSC = ops.scatter_nd(offsets, tokens_BNC.reshape(-1, C), (B * S, C)).reshape(B, S, C)
        return self.emit(embeddings * text_weights_BS1 + placed_BSC), built_features

    def hidden(self, pixels_B3RR: Tensor, image_weights_B: Tensor, token_ids_BS: Tensor, positions_BS: Tensor,
               segments_BS: Tensor, image_positions_BN: Tensor,
               answer_positions_BA: Tensor) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Hidden states `[B, A, C]` at the supervised positions, and the encoder's features at its `built_level`: `[B, N, C]`,
        with tiling those of every view, `[B T, N, C]`."""
        inputs, built_features = self.inputs(pixels_B3RR, image_weights_B, token_ids_BS, image_positions_BN)
        return take(self.language(inputs, positions_BS, segments_BS), answer_positions_BA), built_features

    def construct(self, pixels_B3RR: Tensor, image_weights_B: Tensor, token_ids_BS: Tensor, positions_BS: Tensor,
                  segments_BS: Tensor, image_positions_BN: Tensor,
                  answer_positions_BA: Tensor) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Logits `[B, A, V]` at the supervised positions only, and the features as in `hidden`."""
        hidden_BAC, built_features = self.hidden(pixels_B3RR, image_weights_B, token_ids_BS, positions_BS, segments_BS,
                                                 image_positions_BN, answer_positions_BA)  # fmt: skip
        return self.language.head(hidden_BAC), built_features
