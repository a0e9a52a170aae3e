"""Reads and writes MindSpore's `.ckpt` files without MindSpore, one tensor in memory at a time; and the layout `mindspore`.

Such a file is one protobuf message: a sequence of fields without a header. Each field is a tensor or a slice of a large one:

    Checkpoint  { repeated Value value = 1; }
    Value       { string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3; }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3; }

Slices of one tensor follow each other, each with the dims of the whole tensor. The file may end with `crc_num` and ten bytes: the
CRC-32 of everything before. The format contains no code.
"""
import hashlib
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

from granvit.checkpoint.layouts.default import DEFAULT
from granvit.checkpoint.tensors import CHUNK_BYTES, StoredTensors
from granvit.models import Shapes

MINDSPORE = replace(DEFAULT, name="mindspore")

DTYPES: dict[str, np.dtype[Any]] = {
    "Float64": np.dtype(np.float64),
    "Float32": np.dtype(np.float32),
    "Float16": np.dtype(np.float16),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
}
TYPES = {dtype: name for name, dtype in DTYPES.items()}
SLICE_BYTES = 512 << 20  # as in MindSpore
CRC_MARK, CRC_BYTES = b"crc_num", 10
VARINT, LENGTH = 0, 2  # protobuf's wire types
SMALL = 1 << 16  # longer tensor and type names are taken as damage


def _encode(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number])


def _field(number: int, content: bytes) -> bytes:
    return _encode(number << 3 | LENGTH) + _encode(len(content)) + content


class CkptWriter:
    """Writes one `.ckpt` file: `add(name, array)` for all of `shapes`, then `finish()`. A failed write leaves a partial file."""

    def __init__(self, path: Path, shapes: Shapes):
        self.shapes = shapes
        self.digests: dict[str, str] = {}
        self.file = open(path, "wb")  # noqa: SIM115 (closed by finish or __exit__)

    def __enter__(self) -> "CkptWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()

    def add(self, name: str, array: np.ndarray) -> None:
        """Appends one tensor, in slices if it is large."""
        assert name in self.shapes and name not in self.digests, name
        assert array.shape == self.shapes[name], (name, array.shape, self.shapes[name])
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        about = b"".join(_encode(1 << 3 | VARINT) + _encode(size) for size in array.shape or (0,))
        about += _field(2, TYPES[array.dtype].encode())
        tag = _field(1, name.encode())
        for start in range(0, max(len(raw), 1), SLICE_BYTES):
            piece = raw[start : start + SLICE_BYTES]
            tensor = about + _encode(3 << 3 | LENGTH) + _encode(len(piece))
            value = tag + _encode(2 << 3 | LENGTH) + _encode(len(tensor) + len(piece)) + tensor
            self.file.write(_encode(1 << 3 | LENGTH) + _encode(len(value) + len(piece)) + value)
            self.file.write(piece.data)
        self.digests[name] = hashlib.sha256(raw.data).hexdigest()

    def finish(self) -> dict[str, str]:
        """Completes and syncs the file; returns the tensors' digests."""
        missing = self.shapes.keys() - self.digests.keys()
        assert not missing, f"never written: {sorted(missing)[:5]}"
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.digests


