import json
import os
import pickle
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.refcoco import RefCoco, RefCocoImages, RefCocoTable
from tests.sources.reading import everything, write_json


def _python2(value) -> bytes:
    """`value` as Python 2 pickles it with protocol 2, without the memo: text is bytes, of latin-1; `unicode` is a tuple."""
    if isinstance(value, dict):
        return b"}(" + b"".join(map(_python2, [part for item in value.items() for part in item])) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, tuple):
        data = value[0].encode()
        return b"X" + struct.pack("<i", len(data)) + data
    if isinstance(value, str):
        data = value.encode("latin-1")
        return b"U" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if value is None:
        return b"N"
    return b"J" + struct.pack("<i", value)


def _write_pickle(path, references):
    path.write_bytes(b"\x80\x02" + _python2(references) + b".")
    return path


def _reference(key, annotation, image, split, *sentences):
    return {
        "sent_ids": list(range(len(sentences))), "file_name": f"COCO_train2014_{image:012}_{key}.jpg", "ann_id": annotation,
        "ref_id": key, "image_id": image, "split": split, "category_id": 1,
        "sentences": [{"tokens": sent.split(), "raw": sent.upper(), "sent_id": number, "sent": sent}
                      for number, sent in enumerate(sentences)],
    }


REFERENCES = [
    _reference(0, 1719310, 581857, "train", "the lady with the blue shirt", "lady w back to us", "blue shirt"),
    _reference(1, 1719320, 581857, "train", "girl", "caf\xe9 girl"),
    _reference(2, 5, 581831, "train", "left \xbd"),
    _reference(3, 6, 100, "val", "only in val"),
    _reference(4, 7, 101, "train", "a", "b"),
    _reference(5, 8, 101, "train"),
    _reference(6, 9, 102, "testA", "man"),
    _reference(7, 10, 103, "train", "inverted box"),
    _reference(8, 11, 104, "train", "box outside"),
    _reference(9, 12, 105, "train", "same", "same"),
    _reference(10, 13, 106, "train", "dog"),
    _reference(11, 14, 107, "train", "cat"),
    _reference(12, 15, 108, "train", "bird"),
    _reference(13, 16, 109, "train", "fish"),
]


def _image(key, width=640, height=480):
    return {"license": 1, "file_name": f"COCO_train2014_{key:012}.jpg", "coco_url": f"http://mscoco.org/images/{key}",
            "height": height, "width": width, "date_captured": "2013-11-18 22:07:47", "id": key,
            "flickr_url": "http://farm9.staticflickr.com/8199/8231169440_z.jpg"}


def _box(key, image, box):
    return {"segmentation": [[1.0, 2.0, 3.0, 2.0, 3.0, 4.0]], "area": 197.3, "iscrowd": 0, "image_id": image, "bbox": box,
            "category_id": 1, "id": key}


INSTANCES = {
    "info": {"description": "This is stable 1.0 version of the 2014 MS COCO dataset."},
    "images": [_image(key, *size) for key, size in [
        (581831, (427, 640)), (100, ()), (581857, ()), (101, ()), (102, ()), (103, ()), (104, ()), (105, ()), (106, ()),
        (107, ()), (108, ()), (109, ()), (110, ())]],
    "licenses": [],
    "annotations": [
        _box(1719310, 581857, [103.5, 299.25, 238.5, 177.75]),
        _box(5, 581831, [1, 2, 3, 4]), _box(6, 100, [1, 1, 1, 1]), _box(7, 101, [5, 5, 10, 10]), _box(8, 101, [0, 0, 1, 1]),
        _box(9, 102, [1, 1, 1, 1]), _box(10, 103, [9, 9, -8, -7]), _box(11, 104, [600, 400, 300, 300]),
        _box(12, 105, [0, 0, 640, 480]), _box(1719320, 581857, [74.5, 83.25, 300, 400]), _box(13, 106, [1, 2, 1, 1]),
        _box(14, 107, [2, 2, 1, 1]), _box(15, 108, [3, 2, 1, 1]), _box(16, 109, [4.5, 2, 1, 1]), _box(99, 101, [7, 7, 7, 7]),
    ],
    "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
}


