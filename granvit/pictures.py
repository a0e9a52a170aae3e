"""Drawing boxes on images."""
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from granvit.data.prompts import Box

# Colours of numbered boxes, in turn. White text is readable on each.
COLOURS = ("#d81b60", "#1e62d0", "#c75000", "#00796b", "#8e24aa", "#a0282c", "#4a7c10", "#00729f", "#6d4c41", "#3f3fb5")
OTHER = "#7a7a7a"  # of boxes without a number
WIDTH, HEIGHT, ENLARGED = 928, 1400, 5.0  # a numbered picture's largest sides in pixels, and its largest scale
Corners = tuple[int, int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_boxes(image_HW3: np.ndarray, boxes: dict[str, Box | None]) -> Image.Image:
    """A Pillow image of `image_HW3` (uint8) with outlines of `boxes`: colour -> xyxy box relative to the image size, or None."""
    picture = Image.fromarray(image_HW3)
    draw, line = ImageDraw.Draw(picture), max(2, min(picture.size) // 150)
    for colour, box in boxes.items():
        if box is not None:
            corners = np.array(box) * np.tile(picture.size, 2)
            draw.rectangle(corners.round().astype(int).tolist(), outline=colour, width=line)
    return picture


def outline(draw: ImageDraw.ImageDraw, corners: Corners, colour: str, line: int, rim: int) -> None:
    """Draws a rectangle along the outside of `corners` (xyxy pixels): `line` pixels of colour, `rim` white ones on both sides."""
    outer = line // 2 + rim
    x1, y1, x2, y2 = corners
    draw.rectangle((x1 - outer, y1 - outer, x2 + outer, y2 + outer), outline="white", width=line + 2 * rim)
    draw.rectangle((x1 - outer + rim, y1 - outer + rim, x2 + outer - rim, y2 + outer - rim), outline=colour, width=line)


@cache
def text_font(size: int) -> Font:
    """DejaVu Sans, from matplotlib or of the system, which has the letters of European languages; otherwise Pillow's own font."""
    matplotlib = importlib.util.find_spec("matplotlib")
    folders = [] if matplotlib is None else list(matplotlib.submodule_search_locations or [])
    for path in (*(Path(folder) / "mpl-data/fonts/ttf/DejaVuSans.ttf" for folder in folders), Path("DejaVuSans.ttf")):
        try:
            return ImageFont.truetype(str(path), size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def number_colour(number: int) -> str:
    """The colour of box `number`, counted from 1."""
    return COLOURS[(number - 1) % len(COLOURS)]


def draw_numbered_boxes(
    image_HW3: np.ndarray, boxes: Mapping[int, Box], others: Sequence[Box] = (), width: int = WIDTH, height: int = HEIGHT
) -> Image.Image:
    """The image (uint8), scaled to `width` or `height` (small ones at most `ENLARGED` times), with the outlines and numbers of
    `boxes`: number from 1 -> xyxy box relative to the image size, and thin outlines of `others`.

    Lines are outside their box, or as far as the picture goes. Large boxes are drawn first. A number stands beside its box, where
    it covers least of other numbers and of boxes.
    """
    image = Image.fromarray(image_HW3)
    scale = min(width / image.width, height / image.height, ENLARGED)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    picture = image.resize(size, Image.Resampling.LANCZOS)
    draw, many = ImageDraw.Draw(picture), len(boxes) > 20 or len(others) > 0
    corners_N4, others_M4 = (
        (np.array(some).reshape(-1, 4) * np.tile(size, 2)).round().astype(int) for some in (list(boxes.values()), others)
    )
    for x1, y1, x2, y2 in others_M4.tolist():
        outline(draw, (x1, y1, x2, y2), OTHER, 1, 0)
    sides = corners_N4[:, 2:] - corners_N4[:, :2]
    line, edge = (2, 2) if many else (3, 3)  # with its rim of 1 pixel, half of a line is `edge` pixels wide
    around_N4 = (corners_N4 + np.array([-edge, -edge, edge, edge])).clip(edge - 1, np.tile(size, 2) - edge)
    numbers = list(boxes)
    for index in np.argsort(-sides.prod(1), kind="stable").tolist():
        x1, y1, x2, y2 = around_N4[index].tolist()
        outline(draw, (x1, y1, x2, y2), number_colour(numbers[index]), line, 1)
    font = text_font(11 if many else 15)
    taken, all_boxes = np.zeros((0, 4), int), np.concatenate([corners_N4, others_M4])
    for number, corners in zip(numbers, corners_N4.tolist(), strict=True):
        left, top, right, bottom = map(int, font.getbbox(str(number), anchor="lt"))
        place = _free_place(corners, (right - left + 6, bottom - top + 6), 2 * edge, size, taken, all_boxes)
        taken = np.concatenate([taken, [place]])
        draw.rectangle(place, fill=number_colour(number), outline="white")
        draw.text((place[0] + 4, place[1] + 4), str(number), "white", font, anchor="lt")
    return picture


def _free_place(
    corners: Sequence[int], tag: tuple[int, int], gap: int, size: tuple[int, int], taken: np.ndarray, boxes: np.ndarray
) -> Corners:
    """Where a tag of `tag` pixels goes: the place about the box, `gap` pixels away and inside the picture, that overlaps least
    with the tags in `taken` and, a tenth as important, with the boxes."""
    x1, y1, x2, y2 = corners
    w, h = tag
    left, right, above, below = x1 - gap, x2 + gap - w, y1 - gap - h + 1, y2 + gap - 1
    places = [(left, above), (right, above), (left, below), (right, below), (left - w + 1, y1 - gap), (x2 + gap - 1, y1 - gap),
              (left - w + 1, y2 + gap - h), (x2 + gap - 1, y2 + gap - h), (x1, y1), (x2 - w, y1), (x1, y2 - h)]  # fmt: skip
    best, least = (0, 0, w, h), np.inf
    for left, top in places:
        left, top = min(max(left, 0), max(size[0] - w - 1, 0)), min(max(top, 0), max(size[1] - h - 1, 0))
        place = left, top, left + w, top + h
        covered = _overlap(place, taken) + 0.1 * _overlap(place, boxes)
        if covered < least:
            best, least = place, covered
    return best


def _overlap(place: Corners, rectangles_N4: np.ndarray) -> float:
    """Pixels of `place` that each of the rectangles covers, summed."""
    low, high = np.maximum(rectangles_N4[:, :2], place[:2]), np.minimum(rectangles_N4[:, 2:], place[2:])
    return float((high - low).clip(0).prod(1).sum())
