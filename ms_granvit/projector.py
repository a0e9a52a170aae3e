"""The projector between encoder and decoder (paper section 5.1: a two-layer MLP; LLaVA's mlp2x_gelu)."""
from mindspore import Tensor

from granvit.models import LanguageConfig, VisionConfig
from ms_granvit.layers import Linear
from ms_granvit.ops.activations import exact_gelu
from ms_granvit.taps import Module


def pixel_shuffle(features_BNC: Tensor) -> Tensor:
    """Joins the features of each 2 x 2 block of patches of a square grid, `[B, N/4, 4C]` (paper A.5). Their order is upper left,
    upper right, lower left, lower right, as in InternVL."""
    B, N, C = features_BNC.shape
    half = int(N**0.5 + 0.5) // 2
    cells = features_BNC.reshape(B, half, 2, half, 2, C).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(B, half * half, 4 * C)


class Projector(Module):
    """Patch features `[B, N, C_vision]` -> image tokens `[B, N, C_language]`: Linear, exact GELU, Linear.

    With tiling, `pixel_shuffle` comes first, and the image tokens are `[B, N/4, C_language]`.
    """

    def __init__(self, vision: VisionConfig, language: LanguageConfig):
        super().__init__()
        self.shuffle = vision.tiles > 0
        self.linear_1 = Linear(vision.token_width, language.width, True)
        self.linear_2 = Linear(language.width, language.width, True)

    def construct(self, features_BNC: Tensor) -> Tensor:
        if self.shuffle:
            features_BNC = pixel_shuffle(features_BNC)
        return self.linear_2(self.emit(exact_gelu(self.linear_1(features_BNC))))
