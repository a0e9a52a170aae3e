"""Runs the training runs of a grid's cells in child processes: several at a time, shared runs once, finished ones not again.

A finished run has DIRECTORY/finished.json, which is written after its process ended with status 0. Everything else about a run is
in its directory as the training command leaves it, so a killed grid continues where its runs had saved their last checkpoints.
Children are killed by the kernel when this process dies, whatever the reason.
"""
import ctypes
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from granvit.ablation.grid import Cell, StageRun
from granvit.ablation.machine import Slot
from granvit.ablation.run_locks import claim, trained_by
from granvit.checkpoint.tensors import write_synced
from granvit.evaluate import evaluation_file
from granvit.launch import Framework
from granvit.logs import read_metrics
from granvit.trainer import TrainingStopped

POLL = 0.1  # seconds
OUTPUT = "output.txt"  # what a run's processes print
_LIBC = ctypes.CDLL(None)  # loaded before the first fork
_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


@dataclass(frozen=True)
class Launching:
    """How a run is started: the script that takes `rank STAGE ...` (granvit/ablation/command.py), framework and ranks."""

    script: Path
    framework: Framework
    ranks: int
    bind_cores: bool  # each rank of a run to one core; only where one run at a time uses the machine

    def words(self, run: StageRun) -> list[str]:
        """The command of a run, with the framework's launcher if it has several ranks."""
        bin_directory = Path(sys.executable).parent
        launcher = [sys.executable]
        if self.ranks > 1 and self.framework == "mindspore":
            launcher = [str(bin_directory / "msrun"), "--worker_num", str(self.ranks), "--local_worker_num", str(self.ranks),
                        "--master_port", str(_free_port()), "--bind_core", str(self.bind_cores), "--join", "True",
                        "--log_dir", str(run.directory / "msrun")]  # fmt: skip
        elif self.ranks > 1:
            launcher = [str(bin_directory / "torchrun"), "--nproc_per_node", str(self.ranks), "--master_port", str(_free_port())]
        return [*launcher, str(self.script), "rank", run.config.stage, *run.command_line, "--framework", self.framework]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finished_seconds(run: StageRun) -> float | None:
    """How long the run's last process took if the run is finished, else None. Of a run that was completed outside of the grid, on
    any number of ranks, it is the time of its steps."""
    try:
        return float(json.loads((run.directory / "finished.json").read_text())["seconds"])
    except FileNotFoundError:
        return _step_seconds(run.directory) if _completed_outside(run) else None


def unique_runs(cells: Iterable[Cell]) -> list[StageRun]:
    """Every run of the cells that can run, once, in the order of the cells; a run comes after the one that it starts from."""
    return list({run.key: run for cell in cells if cell.problem is None for run in cell.runs}.values())


@dataclass
class _Child:
    run: StageRun
    process: subprocess.Popen
    slot: Slot
    claim: IO[str]
    started: float


def run_cells(cells: list[Cell], launching: Launching, free: list[Slot]) -> dict[str, str]:
    """Runs what is not finished, in the order of the cells, one run in each slot of `free`.

    Returns the failures: key of the run -> the last line of its output, or of that of the run before it that failed. On Ctrl-C or
    SIGTERM (as `KeyboardInterrupt`) the children save a checkpoint and end, and `TrainingStopped` is raised.
    """
    runs = unique_runs(cells)
    users: dict[str, list[str]] = {}
    for cell in cells:
        for run in cell.runs:
            users.setdefault(run.key, []).append(cell.name)
    waiting = [run for run in runs if finished_seconds(run) is None]
    _say(f"{len(runs)} runs for {len(cells)} cells, {len(runs) - len(waiting)} of them finished before")
    failed: dict[str, str] = {}
    children: list[_Child] = []
    free = list(free)
    jobs, taken, told = len(free), [], set()
    try:
        while waiting or children:
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                free.append(child.slot)
                seconds = time.monotonic() - child.started
                reason = _end(child, seconds)
                child.claim.close()
                if reason is None:
                    taken.append(seconds)
                    left = sum(taken) / len(taken) * (len(waiting) + len(children)) / jobs
                    _say(f"{child.run.directory.name}: finished in {seconds:.0f} s; about {left / 60:.0f} min left")
                else:
                    failed[child.run.key] = reason
                    _say(f"{child.run.directory.name} FAILED: {reason} ({child.run.directory / OUTPUT})")
            running = {child.run.key for child in children}
            for run in list(waiting):
                if run.before is not None and run.before.key in failed:
                    waiting.remove(run)
                    failed[run.key] = failed[run.before.key]
                elif finished_seconds(run) is not None:  # by another grid, at the same time
                    waiting.remove(run)
                elif run.before is not None and (run.before.key in running or finished_seconds(run.before) is None):
                    continue
                elif free:
                    claimed, owner = claim(run.directory)
                    if claimed is None:
                        if run.key not in told:
                            _say(f"{run.directory} is in use by {owner}: waiting for it")
                        told.add(run.key)
                        continue
                    waiting.remove(run)
                    if finished_seconds(run) is not None:  # by another grid, before this one had the claim
                        claimed.close()
                        continue
                    number = len(runs) - len(waiting)
                    others = len(users[run.key]) - 1
                    shared = f" and {others} more" if others else ""
                    _say(f"{number} of {len(runs)}: {run.stage} of {users[run.key][0]}{shared}, in {run.directory}")
                    children.append(_start(run, launching, free.pop(0), claimed))
            time.sleep(POLL)
    except KeyboardInterrupt:
        for child in children:
            child.process.send_signal(signal.SIGTERM)
        for child in children:
            child.process.wait()
        raise TrainingStopped("interrupted; the runs have saved what they had, and the same command continues") from None
    return failed


