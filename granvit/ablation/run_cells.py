"""Runs the training runs of a grid's cells in child processes: several at a time, shared runs once, finished ones not again.

A finished run has DIRECTORY/finished.json, which is written after its process ended with status 0. Everything else about a run is
in its directory as the training command leaves it, so a killed grid continues where its runs had saved their last checkpoints.
Children are killed by the kernel when this process dies, whatever the reason.
"""
import json
import os
import re
import shlex
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
from granvit.child_runs import is_complete, launcher, start, stop
from granvit.evaluate import evaluation_file
from granvit.launch import Framework
from granvit.logs import read_metrics
from granvit.trainer import TrainingStopped

POLL = 0.1  # seconds
OUTPUT = "output.txt"  # what a run's processes print


@dataclass(frozen=True)
class Launching:
    """How a run is started: the script that takes `rank STAGE ...` (granvit/ablation/command.py), framework and ranks."""

    script: Path
    framework: Framework
    ranks: int
    bind_cores: bool  # each rank of a run to one core; only where one run at a time uses the machine

    def words(self, run: StageRun) -> list[str]:
        """The command of a run, with the framework's launcher if it has several ranks."""
        first = launcher(self.framework, self.ranks, run.directory / "msrun", self.bind_cores)
        return [*first, *self.own_words(run)]

    def own_words(self, run: StageRun) -> list[str]:
        """The command of a run without Python or launcher."""
        return [str(self.script), "rank", run.config.stage, *run.command_line, "--framework", self.framework]


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

    Returns the failures: key of the run -> the last line of its output, why its directory cannot be used, or the failure of the
    run before it. On Ctrl-C or SIGTERM (as `KeyboardInterrupt`) the children save a checkpoint and end, and `TrainingStopped` is
    raised. They also end so before any other exception leaves this function.
    """
    running = _Running(cells, launching, list(free))
    try:
        while running.waiting or running.children:
            running.collect()
            running.fill_slots()
            time.sleep(POLL)
    except KeyboardInterrupt:
        raise TrainingStopped("interrupted; the runs have saved what they had, and the same command continues") from None
    finally:
        stop(child.process for child in running.children)
    return running.failed


class _Running:
    """The runs of a grid on their way: `waiting` are not started, `children` run in their slots, `free` slots have no run, and
    `failed` has the reason of each run that failed."""

    def __init__(self, cells: list[Cell], launching: Launching, free: list[Slot]):
        self.runs = unique_runs(cells)
        self.users: dict[str, list[str]] = {}
        for cell in cells:
            for run in cell.runs:
                self.users.setdefault(run.key, []).append(cell.name)
        self.launching, self.free, self.jobs = launching, free, len(free)
        self.failed: dict[str, str] = {}
        self.children: list[_Child] = []
        self.taken: list[float] = []  # seconds of the finished runs
        self.told: set[str] = set()  # runs of which was said that another process has them
        self.waiting = [run for run in self.runs if not self._is_finished(run)]
        finished = len(self.runs) - len(self.waiting) - len(self.failed)
        _say(f"{len(self.runs)} runs for {len(cells)} cells, {finished} of them finished before")

    def _fail(self, run: StageRun, reason: object) -> None:
        self.failed[run.key] = str(reason)
        _say(f"{run.directory.name} FAILED: {reason} ({run.directory / OUTPUT})")

    def _is_finished(self, run: StageRun) -> bool:
        """Whether a run is finished. One whose directory cannot be read has failed, and counts as finished."""
        if run.key not in self.failed:
            try:
                return finished_seconds(run) is not None
            except (OSError, ValueError) as error:
                self._fail(run, error)
        return True

    def collect(self) -> None:
        """Takes in the runs that have ended."""
        for child in [child for child in self.children if child.process.poll() is not None]:
            self.children.remove(child)
            self.free.append(child.slot)
            seconds = time.monotonic() - child.started
            try:
                reason = _end(child, seconds)
            except OSError as error:
                reason = str(error)
            child.claim.close()
            if reason is not None:
                self._fail(child.run, reason)
                continue
            self.taken.append(seconds)
            left = sum(self.taken) / len(self.taken) * (len(self.waiting) + len(self.children)) / self.jobs
            _say(f"{child.run.directory.name}: finished in {seconds:.0f} s; about {left / 60:.0f} min left")

    def fill_slots(self) -> None:
        """Starts what can be started: the run before it is finished, a slot is free, and no other grid has it."""
        running = {child.run.key for child in self.children}
        for run in list(self.waiting):
            before = run.before
            if before is not None and before.key in self.failed:
                self.waiting.remove(run)
                self.failed[run.key] = self.failed[before.key]
            elif self._is_finished(run):  # by another grid, at the same time
                self.waiting.remove(run)
            elif before is not None and (before.key in running or not self._is_finished(before)):
                continue
            elif self.free:
                try:
                    self._start(run)
                except OSError as error:
                    self.waiting.remove(run)
                    self._fail(run, error)

    def _start(self, run: StageRun) -> None:
        """Starts a run in a free slot, unless another process has it or has finished it. `OSError` if its directory or its
        command cannot be used."""
        claimed, owner = claim(run.directory)
        if claimed is None:
            if run.key not in self.told:
                _say(f"{run.directory} is in use by {owner}: waiting for it")
            self.told.add(run.key)
            return
        try:
            if self._is_finished(run):  # by another grid, before this one had the claim
                self.waiting.remove(run)
                claimed.close()
                return
            words = self.launching.words(run)
            with open(run.directory / OUTPUT, "a") as output:
                output.write(f"$ {shlex.join(words)}\n")
                output.flush()
                process = start(words, self.free[0].cores, output, self.free[0].environment)
        except OSError:
            claimed.close()
            raise
        self.waiting.remove(run)
        self.children.append(_Child(run, process, self.free.pop(0), claimed, time.monotonic()))
        others = len(self.users[run.key]) - 1
        shared = f" and {others} more" if others else ""
        number = len(self.runs) - len(self.waiting)
        _say(f"{number} of {len(self.runs)}: {run.stage} of {self.users[run.key][0]}{shared}, in {run.directory}")


def _say(line: str) -> None:
    print(f"== {line}", flush=True)


def _end(child: _Child, seconds: float) -> str | None:
    """Records a child's end. Returns None if its run is finished, else the reason."""
    status = child.process.returncode
    if status == 0 and not is_complete(child.run.directory):
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
        if not is_complete(directory) or trained_by(directory):
            return False
    except FileNotFoundError:
        return False
    steps = [record["step"] for _, record in read_metrics(directory / "metrics.jsonl", sys.maxsize)]
    return bool(steps) and (run.config.eval.source is None or evaluation_file(directory, steps[-1]).exists())


def _step_seconds(directory: Path) -> float:
    return sum(record.get("seconds", 0.0) for _, record in read_metrics(directory / "metrics.jsonl", sys.maxsize))
