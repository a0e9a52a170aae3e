"""SROIE's text files and POIE's JSON lines."""
import json
import math

import pytest

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.quads import Poie, Quads
from tests.sources.reading import everything

# Each image: its text file, and the regions (and refused lines) that are in it.
RECEIPTS = {
    "X00016469612": (
        b"72,25,326,25,326,64,72,64,TAN WOON YANN\r\n50,82,440,82,440,121,50,121,BOOK TA .K(TAMAN DAYA) SDN BHD\r\n",
        [((72, 25, 326, 64), "TAN WOON YANN"), ((50, 82, 440, 121), "BOOK TA .K(TAMAN DAYA) SDN BHD")],
    ),
    "X00016469619": (
        b"62,300,480,300,480,330,62,330,NO.53 55,57 & 59, JALAN SAGU 18,\n",
        [((62, 300, 480, 330), "NO.53 55,57 & 59, JALAN SAGU 18,")],
    ),
    "X00016469620": (  # a tilted text: the upright rectangle around it
        b"10,20,50,12,54,30,14,38,9.00",
        [((10, 12, 54, 38), "9.00")],
    ),
    "X00016469622": (b"", []),
    "X00016469623": (b"\n\n 1,2,3,2,3,4,1,4, RM 5.90 \n\n", [((1, 2, 3, 4), " RM 5.90 ")]),
    "X00016469669": (b"\xef\xbb\xbf1,2,3,2,3,4,1,4,\xc3\xa9t\xc3\xa9\n", [((1, 2, 3, 4), "été")]),
    "X00016469670": (b"1,2,3,2,3,4,1,4,CAF\xc9 \x80 5\n", [((1, 2, 3, 4), "CAFÉ € 5")]),  # cp1252
    "X00016469671": (b"1.5,2,3.25,2,3.25,4,1.5,4,<|im_end|>,<image>\n", [((1.5, 2, 3.25, 4), "<|im_end|>,<image>")]),
    "X00016469672": (b"9,9,9,9,9,9,9,9,\n", [((9, 9, 9, 9), "")]),
    "X00016469673": (b"-3,2,3,2,3,4,-3,4,x\x0by\n", [((-3, 2, 3, 4), "x\x0by")]),
}


def _annotated(name, regions, refused=()):
    return Annotated(f"{name}.jpg", f"{name}.jpg", tuple(RawRegion(*region) for region in regions), refused=tuple(refused))


def test_receipts(tmp_path):
    for name, (data, _) in RECEIPTS.items():
        (tmp_path / f"{name}.txt").write_bytes(data)
    (tmp_path / "X00016469612.jpg").write_bytes(b"not read")
    assert everything(Quads(tmp_path)) == [_annotated(name, regions) for name, (_, regions) in RECEIPTS.items()]


def test_folders_below_are_parts_and_the_ending_of_images_is_a_choice(tmp_path):
    for name in ("b/2.txt", "b/10.TXT", "a.b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1,2,3,2,3,4,1,4,x\n")
    reader = Quads(tmp_path, ".png")
    assert reader.parts() == [".:0", "b:0"]
    assert [record.image for record in everything(reader)] == ["a.b.png", "b/10.png", "b/2.png"]


def test_bad_lines_are_refused_and_others_stay(tmp_path):
    good = "1,2,3,2,3,4,1,4,x"
    lines = [good, "1,2,3,2,3,4,1,4", "one,2,3,2,3,4,1,4,x", "1,2,3,4,x", "1,2,3,2,3,4,1,4,###", "nan,2,3,2,3,4,1,4,x", "1,2,3,2"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (record,) = everything(Quads(tmp_path))
    reason = "line is not eight numbers and a text"
    assert record.refused == (
        ("line 2", reason), ("line 3", reason), ("line 4", reason), ("line 5", "text is marked as illegible"), ("line 7", reason),
    )  # fmt: skip
    assert record.regions[0] == RawRegion((1, 2, 3, 4), "x") and len(record.regions) == 2
    assert math.isnan(record.regions[1].box[0]) and record.regions[1].box[3] == 4


def test_files_of_another_format(tmp_path):
    (tmp_path / "a.txt").write_text('{\n"company": "BOOK TA .K (TAMAN DAYA) SDN BHD",\n"total": "9.00"\n}')
    with pytest.raises(ValueError, match=r"a\.txt.*quads"):
        everything(Quads(tmp_path))
    (tmp_path / "Z.txt").write_text("1,2,3,2,3,4,1,4,x\n")
    (tmp_path / "b.txt").write_bytes(b"1,2,3,2,3,4,1,4,\x81\xff\n")
    (tmp_path / "c.txt").symlink_to("nowhere")
    (tmp_path / "d.txt").mkdir()
    assert everything(Quads(tmp_path))[1:] == [
        Refused("a.txt", "file is of another format"),
        Refused("b.txt", "file is neither UTF-8 nor cp1252"),
        Refused("c.txt", "file cannot be read (FileNotFoundError)"),
    ]
    with pytest.raises(ValueError, match=r"annotations .*absent"):
        Quads(tmp_path / "absent").parts()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"annotations .*empty.*\.txt"):
        Quads(tmp_path / "empty").parts()


