"""GranViT in MindSpore: `load_encoder(directory, resolution=None, dtype=None, device="auto")`,
`load_decoder(directory, dtype=None, device="auto")`, `GranViT.from_pretrained`."""
from ms_granvit.language import CausalDecoder
from ms_granvit.model import GranViT
from ms_granvit.vision import VisionEncoder

__all__ = ["CausalDecoder", "GranViT", "VisionEncoder", "load_decoder", "load_encoder"]

load_encoder = VisionEncoder.from_pretrained
load_decoder = CausalDecoder.from_pretrained
