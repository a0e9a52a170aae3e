import math

import pytest

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.flickr30k_entities import Flickr30kEntities
from tests.sources.reading import everything


def _thing(names, box=None, nobndbox=0, scene=0):
    named = "".join(f"<name>{name}</name>" for name in names)
    if box is None:
        return f"<object>{named}<scene>{scene}</scene><nobndbox>{nobndbox}</nobndbox></object>"
    x1, y1, x2, y2 = box
    return (f"<object>{named}<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>")


def _annotation(name, size, *things):
    width, height = size
    return (f"<annotation>\n\t<filename>{name}.jpg</filename>\n\t<size><width>{width}</width><height>{height}</height>"
            f"<depth>3</depth></size>\n{''.join(things)}\n</annotation>\n")


YOUNG_CHILD = (
    "[/EN#283585/people A young child] is wearing [/EN#283587/clothing blue goggles] and sitting in "
    "[/EN#283588/vehicles a float] in [/EN#283586/scene a pool] .\n"
    "[/EN#283585/people A small child] wearing [/EN#283587/clothing blue goggles] is in "
    "[/EN#283588/vehicles/other an inflatable ring] .\n"
)
# id: (size, objects, sentences)
IMAGES = {
    "36979": ((500, 375), [
        _thing(["283585"], (182, 76, 336, 218)),
        _thing(["283587"], (1, 1, 500, 375)),
        _thing(["283588"], (100, 200, 300.5, 350)),
        _thing(["283586"], nobndbox=0, scene=1),
    ], YOUNG_CHILD),
    "100": ((500, 333), [_thing(["1"], (10, 20, 30, 40)), _thing(["1"], (50, 60, 70, 80))], "[/EN#1/people Two men] talk .\n"),
    "101": ((333, 500), [_thing(["1", "2"], (5, 6, 7, 8)), _thing(["2"], (1, 2, 3, 4))],
            "[/EN#1/people A man] of [/EN#2/people a couple] waves .\n"),
    "102": ((10, 10), [_thing(["7"], nobndbox=1)], "[/EN#7/other Music] plays .\n"),
    "103": ((10, 10), [_thing(["7"], (1, 1, 2, 2))], "[/EN#0/notvisual It] rains on [/EN#7/other a roof] .\n"),
    "104": ((10, 10), [_thing(["7"], (1, 1, 2, 2))], "Nothing is named here .\n"),
    "105": ((10, 10), [_thing(["7"], (1, 1, 2, 2))], "[/EN#7/bodyparts/clothing His gloved left hand]\n"),
    "106": ((10, 10), [], "Empty .\n\nAfter an empty line .\n"),
    "107": ((10, 10), [_thing(["7"], (9, 9, 2, 2))], "[/EN#7/animals Ein Hund ü] .\n"),
    "108": ((10, 10), [_thing(["7"], ("nan", 1, 2, 2))], "[/EN#7/animals a dog] .\n"),
}


def _annotated(key, size, *regions, caption=None, refused=()):
    return Annotated(key, f"{key}.jpg", tuple(RawRegion(*region) for region in regions), caption, size=size, refused=refused)


EXPECTED = [  # in the order of the names as text
    _annotated("100", (500, 333), ((9, 19, 30, 40), "Two men"), ((49, 59, 70, 80), "Two men"), caption="Two men talk ."),
    _annotated("101", (333, 500), ((4, 5, 7, 8), "A man"), ((4, 5, 7, 8), "a couple"), ((0, 1, 3, 4), "a couple"),
               caption="A man of a couple waves ."),
    _annotated("102", (10, 10), caption="Music plays ."),
    _annotated("103", (10, 10), ((0, 0, 2, 2), "a roof"), caption="It rains on a roof ."),
    _annotated("104", (10, 10), caption="Nothing is named here ."),
    _annotated("105", (10, 10), ((0, 0, 2, 2), "His gloved left hand"), caption="His gloved left hand"),
    _annotated("106", (10, 10), caption="Empty ."),
    _annotated("107", (10, 10), ((8, 8, 2, 2), "Ein Hund ü"), caption="Ein Hund ü ."),
    _annotated("36979", (500, 375), ((181, 75, 336, 218), "A young child"), ((0, 0, 500, 375), "blue goggles"),
               ((99, 199, 300.5, 350), "a float"), ((181, 75, 336, 218), "A small child"), ((0, 0, 500, 375), "blue goggles"),
               ((99, 199, 300.5, 350), "an inflatable ring"),
               caption="A young child is wearing blue goggles and sitting in a float in a pool ."),
]


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Sentences").mkdir()
    return tmp_path / "Annotations", tmp_path / "Sentences"


