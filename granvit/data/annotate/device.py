"""Devices and cores of a machine, shared out to the processes that MPI has started on it.

What MPICH's and Open MPI's mpiexec tell a process about its machine is read from environment variables: its number among the
machine's processes, and how many those are. It has not been run on a machine with several devices: what is tested is the choice.
"""
import os
from typing import Any

from granvit.data.annotate.annotator import needed

_NUMBERS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
_COUNTS = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


def own_device(device: str) -> str:
    """The device of this process: `device` as it is ("cpu", "cuda:1", "npu:0"), but where MPI has started the process, a kind
    without a number ("cuda", "npu") becomes that of the process's number on its machine, modulo the machine's devices.

    `ValueError` if torch finds no device of this kind. Devices of another machine are not looked at: each process asks its own.
    """
    number = _first(_NUMBERS)
    if number is None or device == "cpu" or ":" in device:
        return device
    kind: Any = getattr(needed("torch"), device, None)
    count = kind.device_count() if hasattr(kind, "device_count") else 0
    if not count:
        raise ValueError(f"device {device}: torch finds none on this machine")
    return f"{device}:{number % count}"


def share_cores() -> None:
    """Where MPI has started the process, lets torch use no more threads than its share of the machine's cores, at least one.
    Without that the processes of a machine would each use all of them."""
    count = _first(_COUNTS)
    if count is not None:
        torch = needed("torch")
        share = max(len(os.sched_getaffinity(0)) // max(count, 1), 1)
        torch.set_num_threads(min(torch.get_num_threads(), share))


def _first(names: tuple[str, ...]) -> int | None:
    """The first of the environment variables that is set to a number."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), None)
