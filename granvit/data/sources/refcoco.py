"""RefCOCO, RefCOCO+ and RefCOCOg (https://github.com/lichengunc/refer): expressions that refer to one object of a COCO image.

Three forms are read. `RefCoco`: the published `refs(unc).p` (or `google`, `umd`), a pickle of Python 2, with COCO's
`instances.json`. `RefCocoTable`: Parquet of https://huggingface.co/datasets/jxu124/refcoco (refcocoplus, refcocog), without
images. `RefCocoImages`: Parquet of https://huggingface.co/datasets/lmms-lab/RefCOCO (RefCOCOplus, RefCOCOg), with images.

A reference has one box and several sentences, which become as many regions with the same box.
"""
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.grouping import Group, Groups
from granvit.data.sources.inputs import CUT, Damaged, need_file, need_folder, read_json, read_parquet
from granvit.data.sources.polygons import box_of_xywh, box_of_xyxy, whole_size

NO_IMAGE = "image of the reference has no entry"
REPEATED = "reference id appears twice"


@dataclass(frozen=True)
class RefCoco:
    """References of a `split` (train, val, testA, testB; test in RefCOCOg) from `references`, `refs(unc).p`, and `instances`.

    Images without a reference in this split are left out: they belong to other splits. The pickle is read as a whole (about
    50,000 references), by an unpickler that admits mappings, lists, numbers and text, and calls nothing.
    """

    references: str | Path
    instances: str | Path
    split: str = "train"

    def parts(self) -> Sequence[str]:
        """One part, the name of the pickle. `ValueError` if a file is missing."""
        need_file(self.instances, "instances")
        return (need_file(self.references, "references").name,)

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        """Images in the order of `instances`. `ValueError` if a file is of another format, the pickle holds anything but plain
        values (named in the error), or no reference is of this split. If a file is cut off, the part is refused as a whole."""
        with Groups() as groups:
            try:
                references = _unpickle(Path(self.references))
                yield from self._load_references(groups, references)
                yield from self._load_instances(groups)
            except Damaged as damage:
                yield Refused(damage.name, damage.reason)
                return
            for group in groups.read():
                if any("reference" in row for row in group.rows):
                    yield _annotated_group(group)
            for row in groups.without_image():
                if "reference" in row:
                    yield Refused(f"reference {row['reference']}", NO_IMAGE)

    def _load_references(self, groups: Groups, references: Any) -> Iterator[Refused]:
        if not isinstance(references, list):
            raise ValueError(f"references {self.references}: is not a list of references")
        splits = [reference.get("split") for reference in references if isinstance(reference, dict)]
        if self.split not in splits:
            found = ", ".join(sorted({split for split in splits if isinstance(split, str)})) or "none"
            raise ValueError(f"references {self.references}: has no reference of split {self.split}; its splits: {found}")
        for number, reference in enumerate(references):
            try:
                if not isinstance(reference, dict):
                    raise ValueError("reference is not a mapping")
                if reference.get("split") != self.split:
                    continue
                key = _key(reference.get("ref_id"), "ref_id is neither a whole number nor text")
                row = {
                    "reference": key,
                    "annotation": _key(reference.get("ann_id"), "ann_id is neither a whole number nor text"),
                    "sentences": _texts(reference.get("sentences")),
                }
                groups.add_row(reference.get("image_id"), row, f"reference {key}")
            except ValueError as error:
                yield Refused(f"reference {number} of the file", str(error))

    def _load_instances(self, groups: Groups) -> Iterator[Refused]:
        images = 0
        for name, number, entry in read_json(Path(self.instances), lists=("images", "annotations")):
            images += name == "images"
            try:
                if not isinstance(entry, Mapping):
                    raise ValueError("entry is not a mapping")
                if name == "annotations":
                    key = _key(entry.get("id"), "annotation id is neither a whole number nor text")
                    groups.add_row(entry.get("image_id"), {"id": key, "bbox": entry.get("bbox")}, f"annotation {key}")
                elif not groups.add_image(entry.get("id"), {key: entry.get(key) for key in ("file_name", "width", "height")}):
                    raise ValueError("image id appears twice")
            except ValueError as error:
                yield Refused(f"{name} {number}", str(error))
        if not images:
            raise ValueError(f"instances {self.instances}: is not COCO's JSON: no entries in its list images")


@dataclass(frozen=True)
class RefCocoTable:
    """References from Parquet files without images, `SPLIT-*.parquet` in `folder`.

    Columns that are read: `ref_id`, `image_id`, `image_path` (`coco/train2014/COCO_train2014_000000581857.jpg`), `bbox` (xyxy, in
    pixels), `sentences` (`sent`, `raw` and others), `raw_image_info` (the image's entry in COCO, as JSON text). The splits are
    train, validation, test (testA of RefCOCO and RefCOCO+) and testB.
    """

    folder: str | Path
    split: str = "train"

    def parts(self) -> Sequence[str]:
        """One part, the split: an image may be in several files. `ValueError` if there is no file of it."""
        _files(self.folder, self.split)
        return (self.split,)

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        """Images in the order of their first references. `ValueError` if a file is not Parquet or lacks a column. If a file is
        damaged, the part is refused as a whole."""
        columns = ("ref_id", "image_id", "image_path", "bbox", "sentences", "raw_image_info")
        with Groups() as groups:
            for name in _files(self.folder, part):
                try:
                    for number, row in enumerate(read_parquet(Path(self.folder, name), columns)):
                        what = f"row {number} of {name}"
                        try:
                            _add_table_row(groups, row)
                        except ValueError as error:
                            yield Refused(what, str(error))
                except Damaged as damage:
                    yield Refused(damage.name, damage.reason)
                    return
            for group in groups.read():
                yield _annotated_table(group)


