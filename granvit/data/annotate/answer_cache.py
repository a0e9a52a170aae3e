"""Answers of a captioning server, kept in an SQLite file, so that a restarted run asks nothing twice.

One table, `answers(key, text)`; `user_version` is the format's number. Processes of one machine can share a file on a local disk.
"""
import sqlite3
import threading
from pathlib import Path

VERSION = 1


class AnswerCache:
    """The file at `path`, made if there is none. Threads can share an object. `ValueError` names a file of another format."""

    def __init__(self, path: str | Path):
        self._lock = threading.Lock()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            # isolation_level None: an answer is kept as soon as it is there
            self._connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version != VERSION and (version or self._connection.execute("SELECT 1 FROM sqlite_master").fetchone()):
                raise ValueError(f"cache {path}: is a database of another kind or version; name another file")
            self._connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for writers
            self._connection.execute("PRAGMA synchronous = NORMAL")  # a power cut can lose the last answers, not the file
            table = "answers (key TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID"
            self._connection.execute(f"CREATE TABLE IF NOT EXISTS {table}")
            self._connection.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.Error as error:
            raise ValueError(f"cache {path}: is not an SQLite file that can be used ({error}); name another file") from None

    def get(self, key: str) -> str | None:
        with self._lock:
            row = self._connection.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def put(self, key: str, text: str) -> None:
        with self._lock:
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))
