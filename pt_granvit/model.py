"""GranViT: encoder, projector, decoder (paper Fig. 3).

With tiling the pixels are `[B, T, 3, R, R]`, T views of each row's image; the encoder processes them as B T images.
Layout letters: B rows, T views, N patches or image tokens, S sequence, A supervised positions, C width, V vocabulary.
"""
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from granvit.checkpoint.pretrained import open_pretrained, write_pretrained
from granvit.kernels import Kernels
from granvit.logs import log_kernels
from granvit.models import PARTS, LanguageConfig, VisionConfig, parameter_shapes
from pt_granvit.arrays import DTYPES, fill, to_numpy
from pt_granvit.distributed import choose_device
from pt_granvit.language import CausalDecoder
from pt_granvit.layers import stored_as
from pt_granvit.ops.table import PLAIN, kernels_for
from pt_granvit.projector import Projector
from pt_granvit.taps import Module
from pt_granvit.vision import VisionEncoder


class GranViT(Module):
    """An image and questions about it -> logits of the answers.

    With `zero_image_tokens` the image tokens are zeros, so the decoder has the text alone (stage `guesser`).
    """

    def __init__(self, vision: VisionConfig, language: LanguageConfig, dtype: torch.dtype, kernels: Kernels = PLAIN,
                 recompute: bool = False, zero_image_tokens: bool = False):  # fmt: skip
        super().__init__()
        self.zero_image_tokens = zero_image_tokens
        self.vision = VisionEncoder(vision, dtype, kernels=kernels, recompute=recompute)
        self.projector = Projector(vision, language)
        self.language = CausalDecoder(language, dtype, kernels, recompute)

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | None = None, device: str = "auto") -> Self:
        """Loads the model for evaluation from a run, a LLaVA directory, or a directory that `save_pretrained` wrote. For
        `dtype`, `device`, warnings and errors see `VisionEncoder.from_pretrained`."""
        opened = open_pretrained(directory, *PARTS)
        dtype = dtype or DTYPES[opened.dtype]
        device = choose_device(device)
        kernels = kernels_for(device, dtype)
        with torch.device(device), stored_as(dtype):
            model = cls(opened.vision, opened.language, dtype, kernels)
        fill(model, opened.tensors)
        log_kernels(kernels)
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors, which `from_pretrained` of either package reads."""
        vision, language = self.vision.config, self.language.config
        tensors = ((name, to_numpy(parameter)) for name, parameter in self.named_parameters())
        write_pretrained(directory, vision, language, parameter_shapes(vision, language), tensors)

    def inputs(self, pixels_B3RR: Tensor, image_weights_B: Tensor, token_ids_BS: Tensor,
               image_positions_BN: Tensor) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Input embeddings `[B, S, C]` with image tokens in their places, and the encoder's features at its `built_level`.

        Position -1 marks an absent image token: its features are multiplied by 0 and added at position 0.
        """
        embeddings = self.language.embed(token_ids_BS)
        B, S, C = embeddings.shape
        positions_BN = image_positions_BN.clamp(min=0)
        weights_BN = (image_weights_B[:, None] * (image_positions_BN >= 0)).to(embeddings.dtype)
        text_weights_BS1 = 1 - weights_BN.new_zeros(B, S).scatter_add(1, positions_BN, weights_BN)[..., None]
        if self.zero_image_tokens:
            return self.emit(embeddings * text_weights_BS1), None
        features, built_features = self.vision.encode(pixels_B3RR.flatten(0, -4))
        tokens_BNC = self.projector(features).reshape(B, -1, C) * weights_BN[..., None]
        placed_BSC = torch.zeros_like(embeddings).scatter_add(1, positions_BN[..., None].expand(-1, -1, C), tokens_BNC)
        return self.emit(embeddings * text_weights_BS1 + placed_BSC), built_features

    def hidden(self, pixels_B3RR: Tensor, image_weights_B: Tensor, token_ids_BS: Tensor, positions_BS: Tensor,
               segments_BS: Tensor, image_positions_BN: Tensor,
               answer_positions_BA: Tensor) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Hidden states `[B, A, C]` at the supervised positions, and the encoder's features at its `built_level`: `[B, N, C]`,
        with tiling those of every view, `[B T, N, C]`."""
        inputs, built_features = self.inputs(pixels_B3RR, image_weights_B, token_ids_BS, image_positions_BN)
        hidden = self.language(inputs, positions_BS, segments_BS)
        positions_BAC = answer_positions_BA[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, positions_BAC), built_features

    def forward(self, pixels_B3RR: Tensor, image_weights_B: Tensor, token_ids_BS: Tensor, positions_BS: Tensor,
                segments_BS: Tensor, image_positions_BN: Tensor,
                answer_positions_BA: Tensor) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Logits `[B, A, V]` at the supervised positions only, and the features as in `hidden`."""
        hidden_BAC, built_features = self.hidden(pixels_B3RR, image_weights_B, token_ids_BS, positions_BS, segments_BS,
                                                 image_positions_BN, answer_positions_BA)  # fmt: skip
        return self.language.head(hidden_BAC), built_features
