"""Functions run in a separate process, and the memory of a process, for the benchmarks. Linux only."""
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def alone(function: Callable, *arguments: Any) -> Any:
    """The result of the function, run in a separate process, so that memory is measured without what ran before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory(what: str) -> int:
    """VmRSS (resident now), VmHWM (its peak) or RssFile (the part of VmRSS that is mapped files) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


class Peak:
    """Measures by how much this process's memory rises inside the block: `with Peak() as peak: ...; peak.bytes`."""

    def __enter__(self) -> "Peak":
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory in use now
        self.before = memory("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = memory("VmHWM") - self.before
