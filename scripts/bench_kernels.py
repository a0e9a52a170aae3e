"""The benchmark `kernels` of scripts/bench.py: every implementation of every operator that runs on the CPU here, in float32.

Layout letters: B images or rows, H x W feature cells, C width, K boxes or questions, p samples along a side of a box; N query
heads, G key-value heads, S tokens, D head width; A positions, V vocabulary.
"""
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from bench_process import alone
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from granvit.attention_work import needed_pairs
from granvit.kernels import COMPOSED, Kernels, Operator

ROUNDOFF = 2.0**-24  # of float32
SLOW = 2.0  # seconds: a call that takes longer is timed once
SHORTEST = 0.02  # seconds: quicker calls are timed together until they take as long
PRODUCT = 2048  # side of the matrices whose product is the machine's measured speed
COPIED = 1 << 28  # bytes of the array whose copy is the machine's measured bandwidth
SAMPLES = 2  # of ROIAlign, per bin and axis
Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Shape:
    """An operator at one size. Where float64 takes too long at that size, `checked` replaces some of `sizes` for the errors."""

    operator: Operator
    sizes: Mapping[str, int]
    checked: Mapping[str, int] = field(default_factory=dict)


def roi(B: int, side: int, C: int, K: int, grid: int) -> dict[str, int]:
    return {"B": B, "H": side, "W": side, "C": C, "K": K, "grid": grid}