class CkptFile(StoredTensors):
    """The tensors of one `.ckpt` file. Opening reads names, shapes and dtypes, and compares the checksum if there is one.

    `ValueError` names the file, and the tensor if one is invalid.
    """

    dtypes = DTYPES

    def __init__(self, path: Path):
        self.path, self.entries = path, {}
        with open(path, "rb") as file:
            end = self._without_checksum(file)
            previous = None
            for number, offset, length in self._fields(file, 0, end, "the file"):
                if number != 1:
                    self._damaged("an unknown field")
                previous = self._take(file, offset, offset + length, previous)
        for name, entry in self.entries.items():
            self._check_size(name, entry)

    def _damaged(self, what: str) -> NoReturn:
        raise ValueError(f"{self.path}: not a MindSpore checkpoint, or truncated, damaged or encrypted ({what})")

    def _without_checksum(self, file: BinaryIO) -> int:
        """The file's length without its checksum; `ValueError` if the checksum is wrong."""
        size = self.path.stat().st_size
        end = size - len(CRC_MARK) - CRC_BYTES
        if end < 0:
            return size
        file.seek(end)
        if file.read(len(CRC_MARK)) != CRC_MARK:
            return size
        stated, found = int.from_bytes(file.read(CRC_BYTES), "big"), 0
        file.seek(0)
        for start in range(0, end, CHUNK_BYTES):
            found = zlib.crc32(file.read(min(CHUNK_BYTES, end - start)), found)
        if found != stated:
            raise ValueError(f"{self.path}: its bytes do not match its checksum; the file is damaged")
        return end

    def _varint(self, file: BinaryIO, where: str) -> int:
        number = 0
        for shift in range(0, 70, 7):
            if not (byte := file.read(1)):
                self._damaged(f"it ends inside {where}")
            number |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                break
        return number

    def _fields(self, file: BinaryIO, offset: int, end: int, where: str) -> Iterator[tuple[int, int, int]]:
        """Yields (number, offset, length) of the length-delimited fields between two offsets, (number, value, -1) of varints."""
        while offset < end:
            file.seek(offset)
            key = self._varint(file, where)
            number, kind = key >> 3, key & 7
            if kind not in (VARINT, LENGTH) or not 1 <= number <= 3:
                self._damaged(f"an unknown field in {where}")
            value = self._varint(file, where)
            offset = file.tell()
            if kind == VARINT:
                yield number, value, -1
                continue
            if offset + value > end:
                self._damaged(f"{where} is {offset + value - end} bytes too short")
            yield number, offset, value
            offset += value
        if offset != end:
            self._damaged(f"{where} has a wrong length")

    def _text(self, file: BinaryIO, offset: int, length: int) -> str:
        if length > SMALL:
            self._damaged("a name that is too long")
        file.seek(offset)
        try:
            return file.read(length).decode()
        except UnicodeDecodeError:
            self._damaged("a name that is not UTF-8")

    def _take(self, file: BinaryIO, start: int, end: int, previous: str | None) -> str:
        """Adds one value (a tensor or its next slice) to `entries` and returns its name; `previous` is the name before it."""
        name, tensor = None, None
        where = f"the value after {previous!r}" if previous else "the first value"
        for number, offset, length in self._fields(file, start, end, where):
            if number == 1:
                name = self._text(file, offset, length)
            elif number == 2:
                tensor = (offset, offset + length)
            else:
                raise ValueError(f"{self.path}: tensor {name!r} is a map, which is not supported")
        if name is None or tensor is None:
            self._damaged("a value without a name or a tensor")
        shape, tag, span = self._tensor(file, *tensor, name)
        entry = self.entries.get(name)
        if entry is None:
            self.entries[name] = {"tag": tag, "shape": shape, "spans": [span], "path": self.path}
        elif previous != name or self._complete(entry):
            raise ValueError(f"{self.path}: tensor {name!r} is there twice")
        elif (entry["tag"], entry["shape"]) != (tag, shape):
            self._damaged(f"slices of {name!r} with different dims or types")
        else:
            entry["spans"].append(span)
        return name

    def _tensor(self, file: BinaryIO, start: int, end: int, name: str) -> tuple[tuple[int, ...], str, tuple[int, int]]:
        dims, tag, span = [], None, None
        for number, offset, length in self._fields(file, start, end, f"tensor {name!r}"):
            if number == 1 and length == -1:
                dims.append(offset)
            elif number == 2:
                tag = self._text(file, offset, length)
            elif number == 3:
                span = (offset, length)
            else:
                self._damaged(f"the dims of {name!r}")
        if tag is None or span is None:
            self._damaged(f"tensor {name!r} without a type or content")
        return tuple(dims) if dims != [0] else (), tag, span  # a scalar is written as [0]

    def _complete(self, entry: dict) -> bool:
        itemsize = self.dtypes[entry["tag"]].itemsize if entry["tag"] in self.dtypes else math.inf
        return sum(length for _, length in entry["spans"]) >= math.prod(entry["shape"]) * itemsize

    def _check_size(self, name: str, entry: dict) -> None:
        if entry["tag"] not in self.dtypes:
            return  # `check_readable` refuses it if it is needed
        found = sum(length for _, length in entry["spans"])
        expected = math.prod(entry["shape"]) * self.dtypes[entry["tag"]].itemsize
        if found != expected:
            raise ValueError(f"{self.path}: tensor {name!r} has {found} bytes, its dims {list(entry['shape'])} need {expected}")
