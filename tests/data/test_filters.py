"""The filters of Gran-29M: which side of each bound is kept, and that nothing disappears uncounted."""
from collections import Counter

import numpy as np
import pytest

from granvit.config import validate
from granvit.data.filters import Filters, apply_filters
from granvit.data.records import ImageRecord, Region

ANY = {"shorter_side": {}, "image_aspect": {}, "box_aspect": {}, "box_area": {}, "boxes": {}}


def filters(**keys) -> Filters:
    return validate(Filters, keys, "filters of a test")


def image(width: int, height: int, *boxes: tuple, captions: list[str] | None = None) -> ImageRecord:
    """A record whose boxes are given in pixels."""
    regions = [
        Region((x1 / width, y1 / height, x2 / width, y2 / height), f"region {number}" if captions is None else captions[number])
        for number, (x1, y1, x2, y2) in enumerate(boxes)
    ]
    return ImageRecord("a", width, height, b"", None, tuple(regions))


BOX = (10, 20, 210, 160)


@pytest.mark.parametrize("width, height, reason", [
    (449, 449, None), (448, 600, "image: shorter side"), (600, 448, "image: shorter side"),
    (1350, 450, None), (450, 1350, None),  # 3 and 1/3 exactly
    (1351, 450, "image: aspect ratio"), (450, 1351, "image: aspect ratio"),
])  # fmt: skip
def test_images_by_the_papers_bounds(width, height, reason):
    found = apply_filters(image(width, height, BOX), Filters())
    assert found.image_reason == reason and (found.record is None) == (reason is not None)
    assert found.region_reasons == ({} if reason is None else {reason: 1})


@pytest.mark.parametrize("box, reason", [
    ((0, 0, 100, 100), "region: area of the box"),  # 100^2 exactly: not above
    ((37, 41, 137, 142), None),
    ((0, 0, 300, 100), None), ((0, 0, 100, 300), None), ((0, 0, 301, 100), "region: aspect ratio of the box"),
    ((0, 0, 100, 301), "region: aspect ratio of the box"), ((0, 0, 20, 20), "region: area of the box"),
])  # fmt: skip
@pytest.mark.parametrize("size", [(500, 500), (617, 911), (1999, 1201)])
def test_boxes_by_the_papers_bounds(size, box, reason):
    """In whole pixels, whatever the size that stored boxes are relative to."""
    found = apply_filters(image(*size, box, BOX), Filters())
    assert found.region_reasons == ({} if reason is None else {reason: 1})
    assert found.record is not None and len(found.record.regions) == (2 if reason is None else 1)


def test_an_image_without_boxes_left_is_left_out():
    found = apply_filters(image(500, 500, (0, 0, 50, 50), (0, 0, 60, 60)), Filters())
    assert found.record is None and found.image_reason == "image: number of boxes"
    assert found.region_reasons == {"region: area of the box": 2}
    few = apply_filters(image(500, 500, BOX, BOX), filters(boxes={"at_least": 3}))
    assert few.record is None and few.region_reasons == {"image: number of boxes": 2}


def test_a_source_can_set_its_own_bounds():
    tiny = image(40, 4000, (0, 0, 2, 1))
    assert apply_filters(tiny, Filters()).record is None
    assert apply_filters(tiny, filters(**ANY)).record == tiny
    exact = filters(box_aspect={"above": "1/3", "below": 3})
    kept = apply_filters(image(500, 500, (0, 0, 300, 100), (0, 0, 100, 300), (0, 0, 299, 100)), exact).record
    assert kept is not None and [region.caption for region in kept.regions] == ["region 2"]


def test_captions():
    many = image(500, 500, BOX, BOX, BOX, BOX, captions=["Red  cup", "red cup", "a blue cup on a table", "a dog"])
    found = apply_filters(many, filters(caption_words={"at_most": 5}, repeated_captions="drop"))
    assert [region.caption for region in found.record.regions] == ["a dog"]
    assert found.region_reasons == {"region: repeated caption": 2, "region: words of the caption": 1}


def test_nothing_disappears_uncounted():
    """Regions read are regions kept and regions counted, for random records under random bounds."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height = rng.integers(300, 1500, 2).tolist()
        boxes = [(x, y, x + w, y + h) for x, y, w, h in rng.integers(1, 150, (int(rng.integers(0, 6)), 4)).tolist()]
        captions = [str(rng.choice(["cat", "dog", "a very long caption of a cat"])) for _ in boxes]
        own = filters(boxes={"at_least": int(rng.integers(0, 3))}, caption_words={"at_most": 4},
                      repeated_captions=str(rng.choice(["keep", "drop"])), box_area={"above": 2000})  # fmt: skip
        found = apply_filters(image(width, height, *boxes, captions=captions), own)
        kept = 0 if found.record is None else len(found.record.regions)
        assert kept + Counter(found.region_reasons).total() == len(boxes)
        assert (found.record is None) == (found.image_reason is not None)


@pytest.mark.parametrize("keys", [{"shorter_side": {"over": 3}}, {"box_area": {"above": "many"}}, {"boxes": {"above": True}}])
def test_a_mistake_is_named(keys):
    with pytest.raises(ValueError, match=next(iter(keys))):
        filters(**keys)