def _say(line: str) -> None:
    print(f"== {line}", flush=True)


def _start(run: StageRun, launching: Launching, slot: Slot, claimed: IO[str]) -> _Child:
    words = launching.words(run)
    # One thread of linear algebra per rank, so that --jobs does not change a result. Others: see granvit/demo/command.py.
    defaults = {"OMP_NUM_THREADS": "1", "GLOG_v": "3", "MS_RETRY_INTERVAL_LOWER": "0", "MS_RETRY_INTERVAL_UPPER": "1"}
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # msrun starts the first `python` in it
    environment = {**defaults, **os.environ, **slot.environment, "PATH": search}

    def prepare() -> None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        os.sched_setaffinity(0, slot.cores)

    with open(run.directory / OUTPUT, "a") as output:
        output.write(f"$ {shlex.join(words)}\n")
        output.flush()
        # A session of its own: Ctrl-C reaches the children only through `run_cells`.
        process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   start_new_session=True, preexec_fn=prepare)  # fmt: skip
    return _Child(run, process, slot, claimed, time.monotonic())


def _end(child: _Child, seconds: float) -> str | None:
    """Records a child's end. Returns None if its run is finished, else the reason."""
    status = child.process.returncode
    if status == 0 and not _complete(child.run.directory):
        return "stopped before its last step; the same command continues"
    if status == 0:
        temporary = child.run.directory / "finished.tmp"
        write_synced(temporary, json.dumps({"seconds": round(seconds, 1)}) + "\n")
        os.replace(temporary, child.run.directory / "finished.json")
        return None
    lines = (child.run.directory / OUTPUT).read_text(errors="replace").splitlines()
    last_start = max(number for number, line in enumerate(lines) if line.startswith("$ "))
    said = [line.strip() for line in lines[last_start + 1 :] if line.strip()]
    # A launcher prints more after the line in which the training command says why it ended.
    own = [line for line in said if re.match(r"(rank \d+: )?(error|failed|stopped): ", line)]
    ended = f"signal {-status}" if status < 0 else f"exit status {status}"
    return next(reversed(own or said), f"no output, {ended}")


def _completed_outside(run: StageRun) -> bool:
    """Whether a process that the grid did not start, or whose end it did not see, trained the last step and evaluated it."""
    directory = run.directory
    try:
        if not _complete(directory) or trained_by(directory):
            return False
    except FileNotFoundError:
        return False
    steps = [record["step"] for _, record in read_metrics(directory / "metrics.jsonl", sys.maxsize)]
    return bool(steps) and (run.config.eval.source is None or evaluation_file(directory, steps[-1]).exists())


def _step_seconds(directory: Path) -> float:
    return sum(record.get("seconds", 0.0) for _, record in read_metrics(directory / "metrics.jsonl", sys.maxsize))


def _complete(directory: Path) -> bool:
    """Whether the last process of a run that ended trained its last step: one that was asked to stop ends with status 0, too.
    Both say so at the end of rank 0's log (granvit/train.py), which also has a line for each start."""
    log = (directory / "log" / "rank_00000.txt").read_text(errors="replace")
    said = re.findall(r"run .* is (complete|not complete)|( rank\(s\), \d+ steps, )", log)
    return bool(said) and said[-1][0] == "complete"
