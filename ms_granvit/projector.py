"""The projector between encoder and decoder (paper section 5.1: a two-layer MLP; LLaVA's mlp2x_gelu)."""
from mindspore import Tensor

from granvit.models import LanguageConfig, VisionConfig
from ms_granvit.layers import Linear, Module, activate


class Projector(Module):
    """Patch features `[B, N, C_vision]` -> image tokens `[B, N, C_language]`: Linear, exact GELU, Linear."""

    def __init__(self, vision: VisionConfig, language: LanguageConfig):
        super().__init__()
        self.linear_1 = Linear(vision.width, language.width, True)
        self.linear_2 = Linear(language.width, language.width, True)

    def construct(self, features_BNC: Tensor) -> Tensor:
        return self.linear_2(self.emit(activate("gelu", self.linear_1(features_BNC))))
