import pytest

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.textocr import TextOcr
from tests.sources.reading import everything, write_json


def _image(key, width, height):
    return {"id": key, "width": width, "height": height, "set": "train", "file_name": f"train/{key}.jpg"}


def _word(key, image, box, text):
    x, y, w, h = box
    return {"id": key, "image_id": image, "bbox": box, "utf8_string": text,
            "points": [x, y, x + w, y, x + w, y + h, x, y + h], "area": w * h}


IMAGES = [
    _image("a4ea732cd3d5948a", 1024, 768),
    _image("4bf43a7b2a898044", 1024, 683),
    _image("d8f3ee4d5a5cf2ba", 768, 1024),
    _image("6a1a2a5a1f5b0e7e", 1024, 1024),
    _image("0054402ee6ac9c8f", 680, 1024),
    _image("1", 10, 20),
    _image("2", 20, 10),
    _image("3", 30, 30),
    _image("4", 40, 40),
    _image("5", 50, 60),
]
WORDS = [
    _word("a4ea732cd3d5948a_1", "a4ea732cd3d5948a", [525.83, 3.4, 197.64, 33.94], "Performance"),
    _word("a4ea732cd3d5948a_2", "a4ea732cd3d5948a", [534.67, 64.68, 91.22, 38.19], "Sport"),
    _word("a4ea732cd3d5948a_3", "a4ea732cd3d5948a", [626.95, 63.62, 96.52, 31.82], "Watch"),
    _word("a4ea732cd3d5948a_4", "a4ea732cd3d5948a", [577.4, 141.87, 147.13, 43.1], "..."),
    _word("a4ea732cd3d5948a_5", "a4ea732cd3d5948a", [391.03, 163.9, 60.82, 38.65], "."),
    _word("4bf43a7b2a898044_1", "4bf43a7b2a898044", [0, 0, 10.5, 20], "Café"),
    _word("4bf43a7b2a898044_2", "4bf43a7b2a898044", [5, 6, 7, 8], "STOP"),
    _word("d8f3ee4d5a5cf2ba_1", "d8f3ee4d5a5cf2ba", [100, 200, 50, 25], "£2.50"),
    _word("6a1a2a5a1f5b0e7e_1", "6a1a2a5a1f5b0e7e", [1000, 1000, 24, 24], "i"),
    _word("6a1a2a5a1f5b0e7e_2", "6a1a2a5a1f5b0e7e", [-1, 5, 3, 4], "edge"),
    _word("1_1", "1", [1, 2, 3, 4], "A"),
    _word("2_1", "2", [0, 0, 20, 10], "all"),
    _word("3_1", "3", [5.5, 5.5, 0.5, 1.5], ","),
    _word("4_1", "4", [1, 1, 2, 2], "."),
    _word("5_1", "5", [50, 60, 0, 0], "point"),
]


def _tree(images=IMAGES, words=WORDS):
    return {
        "info": {"version": "0.1"},
        "imgs": {image["id"]: image for image in images},
        "anns": {word["id"]: word for word in words},
        "imgToAnns": {image["id"]: [word["id"] for word in words if word["image_id"] == image["id"]] for image in images},
    }


def _annotated(key, size, *regions, refused=()):
    return Annotated(key, f"train/{key}.jpg", tuple(RawRegion(*region) for region in regions), size=size, refused=refused)


EXPECTED = [
    _annotated("a4ea732cd3d5948a", (1024, 768), ((525.83, 3.4, 723.47, 37.34), "Performance"),
               ((534.67, 64.68, 625.89, 102.87), "Sport"), ((626.95, 63.62, 723.47, 95.44), "Watch"),
               ((577.4, 141.87, 724.53, 184.97), "..."), refused=(("annotation a4ea732cd3d5948a_5", "word is illegible"),)),
    _annotated("4bf43a7b2a898044", (1024, 683), ((0, 0, 10.5, 20), "Café"), ((5, 6, 12, 14), "STOP")),
    _annotated("d8f3ee4d5a5cf2ba", (768, 1024), ((100, 200, 150, 225), "£2.50")),
    _annotated("6a1a2a5a1f5b0e7e", (1024, 1024), ((1000, 1000, 1024, 1024), "i"), ((-1, 5, 2, 9), "edge")),
    _annotated("0054402ee6ac9c8f", (680, 1024)),
    _annotated("1", (10, 20), ((1, 2, 4, 6), "A")),
    _annotated("2", (20, 10), ((0, 0, 20, 10), "all")),
    _annotated("3", (30, 30), ((5.5, 5.5, 6, 7), ",")),
    _annotated("4", (40, 40), refused=(("annotation 4_1", "word is illegible"),)),
    _annotated("5", (50, 60), ((50, 60, 50, 60), "point")),
]


