"""Decoding, padding, resizing and cropping (Pillow does the pixels), and the geometry that carries boxes along.

Boxes are xyxy. In the image frame they are divided by the original width and height; in the padded frame by the side of
the centred square that `to_square` pads the image to. Pixels are uint8 RGB, `[H, W, 3]` as decoded, `[3, R, R]` for a model.

EXIF orientation is applied: an image, its width, height and boxes are those that a viewer shows. Transparency is dropped
(the colour under it stays), and of an animation the first frame counts.
"""
import io
import math

import numpy as np
from PIL import Image, ImageOps

from granvit.data.prompts import Box
from granvit.models import VisionConfig

Image.MAX_IMAGE_PIXELS = None  # `decode` states and checks its own limit, which a configuration may raise
Image.init()  # registers the formats below
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decode(data: bytes, max_pixels: int) -> np.ndarray:
    """Image file bytes -> RGB uint8 `[H, W, 3]`, upright.

    Raises `ValueError` with a reason that holds no number or name (so that reasons can be counted): not an image, truncated
    or damaged, more than 8 bits a channel, or larger than `max_pixels` by its header, before anything is decompressed.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # damaged headers raise many types, by decoder
        raise ValueError("not an image file") from None
    if image.width * image.height > max_pixels:
        raise ValueError("image has more pixels than data.max_pixels")
    if image.mode.startswith(("I", "F")):
        raise ValueError("image has more than 8 bits a channel")
    try:
        image.load()
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:
        raise ValueError("image file is truncated or damaged") from None


def padding(width: int, height: int) -> tuple[int, int, int]:
    """Side of the square and the pixels added left and above: `(side, pad_x, pad_y)`."""
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def box_to_square(box: Box, width: int, height: int) -> Box:
    """Image frame -> padded frame: x' = (x * width + pad_x) / side."""
    side, pad_x, pad_y = padding(width, height)
    x1, y1, x2, y2 = box
    return (x1 * width + pad_x) / side, (y1 * height + pad_y) / side, (x2 * width + pad_x) / side, (y2 * height + pad_y) / side


def box_from_square(box: Box, width: int, height: int) -> Box:
    """Padded frame -> image frame, the inverse of `box_to_square`; outside 0..1 where the box lies on the padding."""
    side, pad_x, pad_y = padding(width, height)
    x1, y1, x2, y2 = box
    return (x1 * side - pad_x) / width, (y1 * side - pad_y) / height, (x2 * side - pad_x) / width, (y2 * side - pad_y) / height


def to_square(image_HW3: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """Pads to a centred square with the encoder's mean colour and resizes: uint8 `[3, R, R]`, R = `vision.image_size`."""
    height, width = image_HW3.shape[:2]
    side, pad_x, pad_y = padding(width, height)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in vision.mean))  # int: LLaVA's rounding
    square.paste(Image.fromarray(image_HW3), (pad_x, pad_y))
    resized = square.resize((vision.image_size, vision.image_size), _RESAMPLE[vision.resize])
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def crop(image_HW3: np.ndarray, box: Box, scale: float, size: int, resize: str) -> np.ndarray:
    """The region in `box` (image frame) of the ORIGINAL image, squashed to uint8 `[3, size, size]`.

    Edges between pixels are honoured (the box is not rounded), and no pixel outside the box has a part in it. `scale` enlarges
    the box about its centre, clipped to the image.
    """
    height, width = image_HW3.shape[:2]
    x1, y1, x2, y2 = box
    half_x, half_y = (x2 - x1) / 2 * scale, (y2 - y1) / 2 * scale
    middle_x, middle_y = (x1 + x2) / 2, (y1 + y2) / 2
    left, top = max(middle_x - half_x, 0.0) * width, max(middle_y - half_y, 0.0) * height
    right, bottom = min(middle_x + half_x, 1.0) * width, min(middle_y + half_y, 1.0) * height
    x, y = int(left), int(top)  # resize's filter would reach beyond the box into its neighbourhood: cut that off first
    pixels = np.ascontiguousarray(image_HW3[y : math.ceil(bottom), x : math.ceil(right)])
    resized = Image.fromarray(pixels).resize((size, size), _RESAMPLE[resize], box=(left - x, top - y, right - x, bottom - y))
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))
