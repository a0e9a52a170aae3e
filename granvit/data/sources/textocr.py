"""TextOCR's JSON (https://textvqa.org/textocr/dataset): words of photos with their boxes.

A file has `imgs` (`id`, `width`, `height`, `set`, `file_name`), `anns` (`id`, `image_id`, `bbox`, `points`, `utf8_string`,
`area`), both mappings by id, and `imgToAnns`, which is not needed. `bbox` is x, y, width, height: in the files, unlike in the
page's example, which names its numbers x1, y1, x2, y2. It is the upright box around `points`.
"""
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.grouping import Group, Groups
from granvit.data.sources.inputs import Damaged, need_file, read_json
from granvit.data.sources.polygons import box_of_xywh, whole_size


@dataclass(frozen=True)
class TextOcr:
    """Words as regions, from `file` (`TextOCR_0.1_train.json`). Illegible words, written ".", are refused.

    Images without words have no regions. If the file is cut off, it is refused as a whole: the words of any image may be missing.
    """

    file: str | Path

    def parts(self) -> Sequence[str]:
        """One part, the name of the file. `ValueError` if it is missing."""
        return (need_file(self.file, "file").name,)

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        """Images in the order of the file. `ValueError` if it is not TextOCR's JSON."""
        with Groups() as groups:
            try:
                yield from self._load(groups)
            except Damaged as damage:
                yield Refused(damage.name, damage.reason)
                return
            for group in groups.read():
                yield _annotated(group)
            for row in groups.without_image():
                yield Refused(f"annotation {row['id']}", "image of the annotation has no entry")

    def _load(self, groups: Groups) -> Iterator[Refused]:
        images = 0
        for name, key, entry in read_json(Path(self.file), maps=("imgs", "anns")):
            images += name == "imgs"
            what = f"{'image' if name == 'imgs' else 'annotation'} {key}"
            try:
                if not isinstance(entry, Mapping):
                    raise ValueError("entry is not a mapping")
                if name == "anns":
                    word = {"id": key, "bbox": entry.get("bbox"), "text": entry.get("utf8_string")}
                    groups.add_row(entry.get("image_id"), word, key)
                elif not groups.add_image(key, {key: entry.get(key) for key in ("file_name", "width", "height")}):
                    raise ValueError("image id appears twice")
            except ValueError as error:
                yield Refused(what, str(error))
        if not images:
            raise ValueError(f"{self.file}: is not TextOCR's JSON: no entries in its mapping imgs")


def _annotated(group: Group) -> Annotated | Refused:
    if not isinstance(group.image["file_name"], str):
        return Refused(f"image {group.key}", "image has no file_name")
    regions = []
    refused = [(f"annotation {word['id']}", "annotation id appears twice") for word in group.repeated]
    for word in group.rows:
        try:
            if not isinstance(word["text"], str):
                raise ValueError("utf8_string is not text")
            if word["text"] == ".":
                raise ValueError("word is illegible")
            regions.append(RawRegion(box_of_xywh(word["bbox"]), word["text"]))
        except ValueError as error:
            refused.append((f"annotation {word['id']}", str(error)))
    return Annotated(
        id=group.key,
        image=group.image["file_name"],
        regions=tuple(regions),
        size=whole_size(group.image["width"], group.image["height"]),
        refused=tuple(refused),
    )
