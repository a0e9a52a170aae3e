"""MindSpore's fused operators for Ascend, as documented (see the package's docstring for the sources).

Inside `installed()` the functions of this module replace those of `mindspore.ops` that exist only on Ascend, on CPU, in PyNative
and in graph mode. In a graph the rules are checked, and calls recorded, while it is compiled: once for all calls with equal
shapes, dtypes and arguments. A graph that was compiled before is not affected.

CPU limits what can be computed: bfloat16 has no slices, transpositions and sums there, so use float16 where more than the
operator itself is in that dtype. Not checked: the range of cos and sin, and whether a mask leaves every query a key.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from parity.documented import (
    COMPRESSED,
    DISCARDED,
    UNLIMITED,
    Attention,
    AttentionRules,
    Call,
    Given,
    discarded,
    require,
    require_dtype,
)

SOURCE = "[M]"
FLOATS = ("float16", "float32", "bfloat16")

# ops.flash_attention_score: "Value range" of B, S1, S2, N1, D; supported dtypes; list of sparse modes (6, 7 and 8 are "not
# implemented yet"); restrictions of TND (attn_mask "must be a lower triangular matrix, so sparse_mode should be 2 or 3", batch at
# most 1024, next_tokens 0, pre_tokens not less than the longest query sequence); attn_mask (B, N1, S1, S2), (B, 1, S1, S2) or
# (S1, S2); value "with the same dtype and shape as key".
ATTENTION = AttentionRules(
    source=SOURCE, names={}, dtypes=("float16", "bfloat16"), width_multiple=16, max_width=512, max_batch=2048,
    max_length=512 * 1024, max_sequences=1024, modes=(0, 1, 2, 3, 4, 5), tnd_modes=(2, 3), tnd_next_tokens=True,
    mask_11SL=False, narrower_value=False, shaped_drop_mask=True,
)  # fmt: skip

_calls: list[Call] = []  # filled while `installed` is active


def flash_attention_score(query, key, value, head_num, real_shift=None, drop_mask=None, padding_mask=None, attn_mask=None,
                          prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, keep_prob=1.0, scalar_value=1.0,
                          pre_tokens=UNLIMITED, next_tokens=UNLIMITED, inner_precise=0, input_layout="BSH",
                          sparse_mode=0):  # fmt: skip
    """`ops.flash_attention_score`: softmax of the scaled scores, without the keys where `attn_mask` is true, times the values; in
    the query's dtype and shape. Differentiable in query, key and value.

    Of a query all of whose keys are discarded the documentation says nothing: here the result is the mean of all values.
    `real_shift` and `drop_mask` are checked, not computed (`NotImplementedError`); lengths and prefix must be tuples or lists.
    """
    mask_shape = None if attn_mask is None else attn_mask.shape
    mask_dtype = None if attn_mask is None else attn_mask.dtype
    shift_shape = None if real_shift is None else real_shift.shape
    shift_dtype = None if real_shift is None else real_shift.dtype
    drop_shape = None if drop_mask is None else drop_mask.shape
    drop_dtype = None if drop_mask is None else drop_mask.dtype
    padding_shape = None if padding_mask is None else padding_mask.shape
    padding_dtype = None if padding_mask is None else padding_mask.dtype
    B, N, G, S, L, D, always, rows, rows_before = attention_plan(
        query.shape, query.dtype, key.shape, key.dtype, value.shape, value.dtype, mask_shape, mask_dtype, shift_shape,
        shift_dtype, drop_shape, drop_dtype, padding_shape, padding_dtype, head_num, prefix, actual_seq_qlen, actual_seq_kvlen,
        keep_prob, scalar_value, pre_tokens, next_tokens, inner_precise, input_layout, sparse_mode,
    )  # fmt: skip
    q = to_BNSD(ops.cast(query, ms.float32), input_layout, B, N, S, D)
    k = to_BNSD(ops.cast(key, ms.float32), input_layout, B, G, L, D)
    v = to_BNSD(ops.cast(value, ms.float32), input_layout, B, G, L, D)
    if G < N:
        k = ops.broadcast_to(k.reshape(B, G, 1, L, D), (B, G, N // G, L, D)).reshape(B, N, L, D)
        v = ops.broadcast_to(v.reshape(B, G, 1, L, D), (B, G, N // G, L, D)).reshape(B, N, L, D)
    scores = ops.BatchMatMul(transpose_b=True)(q, k) * scalar_value
    if attn_mask is not None:
        hidden = ops.cast(attn_mask, ms.bool_)
        if rows is not None:
            column = hidden[:, COMPRESSED // 2]
            hidden = ops.gather(column, rows, 0)
            if rows_before is not None:
                hidden = ops.logical_or(hidden, ops.logical_not(ops.gather(column, rows_before, 0)))
        if always is not None:
            hidden = ops.logical_or(hidden, always)
        scores = ops.select(ops.broadcast_to(hidden, scores.shape), ops.full_like(scores, DISCARDED), scores)
    out = ops.BatchMatMul()(ops.softmax(scores, -1), v)
    return ops.cast(from_BNSD(out, input_layout), query.dtype)


def to_BNSD(x, layout, B, N, S, D):
    """A tensor of any layout as `[B, N, S, D]`."""
    if layout in ("BSH", "BSND"):
        return x.reshape(B, S, N, D).transpose(0, 2, 1, 3)
    if layout in ("SBH", "TND"):
        return x.reshape(S, B, N, D).transpose(1, 2, 0, 3)
    return x


def from_BNSD(x, layout):
    """`[B, N, S, D]` in another layout."""
    B, N, S, D = x.shape
    if layout == "BSND":
        return x.transpose(0, 2, 1, 3)
    if layout == "BSH":
        return x.transpose(0, 2, 1, 3).reshape(B, S, N * D)
    if layout == "SBH":
        return x.transpose(2, 0, 1, 3).reshape(S, B, N * D)
    if layout == "TND":
        return x.transpose(2, 0, 1, 3).reshape(S, N, D)
    return x


@ops.constexpr
def attention_plan(query_shape, query_dtype, key_shape, key_dtype, value_shape, value_dtype, mask_shape, mask_dtype, shift_shape,
                   shift_dtype, drop_shape, drop_dtype, padding_shape, padding_dtype, head_num, prefix, seq_qlen, seq_kvlen,
                   keep_prob, scalar_value, pre_tokens, next_tokens, inner_precise, input_layout, sparse_mode):  # fmt: skip
    """Checks and records a call; its sizes and the three arrays of `Discarded` as tensors. Runs while a graph is compiled."""
    for name, number in (("scalar_value", scalar_value), ("keep_prob", keep_prob)):
        require(isinstance(number, float), name, f"{number!r}, must be a floating-point number {SOURCE}", TypeError)
    require(isinstance(sparse_mode, int), "sparse_mode", f"{sparse_mode!r}, must be an integer {SOURCE}", TypeError)
    require(isinstance(input_layout, str), "input_layout", f"{input_layout!r}, must be a string {SOURCE}", TypeError)
    call = Attention(
        given(query_shape, query_dtype), given(key_shape, key_dtype), given(value_shape, value_dtype), head_num,
        given(shift_shape, shift_dtype), given(drop_shape, drop_dtype), given(padding_shape, padding_dtype),
        given(mask_shape, mask_dtype), as_tuple(prefix), as_tuple(seq_qlen), as_tuple(seq_kvlen), keep_prob, pre_tokens,
        next_tokens, inner_precise, input_layout, sparse_mode,
    )  # fmt: skip
    g = ATTENTION.validate(call)
    if shift_shape is not None or drop_shape is not None:
        raise NotImplementedError("the stand-in does not compute real_shift and drop_mask")
    tensors = {"query": call.query, "key": call.key, "value": call.value, "attn_mask": call.attn_mask}
    numbers = {name: getattr(call, name) for name in ("head_num", "prefix", "actual_seq_qlen", "actual_seq_kvlen", "keep_prob",
               "pre_tokens", "next_tokens", "inner_precise", "input_layout", "sparse_mode")}  # fmt: skip
    record("flash_attention_score", tensors, scalar_value=scalar_value, **numbers)
    arrays = discarded(call, g)
    return (*g[:6], as_tensor(arrays.always), as_tensor(arrays.rows), as_tensor(arrays.rows_before))


def rms_norm(x, gamma, epsilon=1e-6):
    """`ops.rms_norm`: `x / sqrt(mean(x^2) + epsilon) * gamma` over the last axes, those of gamma, in the dtype of x; and the
    reciprocal of the root, float32, with 1 in place of those axes. At which points the device rounds is not documented."""
    axes = rms_norm_axes(x.shape, x.dtype, gamma.shape, gamma.dtype, epsilon)
    wide = ops.cast(x, ms.float32)
    reciprocal = ops.rsqrt(ops.ReduceMean(keep_dims=True)(wide * wide, axes) + epsilon)
    return ops.cast(wide * reciprocal * ops.cast(gamma, ms.float32), x.dtype), reciprocal


@ops.constexpr
def rms_norm_axes(x_shape, x_dtype, gamma_shape, gamma_dtype, epsilon):
    """Checks and records a call; the axes of the mean."""
    x, gamma = given(x_shape, x_dtype), given(gamma_shape, gamma_dtype)
    require_dtype("x", x, FLOATS, SOURCE)
    require(gamma.dtype == x.dtype, "gamma", f"dtype {gamma.dtype}, must be that of x, {x.dtype} {SOURCE}", TypeError)
    positive = isinstance(epsilon, float) and 0 < epsilon <= 1
    require(positive, "epsilon", f"{epsilon!r}, must be a float above 0 and at most 1 {SOURCE}")
    fits = 0 < len(gamma_shape) <= len(x_shape) and x_shape[-len(gamma_shape) :] == gamma_shape
    require(fits, "gamma", f"shape {gamma_shape}, must be that of the last axes of x, {x_shape} {SOURCE}")
    record("rms_norm", {"x": x, "gamma": gamma}, epsilon=epsilon)
    return tuple(range(len(x_shape) - len(gamma_shape), len(x_shape)))


def rotary_position_embedding(x, cos, sin, mode=0):
    """`ops.rotary_position_embedding`: `x cos + rotated(x) sin` in the dtype of x. Mode 0 pairs channel i with i + D / 2, mode 1
    channel 2 i with 2 i + 1."""
    check_rotary(x.shape, x.dtype, cos.shape, cos.dtype, sin.shape, sin.dtype, mode)
    wide, half = ops.cast(x, ms.float32), x.shape[-1] // 2
    if mode == 0:
        rotated = ops.cat((-wide[..., half:], wide[..., :half]), -1)
    else:
        pairs = wide.reshape(*x.shape[:-1], half, 2)
        rotated = ops.stack((-pairs[..., 1], pairs[..., 0]), -1).reshape(x.shape)
    return ops.cast(wide * ops.cast(cos, ms.float32) + rotated * ops.cast(sin, ms.float32), x.dtype)


@ops.constexpr
def check_rotary(x_shape, x_dtype, cos_shape, cos_dtype, sin_shape, sin_dtype, mode):
    """Checks and records a call. The table of the docstring: x is BNSD, BSND or SBND; with mode 0 the axes of B and N, or that of
    N, may be 1 in cos; with mode 1 both must be. The documentation forbids BNSD where B N > 8 S and D fills whole 32 bytes ("the
    performance is poor. Therefore, this interface cannot be called")."""
    x, cos, sin = given(x_shape, x_dtype), given(cos_shape, cos_dtype), given(sin_shape, sin_dtype)
    require_dtype("x", x, FLOATS, SOURCE)
    require(mode in (0, 1), "mode", f"{mode}, must be 0 (halves) or 1 (interleaved) {SOURCE}")
    require(len(x_shape) == 4, "x", f"shape {x_shape}, must have four axes {SOURCE}")
    for name, table in (("cos", cos), ("sin", sin)):
        require(table.dtype == x.dtype, name, f"dtype {table.dtype}, must be that of x, {x.dtype} {SOURCE}", TypeError)
        require(table.shape == cos_shape, name, f"shape {table.shape}, must be that of cos, {cos_shape} {SOURCE}")
    D = x_shape[3]
    require(D % 2 == 0 and D < 896, "x", f"head width {D}, must be even and below 896 {SOURCE}")
    a, b, c = x_shape[:3]
    layouts = {"BNSD": [(1, 1, c), (a, 1, c), (a, b, c)], "BSND": [(1, b, 1), (a, b, 1), (a, b, c)],
               "SBND": [(a, 1, 1), (a, b, 1), (a, b, c)]}  # fmt: skip
    fitting = [name for name, shapes in layouts.items() if cos_shape in [(*s, D) for s in shapes[: 3 if mode == 0 else 1]]]
    require(bool(fitting), "cos", f"shape {cos_shape} has no documented layout for x of {x_shape} and mode {mode} {SOURCE}")
    counts = {"BNSD": (a, b), "BSND": (a, c), "SBND": (b, c)}
    small = [name for name in fitting if max(counts[name]) < 1000]
    require(bool(small), "x", f"shape {x_shape}, batch and heads must be below 1000 {SOURCE}")
    item = 4 if x.dtype == "float32" else 2
    slow = fitting[0] == "BNSD" and a * b > 8 * c and D * item % 32 == 0
    require(not slow, "x", f"shape {x_shape}, must not have B N > 8 S where D fills whole 32 bytes (slow) {SOURCE}")
    record("rotary_position_embedding", {"x": x, "cos": cos, "sin": sin}, mode=mode)


def swiglu(input, dim=-1):
    """`ops.swiglu`: `a sigmoid(a) b` of the halves a and b of the input along `dim`, in its dtype."""
    axis, half = swiglu_split(input.shape, input.dtype, dim)
    a, b = ops.split(ops.cast(input, ms.float32), half, axis)
    return ops.cast(a * ops.sigmoid(a) * b, input.dtype)


@ops.constexpr
def swiglu_split(shape, dtype, dim):
    """Checks and records a call; the axis and half of its size."""
    x = given(shape, dtype)
    require_dtype("input", x, FLOATS, SOURCE)
    require(isinstance(dim, int), "dim", f"{dim!r}, must be an integer {SOURCE}", TypeError)
    require(-len(shape) <= dim < len(shape), "dim", f"{dim}, must be an axis of the input, {shape} {SOURCE}")
    require(shape[dim] % 2 == 0, "input", f"axis {dim} of {shape} must be divisible by 2 {SOURCE}")
    record("swiglu", {"input": x}, dim=dim)
    return dim % len(shape), shape[dim] // 2


def gelu(input, approximate="none"):
    """`ops.gelu`: `x Phi(x)`, or with `approximate` "tanh" `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`; in its dtype.

    1 + tanh(u) is computed as 2 sigmoid(2 u), because MindSpore's tanh on CPU is wrong in the fifth digit where it saturates."""
    check_gelu(input.shape, input.dtype, approximate)
    x = ops.cast(input, ms.float32)
    if approximate == "tanh":
        share = ops.sigmoid(2 * (2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x))
    else:
        share = (1 + ops.erf(x / 2**0.5)) / 2
    return ops.cast(x * share, input.dtype)


@ops.constexpr
def check_gelu(shape, dtype, approximate):
    """Checks and records a call."""
    x = given(shape, dtype)
    require_dtype("input", x, (*FLOATS, "float64"), SOURCE)
    require(approximate in ("none", "tanh"), "approximate", f"{approximate!r}, must be 'none' or 'tanh' {SOURCE}")
    record("gelu", {"input": x}, approximate=approximate)


def given(shape, dtype) -> Given | None:
    return None if shape is None else Given(tuple(shape), str(dtype).lower())


def as_tuple(numbers) -> tuple[int, ...] | None:
    if isinstance(numbers, Tensor):
        raise NotImplementedError("the stand-in takes prefix and lengths as tuple or list only")
    return None if numbers is None else tuple(numbers)


def as_tensor(array: np.ndarray | None) -> Tensor | None:
    if array is None:
        return None
    return Tensor(array) if array.dtype == bool else Tensor(array.astype(np.int32))


def record(operator: str, tensors: dict, **arguments) -> None:
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    shapes, dtypes = ({name: tensor[i] for name, tensor in present.items()} for i in (0, 1))
    _calls.append(Call(operator, shapes, dtypes, arguments))


@contextmanager
def installed() -> Iterator[list[Call]]:
    """Inside the block `mindspore.ops` has the stand-ins; yields the list of recorded calls."""
    _calls.clear()
    stand_ins = (flash_attention_score, rms_norm, rotary_position_embedding, swiglu, gelu)
    with mock.patch.multiple(ops, **{function.__name__: function for function in stand_ins}):
        yield _calls
