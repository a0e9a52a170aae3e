"""Reads a store: ArrayRecord shards of records with random access, and all texts in separate files.

`granvit.data.build_store` builds one from a JSON-lines file and a folder of images, `granvit.data.store_writer` writes the files.

A store is a directory:
- `manifest.json`: format, version, counts, files with their sizes and SHA-256.
- `shard-*.array_record`: one record per image: uint32 length of a JSON header, the header, the encoded image.
- `texts.bin`: UTF-8; for each image the global caption (empty if there is none), then the caption of each region.
- `text_ends.u8`: a 0, then the offset at which each text ends. `region_starts.i8`: the number of each image's first region, then
  the number of regions.
- `sizes.u4`: width and height of each image.
The last three are memory-mapped, so that counts, lengths and tilings are known without reading images.

A store of conversations (`granvit.data.conversations` builds it) has one record per conversation, no regions, and the JSON header
of each conversation as its one text.
"""
import errno
import hashlib
import json
import os
import resource
import struct
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt

from granvit.config import DataSection, validate
from granvit.data.records import BboxFrame, Conversation, ImageRecord, Region
from granvit.models import Strict
from granvit.stages import REGION_TASKS, Task

VERSION = 1
MAX_PIXELS = DataSection.model_fields["max_pixels"].default
_BUILD = (
    "build it with `python -m granvit.data.build_store JSONL IMAGES OUT`, or `python -m granvit.data.conversations JSON IMAGES "
    "OUT` for conversations"
)
TEXT_SIDE = ("texts.bin", "text_ends.u8", "region_starts.i8")  # "sizes.u4" is not in older stores
OPEN_SHARDS = 128  # of a store in each process: a file descriptor each. To open one of 256 MB takes about 0.1 ms
_CHUNK = 1 << 20  # numbers checked at a time
_DAMAGED = (RuntimeError, ValueError, IndexError, KeyError, TypeError, struct.error)  # RuntimeError: a checksum
Record = ImageRecord | Conversation


class Shard(Strict):
    """One shard in the manifest."""

    file: str
    images: PositiveInt


class Manifest(Strict):
    """The keys of every manifest.json; values of another type are errors. `bytes` maps files to their sizes, `sha256` the same
    files to the hashes of their contents; older stores have no hashes."""

    model_config = ConfigDict(strict=True)

    format: str
    version: PositiveInt
    bbox_frame: BboxFrame | None
    refused: dict[str, PositiveInt]
    shards: list[Shard]
    bytes: dict[str, NonNegativeInt]
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field({})


class RegionManifest(Manifest):
    """The manifest of a region store."""

    images: PositiveInt
    regions: NonNegativeInt
    globals: NonNegativeInt


class ConversationManifest(Manifest):
    """The manifest of a store of conversations."""

    conversations: PositiveInt
    turns: PositiveInt
    images: NonNegativeInt


@dataclass(frozen=True)
class Kind:
    """A kind of store: `format` in its manifest, the tasks that its records have, the manifest's counts (that of the records
    first), and the schema of the manifest."""

    format: str
    tasks: tuple[Task, ...]
    counts: tuple[str, ...]
    manifest: type[Manifest]


REGIONS = Kind("granvit-regions", REGION_TASKS, ("images", "regions", "globals"), RegionManifest)
CONVERSATIONS = Kind("granvit-conversations", ("conversation",), ("conversations", "turns", "images"), ConversationManifest)
KINDS = {kind.format: kind for kind in (REGIONS, CONVERSATIONS)}


def _decode(data: bytes) -> Record:
    (size,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + size])
    if "turns" in header:
        turns = tuple((question, answer) for question, answer in header["turns"])
        return Conversation(header["id"], header["width"], header["height"], data[4 + size :], turns)
    regions = tuple(Region(tuple(box), caption) for *box, caption in header["regions"])
    return ImageRecord(header["id"], header["width"], header["height"], data[4 + size :], header["global"], regions)


