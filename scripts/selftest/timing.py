"""Check 7: the time of every implementation against what the device can do, as measured here. No row fails by its time.

A share is the least possible time over the time, as in scripts/bench.py kernels: the products that no implementation can do
without at the speed of a large matrix product, or the memory traffic at the speed of a copy, whichever takes longer. Arrays that
stay in a cache can exceed 100%.
"""
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from bench_kernels import GROUPS, Call, Shape, roi, timed

from granvit import kernels
from selftest.calls import ONLY_FLOAT32, Side, bind, in_dtype, shaped
from selftest.operators import Check
from selftest.rows import NOTED, Row

REPEATS = 3
# The side of the measured matrix product, and the float32 numbers of the measured copy.
ON_CPU, ON_DEVICES = (1024, 1 << 24), (8192, 1 << 28)
NORM = Shape("layer_norm", {"rows": 1024, "C": 512})
SMALL = (
    Shape("attention", {"B": 1, "N": 4, "G": 4, "S": 256, "D": 72, "prefix": 0, "K": 0}),
    Shape("attention", {"B": 1, "N": 4, "G": 2, "S": 512, "D": 64, "prefix": 256, "K": 4}),
    Shape("roi_align", roi(2, 16, 384, 6, 8)),
    NORM,
    Shape("rms_norm", {"rows": 1024, "C": 512}),
    Shape("rope", {"B": 2, "N": 8, "S": 512, "D": 64}),
    Shape("swiglu", {"rows": 1024, "C": 1536}),
    Shape("gelu", {"rows": 512, "C": 1536}),
    Shape("cross_entropy", {"A": 64, "C": 256, "V": 16000}),
    Shape("adamw", {"numbers": 1_000_000}),
)


def shapes(side: Side) -> Sequence[Shape]:
    """Small shapes on the CPU, on devices also those of a model of full size."""
    return SMALL if side.device == "cpu" else (*(shape for group in GROUPS for shape in group), NORM)


def checks(side: Side, operator: kernels.Operator) -> Iterator[Check]:
    """The times of an operator's implementations, in the dtype of a run: float32 on the CPU, bfloat16 elsewhere."""
    dtype = "float32" if side.device == "cpu" or operator in ONLY_FLOAT32 else "bfloat16"
    for shape in shapes(side):
        if shape.operator == operator:
            call = in_dtype(operator, shaped(shape), dtype)
            kernels_here = side.kernels(dtype)
            names = kernels_here.runnable(operator, **call.sizes)
            for row in kernels_here.table:
                if row.operator == operator and row.name in names:
                    what = f"{operator} {row.name} {dtype}"
                    yield Check("time", what, partial(measure, side, row, dtype, call, what))


def measure(side: Side, row: kernels.Row, dtype: str, call: Call, what: str) -> Row:
    """The time forward, and forward and backward, and their shares."""
    bound = bind(side, row, dtype, call)
    tensors = bound.tensors(call)
    passes: dict[str, Callable[[], Any]] = {"forward": partial(bound.forward, tensors)}
    if call.differentiate:
        passes["both"] = partial(bound.both, tensors)
    seconds = times(side, passes)
    flops, bandwidth = speeds(side, dtype)
    works = zip((call.flops, 3 * call.flops), moved(call), strict=True)
    least = [max(work / flops, traffic / bandwidth) for work, traffic in works]
    shares = {name: part / seconds[name] for (name, part) in zip(("forward", "both"), least, strict=True) if name in seconds}
    figure = "/".join(f"{1000 * s:.3g}" for s in seconds.values()) + " ms"
    return Row("time", what, NOTED, figure, "/".join(f"{share:.0%}" for share in shares.values()), call.label,
               details={"seconds": seconds, "shares": shares})  # fmt: skip


def times(side: Side, passes: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians of several calls, which are warm."""

    def finished(run: Callable[[], Any]) -> None:
        side.wait(run())

    calls = {name: partial(finished, run) for name, run in passes.items()}
    for call in calls.values():
        call()  # compiles
        call()
    return {name: found.seconds for name, found in timed(calls, REPEATS).items()}


def moved(call: Call) -> tuple[float, float]:
    """Bytes that the forward pass, and both passes, read and write at least."""
    numbers = np.dtype(call.cotangent.dtype).itemsize
    forward = sum(a.nbytes for a in call.arrays) + sum(numbers * int(np.prod(shape)) for shape in call.out)
    return forward, 2 * forward + sum(a.nbytes for a in call.arrays[: call.differentiate])


@cache
def speeds(side: Side, dtype: str) -> tuple[float, float]:
    """FLOPs a second of a large matrix product in the dtype, and bytes a second that a copy reads and writes."""
    width, numbers = ON_CPU if side.device == "cpu" else ON_DEVICES
    found = times(side, {"product": side.product(dtype, width), "copy": side.copy(numbers)})
    return 2 * width**3 / found["product"], 8 * numbers / found["copy"]


def device_speeds(side: Side) -> Iterator[Check]:
    """The speed of the device in each dtype."""
    for dtype in side.dtypes:
        yield Check("speed", f"matrix product {dtype}", partial(product_row, side, dtype))


def product_row(side: Side, dtype: str) -> Row:
    flops, bandwidth = speeds(side, dtype)
    figure = f"{flops / 1e12:.3g} TFLOP/s"
    return Row("speed", f"matrix product {dtype}", NOTED, figure, "", f"a copy of float32 moves {bandwidth / 1e9:.3g} GB/s",
               details={"flops": flops, "bandwidth": bandwidth})  # fmt: skip
