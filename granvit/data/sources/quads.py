"""Texts with four corners each: SROIE's text files, and POIE's JSON lines.

SROIE (ICDAR 2019, https://rrc.cvc.uab.es/?ch=13) has one `.txt` per image, with the image's name, and one line per text. The
eight numbers are pixels, the corners clockwise from the top left; the text can hold commas:

    72,25,326,25,326,64,72,64,TAN WOON YANN

POIE (https://arxiv.org/abs/2305.07498, https://github.com/jfkuang/CFAM) has one image per line, with more keys than are read:

    {"file_name": "a.jpg", "height": 600, "width": 800, "annotations": [{"polygon": [0, 0, 9, 0, 9, 9, 0, 9], "text": "Fat 5g"}]}

Boxes are the upright rectangles around the corners. `###` marks text that cannot be read: it is refused.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.inputs import need_file
from granvit.data.sources.lines import json_lines, stated_size
from granvit.data.sources.per_image import OtherFormat, file_parts, printable, read_bytes, read_files, text_of, with_ending
from granvit.data.sources.polygons import box_of_points

_ENDINGS = (".txt",)


@dataclass(frozen=True)
class Quads:
    """Text files of quads, one per image, in a folder and the folders below.

    `annotations`: that folder. The image has the file's path with `image_ending` in place of `.txt`. A file is UTF-8, with or
    without a byte order mark; a file that is not UTF-8 is read as cp1252 (some of SROIE's are), and refused if it is not that.
    """

    annotations: str | Path
    image_ending: str = ".jpg"

    def parts(self) -> Sequence[str]:
        return file_parts(self.annotations, _ENDINGS, "annotations")

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        return read_files(self.annotations, _ENDINGS, part, self._image, "a text file of quads: x1,y1,...,x4,y4,text")

    def _image(self, path: Path, name: str) -> Annotated:
        regions: list[RawRegion] = []
        refused: list[tuple[str, str]] = []
        malformed = 0
        for number, line in enumerate(_decoded(read_bytes(path)).split("\n"), 1):
            if not line.strip():
                continue
            try:
                x1, y1, x2, y2, x3, y3, x4, y4, text = line.removesuffix("\r").split(",", 8)
                box = box_of_points([float(corner) for corner in (x1, y1, x2, y2, x3, y3, x4, y4)])
            except ValueError:
                malformed += 1
                refused.append((f"line {number}", "line is not eight numbers and a text"))
                continue
            _add(f"line {number}", box, text, regions, refused)
        if malformed and malformed == len(regions) + len(refused):
            raise OtherFormat
        image = with_ending(name, self.image_ending)
        return Annotated(printable(image), image, tuple(regions), refused=tuple(refused))


@dataclass(frozen=True)
class Poie:
    """POIE's JSON lines. `annotations`: the file. Paths of images are `file_name`."""

    annotations: str | Path

    def parts(self) -> Sequence[str]:
        return [need_file(self.annotations, "annotations").name]

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        return json_lines(Path(self.annotations), self._image)

    def _image(self, tree: dict[str, Any], place: str) -> Annotated:
        name, annotations = tree.get("file_name"), tree.get("annotations")
        if not isinstance(name, str):
            raise ValueError("line has no file_name")
        if not isinstance(annotations, list):
            raise ValueError("annotations is not a list")
        regions: list[RawRegion] = []
        refused: list[tuple[str, str]] = []
        for number, entry in enumerate(annotations):
            what = f"annotation {number}"
            try:
                if not isinstance(entry, dict):
                    raise ValueError("annotation is not a mapping")
                _add(what, box_of_points(entry.get("polygon")), text_of(entry.get("text")), regions, refused)
            except ValueError as error:
                refused.append((what, str(error)))
        return Annotated(printable(name), name, tuple(regions), size=stated_size(tree), refused=tuple(refused))


def _add(
    what: str, box: tuple[float, float, float, float], text: str, regions: list[RawRegion], refused: list[tuple[str, str]]
) -> None:
    if text.strip() == "###":
        refused.append((what, "text is marked as illegible"))
    else:
        regions.append(RawRegion(box, text))


def _decoded(data: bytes) -> str:
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            pass
    raise ValueError("file is neither UTF-8 nor cp1252")