def _annotated(key, size, *regions, refused=()):
    return Annotated(str(key), f"COCO_train2014_{key:012}.jpg", tuple(RawRegion(*region) for region in regions), size=size,
                     refused=refused)


LADY, GIRL = (103.5, 299.25, 342, 477), (74.5, 83.25, 374.5, 483.25)
EXPECTED = [
    _annotated(581831, (427, 640), ((1, 2, 4, 6), "left \xbd")),
    _annotated(581857, (640, 480), (LADY, "the lady with the blue shirt"), (LADY, "lady w back to us"), (LADY, "blue shirt"),
               (GIRL, "girl"), (GIRL, "caf\xe9 girl")),
    _annotated(101, (640, 480), ((5, 5, 15, 15), "a"), ((5, 5, 15, 15), "b")),
    _annotated(103, (640, 480), ((9, 9, 1, 2), "inverted box")),
    _annotated(104, (640, 480), ((600, 400, 900, 700), "box outside")),
    _annotated(105, (640, 480), ((0, 0, 640, 480), "same"), ((0, 0, 640, 480), "same")),
    _annotated(106, (640, 480), ((1, 2, 2, 3), "dog")),
    _annotated(107, (640, 480), ((2, 2, 3, 3), "cat")),
    _annotated(108, (640, 480), ((3, 2, 4, 3), "bird")),
    _annotated(109, (640, 480), ((4.5, 2, 5.5, 3), "fish")),
]


def _reader(folder, references=None, instances=INSTANCES, split="train"):
    path = folder / "refs(unc).p"
    if references is not None:
        _write_pickle(path, references)
    return RefCoco(path, write_json(folder / "instances.json", instances), split)


def test_references_of_a_pickle_of_python_2(tmp_path):
    reader = _reader(tmp_path, REFERENCES)
    assert reader.parts() == ("refs(unc).p",)
    assert everything(reader) == EXPECTED


def test_other_splits(tmp_path):
    assert everything(_reader(tmp_path, REFERENCES, split="testA")) == [_annotated(102, (640, 480), ((1, 1, 2, 2), "man"))]
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p.*testB.*testA, train, val"):
        everything(_reader(tmp_path, REFERENCES, split="testB"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_python_3(tmp_path, protocol):
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(REFERENCES, protocol))
    assert everything(_reader(tmp_path)) == EXPECTED


def test_the_oldest_protocol_of_python_2(tmp_path):
    (tmp_path / "refs(unc).p").write_bytes(
        b"(lp0\n(dp1\nS'ref_id'\np2\nI2\nsS'ann_id'\np3\nL5L\nsS'image_id'\nI581831\nsS'split'\nS'train'\np4\nsS'sentences'\n"
        b"(lp5\n(dp6\nS'sent'\np7\nS'caf\\xe9'\np8\nsa(dp9\ng7\nV\\u2603\np10\nsasa."
    )
    assert everything(_reader(tmp_path)) == [_annotated(581831, (427, 640), ((1, 2, 4, 6), "caf\xe9"), ((1, 2, 4, 6), "\u2603"))]


class _Calls:
    def __reduce__(self):
        return os.mkdir, (os.environ["GRANVIT_TEST_FOLDER"],)


class _Plain:
    pass


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_code_is_refused_by_name_and_not_run(tmp_path, monkeypatch, protocol):
    monkeypatch.setenv("GRANVIT_TEST_FOLDER", str(tmp_path / "made"))
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([*REFERENCES, _Calls()], protocol))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p.*posix\.mkdir"):
        everything(_reader(tmp_path))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("value, name", [
    (_Plain(), "test_refcoco._Plain|_reconstructor"), ({1, 2}, "set|builtins"), (b"ab", "_codecs.encode"), (3j, "complex"),
    (os.system, "system"), (range(3), "range"),
])
def test_everything_but_plain_values_is_refused_by_name(tmp_path, value, name):
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([*REFERENCES, value], 2))
    with pytest.raises(ValueError, match=name):
        everything(_reader(tmp_path))


