"""Roofline estimate of the Ascend C kernels of ROIAlign (ms_granvit/ops/ascendc) on an Ascend 910B3, `composed` beside it.

    python scripts/bench_ascendc.py

NOTHING HERE WAS MEASURED ON A DEVICE. The kernels' sources run on this host, on a stand-in for Ascend C (tests/ascendc) that
counts bytes and instructions; every shape is counted directly, none is scaled. `composed` is counted by formula: two batched
matrix products, as in ms_granvit/ops/roi_align.py. Needs g++.

Published figures of the 910B3, from data/platform_config/Ascend910B3.ini of CANN 8.1.RC1: 20 AI cores with one cube unit and two
vector units each, 1.8 GHz, a product of 16 x 16 x 16 a cycle, 192 KB of UB a vector unit, 192 MB of L2; memory 32 bytes a cycle
and AI core, L2 110 (read) and 86 (write). A vector instruction takes 256 bytes a cycle (Ascend C API reference, Axpy,
repeatTime). What an instruction costs besides is not published, nor is the scalar unit's time: the estimate leaves both out, and
the table says what each cycle of them would add.
"""
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from granvit.config import language_config, vision_config
from granvit.cost import training_flops
from granvit.stages import STAGES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.ascendc.harness import CORES, UB, Harness, Sizes, compiler

AI_CORES, HERTZ = 20, 1.8e9
MEMORY = 32 * AI_CORES * HERTZ  # bytes/s
L2_READ, L2_WRITE, L2_BYTES = 110 * AI_CORES * HERTZ, 86 * AI_CORES * HERTZ, 192 * 2**20
CUBE = 2 * 16**3 * AI_CORES * HERTZ  # FLOP/s
DTYPE, ELEMENT = "bfloat16", 2
WORTH = 0.01  # of a training step

# demo: configs/demo/stage1.yaml. mid-size: `MID` of scripts/bench.py. full: SigLIP2 so400m at 512 pixels, 8 images with 8 boxes.
FULL = "full, 32 x 32"
SHAPES = {
    "demo": Sizes(8, 8, 8, 128, 4, 4),
    "mid-size": Sizes(2, 16, 16, 384, 8, 8),
    "full, 7 x 7": Sizes(8, 32, 32, 1152, 8, 7),
    FULL: Sizes(8, 32, 32, 1152, 8, 32),
}
PASSES = ("forward", "backward")


@dataclass
class Estimate:
    """Seconds that memory and arithmetic take, each alone; they overlap. `cached`: memory, if L2 keeps what is used again."""

    memory: float
    cached: float
    arithmetic: float

    def seconds(self, cached: bool) -> float:
        return max(self.cached if cached else self.memory, self.arithmetic)


def kernel(kind: str, s: Sizes, counts: dict[str, Any]) -> Estimate:
    """From the counts. The busiest block decides the arithmetic."""
    array = ELEMENT * (s.B * s.H * s.W * s.C if kind == "forward" else s.B * s.K * s.g**2 * s.C)
    once = min(counts["bytes_in"], array) if array < L2_BYTES else counts["bytes_in"]
    return Estimate(
        (counts["bytes_in"] + counts["bytes_out"]) / MEMORY,
        max((once + counts["bytes_out"]) / MEMORY, counts["bytes_in"] / L2_READ),
        counts["busiest_vector_bytes"] / 256 / HERTZ,
    )


