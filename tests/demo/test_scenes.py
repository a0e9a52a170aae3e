"""The demo's scenes: boxes must enclose the changed pixels, and the splits must not share photographs."""
import io

import numpy as np
import pytest
from PIL import Image

from granvit.demo import scenes
from granvit.demo.scenes import COLOURS, OBJECTS, PHOTOGRAPHS, SIDE, scene

SOME = [scene(split, 3, index) for split in PHOTOGRAPHS for index in range(12)]


def test_same_seed_same_bytes_and_another_seed_another_scene():
    assert scene("train", 3, 5) == scene("train", 3, 5)
    assert scene("train", 3, 5).image != scene("train", 4, 5).image
    assert scene("train", 3, 5).image != scene("heldout", 3, 5).image


def test_no_photograph_is_in_both_splits():
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["heldout"])


def test_records_state_the_size_of_their_image():
    for record in SOME:
        assert Image.open(io.BytesIO(record.image)).size == (record.width, record.height) == (SIDE, SIDE)


@pytest.mark.parametrize("record", SOME, ids=lambda r: r.id)
def test_captions_are_distinct_and_boxes_lie_inside_without_overlap(record):
    assert len({region.caption for region in record.regions}) == OBJECTS
    for i, a in enumerate(record.regions):
        x1, y1, x2, y2 = a.box
        assert 0 < x1 < x2 < 1 and 0 < y1 < y2 < 1
        assert a.caption in record.global_caption
        for b in record.regions[:i]:
            assert x2 < b.box[0] or b.box[2] < x1 or y2 < b.box[1] or b.box[3] < y1


def test_boxes_are_exact_to_a_pixel(monkeypatch):
    """On a plain background, the changed pixels of each object span its box."""
    flat = lambda rng, split: Image.new("RGB", (SIDE, SIDE), (128, 128, 128))  # noqa: E731
    monkeypatch.setattr(scenes, "_background", flat)
    monkeypatch.setitem(COLOURS, "white", (10, 10, 10))  # far from the background
    for index in range(8):
        record = scene("train", 11, index)
        pixels = np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB")).astype(int)
        changed = np.abs(pixels - 128).max(-1) > 30
        for region in record.regions:
            x1, y1, x2, y2 = np.array(region.box) * np.tile([record.width, record.height], 2)
            window = changed[int(y1) - 2 : int(np.ceil(y2)) + 2, int(x1) - 2 : int(np.ceil(x2)) + 2]
            rows, columns = np.flatnonzero(window.any(1)) + int(y1) - 2, np.flatnonzero(window.any(0)) + int(x1) - 2
            found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert np.abs(np.array(found) - (x1, y1, x2, y2)).max() <= 1.5, (region.caption, found, (x1, y1, x2, y2))
