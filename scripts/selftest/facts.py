"""What the machine is, apart from the frameworks: Python, packages, the commit, the processor, drivers, the C++ kernels."""
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from granvit import native
from granvit.checkpoint.run_writer import versions
from granvit.cost import host_memory
from selftest.rows import ABSENT, NOTED, Row

ROOT = Path(__file__).resolve().parents[2]
# Files in which CANN and its driver say their versions.
CANN_FILES = ("ascend_toolkit_install.info", "version.cfg", "*-linux/ascend_toolkit_install.info")
DRIVER_FILE = Path("/usr/local/Ascend/driver/version.info")


def machine_rows() -> list[Row]:
    """The machine and the checkout; no framework is imported for them."""
    found = {
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores, {host_memory() / 1e9:.0f} GB",
        "packages": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "commit": commit(),
    }
    return [Row("version", what, NOTED, note=text) for what, text in found.items()]


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit of the checkout, and whether files differ from it."""
    if not (ROOT / ".git").exists():
        return "not a git checkout"
    number = output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    return number + (", with changes" if output(["git", "-C", str(ROOT), "status", "--porcelain"]) else "")


def output(command: Sequence[str]) -> str:
    """What a command prints, or why it prints nothing."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} not found"
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def version_rows(device: str) -> list[Row]:
    """The C++ kernels, and the driver and libraries of the device."""
    found: dict[str, str] = {}
    if device == "cuda":
        driver = output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        found["driver"] = ", ".join(sorted(set(driver.splitlines()))) or "unknown"
    if device == "npu":
        home = Path(os.environ.get("ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest"))
        files = [path for pattern in CANN_FILES for path in sorted(home.glob(pattern))]
        found |= {"CANN": version_in(files), "driver": version_in([DRIVER_FILE])}
    lack = native.why_missing()
    kernels = Row("version", "C++ kernels", ABSENT if lack else NOTED, note=lack or native.instruction_set())
    return [kernels, *(Row("version", what, NOTED, note=text) for what, text in found.items())]


def version_in(files: Sequence[Path]) -> str:
    """The line of the first of these files that names a version."""
    for path in files:
        if path.is_file():
            lines = path.read_text(errors="replace").splitlines()
            return next((line.strip() for line in lines if "version" in line.lower()), f"{path} names none")
    return "unknown"
