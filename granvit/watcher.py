"""The watcher: a process for each rank that ends the rank when another rank or the launcher has ended. It uses only the standard
library and is started by its path.

A rank that waits in a collective cannot check anything itself (the framework may hold the interpreter lock), so the watcher is a
separate process with a session of its own. Five times a second it checks:
- Has its rank ended without reporting it (kill -9)? Then it writes a marker file into the run's directory and exits.
- Is there a marker file of another rank? Then it logs the reason and kills its rank.
- Has a launcher ended that should outlive the ranks? Then it asks the rank to stop after the current step (SIGTERM), kills the
  `tail -f` that msrun left running on the rank's output, and kills the rank if it still runs after the grace period.
"""
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

POLL = 0.2
GRACE_FAILURE = 2.0  # seconds for a rank to end by itself after another one failed
GRACE_LAUNCHER = 300.0  # seconds to finish a step and save after the launcher has ended
SAME_HOST_SKEW = 2.0  # seconds within which the ranks of one job start on one host


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat, beginning with the third (state)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def parent_of(pid: int) -> int:
    """The parent's process id; 0 if the process does not exist."""
    try:
        return int(stat_fields(pid)[1])
    except (OSError, IndexError):
        return 0


def start_time(pid: int) -> float:
    """The start time of a process in seconds since the epoch (10 ms resolution)."""
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return int(boot.split()[1]) + int(stat_fields(pid)[19]) / os.sysconf("SC_CLK_TCK")


def marker_path(run: Path, key: str, name: str) -> Path:
    """The marker file in which member `name` of job `key` reports why it failed. Members are the ranks and msrun's scheduler."""
    return run / f".failure-{key}-{name}.json"


def lock_path(run: Path) -> Path:
    """The file that rank 0 locks while the run is active; it names rank 0's process."""
    return run / ".lock"


def ended_in_order(run: Path, started: float) -> bool:
    """Whether rank 0 has released the run in order since the time `started`: then the lock file is empty."""
    try:
        lock = lock_path(run).stat()
    except OSError:
        return False
    return lock.st_size == 0 and lock.st_mtime >= started


def write_marker(run: Path, key: str, name: str, started: float, reason: str) -> None:
    """Reports a failure to the other members of the job. An earlier report of the same process is kept."""
    path = marker_path(run, key, name)
    stated = read_marker(path)
    if stated is not None and stated["started"] == started:
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"host": socket.gethostname(), "started": started, "reason": reason}))
    os.replace(temporary, path)


def read_marker(path: Path) -> dict | None:
    """The contents of a marker file; None if it does not exist or cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def other_failure(run: Path, key: str, name: str, started: float) -> str | None:
    """Why another member of the same job failed; None if none did.

    Markers of an earlier job with the same key (the address where the ranks meet) are ignored: on this host, markers of processes
    that started more than `SAME_HOST_SKEW` seconds before this member; from other hosts, markers written before it started.
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
            continue  # the process has ended, or belongs to another user


def main(argv: list[str]) -> None:
    """`watcher.py JSON` with the keys that `granvit.launch.Guard` writes; `launcher` 0: no launcher is watched."""
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
            # The rank announces an orderly end on the pipe. MindSpore's scheduler cannot: it exits without returning to Python.
            if not os.read(0, 16) and not (job["scheduler"] and ended_in_order(run, job["started"])):
                reason = f"killed (process {rank} ended without reporting an error)"
                write_marker(run, key, name, job["started"], reason)
                say(f"{name}: {reason}")
            return
        failure = other_failure(run, key, name, job["started"])
        if failure is not None:
            time.sleep(GRACE_FAILURE)
            if os.getppid() == rank:
                say(f"{name} is stopped because {failure}")
                kill()
            return
        if deadline is None and launcher and parent_of(rank) != launcher:
            say(f"{name}: the launcher (process {launcher}) has ended; stopping after the current step")
            _kill_tails(output)
            if not job["scheduler"]:
                os.kill(rank, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_LAUNCHER
        if deadline is not None and time.monotonic() > deadline:
            say(f"{name}: still running {GRACE_LAUNCHER:.0f} s after its launcher ended; killed")
            kill()
            return
        time.sleep(POLL)


if __name__ == "__main__":
    main(sys.argv)
