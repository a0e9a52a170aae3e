"""CORD's receipts (https://github.com/clovaai/cord): JSON files, or Hugging Face's Parquet files (`naver-clova-ix/cord-v2`).

    {"meta": {"image_id": 0, "image_size": {"width": 864, "height": 1296}, ...},
     "valid_line": [{"category": "menu.nm", "group_id": 3,
                     "words": [{"quad": {"x1": 8, "y1": 5, "x2": 30, ..., "y4": 19}, "text": "Nasi", "is_key": 0, "row_id": 7}]}]}

Corners are pixels; a box is the upright rectangle around them. Captions are the texts of the words. At the level `line` a region
is an entry of `valid_line`, which is a field of the receipt and can have several printed lines; its words are joined with spaces.
The Parquet files have the same JSON as text, in `ground_truth`, and the image, in `image`. Other keys are not read.
"""
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.inputs import Damaged, read_parquet
from granvit.data.sources.lines import stated_size
from granvit.data.sources.per_image import (
    OtherFormat,
    around,
    file_parts,
    part_files,
    printable,
    read_files,
    read_tree,
    text_of,
    with_ending,
)
from granvit.data.sources.polygons import box_of_points

Level = Literal["word", "line"]


@dataclass(frozen=True)
class Cord:
    """JSON files, one per image: the folder `json` of a split.

    `annotations`: that folder. The image of `receipt_00000.json` is `receipt_00000.png`, which is in the split's folder `image`.
    """

    annotations: str | Path
    level: Level = "line"

    def parts(self) -> Sequence[str]:
        return file_parts(self.annotations, (".json",), "annotations")

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        return read_files(self.annotations, (".json",), part, self._image, "CORD's JSON: it has no valid_line")

    def _image(self, path: Path, name: str) -> Annotated:
        image = with_ending(name, ".png")
        return _annotated(printable(image), image, read_tree(path), self.level)


@dataclass(frozen=True)
class CordParquet:
    """Parquet files, which hold the images. `annotations`: their folder."""

    annotations: str | Path
    level: Level = "line"

    def parts(self) -> Sequence[str]:
        return file_parts(self.annotations, (".parquet",), "annotations")

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        for name in part_files(self.annotations, (".parquet",), part):
            yield from self._file(Path(self.annotations, name), name)

    def _file(self, path: Path, name: str) -> Iterator[Annotated | Refused]:
        try:
            for number, row in enumerate(read_parquet(path, ("image", "ground_truth"))):
                place = printable(f"{name} row {number}")
                try:
                    yield _row(place, row, self.level)
                except OtherFormat:
                    if number == 0:
                        raise ValueError(f"{path}: is not CORD's: its ground_truth has no valid_line") from None
                    yield Refused(place, "ground_truth has no valid_line")
                except ValueError as error:
                    yield Refused(place, str(error))
        except Damaged as damaged:
            yield Refused(printable(name), damaged.reason)


def _row(place: str, row: dict[str, Any], level: Level) -> Annotated:
    image = row["image"].get("bytes") if isinstance(row["image"], dict) else None
    if not isinstance(image, bytes):
        raise ValueError("row has no bytes of an image")
    try:
        tree = json.loads(row["ground_truth"])
    except (TypeError, ValueError, RecursionError):
        raise ValueError("ground_truth is not valid JSON") from None
    return _annotated(place, image, tree, level)


def _annotated(name: str, image: str | bytes, tree: Any, level: Level) -> Annotated:
    if not isinstance(tree, dict) or "valid_line" not in tree:
        raise OtherFormat
    if not isinstance(tree["valid_line"], list):
        raise ValueError("valid_line is not a list")
    regions: list[RawRegion] = []
    refused: list[tuple[str, str]] = []
    for number, line in enumerate(tree["valid_line"]):
        try:
            words = line.get("words") if isinstance(line, dict) else None
            if not isinstance(words, list) or not words:
                raise ValueError("line has no list of words")
            if level == "line":
                read = [_word(word) for word in words]
                regions.append(RawRegion(around([word.box for word in read]), " ".join(word.caption for word in read)))
                continue
        except ValueError as error:
            refused.append((f"line {number}", str(error)))
            continue
        for place, word in enumerate(words):
            try:
                regions.append(_word(word))
            except ValueError as error:
                refused.append((f"line {number} word {place}", str(error)))
    meta = tree.get("meta")
    size = meta.get("image_size") if isinstance(meta, dict) else None
    stated = stated_size(size) if isinstance(size, dict) else None
    return Annotated(name, image, tuple(regions), size=stated, refused=tuple(refused))


def _word(word: Any) -> RawRegion:
    quad = word.get("quad") if isinstance(word, dict) else None
    if not isinstance(quad, dict):
        raise ValueError("word has no quad")
    corners = [quad.get(f"{axis}{corner}") for corner in range(1, 5) for axis in "xy"]
    return RawRegion(box_of_points(corners), text_of(word.get("text")))
