"""From what a reader hands over to an image that can be used: its bytes, its upright pixels, its boxes relative to the image.

Every reason for which an image or a region is left out is a fixed sentence without names or numbers, so that it can be counted.
"""
import io
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from granvit.data.images import FORMATS, decode
from granvit.data.prompts import Box
from granvit.data.records import image_box
from granvit.data.sources.annotated import Annotated

ORIENTATION = 0x0112  # EXIF tag
TURNED = (5, 6, 7, 8)  # orientations that exchange width and height
_NO_FOLDER, _MISSING, _UNREADABLE = "source has no folder of images", "image file is missing", "image file cannot be read"
LINKED = "image is a symbolic link that leads out of the folder"


@dataclass(frozen=True, eq=False)
class Opened:
    """An image whose annotations are valid: file, upright RGB pixels uint8 `[H, W, 3]`, boxes with their captions (empty: none),
    the global caption, and `(what, reason)` for each annotation that was refused."""

    id: str
    image: bytes
    pixels_HW3: np.ndarray
    regions: tuple[tuple[Box, str], ...]
    global_caption: str | None
    refused: tuple[tuple[str, str], ...]


def open_record(annotated: Annotated, folder: Path | None, max_pixels: int) -> Opened:
    """Reads and decodes the image and converts the boxes. `folder` is the source's folder of images; None if its images come with
    the annotations. `ValueError` with the reason if the image cannot be used.

    EXIF orientation: pixels are upright, and stored boxes are relative to the upright image. A source that states the size of the
    image says by it which frame its boxes are in; boxes of the unturned frame are turned along. If that cannot be known (no size,
    a square, a mirrored or upside-down image), an image with boxes is refused.
    """
    data = annotated.image if isinstance(annotated.image, bytes) else read_inside(folder, annotated.image)
    pixels_HW3 = decode(data, max_pixels)
    height, width = pixels_HW3.shape[:2]
    orientation = _orientation(data)
    turned = orientation if _boxes_are_turned(annotated, orientation, width, height) else 1
    frame_width, frame_height = (height, width) if turned != 1 else (width, height)
    regions: list[tuple[Box, str]] = []
    refused = list(annotated.refused)
    for number, region in enumerate(annotated.regions):
        try:
            box = image_box(list(region.box), frame_width, frame_height, annotated.unit, annotated.frame)
            regions.append((_upright(box, turned), _text(region.caption)))
        except ValueError as error:
            refused.append((f"region {number}", str(error)))
    caption = annotated.global_caption
    if caption is not None:
        try:
            caption = _text(caption) or None
        except ValueError as error:
            caption = None
            refused.append(("global", str(error)))
    return Opened(annotated.id, data, pixels_HW3, tuple(regions), caption, tuple(refused))


def read_inside(folder: Path | None, name: str) -> bytes:
    """The bytes of an image below `folder`. `ValueError` with the reason if the path leads out of the folder, by itself or by a
    symbolic link, or the file cannot be read."""
    if folder is None:
        raise ValueError(_NO_FOLDER)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError("path of the image leads out of the folder")
    found = Path(folder, name)
    try:
        inside = os.path.realpath(found, strict=True)
        if not Path(inside).is_relative_to(os.path.realpath(folder)):
            raise ValueError(LINKED)
        return Path(inside).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(_MISSING) from None
    except OSError as error:
        raise ValueError(f"{_UNREADABLE} ({type(error).__name__})") from None


def is_absent(reason: str) -> bool:
    """Whether an image could not be used because its file is not in the folder or the system does not let it be read."""
    return reason in (_NO_FOLDER, _MISSING, LINKED) or reason.startswith(_UNREADABLE)


def _orientation(data: bytes) -> int:
    """The EXIF orientation of an image file that `decode` has read, 1 if it has none."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        found = image.getexif().get(ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def _boxes_are_turned(annotated: Annotated, orientation: int, width: int, height: int) -> bool:
    """Whether the boxes are in the frame of the file before it is turned upright; `width` and `height` are upright.

    `ValueError` if the stated size is not the image's, or it cannot be known which frame the boxes are in.
    """
    size = annotated.size
    if size is not None and size != (width, height) and (orientation not in TURNED or size != (height, width)):
        raise ValueError("size of the image is not the one that the annotation states")
    if orientation == 1 or not annotated.regions:
        return False
    if orientation not in TURNED or size is None or width == height:
        raise ValueError("image has an EXIF orientation, and the frame of its boxes is not known")
    return size != (width, height)


def _upright(box: Box, orientation: int) -> Box:
    """A box relative to the stored image, relative to the upright one."""
    x1, y1, x2, y2 = box
    if orientation == 5:
        return y1, x1, y2, x2
    if orientation == 6:
        return 1 - y2, x1, 1 - y1, x2
    if orientation == 7:
        return 1 - y2, 1 - x2, 1 - y1, 1 - x1
    if orientation == 8:
        return y1, 1 - x2, y2, 1 - x1
    return box


def _text(caption: str) -> str:
    """A caption with single spaces; `ValueError` with the reason if it cannot be written. Signs of chat templates are text like
    any other: the tokenizer is told so (`granvit.data.chat`)."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise ValueError("caption is not valid Unicode") from None
    return " ".join(caption.split())
