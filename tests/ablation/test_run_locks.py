"""Two grids on one output folder, and file systems without locks."""
import errno
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from granvit.ablation import run_locks
from granvit.ablation.run_locks import claim, trained_by
from granvit.launch import RunLock, detect_launch
from tests.ablation.conftest import grid_tree, write_grid
from tests.ablation.test_command import command, environment

HOLDS = """import fcntl, sys
with open(sys.argv[1], "a+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write("process 7")
    file.flush()
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(path):
    """Another process holds the lock of a file."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        yield
    finally:
        process.communicate()


def test_a_run_is_claimed_once(tmp_path):
    with held(tmp_path / ".grid_lock"):
        assert claim(tmp_path) == (None, "process 7")
    file, holder = claim(tmp_path)
    assert file is not None and holder == ""
    file.close()
    with held(tmp_path / ".lock"):  # a process of the training command
        assert claim(tmp_path) == (None, "process 7") and trained_by(tmp_path) == "process 7"
    assert trained_by(tmp_path / "nothing") is None


def test_a_released_training_lock_is_free(tmp_path):
    RunLock(tmp_path, detect_launch()).release()
    assert trained_by(tmp_path) is None


def test_a_file_system_without_locks_is_an_error(tmp_path, monkeypatch):
    def flock(file, operation):
        assert file.writable()  # over NFS, an exclusive lock of a file that is open for reading alone is EBADF
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(run_locks.fcntl, "flock", flock)
    with pytest.raises(OSError, match="no locks"):
        claim(tmp_path)


def test_two_grids_with_the_same_runs_train_each_once(base, tmp_path):
    """Two commands with equal cells start at the same time; the grids have other names, so their reports do not exclude."""
    out = tmp_path / "out"
    grids = [write_grid(tmp_path / f"{name}.yaml", grid_tree(base, seeds=[0])) for name in ("one", "two")]
    both = [subprocess.Popen(command(grid, out, "--jobs", "1"), env=environment(), stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) for grid in grids]  # fmt: skip
    deadline = time.monotonic() + 120
    printed = [process.communicate(timeout=deadline - time.monotonic())[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    outputs = [path.read_text() for path in (out / "cells").glob("*/output.txt")]
    assert len(outputs) == 2 and all(f"\n{text}".count("\n$ ") == 1 for text in outputs), outputs
    assert (out / "one" / "results.json").exists() and (out / "two" / "results.json").exists()
