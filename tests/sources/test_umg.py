import math

import pytest

from granvit.data.sources import per_image
from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.umg import Umg
from tests.sources.reading import everything, write_json

RUNS = {"size": [4, 6], "counts": [5, 2, 2, 1, 14]}  # rows 1 and 2 of column 1, row 1 of column 2
PACKED = {"size": [9, 10], "counts": "61X13mN000`0"}
POLYGON = [[1.5, 2, 5, 2, 5, 9.5]]


def _region(mask, caption, *tags):
    return {"segmentation": mask, "bbox": [1, 2, 3, 4], "caption": caption, "tags": list(tags)}


def _tree(caption, *regions):
    return {"caption": caption, "tags": ["sky", "dog"], "regions": list(regions)}


TREES = {
    "CC3M/00000/000000001": _tree("A dog on a hill.", _region(RUNS, "a brown dog", "dog", "animal"),
                                  _region(POLYGON, "a hill", "hill")),
    "CC3M/00000/000000002": _tree("Packed.", _region(PACKED, "something", "thing")),
    "CC3M/00000/000000003": _tree(None, _region(POLYGON, "no caption of the image")),
    "CC3M/00001/000010000": _tree("Nothing."),
    "CC3M/00001/000010001": _tree("", _region(POLYGON, "")),
    "CC3M/00001/000010002": _tree("Two.", _region([[0, 0, 1, 1], [8, 9, 8.5, 9.5]], "two parts")),
    "SBU/0/a": _tree("A.", _region([[-5, -5, 1000, 1000]], "outside")),
    "SBU/0/b": _tree("B.", _region(RUNS, "两只猫", "猫")),
    "SBU/0/c": {"regions": [_region(RUNS, "no more keys")]},
    "SBU/0/d": _tree("D.", _region(RUNS, "one"), _region(RUNS, "one")),
}


def _annotated(name, caption, *regions, size=None, refused=()):
    return Annotated(name, f"{name}.png", tuple(RawRegion(*region) for region in regions), caption, size=size, refused=refused)


EXPECTED = [
    _annotated("CC3M/00000/000000001", "A dog on a hill.", ((1, 1, 3, 3), "a brown dog"), ((1.5, 2, 5, 9.5), "a hill"),
               size=(6, 4)),
    _annotated("CC3M/00000/000000002", "Packed.", ((0, 2, 8, 7), "something"), size=(10, 9)),
    _annotated("CC3M/00000/000000003", None, ((1.5, 2, 5, 9.5), "no caption of the image")),
    _annotated("CC3M/00001/000010000", "Nothing."),
    _annotated("CC3M/00001/000010001", "", ((1.5, 2, 5, 9.5), "")),
    _annotated("CC3M/00001/000010002", "Two.", ((0, 0, 8.5, 9.5), "two parts")),
    _annotated("SBU/0/a", "A.", ((-5, -5, 1000, 1000), "outside")),
    _annotated("SBU/0/b", "B.", ((1, 1, 3, 3), "两只猫"), size=(6, 4)),
    _annotated("SBU/0/c", None, ((1, 1, 3, 3), "no more keys"), size=(6, 4)),
    _annotated("SBU/0/d", "D.", ((1, 1, 3, 3), "one"), ((1, 1, 3, 3), "one"), size=(6, 4)),
]


def _write(folder, trees):
    for name, tree in trees.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", tree)
    return folder


def test_boxes_of_masks(tmp_path):
    _write(tmp_path, TREES)
    (tmp_path / "SBU/0/a.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    assert Umg(tmp_path).parts() == ["CC3M/00000:0", "CC3M/00001:0", "SBU/0:0"]
    assert everything(Umg(tmp_path)) == EXPECTED


def test_written_boxes_tags_and_other_keys(tmp_path):
    region = {"mask": RUNS, "box": [1, 2, 3, 4.5], "text": "a dog", "labels": ["dog", "animal"]}
    folder = _write(tmp_path, {"a": {"text": "All.", "parts": [region, region | {"box": [math.nan, 0, 1, 1]}]}})
    keys = {"regions_key": "parts", "mask_key": "mask", "box_key": "box", "caption_key": "text", "tags_key": "labels"}
    assert Umg(folder, **keys).parts() == [".:0"]
    assert everything(Umg(folder, ".jpg", **keys)) == [
        Annotated("a", "a.jpg", (RawRegion((1, 1, 3, 3), "a dog"),) * 2, "All.", size=(6, 4))
    ]
    for box, expected in [("xywh", (1, 2, 4, 6.5)), ("xyxy", (1, 2, 3, 4.5))]:
        (found,) = everything(Umg(folder, box=box, region_caption="tags", **keys))
        assert found.regions[0] == RawRegion(expected, "dog, animal")
        assert math.isnan(found.regions[1].box[0])


def test_what_cannot_be_read_is_refused(tmp_path):
    _write(tmp_path, {
        "a": _tree(5, _region(RUNS, "good"), _region(None, "x"), _region({"size": [2, 2], "counts": [4]}, "x"),
                   _region(RUNS, None), "region"),
        "b": [1],
        "c": {"caption": "x"},
        "d": {"regions": {}},
        "e": "text",
    })
    write_json(tmp_path / "f.json", TREES["SBU/0/b"], drop=5)
    (tmp_path / "g.json").write_bytes(b"\xff{}")
    (tmp_path / "h.json").write_text("[" * 100_000)
    no_list, no_json = "file has no list of regions", "file is not valid JSON"
    assert everything(Umg(tmp_path)) == [
        _annotated("a", None, ((1, 1, 3, 3), "good"), size=(6, 4), refused=(
            ("region 1", "mask is neither run lengths nor polygons"), ("region 2", "mask is empty"),
            ("region 3", "caption is not text"), ("region 4", "region is not a mapping"), ("global", "caption is not text"))),
        Refused("b", no_list), Refused("c", no_list), Refused("d", no_list), Refused("e", no_list),
        Refused("f", no_json), Refused("g", no_json), Refused("h", no_json),
    ]
    (found,) = everything(Umg(tmp_path, region_caption="tags"))[:1]
    assert found.refused[-2:] == (("region 4", "region is not a mapping"), ("global", "caption is not text"))


def test_other_formats_and_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none"):
        Umg(tmp_path / "none").parts()
    with pytest.raises(ValueError, match=r"holds no \.json file"):
        Umg(tmp_path).parts()
    _write(tmp_path, {"x/a": {"images": []}, "x/b": []})
    with pytest.raises(ValueError, match=r"a\.json.*regions_key"):
        everything(Umg(tmp_path))


def test_a_large_folder_is_cut_into_parts_and_a_damaged_rest_does_not_end_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(per_image, "FILES_IN_PART", 2)
    _write(tmp_path, {name.replace("/", "-"): tree for name, tree in TREES.items()})
    (tmp_path / "z.json").write_text("{")
    reader = Umg(tmp_path)
    assert reader.parts() == [f".:{start}" for start in range(0, 11, 2)]
    assert [found.id for found in reader.read(".:4")] == ["CC3M-00001-000010001", "CC3M-00001-000010002"]
    assert everything(reader)[-2:] == [
        _annotated("SBU-0-d", "D.", ((1, 1, 3, 3), "one"), ((1, 1, 3, 3), "one"), size=(6, 4)),
        Refused("z", "file ends in the middle"),
    ]
