"""The three questions of the paper, and boxes as text (paper section 3 and appendix figures)."""
import math
import re
from collections.abc import Callable

from granvit.stages import Task

Box = tuple[float, float, float, float]

GLOBAL = "Describe in detail what is shown in the image in one paragraph"
BBOX2CAPTION = "Describe the content contained within the normalized bounding box coordinates {box} in no more than 10 words."
CAPTION2BBOX = "Please provide the bounding box coordinate of the region this sentence describes: {caption}"

_NUMBER = r"\s*([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+|nan|inf))\s*"
_BRACKET = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]", re.IGNORECASE | re.ASCII)


def format_box(box: Box) -> str:
    """`[x1, y1, x2, y2]` rounded to three decimals and printed as Python floats (without trailing zeros: `0.19`).

    `box` is xyxy divided by the ORIGINAL image's width and height, 0..1.
    """
    return str([round(float(value), 3) + 0.0 for value in box])  # + 0.0 turns -0.0 into 0.0


def parse_box(text: str) -> Box | None:
    """The box in the first bracket of four numbers in `text`; None if there is no such bracket or it is not a box.

    A box has 0 <= x1 <= x2 <= 1 and the same for y, all finite. If the first bracket is not a box, later brackets are not tried
    (the answer scores 0).
    """
    found = _BRACKET.search(text)
    if not found:
        return None
    x1, y1, x2, y2 = (float(group) for group in found.groups())
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        return None
    return (x1, y1, x2, y2) if 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1 else None


def replace_boxes(text: str, convert: Callable[[Box, float], Box]) -> str:
    """`text` with every box in it replaced by `format_box(convert(box, step))`.

    A box is a bracket of four numbers in -0.1..1.1, at least one of them with a decimal point. Numbers slightly outside 0..1 are
    from boxes that cross the edge of the image; brackets with larger numbers (pixels, or no coordinates) stay unchanged. `step`
    is the value of one unit of the last decimal in the bracket, at most 0.01.
    """

    def replaced(found: re.Match) -> str:
        x1, y1, x2, y2 = map(float, found.groups())
        box = x1, y1, x2, y2
        decimals = max(len(group.partition(".")[2]) for group in found.groups())
        if not decimals or not all(-0.1 <= value <= 1.1 for value in box):
            return found.group()
        return format_box(convert(box, min(10.0**-decimals, 0.01)))

    return _BRACKET.sub(replaced, text)


def question_text(task: Task, box: Box | None = None, caption: str | None = None) -> str:
    """The question of `task`: bbox2caption asks about `box`, caption2bbox about `caption`."""
    if task == "global":
        return GLOBAL
    if task == "bbox2caption":
        assert box is not None
        return BBOX2CAPTION.format(box=format_box(box))
    return CAPTION2BBOX.format(caption=caption)


def answer_text(task: Task, box: Box | None, caption: str) -> str:
    """The answer to `question_text`: the box as text for caption2bbox, the caption otherwise."""
    if task == "caption2bbox":
        assert box is not None
        return format_box(box)
    return caption
