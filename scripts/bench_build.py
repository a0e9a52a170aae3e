"""The benchmark `build` of scripts/bench.py: scripts/build_gran.py without annotators over a folder of generated JPEG files: its
speed, the share of decoding, two ranks against one, and its memory while it works through many records. Linux only.

Images are smooth random fields with noise, so that no two are duplicates. Processor seconds are those of all threads of the
command without its start, which a second run with nothing left to do measures.
"""
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from granvit.data.images import decode
from granvit.data.store import MAX_PIXELS

COMMAND = Path(__file__).with_name("build_gran.py")
IMAGES, SIZE = 2000, (640, 480)  # of the tree whose speed is measured
SMALL = (160, 120)  # images of the tree whose memory is measured: records count there, not pixels
UNIT, MEMORY_UNITS = 100, 20  # images of a unit of work; units of the second tree
NOISE, QUALITY = 6.0, 90  # standard deviation in 8-bit steps; of JPEG
DECODED = 200  # images decoded to measure decoding
SHARES = (0.1, 0.5, 1.0)  # of the records, at which memory is read
FLAT = 1.1  # limit of memory at a later share over that at the first
POLL = 0.02  # seconds


def write_tree(root: Path, images: int, size: tuple[int, int], unit: int) -> Path:
    """Writes images of this size with three regions each, and a build's configuration; returns its path."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    width, height = size
    noise = rng.normal(0, NOISE, (height, width, 3))
    with open(root / "lines.jsonl", "w") as lines:
        for number in range(images):
            field = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            Image.fromarray((np.asarray(field) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
            (root / "images" / f"{number}.jpg").write_bytes(buffer.getvalue())
            corners = rng.uniform(0, 0.5, (3, 2))
            regions = [{"box": [x, y, x + 0.5, y + 0.5], "caption": f"thing {k} of picture {number}"}
                       for k, (x, y) in enumerate(corners.tolist())]  # fmt: skip
            lines.write(json.dumps({"image": f"{number}.jpg", "regions": regions, "global": f"Picture {number}."}) + "\n")
    filters = {} if size == SIZE else {"shorter_side": {"above": 20}, "box_area": {"above": 16}}
    source = {"store": "natural", "images": str(root / "images"), "filters": filters,
              "read": {"format": "jsonl", "annotations": str(root / "lines.jsonl")}}  # fmt: skip
    path = root / "build.yaml"
    path.write_text(yaml.safe_dump({"out": str(root / "out"), "unit_images": unit, "sources": {"pictures": source}}))
    return path


@dataclass(frozen=True)
class Run:
    """Seconds of a run of the command: wall, and of the processor with all ranks."""

    wall: float
    processor: float


def run(config: Path, cores: Sequence[int], start: Sequence[str | Path] = ()) -> Run:
    """Runs the command on these cores; `start` stands before it. `RuntimeError` with what it printed if it fails."""
    used, began = _children(), time.perf_counter()
    command = [*start, sys.executable, COMMAND, "--config", config]
    done = subprocess.run(command, preexec_fn=lambda: os.sched_setaffinity(0, cores), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{COMMAND.name}: {done.stdout}{done.stderr}")
    return Run(time.perf_counter() - began, _children() - used)


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def build_of(config: Path, cores: Sequence[int], start: Sequence[str | Path] = ()) -> Run:
    """The seconds of a whole build without the command's start; leaves the built stores in OUT."""
    shutil.rmtree(config.parent / "out", ignore_errors=True)
    whole, again = run(config, cores, start), run(config, cores, start)
    return Run(whole.wall - again.wall, whole.processor - again.processor)


def seconds_of_decoding(images: Path) -> float:
    """Processor seconds to decode one of these images, as the build decodes it."""
    files = [path.read_bytes() for path in sorted(images.iterdir())[:DECODED]]
    began = time.thread_time()
    for file in files:
        decode(file, MAX_PIXELS)
    return (time.thread_time() - began) / len(files)


