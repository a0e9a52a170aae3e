import json
import tracemalloc

import pytest

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.coco import Coco, CocoResults
from tests.sources.reading import everything, write_json

CATEGORIES = [
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "vehicle", "id": 2, "name": "bicycle"},
    {"supercategory": "animal", "id": 18, "name": "dog"},
    {"supercategory": "electronic", "id": 73, "name": "laptop"},
]


def _image(key, name, width=640, height=480):
    return {
        "license": 3, "file_name": name, "coco_url": f"http://images.cocodataset.org/val2017/{name}", "height": height,
        "width": width, "date_captured": "2013-11-14 17:02:52", "flickr_url": "http://farm7.staticflickr.com/a_z.jpg", "id": key,
    }


def _box(key, image, category, box, crowd=0):
    mask = {"counts": [272, 2, 4, 4], "size": [480, 640]} if crowd else [[510.66, 423.01, 511.72, 420.03, 510.45, 416.0]]
    return {"segmentation": mask, "area": 702.1, "iscrowd": crowd, "image_id": image, "bbox": box, "category_id": category,
            "id": key}


IMAGES = [
    _image(397133, "000000397133.jpg", 640, 427),
    _image(37777, "000000037777.jpg", 352, 230),
    _image(252219, "000000252219.jpg", 640, 428),
    _image(87038, "000000087038.jpg"),
    _image(174482, "000000174482.jpg", 640, 388),
    _image(403385, "000000403385.jpg", 500, 375),
    _image(6818, "000000006818.jpg", 427, 640),
    _image(480985, "000000480985.jpg", 500, 376),
    _image(458054, "000000458054.jpg"),
    _image(331352, "000000331352.jpg", 500, 375),
]
# Mixed over the images, as in the published files, and before `categories`.
ANNOTATIONS = [
    _box(1768, 252219, 18, [473.07, 395.93, 38.65, 28.67]),
    _box(1773, 397133, 1, [388, 69, 109, 277]),
    _box(1774, 37777, 2, [0, 0, 352, 230]),
    _box(1775, 252219, 1, [326.25, 174.5, 71.25, 197.0]),
    _box(900100, 87038, 1, [1, 2, 300, 400], crowd=1),
    _box(1776, 174482, 73, [10.5, 20.25, 0, 5]),
    _box(1777, 397133, 73, [-5, 10, 20, 500]),
    _box(1778, 403385, 18, [100, 100, 50, 25.5]),
    _box(1779, 6818, 2, [1, 1, 2, 2]),
    _box(1780, 480985, 1, [250, 125, 250, 251]),
    _box(1781, 458054, 1, [0.25, 0.5, 0.75, 1]),
]
INSTANCES = {
    "info": {"description": "COCO 2017 Dataset", "version": "1.0", "year": 2017},
    "licenses": [{"url": "http://creativecommons.org/licenses/by-nc/2.0/", "id": 2, "name": "Attribution-NonCommercial License"}],
    "images": IMAGES,
    "annotations": ANNOTATIONS,
    "categories": CATEGORIES,
}


def _annotated(key, name, size, *regions, **more):
    return Annotated(str(key), name, tuple(RawRegion(*region) for region in regions), size=size, **more)


EXPECTED = [
    _annotated(397133, "000000397133.jpg", (640, 427), ((388, 69, 497, 346), "person"), ((-5, 10, 15, 510), "laptop")),
    _annotated(37777, "000000037777.jpg", (352, 230), ((0, 0, 352, 230), "bicycle")),
    _annotated(252219, "000000252219.jpg", (640, 428), ((473.07, 395.93, 511.72, 424.6), "dog"),
               ((326.25, 174.5, 397.5, 371.5), "person")),
    _annotated(87038, "000000087038.jpg", (640, 480), refused=(("annotation 900100", "box holds a crowd of objects"),)),
    _annotated(174482, "000000174482.jpg", (640, 388), ((10.5, 20.25, 10.5, 25.25), "laptop")),
    _annotated(403385, "000000403385.jpg", (500, 375), ((100, 100, 150, 125.5), "dog")),
    _annotated(6818, "000000006818.jpg", (427, 640), ((1, 1, 3, 3), "bicycle")),
    _annotated(480985, "000000480985.jpg", (500, 376), ((250, 125, 500, 376), "person")),
    _annotated(458054, "000000458054.jpg", (640, 480), ((0.25, 0.5, 1, 1.5), "person")),
    _annotated(331352, "000000331352.jpg", (500, 375)),
]


