import json
import tracemalloc

import pytest

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.visual_genome import VisualGenome
from tests.sources.reading import everything, write_json


def _region(key, image, x, y, width, height, phrase):
    return {"region_id": key, "width": width, "height": height, "image_id": image, "phrase": phrase, "y": y, "x": x}


def _image(key, path, width, height):
    return {"width": width, "url": f"https://cs.stanford.edu/people/rak248/{path}", "height": height, "image_id": key,
            "coco_id": None, "flickr_id": None}


REGIONS = [
    {"regions": [
        _region(1382, 1, 421, 57, 82, 139, "the clock is green in colour"),
        _region(1383, 1, 194, 372, 182, 124, "shade is along the street "),
        _region(1384, 1, 241, 491, 61, 88, "man is wearing sneakers"),
        _region(1385, 1, 617, 377, 150, 31, "cars headlights are off"),
    ], "id": 1},
    {"regions": [_region(1428, 2, 241, 230, 102, 139, "parking meter on the sidewalk")], "id": 2},
    {"regions": [
        _region(5381, 3, 0, 0, 640, 480, "a man sitting at a desk"),
        _region(5382, 3, -3, 10, 20, 500, "window"),
    ], "id": 3},
    {"regions": [], "id": 4},
    {"regions": [
        _region(3000, 2412112, 10, 20, 0, 5, "thin line"),
        _region(3001, 2412112, 100, 50, 60, 70, "两只猫"),
        _region(3002, 2412112, 1.5, 2.5, 3, 4, ""),
    ], "id": 2412112},
    {"regions": [_region(4000, 8, 1, 2, 3, 4, "a"), _region(4001, 8, 1, 2, 3, 4, "a")], "id": 8},
    {"regions": [_region(4002, 9, 0, 0, 1, 1, "corner")], "id": 9},
    {"regions": [_region(4003, 10, 5, 5, -5, 1, "inverted")], "id": 10},
    {"regions": [_region(4004, 11, 600, 400, 300, 300, "outside")], "id": 11},
]
IMAGES = [
    _image(1, "VG_100K_2/1.jpg", 800, 600),
    _image(2, "VG_100K/2.jpg", 800, 600),
    _image(3, "VG_100K/3.jpg", 640, 480),
    _image(4, "VG_100K_2/4.jpg", 640, 480),
    {"image_id": 2412112, "url": "https://cs.stanford.edu/people/rak248/VG_100K/2370463.jpg", "width": 500, "height": 281,
     "coco_id": 547168, "flickr_id": 8505158818},
    _image(7, "VG_100K/7.jpg", 10, 20),
    _image(11, "VG_100K_2/11.jpg", 640, 480),
    _image(8, "VG_100K_2/8.jpg", 640, 480),
    _image(9, "VG_100K_2/9.jpg", 640, 480),
    _image(10, "VG_100K_2/10.jpg", 640, 480),
]


def _annotated(key, image, size, *regions, refused=()):
    return Annotated(str(key), image, tuple(RawRegion(*region) for region in regions), size=size, refused=refused)


EXPECTED = [
    _annotated(1, "VG_100K_2/1.jpg", (800, 600), ((421, 57, 503, 196), "the clock is green in colour"),
               ((194, 372, 376, 496), "shade is along the street "), ((241, 491, 302, 579), "man is wearing sneakers"),
               ((617, 377, 767, 408), "cars headlights are off")),
    _annotated(2, "VG_100K/2.jpg", (800, 600), ((241, 230, 343, 369), "parking meter on the sidewalk")),
    _annotated(3, "VG_100K/3.jpg", (640, 480), ((0, 0, 640, 480), "a man sitting at a desk"), ((-3, 10, 17, 510), "window")),
    _annotated(4, "VG_100K_2/4.jpg", (640, 480)),
    _annotated(2412112, "VG_100K/2370463.jpg", (500, 281), ((10, 20, 10, 25), "thin line"), ((100, 50, 160, 120), "两只猫"),
               ((1.5, 2.5, 4.5, 6.5), "")),
    _annotated(7, "VG_100K/7.jpg", (10, 20)),
    _annotated(11, "VG_100K_2/11.jpg", (640, 480), ((600, 400, 900, 700), "outside")),
    _annotated(8, "VG_100K_2/8.jpg", (640, 480), ((1, 2, 4, 6), "a"), ((1, 2, 4, 6), "a")),
    _annotated(9, "VG_100K_2/9.jpg", (640, 480), ((0, 0, 1, 1), "corner")),
    _annotated(10, "VG_100K_2/10.jpg", (640, 480), ((5, 5, 0, 6), "inverted")),
]


def _reader(folder, regions, images):
    return VisualGenome(write_json(folder / "region_descriptions.json", regions), write_json(folder / "image_data.json", images))


