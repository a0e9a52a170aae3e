"""Check 9: two ranks sum known numbers through the project's own layer, on the host's and on the devices' libraries.

Run as a script by msrun or torchrun, this file is one rank: FRAMEWORK DEVICE DIRECTORY.
"""
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from granvit import child_runs
from granvit.launch import FRAMEWORKS, Framework
from selftest.children import KEPT, environment
from selftest.rows import FAILED, NOT_RUN, PASSED, Row

RANKS = 2
SECONDS = 120.0
NUMBERS = 1000


def values(rank: int) -> np.ndarray:
    """Whole numbers whose sum over the ranks is exact in float32."""
    return (np.arange(NUMBERS) * (rank + 1) + 2.0**20 * rank).astype(np.float32)


def two_ranks(framework: Framework, device: str, devices: int) -> Row:
    """The row of this check, or one that says that there is only one device."""
    what = f"{RANKS} ranks on {device}"
    if device != "cpu" and devices < RANKS:
        return Row("all-reduce", what, NOT_RUN, note=f"{devices} device", framework=framework)
    expected = sum(values(rank) for rank in range(RANKS)).tolist()
    with tempfile.TemporaryDirectory(prefix="granvit-selftest-") as folder:
        command = child_runs.launcher(framework, RANKS, Path(folder) / "msrun", False)
        with (Path(folder) / "log").open("w") as log:
            words = [*command, str(Path(__file__).resolve()), framework, device, folder]
            child = child_runs.start(words, os.sched_getaffinity(0), log, {"PYTHONPATH": environment()["PYTHONPATH"]})
            try:
                status: int | str = child.wait(SECONDS)
            except subprocess.TimeoutExpired:
                status = f"none within {SECONDS:g} s"
            finally:
                end(child)
        logs = [path for path in sorted(Path(folder).glob("**/*log")) if path.is_file()]
        output = "".join(path.read_text(errors="replace")[-KEPT:] for path in logs)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank_*.json"))]
    problems = [f"exit status {status}"] * (status != 0) + [f"{len(found)} ranks answered"] * (len(found) != RANKS)
    wrong = [(rank, where) for rank, sums in enumerate(found) for where in sums if sums[where] != expected]
    problems += [f"rank {rank}, {where}: wrong sums" for rank, where in wrong]
    note = "; ".join(problems) or f"{NUMBERS} known numbers, on the host and on the device; exact"
    return Row("all-reduce", what, FAILED if problems else PASSED, note=note, framework=framework,
               traceback=output if problems else "")  # fmt: skip


def end(child: subprocess.Popen) -> None:
    """Asks a launcher to end its ranks, and kills it if it does not."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def main(framework: Framework, device: str, directory: str) -> None:
    """One rank: writes the sums that it got to `directory`."""
    distributed = importlib.import_module(f"{FRAMEWORKS[framework][0]}.distributed")
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        distributed.join("cpu")
        return
    side = importlib.import_module(f"selftest.side_{framework}")
    ranks = distributed.join(device)
    sums = {"on the host": ranks.all_sum(values(ranks.rank)), "on the device": side.sum_on_devices(device, values(ranks.rank))}
    path = Path(directory) / f"rank_{ranks.rank}.json"
    path.write_text(json.dumps({where: array.tolist() for where, array in sums.items()}))
    ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