def _open_shard(path: Path) -> ArrayRecordReader:
    """A shard's reader; threads may share it. `OSError` if the process has no file descriptor left, `RuntimeError` if the shard
    is damaged."""
    reader = ArrayRecordReader(str(path), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)
    if not reader.ok():
        try:
            reader.close()  # raises the reason
        except RuntimeError as error:
            if os.strerror(errno.EMFILE) not in str(error):
                raise
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise OSError(
                errno.EMFILE,
                f"{path}: too many open files. This process may have {limit} (`ulimit -n`), and each of its stores keeps up to "
                f"{OPEN_SHARDS} shards open; raise `ulimit -n` and start again",
            ) from None
    return reader


def _read_manifest(path: Path) -> tuple[Manifest, bytes]:
    """A store's validated manifest.json, and its bytes. `ValueError` if it is missing, damaged, of another format or version, or
    inconsistent."""
    file = path / "manifest.json"
    try:
        data = file.read_bytes()
        tree = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"store {path}: cannot read manifest.json, so this is not a store; {_BUILD} ({error})") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("format"), str) or tree["format"] not in KINDS:
        raise ValueError(f"store {path}: the format in manifest.json is not one of {', '.join(KINDS)}; {_BUILD}")
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
    """`ValueError` if the manifest is inconsistent."""
    shards = [shard.file for shard in manifest.shards]
    for name in (*shards, *manifest.bytes):
        if Path(name).name != name or "\0" in name:
            raise ValueError(f"manifest.json names {name!r}, which is not the name of a file in the store")
    if len(set(shards)) < len(shards):
        raise ValueError("manifest.json lists a shard twice")
    if sizeless := [name for name in (*shards, *TEXT_SIDE) if name not in manifest.bytes]:
        raise ValueError(f"manifest.json has no size of {sizeless[0]!r} under 'bytes'")
    if unknown := [name for name in manifest.bytes if name not in (*shards, *TEXT_SIDE, "sizes.u4")]:
        raise ValueError(f"manifest.json has a size of {unknown[0]!r} under 'bytes', which is not a file of a store")
    count = kind.counts[0]
    if manifest.sha256 and (odd := sorted(manifest.sha256.keys() ^ manifest.bytes.keys())):
        raise ValueError(f"manifest.json has {odd[0]!r} under only one of 'bytes' and 'sha256'")
    records, stated = sum(shard.images for shard in manifest.shards), getattr(manifest, count)
    if records != stated:
        raise ValueError(f"manifest.json counts {stated} under {count!r} and {records} in its shards")


