"""Decoding, padding, resizing, cropping and tiling of images (with Pillow), and the conversion of boxes between frames.

Boxes are xyxy. In the image frame they are divided by the original width and height; in the padded frame by the side of the
centred square that `to_square` pads the image to; in the canvas frame by the width and height of the canvas that `to_canvas` fits
the image into before it is cut into tiles. Pixels are uint8 RGB, `[H, W, 3]` as decoded, `[3, R, R]` for a model, R =
`vision.image_size`.

High resolution (paper A.5; `vision.tiles` above 0): the views of an image are the padded square (the global view) and the tiles
of a canvas of `rows` x `columns` tiles, row by row. The paper states neither how the grid is chosen nor the order of the tokens:
`tile_grids` and `token_places` document the choices made here.

EXIF orientation is applied: width, height and boxes refer to the upright image. The alpha channel is dropped, which keeps the
colour of transparent pixels. Of an animation the first frame is used.
"""
import io
import math

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageOps

from granvit.data.prompts import Box
from granvit.models import VisionConfig

Image.MAX_IMAGE_PIXELS = None  # `decode` checks a limit of its own, which a configuration may raise
Image.init()  # registers the formats
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_STRIP = 256  # image rows resized at a time
_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decode(data: bytes, max_pixels: int) -> np.ndarray:
    """Image file bytes -> RGB uint8 `[H, W, 3]`, upright.

    `ValueError` if the bytes are not an image, truncated or damaged, have more than 8 bits per channel, or have more than
    `max_pixels` pixels (read from the header, before decompression). The reason has no number or name, so that equal reasons
    can be counted.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # each decoder raises other types for damaged headers
        raise ValueError("not an image file") from None
    if image.width * image.height > max_pixels:
        raise ValueError("image has more pixels than data.max_pixels (of a builder: --max-pixels)")
    if image.mode.startswith(("I", "F")):
        raise ValueError("image has more than 8 bits a channel")
    try:
        image.load()
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:
        raise ValueError("image file is truncated or damaged") from None


def padding(width: int, height: int) -> tuple[int, int, int]:
    """Side of the square, and the number of pixels added on the left and above: `(side, pad_x, pad_y)`."""
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def box_to_square(box: Box, width: int, height: int) -> Box:
    """Image frame -> padded frame: x' = (x * width + pad_x) / side."""
    side, pad_x, pad_y = padding(width, height)
    x1, y1, x2, y2 = box
    return (x1 * width + pad_x) / side, (y1 * height + pad_y) / side, (x2 * width + pad_x) / side, (y2 * height + pad_y) / side


def box_from_square(box: Box, width: int, height: int) -> Box:
    """Padded frame -> image frame, the inverse of `box_to_square`. A box on the padding gives values outside 0..1."""
    side, pad_x, pad_y = padding(width, height)
    x1, y1, x2, y2 = box
    return (x1 * side - pad_x) / width, (y1 * side - pad_y) / height, (x2 * side - pad_x) / width, (y2 * side - pad_y) / height


