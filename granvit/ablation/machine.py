"""How many runs this machine can do at the same time, and which cores or devices each of them gets."""
import os
import re
from dataclasses import dataclass
from pathlib import Path

from granvit.launch import Framework

# Accelerators: the variable that hides devices from a process, and the device files of the driver.
NPU, GPU = ("ASCEND_RT_VISIBLE_DEVICES", "davinci"), ("CUDA_VISIBLE_DEVICES", "nvidia")


@dataclass(frozen=True)
class Slot:
    """Room for one run: the cores that it may use, and environment variables that show it its devices."""

    cores: frozenset[int]
    environment: dict[str, str]


def _devices(framework: Framework, device: str, drivers: Path) -> tuple[str, list[str]] | None:
    """The variable and the numbers of the accelerators that a run with `runtime.device=device` would use; None if it uses the
    CPU."""
    kinds = {("mindspore", "auto"): NPU, ("mindspore", "npu"): NPU, ("torch", "npu"): NPU, ("torch", "auto"): GPU,
             ("torch", "cuda"): GPU}  # fmt: skip
    if (framework, device) not in kinds:
        return None
    variable, driver = kinds[framework, device]
    if os.environ.get(variable):
        return variable, os.environ[variable].split(",")
    found = sorted(int(match[1]) for path in drivers.glob(f"{driver}*") if (match := re.fullmatch(rf"{driver}(\d+)", path.name)))
    return (variable, [str(number) for number in found]) if found else None


def slots(framework: Framework, device: str, ranks: int, jobs: int | None, drivers: Path = Path("/dev")) -> list[Slot]:
    """Slots for `jobs` runs of `ranks` ranks each. `jobs` None: as many as there are accelerators, or cores, for all ranks.

    Cores and accelerators are divided evenly. With more jobs than there is room for, jobs share them.
    """
    cores = sorted(os.sched_getaffinity(0))
    found = _devices(framework, device, drivers)
    places = len(cores) if found is None else len(found[1])
    jobs = jobs or max(places // ranks, 1)

    def part(items: list, job: int) -> list:
        size = len(items) // jobs
        return items[job * size : (job + 1) * size] if size else [items[job % len(items)]]

    environments = [{} if found is None else {found[0]: ",".join(part(found[1], job))} for job in range(jobs)]
    return [Slot(frozenset(part(cores, job)), environment) for job, environment in enumerate(environments)]