@pytest.mark.parametrize("data", [
    b"{}", b"\x89PNG\r\n\x1a\n", b"\x80\x02}.", b"\x80\xff.", b"\x80\x02K\x01R.", b"\x80\x02\x82\x01.", b"\x80\x02U\x01aQ.",
    b"\x80\x02](K\x01b.", b"\x80\x02U\x01a)R.", b"\x80\x02U\x01a)\x81.", b"(i__main__\nX\n.",
])
def test_other_formats_are_named(tmp_path, data):
    (tmp_path / "refs(unc).p").write_bytes(data)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p"):
        everything(_reader(tmp_path))


def test_other_formats_of_the_instances_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"instances\.json"):
        everything(_reader(tmp_path, REFERENCES, {"imgs": 1}))
    with pytest.raises(ValueError, match=r"references .*none"):
        RefCoco(tmp_path / "none", tmp_path / "instances.json").parts()
    with pytest.raises(ValueError, match=r"instances .*none"):
        RefCoco(tmp_path / "refs(unc).p", tmp_path / "none").parts()


def test_files_that_are_cut_off_are_refused_as_a_whole(tmp_path):
    reader = _reader(tmp_path, REFERENCES)
    write_json(tmp_path / "instances.json", INSTANCES, 700)
    assert everything(reader) == [Refused("instances.json", "file ends in the middle")]
    whole = (tmp_path / "refs(unc).p").read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 10):
        (tmp_path / "refs(unc).p").write_bytes(whole[:size])
        assert everything(reader) == [Refused("refs(unc).p", "file ends in the middle")]


def test_what_cannot_be_read_is_refused(tmp_path):
    references = [
        _reference(0, 5, 581831, "train", "first"),
        _reference(0, 5, 581831, "train", "again"),
        _reference(1, 999, 581831, "train", "no annotation"),
        _reference(2, 6, 77, "train", "no image"),
        _reference(3, 5, 581831, "train", "x") | {"sentences": None},
        _reference(4, 5, 581831, "train", "x") | {"sentences": [{"raw": "x"}, "x", {"sent": 5}, {"sent": "good"}]},
        _reference(5, 5, 581831, "train", "x") | {"ann_id": 5.0},
        _reference(6, 5, 581831, "train", "x") | {"ref_id": None},
        "reference",
        _reference(7, 5, 581831, "train", "x") | {"image_id": [1]},
        _reference(8, 8, 103, "train", "bad box"),
        _reference(9, 9, 104, "train", "no file name"),
        _reference(10, 5, 581831, "train", "x") | {"split": ["train"]},
    ]
    instances = INSTANCES | {
        "images": [_image(581831), _image(581831), "image", _image(103), {"id": 104}],
        "annotations": [_box(5, 581831, [1, 2, 3, 4]), _box(5, 581831, [9, 9, 9, 9]), _box(None, 103, [1, 2, 3, 4]), "box",
                        _box(8, 103, [1, 2, 3]), _box(9, 104, [1, 2, 3, 4])],
    }
    sentences = ("reference 4", "sentence is not text")
    assert everything(_reader(tmp_path, references, instances)) == [
        Refused("reference 4 of the file", "sentences are not a list"),
        Refused("reference 6 of the file", "ann_id is neither a whole number nor text"),
        Refused("reference 7 of the file", "ref_id is neither a whole number nor text"),
        Refused("reference 8 of the file", "reference is not a mapping"),
        Refused("reference 9 of the file", "image id of the annotation is neither a whole number nor text"),
        Refused("images 1", "image id appears twice"),
        Refused("images 2", "entry is not a mapping"),
        Refused("annotations 2", "annotation id is neither a whole number nor text"),
        Refused("annotations 3", "entry is not a mapping"),
        _annotated(581831, (640, 480), ((1, 2, 4, 6), "first"), ((1, 2, 4, 6), "good"), refused=(
            ("annotation 5", "annotation id appears twice"), ("reference 0", "reference id appears twice"),
            ("reference 1", "annotation of the reference has no entry"), sentences, sentences, sentences)),
        _annotated(103, (640, 480), refused=(("reference 8", "box is not four numbers"),)),
        Refused("image 104", "image has no file_name"),
        Refused("reference 2", "image of the reference has no entry"),
    ]


