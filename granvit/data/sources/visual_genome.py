"""Visual Genome's region descriptions (https://homes.cs.washington.edu/~ranjay/visualgenome/api_readme.html).

`region_descriptions.json` is a list of images, each with `id` and `regions`: a list of `region_id`, `image_id`, `x`, `y`,
`width`, `height`, `phrase`. `image_data.json` is a list of `image_id`, `url`, `width`, `height`, `coco_id`, `flickr_id`. Versions
differ in whether an image's id is called `id` or `image_id`. The url ends with folder and file name of the image,
`VG_100K_2/1.jpg`; the file name is not always the image's id.
"""
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.grouping import Group, Groups
from granvit.data.sources.inputs import Damaged, need_file, read_json
from granvit.data.sources.polygons import box_of_xywh, whole_size


@dataclass(frozen=True)
class VisualGenome:
    """Region descriptions, from the two files `regions` and `images`. The folder of images holds `VG_100K` and `VG_100K_2`.

    If one of the files is cut off, the source is refused as a whole: the regions of any image may be missing.
    """

    regions: str | Path
    images: str | Path

    def parts(self) -> Sequence[str]:
        """One part, the name of the file of regions. `ValueError` if a file is missing."""
        need_file(self.images, "images")
        return (need_file(self.regions, "regions").name,)

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        """Images in the order of their file. `ValueError` if a file is not Visual Genome's JSON."""
        with Groups() as groups:
            try:
                yield from self._load_images(groups)
                yield from self._load_regions(groups)
            except Damaged as damage:
                yield Refused(damage.name, damage.reason)
                return
            for group in groups.read():
                yield _annotated(group)
            for region in groups.without_image():
                yield Refused(_what(region), "image of the annotation has no entry")

    def _load_images(self, groups: Groups) -> Iterator[Refused]:
        with_url = 0
        for _, number, image in read_json(Path(self.images), lists=("",)):
            try:
                if not isinstance(image, Mapping):
                    raise ValueError("entry is not a mapping")
                with_url += "url" in image
                if not groups.add_image(_id(image), {key: image.get(key) for key in ("url", "width", "height")}):
                    raise ValueError("image id appears twice")
            except ValueError as error:
                yield Refused(f"image {number} of the file", str(error))
        if not with_url:
            raise ValueError(f"{self.images}: is not Visual Genome's image_data.json: no entry has a url")

    def _load_regions(self, groups: Groups) -> Iterator[Refused]:
        lists = 0
        for _, number, image in read_json(Path(self.regions), lists=("",)):
            regions = image.get("regions") if isinstance(image, Mapping) else None
            if not isinstance(regions, list):
                yield Refused(f"entry {number} of the file", "entry has no list of regions")
                continue
            lists += 1
            for place, region in enumerate(regions):
                try:
                    if not isinstance(region, Mapping):
                        raise ValueError("region is not a mapping")
                    groups.add_row(_id(image), region, region.get("region_id"))
                except ValueError as error:
                    yield Refused(f"region {place} in entry {number} of the file", str(error))
        if not lists:
            raise ValueError(f"{self.regions}: is not Visual Genome's region_descriptions.json: no entry has a list of regions")


def _annotated(group: Group) -> Annotated | Refused:
    url = group.image["url"]
    if not isinstance(url, str) or url.count("/") < 2:
        return Refused(f"image {group.key}", "image has no url")
    regions = []
    refused = [(_what(region), "annotation id appears twice") for region in group.repeated]
    for region in group.rows:
        try:
            if not isinstance(region.get("phrase"), str):
                raise ValueError("phrase is not text")
            box = box_of_xywh([region.get(key) for key in ("x", "y", "width", "height")])
            regions.append(RawRegion(box, region["phrase"]))
        except ValueError as error:
            refused.append((_what(region), str(error)))
    return Annotated(
        id=group.key,
        image="/".join(url.split("/")[-2:]),
        regions=tuple(regions),
        size=whole_size(group.image["width"], group.image["height"]),
        refused=tuple(refused),
    )


def _id(image: Mapping[str, Any]) -> Any:
    return image.get("image_id", image.get("id"))


def _what(region: Mapping[str, Any]) -> str:
    return f"region {region.get('region_id')}"
