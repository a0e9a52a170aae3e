"""Runs a framework's checks in child processes: one that dies or hangs is a failed row, and the next child goes on behind it."""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from granvit.launch import Framework
from selftest.rows import FAILED, NOT_RUN, Row

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "selftest.child")
SECONDS = 240.0  # of one unit, or from a child's start to its first unit
MOST_HANGS = 2  # after so many, the framework's other units are not run
POLL = 0.1  # seconds
KEPT = 4000  # characters of a dead child's output


@dataclass
class Found:
    """What the children of a framework found. `refused`: why the framework cannot run on the device."""

    rows: list[Row] = field(default_factory=list)
    refused: str = ""
    device: str = ""
    devices: int = 0


def environment() -> dict[str, str]:
    """The child finds this checkout and these modules, and msrun this interpreter."""
    paths = [str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def run_framework(framework: Framework, device: str, only: Sequence[str], report: Callable[[Row], None]) -> Found:
    """Every row of a framework; `report` gets each as it comes."""
    found, first, hangs, names = Found(), 0, 0, None

    def add(row: dict[str, Any] | Row) -> None:
        made = row if isinstance(row, Row) else Row(**{**row, "framework": framework})
        found.rows.append(made)
        report(made)

    with tempfile.TemporaryDirectory(prefix="granvit-selftest-") as folder:
        while names is None or first < len(names):
            child = Child([*COMMAND, "--framework", framework, "--device", device, "--first", str(first), "--only", *only,
                           "--out", f"{folder}/{first}.jsonl"], Path(folder), Path(folder) / f"{first}.jsonl")  # fmt: skip
            ended, started = False, None
            for event in child.events():
                if "refused" in event:
                    found.refused = event["refused"]
                    return found
                if "units" in event:
                    names, found.device, found.devices = event["units"], event["device"], event["devices"]
                if "start" in event:
                    started = event["start"]
                if "row" in event:
                    add(event["row"])
                ended = ended or "end" in event
            if not ended:
                what = "the start" if started is None or names is None else names[started]
                add(Row("process", what, FAILED, note=child.death, framework=framework, traceback=child.output()))
                if started is None:
                    return found
                hangs += child.hung
            first = (first if started is None else started) + 1
            if hangs >= MOST_HANGS:
                for name in (names or [])[first:]:
                    add(Row("process", name, NOT_RUN, note=f"{MOST_HANGS} checks before it hung", framework=framework))
                return found
    return found


class Child:
    """A child process; its output goes to a file, because MindSpore prints much."""

    def __init__(self, command: Sequence[str], folder: Path, events: Path):
        self.log, self.file, self.hung, self.death = events.with_suffix(".log"), events, False, ""
        self.file.touch()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=folder,
                                            env=environment(), start_new_session=True)  # fmt: skip

    def events(self) -> Iterator[dict[str, Any]]:
        """What the child says, until it ends. It is killed if it says nothing about a new unit for `SECONDS`, or if this process
        is interrupted."""
        deadline = time.monotonic() + SECONDS
        try:
            with self.file.open() as file:
                while True:
                    running = self.process.poll() is None
                    while line := file.readline():
                        while not line.endswith("\n") and running:  # half written
                            time.sleep(POLL)
                            running = self.process.poll() is None
                            line += file.readline()
                        if not line.endswith("\n"):
                            break
                        event = json.loads(line)
                        if "start" in event or "units" in event:
                            deadline = time.monotonic() + SECONDS
                        yield event
                    if not running:
                        break
                    if time.monotonic() > deadline:
                        self.hung = True
                        break
                    time.sleep(POLL)
        finally:
            self.kill()
        status = self.process.returncode
        self.death = f"the process ended with status {status}" if status >= 0 else f"the process was ended by {name_of(-status)}"
        if self.hung:
            self.death = f"it took longer than {SECONDS:g} s"

    def kill(self) -> None:
        """Ends the child and the processes that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        """The end of what the child printed."""
        return self.log.read_text(errors="replace")[-KEPT:]


def name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