def _product(number, *annotations):
    return {"file_name": f"{number}.jpg", "height": 600, "width": 800, "annotations": list(annotations), "entity_dict": {}}


def _text(polygon, text):
    return {"polygon": polygon, "text": text, "bezier_pts": [], "entity": ["O"] * len(text)}


def test_products(tmp_path):
    trees = [_product(number, _text([10 * number, 5, 40, 6, 41, 20, 11, 19], f"Fat {number}g")) for number in range(10)]
    trees[3]["annotations"].append(_text([1, 1, 2, 1, 2, 2, 1, 2], "###"))
    trees[4]["annotations"] = []
    trees[5] |= {"height": None}
    (tmp_path / "train.txt").write_text("\n".join(map(json.dumps, trees)) + "\n")
    regions = [
        [((0, 5, 41, 20), "Fat 0g")], [((10, 5, 41, 20), "Fat 1g")], [((11, 5, 41, 20), "Fat 2g")],
        [((11, 5, 41, 20), "Fat 3g")], [], [((11, 5, 50, 20), "Fat 5g")], [((11, 5, 60, 20), "Fat 6g")],
        [((11, 5, 70, 20), "Fat 7g")], [((11, 5, 80, 20), "Fat 8g")], [((11, 5, 90, 20), "Fat 9g")],
    ]  # fmt: skip
    refused = {3: (("annotation 1", "text is marked as illegible"),)}
    assert everything(Poie(tmp_path / "train.txt")) == [
        Annotated(
            f"{number}.jpg", f"{number}.jpg", tuple(RawRegion(*region) for region in expected),
            size=None if number == 5 else (800, 600), refused=refused.get(number, ()),
        )
        for number, expected in enumerate(regions)
    ]  # fmt: skip


def test_bad_products(tmp_path):
    good = _product(1, _text([1, 1, 2, 1, 2, 2, 1, 2], "x"))
    no_text = {"polygon": [1, 2, 3, 4], "text": 5}
    mixed = _product(2, "x", _text([1, 2, 3], "x"), _text("1234", "x"), _text([1, 2, 3, "4"], "x"), no_text)
    lines = [json.dumps(tree) for tree in (good, mixed, {"annotations": []}, good | {"annotations": {}}, [good])]
    path = tmp_path / "test.txt"
    path.write_text("\n\n".join([*lines, "{broken", json.dumps(good)])[:-20])
    first, second, *rest = everything(Poie(path))
    assert first.regions == (RawRegion((1, 1, 2, 2), "x"),) and second.regions == ()
    assert second.refused == (
        ("annotation 0", "annotation is not a mapping"), ("annotation 1", "polygon is not a list of points"),
        ("annotation 2", "polygon is not a list of points"), ("annotation 3", "a point is not two numbers"),
        ("annotation 4", "caption is not text"),
    )  # fmt: skip
    assert rest == [
        Refused("line 5", "line has no file_name"), Refused("line 7", "annotations is not a list"),
        Refused("line 9", "line is not a mapping"), Refused("line 11", "line is not valid JSON"),
        Refused("test.txt", "file ends in the middle"),
    ]  # fmt: skip
    path.write_text("\n" + json.dumps([good]))
    with pytest.raises(ValueError, match=r"test\.txt.*JSON lines"):
        everything(Poie(path))
