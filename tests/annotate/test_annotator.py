"""The interface of annotators: chains, versions, boxes, and packages that are not installed."""
import math
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

from granvit.data.annotate.annotator import (
    Chain,
    FoundRegion,
    KnownImage,
    Result,
    failed,
    fingerprint,
    needed,
    relative_box,
)
from tests.annotate.images import noise


@dataclass
class Finds:
    """Finds a region in each image that is at least `least` pixels high, and fails at the others."""

    least: int
    version: str = "finds"

    def annotate(self, batch):
        found = (FoundRegion((0.0, 0.0, 1.0, 1.0), score=0.5),)
        return [
            Result((*image.regions, *found), image.global_caption, (("region 9", "as tests do"),))
            if image.pixels_HW3.shape[0] >= self.least
            else failed(image, "too low")
            for image in batch
        ]


@dataclass
class Names:
    """Captions what is there."""

    version: str = "names"

    def annotate(self, batch):
        self.seen = [image.pixels_HW3.shape[0] for image in batch]
        return [
            Result(tuple(replace(r, caption=f"{n}") for n, r in enumerate(image.regions)), f"{len(image.regions)} regions")
            for image in batch
        ]


def test_a_chain_hands_on_what_is_known():
    known = FoundRegion((0.1, 0.1, 0.2, 0.2), "a cup")
    batch = [KnownImage(noise(40, 40).pixels_HW3, (known,), "a table"), noise(10, 40), noise(60, 40)]
    names = Names()
    first, second, third = Chain((Finds(30), names)).annotate(batch)
    assert names.seen == [40, 60]
    assert [region.caption for region in first.regions] == ["0", "1"] and first.global_caption == "2 regions"
    assert first.refused == (("region 9", "as tests do"),) == third.refused
    assert second == Result(failure="too low")
    assert third == Result((FoundRegion((0.0, 0.0, 1.0, 1.0), "0", 0.5),), "1 regions", third.refused)


def test_what_failed_in_a_chain_keeps_what_was_known():
    image = noise(40, 40)
    (result,) = Chain((Finds(30), Finds(50))).annotate([image])
    assert result == Result((FoundRegion((0.0, 0.0, 1.0, 1.0), score=0.5),), None, (("region 9", "as tests do"),), "too low")


def test_the_version_of_a_chain():
    a, b = Finds(1, "a"), Finds(1, "b")
    assert len({Chain(parts).version for parts in ((a,), (b,), (a, b), (b, a))}) == 4
    assert Chain((a, b)).version == Chain((a, b)).version


def test_fingerprints_know_names_and_contents_of_files(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("x")
    two.write_text("x")
    found = [fingerprint({}), fingerprint({"a": 1}), fingerprint({}, ["numpy"])]
    found += [fingerprint({}, (), [one]), fingerprint({}, (), [two])]
    one.write_text("y")
    assert len({*found, fingerprint({}, (), [one])}) == 6 and found[0] == fingerprint({})


def test_boxes_are_clipped_and_divided():
    assert relative_box(10, 20, 30, 40, 100, 200) == (0.1, 0.1, 0.3, 0.2)
    assert relative_box(-5, -5, 500, 500, 100, 200) == (0.0, 0.0, 1.0, 1.0)
    for numbers in ((5, 5, 5, 9), (9, 5, 5, 9), (120, 0, 130, 9), (math.nan, 0, 9, 9), (0, 0, 9, math.nan)):
        assert relative_box(*numbers, 100, 200) is None


def test_packages_that_are_missing_are_named_with_what_to_install():
    with pytest.raises(ValueError, match=r"nosuchpackage.*pip install -e '\.\[annotate"):
        needed("json", "nosuchpackage")


def test_heavy_packages_are_imported_where_they_are_needed():
    modules = ", ".join(f"granvit.data.annotate.{name}" for name in ("annotator", "caption", "detect", "endpoint", "ocr"))
    heavy = {"torch", "transformers", "onnxruntime", "rapidocr", "cv2", "urllib3"}
    code = f"import sys, {modules}; sys.exit(str({heavy!r} & set(sys.modules)) if {heavy!r} & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
