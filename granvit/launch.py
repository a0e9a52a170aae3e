"""Starting and ending of a process of a run: launcher detection, port check, run lock, signals, and the watcher of each rank.

Launchers: msrun (MindSpore; it also runs the same script as the cluster's scheduler), torchrun, or none. All ranks must see the
run's directory.
"""
import fcntl
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from granvit import watcher
from granvit.data.shares import NO_LOCKS
from granvit.engine import TrainEngine

_log = logging.getLogger(__name__)
Framework = Literal["mindspore", "torch"]
FRAMEWORKS: dict[Framework, tuple[str, str]] = {"mindspore": ("ms_granvit", "MindSpore"), "torch": ("pt_granvit", "PyTorch")}


@dataclass(frozen=True)
class Launch:
    """How this process was started. `launcher_pid` is 0 without a launcher, or if it does not outlive its ranks."""

    launcher: Literal["msrun", "torchrun"] | None
    scheduler: bool
    rank: int
    world: int
    address: str | None  # host:port where the ranks meet
    launcher_pid: int

    @property
    def name(self) -> str:
        return "scheduler" if self.scheduler else f"rank_{self.rank:05d}"

    @property
    def key(self) -> str:
        """A name that no other running job has: the address where its ranks meet, or this process's id."""
        return (self.address or f"pid_{os.getpid()}").replace(":", "_").replace("/", "_")


def detect_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Reads the launcher's environment; `ValueError` where it is incomplete."""
    if "MS_ROLE" in environ:
        address = f"{environ.get('MS_SCHED_HOST')}:{environ.get('MS_SCHED_PORT')}"
        scheduler = environ["MS_ROLE"] == "MS_SCHED"
        if not scheduler and "RANK_ID" not in environ:
            raise ValueError("msrun assigned no rank to this worker; give every node its own --node_rank")
        rank = 0 if scheduler else int(environ["RANK_ID"])
        return Launch("msrun", scheduler, rank, int(environ["MS_WORKER_NUM"]), address, _joining_msrun())
    if "RANK" in environ and "WORLD_SIZE" in environ:
        address = f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}"
        agent = os.getppid() if "TORCHELASTIC_RUN_ID" in environ else 0
        return Launch("torchrun", False, int(environ["RANK"]), int(environ["WORLD_SIZE"]), address, agent)
    return Launch(None, False, 0, 1, None, 0)


def _joining_msrun() -> int:
    """The parent's process id if it is `msrun --join True`; 0 for an msrun that exits after starting its workers."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return 0
    joining = "--join=True" in command or any(a == "--join" and b == "True" for a, b in pairwise(command))
    return parent if joining and any("msrun" in word for word in command) else 0


def check_launcher(launch: Launch, framework: Framework) -> None:
    """`ValueError` if the framework cannot run under this launcher."""
    if launch.launcher == "torchrun" and framework == "mindspore":
        raise ValueError("started by torchrun but --framework is mindspore; add --framework torch, or start with msrun")
    if launch.launcher == "msrun" and framework == "torch":
        raise ValueError("started by msrun but --framework is torch; start with torchrun, or leave --framework out")


def load_engine_class(framework: Framework) -> type[TrainEngine]:
    """The framework's `Engine` class. If the framework is not installed, `ValueError` with the command that installs it."""
    package, name = FRAMEWORKS[framework]
    module = "mindspore" if framework == "mindspore" else "torch"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        other = "torch" if framework == "mindspore" else "mindspore"
        raise ValueError(
            f"{name} is not installed for {sys.executable}: pip install -e '.[{module}]', or use --framework {other}"
        ) from None
    return importlib.import_module(f"{package}.engine").Engine


def check_port(launch: Launch) -> None:
    """`ValueError` if the port where the ranks meet is in use. Only the process that will listen on that port checks it.

    This process is msrun's scheduler, or rank 0 under a torchrun whose agent does not listen itself. Without this check, a port
    in use makes the start hang for minutes without a message.
    """
    agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (launch.scheduler or (launch.launcher == "torchrun" and launch.rank == 0 and not agent_listens)):
        return
    assert launch.address is not None  # every launcher sets it
    host, _, port = launch.address.rpartition(":")
    family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind(address)
        except OSError as error:
            raise ValueError(
                f"port {port} on {host}: {error.strerror}. Another program uses it; choose a free port "
                f"({launch.launcher} --master_port N)"
            ) from None


class RunLock:
    """An exclusive lock of rank 0 on the run's directory. The system releases it when the process ends, in whatever way."""

    def __init__(self, run: Path, launch: Launch):
        """`ValueError` if another process holds the lock; the message names that process. On a file system without locks it logs
        a warning and goes on."""
        run.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(watcher.lock_path(run), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._descriptor, 4096).decode(errors="replace").strip() or "an unnamed process"
            os.close(self._descriptor)
            raise ValueError(f"{run} is in use by {owner}; wait for it, stop it, or choose another output=") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _log.warning(f"no locks on this file system ({error.strerror}): two runs in {run} would not notice each other")
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}, started {started}\n".encode(), 0)

    def release(self) -> None:
        """Releases the lock. The empty lock file marks an orderly end (`watcher.ended_in_order`)."""
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


class Guard:
    """Starts this rank's watcher process, turns signals into `stop_requested`, and reports failures to the other ranks."""

    def __init__(self, launch: Launch, run: Path):
        self.launch, self.run = launch, run.resolve()
        self.stop_requested = False
        self._started = watcher.start_time(os.getpid())
        self._watcher = None
        if launch.launcher is not None:
            self.run.mkdir(parents=True, exist_ok=True)
            self._watcher = self._start_watcher()
        self.take_signals()

    def _start_watcher(self) -> subprocess.Popen:
        job = {
            "rank": os.getpid(),
            "launcher": self.launch.launcher_pid,
            "run": str(self.run),
            "key": self.launch.key,
            "name": self.launch.name,
            "started": self._started,
            "scheduler": self.launch.scheduler,
            "log": str(self.run / "log" / f"{self.launch.name}.txt"),
        }
        command = [sys.executable, "-I", "-S", watcher.__file__, json.dumps(job)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def take_signals(self) -> None:
        """Installs signal handlers: SIGTERM or Ctrl-C requests a checkpoint after the current step and then an orderly end; a
        second Ctrl-C interrupts at once.

        It must be called again after a framework was imported or initialised, which may install its own handlers.
        """
        if not self.launch.scheduler:
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True

    def fail(self, reason: str) -> None:
        """Reports this rank's failure in a marker file, with the reason. The watchers of the other ranks read it and end them."""
        if self._watcher is not None:
            watcher.write_marker(self.run, self.launch.key, self.launch.name, self._started, reason)

    def leave(self) -> None:
        """Tells the watcher that this process is about to end in order."""
        if self._watcher is not None:
            assert self._watcher.stdin is not None
            self._watcher.stdin.write(b"end")
            self._watcher.stdin.flush()

    def remove_old_markers(self) -> None:
        """Deletes the failure markers of earlier jobs. Only rank 0 calls it, holding the run's lock."""
        for path in self.run.glob(".failure-*"):
            if path.stat().st_mtime < self._started - 60:  # this job's ranks may have started a little earlier
                path.unlink(missing_ok=True)
