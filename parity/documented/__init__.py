"""Stand-ins for Ascend's fused operators that follow their documented interface.

They run on a machine without a device. A call that breaks a documented rule raises an error that names the argument and the rule:
`TypeError` for a dtype, `ValueError` for all else. A valid call computes, in float32, what the documentation says. So the code
that calls the operators is checked against the documentation. The operators themselves are not: rounding, speed, and whatever
the documentation does not say are those of the device.

This module holds what the documents of the packages share, without a framework: the rules of fused attention, its sparse modes.

Sources, quoted by letter in the rules:
[M] MindSpore 2.9.0: docstrings of `mindspore.ops` and of the primitive `FlashAttentionScore` (also www.mindspore.cn/docs)
[T] Ascend Extension for PyTorch: gitcode.com/Ascend/op-plugin, docs/zh/custom_APIs/torch_npu/*npu_*.md
[C] CANN: its operator repository ops-transformer, attention/flash_attention_score/docs/aclnnFlashAttention(VarLen)Score*.md and
    docs/zh/context/sparse_mode_introduction.md (hiascend.com/document, CANN 8.5, aolapi/context/ops-transformer)

Layout letters: B batch, N query heads, G key heads, S queries, L keys, D head width, H all heads (N D), T the tokens of several
sequences.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

UNLIMITED = 2147483647  # default of pre_tokens and next_tokens [M, T]
COMPRESSED = 2048  # side of the compressed mask of sparse modes 2, 3 and 4 [M, T, C]
DEFAULT, ALL, LEFT_UP, RIGHT_DOWN, BAND, PREFIX = range(6)  # sparse modes [M, T, C]
LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")  # [M, T]
DISCARDED = -1e30  # a discarded score; [C]: "a very small negative number" that the softmax turns into 0

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One recorded call of an operator: shapes and dtypes of its tensors by name, and its other arguments."""

    operator: str
    shapes: dict[str, Shape]
    dtypes: dict[str, str]
    arguments: dict[str, Any] = field(default_factory=dict)


class Given(NamedTuple):
    """What the rules need to know about a tensor."""

    shape: Shape
    dtype: str  # "bfloat16", "bool", ...


class Attention(NamedTuple):
    """The arguments of a fused attention, under MindSpore's names."""

    query: Given
    key: Given
    value: Given
    head_num: int
    real_shift: Given | None = None
    drop_mask: Given | None = None
    padding_mask: Given | None = None
    attn_mask: Given | None = None
    prefix: tuple[int, ...] | None = None
    actual_seq_qlen: tuple[int, ...] | None = None
    actual_seq_kvlen: tuple[int, ...] | None = None
    keep_prob: float = 1.0
    pre_tokens: int = UNLIMITED
    next_tokens: int = UNLIMITED
    inner_precise: int = 0
    input_layout: str = "BSH"
    sparse_mode: int = DEFAULT


class Geometry(NamedTuple):
    """Sizes of one call of attention. With TND, `S` and `L` are those of all sequences together, and `B` is 1."""

    B: int
    N: int
    G: int
    S: int
    L: int
    D: int
    value_D: int


class Discarded(NamedTuple):
    """What the sparse mode discards besides the mask's own elements; arrays `[S, L]`.

    `always` is discarded whatever the mask holds. `rows` and `rows_before` are for compressed masks: a key is discarded if the
    mask is true at (rows, COMPRESSED / 2), or false at (rows_before, COMPRESSED / 2).
    """

    always: np.ndarray | None = None
    rows: np.ndarray | None = None
    rows_before: np.ndarray | None = None


def require(holds: bool, argument: str, rule: str, error: type[Exception] = ValueError) -> None:
    """Raises `error` with the argument's name and the documented rule unless it holds."""
    if not holds:
        raise error(f"{argument}: {rule}")


def require_dtype(argument: str, given: Given, allowed: Sequence[str], source: str) -> None:
    """`TypeError` unless the tensor has one of these dtypes."""
    require(given.dtype in allowed, argument, f"dtype {given.dtype}, must be {' or '.join(allowed)} {source}", TypeError)


