"""The units of work of a build: what one rank does alone. They follow from the sources, not from the number of ranks.

Where the annotations of a source hold its images (tar, Parquet), a unit is a part of its reader. Elsewhere each part is read once
and cut into files of `unit_images` images (OUT/read), because one JSON file can describe millions of images that lie elsewhere.
"""
import errno
import hashlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, get_args, get_type_hints

from granvit.checkpoint.tensors import sync_directory
from granvit.data.gran.config import BuildConfig, SourceConfig
from granvit.data.sources.annotated import Annotated, RawRegion, Refused

Item = Annotated | Refused
_HOLD_IMAGES = (".parquet", ".tar")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PARTIAL = ".*.partial"  # hidden: a source or store cannot have such a name


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
            names = _parts(name, source)
            folder = out / "read" / f"{name}-{_read_key(config, source, names)}"
            found += [Part(name, part, folder / f"{number:06d}") for number, part in enumerate(names)]
    return found


def read_part(config: BuildConfig, part: Part) -> None:
    """Reads a part into files of `unit_images` items, unless that is done. Its folder appears complete or not at all."""
    if part.folder.exists():
        return
    with whole_folder(part.folder) as folder:
        items = _of_source(part.source, config.sources[part.source].reader().read(part.name))
        for number, chunk in enumerate(batched_items(items, config.unit_images)):
            (folder / f"{number:06d}.jsonl").write_text("".join(json.dumps(_tree(item)) + "\n" for item in chunk))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end of the `with`; after an error nothing is left of it. Its files
    are synced to the disk before it is renamed, so that `folder` is complete after a crash of the machine too. If another process
    has made `folder` meanwhile, that one stays. `OSError` names the folder, or the file in it, where the disk is full."""
    partial = folder.with_name(f".{folder.name}.{socket.gethostname()}-{os.getpid()}.partial")  # no other process has this name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _publish(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _FULL and not error.filename:
            raise OSError(error.errno, os.strerror(error.errno), str(partial)) from None
        if isinstance(error, RuntimeError) and "write() failed" in str(error):  # of array_record; the text has the file and why
            raise OSError(str(error)) from None
        raise


def _publish(partial: Path, folder: Path) -> None:
    for path in sorted(partial.iterdir()):
        with open(path, "rb") as written:
            os.fsync(written.fileno())
    sync_directory(partial)
    try:
        os.rename(partial, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(partial)
    sync_directory(folder.parent)


def remove_partials(out: Path) -> None:
    """Removes what killed processes left of folders in OUT, OUT/read and OUT/units. To be called before any process of the build
    works; a process of an earlier one that still runs then fails at the end of its folder, instead of making it."""
    for place in (out, *out.glob("read/*"), *out.glob("units/*")):
        for partial in place.glob(_PARTIAL):
            # Renamed first: its process must not rename it while a part of its files is removed.
            removed = partial.with_name(f".removed{partial.name}")
            os.rename(partial, removed)
            shutil.rmtree(removed, ignore_errors=True)  # on NFS files that are open stay; the next build removes them


def batched_items(items: Iterator[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """Tuples of `size` items; at least one tuple, which is empty if there are no items."""
    chunk = tuple(islice(items, size))
    yield chunk
    while chunk := tuple(islice(items, size)):
        yield chunk


def all_units(config: BuildConfig, out: Path, versions: dict[str, str]) -> list[Unit]:
    """The units of all sources in a fixed order, after all parts were read. `versions` are those of the sources' annotators.
    `ValueError` names a source whose files have changed since they were read."""
    units = []
    for name, source in config.sources.items():
        names = _parts(name, source)
        read_key = _read_key(config, source, names)
        folder = out / "units" / f"{name}-{_hash(read_key, _settings(config, source), versions[name])}"
        origins: list[tuple[Path | None, str | None]] = []
        if source.images is None:
            origins += [(None, part) for part in names]
        else:
            read = out / "read" / f"{name}-{read_key}"
            if read.name not in os.listdir(read.parent):  # listed: `exists` can miss what another machine has just made on NFS
                raise ValueError(f"sources.{name}: its files have changed since this build read them; start it again")
            origins += [(file, None) for number in range(len(names)) for file in sorted((read / f"{number:06d}").glob("*.jsonl"))]
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


def _read_key(config: BuildConfig, source: SourceConfig, parts: Sequence[str]) -> str:
    return _hash(source.read, config.unit_images, _state(source, parts))


def _state(source: SourceConfig, parts: Sequence[str]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of the source's files and folders, so that what is read again after a change.

    These are the paths among the reader's fields, and of a folder its Parquet and tar files and the folders that its parts are
    in. Other files in folders, such as one annotation file per image, can be millions: that one is added or removed changes the
    time of its folder, but that one is overwritten in place is not noticed.
    """
    reader = source.reader()
    hints = get_type_hints(type(reader))
    given = [getattr(reader, field.name) for field in fields(reader) if Path in get_args(hints[field.name])]  # type: ignore[arg-type]
    found: set[Path] = set()
    for path in (Path(value) for value in given if value is not None):
        found.add(path)
        if path.is_dir():
            found |= {path / name for name in os.listdir(path) if name.endswith(_HOLD_IMAGES)}
            found |= {path / part if (path / part).exists() else path / part.rpartition(":")[0] for part in parts}
    states = [(str(path), path.stat()) for path in sorted(found) if path.exists()]
    return [(name, 0 if stat.S_ISDIR(state.st_mode) else state.st_size, state.st_mtime_ns) for name, state in states]


def _settings(config: BuildConfig, source: SourceConfig) -> list[Any]:
    """The settings that a unit's result depends on, besides what is read and the annotators. Other settings make other units."""
    kept = source.model_dump(mode="json", include={"images", "keep_region_captions", "keep_global_captions", "filters"})
    return [kept, config.model_dump(mode="json", include={"max_pixels", "image", "shard_megabytes"})]


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
