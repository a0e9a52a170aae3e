"""The JSON lines that `granvit-store` builds stores from (`granvit/data/build_store.py` documents them):

    {"image": "a.jpg", "id": "a", "global": "A desk ...", "regions": [{"box": [0.1, 0.2, 0.5, 0.9], "caption": "a red cup"}]}
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granvit.data.records import BboxFrame, BoxUnit
from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.inputs import need_file
from granvit.data.sources.lines import json_lines
from granvit.data.sources.per_image import text_of
from granvit.data.sources.polygons import box_of_xyxy


@dataclass(frozen=True)
class JsonLines:
    """`annotations`: the file. `boxes` and `frame`: unit of the boxes and what they are relative to, as the command's options."""

    annotations: str | Path
    boxes: BoxUnit = "relative"
    frame: BboxFrame = "image"

    def parts(self) -> Sequence[str]:
        return [need_file(self.annotations, "annotations").name]

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        return json_lines(Path(self.annotations), self._image)

    def _image(self, tree: dict[str, Any], place: str) -> Annotated:
        name, image = described(tree)
        entries = tree.get("regions") or []
        if not isinstance(entries, list):
            raise ValueError("regions is not a list")
        regions: list[RawRegion] = []
        refused: list[tuple[str, str]] = []
        for number, region in enumerate(entries):
            try:
                if not isinstance(region, dict):
                    raise ValueError("region is not a mapping with box and caption")
                regions.append(RawRegion(box_of_xyxy(region.get("box")), text_of(region.get("caption"))))
            except ValueError as error:
                refused.append((f"region {number}", str(error)))
        global_caption = tree.get("global")
        if global_caption is not None and not isinstance(global_caption, str):
            refused.append(("global", "global caption is not text"))
            global_caption = None
        return Annotated(name, image, tuple(regions), global_caption, self.boxes, self.frame, refused=tuple(refused))


def described(tree: Any) -> tuple[str, str]:
    """A line's id and the path of its image. `ValueError` with the reason if it has no image."""
    if not isinstance(tree, dict) or not isinstance(tree.get("image"), str):
        raise ValueError("line has no image path")
    name = tree["image"] if tree.get("id") is None else tree["id"]
    return str(name).encode(errors="replace").decode(), tree["image"]
