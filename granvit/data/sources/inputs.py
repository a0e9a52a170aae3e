"""Reading of a source's files in a stream: JSON of any size, and Parquet."""
import codecs
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ijson

CUT = "file ends in the middle"
_DAMAGED = "file is damaged"
_CHUNK = 1 << 18


class Damaged(Exception):
    """A file of the right format cannot be read any further. `name` is the file's, `reason` a fixed sentence."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.name, self.reason = path.name, reason


def need_file(path: str | Path, key: str) -> Path:
    """The path; `ValueError` if there is no such file. `key` is the file's key in the configuration."""
    if not Path(path).is_file():
        raise ValueError(f"{key} {path}: no such file")
    return Path(path)


def need_folder(path: str | Path, key: str) -> Path:
    """The path; `ValueError` if there is no such folder. `key` is the folder's key in the configuration."""
    if not Path(path).is_dir():
        raise ValueError(f"{key} {path}: no such folder")
    return Path(path)


def read_json(path: Path, lists: Sequence[str] = (), maps: Sequence[str] = ()) -> Iterator[tuple[str, int | str, Any]]:
    """The entries of lists and mappings of a JSON file, in a stream: `(name, number from 0 or key, value)`.

    The file is a mapping, and `lists` and `maps` name its keys; or it is a list, which `lists=("",)` reads. Entries of one list
    are in the order of the file. Other keys are skipped; a key that is missing gives no entries. NaN is not valid JSON.
    `Damaged` after the last whole entry if the file is cut off or not valid JSON there. `ValueError` if it is neither a list nor
    a mapping, or not the one that was asked for.
    """
    wanted = b"[" if "" in lists else b"{"
    found: dict[str, Any] = {name: ijson.sendable_list() for name in (*lists, *maps)}
    parsers = [ijson.items_coro(found[name], f"{name}.item" if name else "item", use_float=True) for name in lists]
    parsers += [ijson.kvitems_coro(found[name], name, use_float=True) for name in maps]
    numbers = dict.fromkeys(lists, 0)

    def entries() -> Iterator[tuple[str, int | str, Any]]:
        for name, values in found.items():
            for value in values:
                if name in numbers:
                    yield name, numbers[name], value
                    numbers[name] += 1
                else:
                    yield name, *value
            values.clear()

    with open(path, "rb") as file:
        chunk = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8)
        if chunk.lstrip()[:1] != wanted:
            raise ValueError(f"{path}: is not a JSON {'list' if wanted == b'[' else 'mapping'}")
        while chunk:
            try:
                for parser in parsers:
                    parser.send(chunk)
            except ijson.JSONError:
                yield from entries()
                raise Damaged(path, "file is not valid JSON") from None
            yield from entries()
            chunk = file.read(_CHUNK)
    try:
        for parser in parsers:
            parser.close()
    except ijson.JSONError:
        raise Damaged(path, CUT) from None


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file with these columns, read a few at a time.

    `Damaged` where the rest of the file cannot be read. `ValueError` if it is not a Parquet file or lacks a column.
    """
    import pyarrow as pa  # slow to import, and only two formats need it
    import pyarrow.parquet as pq

    with open(path, "rb") as file:
        if file.read(4) != b"PAR1":
            raise ValueError(f"{path}: is not a Parquet file")
        file.seek(-4, os.SEEK_END)
        if file.read() != b"PAR1":
            raise Damaged(path, CUT)  # and without the index of its columns, which is at the end
    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowException, OSError):
        raise Damaged(path, _DAMAGED) from None
    with table:
        for column in columns:
            if column not in table.schema_arrow.names:
                raise ValueError(f"{path}: has no column {column}")
        try:
            for batch in table.iter_batches(batch_size=64, columns=list(columns)):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            raise Damaged(path, _DAMAGED) from None

