"""The calls of operators that the selftest makes, what they must return, and what it asks of a framework (`Side`)."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from bench_kernels import Call, Shape, make_call

from granvit.kernels import Kernels, Operator, Row
from parity.fixture import make_fixture
from parity.operators import Case, cases
from selftest.formulas import FORMULAS, Results, allowed

NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# How many of an operator's arrays, from the first, are in the compute dtype. The others are in float32 in the model too. AdamW's
# are all in float32, whatever the compute dtype is.
COMPUTED = {"attention": 3, "roi_align": 1, "layer_norm": 3, "rms_norm": 2, "rope": 3, "swiglu": 2, "gelu": 1, "cross_entropy": 2,
            "adamw": 0}  # fmt: skip
ONLY_FLOAT32 = ("adamw",)
TRAINED = {"layer_norm": 3, "rms_norm": 2}  # arrays that have gradients, where parity's cases differentiate fewer
OPTIONS = {"roi_align": ("grid",), "layer_norm": ("eps",), "rms_norm": ("eps",)}  # constants, as parity's cases call them
# A vocabulary and rows that `chunked` cuts into chunks, the last one short. Their logits take 68 MB in float32.
CHUNKS = Shape("cross_entropy", {"A": 130, "C": 12, "V": 131_075})
ADAMW = Shape("adamw", {"numbers": 1001})
NORM = Shape("layer_norm", {"rows": 7, "C": 33})
FLAT = Shape("roi_align", {"B": 2, "H": 3, "W": 11, "C": 33, "K": 5, "grid": 5})
# Prefix, questions and padding of the rows of the mask's check; 37 tokens fill no block of a kernel.
SEGMENTS = np.array([[0] * 15 + [1] * 9 + [2] * 7 + [-1] * 6, [0] * 5 + [1] * 12 + [2] * 9 + [3] * 11], np.int32)


class Bound(Protocol):
    """An implementation bound to the shapes of a call, on a device."""

    def tensors(self, call: Call) -> Any:
        """The arrays of a call of these shapes, on the device."""

    def forward(self, tensors: Any) -> Sequence[Any]:
        """The outputs."""

    def both(self, tensors: Any) -> Sequence[Any]:
        """The output and the gradients."""


class Side(Protocol):
    """A framework on a device. `dtypes` are those in which it computes there, `devices` the number of such devices."""

    framework: str
    device: str
    devices: int
    dtypes: tuple[str, ...]

    def kernels(self, dtype: str) -> Kernels: ...

    def bind(self, operator: Operator, function: Callable, mask: Callable | None, call: Call) -> Bound: ...

    def numpy(self, tensor: Any) -> np.ndarray: ...

    def wait(self, tensors: Sequence[Any]) -> None:
        """Returns when the device has computed these tensors."""

    def product(self, dtype: str, side: int) -> Callable[[], Any]:
        """A function that multiplies two square matrices."""

    def copy(self, numbers: int) -> Callable[[], Any]:
        """A function that copies so many float32 numbers."""

    def facts(self) -> dict[str, str]:
        """Versions and names of libraries, drivers and the device."""


def bind(side: Side, row: Row, dtype: str, call: Call) -> Bound:
    """The implementation of a row of the table for a call."""
    kernels = side.kernels(dtype)
    mask = kernels.load(row.mask) if row.mask and call.segments_BS is not None else None
    return side.bind(row.operator, kernels.load(row.function), mask, call)


def run(side: Side, bound: Bound, call: Call) -> Results:
    """The outputs and gradients of a call, as numpy arrays."""
    tensors = bound.tensors(call)
    made = [side.numpy(x) for x in (bound.both if call.differentiate else bound.forward)(tensors)]
    return made[: len(call.out)], made[len(call.out) :]


def exact(operator: Operator, call: Call) -> Results:
    """The outputs and gradients of a call in float64."""
    wide = [x if x.dtype.kind == "i" else x.astype(np.float64) for x in call.arrays]
    constants = call.constants
    if operator == "attention":
        constants = (None if call.segments_BS is None else allowed(call.segments_BS),)
    outputs, gradients = FORMULAS[operator](*wide, *constants, call.cotangent.astype(np.float64))
    return outputs, gradients[: call.differentiate]


def in_dtype(operator: Operator, call: Call, dtype: str) -> Call:
    """The call with its arrays, and the gradient of its output, rounded to a dtype."""
    if operator in ONLY_FLOAT32:
        return call
    computed = [x.astype(NUMPY[dtype]) for x in call.arrays[: COMPUTED[operator]]]
    # A loss is in float32. `ascontiguousarray` would make a scalar an array of one number.
    cotangent = call.cotangent if call.out[0] == () else call.cotangent.astype(NUMPY[dtype])
    return replace(call, arrays=[*computed, *call.arrays[COMPUTED[operator] :]], cotangent=cotangent)


@dataclass(frozen=True)
class Known:
    """A call, and what it must return."""

    call: Call
    outputs: list[np.ndarray]
    gradients: list[np.ndarray]


@cache
def known(operator: Operator, dtype: str) -> tuple[Known, ...]:
    """The calls of an operator in a dtype."""
    made = [in_dtype(operator, call, dtype) for call in plain_calls(operator)]
    return tuple(Known(call, *exact(operator, call)) for call in made)


def plain_calls(operator: Operator) -> list[Call]:
    """The calls of an operator in float32: parity's cases, and sizes that it has none of."""
    found = [from_case(case) for case in parity_cases() if case.kernel == operator]
    more = {"roi_align": [FLAT], "layer_norm": [NORM], "cross_entropy": [CHUNKS], "adamw": [ADAMW]}
    return found + [shaped(shape) for shape in more.get(operator, [])]


