"""A region store: ArrayRecord shards of ImageRecords with random access, and every text beside them without the pixels.

Build one from a JSON-lines file and a folder of images:

    python -m granvit.data.store annotations.jsonl images/ OUT [--bbox-frame padded_square] [--boxes absolute]

One line an image; `id` (default: the image's path), `global` and `regions` may be absent, other keys are ignored:

    {"image": "a.jpg", "id": "a", "global": "A desk ...", "regions": [{"box": [0.1, 0.2, 0.5, 0.9], "caption": "a red cup"}]}

A store is a directory: `manifest.json` (format, version, counts, files with their sizes), `shard-*.array_record` (one record an
image: uint32 length of a JSON header, the header, the encoded image) and the text side: `texts.bin` holds, image by image,
the global caption (empty where there is none) and each region's caption in UTF-8; `text_ends.u8` where each text ends and
`region_starts.i8` each image's first region (both start with 0). `sizes.u4` has each image's width and height. All of these are
mapped: counts, lengths and tilings cost no image bytes.

Whatever is bad is left out and named in `refused.jsonl`, `{"what": ..., "reason": ...}` a line (no file where there is none).

A store of conversations (`granvit.data.conversations` builds it) is the same with conversations for images, no regions, and a
conversation's whole JSON header as its one text.
"""
import argparse
import hashlib
import json
import os
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TextIO, TypeVar, get_args

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from pydantic import ConfigDict, NonNegativeInt, PositiveInt
from rich.progress import Progress

from granvit.config import DataSection, validate
from granvit.data.records import BboxFrame, BoxUnit, Conversation, ImageRecord, Region, image_box, make_record
from granvit.models import Strict
from granvit.stages import REGION_TASKS, Task

VERSION = 1
MAX_PIXELS = DataSection.model_fields["max_pixels"].default
_BUILD = (
    "build it with `python -m granvit.data.store JSONL IMAGES OUT`, or `python -m granvit.data.conversations JSON IMAGES OUT` "
    "where it is to hold conversations"
)
_NAMED = 10  # refused items named on the console
_TEXT_SIDE = ("texts.bin", "text_ends.u8", "region_starts.i8")
_CHUNK = 1 << 20  # numbers looked at together
_REFUSED = "refused.jsonl"  # beside the data, no part of it
Record = ImageRecord | Conversation
Input = TypeVar("Input")


class Shard(Strict):
    """One shard in the manifest."""

    file: str
    images: PositiveInt


class Manifest(Strict):
    """What every manifest.json states; no value is converted from another type. `bytes` are the sizes of all files."""

    model_config = ConfigDict(strict=True)

    format: str
    version: PositiveInt
    bbox_frame: BboxFrame | None
    refused: dict[str, PositiveInt]
    shards: list[Shard]
    bytes: dict[str, NonNegativeInt]


class RegionManifest(Manifest):
    """With the counts of a region store."""

    images: PositiveInt
    regions: NonNegativeInt
    globals: NonNegativeInt


class ConversationManifest(Manifest):
    """With the counts of a store of conversations."""

    conversations: PositiveInt
    turns: PositiveInt
    images: NonNegativeInt


@dataclass(frozen=True)
class Kind:
    """What a store holds: its name in the manifest, the tasks that can be asked, what the manifest counts, records first, and
    all that it states."""

    format: str
    tasks: tuple[Task, ...]
    counts: tuple[str, ...]
    manifest: type[Manifest]


REGIONS = Kind("granvit-regions", REGION_TASKS, ("images", "regions", "globals"), RegionManifest)
CONVERSATIONS = Kind("granvit-conversations", ("conversation",), ("conversations", "turns", "images"), ConversationManifest)
KINDS = {kind.format: kind for kind in (REGIONS, CONVERSATIONS)}


@dataclass
class Summary:
    """What went into a store and what was refused: counts by reason, and the first ten by name."""

    images: int = 0
    regions: int = 0
    globals: int = 0
    conversations: int = 0
    turns: int = 0
    refused: Counter = field(default_factory=Counter)
    first_refused: list[str] = field(default_factory=list)

    def refuse(self, what: str, reason: str) -> None:
        self.refused[reason] += 1
        if len(self.first_refused) < _NAMED:
            self.first_refused.append(f"{what}: {reason}")


