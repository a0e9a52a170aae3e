"""Pascal VOC XML files, one per image, such as PubTables-1M's (https://github.com/microsoft/table-transformer), and its words.

    <annotation><filename>PMC1_table_0.jpg</filename><size><width>600</width><height>200</height><depth>3</depth></size>
      <object><name>table row</name><bndbox><xmin>36.5</xmin><ymin>36</ymin><xmax>550</xmax><ymax>52</ymax></bndbox></object>
    </annotation>

The numbers are pixels; they are passed on as written (Pascal VOC itself counts pixels from 1, PubTables-1M from 0). The words of
`PMC1_table_0.xml` are in `PMC1_table_0_words.json`, in pixels of the same image and in reading order:

    [{"bbox": [36.5, 36.0, 80.2, 52.0], "text": "Group", "flags": 0, "span_num": 0, "line_num": 0, "block_num": 0}, ...]

The list may also be inside a mapping, as `words`.
"""
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.parsers.expat import errors

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.inputs import CUT, need_folder
from granvit.data.sources.per_image import (
    OtherFormat,
    file_parts,
    printable,
    read_bytes,
    read_files,
    read_tree,
    text_of,
    with_ending,
)
from granvit.data.sources.polygons import box_of_xyxy

_ENDINGS = (".xml",)
_CUT_CODES = (errors.codes[errors.XML_ERROR_NO_ELEMENTS], errors.codes[errors.XML_ERROR_UNCLOSED_TOKEN])
_WHOLE = ("table spanning cell", "table projected row header")  # cells of several columns or rows
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Voc:
    """`annotations`: the folder of XML files. The path of an image is its `filename`. Captions are the objects' names.

    With `words`, the folder of PubTables-1M's files of words, captions are texts instead: the words whose centres are in the box,
    in their order, joined with spaces. Cells are then regions too, after the objects: what a `table row` and a `table column`
    share, unless its centre is in a `table spanning cell` or a `table projected row header`, which are objects themselves.
    Blank cells are left out.
    """

    annotations: str | Path
    words: str | Path | None = None

    def parts(self) -> Sequence[str]:
        if self.words is not None:
            need_folder(self.words, "words")
        return file_parts(self.annotations, _ENDINGS, "annotations")

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        return read_files(self.annotations, _ENDINGS, part, self._image, "Pascal VOC's XML: its root is no annotation")

    def _image(self, path: Path, name: str) -> Annotated:
        try:
            root = ElementTree.fromstring(read_bytes(path))
        except ElementTree.ParseError as error:
            raise ValueError(CUT if error.code in _CUT_CODES else "file is not valid XML") from None
        except (LookupError, UnicodeError):  # of the encoding that it names
            raise ValueError("file is not valid XML") from None
        if root.tag != "annotation":
            raise OtherFormat
        image = _text(root, "filename")
        if not image:
            raise ValueError("annotation has no filename")
        objects: list[tuple[str, Box]] = []
        refused: list[tuple[str, str]] = []
        for number, entry in enumerate(root.findall("object")):
            try:
                objects.append((_text(entry, "name"), _box(entry)))
            except ValueError as error:
                refused.append((f"object {number}", str(error)))
        regions = [RawRegion(box, label) for label, box in objects]
        if self.words is not None:
            words = _words(Path(self.words, with_ending(name, "_words.json")), refused)
            regions = [RawRegion(box, _inside(words, box)) for _, box in objects]
            cells = ((box, _inside(words, box)) for box in _cells(objects))
            regions += [RawRegion(box, text) for box, text in cells if text]
        return Annotated(printable(name), image, tuple(regions), size=_size(root), refused=tuple(refused))


def _text(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _box(entry: ElementTree.Element) -> Box:
    try:
        x1, y1, x2, y2 = (float(_text(entry, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        raise ValueError("bndbox is not four numbers") from None
    return x1, y1, x2, y2


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    width, height = _text(root, "size/width"), _text(root, "size/height")
    return (int(width), int(height)) if width.isdecimal() and height.isdecimal() else None


def _words(path: Path, refused: list[tuple[str, str]]) -> list[tuple[Box, str]]:
    """Boxes and texts of a file of words; those that cannot be read are added to `refused`."""
    words = []
    try:
        tree = read_tree(path)
        if isinstance(tree, dict):
            tree = tree.get("words")
        if not isinstance(tree, list):
            raise ValueError("words are not a list")
    except ValueError as error:
        raise ValueError(f"words: {error}") from None
    for number, word in enumerate(tree):
        try:
            if not isinstance(word, dict):
                raise ValueError("word is not a mapping")
            words.append((box_of_xyxy(word.get("bbox")), text_of(word.get("text"))))
        except ValueError as error:
            refused.append((f"word {number}", str(error)))
    return words


def _holds(box: Box, inner: Box) -> bool:
    """Whether the centre of `inner` is in `box`."""
    x, y = (inner[0] + inner[2]) / 2, (inner[1] + inner[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _inside(words: list[tuple[Box, str]], box: Box) -> str:
    return " ".join(text for word, text in words if text and _holds(box, word))


def _cells(objects: list[tuple[str, Box]]) -> Iterator[Box]:
    """What rows and columns share, row by row, without what larger cells cover."""
    rows, columns = ([box for label, box in objects if label == name] for name in ("table row", "table column"))
    larger = [box for label, box in objects if label in _WHOLE]
    for row in rows:
        for column in columns:
            box = max(row[0], column[0]), max(row[1], column[1]), min(row[2], column[2]), min(row[3], column[3])
            if box[0] < box[2] and box[1] < box[3] and not any(_holds(cell, box) for cell in larger):
                yield box
