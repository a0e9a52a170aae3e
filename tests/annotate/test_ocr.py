"""PaddleOCR's models on a photographed page and on words rendered here."""
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest

from granvit.data.annotate import ocr
from granvit.data.annotate.annotator import FoundRegion, KnownImage, Result
from granvit.data.annotate.ocr import Ocr
from tests.annotate.images import noise, photograph, written

pytest.importorskip("rapidocr")
pytest.importorskip("onnxruntime")

# scikit-image's page.png, read by a person; its line 5 is too blurred for the models.
PAGE = [
    "Region-based segmentation",
    "Let us first determine markers of the coins and the",
    "background. These markers are pixels that we can label",
    "unambiguously as either object or background. Here,",
    "histogram of grey values:",
    "markers = np.zeros like(coins)",  # an underscore between zeros and like
]
LINES = {"Invoice number 48213": (20, 15), "Total amount due": (40, 95)}


@pytest.fixture(scope="module")
def reader():
    return Ocr()


@pytest.fixture(scope="module")
def page():
    return photograph("page.png")


@pytest.fixture(scope="module")
def read(reader, page):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", None)  # works offline
        return reader.annotate([page, written(LINES), noise(1, 9), KnownImage(np.full((40, 60, 3), 255, np.uint8))])


def test_a_photographed_page(read):
    assert [region.caption for region in read[0].regions] == PAGE
    assert all(region.score >= 0.95 for region in read[0].regions) and read[0].failure is None
    tops = [region.box[1] for region in read[0].regions]
    assert tops == sorted(tops)


def test_rendered_words_with_their_boxes(read):
    assert [region.caption for region in read[1].regions] == list(LINES)
    for region, (left, top) in zip(read[1].regions, LINES.values(), strict=True):
        x1, y1, x2, y2 = np.array(region.box) * (360, 150, 360, 150)
        assert abs(x1 - left) < 8 and left + 180 < x2 < left + 290 and abs(y1 - top) < 10 and abs(y2 - top - 28) < 10


def test_an_image_that_fails_does_not_fail_its_batch(read):
    assert read[2] == Result(failure="image is too narrow to be read")
    assert read[3] == Result()


def test_results_depend_neither_on_the_batch_nor_on_threads(read):
    assert Ocr(threads=2).annotate([written(LINES)]) == [read[1]]


def test_known_regions_are_kept(reader):
    known = FoundRegion((0.0, 0.0, 0.5, 1.0), "a logo")
    image = KnownImage(written(LINES).pixels_HW3[:60], (known,), "an invoice")
    (result,) = reader.annotate([image])
    assert result.regions[0] == known and result.global_caption == "an invoice"
    assert " ".join(region.caption for region in result.regions[1:]) == "Invoice number 48213"


def test_lines_below_the_score_are_dropped(page):
    (result,) = Ocr(score=0.999).annotate([page])
    assert {region.caption for region in result.regions} < set(PAGE) and all(r.score >= 0.999 for r in result.regions)


def test_an_exception_inside_the_package_fails_one_image(reader, monkeypatch):
    engine = reader._engine

    def breaks(pixels_HW3):
        if pixels_HW3.shape[0] == 50:
            raise RuntimeError("bad image 7")
        return engine(pixels_HW3)

    monkeypatch.setitem(reader.__dict__, "_engine", breaks)
    first, second = reader.annotate([noise(50, 60), KnownImage(np.full((40, 60, 3), 255, np.uint8))])
    assert first.failure == "text recognition failed (RuntimeError)" and second.failure is None


def test_version_knows_settings_and_model_files(tmp_path, monkeypatch):
    assert Ocr().version == Ocr(threads=4).version != Ocr(score=0.5).version
    assert pickle.loads(pickle.dumps(Ocr())).version == Ocr().version
    before = Ocr().version
    for name in ocr.MODELS.values():
        (tmp_path / name).write_bytes(b"other weights")
    monkeypatch.setattr(Ocr, "_files", {part: tmp_path / name for part, name in ocr.MODELS.items()})
    assert Ocr().version != before
    with pytest.raises(ValueError, match=str(tmp_path)):
        Ocr().annotate([noise(40, 40)])


def test_a_wheel_without_its_models_is_named(monkeypatch):
    monkeypatch.setattr(ocr, "MODELS", {"Det": "missing.onnx"})
    with pytest.raises(ValueError, match=r"missing\.onnx"):
        _ = Ocr().version


def test_no_model_is_looked_for_outside_the_wheel(reader):
    folder = Path(reader._files["Det"]).parent
    assert folder.parent.name == "rapidocr" and {path.parent for path in reader._files.values()} == {folder}