SENTENCE = pa.struct([("raw", pa.string()), ("sent", pa.string()), ("sent_id", pa.int64()), ("tokens", pa.list_(pa.string()))])
TABLE = pa.schema([
    ("sent_ids", pa.list_(pa.int64())), ("file_name", pa.string()), ("ann_id", pa.int64()), ("ref_id", pa.int64()),
    ("image_id", pa.int64()), ("split", pa.string()), ("sentences", pa.list_(SENTENCE)), ("category_id", pa.int64()),
    ("raw_anns", pa.string()), ("raw_image_info", pa.string()), ("raw_sentences", pa.string()), ("image_path", pa.string()),
    ("bbox", pa.list_(pa.float64())), ("captions", pa.list_(pa.string())), ("global_image_id", pa.string()),
    ("anns_id", pa.string()),
])


def _table_row(reference):
    box = next(box for box in INSTANCES["annotations"] if box["id"] == reference["ann_id"])
    image = next(image for image in INSTANCES["images"] if image["id"] == reference["image_id"])
    x, y, width, height = box["bbox"]
    return reference | {
        "raw_anns": json.dumps(box), "raw_image_info": json.dumps(image), "raw_sentences": json.dumps(reference["sentences"]),
        "image_path": f"coco/train2014/{image['file_name']}", "bbox": [x, y, x + width, y + height],
        "captions": [sentence["sent"] for sentence in reference["sentences"]],
        "global_image_id": f"coco.{image['id']}", "anns_id": str(box["id"]),
    }


def test_parquet_without_images(tmp_path):
    rows = [_table_row(reference) for reference in REFERENCES if reference["split"] == "train"]
    # One image's references lie in both files.
    pq.write_table(pa.Table.from_pylist(rows[:1], TABLE), tmp_path / "train-00000-of-00002-3f.parquet")
    pq.write_table(pa.Table.from_pylist(rows[1:], TABLE), tmp_path / "train-00001-of-00002-3f.parquet")
    pq.write_table(pa.Table.from_pylist([_table_row(REFERENCES[3])], TABLE), tmp_path / "validation-00000-of-00001-3f.parquet")
    reader = RefCocoTable(tmp_path)
    assert reader.parts() == ("train",)
    expected = [Annotated(item.id, f"coco/train2014/{item.image}", item.regions, size=item.size) for item in EXPECTED]
    assert everything(reader) == [expected[1], expected[0], *expected[2:]]  # in the order of the rows
    assert everything(RefCocoTable(tmp_path, "validation")) == [
        Annotated("100", "coco/train2014/COCO_train2014_000000000100.jpg", (RawRegion((1, 1, 2, 2), "only in val"),),
                  size=(640, 480))
    ]


def test_bad_rows_of_parquet_without_images(tmp_path):
    good = _table_row(REFERENCES[0])
    rows = [good, good, good | {"ref_id": 20, "bbox": [1.0]}, good | {"ref_id": 21, "sentences": None},
            good | {"ref_id": 22, "image_id": None}, good | {"ref_id": 23, "image_id": 5, "raw_image_info": "{"},
            good | {"ref_id": 24, "image_path": None}]
    pq.write_table(pa.Table.from_pylist(rows, TABLE), tmp_path / "train-0.parquet")
    path = "coco/train2014/COCO_train2014_000000581857.jpg"
    regions = EXPECTED[1].regions[:3]
    assert everything(RefCocoTable(tmp_path)) == [
        Refused("row 3 of train-0.parquet", "sentences are not a list"),
        Refused("row 4 of train-0.parquet", "image id of the annotation is neither a whole number nor text"),
        Refused("row 6 of train-0.parquet", "image_path is not text"),
        Annotated("581857", path, regions, size=(640, 480), refused=(
            ("reference 0", "reference id appears twice"), ("reference 20", "box is not four numbers"))),
        Annotated("5", path, regions),
    ]