def to_square(image_HW3: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """Pads to a centred square with the encoder's mean colour and resizes: uint8 `[3, R, R]`, R = `vision.image_size`.

    The full-size square is never allocated: for a long, narrow image it would be far larger than the image. Pillow resizes each
    row separately and then the columns of the uint8 result, so that resizing strips of rows gives the same bytes.
    """
    height, width = image_HW3.shape[:2]
    side, pad_x, pad_y = padding(width, height)
    target, resample = vision.image_size, _RESAMPLE[vision.resize]
    narrow = _blank(target, side, vision)
    for top in range(0, height, _STRIP):
        rows = image_HW3[top : top + _STRIP]
        strip = _blank(side, len(rows), vision)
        strip.paste(Image.fromarray(rows), (pad_x, 0))
        narrow.paste(strip.resize((target, len(rows)), resample), (0, pad_y + top))
    resized = narrow.resize((target, target), resample)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _blank(width: int, height: int, vision: VisionConfig) -> Image.Image:
    return Image.new("RGB", (width, height), tuple(int(255 * mean) for mean in vision.mean))  # int: LLaVA's rounding


def tile_grids(widths: ArrayLike, heights: ArrayLike, vision: VisionConfig) -> np.ndarray:
    """Rows and columns of tiles for images of these sizes, int64 `[..., 2]`; rows x columns is at most `vision.tiles`.

    The image is fitted into the canvas with its aspect ratio unchanged. The chosen grid keeps the most of the image's pixels: an
    image that is reduced loses pixels, one that is enlarged keeps all and gains none. Of several such grids the one with the
    fewest tiles, and so the least padding, is chosen; it is unique. An image no larger than a tile gets one tile. The rule is
    that of LLaVA-NeXT's `select_best_resolution`, applied to all grids and computed with integers.
    """
    grids = [(rows, columns) for rows in range(1, vision.tiles + 1) for columns in range(1, vision.tiles // rows + 1)]
    grids_P2 = np.array(sorted(grids, key=math.prod))
    width, height = np.asarray(widths, np.int64)[..., None], np.asarray(heights, np.int64)[..., None]
    rows, columns = grids_P2.T * vision.image_size
    # An image keeps min(1, columns / width, rows / height) of its side; times width x height, to stay with integers.
    kept_pixels = np.minimum(width * height, np.minimum(columns * height, rows * width))
    return grids_P2[kept_pixels.argmax(-1)]


def image_tokens(widths: ArrayLike, heights: ArrayLike, vision: VisionConfig) -> np.ndarray:
    """The number of image tokens for images of these sizes, int64 `[...]`: that of all their views."""
    if not vision.tiles:
        return np.full(np.shape(widths), vision.image_tokens)
    return (1 + tile_grids(widths, heights, vision).prod(-1)) * vision.view_tokens


def token_places(width: int, height: int, vision: VisionConfig) -> np.ndarray:
    """The place of each image token in the sequence of its image, int32 `[image_tokens]`; -1 for tokens of absent tiles.

    The result is indexed by view, and by row and column within the view. In the sequence the tokens of the global view come
    first. The tokens of the tiles follow row by row over the full width of the canvas, not tile by tile.
    """
    if not vision.tiles:
        return np.arange(vision.image_tokens, dtype=np.int32)
    rows, columns = tile_grids(width, height, vision).tolist()
    first, side = vision.view_tokens, vision.grid // 2
    places = np.full((vision.views, side, side), -1, np.int32)
    places[0] = np.arange(first).reshape(side, side)
    map_places = first + np.arange(rows * columns * first).reshape(rows, side, columns, side)
    places[1 : 1 + rows * columns] = map_places.transpose(0, 2, 1, 3).reshape(-1, side, side)
    return places.ravel()


def _canvas(width: int, height: int, vision: VisionConfig) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Width and height of the canvas and of the image fitted into it, and the number of pixels added left and above."""
    rows, columns = (tile_grids(width, height, vision) * vision.image_size).tolist()
    if columns * height <= rows * width:
        fitted = columns, max(round(height * columns / width), 1)
    else:
        fitted = max(round(width * rows / height), 1), rows
    return (columns, rows), fitted, ((columns - fitted[0]) // 2, (rows - fitted[1]) // 2)


def box_to_canvas(box: Box, width: int, height: int, vision: VisionConfig) -> Box:
    """Image frame -> canvas frame: x' = (x * fitted width + pad_x) / canvas width."""
    side, fitted, pad = _canvas(width, height, vision)
    x1, y1, x2, y2 = ((box[i] * fitted[i % 2] + pad[i % 2]) / side[i % 2] for i in range(4))
    return x1, y1, x2, y2


def to_canvas(image_HW3: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """The image fitted into its canvas, centred, padded with the encoder's mean colour: uint8 `[rows * R, columns * R, 3]`."""
    side, fitted, pad = _canvas(image_HW3.shape[1], image_HW3.shape[0], vision)
    canvas = _blank(*side, vision)
    canvas.paste(Image.fromarray(image_HW3).resize(fitted, _RESAMPLE[vision.resize]), pad)
    return np.asarray(canvas)


def to_views(image_HW3: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """The encoder's input for an image: without tiling `to_square`, uint8 `[3, R, R]`.

    With tiling uint8 `[T, 3, R, R]`: view 0 is `to_square`, then come the tiles of the canvas row by row, then black views for
    the tiles that this image does not have.
    """
    square = to_square(image_HW3, vision)
    if not vision.tiles:
        return square
    side = vision.image_size
    views = np.zeros((vision.views, *square.shape), np.uint8)
    views[0] = square
    canvas = to_canvas(image_HW3, vision)
    tiles = canvas.reshape(canvas.shape[0] // side, side, -1, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
    views[1 : 1 + len(tiles)] = tiles
    return views


def box_to_features(box: Box, width: int, height: int, vision: VisionConfig) -> Box:
    """Image frame -> frame of the feature map that ROIAlign reads: with tiling the canvas, else the part of the padded square
    that patches cover.

    A box may end beyond the last patch (at 1.016 for SigLIP, whose 27 patches of 14 pixels cover 378 of 384): ROIAlign clamps.
    """
    if vision.tiles:
        return box_to_canvas(box, width, height, vision)
    enlargement = vision.image_size / vision.covered_pixels
    x1, y1, x2, y2 = box_to_square(box, width, height)
    return x1 * enlargement, y1 * enlargement, x2 * enlargement, y2 * enlargement


def crop(image_HW3: np.ndarray, box: Box, scale: float, size: int, resize: str) -> np.ndarray:
    """Cuts `box` (image frame) out of the ORIGINAL image and resizes it to uint8 `[3, size, size]`, ignoring its aspect ratio.

    `scale` enlarges the box about its centre; the result is clipped to the image. The box is not rounded to whole pixels. Pixels
    outside the box do not contribute.
    """
    height, width = image_HW3.shape[:2]
    x1, y1, x2, y2 = box
    half_x, half_y = (x2 - x1) / 2 * scale, (y2 - y1) / 2 * scale
    middle_x, middle_y = (x1 + x2) / 2, (y1 + y2) / 2
    left, top = max(middle_x - half_x, 0.0) * width, max(middle_y - half_y, 0.0) * height
    right, bottom = min(middle_x + half_x, 1.0) * width, min(middle_y + half_y, 1.0) * height
    x, y = int(left), int(top)  # cut the box out first: the resize filter would also read pixels around it
    pixels = np.ascontiguousarray(image_HW3[y : math.ceil(bottom), x : math.ceil(right)])
    resized = Image.fromarray(pixels).resize((size, size), _RESAMPLE[resize], box=(left - x, top - y, right - x, bottom - y))
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))
