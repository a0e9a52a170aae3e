"""Starting of processes with mpiexec."""
import shutil
import subprocess
import sys
from pathlib import Path

# Nothing here survives a crash of the machine: without syncing, which is slow on many disks, the tests are short.
_BUILD = "import os, sys; os.fsync = lambda file: None; from granvit.data.gran.command import main; sys.exit(main())"


def mpiexec(size: int, *arguments: str, program: str = _BUILD) -> subprocess.Popen:
    """Starts `size` ranks of a Python program, by default of scripts/build_gran.py; their output goes to the process's stdout."""
    beside = Path(sys.executable).with_name("mpiexec")
    command = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert command is not None, "no mpiexec: pip install -e '.[build]'"
    return subprocess.Popen([command, "-n", str(size), sys.executable, "-c", program, *arguments], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
