"""UMG-41M (https://huggingface.co/datasets/lygsbw/UMG-41M, paper https://arxiv.org/abs/2401.06397): images with tags, captions
and masks.

What its page states: a zip file for each of CC3M, CC12M, SBU, VG, YFCC15M and IN21K has folders of JSON files, one per image;
each has tags and captions of the image and of its parts, and their masks; the images, downloaded elsewhere, are PNG files in the
same folders. What it does not state, and nothing else that was found: the keys of the JSON. ASSUMED is

    {"caption": "...", "tags": ["...", "..."],
     "regions": [{"segmentation": MASK, "bbox": [...], "caption": "...", "tags": ["...", "..."]}, ...]}

with a MASK as COCO writes it (run lengths, compressed or not, or polygons). All keys are fields, so that files that differ only
in the names can be read.
"""
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.masks import box_of_mask, mask_size
from granvit.data.sources.per_image import file_parts, part_files, printable, read_tree, with_ending
from granvit.data.sources.polygons import box_of_xywh, box_of_xyxy

_ENDINGS = (".json",)


@dataclass(frozen=True)
class Umg:
    """JSON files with one image each, in the folders of `folder`.

    The image has the path of its JSON file, with `image_suffix`. `box` says where boxes come from: computed from `mask_key`, or
    `box_key` as x, y, width, height or as x1, y1, x2, y2, in pixels. `region_caption` tags takes a region's tags, joined by
    commas, instead of its caption. The size is that of the first mask of run lengths.
    """

    folder: str | Path
    image_suffix: str = ".png"
    box: Literal["mask", "xywh", "xyxy"] = "mask"
    region_caption: Literal["caption", "tags"] = "caption"
    regions_key: str = "regions"
    mask_key: str = "segmentation"
    box_key: str = "bbox"
    caption_key: str = "caption"
    tags_key: str = "tags"

    def parts(self) -> Sequence[str]:
        return file_parts(self.folder, _ENDINGS, "folder")

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        """Images in the order of the files' names. `ValueError` if files of the part are JSON, but none has the key of the
        regions."""
        readable, other = 0, None
        for file in part_files(self.folder, _ENDINGS, part):
            path, name = Path(self.folder, file), with_ending(file, "")
            try:
                tree = read_tree(path)
            except ValueError as error:
                yield Refused(printable(name), str(error))
                continue
            if not isinstance(tree, Mapping) or not isinstance(tree.get(self.regions_key), list):
                other = other or path
                yield Refused(printable(name), "file has no list of regions")
            else:
                readable += 1
                yield self._annotated(name, tree)
        if other is not None and not readable:
            raise ValueError(f"{other}: neither it nor a file beside it has a list {self.regions_key}; name its key: regions_key")

    def _annotated(self, name: str, tree: Mapping[str, Any]) -> Annotated:
        regions, sizes = [], []
        refused = []
        for place, region in enumerate(tree[self.regions_key]):
            try:
                if not isinstance(region, Mapping):
                    raise ValueError("region is not a mapping")
                sizes.append(mask_size(region.get(self.mask_key)))
                regions.append(RawRegion(self._box(region), self._caption(region)))
            except ValueError as error:
                refused.append((f"region {place}", str(error)))
        caption = tree.get(self.caption_key)
        if caption is not None and not isinstance(caption, str):
            refused.append(("global", "caption is not text"))
            caption = None
        return Annotated(
            id=printable(name),
            image=name + self.image_suffix,
            regions=tuple(regions),
            global_caption=caption,
            size=next((size for size in sizes if size is not None), None),
            refused=tuple(refused),
        )

    def _box(self, region: Mapping[str, Any]) -> tuple[float, float, float, float]:
        if self.box == "mask":
            return box_of_mask(region.get(self.mask_key))
        return (box_of_xywh if self.box == "xywh" else box_of_xyxy)(region.get(self.box_key))

    def _caption(self, region: Mapping[str, Any]) -> str:
        if self.region_caption == "tags":
            tags = region.get(self.tags_key)
            if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
                raise ValueError("tags are not a list of texts")
            return ", ".join(tags)
        caption = region.get(self.caption_key)
        if not isinstance(caption, str):
            raise ValueError("caption is not text")
        return caption
