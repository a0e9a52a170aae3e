"""Training runs in child processes: how one is started, asked to stop, and whether it is complete.

The demo (granvit/demo/parts.py) and the grids (granvit/ablation/run_cells.py) start their runs with this.
"""
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from granvit.launch import Framework

_LIBC = ctypes.CDLL(None)  # loaded before the first fork
_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)
# OMP_NUM_THREADS: each rank has one thread of linear algebra, so that the number of runs at a time does not change a result.
# GLOG_v: MindSpore's workers log hundreds of warnings while they connect. MS_RETRY_INTERVAL: they end in 2 s instead of 7 to 10.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOG_v": "3", "MS_RETRY_INTERVAL_LOWER": "0", "MS_RETRY_INTERVAL_UPPER": "1"}


def launcher(framework: Framework, ranks: int, log_dir: Path, bind_cores: bool) -> list[str]:
    """The beginning of a run's command: this Python, or for several ranks the framework's launcher with a free port.

    `log_dir` is for what msrun's processes print. `bind_cores` gives each of its ranks a core, where one run has the machine.
    """
    bin_directory = Path(sys.executable).parent
    if ranks == 1:
        return [sys.executable]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    if framework == "torch":
        return [str(bin_directory / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port]
    return [str(bin_directory / "msrun"), "--worker_num", str(ranks), "--local_worker_num", str(ranks), "--master_port", port,
            "--bind_core", str(bind_cores), "--join", "True", "--log_dir", str(log_dir)]  # fmt: skip


def start(words: Sequence[str], cores: Collection[int], output: int | IO[str] | None,
          environment: Mapping[str, str] | None = None) -> subprocess.Popen:  # fmt: skip
    """Starts a command on these cores; `output` is what `subprocess` takes for stdout, and gets stderr too.

    The child has a session of its own, so Ctrl-C in a terminal does not reach it: `stop` asks it to stop, once. The kernel
    kills it when the thread that started it ends, also after kill -9 of this process.
    """
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # msrun starts the first `python` in it

    def prepare() -> None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        os.sched_setaffinity(0, cores)

    return subprocess.Popen(
        words, env={**_ENVIRONMENT, **os.environ, **(environment or {}), "PATH": search}, stdin=subprocess.DEVNULL, stdout=output,
        stderr=None if output is None else subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        preexec_fn=prepare,
    )  # fmt: skip


def stop(children: Iterable[subprocess.Popen]) -> None:
    """Asks runs to save a checkpoint and to end, and waits for them. One that has ended already is left alone."""
    children = list(children)
    for child in children:
        child.send_signal(signal.SIGTERM)
    for child in children:
        child.wait()


def is_complete(run: Path) -> bool:
    """Whether the last process of a run trained its last step: one that was asked to stop ends with status 0, too.

    Both say so at the end of rank 0's log (granvit/train.py), which also has a line for each start. `FileNotFoundError` if there
    is no log.
    """
    log = (run / "log" / "rank_00000.txt").read_text(errors="replace")
    said = re.findall(r"run .* is (complete|not complete)|( rank\(s\), \d+ steps, )", log)
    return bool(said) and said[-1][0] == "complete"
