"""Reads and writes safetensors files, one tensor in memory at a time. bfloat16 is `ml_dtypes.bfloat16`.

A set of tensors with the stem `model` is one file `model.safetensors`, or, above a size limit, several files
`model-00001-of-0000N.safetensors` with `model.safetensors.index.json`, as model publishers ship them. A set that was written by
this module also has `model.sha256.json` with the sha256 of every tensor's bytes, against which later reads are checked.
"""
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from granvit.models import Shapes

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
# Sizes of the format's other dtypes. A file may have such tensors (some old ones have integer positions), but they are not read.
OTHER_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
}  # fmt: skip
CHUNK_BYTES = 16 << 20
SHARD_BYTES = 5_000_000_000
MAX_HEADER = 100_000_000  # the format's own limit
MAX_SIZE = 1 << 48  # larger dimensions and offsets are taken as damage


def tensor_digest(array: np.ndarray) -> str:
    """sha256 of a tensor's bytes (row-major, little-endian)."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def set_digest(digests: dict[str, str]) -> str:
    """One sha256 for a set of tensors, independent of their order: over lines `name digest` sorted by name."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def sync_directory(path: Path) -> None:
    """Writes a directory's entries to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and syncs it to the disk."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def temp_folder(folder: Path) -> Iterator[Path]:
    """A new folder that is removed at the end, unless it was renamed."""
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class TensorWriter:
    """Writes one set of tensors: `add(name, array)` for all of `shapes`, in any order, then `finish()`.

    A failed write raises `OSError` and leaves partial files; the caller must remove the directory. It is a context manager so
    that the file is closed on errors. `metadata` goes into the header of every file. `checksums` False writes no
    `model.sha256.json`: other programs that edit the set would not update it.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        shapes: Shapes,
        shard_bytes: int = SHARD_BYTES,
        metadata: dict[str, str] | None = None,
        checksums: bool = True,
    ):
        self.directory, self.stem, self.shapes, self.shard_bytes = directory, stem, shapes, shard_bytes
        self.first_entry = {"__metadata__": metadata} if metadata else {}
        self.checksums = checksums
        self.digests: dict[str, str] = {}
        # The header is at the start of the file but complete only at the end, so space is reserved for offsets of 20 digits.
        longest = {n: {"dtype": "BF16", "shape": s, "data_offsets": [10**19, 10**19]} for n, s in shapes.items()}
        self.header_bytes = -(-len(json.dumps(self.first_entry | longest)) // 8) * 8
        self.shards: list[dict[str, dict]] = []
        self.file: BinaryIO | None = None

    def __enter__(self) -> "TensorWriter":
        return self

    def add(self, name: str, array: np.ndarray) -> None:
        """Appends one tensor."""
        assert name in self.shapes and name not in self.digests, name
        assert array.shape == self.shapes[name], (name, array.shape, self.shapes[name])
        if self.file is None or (self.offset and self.offset + array.nbytes > self.shard_bytes):
            self._next_shard()
        assert self.file is not None
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.file.write(raw.data)
        self.shards[-1][name] = {
            "dtype": TAGS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [self.offset, self.offset + array.nbytes],
        }
        self.offset += array.nbytes
        self.digests[name] = hashlib.sha256(raw.data).hexdigest()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.file is not None:
            with suppress(OSError) if error is not None else nullcontext():  # closing flushes, which fails on a full disk
                self.file.close()

    def finish(self) -> dict[str, str]:
        """Completes and syncs the files; returns the tensors' digests."""
        missing = self.shapes.keys() - self.digests.keys()
        assert not missing, f"{self.stem}: never written: {sorted(missing)[:5]}"
        if self.file is None:
            self._next_shard()
        self._end_shard()
        if len(self.shards) == 1:
            os.rename(self._partial(0), self.directory / f"{self.stem}.safetensors")
        else:
            names = [f"{self.stem}-{i + 1:05d}-of-{len(self.shards):05d}.safetensors" for i in range(len(self.shards))]
            for i, name in enumerate(names):
                os.rename(self._partial(i), self.directory / name)
            weight_map = {tensor: name for shard, name in zip(self.shards, names, strict=True) for tensor in shard}
            ends = [max(entry["data_offsets"][1] for entry in shard.values()) for shard in self.shards]
            index = {"metadata": {"total_size": sum(ends)}, "weight_map": weight_map}
            write_synced(self.directory / f"{self.stem}.safetensors.index.json", json.dumps(index, indent=1))
        if self.checksums:
            write_synced(self.directory / f"{self.stem}.sha256.json", json.dumps(self.digests, indent=1))
        return self.digests

    def _partial(self, shard: int) -> Path:
        return self.directory / f"{self.stem}-{shard + 1:05d}.partial"

    def _next_shard(self) -> None:
        if self.file is not None:
            self._end_shard()
        self.shards.append({})
        self.file = open(self._partial(len(self.shards) - 1), "wb")  # noqa: SIM115 (closed by _end_shard)
        self.file.seek(8 + self.header_bytes)
        self.offset = 0

    def _end_shard(self) -> None:
        header = json.dumps(self.first_entry | self.shards[-1]).encode()
        assert self.file is not None and len(header) <= self.header_bytes
        self.file.seek(0)
        self.file.write(self.header_bytes.to_bytes(8, "little") + header.ljust(self.header_bytes))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object from its pairs; `ValueError` for a duplicate key (`json` would keep the last)."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return tree


def _read_header(path: Path) -> dict[str, dict]:
    """A file's tensors as `StoredTensors.entries`, checked against its size; `ValueError` names the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{path}: not a safetensors file, or truncated ({size} bytes)")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique)
            header.pop("__metadata__", None)
            entries = {n: (e["dtype"], tuple(map(int, e["shape"])), *map(int, e["data_offsets"])) for n, e in header.items()}
            for name, (tag, shape, *offsets) in entries.items():
                if not isinstance(tag, str) or not name.isprintable():
                    raise ValueError(f"dtype {tag!r} of tensor {name!r}")
                if len(offsets) != 2 or not all(0 <= number < MAX_SIZE for number in (*shape, *offsets)):
                    raise ValueError(f"shape or data_offsets of tensor {name!r}")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: the safetensors header does not parse ({error}); the file is damaged") from None
    item_bytes = {tag: dtype.itemsize for tag, dtype in DTYPES.items()} | OTHER_BYTES
    table, end = {}, 0
    for name, (tag, shape, first, last) in sorted(entries.items(), key=lambda item: item[1][2]):
        if tag not in item_bytes:
            raise ValueError(f"{path}: tensor {name!r} has dtype {tag}; expected one of {', '.join(DTYPES)}")
        if first != end or last - first != math.prod(shape) * item_bytes[tag]:
            raise ValueError(f"{path}: tensor {name!r} has a wrong offset or size in the header; the file is damaged")
        table[name] = {"tag": tag, "shape": shape, "spans": [(8 + length + first, last - first)], "path": path}
        end = last
    if 8 + length + end != size:
        raise ValueError(f"{path}: {size} bytes, but its header states {8 + length + end}; the file is truncated or damaged")
    return table


class StoredTensors:
    """Random access to tensors in files. `entries` has for each name `path`, the `spans` (offset, length) of its bytes in that
    file, its `shape`, and the `tag` of its dtype. Only tensors whose tag is a key of `dtypes` can be read."""

    dtypes = DTYPES
    entries: dict[str, dict]

    @property
    def shapes(self) -> Shapes:
        """Names and shapes, in the order of the files."""
        return {name: entry["shape"] for name, entry in self.entries.items()}

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of a tensor that can be read."""
        return self.dtypes[self.entries[name]["tag"]]

    def check_readable(self, name: str) -> None:
        """`ValueError` naming file and tensor if its dtype is not in `dtypes`."""
        entry = self.entries[name]
        if entry["tag"] not in self.dtypes:
            expected = ", ".join(self.dtypes)
            raise ValueError(f"{entry['path']}: tensor {name!r} has dtype {entry['tag']}; expected one of {expected}")

    def read(self, name: str) -> np.ndarray:
        """One tensor in the dtype that it is stored in; `ValueError` names file and tensor if it cannot be read."""
        self.check_readable(name)
        entry = self.entries[name]
        raw = np.empty(sum(length for _, length in entry["spans"]), np.uint8)
        start = 0
        with open(entry["path"], "rb", buffering=0) as file:
            for offset, length in entry["spans"]:
                self._fill(file, offset, raw[start : start + length], name)
                start += length
        return raw.view(self.dtype(name)).reshape(entry["shape"])

    def digest(self, name: str) -> str:
        """sha256 of a tensor's bytes, for any dtype, with one chunk in memory at a time."""
        entry, digest = self.entries[name], hashlib.sha256()
        with open(entry["path"], "rb", buffering=0) as file:
            for offset, length in entry["spans"]:
                for start in range(0, length, CHUNK_BYTES):
                    chunk = np.empty(min(CHUNK_BYTES, length - start), np.uint8)
                    self._fill(file, offset + start, chunk, name)
                    digest.update(chunk.data)
        return digest.hexdigest()

    @staticmethod
    def _fill(file: io.FileIO, offset: int, raw: np.ndarray, name: str) -> None:
        file.seek(offset)
        done = 0
        while done < len(raw):
            if not (count := file.readinto(raw.data[done:])):
                raise ValueError(f"{file.name}: truncated inside tensor {name!r}")
            done += count


Members = dict[str, tuple[StoredTensors, str]]  # name -> the set that has the tensor, its name there


class JoinedTensors(StoredTensors):
    """Tensors from several sets."""

    def __init__(self, members: Members):
        self.members = members
        self.dtypes = {tag: dtype for tensors, _ in members.values() for tag, dtype in tensors.dtypes.items()}
        self.entries = {name: tensors.entries[stored] for name, (tensors, stored) in members.items()}

    def read(self, name: str) -> np.ndarray:
        tensors, stored = self.members[name]
        return tensors.read(stored)


class TensorSet(StoredTensors):
    """One set of tensors in safetensors files. Opening reads only the headers.

    `ValueError` names a file that is missing, truncated or damaged. With `checked`, every read is checked against the sha256 in
    `STEM.sha256.json`.
    """

    def __init__(self, directory: str | Path, stem: str = "model", checked: bool = False):
        self.directory, self.stem = Path(directory), stem
        single = self.directory / f"{stem}.safetensors"
        index = self.directory / f"{stem}.safetensors.index.json"
        listed: dict[str, str] = {}
        if index.exists():
            try:
                listed = dict(json.loads(index.read_text())["weight_map"])
                if not all(isinstance(file, str) for file in listed.values()):
                    raise ValueError("a file name that is not text")
                files = sorted(set(listed.values()))
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise ValueError(f"{index}: not a safetensors index ({error})") from None
        elif single.exists():
            files = [single.name]
        else:
            raise ValueError(f"{self.directory}: neither {single.name} nor {index.name} is there")
        self.entries: dict[str, dict] = {}
        for file in files:
            path = self.directory / file
            if path.parent != self.directory or not path.exists():
                raise ValueError(f"{index} names {file!r}, which is not in {self.directory}")
            for name, entry in _read_header(path).items():
                if name in self.entries:
                    raise ValueError(f"{path}: tensor {name!r} is also in {self.entries[name]['path'].name}")
                self.entries[name] = entry
        for name, file in listed.items():
            if name not in self.entries:
                raise ValueError(f"{index} names tensor {name!r}, which is not in {file}")
        self.digests: dict[str, str] | None = self._read_digests() if checked else None

    def _read_digests(self) -> dict[str, str]:
        path = self.directory / f"{self.stem}.sha256.json"
        try:
            digests = json.loads(path.read_text())
            if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
                raise ValueError("not an object of checksums")
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); the checkpoint is damaged") from None
        if digests.keys() != self.entries.keys():
            first = sorted(digests.keys() ^ self.entries.keys())[0]
            raise ValueError(f"{path}: does not list the tensors of {self.stem}.safetensors (first difference: {first!r})")
        return digests

    def read(self, name: str) -> np.ndarray:
        """One tensor in the dtype that it is stored in; `ValueError` names file and tensor if its bytes have changed."""
        array = super().read(name)
        if self.digests is not None and tensor_digest(array) != self.digests[name]:
            path = self.entries[name]["path"]
            raise ValueError(f"{path}: the bytes of tensor {name!r} do not match its checksum; the file is damaged")
        return array

    def digest_as(self, name: str, dtype: np.dtype) -> str:
        """sha256 of a tensor's bytes after conversion to `dtype`; not computed again if `checked` has it already."""
        if self.digests is not None and self.dtype(name) == dtype:
            return self.digests[name]
        return tensor_digest(self.read(name).astype(dtype))


def shape_differences(found: Shapes, expected: Shapes, limit: int = 5) -> list[str]:
    """Describes the first `limit` differences in names and shapes."""
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is not expected" for name in found if name not in expected]
    both = [name for name in expected if name in found]
    lines += [f"{n} is {list(found[n])}, expected {list(expected[n])}" for n in both if found[n] != expected[n]]
    return lines[:limit] + ([f"and {len(lines) - limit} more"] if len(lines) > limit else [])


def write_set(directory: Path, stem: str, shapes: Shapes, tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
    """Writes a set of tensors; returns their digests."""
    with TensorWriter(directory, stem, shapes) as writer:
        for name, array in tensors:
            writer.add(name, array)
        return writer.finish()