def shaped(shape: Shape) -> Call:
    """A random call of an operator at these sizes: that of the benchmark of kernels, which has none of two operators."""
    own = {"adamw": adamw_call, "layer_norm": layer_norm_call}.get(shape.operator)
    return make_call(shape) if own is None else own(np.random.default_rng(0), **shape.sizes)


def adamw_call(rng: np.random.Generator, numbers: int) -> Call:
    """Parameter, gradient, first and second moment; constants as in `pt_granvit.ops.adamw`."""
    p, g, m, v = rng.standard_normal((4, numbers), np.float32)
    decay_factor, rate, correction2 = 1 - 2.0**-10, 2.0**-8, 2.0**-4  # exact in float32
    constants = (decay_factor, rate, correction2, 0.9, 0.98, 1e-8)
    return Call(f"[{numbers}]", [p, g, 0.1 * m, np.square(v)], [(numbers,)] * 3, 0, constants, cotangent=p)


def layer_norm_call(rng: np.random.Generator, rows: int, C: int) -> Call:
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    arrays = [2 + normal(rows, C), 1 + 0.3 * normal(C), 0.3 * normal(C)]
    return Call(f"[{rows}, {C}]", arrays, [(rows, C)], 3, (1e-6,), cotangent=normal(rows, C))


@cache
def parity_cases() -> tuple[Case, ...]:
    return tuple(cases(make_fixture(0)))


def from_case(case: Case) -> Call:
    """A case of parity as a call of its kernel."""
    arrays, segments = list(case.arrays), None
    options = case.options
    if case.operator == "attention":
        *arrays, segments = arrays
    if case.operator == "rope":
        x, positions_BS = arrays
        arrays, options = [x, *turns(positions_BS, x.shape[-1], options["theta"])], {}
    constants = tuple(options[name] for name in OPTIONS.get(case.operator, ()))
    assert len(constants) == len(options), f"{case.label}: the selftest does not know all of {sorted(options)}"
    cotangent = np.asarray(np.random.default_rng((0, 22)).standard_normal(case.out), np.float32)
    differentiate = max(case.differentiate, TRAINED.get(case.kernel, 0))
    return Call(case.label, arrays, [case.out], differentiate, constants, case.sizes, segments, cotangent=cotangent)


def turns(positions_BS: np.ndarray, width: int, theta: float) -> list[np.ndarray]:
    """Cosines and sines `[B, 1, S, D]` of the rotary embedding."""
    angles = positions_BS[:, None, :, None] * theta ** -(np.arange(0, width, 2) / width)
    return [np.concatenate([f(angles)] * 2, -1).astype(np.float32) for f in (np.cos, np.sin)]


def attention_call(dtype: str, width: int, heads: int, groups: int, segments_BS: np.ndarray | None, tokens: int,
                   seed: int) -> Call:  # fmt: skip
    """A random call of attention; the mask follows from the segments."""
    rng = np.random.default_rng((0, 23, seed))
    B = 1 if segments_BS is None else len(segments_BS)
    normal = lambda n: rng.standard_normal((B, n, tokens, width), np.float32)  # noqa: E731
    q, k, v, cotangent = normal(heads), normal(groups), normal(groups), normal(heads)
    sizes = {"head_dim": width, "masked": segments_BS is not None, "cached": False}
    label = f"[{B}, {heads}/{groups}, {tokens}, {width}]"
    return in_dtype("attention", Call(label, [q, k, v], [q.shape], 3, (), sizes, segments_BS, cotangent=cotangent), dtype)