@dataclass(frozen=True)
class RefCocoImages:
    """References from Parquet files with images, `SPLIT-*.parquet` in `folder`. Splits are val, test, testA and testB.

    Columns that are read: `image` (`bytes`, `path`), `answer` (the sentences), `bbox` (x, y, width, height, in pixels). A row is
    one reference, and the image comes again in the row of each; so does its `Annotated`. The id is the file's name with the
    number of the row, from 0.
    """

    folder: str | Path
    split: str = "val"

    def parts(self) -> Sequence[str]:
        """The files of the split. `ValueError` if there is none."""
        return _files(self.folder, self.split)

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        """The rows of a file, in order. `ValueError` if it is not Parquet or lacks a column."""
        path = Path(self.folder, part)
        try:
            for number, row in enumerate(read_parquet(path, ("image", "answer", "bbox"))):
                name = f"{path.stem}/{number}"
                image = row["image"].get("bytes") if isinstance(row["image"], dict) else None
                try:
                    if not isinstance(image, bytes) or not image:
                        raise ValueError("image has no bytes")
                    box = box_of_xywh(row["bbox"])
                    if not isinstance(row["answer"], list):
                        raise ValueError("sentences are not a list")
                except ValueError as error:
                    yield Refused(name, str(error))
                    continue
                regions, refused = _regions(box, row["answer"], name)
                yield Annotated(name, image, tuple(regions), refused=tuple(refused))
        except Damaged as damage:
            yield Refused(damage.name, damage.reason)


class _PlainUnpickler(pickle.Unpickler):
    """Makes mappings, lists, numbers and text. What a pickle names beyond these is neither imported nor called."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise ValueError("it asks for a persistent object")


def _unpickle(path: Path) -> Any:
    """A pickle's plain values; text of Python 2 is read as latin-1. `Damaged` if it is cut off, `ValueError` if it is no pickle
    or asks for anything else."""
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="latin-1").load()
    except Exception as error:  # a damaged pickle can raise almost anything
        if isinstance(error, EOFError) or str(error) == "pickle data was truncated":
            raise Damaged(path, CUT) from None
        raise ValueError(f"references {path}: is not a pickle of plain values, refused: {error}") from None


def _files(folder: str | Path, split: str) -> list[str]:
    names = sorted(path.name for path in need_folder(folder, "folder").glob("*.parquet") if path.name.startswith(f"{split}-"))
    if not names:
        raise ValueError(f"folder {folder}: has no file {split}-*.parquet; name the folder with the Parquet files, and a split")
    return names


def _key(value: Any, reason: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(reason)
    return value


def _texts(sentences: Any) -> list[str | None]:
    """The sentences' `sent`, None for one that has no text."""
    if not isinstance(sentences, list):
        raise ValueError("sentences are not a list")
    texts = [sentence.get("sent") if isinstance(sentence, dict) else None for sentence in sentences]
    return [text if isinstance(text, str) else None for text in texts]


def _regions(
    box: tuple[float, float, float, float], sentences: Sequence[Any], what: str
) -> tuple[list[RawRegion], list[tuple[str, str]]]:
    """A region for each sentence that is text, and a refusal for each that is not."""
    regions = [RawRegion(box, sentence) for sentence in sentences if isinstance(sentence, str)]
    return regions, [(what, "sentence is not text")] * (len(sentences) - len(regions))


def _annotated_group(group: Group) -> Annotated | Refused:
    """An image of `RefCoco` with the annotations and references among its rows."""
    if not isinstance(group.image["file_name"], str):
        return Refused(f"image {group.key}", "image has no file_name")
    boxes = {row["id"]: row["bbox"] for row in group.rows if "id" in row}
    regions: list[RawRegion] = []
    refused = [(f"annotation {row['id']}", "annotation id appears twice") for row in group.repeated if "id" in row]
    refused += [(f"reference {row['reference']}", REPEATED) for row in group.repeated if "reference" in row]
    for row in group.rows:
        if "reference" not in row:
            continue
        what = f"reference {row['reference']}"
        try:
            if row["annotation"] not in boxes:
                raise ValueError("annotation of the reference has no entry")
            of_reference, without_text = _regions(box_of_xywh(boxes[row["annotation"]]), row["sentences"], what)
        except ValueError as error:
            refused.append((what, str(error)))
            continue
        regions += of_reference
        refused += without_text
    size = whole_size(group.image["width"], group.image["height"])
    return Annotated(group.key, group.image["file_name"], tuple(regions), size=size, refused=tuple(refused))


def _add_table_row(groups: Groups, row: Mapping[str, Any]) -> None:
    reference = {"reference": row["ref_id"], "bbox": row["bbox"], "sentences": _texts(row["sentences"])}
    if not isinstance(row["image_path"], str):
        raise ValueError("image_path is not text")
    try:
        info = json.loads(row["raw_image_info"])
    except (TypeError, ValueError):
        info = None
    size = (info.get("width"), info.get("height")) if isinstance(info, dict) else (None, None)
    groups.add_row(row["image_id"], reference, row["ref_id"])
    groups.add_image(row["image_id"], {"path": row["image_path"], "size": size})  # stays as the first reference states it


def _annotated_table(group: Group) -> Annotated:
    regions: list[RawRegion] = []
    refused = [(f"reference {row['reference']}", REPEATED) for row in group.repeated]
    for row in group.rows:
        what = f"reference {row['reference']}"
        try:
            of_reference, without_text = _regions(box_of_xyxy(row["bbox"]), row["sentences"], what)
        except ValueError as error:
            refused.append((what, str(error)))
            continue
        regions += of_reference
        refused += without_text
    size = whole_size(*group.image["size"])
    return Annotated(group.key, group.image["path"], tuple(regions), size=size, refused=tuple(refused))
