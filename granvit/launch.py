"""How this process was started, and its part in ending well: run lock, port check, signals, the watcher beside each rank.

Launchers: msrun (MindSpore; it runs the same script once more as the cluster's scheduler), torchrun, or none. A run's
directory must be one that all ranks see.
"""
import fcntl
import importlib
import json
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
from granvit.engine import TrainEngine

Framework = Literal["mindspore", "torch"]
FRAMEWORKS: dict[Framework, tuple[str, str]] = {"mindspore": ("ms_granvit", "MindSpore"), "torch": ("pt_granvit", "PyTorch")}


@dataclass(frozen=True)
class Launch:
    """`launcher_pid` is the process that should outlive this one (0: there is none, or it leaves by design)."""

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
        """Names the job among those alive: the address where its ranks meet, or this process."""
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
    """The pid of `msrun --join True`, this process's parent; 0 for an msrun that leaves once its workers are started."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return 0
    joining = "--join=True" in command or any(a == "--join" and b == "True" for a, b in pairwise(command))
    return parent if joining and any("msrun" in word for word in command) else 0


def check_launcher(launch: Launch, framework: Framework) -> None:
    """`ValueError` where the framework cannot run under this launcher."""
    if launch.launcher == "torchrun" and framework == "mindspore":
        raise ValueError("started by torchrun but --framework is mindspore; add --framework torch, or start with msrun")
    if launch.launcher == "msrun" and framework == "torch":
        raise ValueError("started by msrun but --framework is torch; start with torchrun, or leave --framework out")


def load_engine_class(framework: Framework) -> type[TrainEngine]:
    """The framework's `Engine`; `ValueError` with the command that installs a framework that is not there."""
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
    """`ValueError` where the process that will listen at the meeting address finds the port taken.

    That is msrun's scheduler, or rank 0 where torchrun's agent does not hold the store already. Without this check a taken port
    is a silent hang of minutes.
    """
    agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (launch.scheduler or (launch.launcher == "torchrun" and launch.rank == 0 and not agent_listens)):
        return
    assert launch.address is not None  # there is one wherever there is a launcher
    host, _, port = launch.address.rpartition(":")
    family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind(address)
        except OSError as error:
            raise ValueError(
                f"port {port} on {host}: {error.strerror}. Another job or program holds it; choose a free one "
                f"({launch.launcher} --master_port N)"
            ) from None


class RunLock:
    """Keeps a second run out of a directory (rank 0). The system drops the lock with the process, however that ends."""

    def __init__(self, run: Path, launch: Launch):
        """`ValueError` names the owner where there is one."""
        run.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(watcher.lock_path(run), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._descriptor, 4096).decode(errors="replace").strip() or "an unnamed process"
            os.close(self._descriptor)
            raise ValueError(f"{run} is in use by {owner}; wait for it, stop it, or choose another output=") from None
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}, started {started}\n".encode(), 0)

    def release(self) -> None:
        """Gives the directory back; an empty file says that the run ended in order (`watcher.ended_in_order`)."""
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


class Guard:
    """This rank's ties to its job: the watcher beside it, the stop flag that signals set, the word about a failure."""

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
        """SIGTERM, or one Ctrl-C, asks for a checkpoint after the current step and a clean end; a second Ctrl-C interrupts.

        Called again after a framework was imported, which may have installed handlers of its own.
        """
        if not self.launch.scheduler:
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True

    def fail(self, reason: str) -> None:
        """Tells the other ranks that this one fails, and why; their watchers end them."""
        if self._watcher is not None:
            watcher.write_marker(self.run, self.launch.key, self.launch.name, self._started, reason)

    def leave(self) -> None:
        """Tells the watcher that this process ends in order."""
        if self._watcher is not None:
            assert self._watcher.stdin is not None
            self._watcher.stdin.write(b"end")
            self._watcher.stdin.flush()

    def remove_old_markers(self) -> None:
        """Deletes what failures of earlier jobs left in the directory (rank 0, holding the lock)."""
        for path in self.run.glob(".failure-*"):
            if path.stat().st_mtime < self._started - 60:  # this job's ranks may have started a little earlier
                path.unlink(missing_ok=True)
