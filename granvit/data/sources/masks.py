"""Masks as COCO writes them (https://github.com/cocodataset/cocoapi): run lengths, compressed or not, and polygons; as boxes."""
from collections.abc import Mapping
from typing import Any

import numpy as np

from granvit.data.sources.polygons import box_of_points, whole_size


def box_of_mask(mask: Any) -> tuple[float, float, float, float]:
    """The box (xyxy, edges of pixels) around a mask: `{"size": [height, width], "counts": ...}`, or a list of polygons
    `[x, y, x, y, ...]`.

    `counts` are lengths of runs over the columns of the mask, from top to bottom, of 0 and 1 in turn, beginning with 0: a list,
    or COCO's compressed text. `ValueError` with the reason if the mask is empty or not one of these.
    """
    if isinstance(mask, Mapping):
        return _box_of_runs(mask)
    if not isinstance(mask, list) or not mask:
        raise ValueError("mask is neither run lengths nor polygons")
    boxes = np.array([box_of_points(polygon) for polygon in mask])
    x1, y1 = boxes[:, :2].min(0)
    x2, y2 = boxes[:, 2:].max(0)
    return float(x1), float(y1), float(x2), float(y2)


def mask_size(mask: Any) -> tuple[int, int] | None:
    """Width and height of a mask of run lengths; None for polygons, which do not state it."""
    size = mask.get("size") if isinstance(mask, Mapping) else None
    return whole_size(size[1], size[0]) if isinstance(size, list) and len(size) == 2 else None


def _box_of_runs(mask: Mapping[str, Any]) -> tuple[float, float, float, float]:
    size, counts = mask_size(mask), mask.get("counts")
    if size is None or size[0] * size[1] > 1 << 40:
        raise ValueError("mask has no valid size")
    if isinstance(counts, str):
        counts = _decompress(counts)
    if not isinstance(counts, list) or any(type(count) is not int for count in counts):
        raise ValueError("mask's run lengths are neither whole numbers nor compressed text")
    width, height = size
    if min(counts, default=0) < 0 or sum(counts) != width * height:
        raise ValueError("mask's run lengths do not fill its size")
    ends = np.cumsum(np.array(counts, np.int64))[1::2]
    starts = ends - counts[1::2]
    starts, last = starts[ends > starts], ends[ends > starts] - 1
    if not len(starts):
        raise ValueError("mask is empty")
    over_edge = starts // height != last // height  # a run that goes on in the next column touches bottom and top
    y1 = 0 if over_edge.any() else (starts % height).min()
    y2 = height - 1 if over_edge.any() else (last % height).max()
    return float(starts[0] // height), float(y1), float(last[-1] // height + 1), float(y2 + 1)


def _decompress(text: str) -> list[int]:
    """Numbers of COCO's text. A character, less 48, has six bits: five of the number, the lowest first, and one that says whether
    more follow. The last five are signed. From the fourth on, a number is the difference to the one before the last."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 50:
            raise ValueError("mask's run lengths are not valid compressed text")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("mask's run lengths are not valid compressed text")
    return counts
