"""Locks of a run's directory. The training command holds one while it runs (`granvit.launch.RunLock`); a grid holds another one
from before it starts the run's process until that has ended, so that two grids never start the same run.
"""
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from granvit.watcher import lock_path


def claim(directory: Path) -> tuple[IO[str] | None, str]:
    """Claims a run for this process. Returns the claim, or None and the process that has the run: another grid or a training
    process. Closing the claim ends it, and so does the end of this process."""
    directory.mkdir(parents=True, exist_ok=True)
    file = open(directory / ".grid_lock", "a+")  # noqa: SIM115 (the caller closes it)
    holder = "" if _lock(file) else _named(file)
    holder = holder or trained_by(directory) or ""
    if holder:
        file.close()
        return None, holder
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, a grid\n")
    file.flush()
    return file, ""


def trained_by(directory: Path) -> str | None:
    """The process that holds the training command's lock of a run's directory; None if it is free."""
    path = lock_path(directory)
    if not path.exists():
        return None
    with open(path, "r+") as file:  # network file systems lock only files that are open for writing
        return None if _lock(file) else _named(file)


def _lock(file: IO[str]) -> bool:
    """Takes an exclusive lock. Returns False if another process holds it; `OSError` if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _named(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"
