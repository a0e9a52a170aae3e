"""The worked example: documents whose boxes are where their letters are, and a small version of the build and its comparison."""
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from granvit.config import CONFIGS
from granvit.data.gran.command import build
from granvit.data.gran.config import read_build
from granvit.data.gran.example import Comparison, compare, write_documents, write_photographs, write_sources
from granvit.data.gran.join import BUILT, DUPLICATE
from granvit.data.gran.ranks import Ranks
from granvit.data.gran.report import write_report
from granvit.data.records import ImageRecord, Region
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from tests.conftest import encoded_image


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in folder.with_name(f"{folder.name}.jsonl").read_text().splitlines()]


def test_a_small_example_is_built_and_read(tmp_path):
    write_sources(tmp_path / "sources", documents=3, unlabelled=2)
    text = (CONFIGS / "gran_example.yaml").read_text()
    (tmp_path / "build.yaml").write_text(text.replace("runs/data_example", str(tmp_path)))
    config = read_build(tmp_path / "build.yaml")
    natural, ocr = map(Store, build(config, tmp_path, Ranks()))
    photographs = lines_of(tmp_path / "sources" / "photographs")
    assert natural.records == natural.globals == len(photographs) - 1 >= 10  # one is there twice
    counts = json.loads((tmp_path / "natural" / BUILT).read_text())["sources"]["photographs"]
    assert counts["images_dropped"] == {DUPLICATE: 1} and natural.record(0).id == photographs[0]["image"]
    found = {record.id: record for record in map(ocr.record, range(ocr.records))}
    assert "Region-based segmentation" in {region.caption for region in found["page.png"].regions}
    for tree in lines_of(tmp_path / "sources" / "documents"):
        captions = [region["caption"] for region in tree["regions"]]
        assert captions in [[region.caption for region in record.regions] for record in map(ocr.record, range(ocr.records))]
    read = compare(tmp_path / "sources", ocr)
    assert read.lines == sum(len(tree["regions"]) for tree in lines_of(tmp_path / "sources" / "unlabelled")) > 50
    assert read.lines_read >= 0.9 * read.lines and read.words_read >= 0.9 * read.words and read.median_iou > 0.25
    assert write_report(config, tmp_path).exists()


def test_boxes_of_documents_hold_their_letters_and_nothing_else_is_written(tmp_path):
    write_documents(tmp_path / "drawn", 6, 3)
    trees = lines_of(tmp_path / "drawn")
    assert [tree["image"].split("-")[1] for tree in trees] == ["letter", "table", "receipt"] * 2
    for tree in trees:
        dark_HW = np.asarray(Image.open(tmp_path / "drawn" / tree["image"]).convert("L")).astype(int) < 100
        for x1, y1, x2, y2 in (region["box"] for region in tree["regions"]):
            rows, columns = np.nonzero(dark_HW[y1:y2, x1:x2])
            assert rows.min() <= 2 and columns.min() <= 2 and rows.max() >= y2 - y1 - 3 and columns.max() >= x2 - x1 - 3, tree
            dark_HW[y1:y2, x1:x2] = False
        rules = 0 if "receipt" not in tree["image"] else 381 * 3  # a line of 2 pixels above the sum; tables have light ones
        assert dark_HW.sum() <= rules, tree["image"]


def test_documents_follow_from_the_seed(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_documents(tmp_path / folder / "drawn", 3, seed)
    files = [sorted((tmp_path / folder / "drawn").iterdir()) for folder in "abc"]
    first, same, other = ([file.read_bytes() for file in of_folder] for of_folder in files)
    assert first == same and not set(first) & set(other)


def test_photographs_of_a_package_that_is_not_there_are_left_out_with_a_word(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("granvit.data.gran.example.log.propagate", True)
    monkeypatch.setattr("granvit.data.gran.example.find_spec", {"skimage": find_spec("skimage")}.get)
    write_photographs(tmp_path / "photographs")
    names = {tree["image"] for tree in lines_of(tmp_path / "photographs")}
    assert "chelsea.png" in names and "china.jpg" not in names
    assert "sklearn is not installed" in caplog.text and "china.jpg" in caplog.text


@pytest.mark.parametrize("box, text, read", [
    ((10, 10, 50, 20), "two words", Comparison(2, 1, 3, 2, 1.0)),
    ((10, 10, 50, 20), "two w0rds", Comparison(2, 0, 3, 1, 0.0)),
    ((10, 12, 50, 20), "two words", Comparison(2, 1, 3, 2, 0.8)),
    ((10, 16, 50, 25), "two words", Comparison(2, 0, 3, 2, 0.0)),
])  # fmt: skip
def test_a_line_is_read_if_text_and_place_are_right(tmp_path, box, text, read):
    true = [{"box": [10, 10, 50, 20], "caption": "two words"}, {"box": [0, 0, 5, 5], "caption": "gone"}]
    (tmp_path / "unlabelled.jsonl").write_text(json.dumps({"image": "a.jpg", "regions": true}) + "\n")
    relative = tuple(value / side for value, side in zip(box, (100, 50, 100, 50), strict=True))
    other = ImageRecord("b.jpg", 100, 50, encoded_image(100, 50), None, (Region((0, 0, 1, 1), "gone"),))
    record = ImageRecord("a.jpg", 100, 50, encoded_image(100, 50), None, (Region(relative, text),))
    write_store([record, other], tmp_path / "store")
    found = compare(tmp_path, Store(tmp_path / "store"))
    assert replace(found, median_iou=round(found.median_iou, 6)) == read