IMAGES = pa.schema([
    ("question_id", pa.string()), ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ("question", pa.string()), ("answer", pa.list_(pa.string())), ("segmentation", pa.list_(pa.float32())),
    ("bbox", pa.list_(pa.float32())), ("iscrowd", pa.int8()), ("file_name", pa.string()),
])


def _image_row(data, box, answer):
    return {"question_id": "1", "image": None if data is None else {"bytes": data, "path": None},
            "question": "Please write a caption.", "answer": answer, "segmentation": [1.0, 2.0], "bbox": box, "iscrowd": 0,
            "file_name": "COCO_train2014_000000000001_0.jpg"}


IMAGE_ROWS = [
    _image_row(b"jpg0", [1.5, 2, 3, 4], ["a man", "left man"]),
    _image_row(b"jpg0", [10, 20, 30, 40], ["dog"]),
    _image_row(b"jpg1", [0, 0, 5, 5], []),
    _image_row(b"jpg2", [0, 0, 5, 5], ["x", None]),
    _image_row(b"jpg3", [0, 0, 5], ["x"]),
    _image_row(None, [0, 0, 5, 5], ["x"]),
    _image_row(b"", [0, 0, 5, 5], ["x"]),
    _image_row(b"jpg4", [0, 0, 5, 5], None),
    _image_row(b"jpg5", None, ["x"]),
    _image_row(b"jpg6", [5, 5, -5, 5], ["ü"]),
]
EXPECTED_IMAGES = [
    Annotated("val-00000-of-00004/0", b"jpg0", (RawRegion((1.5, 2, 4.5, 6), "a man"), RawRegion((1.5, 2, 4.5, 6), "left man"))),
    Annotated("val-00000-of-00004/1", b"jpg0", (RawRegion((10, 20, 40, 60), "dog"),)),
    Annotated("val-00000-of-00004/2", b"jpg1"),
    Annotated("val-00000-of-00004/3", b"jpg2", (RawRegion((0, 0, 5, 5), "x"),),
              refused=(("val-00000-of-00004/3", "sentence is not text"),)),
    Refused("val-00000-of-00004/4", "box is not four numbers"),
    Refused("val-00000-of-00004/5", "image has no bytes"),
    Refused("val-00000-of-00004/6", "image has no bytes"),
    Refused("val-00000-of-00004/7", "sentences are not a list"),
    Refused("val-00000-of-00004/8", "box is not four numbers"),
    Annotated("val-00000-of-00004/9", b"jpg6", (RawRegion((5, 5, 0, 10), "ü"),)),
]


def test_parquet_with_images(tmp_path):
    for name in ("val-00000-of-00004", "val-00001-of-00004", "testA-00000-of-00001"):
        rows = IMAGE_ROWS if name.startswith("val-00000") else IMAGE_ROWS[:1]
        pq.write_table(pa.Table.from_pylist(rows, IMAGES), tmp_path / f"{name}.parquet")
    reader = RefCocoImages(tmp_path)
    assert reader.parts() == ["val-00000-of-00004.parquet", "val-00001-of-00004.parquet"]
    assert everything(reader) == [*EXPECTED_IMAGES, Annotated("val-00001-of-00004/0", b"jpg0", EXPECTED_IMAGES[0].regions)]


@pytest.mark.parametrize("reader", [RefCocoTable, RefCocoImages])
def test_bad_parquet_files(tmp_path, reader):
    with pytest.raises(ValueError, match=r"none"):
        reader(tmp_path / "none").parts()
    with pytest.raises(ValueError, match=r"has no file val-"):
        reader(tmp_path, "val").parts()
    path = tmp_path / "val-0.parquet"
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"val-0\.parquet"):
        everything(reader(tmp_path, "val"))
    path.write_bytes(b"PAR1" + bytes(20))
    assert everything(reader(tmp_path, "val")) == [Refused("val-0.parquet", "file ends in the middle")]
    pq.write_table(pa.table({"image": [1]}), path)
    with pytest.raises(ValueError, match=r"val-0\.parquet: has no column"):
        everything(reader(tmp_path, "val"))