class Store:
    """A store opened for reading; cheap to pickle, and safe for threads. At most `OPEN_SHARDS` of its shards are open at a time,
    those read last.

    `records` is the number of records (images or conversations), `regions` and `globals` that of regions and global captions;
    `kind` has the tasks. `region_starts` int64 `[records + 1]` and `text_ends` uint64 `[records + regions + 1]` are
    memory-mapped. The texts of record i begin at index `region_starts[i] + i` (its global caption); those of its regions follow.
    `sizes`, memory-mapped uint32 `[records, 2]`, are widths and heights; None in an older store without them.
    `ValueError`, with the path and the remedy, if the directory is missing, empty or of another format or version, its manifest
    is inconsistent, or a file is missing, damaged or has another size than the manifest states.
    """

    def __init__(self, path: str | Path, check: bool = True):
        """`check` reads all offsets once (8 bytes per text) to validate them; an unpickled copy skips this."""
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
        self.records = getattr(manifest, self.kind.counts[0])
        self.regions, self.globals = getattr(manifest, "regions", 0), getattr(manifest, "globals", 0)
        self.region_starts = np.memmap(path / "region_starts.i8", "<i8", "r")
        self.text_ends = np.memmap(path / "text_ends.u8", "<u8", "r")
        if len(self.region_starts) != self.records + 1 or len(self.text_ends) != self.records + self.regions + 1:
            files = "region_starts.i8 or text_ends.u8"
            raise ValueError(f"store {path}: {files} does not match the manifest's counts; rebuild the store")
        self.sizes = None
        if "sizes.u4" in manifest.bytes:
            self.sizes = np.memmap(path / "sizes.u4", "<u4", "r").reshape(-1, 2)
            if len(self.sizes) != self.records:
                raise ValueError(f"store {path}: sizes.u4 does not match the manifest's counts; rebuild the store")
        if check:
            self._check_rising("region_starts.i8", self.region_starts, self.regions)
            self._check_rising("text_ends.u8", self.text_ends, manifest.bytes["texts.bin"])
        self.fingerprint = hashlib.sha256(data).hexdigest()[:16]
        self._shards = [path / shard.file for shard in manifest.shards]
        self._firsts = [0, *accumulate(shard.images for shard in manifest.shards)]  # each shard's first record, then their number
        self._reader = lru_cache(OPEN_SHARDS)(_open_shard)

    def __reduce__(self):
        return Store, (self.path, False)

    def _check_rising(self, name: str, numbers: np.ndarray, last: int) -> None:
        """`ValueError` unless the numbers in a file ascend from 0 to `last`, as offsets must."""
        rises = numbers[0] == 0 and numbers[-1] == last
        for first in range(0, len(numbers) - 1, _CHUNK):
            chunk = numbers[first : first + _CHUNK + 1]
            rises = rises and bool((chunk[1:] >= chunk[:-1]).all())
        if not rises:
            raise ValueError(f"store {self.path}: {name} is damaged (does not ascend from 0 to {last}); copy or rebuild it")

    def record(self, index: int) -> Record:
        """Record `index`; `ValueError` with the reason if its bytes are damaged, `OSError` if no more files can be opened."""
        assert 0 <= index < self.records
        shard = bisect_right(self._firsts, index) - 1
        try:
            return _decode(self._reader(self._shards[shard]).read([index - self._firsts[shard]])[0])
        except _DAMAGED:
            raise ValueError("record is damaged in its shard") from None

    def texts(self, first: int, last: int) -> list[str]:
        """Texts with index `first` to `last` - 1."""
        ends = self.text_ends[first : last + 1].tolist()
        with open(self.path / "texts.bin", "rb") as file:
            file.seek(ends[0])
            data = file.read(ends[-1] - ends[0])
        try:
            return [data[a - ends[0] : b - ends[0]].decode() for a, b in pairwise(ends)]
        except UnicodeDecodeError:
            raise ValueError(
                f"store {self.path}: texts.bin is damaged (texts {first} to {last - 1} are not UTF-8); copy it again or rebuild"
            ) from None


def read_shards(shards: Sequence[tuple[Path, int]]) -> Iterator[Record]:
    """The records of shard files `(path, number of records)`, in order, without a manifest. `ValueError` names a damaged file,
    `OSError` one that cannot be opened because too many are."""
    for path, count in shards:
        index = 0
        try:
            reader = _open_shard(path)
            for index in range(count):
                yield _decode(reader.read([index])[0])
        except _DAMAGED:
            raise ValueError(f"{path}: record {index} is damaged") from None


def file_sha256(path: Path, done: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 of a file's contents, in hex. Calls `done` with the number of bytes of each piece that was read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
            done(len(data))
    return digest.hexdigest()


def stated_bytes(path: Path) -> int:
    """The size of all files of a store, as its manifest states it."""
    return sum(_read_manifest(path)[0].bytes.values())


def differing_files(path: Path, done: Callable[[int], object]) -> Iterator[tuple[str, str]]:
    """Reads all files of a store; yields name and reason of each that is not the one whose hash is in the manifest.

    Calls `done` with the number of bytes of each piece that was read. `ValueError` if the manifest is damaged or has no hashes.
    """
    manifest, _ = _read_manifest(path)
    if not manifest.sha256:
        raise ValueError(f"store {path}: manifest.json has no hashes (an earlier version wrote it); rebuild the store")
    for name, size in manifest.bytes.items():
        file = path / name
        try:
            found = file.stat().st_size
            if found != size:
                yield name, f"has {found} bytes instead of {size}"
            elif file_sha256(file, done) != manifest.sha256[name]:
                yield name, "has other contents than its SHA-256 in manifest.json"
        except FileNotFoundError:
            yield name, "is missing"
        except OSError as error:
            yield name, f"cannot be read ({error.strerror})"


if __name__ == "__main__":
    sys.exit("error: stores are built with `granvit-store`, or `python -m granvit.data.build_store`")