def up(size: int) -> int:
    """To a multiple of the cube unit's side."""
    return -(-size // 16) * 16


def composed(s: Sizes) -> Estimate:
    """The two products, one after the other; the backward pass has the transposed ones, the same bytes and the same arithmetic
    (no gradient of the boxes). Between the products lies an array `[B, K, g, W, C]`, which is written and read again."""
    maps, between, output = s.B * s.H * s.W * s.C, s.B * s.K * s.g * s.W * s.C, s.B * s.K * s.g**2 * s.C
    matrices = s.B * s.K * s.g * s.H + 2 * s.B * s.K * s.g**2 * s.W  # the columns' is written once for each row of bins
    outer = ELEMENT * (maps + output + matrices) / MEMORY
    inner = ELEMENT * between * 2 / MEMORY
    cached = ELEMENT * between * (1 / L2_WRITE + 1 / L2_READ) if ELEMENT * between < L2_BYTES else inner
    rows = 2 * s.B * up(s.K * s.g) * up(s.H) * up(s.W * s.C)
    columns = 2 * s.B * s.K * s.g * up(s.g) * up(s.W) * up(s.C)
    return Estimate(outer + inner, outer + cached, (rows + columns) / CUBE)


def boxes_of(s: Sizes) -> dict[str, np.ndarray]:
    """Random boxes from two uniform corners (sides of a third of the map on average); the dearest ones, over the whole map."""
    corners = np.sort(np.random.default_rng(0).random((s.B, s.K, 2, 2)), 2)
    return {"random": corners.reshape(s.B, s.K, 4), "whole map": np.tile([0.0, 0.0, 1.0, 1.0], (s.B, s.K, 1))}


def step_seconds() -> float:
    """The matrix products of a training step of stage 1 on the full shape's images, at the cube units' peak."""
    vision, language = vision_config("siglip2-so400m-patch16-512"), language_config("qwen2.5-1.5b")
    row = training_flops(vision, language, STAGES["stage1"].trains, 1920, 640, SHAPES[FULL].K)
    return SHAPES[FULL].B * sum(row.values()) / CUBE


def compare(console: Console, label: str, ours: list[Estimate], issue: list[float]) -> float:
    """Prints both passes of the full shape; returns the largest share of a training step that the kernel saves."""
    theirs, step = composed(SHAPES[FULL]), step_seconds()
    cold, warm = ((2 * theirs.seconds(cached), sum(e.seconds(cached) for e in ours)) for cached in (False, True))
    spare = [(theirs.seconds(True) - e.arithmetic) / cycle for e, cycle in zip(ours, issue, strict=True)]
    saved = max(cold[0] - cold[1], warm[0] - warm[1])
    console.print(
        f"{FULL}, {label}, forward and backward: composed / kernel = {cold[0] / cold[1]:.2f} without L2, {warm[0] / warm[1]:.2f} "
        f"with it, and 1 at {min(spare):.0f} cycles of overhead for each vector instruction. It saves {saved * 1e6:.0f} us at "
        f"most, {saved / step:.2%} of the {step:.2f} s that a training step's matrix products take at peak."
    )
    return saved / step


def main() -> int:
    """Prints the table and the verdict; 2 without g++."""
    console = Console()
    if compiler() is None:
        console.print("needs g++: apt install g++")
        return 2
    table = Table(title=f"ROIAlign on a 910B3, {DTYPE}: ESTIMATED microseconds, no device was used", box=SIMPLE_HEAD)
    for column in ("shape", "boxes", "pass"):
        table.add_column(column)
    headers = ("kernel\nmemory", "\nwith L2", "\nvector", "each\ncycle", "scalar\ncycle", "UB", "burst,\nbytes")
    for column in (*headers, "composed\nmemory", "\nwith L2", "\ncube", "composed /\nkernel"):
        table.add_column(column, justify="right")
    full: dict[str, tuple[list[Estimate], list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), DTYPE)
        for name, sizes in SHAPES.items():
            for label, boxes in boxes_of(sizes).items():
                for kind in PASSES:
                    _, counts = harness.run(kind, None, boxes, sizes)
                    ours, theirs = kernel(kind, sizes, counts), composed(sizes)
                    issue = counts["instructions"] / CORES / HERTZ
                    ratios = (theirs.seconds(cached) / ours.seconds(cached) for cached in (True, False))
                    burst = (counts["bytes_in"] + counts["bytes_out"]) / counts["bursts"]
                    scalar = counts["conversions"] / CORES / HERTZ
                    numbers = (*vars(ours).values(), issue, scalar, *vars(theirs).values())
                    cells = [f"{number * 1e6:.1f}" for number in numbers]
                    cells[5:5] = [f"{counts['ub_peak'] / UB:.0%}", f"{burst:.0f}"]
                    table.add_row(name, label, kind, *cells, " to ".join(f"{ratio:.1f}" for ratio in sorted(ratios)))
                    if name == FULL:
                        estimates, cycles = full.setdefault(label, ([], []))
                        estimates.append(ours)
                        cycles.append(issue)
    console.print(table)
    console.print("each cycle: what a cycle of overhead of each vector instruction adds; scalar cycle: of each sample's point.")
    share = max(compare(console, label, *passes) for label, passes in full.items())
    s = SHAPES[FULL]
    between = s.B * s.K * s.g * s.W * s.C * ELEMENT
    worth = "worth a measurement" if share > WORTH else "not worth having for the time of a step"
    console.print(
        f"By this estimate the kernel is {worth}. It also saves memory: composed's array between the products "
        f"({between / 1e6:.0f} MB in each pass) is never allocated."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
