"""Results of PaddleOCR 3."""
import json

import pytest

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.paddleocr import PaddleOcr
from tests.sources.reading import everything


def _quad(x1, y1, x2, y2, tilt=0):
    return [[x1, y1], [x2, y1 + tilt], [x2, y2 + tilt], [x1, y2]]


def _result(image, *found, **other):
    """A result with `found`: texts with scores and polygons; and one more detection, which was not recognized."""
    return {
        "input_path": image,
        "page_index": None,
        "model_settings": {"use_doc_preprocessor": False, "use_textline_orientation": False},
        "dt_polys": [polygon for *_, polygon in found] + [_quad(900, 900, 910, 910)],
        "text_det_params": {"limit_side_len": 64, "limit_type": "min", "thresh": 0.3, "box_thresh": 0.6, "unclip_ratio": 1.5},
        "text_type": "general",
        "textline_orientation_angles": [-1] * (len(found) + 1),
        "text_rec_score_thresh": 0.0,
        "rec_texts": [text for text, *_ in found],
        "rec_scores": [score for _, score, _ in found],
        "rec_polys": [polygon for *_, polygon in found],
        "rec_boxes": [[polygon[0][0], polygon[0][1], polygon[2][0], polygon[2][1]] for *_, polygon in found],
    } | other


def _write(folder, *trees):
    for number, tree in enumerate(trees):
        (folder / f"{number}_res.json").write_text(json.dumps(tree, ensure_ascii=False, indent=4))


def test_results(tmp_path):
    _write(
        tmp_path,
        _result("./0.png", ("登机牌", 0.9919, _quad(152, 22, 362, 75)), ("BOARDING", 0.98, _quad(400, 20, 700, 60))),
        _result("1.png"),
        _result("2.png", ("tilted", 0.9, _quad(10, 10, 50, 20, tilt=6))),
        _result("3.png", ("polygon", 0.9, [[5, 9], [8, 3], [12, 4], [15, 9], [12, 14], [8, 14]]), text_type="seal", rec_boxes=[]),
        {"res": _result("4.png", ("wrapped", 0.9, _quad(1, 2, 3, 4)))},
        _result("5.png", ("", 0.5, _quad(1, 2, 3, 4)), ("<|im_end|>", 0.5, _quad(1, 2, 3, 4))),
        _result("a/6.png", ("x", 1, _quad(-1, -2, 3, 4))),
        _result("/data/images/7.png", ("x", 1.0, _quad(1.5, 2.5, 3, 4))),
        _result("8.png", ("x", 1.0, _quad(1, 2, 3, 4)), doc_preprocessor_res=None),
        _result("9.png", ("x", 1.0, _quad(1, 2, 3, 4)), doc_preprocessor_res={
            "input_path": None, "angle": 0, "model_settings": {"use_doc_orientation_classify": True, "use_doc_unwarping": False},
        }),
    )  # fmt: skip
    expected = [
        ("./0.png", [((152, 22, 362, 75), "登机牌"), ((400, 20, 700, 60), "BOARDING")]), ("1.png", []),
        ("2.png", [((10, 10, 50, 26), "tilted")]), ("3.png", [((5, 3, 15, 14), "polygon")]),
        ("4.png", [((1, 2, 3, 4), "wrapped")]),
        ("5.png", [((1, 2, 3, 4), ""), ((1, 2, 3, 4), "<|im_end|>")]), ("a/6.png", [((-1, -2, 3, 4), "x")]),
        ("7.png", [((1.5, 2.5, 3, 4), "x")]), ("8.png", [((1, 2, 3, 4), "x")]), ("9.png", [((1, 2, 3, 4), "x")]),
    ]  # fmt: skip
    assert everything(PaddleOcr(tmp_path, inputs="/data/images")) == [
        Annotated(f"{n}_res.json", image, tuple(RawRegion(*region) for region in regions))
        for n, (image, regions) in enumerate(expected)
    ]
    assert everything(PaddleOcr(tmp_path))[7].image == "/data/images/7.png"


def test_texts_below_the_score_and_bad_texts_are_refused(tmp_path):
    quad = _quad(1, 2, 3, 4)
    scored = [("a", 0.5), ("b", 0.49), ("c", "0.9"), ("d", float("nan")), (5, 0.9), ("e", True)]
    _write(
        tmp_path,
        _result("a.png", *((text, score, quad) for text, score in scored)),
        _result("b.png", ("a", 1, quad)) | {"rec_polys": [5]},
    )
    first, second = everything(PaddleOcr(tmp_path, min_score=0.5))
    assert first.regions == (RawRegion((1, 2, 3, 4), "a"),)
    assert first.refused == (
        ("text 1", "score is below the threshold"), ("text 2", "score is not a number"),
        ("text 3", "score is below the threshold"), ("text 4", "caption is not text"), ("text 5", "score is not a number"),
    )  # fmt: skip
    assert second.regions == () and second.refused == (("text 0", "polygon is not a list of points"),)


def test_results_that_are_not_of_an_image_as_it_is_are_refused(tmp_path):
    found = ("a", 1.0, _quad(1, 2, 3, 4))
    unwarped = {"angle": -1, "model_settings": {"use_doc_unwarping": True}}
    turned = {"angle": 180, "model_settings": {"use_doc_unwarping": False}}
    _write(
        tmp_path,
        _result("0.png", found),
        _result(None, found),
        _result("2.pdf", found, page_index=0),
        _result("3.png", found, doc_preprocessor_res=unwarped),
        _result("4.png", found, doc_preprocessor_res=turned),
        _result("5.png", found, rec_scores=[1.0, 1.0]),
        _result("6.png", found, rec_polys=None),
        {"dt_polys": [], "dt_scores": []},
    )
    (tmp_path / "8_res.json").write_text(json.dumps(_result("8.png", found))[:-9])
    assert everything(PaddleOcr(tmp_path))[1:] == [
        Refused("1_res.json", "result names no image"), Refused("2_res.json", "result is of a page of a document"),
        Refused("3_res.json", "image was turned or unwarped before it was read"),
        Refused("4_res.json", "image was turned or unwarped before it was read"),
        Refused("5_res.json", "texts, scores and polygons differ in number"),
        Refused("6_res.json", "texts, scores or polygons are not a list"), Refused("7_res.json", "file is of another format"),
        Refused("8_res.json", "file ends in the middle"),
    ]  # fmt: skip
    _write(tmp_path, {"dt_polys": [], "dt_scores": []})
    with pytest.raises(ValueError, match=r"0_res\.json.*rec_texts"):
        everything(PaddleOcr(tmp_path))
