import math

import pytest

from granvit.data.sources.masks import box_of_mask, mask_size


def _runs(rows):
    """Run lengths of a mask drawn with . and #, down the columns, beginning with the length of the first run of dots."""
    counts, last = [0], "."
    for column in zip(*rows, strict=True):
        for pixel in column:
            if pixel != last:
                counts.append(0)
                last = pixel
            counts[-1] += 1
    return {"size": [len(rows), len(rows[0])], "counts": counts}


@pytest.mark.parametrize("rows, box", [
    ((".....", "..##.", "..#..", "....."), (2, 1, 4, 3)),
    (("#....", ".....", "....."), (0, 0, 1, 1)),
    ((".....", ".....", "....#"), (4, 2, 5, 3)),
    (("###", "###"), (0, 0, 3, 2)),
    ((".#.", "#.#", ".#."), (0, 0, 3, 3)),
    (("..#", "...", "#..", ".#."), (0, 0, 3, 4)),
    ((".#", "#."), (0, 0, 2, 2)),  # one run, from the bottom of a column to the top of the next
    (("...", "...", ".#.", "..."), (1, 2, 2, 3)),
    (("..", "##", "##", ".."), (0, 1, 2, 3)),
    (("#.#", "...", "..."), (0, 0, 3, 1)),
])
def test_run_lengths(rows, box):
    mask = _runs(rows)
    assert sum(mask["counts"]) == len(rows) * len(rows[0])
    assert box_of_mask(mask) == box
    assert mask_size(mask) == (len(rows[0]), len(rows))


def test_compressed_run_lengths():
    # The text of 15, 1, 31, 4, 5, 4, 5, 4, 21: numbers from the fourth on are differences to the one before the last.
    # 15 -> "?"; 1 -> "1"; 31 = 31 + 32 * 0 -> "o" "0"; 4 - 1 = 3 -> "3"; 5 - 31 = -26 = 6 + 32 * 31 - 1024 -> "V" "O";
    # 4 - 4 = 0 -> "0"; 5 - 5 -> "0"; 4 - 4 -> "0"; 21 - 5 = 16 = 16 + 32 * 0 -> "`" "0".
    counts = [15, 1, 31, 4, 5, 4, 5, 4, 21]
    assert box_of_mask({"size": [9, 10], "counts": counts}) == (1, 2, 8, 7)
    assert box_of_mask({"size": [9, 10], "counts": "?1o03VO000`0"}) == (1, 2, 8, 7)


def test_runs_of_length_zero_are_no_pixels():
    assert box_of_mask({"size": [2, 2], "counts": [0, 0, 3, 1]}) == (1, 1, 2, 2)


def test_polygons():
    assert box_of_mask([[1, 2, 5, 2, 5, 9.5]]) == (1, 2, 5, 9.5)
    assert box_of_mask([[1, 2, 5, 2, 5, 9], [7, 0, 8, 0, 8, 1]]) == (1, 0, 8, 9)
    assert mask_size([[1, 2, 3, 4]]) is None
    box = box_of_mask([[1, math.nan, 5, 2], [0, 1, 2, 3]])
    assert math.isnan(box[1]) and box[0] == 0


@pytest.mark.parametrize("mask, reason", [
    (None, "neither"), ("abc", "neither"), ([], "neither"), ([[1]], "polygon"), ([5], "polygon"), ([[1, 2, 3, "4"]], "point"),
    ({"counts": [1]}, "size"), ({"size": [1], "counts": [1]}, "size"), ({"size": [0, 1], "counts": []}, "size"),
    ({"size": [10**9, 10**9], "counts": [10**18]}, "size"), ({"size": [2, 2]}, "run lengths"),
    ({"size": [2, 2], "counts": [1, 2]}, "fill"), ({"size": [2, 2], "counts": [6, -2]}, "fill"),
    ({"size": [2, 2], "counts": []}, "fill"),
    ({"size": [2, 2], "counts": [1.0, 3.0]}, "run lengths"), ({"size": [2, 2], "counts": [True, 3]}, "run lengths"),
    ({"size": [2, 2], "counts": [4]}, "empty"), ({"size": [2, 2], "counts": [4, 0]}, "empty"),
    ({"size": [2, 2], "counts": "\n"}, "compressed"), ({"size": [2, 2], "counts": "é"}, "compressed"),
    ({"size": [2, 2], "counts": "X"}, "compressed"), ({"size": [2, 2], "counts": "o" * 1000}, "compressed"),
])
def test_what_is_not_a_mask(mask, reason):
    with pytest.raises(ValueError, match=reason):
        box_of_mask(mask)
