"""Pascal VOC's XML, and PubTables-1M's words."""
import json
import math

import pytest

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.pubtables import Voc
from tests.sources.reading import everything

TABLE = [  # a header over two columns, two rows below, the second of them projected
    ("table", 30, 10, 330, 130), ("table column", 30, 10, 130, 130), ("table column", 130, 10, 230, 130),
    ("table column", 230, 10, 330, 130), ("table row", 30, 10, 330, 50), ("table row", 30, 50, 330, 90),
    ("table row", 30, 90, 330, 130), ("table column header", 30, 10, 330, 50), ("table spanning cell", 130, 10, 330, 50),
    ("table projected row header", 30, 90, 330, 130),
]  # fmt: skip
WORDS = [
    ("Group", 40, 20, 80, 40), ("Mean", 180, 20, 215, 40), ("(SD)", 220, 20, 260, 40), ("A", 40, 60, 50, 80),
    ("1.5", 140, 60, 160, 80), ("2.5", 240, 60, 260, 80), ("All", 40, 100, 60, 120), ("sites", 65, 100, 90, 120),
    ("outside", 400, 20, 450, 40),
]  # fmt: skip


def _xml(name, objects, size="<size>\n<width>{}</width>\n<height>140</height>\n<depth>3</depth>\n</size>", width=350):
    entries = "".join(
        f"<object>\n<name>{label}</name>\n<pose>Frontal</pose><truncated>0</truncated><difficult>0</difficult><occluded>0</occluded>"
        f"\n<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, x1, y1, x2, y2 in objects
    )
    source = "<source><database>PubTables1M-Structure</database></source>"
    return (
        f'<?xml version="1.0" ?>\n<annotation>\n<folder></folder>\n<filename>{name}</filename>\n<path>{name}</path>{source}'
        f"{size.format(width)}<segmented>0</segmented>{entries}</annotation>\n"
    )


def _region(label, x1, y1, x2, y2):
    return RawRegion((x1, y1, x2, y2), label)


def test_objects(tmp_path):
    for n in range(10):
        objects = [*TABLE[:n], ("dog &amp; cat", 36.5, n, "550.25", "1e2")]
        (tmp_path / f"PMC{n}_table_0.xml").write_text(_xml(f"PMC{n}_table_0.jpg", objects, width=350 + n))
    assert everything(Voc(tmp_path)) == [
        Annotated(
            f"PMC{n}_table_0.xml", f"PMC{n}_table_0.jpg",
            (*(_region(*entry) for entry in TABLE[:n]), RawRegion((36.5, n, 550.25, 100), "dog & cat")), size=(350 + n, 140),
        )
        for n in range(10)
    ]  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
def test_words_are_the_captions_and_cells_are_regions(tmp_path, wrapped):
    (tmp_path / "words").mkdir()
    (tmp_path / "xml").mkdir()
    words = [
        {"bbox": [*map(float, box)], "text": text, "flags": 0, "span_num": n, "line_num": 0, "block_num": 0}
        for n, (text, *box) in enumerate(WORDS)
    ]
    for n in range(10):
        (tmp_path / "xml" / f"PMC{n}.xml").write_text(_xml(f"PMC{n}.jpg", TABLE))
        tree = words[: n if n else None]  # n words; the first table has all
        (tmp_path / "words" / f"PMC{n}_words.json").write_text(json.dumps({"words": tree} if wrapped else tree))
    records = everything(Voc(tmp_path / "xml", tmp_path / "words"))
    assert [record.image for record in records] == [f"PMC{n}.jpg" for n in range(10)]
    captions = [
        "Group Mean (SD) A 1.5 2.5 All sites", "Group A All sites", "Mean 1.5", "(SD) 2.5", "Group Mean (SD)", "A 1.5 2.5",
        "All sites", "Group Mean (SD)", "Mean (SD)", "All sites",
    ]  # fmt: skip
    cells = [((30, 10, 130, 50), "Group"), ((30, 50, 130, 90), "A"), ((130, 50, 230, 90), "1.5"), ((230, 50, 330, 90), "2.5")]
    objects = tuple(_region(caption, *entry[1:]) for caption, entry in zip(captions, TABLE, strict=True))
    assert records[0].regions == objects + tuple(RawRegion(*cell) for cell in cells) and not records[0].refused
    assert records[9].regions == records[0].regions
    assert records[1].regions[:5] == (
        RawRegion((30, 10, 330, 130), "Group"), RawRegion((30, 10, 130, 130), "Group"), RawRegion((130, 10, 230, 130), ""),
        RawRegion((230, 10, 330, 130), ""), RawRegion((30, 10, 330, 50), "Group"),
    )  # fmt: skip
    assert [len(record.regions) - len(TABLE) for record in records] == [4, 1, 1, 1, 2, 3, 4, 4, 4, 4]


