"""The units of work of a build: what one rank does alone. They follow from the sources, not from the number of ranks.

Where the annotations of a source hold its images (tar, Parquet), a unit is a part of its reader. Elsewhere each part is read once
and cut into files of `unit_images` images (OUT/read), because one JSON file can describe millions of images that lie elsewhere.
"""
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from granvit.checkpoint.tensors import write_synced
from granvit.data.gran.config import BuildConfig, SourceConfig
from granvit.data.sources.annotated import Annotated, RawRegion, Refused

Item = Annotated | Refused


@dataclass(frozen=True)
class Part:
    """One part of a source's reader that is to be read into `folder`."""

    source: str
    name: str
    folder: Path


@dataclass(frozen=True)
class Unit:
    """Unit `number` of a source: a file of OUT/read (`file`), or a part of its reader. `folder` is where its result goes."""

    source: str
    number: int
    file: Path | None
    part: str | None
    folder: Path


def parts_to_read(config: BuildConfig, out: Path) -> list[Part]:
    """The parts of all sources whose annotations do not hold the images, in a fixed order. `ValueError` names a source whose
    files are missing."""
    found = []
    for name, source in config.sources.items():
        if source.images is not None:
            folder = out / "read" / f"{name}-{_read_key(config, source)}"
            found += [Part(name, part, folder / f"{number:06d}") for number, part in enumerate(_parts(name, source))]
    return found


def read_part(config: BuildConfig, part: Part) -> None:
    """Reads a part into files of `unit_images` items, unless that is done. Its folder appears complete or not at all."""
    if part.folder.exists():
        return
    partial = part.folder.with_name(part.folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a build that was killed
    partial.mkdir(parents=True)
    items = _of_source(part.source, config.sources[part.source].reader().read(part.name))
    for number, chunk in enumerate(batched_items(items, config.unit_images)):
        write_synced(partial / f"{number:06d}.jsonl", "".join(json.dumps(_tree(item)) + "\n" for item in chunk))
    os.rename(partial, part.folder)


def batched_items(items: Iterator[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """Tuples of `size` items; at least one tuple, which is empty if there are no items."""
    chunk = tuple(islice(items, size))
    yield chunk
    while chunk := tuple(islice(items, size)):
        yield chunk


def all_units(config: BuildConfig, out: Path, versions: dict[str, str]) -> list[Unit]:
    """The units of all sources in a fixed order, after all parts were read. `versions` are those of the sources' annotators."""
    units = []
    for name, source in config.sources.items():
        folder = out / "units" / f"{name}-{_unit_key(config, source, versions[name])}"
        if source.images is None:
            origins: list[tuple[Path | None, str | None]] = [(None, part) for part in _parts(name, source)]
        else:
            read = [part.folder for part in parts_to_read(config, out) if part.source == name]
            origins = [(file, None) for part_folder in read for file in sorted(part_folder.glob("*.jsonl"))]
        units += [Unit(name, number, *origin, folder / f"{number:06d}") for number, origin in enumerate(origins)]
    return units


def items_of(config: BuildConfig, unit: Unit) -> Iterator[Item]:
    """The items of a unit, in the order of the source."""
    if unit.file is None:
        assert unit.part is not None
        yield from _of_source(unit.source, config.sources[unit.source].reader().read(unit.part))
        return
    with open(unit.file) as lines:
        for line in lines:
            yield _item(json.loads(line))


def _of_source(name: str, items: Iterator[Item]) -> Iterator[Item]:
    """The items; an error that ends them names the source."""
    try:
        yield from items
    except ValueError as error:
        raise ValueError(f"sources.{name}: {error}") from None


def _parts(name: str, source: SourceConfig) -> list[str]:
    try:
        return list(source.reader().parts())
    except ValueError as error:
        raise ValueError(f"sources.{name}: {error}") from None


def _read_key(config: BuildConfig, source: SourceConfig) -> str:
    return _hash(source.read, config.unit_images)


def _unit_key(config: BuildConfig, source: SourceConfig, version: str) -> str:
    """A hash of all settings that a unit's result depends on. A changed setting makes other units; the files of a source are
    taken to be unchanged."""
    kept = source.model_dump(mode="json", include={"images", "keep_region_captions", "keep_global_captions", "filters"})
    common = config.model_dump(mode="json", include={"max_pixels", "image", "shard_megabytes"})
    return _hash(_read_key(config, source), kept, common, version)


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _tree(item: Item) -> dict[str, Any]:
    if isinstance(item, Refused):
        return {"what": item.what, "reason": item.reason}
    assert isinstance(item.image, str), item.id  # sources with a folder of images name them
    return {
        "id": item.id, "image": item.image, "regions": [[*region.box, region.caption] for region in item.regions],
        "global": item.global_caption, "unit": item.unit, "frame": item.frame, "size": item.size, "refused": item.refused,
    }  # fmt: skip


def _item(tree: dict[str, Any]) -> Item:
    if "what" in tree:
        return Refused(tree["what"], tree["reason"])
    regions = tuple(RawRegion((x1, y1, x2, y2), caption) for x1, y1, x2, y2, caption in tree["regions"])
    size = None if tree["size"] is None else (tree["size"][0], tree["size"][1])
    refused = tuple((what, reason) for what, reason in tree["refused"])
    return Annotated(tree["id"], tree["image"], regions, tree["global"], tree["unit"], tree["frame"], size, refused)
