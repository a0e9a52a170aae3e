"""Computes a large file in shares, by all processes that need it: one or several, on one or several machines with a common
directory.

A share is a file of its own in a directory beside the result. The process that gets the lock of a share computes it. If a process
is killed, its lock is released and another process computes the share; finished shares are kept. At the end one process
concatenates them. The processes communicate only through these files and need not know their rank.
"""
import errno
import fcntl
import logging
import os
import random
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live

LOG_EVERY = 10.0  # seconds
_POLL = 1.0  # seconds between checks of what other processes have finished
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # the file system has no locks: here some shares are computed twice
_REMOVED = (errno.ENOENT, errno.ESTALE)
_log = logging.getLogger(__name__)


def make_in_shares(path: Path, sizes: Sequence[int], make: Callable[[int], Iterable[bytes]], what: str) -> None:
    """Makes the file `path`, together with other processes, and returns when it exists. It appears complete or not at all.

    `make(n)` yields the bytes of share n, which has `sizes[n]` items; `what` describes the work in the progress line.
    """
    parts = path.with_suffix(".parts")
    files = {f"{n:06d}": size for n, size in enumerate(sizes)}
    unfinished = f"partial-{socket.gethostname()}-{os.getpid()}"
    first = random.randrange(len(sizes))  # a random start, so that few processes try the same share
    with ExitStack() as stack:
        progress = None
        while not path.exists():
            parts.mkdir(parents=True, exist_ok=True)
            try:
                progress = progress or stack.enter_context(_Progress(parts, files, what))
                finished = _finished(parts, files)
                for name in sorted(files.keys() - finished, key=lambda name: (int(name) < first, name)):
                    _claim(parts / name, parts / unfinished, partial(progress.counted, make, int(name)), path)
                if _finished(parts, files) == files.keys():
                    _claim(path, parts / unfinished, partial(_joined, parts, files), path, parts / "join.lock")
            except OSError as error:  # a process that saw the result removed `parts` (on NFS: ESTALE)
                if error.errno not in _REMOVED or (not path.exists() and parts.exists()):
                    raise
            if not path.exists():
                if progress is not None:  # None if `parts` was removed before the first count
                    progress.show()
                time.sleep(_POLL)
    shutil.rmtree(parts, ignore_errors=True)


def _claim(file: Path, unfinished: Path, content: Callable[[], Iterable[bytes]], result: Path, lock: Path | None = None) -> None:
    """Writes `content` to `file` by way of `unfinished`, unless another process has the lock, or `file` or `result` exists."""
    with _locked(lock or file.with_suffix(".lock")) as held:
        if not held or file.exists() or result.exists():
            return
        with open(unfinished, "wb") as out:
            for data in content():
                out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.rename(unfinished, file)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process holds the lock, for as long as the context lasts."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield True


def _finished(parts: Path, files: Mapping[str, int]) -> set[str]:
    """Names of the finished shares; empty if the directory was removed. Lists it once: many processes do this often."""
    try:
        return files.keys() & set(os.listdir(parts))
    except OSError as error:
        if error.errno not in _REMOVED:
            raise
        return set()


def _joined(parts: Path, names: Iterable[str]) -> Iterator[bytes]:
    for name in names:
        with open(parts / name, "rb") as part:
            while data := part.read(1 << 24):
                yield data


class _Progress:
    """The progress of all processes together: a live line by one process on a terminal, log lines elsewhere."""

    def __init__(self, parts: Path, files: Mapping[str, int], what: str):
        self._parts, self._files, self._what = parts, files, what
        self._finished_before, self._total = self._done(), sum(files.values())
        self._began = self._logged = time.monotonic()
        self._live: Live | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "_Progress":
        _log.info("%s: %d of %d were finished before", self._what, self._finished_before, self._total)
        if sys.stderr.isatty() and self._stack.enter_context(_locked(self._parts / "shown.lock")):
            self._live = self._stack.enter_context(Live(console=Console(stderr=True), transient=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def counted(self, make: Callable[[int], Iterable[bytes]], share: int) -> Iterator[bytes]:
        """Yields the share's chunks and updates the progress after each."""
        for chunk in make(share):
            yield chunk
            self.show()

    def show(self) -> None:
        now = time.monotonic()
        if now - self._logged >= (0.5 if self._live else LOG_EVERY):
            self._logged = now
            if self._live:
                self._live.update(self._line(now - self._began))
            else:
                _log.info(self._line(now - self._began))

    def _done(self) -> int:
        return sum(self._files[name] for name in _finished(self._parts, self._files))

    def _line(self, seconds: float) -> str:
        done, total = self._done(), self._total
        rate = (done - self._finished_before) / max(seconds, 1e-9)
        left = f"{(total - done) / rate / 60:.0f} min left" if rate else "no share finished yet"
        return f"{self._what}: {done:,} of {total:,} ({done / total:.0%}), {rate:,.0f} per second by all processes, {left}"
