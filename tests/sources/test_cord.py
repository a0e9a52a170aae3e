"""CORD's JSON and Parquet."""
import json

import pytest

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.cord import Cord, CordParquet
from tests.sources.reading import everything


def _word(text, x1, y1, x2, y2, tilt=0):
    quad = {"x2": x2, "y3": y2 + tilt, "x3": x2, "y4": y2, "x1": x1, "y1": y1, "x4": x1, "y2": y1 + tilt}
    return {"quad": quad, "is_key": 0, "row_id": 2179893, "text": text}


def _receipt(number):
    """A receipt of three fields; the second has words in two rows of print."""
    return {
        "gt_parse": {"menu": {"nm": "Nasi Campur Bali", "price": f"{number},000"}},
        "meta": {"version": "2.0.0", "split": "train", "image_id": number, "image_size": {"width": 864, "height": 1296 + number}},
        "valid_line": [
            {"words": [_word("1", 100, 50, 110, 70), _word("x", 120, 52, 130, 70)], "category": "menu.cnt", "group_id": 3},
            {
                "words": [_word("Nasi", 150, 50, 200, 70), _word("Campur", 205, 48, 280, 70), _word("Bali", 150, 75, 190, 95)],
                "category": "menu.nm", "group_id": 3, "sub_group_id": 0,
            },
            {"words": [_word(f"{number},000", 600, 50, 680, 70, tilt=4)], "category": "menu.price", "group_id": 3},
        ],
        "roi": {"x2": 800, "y3": 1200, "x3": 800, "y4": 1200, "x1": 40, "y1": 10, "x4": 40, "y2": 10},
        "repeating_symbol": [[{"quad": {"x1": 1, "y1": 1}, "text": "="}]],
        "dontcare": [],
    }  # fmt: skip


def _lines(number):
    return (
        RawRegion((100, 50, 130, 70), "1 x"),
        RawRegion((150, 48, 280, 95), "Nasi Campur Bali"),
        RawRegion((600, 50, 680, 74), f"{number},000"),
    )


def _words(number):
    return (
        RawRegion((100, 50, 110, 70), "1"), RawRegion((120, 52, 130, 70), "x"), RawRegion((150, 50, 200, 70), "Nasi"),
        RawRegion((205, 48, 280, 70), "Campur"), RawRegion((150, 75, 190, 95), "Bali"),
        RawRegion((600, 50, 680, 74), f"{number},000"),
    )  # fmt: skip


def _write(folder, trees):
    for number, tree in enumerate(trees):
        (folder / f"receipt_{number:05d}.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("level, regions", [("line", _lines), ("word", _words)])
def test_receipts_of_json_files(tmp_path, level, regions):
    _write(tmp_path, map(_receipt, range(10)))
    assert everything(Cord(tmp_path, level)) == [
        Annotated(f"receipt_{n:05d}.png", f"receipt_{n:05d}.png", regions(n), size=(864, 1296 + n)) for n in range(10)
    ]


def _rows(trees):
    return [{"image": {"bytes": b"png %d" % n, "path": None}, "ground_truth": json.dumps(tree)} for n, tree in enumerate(trees)]


def _write_parquet(path, rows, **options):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, **options)


@pytest.mark.parametrize("level, regions", [("line", _lines), ("word", _words)])
def test_receipts_of_parquet_files(tmp_path, level, regions):
    _write_parquet(tmp_path / "train-00000-of-00002.parquet", _rows(map(_receipt, range(10))))
    _write_parquet(tmp_path / "train-00001-of-00002.parquet", _rows(map(_receipt, range(2))))
    assert everything(CordParquet(tmp_path, level)) == [
        Annotated(f"train-{file:05d}-of-00002.parquet row {n}", b"png %d" % n, regions(n), size=(864, 1296 + n))
        for file, rows in enumerate((10, 2))
        for n in range(rows)
    ]


