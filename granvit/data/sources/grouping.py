"""Joins annotations with their images, where a source lists both apart, in bounded memory: in a temporary SQLite file."""
import json
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple


class Group(NamedTuple):
    """An image and its annotations, in the order of the source. `repeated` are the annotations whose id an earlier one has."""

    key: str
    image: Any
    rows: list[Any]
    repeated: list[Any]


class Groups:
    """Images and annotations of one part of a source, put in in any order and read back image by image.

    A context manager: its temporary file exists until the end of the `with`. The file is about as large as what is put in, and
    lies where Python puts temporary files (TMPDIR). A key is a whole number or text; 1 and "1" are the same key. Images and rows
    are kept as JSON, so that they have to be plain lists, mappings, numbers and text.

        with Groups() as groups:
            groups.add_image(7, {"file_name": "a.jpg"})
            groups.add_row(7, {"bbox": [0, 0, 5, 5]}, row_id=1)
            for group in groups.read(): ...
            for row in groups.without_image(): ...
    """

    def __enter__(self) -> "Groups":
        self._folder = tempfile.TemporaryDirectory(prefix="granvit-sources-")
        self._file = sqlite3.connect(Path(self._folder.name, "groups.sqlite"), isolation_level=None)
        self._file.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -16384; PRAGMA temp_store = FILE;
            CREATE TABLE image (number INTEGER PRIMARY KEY, key TEXT UNIQUE, value TEXT);
            CREATE TABLE annotation (number INTEGER PRIMARY KEY, key TEXT, id TEXT, value TEXT);
            BEGIN;
            """
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._folder.cleanup()
        if isinstance(error, sqlite3.OperationalError):
            raise OSError(f"temporary file in {self._folder.name}: {error}; name a larger place with TMPDIR") from None

    def add_image(self, key: Any, image: Any) -> bool:
        """False if an image with this key is already there; it stays. `ValueError` with the reason if `key` is not a key,
        or `image` is nested too deeply."""
        values = (_text(key, "image id is neither a whole number nor text"), _json(image))
        return self._file.execute("INSERT OR IGNORE INTO image (key, value) VALUES (?, ?)", values).rowcount == 1

    def add_row(self, key: Any, row: Any, row_id: Any = None) -> None:
        """An annotation of the image `key`, None for an annotation without an id. `ValueError` with the reason if `key` or
        `row_id` is not a key, or `row` is nested too deeply."""
        text = _text(key, "image id of the annotation is neither a whole number nor text")
        id_text = None if row_id is None else _text(row_id, "annotation id is neither a whole number nor text")
        self._file.execute("INSERT INTO annotation (key, id, value) VALUES (?, ?, ?)", (text, id_text, _json(row)))

    def read(self) -> Iterator[Group]:
        """Every image, in the order in which they were put in, with its annotations. Nothing can be put in after this."""
        self._file.executescript(
            """
            CREATE INDEX annotation_key ON annotation (key, number);
            CREATE INDEX annotation_id ON annotation (id, number);
            """
        )
        for key, image in self._file.execute("SELECT key, value FROM image ORDER BY number"):
            rows: list[Any] = []
            repeated: list[Any] = []
            for value, again in self._file.execute(
                "SELECT value, EXISTS (SELECT 1 FROM annotation AS other WHERE other.id = annotation.id "
                "AND other.number < annotation.number) FROM annotation WHERE key = ? ORDER BY number",
                (key,),
            ):
                (repeated if again else rows).append(json.loads(value))
            yield Group(key, json.loads(image), rows, repeated)

    def without_image(self) -> Iterator[Any]:
        """The annotations whose image was never put in, in the order of the source."""
        query = "SELECT value FROM annotation WHERE key NOT IN (SELECT key FROM image) ORDER BY number"
        for (value,) in self._file.execute(query):
            yield json.loads(value)


def _json(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        raise ValueError("entry is nested too deeply") from None


def _text(key: Any, reason: str) -> str:
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise ValueError(reason)
    return str(key).encode(errors="backslashreplace").decode()  # SQLite takes no lone surrogates
