import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.grit import Grit
from tests.sources.reading import everything

SCHEMA = pa.schema([
    ("key", pa.string()), ("clip_similarity_vitb32", pa.float64()), ("clip_similarity_vitl14", pa.float64()), ("id", pa.int64()),
    ("url", pa.string()), ("caption", pa.string()), ("width", pa.int64()), ("height", pa.int64()),
    ("noun_chunks", pa.list_(pa.list_(pa.float64()))), ("ref_exps", pa.list_(pa.list_(pa.float64()))),
])
HANGER = "a wire hanger with a paper cover that reads we heart our customers"
PAPER = [0.019644069503434333, 0.31054004033406574, 0.9622142865754519, 0.9603442351023356]
WIRE = [0.019422357885505368, 0.027634161214033764, 0.9593302408854166, 0.969467560450236]


def _row(key, caption, noun_chunks, ref_exps, size=(100, 50)):
    return {"key": key, "clip_similarity_vitb32": 0.353271484375, "clip_similarity_vitl14": 0.2958984375, "id": 1795296605919,
            "url": "https://www.thestrapsaver.com/customerservice-1.jpg", "caption": caption, "width": size[0], "height": size[1],
            "noun_chunks": noun_chunks, "ref_exps": ref_exps}


ROWS = [
    _row("000373938", HANGER, [[19, 32, *PAPER, 0.79298526], [0, 13, *WIRE, 0.67520964]],
         [[19, 66, *PAPER, 0.79298526], [0, 66, *WIRE, 0.67520964]], (1024, 693)),
    _row("000000001", "a dog", [[0, 5, 0.1, 0.2, 0.3, 0.4, 0.9]], [[0, 5, 0.1, 0.2, 0.3, 0.4, 0.9]]),
    _row("000000001", "the key again", [], [[0, 7, 0, 0, 1, 1, 0.9]]),
    _row("000000003", "ein Hund über 两只猫", [], [[14, 17, 0, 0, 1, 1, 0.9], [4, 8, 0.5, 0.5, 0.75, 1, 0.9]]),
    _row("000000004", "", [], []),
    _row("000000005", "a dog", [], [[0, 6, 0, 0, 1, 1, 0.9], [3, 3, 0, 0, 1, 1, 0.9], [-1, 2, 0, 0, 1, 1, 0.9],
                                    [0.5, 2, 0, 0, 1, 1, 0.9], [0, 1, 0, 0, 1, 1]]),
    _row("000000006", "a dog", [], [[0, 5, 0.9, 0.9, 0.1, 0.1, 0.9], [0, 1, -0.5, 0, 2, 1, 0.9]]),
    _row("000000007", None, [], [[0, 5, 0, 0, 1, 1, 0.9]]),
    _row(None, "a dog", [], [[0, 5, 0, 0, 1, 1, 0.9]]),
    _row("000000009", "a dog", [], None),
    _row("000000010", "a dog", [], [[0, 5, 0, 0, 1, 1, 0.9], None], (None, 5)),
    _row("../11", "a dog", [], [[math.nan, 5, 0, 0, 1, 1, 0.9]]),
]


def _annotated(number, key, caption, *regions, size=(100, 50), refused=()):
    return Annotated(f"00000/{number}", f"00000/{key}.jpg", tuple(RawRegion(*region) for region in regions), caption, "relative",
                     size=size, refused=tuple((f"phrase {place}", reason) for place, reason in refused))


OUTSIDE = "phrase is not a part of the caption"
EXPECTED = [
    _annotated(0, "000373938", HANGER, (tuple(PAPER), "a paper cover that reads we heart our customers"), (tuple(WIRE), HANGER),
               size=(1024, 693)),
    _annotated(1, "000000001", "a dog", ((0.1, 0.2, 0.3, 0.4), "a dog")),
    _annotated(2, "000000001", "the key again", ((0, 0, 1, 1), "the key")),
    _annotated(3, "000000003", "ein Hund über 两只猫", ((0, 0, 1, 1), "两只猫"), ((0.5, 0.5, 0.75, 1), "Hund")),
    _annotated(4, "000000004", ""),
    _annotated(5, "000000005", "a dog", refused=[
        (0, OUTSIDE), (1, OUTSIDE), (2, OUTSIDE), (3, OUTSIDE), (4, "phrase is not seven numbers")]),
    _annotated(6, "000000006", "a dog", ((0.9, 0.9, 0.1, 0.1), "a dog"), ((-0.5, 0, 2, 1), "a")),
    Refused("00000/7", "caption is not text"),
    Refused("00000/8", "key is neither a whole number nor text"),
    Refused("00000/9", "phrases are not a list"),
    _annotated(10, "000000010", "a dog", ((0, 0, 1, 1), "a dog"), size=None, refused=[(1, "phrase is not seven numbers")]),
    _annotated(11, "../11", "a dog", refused=[(0, OUTSIDE)]),
]


def _write(path, rows, schema=SCHEMA):
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=5)


def test_referring_expressions(tmp_path):
    _write(tmp_path / "00000.parquet", ROWS)
    assert Grit(tmp_path).parts() == ["00000.parquet"]
    assert everything(Grit(tmp_path)) == EXPECTED


def test_noun_chunks_and_the_pattern_of_paths(tmp_path):
    _write(tmp_path / "coyo_1_snappy.parquet", ROWS[1:2])
    _write(tmp_path / "coyo_0_snappy.parquet", ROWS[:1])
    reader = Grit(tmp_path, image="images/{key}.png", phrases="noun_chunks")
    assert everything(reader) == [
        Annotated("coyo_0_snappy/0", "images/000373938.png", (
            RawRegion(tuple(PAPER), "a paper cover"), RawRegion(tuple(WIRE), "a wire hanger")), HANGER, "relative",
                  size=(1024, 693)),
        Annotated("coyo_1_snappy/0", "images/000000001.png", (RawRegion((0.1, 0.2, 0.3, 0.4), "a dog"),), "a dog", "relative",
                  size=(100, 50)),
    ]


def test_boxes_that_are_nan_are_passed_on(tmp_path):
    _write(tmp_path / "0.parquet", [_row("1", "a dog", [], [[0, 5, math.nan, 0, 1, 1, 0.9]])])
    (found,) = everything(Grit(tmp_path))
    assert math.isnan(found.regions[0].box[0]) and found.regions[0].box[1:] == (0, 1, 1)


def test_damaged_files(tmp_path):
    _write(tmp_path / "0.parquet", ROWS)
    whole = (tmp_path / "0.parquet").read_bytes()
    (tmp_path / "0.parquet").write_bytes(whole[:-100])
    assert everything(Grit(tmp_path)) == [Refused("0.parquet", "file ends in the middle")]
    for zeros in (200, len(whole) - 12):  # in the rows; also in the index
        (tmp_path / "0.parquet").write_bytes(whole[:4] + bytes(zeros) + whole[4 + zeros :])
        assert everything(Grit(tmp_path))[-1] == Refused("0.parquet", "file is damaged")


def test_other_formats_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="folder"):
        Grit(tmp_path).parts()
    with pytest.raises(ValueError, match="none"):
        Grit(tmp_path / "none").parts()
    (tmp_path / "a.parquet").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"a\.parquet"):
        everything(Grit(tmp_path))
    _write(tmp_path / "a.parquet", [{"key": "1", "caption": "a"}], pa.schema([("key", pa.string()), ("caption", pa.string())]))
    with pytest.raises(ValueError, match=r"a\.parquet: has no column width"):
        everything(Grit(tmp_path))
