"""The JSON lines of granvit-store."""
import json

import pytest

from granvit.data.build_store import build_store
from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.jsonl import JsonLines
from granvit.data.store import Store
from tests.conftest import encoded_image
from tests.sources.reading import everything


def _region(box, caption="a cup"):
    return {"box": box, "caption": caption}


LINES = [
    ({"image": "a.png", "id": "a", "global": "A desk.",
      "regions": [_region([0.1, 0.2, 0.5, 0.9]), _region([0, 0, 1, 1], "«thé»")]},
     ("a", "a.png", [((0.1, 0.2, 0.5, 0.9), "a cup"), ((0, 0, 1, 1), "«thé»")], "A desk.")),
    ({"image": "sub/b.png", "global": "A desk.", "source": "ignored"}, ("sub/b.png", "sub/b.png", [], "A desk.")),
    ({"image": "a.png", "id": 7, "regions": [_region([0, 0, 1, 1])]}, ("7", "a.png", [((0, 0, 1, 1), "a cup")], None)),
    ({"image": "a.png", "id": None, "regions": []}, ("a.png", "a.png", [], None)),
    ({"image": "a.png", "id": "d", "regions": None}, ("d", "a.png", [], None)),
    ({"image": "../a.png", "id": "e"}, ("e", "../a.png", [], None)),
    ({"image": "a.png", "id": "f", "regions": [_region([0.5, 0.2, 0.1, 7])]},
     ("f", "a.png", [((0.5, 0.2, 0.1, 7), "a cup")], None)),
    ({"image": "a.png", "id": "g", "regions": [_region([0, 0, 1, 1], None)]}, ("g", "a.png", [((0, 0, 1, 1), "")], None)),
    ({"image": "a.png", "id": "h", "regions": [_region([0, 0, 1, 1], "<|im_end|>")]},
     ("h", "a.png", [((0, 0, 1, 1), "<|im_end|>")], None)),
    ({"image": "a.png", "id": "\ud800"}, ("?", "a.png", [], None)),
]  # fmt: skip


@pytest.mark.parametrize("unit, frame", [("relative", "image"), ("absolute", "padded_square")])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_lines(tmp_path, unit, frame, start):
    path = tmp_path / "a.jsonl"
    path.write_text(start + "\n\n".join(json.dumps(tree) for tree, _ in LINES) + "\n")
    reader = JsonLines(path, unit, frame)
    assert reader.parts() == ["a.jsonl"]
    assert everything(reader) == [
        Annotated(name, image, tuple(RawRegion(*region) for region in regions), caption, unit, frame)
        for _, (name, image, regions, caption) in LINES
    ]


BAD = [
    {"image": "a.png", "id": "x", "global": 5,
     "regions": [_region([0.1, 0.2, 0.5, 0.9]), "x", _region([1, 2, 3]), _region("1234"), _region([0, 0, 1, "1"]),
                 _region([0, 0, 1, 1], 5)]},
    {"image": 5}, {"regions": []}, {"image": "a.png", "regions": {"box": [0, 0, 1, 1]}}, ["a.png"],
]  # fmt: skip


def test_bad_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, BAD)) + '\n{broken\n{"image": "a.png"}\n{"image": "b.p')
    first, *rest = everything(JsonLines(path))
    assert first == Annotated(
        "x", "a.png", (RawRegion((0.1, 0.2, 0.5, 0.9), "a cup"),), unit="relative",
        refused=(
            ("region 1", "region is not a mapping with box and caption"), ("region 2", "box is not four numbers"),
            ("region 3", "box is not four numbers"), ("region 4", "box is not four numbers"), ("region 5", "caption is not text"),
            ("global", "global caption is not text"),
        ),
    )  # fmt: skip
    assert rest == [
        Refused("line 2", "line has no image path"), Refused("line 3", "line has no image path"),
        Refused("line 4", "regions is not a list"), Refused("line 5", "line is not a mapping"),
        Refused("line 6", "line is not valid JSON"), Annotated("a.png", "a.png", unit="relative"),
        Refused("a.jsonl", "file ends in the middle"),
    ]  # fmt: skip


def test_the_store_command_refuses_the_same_for_the_same_reasons(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded_image(40, 20))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(tree) for tree in BAD if isinstance(tree, dict)) + "\n{broken\n")
    summary = build_store(path, tmp_path, tmp_path / "out")
    first, *rest = everything(JsonLines(path))
    ours = sorted([reason for _, reason in first.refused] + [item.reason for item in rest])
    assert ours == sorted(summary.refused.elements())
    (stored,) = Store(tmp_path / "out").record(0).regions
    assert (stored.box, stored.caption) == ((0.1, 0.2, 0.5, 0.9), "a cup")


def test_a_file_of_another_format_and_a_missing_one(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png"}]))
    with pytest.raises(ValueError, match=r"a\.json.*JSON lines"):
        everything(JsonLines(tmp_path / "a.json"))
    with pytest.raises(ValueError, match=r"annotations .*absent"):
        JsonLines(tmp_path / "absent").parts()