def _header(record: Record) -> str:
    """All of a record but its image, as JSON."""
    tree = {"id": record.id, "width": record.width, "height": record.height}
    if isinstance(record, Conversation):
        tree["turns"] = record.turns
    else:
        tree["global"] = record.global_caption
        tree["regions"] = [[*region.box, region.caption] for region in record.regions]
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"))


def _encode(header: str, image: bytes) -> bytes:
    text = header.encode()
    return struct.pack("<I", len(text)) + text + image


def _decode(data: bytes) -> Record:
    (size,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + size])
    if "turns" in header:
        turns = tuple((question, answer) for question, answer in header["turns"])
        return Conversation(header["id"], header["width"], header["height"], data[4 + size :], turns)
    regions = tuple(Region(tuple(box), caption) for *box, caption in header["regions"])
    return ImageRecord(header["id"], header["width"], header["height"], data[4 + size :], header["global"], regions)


class _Writer:
    """Writes a store into `folder`, which exists and is empty."""

    def __init__(self, folder: Path, kind: Kind, shard_bytes: int):
        self.folder, self.kind, self.shard_bytes = folder, kind, shard_bytes
        self.shards: list[dict] = []
        self.summary = Summary()
        self._shard: ArrayRecordWriter | None = None
        # Closed by `finish`, or with a failed build.
        self._texts = open(folder / "texts.bin", "wb")  # noqa: SIM115
        self._ends = open(folder / "text_ends.u8", "wb")  # noqa: SIM115
        self._starts = open(folder / "region_starts.i8", "wb")  # noqa: SIM115
        self._sizes = open(folder / "sizes.u4", "wb")  # noqa: SIM115
        self._refused: TextIO | None = None
        self._ends.write(struct.pack("<Q", 0))
        self._starts.write(struct.pack("<q", 0))

    def add(self, record: Record) -> None:
        header = _header(record)
        data = _encode(header, record.image)
        if self._shard is None:
            name = f"shard-{len(self.shards):05d}.array_record"
            self._shard = ArrayRecordWriter(str(self.folder / name), "group_size:1,uncompressed")
            self.shards.append({"file": name, "images": 0})
            self._filled = 0
        self._shard.write(data)
        self.shards[-1]["images"] += 1
        self._filled += len(data)
        if isinstance(record, Conversation):
            texts = [header]
            self.summary.conversations += 1
            self.summary.turns += len(record.turns)
            self.summary.images += bool(record.image)
        else:
            texts = [record.global_caption or "", *(region.caption for region in record.regions)]
            self.summary.images += 1
            self.summary.regions += len(record.regions)
            self.summary.globals += record.global_caption is not None
        for text in texts:
            self._texts.write(text.encode())
            self._ends.write(struct.pack("<Q", self._texts.tell()))
        self._starts.write(struct.pack("<q", self.summary.regions))
        self._sizes.write(struct.pack("<II", record.width, record.height))
        if self._filled >= self.shard_bytes:
            self._close_shard()

    def refuse(self, what: str, reason: str) -> None:
        self.summary.refuse(what, reason)
        if self._refused is None:
            self._refused = open(self.folder / _REFUSED, "w")  # noqa: SIM115
        self._refused.write(json.dumps({"what": what, "reason": reason}) + "\n")

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def finish(self, frame: BboxFrame | None) -> None:
        self._close_shard()
        for file in (self._texts, self._ends, self._starts, self._sizes, self._refused):
            if file is not None:
                file.close()
        names = [shard["file"] for shard in self.shards] + ["texts.bin", "text_ends.u8", "region_starts.i8", "sizes.u4"]
        manifest = {
            "format": self.kind.format,
            "version": VERSION,
            **{count: getattr(self.summary, count) for count in self.kind.counts},
            "bbox_frame": frame,  # of the boxes as they came; the stored ones are relative to the image
            "refused": dict(self.summary.refused),
            "shards": self.shards,
            "bytes": {name: (self.folder / name).stat().st_size for name in names},
        }
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for name in [*names, "manifest.json"]:
            with open(self.folder / name, "rb") as written:
                os.fsync(written.fileno())