def test_bad_fields_are_refused_and_others_stay(tmp_path):
    tree = _receipt(7)
    tree["valid_line"][0]["words"][1]["quad"]["x3"] = "130"
    tree["valid_line"][1]["words"] += [{"text": "x"}, "x"]
    tree["valid_line"] += ["x", {"words": []}, {"words": [_word(5, 1, 2, 3, 4)]}, {"words": [_word(None, 1, 2, 3, 4)]}]
    tree["meta"]["image_size"] = [864, 1296]
    _write(tmp_path, [tree])
    (record,) = everything(Cord(tmp_path))
    assert record.regions == (_lines(7)[2], RawRegion((1, 2, 3, 4), "")) and record.size is None
    assert record.refused == (
        ("line 0", "a point is not two numbers"), ("line 1", "word has no quad"), ("line 3", "line has no list of words"),
        ("line 4", "line has no list of words"), ("line 5", "caption is not text"),
    )  # fmt: skip
    (record,) = everything(Cord(tmp_path, "word"))
    assert record.regions == (*_words(7)[:1], *_words(7)[2:], RawRegion((1, 2, 3, 4), ""))
    assert record.refused == (
        ("line 0 word 1", "a point is not two numbers"), ("line 1 word 3", "word has no quad"),
        ("line 1 word 4", "word has no quad"), ("line 3", "line has no list of words"),
        ("line 4", "line has no list of words"), ("line 5 word 0", "caption is not text"),
    )  # fmt: skip


def test_damaged_files_and_files_of_another_format(tmp_path):
    _write(tmp_path, [_receipt(0)])
    whole = (tmp_path / "receipt_00000.json").read_text()
    (tmp_path / "receipt_00001.json").write_text(whole[:-100])
    (tmp_path / "receipt_00002.json").write_text('{"images": [], "annotations": []}')
    (tmp_path / "receipt_00003.json").write_text("[" * 100_000)
    (tmp_path / "receipt_00004.json").write_text(json.dumps(_receipt(0) | {"valid_line": {}}))
    (tmp_path / "receipt_00006.json").write_text(whole[: whole.index("Campur") + 3])
    (tmp_path / "receipt_00007.json").write_text(whole.replace(":", "", 1))
    (tmp_path / "receipt_00008.json").write_bytes(b'{"\xff": 5}')
    (tmp_path / "receipt_00005.json").write_bytes(b"\xef\xbb\xbf" + whole.encode())
    first, *rest = everything(Cord(tmp_path))
    assert first.regions == rest.pop(4).regions == _lines(0)
    assert rest == [
        Refused("receipt_00001.json", "file ends in the middle"), Refused("receipt_00002.json", "file is of another format"),
        Refused("receipt_00003.json", "file is not valid JSON"), Refused("receipt_00004.json", "valid_line is not a list"),
        Refused("receipt_00006.json", "file ends in the middle"), Refused("receipt_00007.json", "file is not valid JSON"),
        Refused("receipt_00008.json", "file is not valid JSON"),
    ]  # fmt: skip
    (tmp_path / "receipt_00000.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(ValueError, match=r"receipt_00000\.json.*CORD"):
        everything(Cord(tmp_path))


def test_damaged_parquet_files_and_other_tables(tmp_path):
    path = tmp_path / "a.parquet"
    rows = _rows([_receipt(0)] * 4)
    rows[1] = {"image": None, "ground_truth": rows[1]["ground_truth"]}
    rows[2] = {"image": rows[2]["image"], "ground_truth": "{"}
    rows[3] = {"image": rows[3]["image"], "ground_truth": "{}"}
    _write_parquet(path, rows)
    assert everything(CordParquet(tmp_path))[1:] == [
        Refused("a.parquet row 1", "row has no bytes of an image"), Refused("a.parquet row 2", "ground_truth is not valid JSON"),
        Refused("a.parquet row 3", "ground_truth has no valid_line"),
    ]  # fmt: skip
    path.write_bytes(path.read_bytes()[:-30])
    assert everything(CordParquet(tmp_path)) == [Refused("a.parquet", "file ends in the middle")]
    _write_parquet(path, [{"image": {"bytes": b"x"}, "ground_truth": '{"gt_parse": {}}'}])
    with pytest.raises(ValueError, match=r"a\.parquet.*valid_line"):
        everything(CordParquet(tmp_path))
    _write_parquet(path, [{"image": 5, "text": "x"}])
    with pytest.raises(ValueError, match=r"a\.parquet.*ground_truth"):
        everything(CordParquet(tmp_path))
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"a\.parquet"):
        everything(CordParquet(tmp_path))
