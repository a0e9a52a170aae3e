"""Formats with one small file per image: the files of a folder, cut into parts, and reading them one by one."""
import json
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from granvit.data.sources.annotated import Annotated, Refused
from granvit.data.sources.inputs import CUT, need_folder

FILES_IN_PART = 10_000


class OtherFormat(Exception):
    """A file can be parsed but is of another format than the reader's."""


def file_parts(folder: str | Path, endings: tuple[str, ...], key: str) -> list[str]:
    """The parts of a folder's files with one of these endings (small letters; those of the names count alike), folders below
    included: `SUBFOLDER:NUMBER`, sorted. A part has up to 10,000 files of one folder, from that number on in the sorted list.

    `ValueError` names the folder, a value of `key`, if it does not exist or has no such file. Links to folders are not followed.
    Files are counted, not listed: memory does not grow with their number.
    """
    folder = need_folder(folder, key)
    parts = []
    for place, count in _counts(folder, endings):
        parts += [f"{place.relative_to(folder).as_posix()}:{start}" for start in range(0, count, FILES_IN_PART)]
    if not parts:
        raise ValueError(f"{key} {folder}: holds no {' or '.join(endings)} file")
    return parts


def _counts(folder: Path, endings: tuple[str, ...]) -> Iterator[tuple[Path, int]]:
    """A folder and all below it, in order, with the number of its files."""
    below, count = [], 0
    with os.scandir(folder) as listed:
        for entry in listed:
            if entry.is_dir(follow_symlinks=False):
                below.append(entry.name)
            else:
                count += _is_wanted(entry, endings)
    yield folder, count
    for name in sorted(below):
        yield from _counts(folder / name, endings)


def _is_wanted(entry: os.DirEntry[str], endings: tuple[str, ...]) -> bool:
    return entry.name.lower().endswith(endings) and not entry.is_dir()


def part_files(folder: str | Path, endings: tuple[str, ...], part: str) -> Iterator[str]:
    """The files of a part of `file_parts`, sorted, relative to `folder` and with `/`.

    The names of one folder stay in memory, so that it is listed once for all its parts where they are read one after the other.
    """
    below, _, start = part.rpartition(":")
    place = Path(folder, below)
    state = place.stat()
    chunks = _names(str(place), endings, FILES_IN_PART, (state.st_mtime_ns, state.st_size))
    for chunk in chunks[int(start) // FILES_IN_PART :][:1]:
        for name in chunk.split("\0"):
            yield Path(below, name).as_posix()


@lru_cache(maxsize=1)
def _names(place: str, endings: tuple[str, ...], size: int, _changed: tuple[int, int]) -> tuple[str, ...]:
    """The sorted names of a folder's files, `size` in each text, with NUL between them: as single texts millions of names would
    take several times the memory. `_changed`: the folder's state, so that it is listed again after a change."""
    with os.scandir(place) as listed:
        names = sorted(entry.name for entry in listed if _is_wanted(entry, endings))
    return tuple("\0".join(names[start : start + size]) for start in range(0, len(names), size))


def read_files(
    folder: str | Path, endings: tuple[str, ...], part: str, read: Callable[[Path, str], Annotated], form: str
) -> Iterator[Annotated | Refused]:
    """`read(path, relative name)` for each file of a part. A file for which it raises `ValueError` is refused with that reason.

    `OtherFormat` refuses the file too, but for the first file of the part it becomes a `ValueError` that names the file; `form`
    says what was expected.
    """
    for number, name in enumerate(part_files(folder, endings, part)):
        path = Path(folder, name)
        try:
            yield read(path, name)
        except OtherFormat:
            if number == 0:
                raise ValueError(f"{path}: is not {form}") from None
            yield Refused(printable(name), "file is of another format")
        except ValueError as error:
            yield Refused(printable(name), str(error))


def read_bytes(path: Path) -> bytes:
    """A small file's bytes; `ValueError` with a reason that does not name the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"file cannot be read ({type(error).__name__})") from None


def read_tree(path: Path) -> Any:
    """A small JSON file's contents; `ValueError` with the reason if it cannot be read."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("file is not valid JSON") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text) or error.msg.startswith("Unterminated string")
        raise ValueError(CUT if cut else "file is not valid JSON") from None
    except RecursionError:  # lists in lists, a thousand deep
        raise ValueError("file is not valid JSON") from None


def with_ending(name: str, ending: str) -> str:
    """A file's name with another ending: what comes after its last dot, the dot included, is replaced."""
    return name.rpartition(".")[0] + ending


def printable(name: str) -> str:
    """A file's name as an id: bytes that are not UTF-8, which Python keeps as half characters, are written as `\\udcff`."""
    return name.encode(errors="backslashreplace").decode()


def text_of(value: Any) -> str:
    """A caption as it is, empty for None; `ValueError` if it is not text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError("caption is not text")
    return value


def around(boxes: list[tuple[float, float, float, float]]) -> tuple[float, float, float, float]:
    """The smallest box (xyxy) that holds all of at least one box."""
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return min(x1), min(y1), max(x2), max(y2)