def mpiexec() -> str | None:
    """The program that starts ranks: the one that is installed beside Python, or one on the path."""
    return shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def speed(console: Console, config: Path, images: int) -> None:
    """Prints the build's speed, the share of decoding in it, and two ranks against one."""
    cores = sorted(os.sched_getaffinity(0))
    one = build_of(config, cores[:1])
    decoding = seconds_of_decoding(config.parent / "images")
    table = Table(title=f"build of {images:,} images of {SIZE[0]} x {SIZE[1]}, no annotators", box=SIMPLE_HEAD)
    for column in ("ranks", "cores", "images/s per core", "ms an image", "decoding", "wall, s", "of one rank"):
        table.add_column(column, justify="right")

    def row(ranks: int, found: Run) -> None:
        each = found.processor / images
        table.add_row(str(ranks), str(ranks), f"{1 / each:.1f}", f"{each * 1e3:.1f}", f"{decoding / each:.0%}",
                      f"{found.wall:.1f}", f"{one.wall / found.wall:.2f}x")  # fmt: skip

    row(1, one)
    starter = mpiexec()
    if starter is not None and len(cores) > 1:
        row(2, build_of(config, cores[:2], (starter, "-n", "2")))
    console.print(table)
    if starter is None:
        console.print("Two ranks were not measured: there is no mpiexec (pip install mpi4py mpich)")
    elif len(cores) < 2:
        console.print("Two ranks were not measured: this machine has one core")


@dataclass(frozen=True)
class Memory:
    """Resident bytes of the command, now and at its highest so far (VmRSS, VmHWM)."""

    now: int
    highest: int


def memory_of(pid: int) -> Memory | None:
    """None if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    sizes = {name: int(line.split()[1]) * 1024 for line in lines for name in ("VmRSS", "VmHWM") if line.startswith(name)}
    return Memory(sizes["VmRSS"], sizes["VmHWM"]) if sizes else None


def watched_build(config: Path, units: int) -> dict[float, Memory]:
    """Runs the build on one rank; its memory when each of `SHARES` of its units were made, and, as share 2, at the last look."""
    found: dict[float, Memory] = {}
    command = [sys.executable, COMMAND, "--config", config]
    with tempfile.TemporaryFile() as printed, subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT) as made:
        while made.poll() is None and (memory := memory_of(made.pid)):
            finished = sum(not unit.name.endswith(".partial") for unit in config.parent.glob("out/units/*/*"))
            for share in SHARES:
                if finished >= share * units:
                    found.setdefault(share, memory)
            found[2] = memory
            time.sleep(POLL)
        if made.wait():
            printed.seek(0)
            raise RuntimeError(f"{COMMAND.name}: {printed.read().decode()}")
    return found


def growth(console: Console, config: Path, records: int) -> None:
    """Prints the memory of one rank over many records."""
    found = watched_build(config, MEMORY_UNITS)
    first = found[SHARES[0]]
    table = Table(title=f"memory of one rank over {records:,} records", box=SIMPLE_HEAD)
    for column in ("records", "resident, MB", "highest, MB", "highest / that at 10%", f"limit {FLAT}"):
        table.add_column(column, justify="left" if column == "records" else "right")
    for share in SHARES:
        ratio = found[share].highest / first.highest
        table.add_row(f"{share * records:,.0f}", f"{found[share].now / 1e6:.1f}", f"{found[share].highest / 1e6:.1f}",
                      f"{ratio:.3f}", "ok" if ratio <= FLAT else "exceeded")  # fmt: skip
    last = found[2]
    table.add_row("until the end (duplicates, joining, report)", f"{last.now / 1e6:.1f}", f"{last.highest / 1e6:.1f}",
                  f"{last.highest / first.highest:.3f}", "")  # fmt: skip
    console.print(table)


def build(console: Console, records: int) -> None:
    """Prints speed and memory of builds."""
    with tempfile.TemporaryDirectory() as temporary:
        speed(console, write_tree(Path(temporary, "speed"), IMAGES, SIZE, UNIT), IMAGES)
    with tempfile.TemporaryDirectory() as temporary:
        growth(console, write_tree(Path(temporary, "memory"), records, SMALL, records // MEMORY_UNITS), records)
