"""Writes records to a new store (`granvit.data.store` documents its format), complete or not at all."""
import errno
import json
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from granvit.data.records import BboxFrame, Conversation, ImageRecord, image_box
from granvit.data.store import REGIONS, TEXT_SIDE, VERSION, Kind, Record, file_sha256

_NAMED = 10  # refused items printed by name
FILES = (*TEXT_SIDE, "sizes.u4")
REFUSED = "refused.jsonl"  # not listed in the manifest: readers do not need it
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # the last: too many links of one file


@dataclass
class Summary:
    """Counts of what a store contains; of what was refused, counts by reason and the first ten items by name."""

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
    """A record without its image, as JSON."""
    tree: dict[str, Any] = {"id": record.id, "width": record.width, "height": record.height}
    if isinstance(record, Conversation):
        tree["turns"] = record.turns
    else:
        tree["global"] = record.global_caption
        tree["regions"] = [[*region.box, region.caption] for region in record.regions]
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"))


class StoreWriter:
    """Writes a store into `folder`, which exists and is empty: `add` and `refuse`, then `finish`."""

    def __init__(self, folder: Path, kind: Kind, shard_bytes: int):
        self.folder, self.kind, self.shard_bytes = folder, kind, shard_bytes
        self.shards: list[dict] = []
        self._hashes: dict[str, str] = {}  # of closed shards
        self.summary = Summary()
        self._shard: ArrayRecordWriter | None = None
        self._files = [open(folder / name, "wb") for name in FILES]  # noqa: SIM115 (closed by finish)
        self._texts, self._ends, self._starts, self._sizes = self._files
        self._refused: TextIO | None = None
        self._ends.write(struct.pack("<Q", 0))
        self._starts.write(struct.pack("<q", 0))

    def add(self, record: Record) -> None:
        header = _header(record)
        encoded_header = header.encode()
        data = struct.pack("<I", len(encoded_header)) + encoded_header + record.image
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
            self._refused = open(self.folder / REFUSED, "w")  # noqa: SIM115
        self._refused.write(json.dumps({"what": what, "reason": reason}) + "\n")

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None
            name = self.shards[-1]["file"]
            self._hashes[name] = file_sha256(self.folder / name)  # still in the page cache

    def finish(self, frame: BboxFrame | None) -> None:
        self._close_shard()
        for file in (*self._files, self._refused):
            if file is not None:
                file.close()
        counts = {count: getattr(self.summary, count) for count in self.kind.counts}
        _write_manifest(self.folder, self.kind, counts, frame, dict(self.summary.refused), self.shards, self._hashes)


def _write_manifest(folder: Path, kind: Kind, counts: dict[str, int], frame: BboxFrame | None, refused: dict[str, int],
                    shards: list[dict], hashes: Mapping[str, str]) -> None:  # fmt: skip
    """Writes the manifest of a store whose other files are complete, and syncs all. `hashes` are those of the shards."""
    names = [*(shard["file"] for shard in shards), *FILES]
    manifest = {
        "format": kind.format,
        "version": VERSION,
        **counts,
        "bbox_frame": frame,  # of the input's boxes; stored boxes are relative to the image
        "refused": refused,
        "shards": shards,
        "bytes": {name: (folder / name).stat().st_size for name in names},
        "sha256": {**hashes, **{name: file_sha256(folder / name) for name in FILES}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for name in [*names, "manifest.json"]:
        with open(folder / name, "rb") as written:
            os.fsync(written.fileno())


Item = tuple[Record | None, list[tuple[str, str]]]  # a record (None: refused), and what was refused of it as (what, reason)


def write_items(items: Iterable[Item], out: str | Path, kind: Kind, frame: BboxFrame | None, shard_bytes: int) -> Summary:
    """Writes `out` under a temporary name and renames it at the end. `ValueError` if `out` exists or no record is left."""
    out = Path(out)
    if out.exists():
        raise ValueError(f"store {out} exists already; remove it or name another directory")
    partial_out = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_out, ignore_errors=True)  # left by a build that was killed
    partial_out.mkdir(parents=True)
    try:
        writer = StoreWriter(partial_out, kind, shard_bytes)
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


def check_links(folder: Path) -> None:
    """Tries a hard link in `folder`, made if it is not there. `ValueError` if its file system has none: `join_stores` would
    fail."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".links-", dir=folder) as trial:
        file = Path(trial) / "file"
        file.touch()
        _link(file, Path(trial) / "link")


def _link(source: Path, link: Path) -> None:
    """`os.link`; `ValueError` if the file system cannot do it."""
    try:
        os.link(source, link)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise ValueError(
            f"{link} cannot be a hard link to {source} ({error.strerror}): a build's directory must be on one file system, with "
            "hard links; choose another directory"
        ) from None


def join_stores(parts: Sequence[Path], names: Sequence[str], out: Path) -> None:
    """Joins region stores into `out`, which exists and is empty: shards are hard links with names from `names`, one for each
    part, and the text files are concatenated. A part may hold no image. `ValueError` if the file system has no hard links (see
    `check_links`)."""
    shards: list[dict] = []
    hashes: dict[str, str] = {}
    counts = Counter({count: 0 for count in REGIONS.counts})
    refused: Counter[str] = Counter()
    texts_end = regions_end = 0
    with ExitStack() as stack:
        texts, ends, starts, sizes = (stack.enter_context(open(out / name, "wb")) for name in FILES)
        ends.write(struct.pack("<Q", 0))
        starts.write(struct.pack("<q", 0))
        for part, name in zip(parts, names, strict=True):
            manifest = json.loads((part / "manifest.json").read_text())
            for number, shard in enumerate(manifest["shards"]):
                file = f"{name}-{number:05d}.array_record"
                _link(part / shard["file"], out / file)
                hashes[file] = manifest.get("sha256", {}).get(shard["file"]) or file_sha256(part / shard["file"])
                shards.append({"file": file, "images": shard["images"]})
            for file, target in (("texts.bin", texts), ("sizes.u4", sizes)):
                with open(part / file, "rb") as source:
                    shutil.copyfileobj(source, target, 1 << 24)
            ends.write((np.fromfile(part / "text_ends.u8", "<u8")[1:] + np.uint64(texts_end)).tobytes())
            starts.write((np.fromfile(part / "region_starts.i8", "<i8")[1:] + regions_end).tobytes())
            texts_end, regions_end = texts.tell(), regions_end + manifest["regions"]
            counts.update({count: manifest[count] for count in REGIONS.counts})
            refused.update(manifest["refused"])
            if (part / REFUSED).exists():
                with open(part / REFUSED, "rb") as source, open(out / REFUSED, "ab") as target:
                    shutil.copyfileobj(source, target)
    _write_manifest(out, REGIONS, dict(counts), "image", dict(refused), shards, hashes)


def write_store(records: Iterable[ImageRecord], out: str | Path, shard_bytes: int = 256 << 20) -> Summary:
    """Writes records that a program made to a new store `out`. An invalid record raises `ValueError`, and no store is written."""

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