def test_words(tmp_path):
    reader = TextOcr(write_json(tmp_path / "TextOCR_0.1_train.json", _tree()))
    assert reader.parts() == ("TextOCR_0.1_train.json",)
    found = everything(reader)
    assert [[r.caption for r in item.regions] for item in found] == [[r.caption for r in item.regions] for item in EXPECTED]
    for one, other in zip(found, EXPECTED, strict=True):
        for region, wanted in zip(one.regions, other.regions, strict=True):
            assert region.box == pytest.approx(wanted.box, abs=1e-9)
        assert (one.id, one.image, one.size, one.refused) == (other.id, other.image, other.size, other.refused)
        assert one.unit == "absolute"


def test_what_cannot_be_read_is_refused(tmp_path):
    images = [IMAGES[0], {"id": "b", "width": 5, "height": 5}]
    words = [
        _word("1", "a4ea732cd3d5948a", [1, 2, 3, 4], "good"),
        _word("2", "a4ea732cd3d5948a", [1, 2, 3, 4], None),
        _word("3", "a4ea732cd3d5948a", [1, 2, 3, 4], "x") | {"bbox": [1, 2, "3", 4]},
        _word("4", "elsewhere", [1, 2, 3, 4], "x"),
        _word("5", None, [1, 2, 3, 4], "x"),
    ]
    tree = _tree(images, words)
    tree["imgs"]["c"] = "c.jpg"
    tree["anns"]["6"] = ["x"]
    found = everything(TextOcr(write_json(tmp_path / "words.json", tree)))
    assert set(found[:3]) == {
        Refused("image c", "entry is not a mapping"),
        Refused("annotation 5", "image id of the annotation is neither a whole number nor text"),
        Refused("annotation 6", "entry is not a mapping"),
    }
    assert found[3:] == [
        _annotated("a4ea732cd3d5948a", (1024, 768), ((1, 2, 4, 6), "good"), refused=(
            ("annotation 2", "utf8_string is not text"), ("annotation 3", "box is not four numbers"))),
        Refused("image b", "image has no file_name"),
        Refused("annotation 4", "image of the annotation has no entry"),
    ]


def test_keys_that_come_again(tmp_path):
    word = '"w": {"image_id": "i", "bbox": [0, 0, 1, 1], "utf8_string": "a"}'
    image = '"i": {"file_name": "i.jpg", "width": 4, "height": 4}'
    path = tmp_path / "words.json"
    path.write_text(f'{{"imgs": {{{image}, {image}}}, "anns": {{{word}, {word}}}}}')
    again = (("annotation w", "annotation id appears twice"),)
    assert everything(TextOcr(path)) == [
        Refused("image i", "image id appears twice"),
        Annotated("i", "i.jpg", (RawRegion((0, 0, 1, 1), "a"),), size=(4, 4), refused=again),
    ]


@pytest.mark.parametrize("drop", [1, 100, 900])
def test_a_file_that_is_cut_off_is_refused_as_a_whole(tmp_path, drop):
    assert everything(TextOcr(write_json(tmp_path / "cut.json", _tree(), drop))) == [
        Refused("cut.json", "file ends in the middle")
    ]


def test_other_formats_and_missing_files_are_named(tmp_path):
    for tree in ({"images": []}, [], {"imgs": []}):
        with pytest.raises(ValueError, match=r"other\.json"):
            everything(TextOcr(write_json(tmp_path / "other.json", tree)))
    with pytest.raises(ValueError, match=r"file .*none"):
        TextOcr(tmp_path / "none").parts()
