"""Captions are asked for what the filters leave alone, and what is written and counted is the same as with the filters at the
end."""
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from granvit.data.annotate.annotator import Chain, FoundRegion, KnownImage, Result, failed
from granvit.data.filters import Filters
from granvit.data.gran.annotating import annotate_images
from granvit.data.gran.config import BuildConfig
from granvit.data.gran.make_unit import COUNTS, make_unit, read_counts
from granvit.data.gran.units import all_units, parts_to_read, read_part
from tests.gran.small_tree import picture

SMALL, LARGE, LARGE_TOO, FLAT = (0.0, 0.0, 0.09, 0.09), (0.1, 0.1, 0.6, 0.7), (0.5, 0.5, 1.0, 1.0), (0.0, 0.5, 1.0, 0.6)
BOXES = [[LARGE, SMALL, LARGE_TOO], [SMALL, FLAT], [], [LARGE], [FLAT, LARGE_TOO, LARGE]]  # per image


@dataclass
class Finds:
    """Finds the region `LARGE_TOO` in images that have none; cannot do anything with an image whose first region is `FLAT`."""

    version: str = "finds"
    finds_regions: bool = True

    def annotate(self, batch):
        return [self._result(image) for image in batch]

    def _result(self, image):
        if image.regions and image.regions[0].box == FLAT:
            return failed(image, "it is flat")
        return Result(image.regions or (FoundRegion(LARGE_TOO), FoundRegion(SMALL)), image.global_caption)


@dataclass
class Captions:
    """Captions everything: the number of words of a region's caption follows from its box. Notes what it was asked for."""

    finds_regions: bool  # True: filters come after it
    version: str = "captions"
    asked: list = field(default_factory=list)

    def annotate(self, batch):
        self.asked += [[region.box for region in image.regions] for image in batch]
        return [self._result(image) for image in batch]

    def _result(self, image):
        regions = tuple(replace(region, caption="word " * (5 if region.box == LARGE else 2)) for region in image.regions)
        return Result(regions, f"an image with {image.pixels_HW3.shape[1]} columns")


def _made(root: Path, name: str, filters: dict, *annotators) -> tuple[dict, dict[str, bytes]]:
    """The counts and the other files of a unit that is made of `BOXES`."""
    images = root / "images"
    if not images.exists():
        images.mkdir()
        lines = []
        for number, boxes in enumerate(BOXES):
            (images / f"{number}.png").write_bytes(picture(number, 100, 100))
            regions = [{"box": box, "caption": f"from the source {place}"} for place, box in enumerate(boxes)]
            lines.append(json.dumps({"image": f"{number}.png", "regions": regions}))
        (root / "a.jsonl").write_text("\n".join(lines) + "\n")
    read = {"format": "jsonl", "annotations": str(root / "a.jsonl"), "boxes": "relative"}
    bounds = {"shorter_side": {"above": 20}, "box_area": {"above": 200}} | filters
    source = {"store": "s", "images": str(images), "read": read, "filters": bounds, "keep_region_captions": False}
    config = BuildConfig.model_validate({"out": str(root), "sources": {"a": source}})
    for part in parts_to_read(config, root):
        read_part(config, part)
    (unit,) = all_units(config, root, {"a": name})
    make_unit(config, unit, Chain(annotators))
    return vars(read_counts(unit.folder)), {
        path.name: path.read_bytes() for path in unit.folder.iterdir() if path.name != COUNTS
    }


TOO, WORDS = LARGE_TOO, {"caption_words": {"at_most": 4}, "boxes": {"at_least": 1, "at_most": 1}}


@pytest.mark.parametrize("finds, filters, asked", [
    (False, {}, [[LARGE, TOO], [LARGE], [TOO, LARGE]]),
    (True, {}, [[LARGE, TOO], [TOO], [LARGE]]),
    (False, {"boxes": {"above": 1}}, [[LARGE, TOO], [TOO, LARGE]]),
    (True, {"boxes": {"above": 1}}, [[LARGE, TOO]]),
    (False, {"boxes": {}}, [[LARGE, TOO], [], [], [LARGE], [TOO, LARGE]]),
    (True, {"boxes": {}}, [[LARGE, TOO], [], [TOO], [LARGE]]),
    (False, WORDS, [[LARGE, TOO], [LARGE], [TOO, LARGE]]),  # of two boxes one is left, by its caption
])  # fmt: skip
def test_what_filters_leave_out_gets_no_caption_and_counts_as_before(tmp_path, finds, filters, asked):
    finders = (Finds(),) if finds else ()
    before, after = Captions(False), Captions(True)
    found = _made(tmp_path, "before", filters, *finders, before)
    assert before.asked == asked
    assert found == _made(tmp_path, "after", filters, *finders, after)
    assert sum(map(len, after.asked)) > sum(map(len, asked))
    assert found[0]["images_written"] and found[0]["images_dropped"].total() == 5 - found[0]["images_written"]


def test_known_regions_and_refusals_are_those_of_the_regions_that_are_left():
    @dataclass
    class Refuses:
        version: str = "refuses"
        finds_regions: bool = True

        def annotate(self, batch):
            refused = (("region 0", "of the small one"), ("region 1", "of the large one"), ("global", "of the image"))
            return [Result((*image.regions, FoundRegion(TOO)), None, refused) for image in batch]

    known = KnownImage(np.zeros((1000, 1000, 3), np.uint8), (FoundRegion(SMALL), FoundRegion(LARGE)))
    (found,) = annotate_images(Chain((Refuses(), Captions(False))), [known], Filters())
    assert found.known.regions == (FoundRegion(LARGE),)
    assert [region.box for region in found.result.regions] == [LARGE, TOO] and found.result.global_caption
    assert found.result.refused == (("region 0", "of the large one"), ("global", "of the image"))
    assert found.dropped == Counter(["region: area of the box"]) and found.reason is None
    (kept,) = annotate_images(Chain((Refuses(),)), [known], Filters())  # without captions, filters come at the end
    assert kept.known is known and len(kept.result.regions) == 3 and not kept.dropped