def test_regions(tmp_path):
    reader = _reader(tmp_path, REGIONS, IMAGES)
    assert reader.parts() == ("region_descriptions.json",)
    assert everything(reader) == EXPECTED


def test_the_versions_of_the_keys_of_ids(tmp_path):
    regions = [{"image_id": entry["id"], "regions": entry["regions"]} for entry in REGIONS]
    images = [{"id": image.pop("image_id")} | image for image in map(dict, IMAGES)]
    assert everything(_reader(tmp_path, regions, images)) == EXPECTED


def test_what_cannot_be_read_is_refused(tmp_path):
    regions = [
        {"id": 1, "regions": [
            _region(1, 1, 0, 0, 5, 5, "first"),
            _region(1, 1, 1, 1, 5, 5, "again"),
            _region(2, 1, 0, 0, 5, "5", "x"),
            _region(3, 1, 0, 0, 5, 5, ["x"]),
            {"region_id": 4, "phrase": "x"},
            "region",
            _region([5], 1, 0, 0, 5, 5, "x"),
        ]},
        "entry",
        {"id": 1, "regions": None},
        {"regions": [_region(6, 1, 0, 0, 5, 5, "x")]},
        {"id": 1, "regions": [_region(7, 1, 2, 2, 5, 5, "more")]},
        {"id": 99, "regions": [_region(8, 99, 0, 0, 5, 5, "x")]},
    ]
    images = [IMAGES[0], IMAGES[0], "image", {"image_id": 3, "url": None}, {"url": "https://a/VG_100K/9.jpg"}]
    assert everything(_reader(tmp_path, regions, images)) == [
        Refused("image 1 of the file", "image id appears twice"),
        Refused("image 2 of the file", "entry is not a mapping"),
        Refused("image 4 of the file", "image id is neither a whole number nor text"),
        Refused("region 5 in entry 0 of the file", "region is not a mapping"),
        Refused("region 6 in entry 0 of the file", "annotation id is neither a whole number nor text"),
        Refused("entry 1 of the file", "entry has no list of regions"),
        Refused("entry 2 of the file", "entry has no list of regions"),
        Refused("region 0 in entry 3 of the file", "image id of the annotation is neither a whole number nor text"),
        _annotated(1, "VG_100K_2/1.jpg", (800, 600), ((0, 0, 5, 5), "first"), ((2, 2, 7, 7), "more"), refused=(
            ("region 1", "annotation id appears twice"),
            ("region 2", "box is not four numbers"),
            ("region 3", "phrase is not text"),
            ("region 4", "box is not four numbers"),
        )),
        Refused("image 3", "image has no url"),
        Refused("region 8", "image of the annotation has no entry"),
    ]


@pytest.mark.parametrize("drop", [1, 50, 700])
def test_a_file_that_is_cut_off_is_refused_as_a_whole(tmp_path, drop):
    reader = _reader(tmp_path, REGIONS, IMAGES)
    write_json(tmp_path / "region_descriptions.json", REGIONS, drop)
    assert everything(reader) == [Refused("region_descriptions.json", "file ends in the middle")]
    write_json(tmp_path / "image_data.json", IMAGES, drop)
    assert everything(reader) == [Refused("image_data.json", "file ends in the middle")]


def test_other_formats_and_missing_files_are_named(tmp_path):
    reader = _reader(tmp_path, IMAGES, IMAGES)
    with pytest.raises(ValueError, match=r"region_descriptions\.json: is not"):
        everything(reader)
    with pytest.raises(ValueError, match=r"image_data\.json: is not"):
        everything(_reader(tmp_path, REGIONS, REGIONS))
    with pytest.raises(ValueError, match=r"image_data\.json: is not"):
        everything(_reader(tmp_path, REGIONS, {"images": []}))
    with pytest.raises(ValueError, match=r"regions .*none"):
        VisualGenome(tmp_path / "none", tmp_path / "image_data.json").parts()
    with pytest.raises(ValueError, match=r"images .*none"):
        VisualGenome(tmp_path / "image_data.json", tmp_path / "none").parts()


def test_memory_does_not_grow_with_the_file(tmp_path):
    """8 MB of JSON, with long phrases, so that the test is short."""
    reader = _reader(tmp_path, [], [_image(key, f"VG_100K/{key}.jpg", 10, 10) for key in range(200)])
    with open(tmp_path / "region_descriptions.json", "w") as file:
        for key in range(200):
            regions = [_region(10 * key + n, key, 1, 2, 3, 4, "phrase " * 600) for n in range(10)]
            file.write(("," if key else "[") + json.dumps({"regions": regions, "id": key}))
        file.write("]")
    assert file.closed and (tmp_path / "region_descriptions.json").stat().st_size > 8e6
    tracemalloc.start()
    try:
        regions = sum(len(item.regions) for item in reader.read("region_descriptions.json"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert regions == 2000
    assert peak < 3e6
