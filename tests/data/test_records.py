"""Validation: every kind of invalid region and image, by its reason."""
import json

import pytest

from granvit.data.records import image_box, make_record
from tests.conftest import encoded_image

IMAGE = encoded_image(100, 50)
GOOD = {"box": [0.1, 0.2, 0.5, 0.9], "caption": " a red cup "}


@pytest.mark.parametrize(
    "box, reason",
    [
        ([0.5, 0.2, 0.1, 0.9], "inverted"),
        ([0.1, 0.9, 0.5, 0.2], "inverted"),
        ([0.1, 0.2, 0.1, 0.9], "zero area"),
        ([0.1, 0.2, 0.5, 0.2], "zero area"),
        ([-0.1, 0.2, 0.5, 0.9], "outside"),
        ([0.1, 0.2, 1.1, 0.9], "outside"),
        ([10, 20, 50, 45], "outside"),  # pixels where 0..1 was stated
        (json.loads("[NaN, 0.2, 0.5, 0.9]"), "NaN"),
        (json.loads("[0.1, 0.2, Infinity, 0.9]"), "NaN"),
        ([0.1, 0.2, 10**400, 0.9], "NaN"),
        ([0.1, 0.2, 0.5], "four numbers"),
        (["0.1", "0.2", "0.5", "0.9"], "four numbers"),
        ([True, 0.2, 0.5, 0.9], "four numbers"),
        ("0123", "four numbers"),
        (None, "four numbers"),
    ],
)
def test_a_bad_box_is_dropped_by_its_reason_and_the_rest_stays(box, reason):
    record, refused = make_record("a", IMAGE, None, [{"box": box, "caption": "x"}, GOOD], max_pixels=10**6)
    assert [region.caption for region in record.regions] == ["a red cup"]
    assert [part for part, _ in refused] == ["region 0"] and reason in refused[0][1]


@pytest.mark.parametrize(
    "caption, reason", [("", "empty"), (" \n", "empty"), (None, "not text"), (3, "not text"), ("\ud800", "Unicode")]
)
def test_a_bad_caption_is_dropped_by_its_reason(caption, reason):
    record, refused = make_record("a", IMAGE, caption, [{**GOOD, "caption": caption}, GOOD], max_pixels=10**6)
    assert len(record.regions) == 1 and record.global_caption is None
    assert all(reason in why for _, why in refused)
    assert [part for part, _ in refused] == ["region 0"] + ["global"] * (caption is not None)


@pytest.mark.parametrize(
    "image, regions, reason",
    [
        (b"not one", [GOOD], "not an image"),
        (IMAGE[:300], [GOOD], "truncated"),
        (IMAGE, [], "no region and no global"),
        (IMAGE, [{**GOOD, "caption": ""}], "nothing left to ask: caption is empty"),
        (IMAGE, "abc", "not a list"),
        (IMAGE, ["abc"], "nothing left to ask: region is not a mapping"),
    ],
)
def test_a_bad_image_drops_the_record(image, regions, reason):
    with pytest.raises(ValueError, match=reason):
        make_record("a", image, None, regions, max_pixels=10**6)


def test_frames_and_units():
    """A 100 x 50 image: the padded square is 100 x 100 with 25 rows above."""
    expected = (0.1, 0.2, 0.5, 0.9)
    assert image_box([0.1, 0.2, 0.5, 0.9], 100, 50, "relative", "image") == expected
    assert image_box([10, 10, 50, 45], 100, 50, "absolute", "image") == pytest.approx(expected)
    assert image_box([0.1, 0.35, 0.5, 0.7], 100, 50, "relative", "padded_square") == pytest.approx(expected)
    assert image_box([10, 35, 50, 70], 100, 50, "absolute", "padded_square") == pytest.approx(expected)


def test_padded_boxes_may_cross_the_edge_by_their_rounding_only():
    """301 x 200: the image ends at 250 / 301 = 0.8306; its text may say 0.831."""
    assert image_box([0.0, 0.2, 0.5, 0.831], 301, 200, "relative", "padded_square")[3] == 1.0
    with pytest.raises(ValueError, match="outside"):
        image_box([0.0, 0.2, 0.5, 0.833], 301, 200, "relative", "padded_square")