@dataclass(frozen=True)
class AttentionRules:
    """The documented rules of one package's fused attention. `names` maps MindSpore's names of arguments to the package's."""

    source: str
    names: dict[str, str]
    dtypes: tuple[str, ...]
    width_multiple: int
    max_width: int
    max_batch: int
    max_length: int
    max_sequences: int  # of TND
    modes: tuple[int, ...]
    tnd_modes: tuple[int, ...]
    tnd_next_tokens: bool  # TND requires next_tokens 0, and pre_tokens of at least the longest sequence
    mask_11SL: bool  # a mask may be [1, 1, S, L]
    narrower_value: bool  # the value's head width may be smaller than the key's
    shaped_drop_mask: bool  # shape and use of drop_mask are documented

    def need(self, holds: bool, argument: str, rule: str, source: str = "", error: type[Exception] = ValueError) -> None:
        """`require`, with the package's name of the argument and the source of the rule, by default the package's."""
        require(holds, self.names.get(argument, argument), f"{rule} {source or self.source}", error)

    def need_dtype(self, argument: str, given: Given, allowed: Sequence[str]) -> None:
        """`require_dtype`, with the package's name of the argument."""
        require_dtype(self.names.get(argument, argument), given, allowed, self.source)

    def validate(self, call: Attention) -> Geometry:
        """The sizes of the call. An error if an argument breaks a documented rule."""
        g = self._geometry(call)
        mode, layout = call.sparse_mode, call.input_layout
        modes, where = (self.tnd_modes, " with input_layout TND") if layout == "TND" else (self.modes, "")
        self.need(mode in modes, "sparse_mode", f"{mode}, must be one of {', '.join(map(str, modes))}{where}")
        if mode > PREFIX:
            raise NotImplementedError(f"the stand-in does not follow sparse_mode {mode}")
        self.need(0 < call.keep_prob <= 1, "keep_prob", f"{call.keep_prob}, must be above 0 and at most 1")
        self.need(call.inner_precise in (0, 1, 2), "inner_precise", f"{call.inner_precise}, must be 0, 1 or 2", "[T, C]")
        self.need(call.padding_mask is None, "padding_mask", "is not implemented; it must be None")
        self._check_others(call, g)
        longest = self._check_sequences(call, g)
        self._check_mask(call, g, longest)
        self._check_band(call, g)
        self._check_prefix(call, g)
        return g

    def _geometry(self, call: Attention) -> Geometry:
        layout, head_num = call.input_layout, call.head_num
        tensors = {"query": call.query, "key": call.key, "value": call.value}
        self.need(layout in LAYOUTS, "input_layout", f"{layout!r}, must be one of {', '.join(LAYOUTS)}")
        self.need(1 <= head_num <= 256, "head_num", f"{head_num}, must be 1 to 256")
        for name, given in tensors.items():
            self.need_dtype(name, given, self.dtypes)
            self.need(given.dtype == call.query.dtype, name, f"dtype {given.dtype} differs from the query's", error=TypeError)
            fits = len(given.shape) == len(layout) and min(given.shape) > 0
            self.need(fits, name, f"shape {given.shape} is not {layout}, or it is empty")
        batch, length = layout.find("B"), layout.index("T" if layout == "TND" else "S")
        (B, S), (key_B, L), of_value = ((1 if batch < 0 else t.shape[batch], t.shape[length]) for t in tensors.values())
        if layout in ("BSH", "SBH"):
            N, H, key_H, value_H = head_num, call.query.shape[2], call.key.shape[2], call.value.shape[2]
            D = key_D = H // N
            self.need(H % N == 0, "head_num", f"{N}, must divide the query's last axis, {H}")
            self.need(key_H % D == 0, "key", f"last axis {key_H}, must be a multiple of the query's head width, {D}")
            G = value_G = key_H // D
            self.need(value_H % G == 0, "value", f"last axis {value_H}, must be a multiple of the number of key heads, {G}")
            value_D = value_H // G
        else:
            (N, D), (G, key_D), (value_G, value_D) = ((t.shape[layout.index("N")], t.shape[-1]) for t in tensors.values())
            self.need(head_num == N, "head_num", f"{head_num}, must be the query's number of heads, {N}")
        self.need(key_B == B, "key", f"batch {key_B}, must be the query's {B}")
        self.need(N % G == 0, "key", f"{G} heads, must divide the query's {N}")
        self.need(key_D == D, "key", f"head width {key_D}, must be the query's {D}")
        same = (*of_value, value_G) == (B, L, G) and (value_D == D or (self.narrower_value and value_D < D))
        self.need(same, "value", f"shape {call.value.shape}, must be the key's, {call.key.shape}")
        multiple = f"a multiple of {self.width_multiple}, " if self.width_multiple > 1 else ""
        wide = D % self.width_multiple == 0 and max(D, value_D) <= self.max_width
        self.need(wide, "query", f"head width {D}, must be {multiple}at most {self.max_width}")
        self.need(self.max_batch >= B, "query", f"batch {B}, must be at most {self.max_batch}")
        self.need(max(S, L) <= self.max_length, "query", f"length {max(S, L)}, must be at most {self.max_length}")
        return Geometry(B, N, G, S, L, D, value_D)

    def _check_others(self, call: Attention, g: Geometry) -> None:
        """Position shift and dropout; the stand-ins do not compute them."""
        if call.real_shift is not None:
            shift, dtype = call.real_shift, call.query.dtype
            self.need(shift.dtype == dtype, "real_shift", f"dtype {shift.dtype}, must be the query's, {dtype}", error=TypeError)
            shapes = [(b, g.N, rows, g.L) for b in (g.B, 1) for rows in (g.S, 1024)]
            self.need(shift.shape in shapes, "real_shift", f"shape {shift.shape}, must be one of {shapes}")
        if call.drop_mask is not None:
            self.need_dtype("drop_mask", call.drop_mask, ("uint8",))
        if call.drop_mask is not None and self.shaped_drop_mask:
            self.need(call.keep_prob < 1, "drop_mask", "must be None where keep_prob is 1")
            shape = (g.B, g.N, g.S, g.L // 8)
            self.need(call.drop_mask.shape == shape, "drop_mask", f"shape {call.drop_mask.shape}, must be {shape}")

    def _check_sequences(self, call: Attention, g: Geometry) -> tuple[int, int]:
        """Cumulative lengths belong to TND, and TND to cumulative lengths. Returns the lengths of the longest sequences."""
        ends = {"actual_seq_qlen": (call.actual_seq_qlen, g.S), "actual_seq_kvlen": (call.actual_seq_kvlen, g.L)}
        if call.input_layout != "TND":
            for name, (given, _) in ends.items():
                self.need(given is None, name, f"must be None with input_layout {call.input_layout}; it belongs to TND")
            return g.S, g.L
        lengths = []
        for name, (given, T) in ends.items():
            self.need(bool(given), name, "None, but input_layout TND needs it")
            assert given is not None
            steps = np.diff(given, prepend=0)
            self.need(bool((steps >= 0).all()), name, f"{given} decreases; it holds cumulative lengths")
            self.need(given[-1] == T, name, f"ends with {given[-1]}, must end with the number of tokens, {T}")
            self.need(len(given) <= self.max_sequences, name, f"{len(given)} sequences, must be at most {self.max_sequences}")
            lengths.append(steps)
        of_q, of_kv = lengths
        self.need(len(of_q) == len(of_kv), "actual_seq_kvlen", f"{len(of_kv)} sequences, but {len(of_q)} of queries")
        self.need(bool((of_kv > 0).all()), "actual_seq_kvlen", "has a sequence without keys", "[M]")
        if call.sparse_mode == RIGHT_DOWN:
            rule = "3 with TND: no sequence may have more queries than keys"
            self.need(bool((of_q <= of_kv).all()), "sparse_mode", rule, "[M, C]")
        longest = int(of_q.max()), int(of_kv.max())
        if self.tnd_next_tokens:
            self.need(call.next_tokens == 0, "next_tokens", f"{call.next_tokens}, must be 0 with TND")
            rule = f"{call.pre_tokens}, must be at least the longest sequence, {longest[0]}, with TND"
            self.need(call.pre_tokens >= longest[0], "pre_tokens", rule)
        return longest

    def _check_mask(self, call: Attention, g: Geometry, longest: tuple[int, int]) -> None:
        mask, mode, tnd = call.attn_mask, call.sparse_mode, call.input_layout == "TND"
        if mask is None:
            self.need(mode == DEFAULT, "attn_mask", f"None, but sparse_mode {mode} needs its mask", "[M, T, C]")
            return
        self.need_dtype("attn_mask", mask, ("bool", "uint8"))
        shapes: list[Shape] = [(g.B, g.N, g.S, g.L), (g.B, 1, g.S, g.L)]
        if mode in (LEFT_UP, RIGHT_DOWN, BAND):
            shapes = [(COMPRESSED, COMPRESSED)]
        elif tnd:
            shapes = [longest]  # [T]: "SS, the longest of the queries and of the keys"
        elif mode != PREFIX:  # [M]: with 5, "(B, N1, S1, S2), (B, 1, S1, S2)"; [C]: "BNSS or B1SS"
            shapes += [(g.S, g.L), (1, 1, g.S, g.L)] if self.mask_11SL else [(g.S, g.L)]
        wanted = " or ".join(map(str, shapes))
        self.need(mask.shape in shapes, "attn_mask", f"shape {mask.shape}, must be {wanted} with sparse_mode {mode}")

    def _check_band(self, call: Attention, g: Geometry) -> None:
        """The band must not be empty. Without a mask, and in modes other than 0 and 4, the two numbers are ignored."""
        before, after = call.pre_tokens, call.next_tokens
        if call.attn_mask is None or call.sparse_mode not in (DEFAULT, BAND):
            return
        rule = f"{before} and next_tokens {after}: the band between them is empty"
        self.need(before >= 0 or -before <= min(after, g.L - 1), "pre_tokens", rule, "[M]")
        self.need(after >= 0 or -after <= min(before, g.S - 1), "next_tokens", rule, "[M]")

    def _check_prefix(self, call: Attention, g: Geometry) -> None:
        prefix = call.prefix
        if call.sparse_mode != PREFIX:
            self.need(prefix is None, "prefix", f"must be None unless sparse_mode is {PREFIX}", "[M]")
            return
        self.need(prefix is not None, "prefix", f"None, but sparse_mode {PREFIX} needs it")
        assert prefix is not None
        self.need(len(prefix) == g.B <= 32, "prefix", f"{len(prefix)} numbers for batch {g.B}, must be one each, at most 32")
        low = max(g.L - g.S, 0)
        self.need(low <= min(prefix) and max(prefix) <= g.L, "prefix", f"{prefix}, must be from {low} to {g.L}")


def discarded(call: Attention, g: Geometry) -> Discarded:
    """What the sparse mode discards [M, C]. A call without a mask computes all."""
    mode = call.sparse_mode
    if call.input_layout == "TND":
        assert call.actual_seq_qlen is not None and call.actual_seq_kvlen is not None
        diagonal, apart = sequence_diagonals(call.actual_seq_qlen, call.actual_seq_kvlen, mode)
        return Discarded(apart, compressed_row(diagonal) if mode in (LEFT_UP, RIGHT_DOWN) else None)
    if call.attn_mask is None or mode in (ALL, PREFIX):
        return Discarded()
    if mode == DEFAULT and min(call.pre_tokens, call.next_tokens) >= max(g.S, g.L):
        return Discarded()
    diagonal = diagonals(g.S, g.L, mode)
    if mode == DEFAULT:
        return Discarded((diagonal < -call.next_tokens) | (diagonal > call.pre_tokens))
    if mode in (LEFT_UP, RIGHT_DOWN):
        return Discarded(rows=compressed_row(diagonal))
    assert mode == BAND
    after, before = min(call.next_tokens, g.S + g.L), min(call.pre_tokens, g.S + g.L)
    return Discarded(rows=compressed_row(diagonal + after), rows_before=compressed_row(diagonal - before - 1))


def diagonals(S: int, L: int, mode: int) -> np.ndarray:
    """`i - j` of query i and key j, int `[S, L]`; in modes 3 and 4 counted from the lower right corner [M, C]."""
    offset = L - S if mode in (RIGHT_DOWN, BAND) else 0
    return np.arange(S)[:, None] + offset - np.arange(L)


def sequence_diagonals(ends_q: Sequence[int], ends_kv: Sequence[int], mode: int) -> tuple[np.ndarray, np.ndarray]:
    """`diagonals` within each sequence of TND, and where query and key are of different sequences, bool; both `[S, L]`."""
    within, apart = np.zeros((ends_q[-1], ends_kv[-1]), int), np.ones((ends_q[-1], ends_kv[-1]), bool)
    for q0, q1, k0, k1 in zip((0, *ends_q[:-1]), ends_q, (0, *ends_kv[:-1]), ends_kv, strict=True):
        within[q0:q1, k0:k1] = diagonals(q1 - q0, k1 - k0, mode)
        apart[q0:q1, k0:k1] = False
    return within, apart


def compressed_row(diagonal: np.ndarray) -> np.ndarray:
    """The row of the compressed mask that stands for a diagonal, in column `COMPRESSED / 2`.

    The kernel looks up a block that crosses the diagonal at the same diagonal of the compressed mask. That mask is true above
    its main diagonal, so row `COMPRESSED / 2 + diagonal` is true for negative diagonals.
    """
    return np.clip(COMPRESSED // 2 + diagonal, 0, COMPRESSED - 1)
