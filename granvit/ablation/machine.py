"""How many runs this machine can do at the same time, and which cores or devices each of them gets."""
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from granvit.launch import Framework

# Accelerators: the variable that chooses a process's devices, and the device files of the driver.
NPU, GPU = ("ASCEND_RT_VISIBLE_DEVICES", "davinci"), ("CUDA_VISIBLE_DEVICES", "nvidia")
# What `runtime.device` can mean, in the order in which the framework looks for it (`choose_device` of its package).
KINDS: Mapping[tuple[Framework, str], tuple[tuple[str, str], ...]] = {
    ("mindspore", "auto"): (NPU,), ("mindspore", "npu"): (NPU,),
    ("torch", "auto"): (GPU, NPU), ("torch", "cuda"): (GPU,), ("torch", "npu"): (NPU,),
}  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """Room for one run: the cores that it may use, and environment variables that show it its devices."""

    cores: frozenset[int]
    environment: dict[str, str]


@dataclass(frozen=True)
class Machine:
    """The cores of this process, and its accelerators as entries of the environment variable `variable`. Without `variable`, runs
    use the CPU."""

    cores: tuple[int, ...]
    variable: str | None
    devices: tuple[str, ...]

    def jobs(self, ranks: int) -> int:
        """How many runs of `ranks` ranks fit at the same time, at least 1: one device, or core, for each rank."""
        return max(len(self.cores if self.variable is None else self.devices) // ranks, 1)

    def fits(self, jobs: int, ranks: int) -> bool:
        """Whether there is a device for each rank of so many runs. The CPU takes any number."""
        return self.variable is None or jobs * ranks <= len(self.devices)

    def slots(self, jobs: int, ranks: int) -> list[Slot]:
        """Slots for `jobs` runs of `ranks` ranks each. Cores and devices are divided evenly; runs share cores if there are fewer.

        `ValueError` if there is not a device for each rank.
        """
        environments: list[dict[str, str]] = [{}] * jobs
        if self.variable is not None:
            if not self.fits(jobs, ranks):
                shown = os.environ.get(self.variable)
                state = f"{self.variable} is not set" if shown is None else f"{self.variable} is {shown!r}"
                raise ValueError(
                    f"--jobs {jobs} x --ranks {ranks} = {jobs * ranks} ranks need a device each, and {len(self.devices)} are "
                    f"there ({state}); take fewer jobs or ranks, show more devices, or set runtime.device=cpu"
                )
            each = len(self.devices) // jobs
            environments = [{self.variable: ",".join(self.devices[job * each : (job + 1) * each])} for job in range(jobs)]
        size = len(self.cores) // jobs
        parts = [self.cores[job * size : (job + 1) * size] or (self.cores[job % len(self.cores)],) for job in range(jobs)]
        return [Slot(frozenset(part), environment) for part, environment in zip(parts, environments, strict=True)]


def this_machine(framework: Framework, device: str, drivers: Path = Path("/dev")) -> Machine:
    """The cores and devices that runs with `runtime.device=device` can use here. `auto` is the CPU if there is no accelerator."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    kinds = KINDS.get((framework, device), ())
    for variable, driver in kinds:
        if devices := _devices(variable, driver, drivers):
            return Machine(cores, variable, devices)
    return Machine(cores, None if device == "auto" or not kinds else kinds[0][0], ())


def _devices(variable: str, driver: str, drivers: Path) -> tuple[str, ...]:
    """The accelerators of one kind as entries of `variable`: those that it lists if it is set, else one for each device file.

    CUDA and CANN count the devices that a process can open from 0. In a container these are not the numbers of the device files.
    An entry is a number or a UUID (GPU-..., MIG-...); as in CUDA, the first other entry (-1, for example) ends the list.
    """
    if variable in os.environ:
        shown = []
        for entry in os.environ[variable].split(","):
            if not re.fullmatch(r"\d+|(GPU|MIG)-.+", entry.strip()):
                break
            shown.append(entry.strip())
        return tuple(shown)
    count = sum(re.fullmatch(rf"{driver}\d+", path.name) is not None for path in drivers.glob(f"{driver}*"))
    return tuple(map(str, range(count)))
