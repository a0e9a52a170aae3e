"""GranViT: encoder, projector, decoder (paper Fig. 3).

Layout letters: B rows, N patches, S sequence, A supervised positions, C width, V vocabulary.
"""
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from granvit.checkpoint.pretrained import open_pretrained, write_pretrained
from granvit.models import PARTS, LanguageConfig, VisionConfig, parameter_shapes
from pt_granvit.arrays import DTYPES, fill, store_as, to_numpy
from pt_granvit.language import CausalDecoder
from pt_granvit.layers import Module
from pt_granvit.projector import Projector
from pt_granvit.vision import VisionEncoder


class GranViT(Module):
    """An image and questions about it -> logits of the answers.

    `blind` zeroes the image tokens: the guesser who reads the question alone.
    """

    def __init__(self, vision: VisionConfig, language: LanguageConfig, dtype: torch.dtype, attention: str = "sdpa",
                 recompute: bool = False, blind: bool = False):  # fmt: skip
        super().__init__()
        self.blind = blind
        self.vision = VisionEncoder(vision, dtype, attention=attention, recompute=recompute)
        self.projector = Projector(vision, language)
        self.language = CausalDecoder(language, dtype, attention, recompute)

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | None = None) -> Self:
        """The model in a run, in a LLaVA directory or in one of `save_pretrained`, for evaluation; `dtype` (default: the stored
        one), warnings and errors as for the encoder."""
        opened = open_pretrained(directory, *PARTS)
        dtype = dtype or DTYPES[opened.dtype]
        model = cls(opened.vision, opened.language, dtype)
        store_as(model.parameters(), dtype)
        fill(model, opened.tensors)
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors, which `from_pretrained` of either package reads."""
        vision, language = self.vision.config, self.language.config
        tensors = ((name, to_numpy(parameter)) for name, parameter in self.named_parameters())
        write_pretrained(directory, vision, language, parameter_shapes(vision, language), tensors)

    def inputs(self, pixels_B3RR: Tensor, image_weights_B: Tensor, token_ids_BS: Tensor,
               image_positions_BN: Tensor) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Input embeddings `[B, S, C]` with image tokens in their places, and the encoder's features at its top level."""
        embeddings = self.language.embed(token_ids_BS)
        at = image_positions_BN[..., None].expand(-1, -1, embeddings.shape[-1])
        if self.blind:
            tokens, top = embeddings.new_zeros(at.shape), None
        else:
            features, top = self.vision.encode(pixels_B3RR)
            tokens = self.projector(features)
        shown = image_weights_B[:, None, None] > 0
        tokens = torch.where(shown, tokens, embeddings.gather(1, at))
        return self.emit(embeddings.scatter(1, at, tokens)), top

    def forward(self, pixels_B3RR: Tensor, image_weights_B: Tensor, token_ids_BS: Tensor, positions_BS: Tensor,
                segments_BS: Tensor, image_positions_BN: Tensor,
                answer_positions_BA: Tensor) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Logits `[B, A, V]` at the supervised positions only, and the encoder's top features `[B, N, C]`."""
        inputs, top = self.inputs(pixels_B3RR, image_weights_B, token_ids_BS, image_positions_BN)
        hidden = self.language(inputs, positions_BS, segments_BS)
        at = answer_positions_BA[..., None].expand(-1, -1, hidden.shape[-1])
        return self.language.head(hidden.gather(1, at)), top
