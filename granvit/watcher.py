"""The process beside each rank that ends it when the job around it has ended. Standard library only; run by path.

A rank that waits in a collective cannot look around itself (the framework may hold the interpreter's lock there), so this runs
outside it, in a session of its own. Five times a second it asks:
- is the rank gone without a word (kill -9)? Then it says so in a marker file in the run's directory and ends.
- is there another rank's marker? Then it logs the reason and kills its rank.
- is the launcher gone that should outlive the ranks? Then it asks the rank to stop at the next step (SIGTERM), kills the
  `tail -f` that msrun left on the rank's output, and kills the rank if it is still there after the grace period.
"""
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

POLL = 0.2
GRACE_FAILURE = 2.0  # seconds for a rank to leave by itself after another one failed
GRACE_LAUNCHER = 300.0  # seconds to reach the end of a step and save after the launcher died
SAME_HOST_SKEW = 2.0  # seconds within which one job's ranks start on one host


def stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def parent_of(pid: int) -> int:
    """The parent's process id; 0 where the process is gone."""
    try:
        return int(stat_fields(pid)[1])
    except (OSError, IndexError):
        return 0


def start_time(pid: int) -> float:
    """When a process started, in seconds since the epoch (10 ms resolution)."""
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return int(boot.split()[1]) + int(stat_fields(pid)[19]) / os.sysconf("SC_CLK_TCK")


def marker_path(run: Path, key: str, name: str) -> Path:
    """The file in which member `name` of the job `key` states why it failed."""
    return run / f".failure-{key}-{name}.json"


def lock_path(run: Path) -> Path:
    """The file that rank 0 holds while the run goes on, with its name in it."""
    return run / ".lock"


def ended_in_order(run: Path, started: float) -> bool:
    """Whether rank 0 has let go of the run in order since `started`: then its lock file is empty."""
    try:
        lock = lock_path(run).stat()
    except OSError:
        return False
    return lock.st_size == 0 and lock.st_mtime >= started


def write_marker(run: Path, key: str, name: str, started: float, reason: str) -> None:
    """States a failure to the other members of the job; an earlier statement of this member and job stands."""
    path = marker_path(run, key, name)
    stated = read_marker(path)
    if stated is not None and stated["started"] == started:
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"host": socket.gethostname(), "started": started, "reason": reason}))
    os.replace(temporary, path)


def read_marker(path: Path) -> dict | None:
    """A marker's contents; None where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def other_failure(run: Path, key: str, name: str, started: float) -> str | None:
    """Why another member of the same job failed; None where none did.

    An earlier job with the same key (the scheduler's address) may have left markers: on one host a job's members start
    together, and across hosts what was written before this member started is not its job's.
    """
    for path in run.glob(f".failure-{key}-*.json"):
        stated = read_marker(path) if path != marker_path(run, key, name) else None
        if stated is None:
            continue
        if stated["host"] == socket.gethostname():
            same_job = stated["started"] >= started - SAME_HOST_SKEW
        else:
            same_job = path.stat().st_mtime >= started
        if same_job:
            return f"{path.stem.removeprefix(f'.failure-{key}-')} on {stated['host']} failed: {stated['reason']}"
    return None


def _kill_tails(output: str) -> None:
    """Kills `tail -f OUTPUT`, which msrun --join starts per rank and leaves behind when it is killed."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")[:-1]
            if len(command) == 3 and command[:2] == ["/usr/bin/tail", "-f"]:
                followed = os.path.join(os.readlink(folder / "cwd"), command[2])
                if os.path.realpath(followed) == output:
                    os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue  # ended meanwhile, or another user's


def main(argv: list[str]) -> None:
    """`watcher.py JSON`: rank's pid, launcher's pid (0: none to outlive), run, key, name, start time, scheduler, log."""
    job = json.loads(argv[1])
    rank, launcher, run, key, name = job["rank"], job["launcher"], Path(job["run"]), job["key"], job["name"]
    output = os.path.realpath("/proc/self/fd/1")
    os.set_blocking(0, False)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        if os.path.exists(job["log"]):
            with open(job["log"], "a") as file:
                file.write(time.strftime("%Y-%m-%d %H:%M:%S ERROR ") + text + "\n")

    def kill() -> None:
        if os.getppid() == rank:
            os.kill(rank, signal.SIGKILL)

    deadline = None
    while True:
        if os.getppid() != rank:
            # An orderly end is announced on the pipe, except by MindSpore's scheduler, which leaves without returning to Python.
            if not os.read(0, 16) and not (job["scheduler"] and ended_in_order(run, job["started"])):
                reason = f"killed (process {rank} ended without a word)"
                write_marker(run, key, name, job["started"], reason)
                say(f"{name}: {reason}")
            return
        failure = other_failure(run, key, name, job["started"])
        if failure is not None:
            time.sleep(GRACE_FAILURE)
            if os.getppid() == rank:
                say(f"{name} ends because {failure}")
                kill()
            return
        if deadline is None and launcher and parent_of(rank) != launcher:
            say(f"{name}: the launcher (process {launcher}) is gone; stopping after the next step")
            _kill_tails(output)
            if not job["scheduler"]:
                os.kill(rank, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_LAUNCHER
        if deadline is not None and time.monotonic() > deadline:
            say(f"{name}: still running {GRACE_LAUNCHER:.0f} s after its launcher died; killed")
            kill()
            return
        time.sleep(POLL)


if __name__ == "__main__":
    main(sys.argv)
