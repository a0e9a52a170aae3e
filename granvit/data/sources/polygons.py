"""Boxes as sources write them (four numbers, width and height, corners of a quad or polygon), as xyxy; sizes of images."""
import math
from collections.abc import Sequence
from typing import Any


def box_of_xyxy(values: Any) -> tuple[float, float, float, float]:
    """Four numbers x1, y1, x2, y2 as floats, otherwise as they are. `ValueError` with the reason if they are not four numbers."""
    x1, y1, x2, y2 = _four(values)
    return x1, y1, x2, y2


def box_of_xywh(values: Any) -> tuple[float, float, float, float]:
    """xyxy of x, y, width, height, as in COCO. `ValueError` with the reason if `values` is not four numbers."""
    x, y, width, height = _four(values)
    return x, y, x + width, y + height


def box_of_points(points: Any) -> tuple[float, float, float, float]:
    """The upright box (xyxy) around points: `[[x, y], ...]` or `[x, y, x, y, ...]`. NaN if a coordinate is NaN.

    `ValueError` with the reason if `points` is not a list of at least two points.
    """
    if not _is_list(points):
        raise ValueError("polygon is not a list of points")
    if points and all(_is_list(point) for point in points):
        if any(len(point) != 2 for point in points):
            raise ValueError("a point is not two numbers")
        points = [value for point in points for value in point]
    if len(points) % 2 or len(points) < 4:
        raise ValueError("polygon is not a list of points")
    xs, ys = ([_number(value, "a point is not two numbers") for value in points[axis::2]] for axis in (0, 1))
    return _least(xs), _least(ys), _greatest(xs), _greatest(ys)


def whole_size(width: Any, height: Any) -> tuple[int, int] | None:
    """Width and height of an image if both are positive whole numbers, None otherwise."""
    if any(isinstance(side, bool) or not isinstance(side, int | float) for side in (width, height)):
        return None
    if not (0 < width < math.inf and 0 < height < math.inf and width == int(width) and height == int(height)):
        return None
    return int(width), int(height)


def _least(values: list[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else min(values)


def _greatest(values: list[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _is_list(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str | bytes)


def _four(values: Any) -> list[float]:
    if not _is_list(values) or len(values) != 4:
        raise ValueError("box is not four numbers")
    return [_number(value, "box is not four numbers") for value in values]


def _number(value: Any, reason: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(reason)
    try:
        return float(value)
    except OverflowError:  # a whole number beyond the floats
        return math.inf if value > 0 else -math.inf
