"""A large file made in shares by all processes that need it: ranks of one machine, of several that see one directory, or one.

A share is a file of its own beside the result. Who locks it makes it; the lock of a process that is killed falls to the others,
and shares that are finished stay. One process joins them. No process needs to know of another, nor its own rank.
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
_POLL = 1.0  # seconds between looks at what others have made
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system without them: some shares are then made twice
_REMOVED = (errno.ENOENT, errno.ESTALE)
_log = logging.getLogger(__name__)


def make_in_shares(path: Path, sizes: Sequence[int], make: Callable[[int], Iterable[bytes]], what: str) -> None:
    """Returns when `path` exists. `make(n)` yields the bytes of share n, which is `sizes[n]` items; `what` names them all for the
    progress line. The file appears whole or not at all."""
    parts = path.with_suffix(".parts")
    files = {f"{n:06d}": size for n, size in enumerate(sizes)}
    unfinished = f"partial-{socket.gethostname()}-{os.getpid()}"
    first = random.randrange(len(sizes))  # few meet at one lock, and where locks do not reach, few make the same share
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
            except OSError as error:  # `parts` is removed by who saw the result first; ESTALE is what NFS says of it
                if error.errno not in _REMOVED or (not path.exists() and parts.exists()):
                    raise
            if not path.exists():
                if progress is not None:  # it is where `parts` went before its first count
                    progress.show()
                time.sleep(_POLL)
    shutil.rmtree(parts, ignore_errors=True)


def _claim(file: Path, unfinished: Path, content: Callable[[], Iterable[bytes]], result: Path, lock: Path | None = None) -> None:
    """Writes `file`, unless another process is at it or it is there."""
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
            if error.errno not in _NO_LOCKS:
                raise
        yield True


def _finished(parts: Path, files: Mapping[str, int]) -> set[str]:
    """The shares that are finished, by one reading of the directory: many processes look, and often. None once it is removed."""
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
    """How far all processes together are: a live line of one of them on a terminal, a line in the log elsewhere."""

    def __init__(self, parts: Path, files: Mapping[str, int], what: str):
        self._parts, self._files, self._what = parts, files, what
        self._finished_before, self._total = self._done(), sum(files.values())
        self._began = self._logged = time.monotonic()
        self._live: Live | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "_Progress":
        _log.info("%s: %d of %d are there, of earlier or other processes", self._what, self._finished_before, self._total)
        if sys.stderr.isatty() and self._stack.enter_context(_locked(self._parts / "shown.lock")):
            self._live = self._stack.enter_context(Live(console=Console(stderr=True), transient=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def counted(self, make: Callable[[int], Iterable[bytes]], share: int) -> Iterator[bytes]:
        """The share's chunks, with a look at the clock after each."""
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
        return f"{self._what}: {done:,} of {total:,} ({done / total:.0%}), {rate:,.0f} a second by all processes, {left}"
