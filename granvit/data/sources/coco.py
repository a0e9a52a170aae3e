"""COCO's JSON formats (https://cocodataset.org/#format-data): boxes, captions, and results of detectors.

Objects365 (https://www.objects365.org) has the same format as COCO's boxes; its `file_name` contains folders. `Coco` was written
for `instances_*.json`, `captions_*.json`, `image_info_*.json` and `zhiyuan_objv2_*.json`, `CocoResults` for the format of
results (https://cocodataset.org/#format-results), which detectors of most libraries write.

Annotations are joined with images in a temporary file, because the JSON lists both apart, in either order. If one of the files is
cut off, the part is refused as a whole: the annotations of any image may be missing.
"""
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.grouping import Group, Groups
from granvit.data.sources.inputs import Damaged, need_file, read_json
from granvit.data.sources.polygons import box_of_xywh, whole_size

NO_IMAGE = "image of the annotation has no entry"
REPEATED = "annotation id appears twice"


@dataclass(frozen=True)
class Coco:
    """Images with boxes, captions, or both.

    `file` has `images`, and `annotations` with boxes (`bbox`, `category_id`) or captions (`caption`); without annotations, its
    images have no regions. `captions` is a second file, whose captions belong to images of the first one. The global caption is
    the image's caption number `caption_number`, from 0, in the order of the files; none if it has fewer. A region's caption is
    the name of its category, or empty with `region_caption` none. Boxes of crowds (`iscrowd` 1) are refused: they hold many
    objects.
    """

    file: str | Path
    captions: str | Path | None = None
    caption_number: int = 0
    region_caption: Literal["category", "none"] = "category"

    def parts(self) -> Sequence[str]:
        """One part, the name of the file. `ValueError` if a file is missing."""
        if self.captions is not None:
            need_file(self.captions, "captions")
        return (need_file(self.file, "file").name,)

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        """Images in the order of the file. `ValueError` if a file is not COCO's JSON."""
        categories: dict[str, str] = {}
        with Groups() as groups:
            try:
                yield from _load(Path(self.file), groups, categories, "first")
                if self.captions is not None:
                    yield from _load(Path(self.captions), groups, None, "second")
            except Damaged as damage:
                yield Refused(damage.name, damage.reason)
                return
            for group in groups.read():
                yield _annotated(group, categories if self.region_caption == "category" else None, self.caption_number)
            for row in groups.without_image():
                yield Refused(_what(row), NO_IMAGE)


@dataclass(frozen=True)
class CocoResults:
    """What a detector found: `results` is a list of `image_id`, `category_id`, `bbox`, `score`, for the images of `images`.

    `images` is a JSON file with `images` and `categories` (its annotations are not read). Results with a score below `threshold`
    are refused. `region_caption` as in `Coco`.
    """

    results: str | Path
    images: str | Path
    threshold: float = 0.0
    region_caption: Literal["category", "none"] = "category"

    def parts(self) -> Sequence[str]:
        """One part, the name of the file of results. `ValueError` if a file is missing."""
        need_file(self.images, "images")
        return (need_file(self.results, "results").name,)

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        """Images in the order of their file. `ValueError` if a file is not COCO's JSON."""
        categories: dict[str, str] = {}
        with Groups() as groups:
            try:
                yield from _load(Path(self.images), groups, categories, None)
                yield from self._load_results(groups)
            except Damaged as damage:
                yield Refused(damage.name, damage.reason)
                return
            for group in groups.read():
                yield _annotated(group, categories if self.region_caption == "category" else None, 0)
            for row in groups.without_image():
                yield Refused(_what(row), NO_IMAGE)

    def _load_results(self, groups: Groups) -> Iterator[Refused]:
        for _, number, result in read_json(Path(self.results), lists=("",)):
            what = f"result {number}"
            if not isinstance(result, Mapping):
                yield Refused(what, "result is not a mapping")
                continue
            score = result.get("score")
            if isinstance(score, bool) or not isinstance(score, int | float):
                yield Refused(what, "score is not a number")
            elif not score >= self.threshold:
                yield Refused(what, "score is below the threshold")
            else:
                try:
                    groups.add_row(result.get("image_id"), {"what": what} | _pick(result, "bbox", "category_id"))
                except ValueError as error:
                    yield Refused(what, str(error))


def _load(path: Path, groups: Groups, categories: dict[str, str] | None, annotations: str | None) -> Iterator[Refused]:
    """Puts a file's entries into `groups` and `categories`: images and categories if `categories` is not None, and annotations
    unless `annotations` is None; it names the file in their ids, because two files number their annotations apart."""
    lists = ["images", "categories"] if categories is not None else []
    lists += ["annotations"] if annotations is not None else []
    seen = set()
    for name, number, entry in read_json(path, lists=lists):
        seen.add(name)
        what = f"{name} {number}"
        try:
            if not isinstance(entry, Mapping):
                raise ValueError("entry is not a mapping")
            if name == "images":
                if not groups.add_image(entry.get("id"), _pick(entry, "file_name", "width", "height")):
                    raise ValueError("image id appears twice")
            elif name == "categories":
                assert categories is not None
                key = str(entry.get("id"))
                if key in categories:
                    raise ValueError("category id appears twice")
                if not isinstance(entry.get("name"), str):
                    raise ValueError("name of the category is not text")
                categories[key] = entry["name"]
            else:
                kept = _pick(entry, "bbox", "category_id", "iscrowd", "caption")
                row_id = entry.get("id")
                kept["what"] = what if row_id is None else f"annotation {row_id}"
                if row_id is not None and isinstance(row_id, int | str):
                    row_id = f"{annotations} {row_id}"
                groups.add_row(entry.get("image_id"), kept, row_id)
        except ValueError as error:
            yield Refused(what, str(error))
    if lists[0] not in seen:
        raise ValueError(f"{path}: is not COCO's JSON: no entries in its list {lists[0]}")


def _annotated(group: Group, categories: Mapping[str, str] | None, caption_number: int) -> Annotated | Refused:
    """`categories` None: regions without captions."""
    if not isinstance(group.image.get("file_name"), str):
        return Refused(f"image {group.key}", "image has no file_name")
    regions, captions = [], []
    refused = [(_what(row), REPEATED) for row in group.repeated]
    for row in group.rows:
        try:
            if "caption" in row:
                if not isinstance(row["caption"], str):
                    raise ValueError("caption is not text")
                captions.append(row["caption"])
                continue
            if row.get("iscrowd") == 1:
                raise ValueError("box holds a crowd of objects")
            if categories is not None and str(row.get("category_id")) not in categories:
                raise ValueError("category of the annotation has no entry")
            caption = "" if categories is None else categories[str(row.get("category_id"))]
            regions.append(RawRegion(box_of_xywh(row.get("bbox")), caption))
        except ValueError as error:
            refused.append((_what(row), str(error)))
    return Annotated(
        id=group.key,
        image=group.image["file_name"],
        regions=tuple(regions),
        global_caption=captions[caption_number] if 0 <= caption_number < len(captions) else None,
        size=whole_size(group.image.get("width"), group.image.get("height")),
        refused=tuple(refused),
    )


def _pick(entry: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: entry[name] for name in names if name in entry}


def _what(row: Mapping[str, Any]) -> str:
    return str(row["what"])