def _write(folders, key, annotation, sentences):
    if annotation is not None:
        (folders[0] / f"{key}.xml").write_text(annotation)
    if sentences is not None:
        (folders[1] / f"{key}.txt").write_text(sentences)


def test_phrases(folders):
    for key, (size, things, sentences) in IMAGES.items():
        _write(folders, key, _annotation(key, size, *things), sentences)
    reader = Flickr30kEntities(*folders, global_sentence=0)
    assert reader.parts() == ("Annotations",)
    found = everything(reader)
    nan = found.pop(8)
    assert found == EXPECTED
    assert nan.id == "108" and math.isnan(nan.regions[0].box[0]) and nan.regions[0].box[1:] == (0, 2, 2)


def test_another_sentence_or_none_as_global_caption(folders):
    _write(folders, "36979", _annotation("36979", (500, 375), *IMAGES["36979"][1]), YOUNG_CHILD)
    captions = [everything(Flickr30kEntities(*folders, number))[0].global_caption for number in (1, 2, -1, None)]
    assert captions == ["A small child wearing blue goggles is in an inflatable ring .", None, None, None]


def test_what_cannot_be_read_is_refused(folders):
    good = _annotation("1", (9, 9), _thing(["5"], (1, 1, 2, 2)))
    _write(folders, "1", good, "[/EN#5/people A man] .\n")
    _write(folders, "2", good, None)
    _write(folders, "3", None, "[/EN#5/people A man] .\n")
    _write(folders, "4", good[:-20], "[/EN#5/people A man] .\n")
    _write(folders, "5", good.replace("<filename>1.jpg</filename>", ""), "A man .\n")
    _write(folders, "6", good, "")
    (folders[1] / "6.txt").write_bytes(b"[/EN#5/people Caf\xe9] .\n")
    things = [_thing(["5"], (1, 1, "x", 2)), _thing([], (1, 1, 2, 2)), "<object><name>5</name><bndbox/></object>"]
    _write(folders, "7", _annotation("7", ("a", 9), *things), "[/EN#5/people A man] [/EN#6/people a dog\n[/EN#9/other x] .\n")
    assert everything(Flickr30kEntities(*folders)) == [
        _annotated("1", (9, 9), ((0, 0, 2, 2), "A man")),
        Refused("2", "annotations without a file of sentences"),
        Refused("3", "sentences without a file of annotations"),
        Refused("4", "annotations are not valid XML"),
        Refused("5", "annotations have no filename"),
        Refused("6", "sentences are not UTF-8"),
        _annotated("7", None, refused=(
            ("object 0", "box is not four numbers"),
            ("object 1", "object has no name"),
            ("object 2", "box is not four numbers"),
            ("sentence 0", "sentence has a damaged phrase"),
            ("entity 9", "entity of the phrase has no entry"),
        )),
    ]


def test_other_formats_and_missing_folders_are_named(folders, tmp_path):
    with pytest.raises(ValueError, match="Annotations"):
        everything(Flickr30kEntities(*folders))
    _write(folders, "1", "<html/>", "x")
    with pytest.raises(ValueError, match=r"1\.xml"):
        everything(Flickr30kEntities(*folders))
    with pytest.raises(ValueError, match=r"sentences .*none"):
        Flickr30kEntities(folders[0], tmp_path / "none").parts()
    with pytest.raises(ValueError, match=r"annotations .*none"):
        Flickr30kEntities(tmp_path / "none", folders[1]).parts()