PACKED = {"B": 1, "N": 12, "G": 2, "S": 1664, "D": 128, "prefix": 1024 + 20}  # Qwen2.5-1.5B: an image and the text around it
MID = 2 * (20 + 256 + 6 * 56)  # tokens of a step of the mid-size model of scripts/bench.py
# Shapes of one group share a process. Large ones have their own, because MindSpore keeps the memory of its graphs.
GROUPS = (
    (
        Shape("roi_align", roi(8, 8, 128, 4, 4)),  # a micro-batch of configs/demo/stage1.yaml
        Shape("roi_align", roi(2, 16, 384, 6, 8)),  # the mid-size model
        Shape("layer_norm", {"rows": 2 * 256, "C": 384}),
        Shape("rms_norm", {"rows": MID, "C": 512}),
        Shape("rope", {"B": 2, "N": 8, "S": MID // 2, "D": 64}),
        Shape("swiglu", {"rows": MID, "C": 1536}),
        Shape("gelu", {"rows": 2 * 256, "C": 1536}),
        Shape("cross_entropy", {"A": 320, "C": 512, "V": 32000}),
        Shape("adamw", {"numbers": 2_000_000}),
    ),
    (Shape("roi_align", roi(8, 32, 1152, 8, 7), {"B": 1, "C": 96}),),
    (Shape("roi_align", roi(8, 32, 1152, 8, 32), {"B": 1, "C": 96}),),
    (Shape("attention", {"B": 1, "N": 16, "G": 16, "S": 1024, "D": 72, "prefix": 0, "K": 0}),),
    (Shape("attention", PACKED | {"K": 4}),),
    (Shape("attention", PACKED | {"K": 8}),),
)


@dataclass(frozen=True)
class Call:
    """One call of an operator: `function(*arrays, [mask,] *constants)`. The first `differentiate` arrays get gradients.

    `out` are the shapes of the outputs, `cotangent` the gradient of the first one. `sizes` is what the choice of an
    implementation depends on. `segments_BS`: attention's mask follows from it. `flops`: of the products that no implementation
    can do without, forward; with the backward pass they are three times as many.
    """

    label: str
    arrays: Arrays
    out: Sequence[tuple[int, ...]]
    differentiate: int = 0
    constants: tuple[Any, ...] = ()
    sizes: Mapping[str, Any] = field(default_factory=dict)
    segments_BS: np.ndarray | None = None
    flops: float = 0.0
    cotangent: np.ndarray | None = None

    @property
    def bytes(self) -> tuple[float, float]:
        """What the forward pass, and forward and backward pass, read and write at least."""
        read, written = sum(a.nbytes for a in self.arrays), sum(4 * math.prod(shape) for shape in self.out)
        forward = read + written
        return forward, 2 * forward + sum(a.nbytes for a in self.arrays[: self.differentiate])


def make_call(shape: Shape, checked: bool = False) -> Call:
    """The call of a shape, with random arrays; the same in every process."""
    rng = np.random.default_rng(0)
    sizes = {**shape.sizes, **(shape.checked if checked else {})}
    call = CALLS[shape.operator](lambda *of: rng.standard_normal(of, np.float32), rng, **sizes)
    return replace(call, cotangent=np.asarray(rng.standard_normal(call.out[0]), np.float32))


def roi_align_call(normal, rng, B: int, H: int, W: int, C: int, K: int, grid: int) -> Call:
    boxes_BK4 = np.sort(rng.uniform(0, 1, (B, K, 2, 2)), axis=2).reshape(B, K, 4).astype(np.float32)
    label = f"[{B}, {H}, {W}, {C}] {B * K} of {grid}x{grid}"
    return Call(label, [normal(B, H, W, C), boxes_BK4], [(B, K, grid, grid, C)], 1, (grid,), {"grid": grid})


def attention_call(normal, rng, B: int, N: int, G: int, S: int, D: int, prefix: int, K: int) -> Call:
    """With K questions behind a shared prefix, or, if K is 0, without a mask."""
    q, k, v = normal(B, N, S, D), normal(B, G, S, D), normal(B, G, S, D)
    segments, pairs, label = None, B * S * S, f"[{B}, {N}/{G}, {S}, {D}]"
    if K:
        questions = 1 + np.arange(S - prefix) * K // (S - prefix)
        segments = np.tile(np.concatenate([np.zeros(prefix), questions]).astype(np.int32), (B, 1))
        pairs = int(needed_pairs(segments).sum())
        label += f" K = {K}"
    sizes = {"head_dim": D, "masked": bool(K), "cached": False}
    return Call(label, [q, k, v], [q.shape], 3, (), sizes, segments, 4.0 * N * D * pairs)


def layer_norm_call(normal, rng, rows: int, C: int) -> Call:
    return Call(f"[{rows}, {C}]", [normal(rows, C), 1 + 0.1 * normal(C), 0.1 * normal(C)], [(rows, C)], 3, (1e-6,))


def rms_norm_call(normal, rng, rows: int, C: int) -> Call:
    return Call(f"[{rows}, {C}]", [normal(rows, C), 1 + 0.1 * normal(C)], [(rows, C)], 2, (1e-6,))


def rope_call(normal, rng, B: int, N: int, S: int, D: int) -> Call:
    angles = np.outer(np.arange(S), 1e6 ** -(np.arange(0, D, 2) / D))
    turns = [np.tile(np.concatenate([f(angles)] * 2, 1), (B, 1, 1, 1)).astype(np.float32) for f in (np.cos, np.sin)]
    return Call(f"[{B}, {N}, {S}, {D}]", [normal(B, N, S, D), *turns], [(B, N, S, D)], 1)


def swiglu_call(normal, rng, rows: int, C: int) -> Call:
    return Call(f"[{rows}, {C}]", [normal(rows, C), normal(rows, C)], [(rows, C)], 2)


def gelu_call(normal, rng, rows: int, C: int) -> Call:
    return Call(f"[{rows}, {C}]", [2 * normal(rows, C)], [(rows, C)], 1)


def cross_entropy_call(normal, rng, A: int, C: int, V: int) -> Call:
    arrays = [normal(A, C), normal(V, C) * np.float32(C**-0.5), rng.integers(0, V, A).astype(np.int32), np.ones(A, np.float32)]
    sizes = {"positions": A, "vocab": V, "trained": True}
    return Call(f"[{A}, {C}] [{V}, {C}]", arrays, [()], 2, (), sizes, flops=2.0 * A * C * V)


def adamw_call(normal, rng, numbers: int) -> Call:
    arrays = [normal(numbers), normal(numbers), 0.1 * normal(numbers), np.square(normal(numbers))]
    decay_factor, rate, correction2 = 1 - 2.0**-10, 2.0**-8, 2.0**-4  # exact in float32
    return Call(f"[{numbers}]", arrays, [(numbers,)] * 3, 0, (decay_factor, rate, correction2, 0.9, 0.98, 1e-8))


CALLS: dict[Operator, Callable[..., Call]] = {
    "roi_align": roi_align_call,
    "attention": attention_call,
    "layer_norm": layer_norm_call,
    "rms_norm": rms_norm_call,
    "rope": rope_call,
    "swiglu": swiglu_call,
    "gelu": gelu_call,
    "cross_entropy": cross_entropy_call,
    "adamw": adamw_call,
}


class Passes(NamedTuple):
    """A call bound to an implementation. `forward()` returns the outputs, `both()` the output and the gradients (None without
    gradients), when they are computed."""

    forward: Callable[[], list]
    both: Callable[[], list] | None


def gather_roi_align(features_BHWC, boxes_BK4, grid: int):
    """ROIAlign in PyTorch as it is usually written: four cells are gathered for each sample, weighted and averaged."""
    import torch

    B, H, W, C = features_BHWC.shape
    K, p = boxes_BK4.shape[1], grid * SAMPLES
    ticks = (torch.arange(p) + 0.5) / p

    def neighbours(low_BK, high_BK, cells: int):
        """The cell before and the cell behind each sample along an axis, and their weights, `[B, K, p]`."""
        points = ((low_BK[..., None] + (high_BK - low_BK)[..., None] * ticks) * cells - 0.5).clamp(0, cells - 1)
        first = points.floor()
        return (first.long(), 1 - (points - first)), ((first.long() + 1).clamp(max=cells - 1), points - first)

    cells_C, image = features_BHWC.reshape(B * H * W, C), torch.arange(B)[:, None, None, None]
    total = torch.zeros(())
    for y, y_weight in neighbours(boxes_BK4[..., 1], boxes_BK4[..., 3], H):
        for x, x_weight in neighbours(boxes_BK4[..., 0], boxes_BK4[..., 2], W):
            index_BKpp = (image * H + y[..., :, None]) * W + x[..., None, :]
            values = cells_C.index_select(0, index_BKpp.flatten()).reshape(B, K, p, p, C)
            total = total + values * (y_weight[..., :, None] * x_weight[..., None, :])[..., None]
    return total.reshape(B, K, grid, SAMPLES, grid, SAMPLES, C).mean((3, 5))


class Torch:
    """How operators are called in PyTorch, on CPU."""

    def __init__(self):
        import torch

        self.torch = torch

    def use_threads(self, number: int) -> None:
        self.torch.set_num_threads(number)

    def kernels(self, dtype: str = "float32") -> Kernels:
        from pt_granvit.ops.table import kernels_for

        return kernels_for("cpu", getattr(self.torch, dtype))

    def peers(self, operator: Operator) -> dict[str, Callable]:
        """Implementations that no table has."""
        return {"torch gather": gather_roi_align} if operator == "roi_align" else {}

    def passes(self, operator: Operator, function: Callable, mask: Callable | None, call: Call, dtype: str = "float32") -> Passes:
        torch = self.torch
        dtypes = {"f": getattr(torch, dtype), "i": torch.int64}
        inputs = [torch.from_numpy(array).to(dtypes[array.dtype.kind]) for array in call.arrays]
        cotangent = torch.from_numpy(call.cotangent).to(dtypes["f"])
        rest = list(call.constants)
        if operator == "attention":
            rest = [None if call.segments_BS is None else mask(torch.from_numpy(call.segments_BS))]
        if operator == "adamw":
            p, g, m, v = (x.clone() for x in inputs)

            def update() -> list:  # in place
                function(p, g, m, v, *rest)
                return [p, m, v]

            return Passes(update, None)
        differentiated = [x.requires_grad_() for x in inputs[: call.differentiate]]

        def forward() -> list:
            with torch.no_grad():
                return [function(*inputs, *rest)]

        def both() -> list:
            out = function(*inputs, *rest)
            return [out.detach(), *torch.autograd.grad(out, differentiated, cotangent)]

        return Passes(forward, both)

    def speeds(self, repeats: int) -> tuple[float, float]:
        """FLOPs a second of a large matrix product, and bytes a second that a copy of a large array reads and writes."""
        a, b = self.torch.rand(PRODUCT, PRODUCT), self.torch.rand(PRODUCT, PRODUCT)
        source = self.torch.zeros(COPIED // 4)
        target = self.torch.zeros_like(source)
        calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
        for call in calls.values():
            call()
        found = timed(calls, repeats)
        return 2 * PRODUCT**3 / found["product"].seconds, 2 * COPIED / found["copy"].seconds


class MindSpore:
    """How operators are called in MindSpore, on CPU, in graph mode."""

    def __init__(self):
        import mindspore as ms
        from mindspore import nn, ops

        ms.set_context(mode=ms.GRAPH_MODE)
        self.ms = ms

        class Forward(nn.Cell):
            def __init__(self, function, constants):
                super().__init__()
                self.function, self.constants = function, constants

            def construct(self, *arrays):
                return self.function(*arrays, *self.constants)

        class End(nn.Cell):
            """A number whose derivative by `out` is declared to be the cotangent, at no cost."""

            def construct(self, out, cotangent):
                return ops.reshape(out, (-1,))[0]  # a constant would be folded, and the gradient with it

            def bprop(self, out, cotangent, number, dnumber):
                return cotangent, ops.zeros_like(cotangent)

        class Both(nn.Cell):
            def __init__(self, forward):
                super().__init__(auto_prefix=False)
                self.forward, self.end = forward, End()

            def construct(self, cotangent, *arrays):
                out = self.forward(*arrays)
                return self.end(out, cotangent), out

        class Update(nn.Cell):
            """A step of AdamW, in place. It sets the gradient to zero: the first step is checked, the others are timed."""

            def __init__(self, function, arrays, constants):
                super().__init__(auto_prefix=False)
                self.function, self.constants = function, constants
                names = ("parameter", "gradient", "first_moment", "second_moment")
                self.arrays = ms.ParameterTuple(ms.Parameter(ms.Tensor(x), name=n) for n, x in zip(names, arrays, strict=True))

            def construct(self):
                return self.function(*self.arrays, *self.constants)

        class BuiltIn(nn.Cell):
            """`ops.ROIAlign` between the transpositions that our layout needs. It puts cell centres at whole numbers, and with
            `roi_end_mode=1` it adds one cell to the ends of a box; with 0 its gradient is wrong."""

            def __init__(self, grid: int):
                super().__init__()
                self.roi_align = ops.ROIAlign(grid, grid, 1.0, SAMPLES, 1)

            def construct(self, features_BHWC, boxes_BK4, grid):
                B, H, W, C = features_BHWC.shape
                K = boxes_BK4.shape[1]
                cells = boxes_BK4 * ms.Tensor([W, H, W, H], ms.float32) - ms.Tensor([0.5, 0.5, 1.5, 1.5], ms.float32)
                image = ops.broadcast_to(ops.arange(B, dtype=ms.float32).reshape(B, 1, 1), (B, K, 1))
                rois = ops.cat((image, cells), -1).reshape(B * K, 5)
                out = self.roi_align(ops.transpose(features_BHWC, (0, 3, 1, 2)), rois)
                return ops.transpose(out, (0, 2, 3, 1)).reshape(B, K, grid, grid, C)

        self.Forward, self.Both, self.Update, self.BuiltIn = Forward, Both, Update, BuiltIn

    def use_threads(self, number: int) -> None:
        """MindSpore takes the number once in a process."""
        self.ms.device_context.cpu.op_tuning.threads_num(number)

    def kernels(self) -> Kernels:
        from ms_granvit.ops.table import kernels_for

        return kernels_for("cpu", self.ms.float32)

    def peers(self, operator: Operator) -> dict[str, Callable]:
        return {"ops.ROIAlign": self.BuiltIn} if operator == "roi_align" else {}

    def passes(self, operator: Operator, function: Callable, mask: Callable | None, call: Call) -> Passes:
        ms = self.ms
        inputs, constants = [ms.Tensor(array) for array in call.arrays], call.constants
        if operator == "attention":
            if call.segments_BS is None:
                constants = (None,)
            else:
                inputs.append(self.Forward(mask, ())(ms.Tensor(call.segments_BS)))
        if operator == "adamw":
            factors = [ms.Tensor(c, ms.float32) for c in (1.0, *constants[:3])]
            step = self.Update(function, call.arrays, (*factors, *constants[3:]))

            def update() -> list:
                step().asnumpy()  # results are asynchronous
                return [step.arrays[i] for i in (0, 2, 3)]

            return Passes(update, None)
        if function is self.BuiltIn:
            function = self.BuiltIn(*constants)
        cell, cotangent = self.Forward(function, constants), ms.Tensor(call.cotangent)
        positions = tuple(range(1, call.differentiate + 1))
        differentiate = ms.value_and_grad(self.Both(cell), positions, None, has_aux=True) if positions else None

        def ready(*tensors) -> list:
            tensors[0].asnumpy()  # results are asynchronous
            return list(tensors)

        def forward() -> list:
            out = cell(*inputs)
            return ready(*(out if isinstance(out, tuple) else (out,)))

        def both() -> list:
            (_, out), gradients = differentiate(cotangent, *inputs)
            return ready(out, *(gradients if isinstance(gradients, tuple) else (gradients,)))

        return Passes(forward, both if positions else None)


SIDES = {"torch": Torch, "mindspore": MindSpore}


def processors() -> int:
    """The processors that this process may use: the number of threads of everything here."""
    return len(os.sched_getaffinity(0))


class Time(NamedTuple):
    """The median of several calls, or, with `once`, the time of one call; as a text in milliseconds."""

    seconds: float
    once: bool

    def __str__(self) -> str:
        milliseconds = 1000 * self.seconds
        return f"{milliseconds:.{0 if milliseconds >= 100 else 2}f}{' 1x' if self.once else ''}"


@dataclass(frozen=True)
class Line:
    """One row of the table. `auto`: it runs unless another is named. `flops` and `bytes` are those of its `Call`, forward, and
    forward and backward. Errors are in units of float32's roundoff, `checked` is the shape at which they were taken. `failure`:
    why there are no figures."""

    framework: str
    operator: Operator
    label: str
    implementation: str
    auto: bool
    flops: tuple[float, float]
    bytes: tuple[float, float]
    checked: str
    forward: Time | None = None
    both: Time | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    failure: str = ""


def error_units(found: Iterable[np.ndarray], exact: Iterable[np.ndarray]) -> float:
    """`|found - exact| / |exact|` in units of float32's roundoff: the larger of the Frobenius norms and the largest elements, of
    the worst array. Infinite where a result is not finite."""
    worst = 0.0
    for x, golden in zip(found, exact, strict=True):
        assert x.shape == golden.shape, f"shape {x.shape}, not {golden.shape}"
        difference = np.abs(x.astype(np.float64) - golden).ravel()
        if not np.isfinite(difference).all():
            return math.inf
        scales = np.linalg.norm(golden), np.abs(golden).max()
        assert scales[1] > 0, "random arrays have no results that are zero throughout"
        worst = max(worst, np.linalg.norm(difference) / scales[0], difference.max() / scales[1])
    return worst / ROUNDOFF


def timed(calls: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, Time]:
    """The time of each call, which must be warm. They are called in turns."""
    found, together = {}, {}

    def seconds(call: Callable[[], Any], times: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    for key, call in calls.items():
        once = seconds(call)
        if once > SLOW:
            found[key] = Time(once, True)
        else:
            together[key] = min(100, math.ceil(SHORTEST / max(once, 1e-9)))
    rounds = [{key: seconds(calls[key], times) for key, times in together.items()} for _ in range(repeats)]
    return found | {key: Time(statistics.median(turn[key] for turn in rounds), False) for key in together}


def exact_results(side: Torch, operator: Operator, call: Call) -> Arrays:
    """Outputs and gradients of PyTorch's `composed` in float64."""
    passes = bound(side, operator, COMPOSED, call, "float64")
    return [x.numpy() for x in (passes.both or passes.forward)()]


def bound(side: Torch | MindSpore, operator: Operator, name: str, call: Call, *dtype: str) -> Passes:
    """A call bound to the implementation with this name."""
    function, mask = side.peers(operator).get(name), None
    if function is None:
        kernels = side.kernels(*dtype)
        row = next(row for row in kernels.table if (row.operator, row.name) == (operator, name))
        function, mask = kernels.load(row.function), kernels.load(row.mask) if row.mask else None
    return side.passes(operator, function, mask, call, *dtype)


def measure(framework: str, shapes: Sequence[Shape], repeats: int, exact: list[Arrays] | None) -> tuple[list[Line], list[Arrays]]:
    """The rows of one framework, and the exact results of the shapes, which PyTorch computes if they are not given."""
    side, lines = SIDES[framework](), []
    exact = exact or [exact_results(side, shape.operator, make_call(shape, checked=True)) for shape in shapes]
    for shape, golden in zip(shapes, exact, strict=True):
        lines += measure_shape(framework, side, shape, repeats, golden)
    return lines, exact


def measure_shape(framework: str, side: Torch | MindSpore, shape: Shape, repeats: int, exact: Arrays) -> list[Line]:
    """The rows of a shape: every implementation that can run here, then the peers."""
    operator, call = shape.operator, make_call(shape)
    small = make_call(shape, checked=True) if shape.checked else call
    print(f"{framework} {operator} {call.label}", file=sys.stderr, flush=True)
    kernels = side.kernels()
    auto = kernels.row(operator, **call.sizes).name
    for hint in kernels.hints:
        print(hint, file=sys.stderr, flush=True)
    lines, calls = {}, {}
    for name in (*kernels.runnable(operator, **call.sizes), *side.peers(operator)):
        line = Line(framework, operator, call.label, name, name == auto, (call.flops, 3 * call.flops), call.bytes, small.label)
        try:
            passes = bound(side, operator, name, call)
            checked = passes if small is call else bound(side, operator, name, small)
            lines[name] = replace(line, **errors_of(checked, exact, len(call.out)))
            runs = {kind: run for kind, run in passes._asdict().items() if run is not None}
            for run in runs.values():
                run()  # compiles
        except Exception as error:  # the others go on, and the table says what happened
            lines[name] = replace(line, failure=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            continue
        calls |= {(name, kind): run for kind, run in runs.items()}
    for (name, kind), found in timed(calls, repeats).items():
        lines[name] = replace(lines[name], **{kind: found})
    return list(lines.values())


def errors_of(passes: Passes, exact: Arrays, outputs: int) -> dict[str, float]:
    """The errors of a `Line`. The output is computed with and without gradients; the worse one counts."""
    values = lambda tensors: [x.asnumpy() if hasattr(x, "asnumpy") else x.numpy() for x in tensors]  # noqa: E731
    found = {"value_error": error_units(values(passes.forward()), exact[:outputs])}
    if passes.both:
        results = values(passes.both())
        found["value_error"] = max(found["value_error"], error_units(results[:outputs], exact[:outputs]))
        found["gradient_error"] = error_units(results[outputs:], exact[outputs:])
    return found


def with_threads(framework: str, function: Callable, *arguments: Any) -> Any:
    """The result of the function, in a process where everything uses one thread for each processor."""
    os.environ["OMP_NUM_THREADS"] = str(processors())  # of the C++ kernels
    SIDES[framework]().use_threads(processors())
    return function(*arguments)


def machine_speeds(repeats: int) -> tuple[float, float]:
    """`Torch.speeds`."""
    return Torch().speeds(repeats)


def table(lines: Sequence[Line], flops: float, bandwidth: float) -> Table:
    """The table of these rows; the speeds are those of `Torch.speeds`."""
    caption = (
        "*: runs unless another is named. 1x: a single call, else medians. Both: forward and backward. Pairs: forward / both; of "
        "errors, values / gradients. Speed: that of `composed` is 1. Errors in units of 2^-24, against PyTorch's `composed` in "
        f"float64. Share: the least possible time over the time, with the products needed at {flops / 1e9:.0f} GFLOP/s or the "
        f"memory traffic at {bandwidth / 1e9:.1f} GB/s, both measured in this run; arrays that stay in a cache can exceed 100%. "
        "Shapes: features and the number and cells of boxes; rows, query/key heads, tokens, head width and questions behind a "
        "prefix."
    )
    for label, checked in dict.fromkeys((line.label, line.checked) for line in lines if line.checked != line.label):
        caption += f" Errors of {label}: at {checked}."
    title = f"operators on CPU, float32, {processors()} threads; times in ms"
    made = Table(title=title, caption=escape(caption), box=box.SIMPLE, padding=(0, 1, 0, 0), caption_justify="left")
    for column in ("framework", "operator", "shape", "implementation"):
        made.add_column(column, no_wrap=True)
    for column in ("forward", "both", "speed", "errors", "share"):
        made.add_column(column, justify="right", no_wrap=True)
    shapes: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        shapes.setdefault((line.operator, line.label), []).append(line)
    for of_shape in shapes.values():
        composed = {line.framework: line for line in of_shape if line.implementation == COMPOSED}
        for line in of_shape:
            cells = (line.framework, line.operator, line.label, line.implementation + " *" * line.auto)
            made.add_row(*map(escape, cells), *figures(line, composed[line.framework], flops, bandwidth))
        made.add_section()
    return made


def figures(line: Line, composed: Line, flops: float, bandwidth: float) -> tuple[str, ...]:
    """The cells of a row from its times on; `composed` is the row to compare with."""
    if line.failure:
        return ("failed",)
    speeds, shares = [], []
    pairs = ((line.forward, composed.forward), (line.both, composed.both))
    for (own, other), work, traffic in zip(pairs, line.flops, line.bytes, strict=True):
        if own is not None:
            speeds.append(short(other.seconds / own.seconds) if other else "?")
            shares.append(f"{max(work / flops, traffic / bandwidth) / own.seconds:.0%}")
    errors = [short(error) for error in (line.value_error, line.gradient_error) if error is not None]
    return str(line.forward), str(line.both or ""), "/".join(speeds), "/".join(errors), "/".join(shares)


def short(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.0f}" if number < 10_000 else f"{number:.0e}"


def kernels(console: Console, repeats: int, groups: Sequence[Sequence[Shape]] = GROUPS) -> list[Line]:
    """Prints the table, and returns its rows. Each framework runs each group in a separate process. Linux only."""
    flops, bandwidth = alone(with_threads, "torch", machine_speeds, repeats)
    lines: list[Line] = []
    for shapes in groups:
        torch_lines, exact = alone(with_threads, "torch", measure, "torch", shapes, repeats, None)
        mindspore_lines, _ = alone(with_threads, "mindspore", measure, "mindspore", shapes, repeats, exact)
        lines += torch_lines + mindspore_lines
    console.print(table(lines, flops, bandwidth))
    for line in lines:
        if line.failure:
            where = f"{line.framework} {line.operator} {line.label} {line.implementation}"
            console.print(escape(f"{where}: {line.failure}"), highlight=False)
    return lines
