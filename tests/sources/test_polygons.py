import math

import pytest

from granvit.data.sources.polygons import box_of_points, box_of_xywh, box_of_xyxy, whole_size


def test_four_numbers():
    assert box_of_xyxy([1, 2.5, 3, 4]) == (1.0, 2.5, 3.0, 4.0)
    assert box_of_xyxy((9, 9, 1, 1)) == (9.0, 9.0, 1.0, 1.0)  # inverted: judged later
    assert box_of_xywh([10, 20, 5, 0.5]) == (10.0, 20.0, 15.0, 20.5)
    assert box_of_xywh([10, 20, -5, 1]) == (10.0, 20.0, 5.0, 21.0)
    assert math.isnan(box_of_xyxy([0, math.nan, 1, 1])[1])
    assert box_of_xyxy([0, 0, 10**400, -(10**400)]) == (0.0, 0.0, math.inf, -math.inf)


@pytest.mark.parametrize("values", [None, "abcd", b"abcd", [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, "4"], [1, 2, 3, True], {}, 5])
def test_not_four_numbers(values):
    for convert in (box_of_xyxy, box_of_xywh):
        with pytest.raises(ValueError, match="box is not four numbers"):
            convert(values)


def test_points():
    assert box_of_points([[4, 1], [9, 2], [8, 7], [3, 6]]) == (3.0, 1.0, 9.0, 7.0)
    assert box_of_points([4, 1, 9, 2, 8, 7, 3, 6]) == (3.0, 1.0, 9.0, 7.0)
    assert box_of_points(((1.5, 2), (0, 5))) == (0.0, 2.0, 1.5, 5.0)
    box = box_of_points([[0, 1], [math.nan, 2], [5, 3]])
    assert math.isnan(box[0]) and math.isnan(box[2]) and (box[1], box[3]) == (1.0, 3.0)


@pytest.mark.parametrize("points", [None, [], [1, 2], [1, 2, 3], "12345678", [[1, 2]], [[1, 2, 3], [4, 5, 6]], [[1, "2"], [3, 4]],
                                    [1, 2, 3, None], [[1, 2], 3, 4], 7])
def test_not_points(points):
    with pytest.raises(ValueError, match="point"):
        box_of_points(points)


def test_sizes():
    assert whole_size(640, 480.0) == (640, 480)
    for width, height in [(0, 5), (5, -1), (5.5, 5), ("5", 5), (None, 5), (True, 5), (math.nan, 5), (math.inf, 5)]:
        assert whole_size(width, height) is None