def test_bad_words_are_refused_and_a_table_without_words_too(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.xml").write_text(_xml("a.jpg", [("table row", 0, 0, 100, 50), ("table column", 0, 0, 50, 50)]))
    box = {"bbox": [1, 1, 9, 9]}
    words = [
        box | {"text": 5}, {"text": "x"}, box | {"text": ""}, "x", box | {"text": "<|im_end|>"},
        {"bbox": [1, 1, 9, "9"], "text": "x"},
    ]  # fmt: skip
    (tmp_path / "a_words.json").write_text(json.dumps(words))
    (tmp_path / "b_words.json").write_text(json.dumps(words)[:-5])
    first, *rest = everything(Voc(tmp_path, tmp_path))
    assert [region.caption for region in first.regions] == ["<|im_end|>"] * 3
    assert first.refused == (
        ("word 0", "caption is not text"), ("word 1", "box is not four numbers"), ("word 3", "word is not a mapping"),
        ("word 5", "box is not four numbers"),
    )  # fmt: skip
    assert rest == [
        Refused("b.xml", "words: file ends in the middle"), Refused("c.xml", "words: file cannot be read (FileNotFoundError)"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"words .*absent"):
        Voc(tmp_path, tmp_path / "absent").parts()


ENTITIES = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 31))  # the last stands for 10^30 words
BOMB = f'<!DOCTYPE annotation [<!ENTITY a0 "ha">{ENTITIES}]><annotation><filename>&a30;</filename></annotation>'


def test_bad_objects_and_damaged_files(tmp_path):
    objects = [("dog", 1, 2, 3, 4), ("cat", "x", 2, 3, 4), ("", "nan", 2, 3, 4)]
    whole = _xml("a.jpg", objects, size="<size><width>wide</width></size>")
    (tmp_path / "a.xml").write_text(whole.replace("</annotation>", "<object><name>bird</name></object></annotation>"))
    (tmp_path / "b.xml").write_text(whole[:-30])
    (tmp_path / "c.xml").write_text(BOMB)
    (tmp_path / "d.xml").write_text("<annotation><filename></filename></annotation>")
    (tmp_path / "e.xml").write_text("<html></html>")
    (tmp_path / "f.xml").write_text('<?xml version="1.0" encoding="no-such"?><annotation/>')
    (tmp_path / "g.xml").write_text(
        '<!DOCTYPE annotation [<!ENTITY out SYSTEM "file:///etc/hostname">]><annotation><filename>&out;</filename></annotation>'
    )
    (tmp_path / "h.xml").write_text(whole[:-5])
    (tmp_path / "i.xml").write_text("<annotation>" + "<a>" * 100_000 + "</a>" * 100_000 + "</annotation>")
    first, *rest = everything(Voc(tmp_path))
    assert first.regions[0] == RawRegion((1, 2, 3, 4), "dog") and first.size is None
    assert math.isnan(first.regions[1].box[0]) and first.regions[1].caption == "" and len(first.regions) == 2
    assert first.refused == (("object 1", "bndbox is not four numbers"), ("object 3", "bndbox is not four numbers"))
    assert rest == [
        Refused("b.xml", "file ends in the middle"), Refused("c.xml", "file is not valid XML"),
        Refused("d.xml", "annotation has no filename"), Refused("e.xml", "file is of another format"),
        Refused("f.xml", "file is not valid XML"), Refused("g.xml", "file is not valid XML"),
        Refused("h.xml", "file ends in the middle"), Refused("i.xml", "annotation has no filename"),
    ]  # fmt: skip
    (tmp_path / "a.xml").write_text("<html></html>")
    with pytest.raises(ValueError, match=r"a\.xml.*annotation"):
        everything(Voc(tmp_path))
