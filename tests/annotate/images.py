"""Images of the annotators' tests."""
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageDraw, ImageFont

from granvit.data.annotate.annotator import KnownImage


def photograph(name: str) -> KnownImage:
    """An image file of scikit-image's wheel."""
    path = Path(skimage.__file__).parent / "data" / name
    return KnownImage(np.asarray(Image.open(path).convert("RGB")))


def written(lines: dict[str, tuple[int, int]], width: int = 360, height: int = 150) -> KnownImage:
    """Lines of text with the positions of their upper left corners, black on white, 24 pixels high."""
    image = Image.new("RGB", (width, height), "white")
    for text, place in lines.items():
        ImageDraw.Draw(image).text(place, text, fill="black", font=ImageFont.load_default(24))
    return KnownImage(np.asarray(image))


def noise(height: int, width: int, seed: int = 0) -> KnownImage:
    """Random pixels."""
    return KnownImage(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))