Item = tuple[Record | None, list[tuple[str, str]]]  # a record, and what was refused of it as (what, reason)


def write_items(items: Iterable[Item], out: str | Path, kind: Kind, frame: BboxFrame | None, shard_bytes: int) -> Summary:
    """Writes beside and renames: `out` appears whole or not at all. `ValueError` where it exists already or nothing is left."""
    out = Path(out)
    if out.exists():
        raise ValueError(f"store {out} exists already; remove it or name another directory")
    partial_out = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_out, ignore_errors=True)  # of a build that was killed
    partial_out.mkdir(parents=True)
    try:
        writer = _Writer(partial_out, kind, shard_bytes)
        for record, refused in items:
            for what, reason in refused:
                writer.refuse(what, reason)
            if record is not None:
                writer.add(record)
        if not writer.shards:
            reasons = dict(writer.summary.refused) or "the input is empty"
            raise ValueError(f"store {out}: no usable {kind.counts[0][:-1]}; refused: {reasons}")
        writer.finish(frame)
        os.rename(partial_out, out)
    except BaseException:
        shutil.rmtree(partial_out, ignore_errors=True)
        raise
    return writer.summary


def write_store(records: Iterable[ImageRecord], out: str | Path, shard_bytes: int = 256 << 20) -> Summary:
    """Writes records made by a program to a new store `out`; an invalid one raises `ValueError` and leaves no store."""

    def checked() -> Iterator[Item]:
        for record in records:
            for number, region in enumerate(record.regions):
                try:
                    image_box(list(region.box), record.width, record.height, "relative", "image")
                except ValueError as error:
                    raise ValueError(f"record {record.id!r} region {number}: {error}") from None
                if not region.caption.strip():
                    raise ValueError(f"record {record.id!r} region {number}: caption is empty")
            if record.global_caption is not None and not record.global_caption.strip():
                raise ValueError(f"record {record.id!r}: global caption is empty (None means absent)")
            yield record, []

    return write_items(checked(), out, REGIONS, "image", shard_bytes)


def read_in_threads(
    read: Callable[[Input], Item], inputs: Iterator[Input], done: Callable[[list[Input]], None]
) -> Iterator[Item]:
    """`read` of every input, in order; `done` is told which are behind. A bounded number of images is held in memory."""
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(inputs, 64)):
            yield from pool.map(read, chunk)
            done(chunk)