def _same(found, expected):
    """Equal but for the rounding of x + width."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert [r.caption for r in one.regions] == [r.caption for r in other.regions]
        for region, wanted in zip(one.regions, other.regions, strict=True):
            assert region.box == pytest.approx(wanted.box, abs=1e-9)
        assert (one.id, one.image, one.global_caption, one.size, one.refused) == (
            other.id, other.image, other.global_caption, other.size, other.refused
        )
        assert (one.unit, one.frame) == ("absolute", "image")


def test_instances(tmp_path):
    reader = Coco(write_json(tmp_path / "instances_val2017.json", INSTANCES))
    assert reader.parts() == ("instances_val2017.json",)
    _same(everything(reader), EXPECTED)


def test_regions_without_captions_need_no_categories(tmp_path):
    path = write_json(tmp_path / "instances.json", INSTANCES | {"categories": []})
    found = everything(Coco(path, region_caption="none"))
    assert [r.caption for item in found for r in item.regions] == [""] * 10
    found = everything(Coco(path))
    assert not any(item.regions for item in found)
    assert found[1].refused == (("annotation 1774", "category of the annotation has no entry"),)


def test_objects365(tmp_path):
    tree = {
        "images": [
            {"height": 512, "width": 769, "id": 420917, "license": 5, "file_name": "images/v1/patch8/objects365_v1_00420917.jpg",
             "url": "http://farm1.staticflickr.com/b.jpg"},
            {"height": 400, "width": 300, "id": 908726, "license": 3, "file_name": "images/v2/patch16/objects365_v2_00908726.jpg",
             "url": "http://farm2.staticflickr.com/c.jpg"},
        ],
        "annotations": [
            {"id": 1, "iscrowd": 0, "isfake": 0, "area": 1665.06, "isreflected": 0, "bbox": [544.5, 217.25, 54.25, 30.5],
             "image_id": 420917, "category_id": 95},
            {"id": 2, "iscrowd": 1, "isfake": 0, "area": 50.0, "isreflected": 0, "bbox": [1, 2, 3, 4], "image_id": 908726,
             "category_id": 1},
        ],
        "categories": [{"name": "Person", "id": 1}, {"name": "Pillow", "id": 95}],
        "licenses": [],
    }
    assert everything(Coco(write_json(tmp_path / "zhiyuan_objv2_train.json", tree))) == [
        _annotated(420917, "images/v1/patch8/objects365_v1_00420917.jpg", (769, 512),
                   ((544.5, 217.25, 598.75, 247.75), "Pillow")),
        _annotated(908726, "images/v2/patch16/objects365_v2_00908726.jpg", (300, 400),
                   refused=(("annotation 2", "box holds a crowd of objects"),)),
    ]


CAPTIONS = {
    "info": {}, "licenses": [], "images": IMAGES[:3],
    "annotations": [
        {"image_id": 37777, "id": 1, "caption": "A small kitchen."},
        {"image_id": 397133, "id": 2, "caption": "A man in a kitchen making pizzas."},
        {"image_id": 397133, "id": 1773, "caption": "Man in apron standing."},
        {"image_id": 37777, "id": 4, "caption": "The kitchen is clean."},
    ],
}


def test_captions_alone_and_beside_boxes(tmp_path):
    captions = write_json(tmp_path / "captions.json", CAPTIONS)
    assert everything(Coco(captions)) == [
        _annotated(397133, "000000397133.jpg", (640, 427), global_caption="A man in a kitchen making pizzas."),
        _annotated(37777, "000000037777.jpg", (352, 230), global_caption="A small kitchen."),
        _annotated(252219, "000000252219.jpg", (640, 428)),
    ]
    found = everything(Coco(write_json(tmp_path / "instances.json", INSTANCES), captions, caption_number=1))
    assert [item.global_caption for item in found] == ["Man in apron standing.", "The kitchen is clean."] + [None] * 8
    assert [len(item.regions) for item in found] == [2, 1, 2, 0, 1, 1, 1, 1, 1, 0]  # equal ids of two files do not clash


RESULTS = [
    {"image_id": 397133, "category_id": 1, "bbox": [388.5, 69, 100, 200], "score": 0.9},
    {"image_id": 397133, "category_id": 73, "bbox": [1, 2, 3, 4], "score": 0.05},
    {"image_id": 252219, "category_id": 18, "bbox": [10, 10, 20, 20], "score": 0.5},
    {"image_id": 37777, "category_id": 2, "bbox": [0, 0, 352, 230], "score": 0.499},
    {"image_id": 397133, "category_id": 18, "bbox": [5, 6, 7, 8], "score": 0.6},
    {"image_id": 6818, "category_id": 1, "bbox": [1, 1, 1, 1], "score": 1},
    {"image_id": 999, "category_id": 1, "bbox": [1, 1, 1, 1], "score": 0.9},
    {"image_id": 6818, "category_id": 1, "bbox": [1, 1, 1], "score": 0.9},
    {"image_id": 6818, "category_id": 5, "bbox": [1, 1, 1, 1], "score": 0.9},
    {"image_id": 6818, "category_id": 1, "bbox": [1, 1, 1, 1], "score": "0.9"},
    {"category_id": 1, "bbox": [1, 1, 1, 1], "score": 0.9},
    [397133, 1],
]


def test_results_of_a_detector(tmp_path):
    images = write_json(tmp_path / "image_info.json", INSTANCES | {"images": [*IMAGES[:3], IMAGES[6]]})
    reader = CocoResults(write_json(tmp_path / "results.json", RESULTS), images, threshold=0.5)
    assert reader.parts() == ("results.json",)
    assert everything(reader) == [
        Refused("result 1", "score is below the threshold"),
        Refused("result 3", "score is below the threshold"),
        Refused("result 9", "score is not a number"),
        Refused("result 10", "image id of the annotation is neither a whole number nor text"),
        Refused("result 11", "result is not a mapping"),
        _annotated(397133, "000000397133.jpg", (640, 427), ((388.5, 69, 488.5, 269), "person"), ((5, 6, 12, 14), "dog")),
        _annotated(37777, "000000037777.jpg", (352, 230)),
        _annotated(252219, "000000252219.jpg", (640, 428), ((10, 10, 30, 30), "dog")),
        _annotated(6818, "000000006818.jpg", (427, 640), ((1, 1, 2, 2), "person"), refused=(
            ("result 7", "box is not four numbers"), ("result 8", "category of the annotation has no entry"))),
        Refused("result 6", "image of the annotation has no entry"),
    ]


def test_what_cannot_be_read_is_refused(tmp_path):
    tree = {
        "images": [
            IMAGES[0],
            IMAGES[0] | {"file_name": "other.jpg"},
            {"id": 4, "width": 5, "height": 5},
            {"id": None, "file_name": "a.jpg"},
            "000.jpg",
            {"id": 6, "file_name": "b.jpg", "width": "5", "height": 5},
        ],
        "annotations": [
            _box(1, 397133, 1, [1, 2, 3, 4]),
            _box(1, 397133, 1, [5, 6, 7, 8]),
            _box(2, 397133, 1, None),
            _box(3, 397133, 77, [1, 2, 3, 4]),
            _box(4, 12345, 1, [1, 2, 3, 4]),
            _box(5, None, 1, [1, 2, 3, 4]),
            _box([6], 397133, 1, [1, 2, 3, 4]),
            None,
            {"image_id": 397133, "id": 9, "caption": 7},
        ],
        "categories": [*CATEGORIES, {"id": 1, "name": "again"}, {"id": 90, "name": None}, 3],
    }
    found = everything(Coco(write_json(tmp_path / "instances.json", tree)))
    assert set(found[:-4]) == {
        Refused("images 1", "image id appears twice"),
        Refused("images 3", "image id is neither a whole number nor text"),
        Refused("images 4", "entry is not a mapping"),
        Refused("annotations 5", "image id of the annotation is neither a whole number nor text"),
        Refused("annotations 6", "annotation id is neither a whole number nor text"),
        Refused("annotations 7", "entry is not a mapping"),
        Refused("categories 4", "category id appears twice"),
        Refused("categories 5", "name of the category is not text"),
        Refused("categories 6", "entry is not a mapping"),
    }
    assert found[-4:] == [
        _annotated(397133, "000000397133.jpg", (640, 427), ((1, 2, 4, 6), "person"), refused=(
            ("annotation 1", "annotation id appears twice"),
            ("annotation 2", "box is not four numbers"),
            ("annotation 3", "category of the annotation has no entry"),
            ("annotation 9", "caption is not text"),
        )),
        Refused("image 4", "image has no file_name"),
        _annotated(6, "b.jpg", None),
        Refused("annotation 4", "image of the annotation has no entry"),
    ]


@pytest.mark.parametrize("drop", [1, 30, 400, 2000])
def test_a_file_that_is_cut_off_is_refused_as_a_whole(tmp_path, drop):
    whole = write_json(tmp_path / "whole.json", INSTANCES)
    cut = write_json(tmp_path / "cut.json", INSTANCES, drop)
    refused = [Refused("cut.json", "file ends in the middle")]
    assert everything(Coco(cut)) == refused
    assert everything(Coco(whole, captions=cut)) == refused
    assert everything(CocoResults(write_json(tmp_path / "cut.json", RESULTS[:9], min(drop, 500)), whole)) == refused


def test_other_formats_are_named(tmp_path):
    other = write_json(tmp_path / "other.json", {"imgs": {}, "images": []})
    listed = write_json(tmp_path / "listed.json", RESULTS)
    good = write_json(tmp_path / "good.json", INSTANCES)
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\x89PNG")
    for reader, name in [(Coco(other), "other"), (Coco(listed), "listed"), (Coco(binary), "binary"), (Coco(good, other), "other"),
                         (CocoResults(good, good), "good"), (CocoResults(listed, other), "other")]:
        with pytest.raises(ValueError, match=rf"{name}\.json"):
            everything(reader)


def test_missing_files_are_named(tmp_path):
    good = write_json(tmp_path / "good.json", INSTANCES)
    for reader, key in [(Coco(tmp_path / "none"), "file"), (Coco(good, tmp_path / "none"), "captions"),
                        (CocoResults(tmp_path / "none", good), "results"), (CocoResults(good, tmp_path / "none"), "images")]:
        with pytest.raises(ValueError, match=rf"{key} .*none"):
            reader.parts()


def test_memory_does_not_grow_with_the_file(tmp_path):
    """10 MB of JSON, with the images last, so that nothing can be joined before the end."""
    path = tmp_path / "instances.json"
    with open(path, "w") as file:
        file.write('{"annotations": [')
        for key in range(1500):
            mask = {"size": [480, 640], "counts": "1" * 6500}
            file.write(json.dumps(_box(key, key % 100, 1, [1.0, 2.0, 3.0, 4.0]) | {"segmentation": mask}) + ",")
        file.write(json.dumps(_box(-1, 0, 1, [0, 0, 1, 1])) + '], "categories": ' + json.dumps(CATEGORIES) + ', "images": [')
        file.write(",".join(json.dumps(_image(key, f"{key}.jpg")) for key in range(100)) + "]}")
    assert path.stat().st_size > 10e6
    tracemalloc.start()
    try:
        boxes = sum(len(item.regions) for item in Coco(path).read("instances.json"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert boxes == 1501
    assert peak < 3e6
