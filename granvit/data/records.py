"""The schema of the data: `ImageRecord` with its `Region`s, and `Conversation`; and the validation of region data.

Region data from outside is validated by `make_record`. An invalid region is dropped and the reason returned; an invalid image
raises `ValueError`. Reasons are fixed sentences without names or numbers of the record, so that equal reasons can be counted.
"""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from granvit.data.images import box_from_square, decode, padding
from granvit.data.prompts import Box

BboxFrame = Literal["image", "padded_square"]
BoxUnit = Literal["relative", "absolute"]


@dataclass(frozen=True)
class Region:
    """A box (xyxy relative to the ORIGINAL image's width and height, 0 <= x1 < x2 <= 1, y alike) and its caption."""

    box: Box
    caption: str


@dataclass(frozen=True)
class ImageRecord:
    """One image with its captions. `image` is the encoded file; `width` and `height` are those after EXIF orientation."""

    id: str
    width: int
    height: int
    image: bytes
    global_caption: str | None
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Conversation:
    """Questions with their answers, about one image or none (then `image` is empty, `width` and `height` are 0).

    The texts have no `<image>` placeholder: the chat template puts the image before the first question.
    """

    id: str
    width: int
    height: int
    image: bytes
    turns: tuple[tuple[str, str], ...]


def _caption(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("caption is not text")
    if not value.strip():
        raise ValueError("caption is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("caption is not valid Unicode") from None
    return value.strip()


def image_box(values: Any, width: int, height: int, unit: BoxUnit, frame: BboxFrame) -> Box:
    """`written_box` with `step` 0.001; also raises `ValueError` for a box without area, which cannot be cropped."""
    x1, y1, x2, y2 = written_box(values, width, height, unit, frame, 0.001)
    if x2 <= x1 or y2 <= y1:
        raise ValueError("box has zero area")
    return x1, y1, x2, y2


def written_box(values: Any, width: int, height: int, unit: BoxUnit, frame: BboxFrame, step: float) -> Box:
    """Converts a box of a data set to the image frame: 0 <= x1 <= x2 <= 1, y alike.

    `unit` absolute: the numbers are pixels. `frame` padded_square: they are measured from the corner of the centred square that
    the image is padded to. Numbers in a data set are rounded to multiples of `step`: a box that crosses the edge of the image by
    no more than the rounding error is clipped to the image.
    `ValueError` with the reason if `values` is not a box of the image.
    """
    four = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == 4
    if not four or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise ValueError("box is not four numbers")
    x1, y1, x2, y2 = (float(v) if abs(v) < 1e9 else math.inf for v in values)
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise ValueError("box holds NaN, infinity or a number beyond 1e9")
    side = padding(width, height)[0]
    if unit == "absolute":
        w, h = (side, side) if frame == "padded_square" else (width, height)
        x1, y1, x2, y2 = x1 / w, y1 / h, x2 / w, y2 / h
    if x2 < x1 or y2 < y1:
        raise ValueError("box is inverted")
    slack_x = slack_y = 1e-6
    if frame == "padded_square":
        x1, y1, x2, y2 = box_from_square((x1, y1, x2, y2), width, height)
        slack_x, slack_y = slack_x + step / 2 * side / width, slack_y + step / 2 * side / height
    if min(x1 + slack_x, y1 + slack_y) < 0 or x2 > 1 + slack_x or y2 > 1 + slack_y:
        raise ValueError("box lies outside the image")
    return min(max(x1, 0.0), 1.0), min(max(y1, 0.0), 1.0), min(max(x2, 0.0), 1.0), min(max(y2, 0.0), 1.0)


def make_record(
    record_id: str,
    image: bytes,
    global_caption: Any,
    regions: Any,
    *,
    unit: BoxUnit = "relative",
    frame: BboxFrame = "image",
    max_pixels: int,
) -> tuple[ImageRecord, list[tuple[str, str]]]:
    """Validates one image and its annotations (`regions`: mappings with `box` and `caption`; `global_caption` may be None).

    Returns the record and a list of `(dropped part, reason)`. `ValueError` with the reason if the image cannot be used, or if no
    caption of it is left.
    """
    height, width = decode(image, max_pixels).shape[:2]
    refused: list[tuple[str, str]] = []
    if not isinstance(regions, Sequence) or isinstance(regions, str):
        raise ValueError("regions is not a list")
    valid_regions = []
    for number, region in enumerate(regions):
        try:
            if not isinstance(region, Mapping):
                raise ValueError("region is not a mapping with box and caption")
            box = image_box(region.get("box"), width, height, unit, frame)
            valid_regions.append(Region(box, _caption(region.get("caption"))))
        except ValueError as error:
            refused.append((f"region {number}", str(error)))
    if global_caption is not None:
        try:
            global_caption = _caption(global_caption)
        except ValueError as error:
            refused.append(("global", f"global {error}"))
            global_caption = None
    if not valid_regions and global_caption is None:
        raise ValueError(f"nothing left to ask: {refused[0][1]}" if refused else "no region and no global caption")
    return ImageRecord(record_id, width, height, image, global_caption, tuple(valid_regions)), refused