def read_image(path: Path) -> bytes:
    """An image file's bytes; `ValueError` with a reason that can be counted."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"image file cannot be read ({type(error).__name__})") from None


def _read_line(numbered: tuple[int, bytes], images: Path, unit: BoxUnit, frame: BboxFrame, max_pixels: int) -> Item:
    number, line = numbered
    name = f"line {number}"
    try:
        try:
            tree = json.loads(line)
        except ValueError:  # also UnicodeDecodeError
            raise ValueError("line is not valid JSON") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("image"), str):
            raise ValueError("line has no image path")
        name = str(tree["image"] if tree.get("id") is None else tree["id"]).encode(errors="replace").decode()
        data = read_image(images / tree["image"])
        record, refused = make_record(
            name, data, tree.get("global"), tree.get("regions") or [], unit=unit, frame=frame, max_pixels=max_pixels
        )
    except ValueError as error:
        return None, [(name, str(error))]
    return record, [(f"{name} {part}", reason) for part, reason in refused]


def build_store(
    jsonl: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    frame: BboxFrame = "image",
    unit: BoxUnit = "relative",
    shard_bytes: int = 256 << 20,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
) -> Summary:
    """Builds a store from a JSON-lines file and a folder of images (see the module's docstring).

    Whatever is bad is left out and named in `refused.jsonl`; `ValueError` where nothing is left, or an argument is no file or
    folder.
    """
    jsonl, images = Path(jsonl), Path(images)
    if not jsonl.is_file():
        raise ValueError(f"annotations {jsonl}: no such file")
    if not images.is_dir():
        raise ValueError(f"images {images}: no such directory")
    read = partial(_read_line, images=images, unit=unit, frame=frame, max_pixels=max_pixels)
    task = progress.add_task("images", total=jsonl.stat().st_size) if progress else None

    def items() -> Iterator[Item]:
        def done(chunk: list[tuple[int, bytes]]) -> None:
            if progress and task is not None:
                progress.advance(task, sum(len(line) for _, line in chunk))

        with open(jsonl, "rb") as file:
            yield from read_in_threads(read, ((n, line) for n, line in enumerate(file, 1) if line.strip()), done)

    return write_items(items(), out, REGIONS, frame, shard_bytes)


def _read_manifest(path: Path) -> tuple[Manifest, bytes]:
    """A store's manifest.json, which names every file once and whose counts add up, and its bytes; `ValueError` where it does
    not."""
    file = path / "manifest.json"
    try:
        data = file.read_bytes()
        tree = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"store {path}: no readable manifest.json, so this is no region store; {_BUILD} ({error})") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("format"), str) or tree["format"] not in KINDS:
        raise ValueError(f"store {path}: manifest.json is of another format than {', '.join(KINDS)}; {_BUILD}")
    if isinstance(tree.get("version"), int) and tree["version"] > VERSION:
        raise ValueError(f"store {path}: version {tree['version']} is newer than {VERSION}; update granvit")
    kind = KINDS[tree["format"]]
    try:
        manifest = validate(kind.manifest, tree, str(file))
        _check_manifest(manifest, kind)
    except ValueError as error:
        raise ValueError(f"store {path}: {error}; copy manifest.json again or rebuild the store") from None
    return manifest, data


def _check_manifest(manifest: Manifest, kind: Kind) -> None:
    """`ValueError` where the manifest contradicts itself."""
    shards = [shard.file for shard in manifest.shards]
    for name in (*shards, *manifest.bytes):
        if Path(name).name != name or "\0" in name:
            raise ValueError(f"manifest.json names {name!r}, which is not the name of a file in the store")
    if len(set(shards)) < len(shards):
        raise ValueError("manifest.json names a shard twice")
    if lacking := [name for name in (*shards, *_TEXT_SIDE) if name not in manifest.bytes]:
        raise ValueError(f"manifest.json states no size of {lacking[0]!r} under 'bytes'")
    if odd := [name for name in manifest.bytes if name not in (*shards, *_TEXT_SIDE, "sizes.u4")]:
        raise ValueError(f"manifest.json states the size of {odd[0]!r}, which is no file of a store")
    count = kind.counts[0]
    records, stated = sum(shard.images for shard in manifest.shards), getattr(manifest, count)
    if records != stated:
        raise ValueError(f"manifest.json counts {stated} under {count!r} and {records} in its shards")


class Store:
    """A store opened for reading; cheap to send to another process.

    `images` counts records (images, or conversations with and without one), `regions` and `globals` what can be asked about
    them beside; `kind` says which tasks there are. `region_starts` int64 `[images + 1]` and `text_ends` uint64
    `[images + regions + 1]` are mapped. The texts of image i are numbers `region_starts[i] + i` (its global caption) and the
    following (its regions). `sizes` uint32 `[images, 2]`, mapped too, are widths and heights; None in a store that was built
    before they were kept. Raises `ValueError`, with the path and the remedy, for a directory that is missing, empty, of
    another format or version, whose manifest does not hold together, or that has a file which is missing, not of the size
    that the manifest states, or damaged.
    """

    def __init__(self, path: str | Path, check: bool = True):
        """`check` reads the offsets of the text side once (8 bytes a text); a copy sent to another process does without."""
        self.path = path = Path(path)
        if not path.is_dir():
            raise ValueError(f"store {path}: no such directory; {_BUILD}")
        if not any(path.iterdir()):
            raise ValueError(f"store {path}: the directory is empty; {_BUILD}")
        manifest, data = _read_manifest(path)
        self.kind = KINDS[manifest.format]
        for name, size in manifest.bytes.items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size} (truncated?)"
                raise ValueError(f"store {path}: {name} {state}; copy it again or rebuild the store")
        self.images = getattr(manifest, self.kind.counts[0])
        self.regions, self.globals = getattr(manifest, "regions", 0), getattr(manifest, "globals", 0)
        self.bbox_frame: BboxFrame | None = manifest.bbox_frame
        self.region_starts = np.memmap(path / "region_starts.i8", "<i8", "r")
        self.text_ends = np.memmap(path / "text_ends.u8", "<u8", "r")
        if len(self.region_starts) != self.images + 1 or len(self.text_ends) != self.images + self.regions + 1:
            raise ValueError(f"store {path}: the text side does not match the manifest's counts; rebuild the store")
        self.sizes = None
        if "sizes.u4" in manifest.bytes:
            self.sizes = np.memmap(path / "sizes.u4", "<u4", "r").reshape(-1, 2)
            if len(self.sizes) != self.images:
                raise ValueError(f"store {path}: sizes.u4 does not match the manifest's counts; rebuild the store")
        if check:
            self._check_rising("region_starts.i8", self.region_starts, self.regions)
            self._check_rising("text_ends.u8", self.text_ends, manifest.bytes["texts.bin"])
        self.fingerprint = hashlib.sha256(data).hexdigest()[:16]
        self._shards = ArrayRecordDataSource([f"{path / s.file}[0:{s.images}]" for s in manifest.shards])

    def __reduce__(self):
        return Store, (self.path, False)

    def _check_rising(self, name: str, numbers: np.ndarray, last: int) -> None:
        """`ValueError` where the numbers in a file do not rise from 0 to `last`: they are offsets, and would lead anywhere."""
        rises = numbers[0] == 0 and numbers[-1] == last
        for first in range(0, len(numbers) - 1, _CHUNK):
            chunk = numbers[first : first + _CHUNK + 1]
            rises = rises and bool((chunk[1:] >= chunk[:-1]).all())
        if not rises:
            raise ValueError(f"store {self.path}: {name} is damaged (it does not rise from 0 to {last}); copy or rebuild it")

    def record(self, index: int) -> Record:
        """Record `index`; `ValueError` with the reason where its bytes are damaged."""
        try:
            return _decode(self._shards[index])
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, struct.error):  # RuntimeError: its checksums
            raise ValueError("record is damaged in its shard") from None

    def texts(self, first: int, last: int) -> list[str]:
        """Texts number `first` to `last` - 1, in the order of the text side."""
        ends = self.text_ends[first : last + 1].tolist()
        with open(self.path / "texts.bin", "rb") as file:
            file.seek(ends[0])
            data = file.read(ends[-1] - ends[0])
        try:
            return [data[a - ends[0] : b - ends[0]].decode() for a, b in pairwise(ends)]
        except UnicodeDecodeError:
            raise ValueError(
                f"store {self.path}: texts.bin is damaged (texts {first} to {last - 1} are no UTF-8); copy it again or rebuild"
            ) from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m granvit.data.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jsonl", metavar="JSONL", help="annotations, one image a line")
    add_build_arguments(parser)
    parser.add_argument("--bbox-frame", choices=get_args(BboxFrame), default="image", help="what boxes are relative to")
    parser.add_argument("--boxes", choices=get_args(BoxUnit), default="relative", help="0..1, or pixels (default: relative)")
    a = parser.parse_args(arguments)
    try:
        with Progress(transient=True) as progress:
            summary = build_store(
                *(a.jsonl, a.images, a.out),
                frame=a.bbox_frame,
                unit=a.boxes,
                shard_bytes=a.shard_size << 20,
                max_pixels=a.max_pixels,
                progress=progress,
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{a.out}: {summary.images} images, {summary.regions} regions, {summary.globals} global captions")
    print_refused(summary, a.out)
    return 0


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that builds a store takes behind its annotations."""
    parser.add_argument("images", metavar="IMAGES", help="folder that the annotations' image paths are relative to")
    parser.add_argument("out", metavar="OUT", help="directory to make")
    parser.add_argument("--shard-size", type=int, default=256, metavar="MB", help="shards are closed at this size (default: 256)")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="refuse larger images (default: %(default)s)")


def print_refused(summary: Summary, out: str) -> None:
    """What was refused, by reason, the first by name, and where all of it stands where those are not all."""
    for reason, count in summary.refused.most_common():
        print(f"  refused {count}: {reason}")
    for line in summary.first_refused:
        print(f"    {line}")
    if (total := summary.refused.total()) > len(summary.first_refused):
        print(f"    all {total}: {Path(out) / _REFUSED}")


if __name__ == "__main__":
    sys.exit(main())
