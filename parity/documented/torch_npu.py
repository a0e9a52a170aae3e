"""torch_npu's fused operators, as documented (see the package's docstring for the sources).

`module` builds what stands for the package `torch_npu`; inside `installed()` it is `sys.modules["torch_npu"]`. The operators take
tensors of any device, compute on it, and are differentiable. Rules of the A2 series (910B) apply where products differ.
"""
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

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

SOURCE = "[T]"
FLOATS = ("float16", "bfloat16", "float32")

# npu_fusion_attention: dtypes and mask shapes under "parameters"; "constraints": batch at most 2M, sequence at most 1M, head
# width 1 to 768 with Dq = Dk >= Dv (no multiple is demanded), sparse mode 5 not with TND, 7 and 8 only with it, at most 1K
# sequences.
ATTENTION = AttentionRules(
    source=SOURCE, names={"attn_mask": "atten_mask", "pre_tokens": "pre_tockens", "next_tokens": "next_tockens",
    "real_shift": "pse", "drop_mask": "dropout_mask"}, dtypes=FLOATS, width_multiple=1, max_width=768, max_batch=2 << 20,
    max_length=1 << 20, max_sequences=1024, modes=(0, 1, 2, 3, 4, 5, 6), tnd_modes=(0, 1, 2, 3, 4, 6, 7, 8),
    tnd_next_tokens=False, mask_11SL=True, narrower_value=True, shaped_drop_mask=False,
)  # fmt: skip


class Operators:
    """The operators; `calls` has all calls so far."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def npu_fusion_attention(
        self, query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: Tensor | None = None,
        padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
        pre_tockens: int = UNLIMITED, next_tockens: int = UNLIMITED, inner_precise: int = 0,
        prefix: Sequence[int] | None = None, actual_seq_qlen: Sequence[int] | None = None,
        actual_seq_kvlen: Sequence[int] | None = None, sparse_mode: int = 0, gen_mask_parallel: bool = True,
        sync: bool = False, softmax_layout: str = "", sink: Tensor | None = None, dropout_mask: Tensor | None = None,
        seed: int = 0, offset: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:  # fmt: skip
        """Attention in the query's dtype and layout; the largest score of each query and the sum of the exponentials of its
        scores minus that, float32 `[B, N, S, 8]` (TND: `[N, T, 8]`) with equal numbers along the last axis; an unused tensor; and
        the seed, offset and length of the dropout mask. Differentiable by the first output.

        Of a query all of whose keys are discarded the documentation says nothing: here the result is the mean of all values.
        Not computed (`NotImplementedError`): pse, sink, dropout, sparse modes 6 to 8, masks other than the compressed in TND.
        """
        call = Attention(
            given(query), given(key), given(value), head_num, given(pse), given(dropout_mask), given(padding_mask),
            given(atten_mask), as_tuple(prefix), as_tuple(actual_seq_qlen), as_tuple(actual_seq_kvlen), keep_prob, pre_tockens,
            next_tockens, inner_precise, input_layout, sparse_mode,
        )  # fmt: skip
        g = ATTENTION.validate(call)
        require(softmax_layout in ("", "TND"), "softmax_layout", f"{softmax_layout!r}, must be '' or 'TND' {SOURCE}")
        tnd = input_layout == "TND"
        require(not softmax_layout or tnd, "softmax_layout", f"needs input_layout TND, not {input_layout} {SOURCE}")
        arrays = discarded(call, g)
        uncomputed = tnd and atten_mask is not None and arrays.rows is None
        if uncomputed or softmax_layout or pse is not None or sink is not None or keep_prob < 1 or dropout_mask is not None:
            raise NotImplementedError("the stand-in computes no pse, sink, dropout, softmax_layout, and no such mask with TND")
        self._record("npu_fusion_attention", {"query": query, "key": key, "value": value, "atten_mask": atten_mask},
                     head_num=head_num, input_layout=input_layout, scale=scale, keep_prob=keep_prob, pre_tockens=pre_tockens,
                     next_tockens=next_tockens, inner_precise=inner_precise, prefix=call.prefix, sparse_mode=sparse_mode,
                     actual_seq_qlen=call.actual_seq_qlen, actual_seq_kvlen=call.actual_seq_kvlen)  # fmt: skip
        q, k, v = (to_BNSD(t.float(), input_layout, n) for t, n in ((query, g.N), (key, g.G), (value, g.G)))
        k, v = (t.repeat_interleave(g.N // g.G, dim=1) for t in (k, v))
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        if atten_mask is not None:
            hidden = atten_mask.bool()
            if arrays.rows is not None:
                column = hidden[:, COMPRESSED // 2]
                hidden = column[on_device(arrays.rows, query)]
                if arrays.rows_before is not None:
                    hidden = hidden | ~column[on_device(arrays.rows_before, query)]
            if arrays.always is not None:
                hidden = hidden | on_device(arrays.always, query)
            scores = scores.masked_fill(hidden, DISCARDED)
        elif arrays.always is not None:
            scores = scores.masked_fill(on_device(arrays.always, query), DISCARDED)
        largest = scores.amax(-1, keepdim=True).detach()
        exponentials = torch.exp(scores - largest)
        total = exponentials.sum(-1, keepdim=True)
        out = from_BNSD(torch.matmul(exponentials / total, v), input_layout).to(query.dtype)
        largest, total = (t.detach().expand(*t.shape[:-1], 8).contiguous() for t in (largest, total))
        if tnd:
            largest, total = largest[0], total[0]
        return out, largest, total, torch.empty(0, device=query.device), 0, 0, 0

    def npu_rms_norm(self, self_: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
        """`x / sqrt(mean(x^2) + epsilon) * gamma` over the last axes, those of gamma, in the dtype of x; and the reciprocal of
        the root, float32, with 1 in place of those axes. Gamma has the dtype of x, or float32."""
        x, g = given(self_), given(gamma)
        require_dtype("self", x, FLOATS, SOURCE)
        pair = g.dtype in (x.dtype, "float32")  # table of the A2 series
        require(pair, "gamma", f"dtype {g.dtype}, must be {x.dtype} or float32 {SOURCE}", TypeError)
        require(2 <= len(x.shape) <= 8, "self", f"shape {x.shape}, must have 2 to 8 axes {SOURCE}")
        # "2 to 8 axes" is said of gamma too, but the documentation's own example has one.
        fits = 0 < len(g.shape) <= len(x.shape) and x.shape[-len(g.shape) :] == g.shape
        require(fits, "gamma", f"shape {g.shape}, must be that of the last axes of self, {x.shape} {SOURCE}")
        self._record("npu_rms_norm", {"self": self_, "gamma": gamma}, epsilon=epsilon)
        axes = tuple(range(-gamma.ndim, 0))
        wide = self_.float()
        reciprocal = torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
        return (wide * reciprocal * gamma.float()).to(self_.dtype), reciprocal

    def npu_rotary_mul(self, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half",
                       rotate: Tensor | None = None) -> Tensor:  # fmt: skip
        """`input r1 + rotated(input) r2` in the dtype of input. "half" pairs channel i with i + D / 2, "interleave" 2 i with
        2 i + 1. The layouts of r1 are those of the A2 series with jit_compile=False."""
        x, cos, sin = given(input), given(r1), given(r2)
        for name, tensor in (("input", x), ("r1", cos), ("r2", sin)):
            require_dtype(name, tensor, FLOATS, SOURCE)
        require(rotary_mode in ("half", "interleave"), "rotary_mode", f"{rotary_mode!r}, must be half or interleave {SOURCE}")
        require(len(x.shape) in (3, 4), "input", f"shape {x.shape}, must have three or four axes {SOURCE}")
        require(sin.shape == cos.shape, "r2", f"shape {sin.shape}, must be that of r1, {cos.shape} {SOURCE}")
        D = x.shape[-1]
        require(D % 2 == 0 and D < 896, "input", f"head width {D}, must be even and below 896 {SOURCE}")
        if rotate is not None:
            raise NotImplementedError("the stand-in does not follow rotate")
        half = rotary_mode == "half"
        layouts = {}  # layout -> (shapes of r1, batch, heads)
        if len(x.shape) == 4:
            a, b, c = x.shape[:3]
            layouts["BNSD"] = [(1, 1, c), (a, 1, c), (a, b, c)], a, b
            layouts["BSND"] = [(1, b, 1), (a, b, 1), (a, b, c)], a, c
            layouts["SBND"] = [(a, 1, 1), (a, b, 1), (a, b, c)], b, c
        else:
            layouts["TND"] = [(x.shape[0], 1), x.shape[:2]], 1, x.shape[1]
        fitting = {name: counts for name, (shapes, *counts) in layouts.items()
                   if cos.shape in [(*s, D) for s in shapes[: None if half else 1]]}  # fmt: skip
        require(bool(fitting), "r1", f"shape {cos.shape} has no documented layout for {x.shape} and {rotary_mode} {SOURCE}")
        grows = r1.requires_grad or r2.requires_grad
        small = any((max(B, N) < 1000 if half else B * N < 1000) and not (grows and B * N > 1024) for B, N in fitting.values())
        rule = "batch and heads must be below 1000, their product with interleave, and at most 1024 for gradients of r1 and r2"
        require(small, "input", f"shape {x.shape}: {rule} {SOURCE}")
        self._record("npu_rotary_mul", {"input": input, "r1": r1, "r2": r2}, rotary_mode=rotary_mode)
        wide = input.float()
        if half:
            first, second = wide.chunk(2, -1)
            rotated = torch.cat((-second, first), -1)
        else:
            rotated = torch.stack((-wide[..., 1::2], wide[..., ::2]), -1).reshape(wide.shape)
        return (wide * r1.float() + rotated * r2.float()).to(input.dtype)

    def npu_swiglu(self, input: Tensor, dim: int = -1) -> Tensor:
        """`a sigmoid(a) b` of the halves a and b of the input along `dim`, in its dtype. The input must be contiguous."""
        x = given(input)
        require_dtype("input", x, FLOATS, SOURCE)
        require(1 <= len(x.shape) <= 8, "input", f"shape {x.shape}, must have 1 to 8 axes {SOURCE}")
        require(-len(x.shape) <= dim < len(x.shape), "dim", f"{dim}, must be an axis of the input, {x.shape} {SOURCE}")
        require(x.shape[dim] % 2 == 0, "input", f"axis {dim} of {x.shape} must be divisible by 2 {SOURCE}")
        require(input.numel() > 0, "input", f"shape {x.shape} is empty {SOURCE}")
        require(input.is_contiguous(), "input", f"is not contiguous; call .contiguous() {SOURCE}")
        self._record("npu_swiglu", {"input": input}, dim=dim)
        a, b = input.float().chunk(2, dim)
        return (a * torch.sigmoid(a) * b).to(input.dtype)

    def _record(self, operator: str, tensors: dict[str, Tensor | None], **arguments) -> None:
        present = {name: given(tensor) for name, tensor in tensors.items() if tensor is not None}
        shapes, dtypes = ({name: tensor[i] for name, tensor in present.items()} for i in (0, 1))
        self.calls.append(Call(operator, shapes, dtypes, arguments))


def given(tensor: Tensor | None) -> Given | None:
    return None if tensor is None else Given(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def as_tuple(numbers: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(int(n) for n in numbers)


def on_device(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)


def to_BNSD(x: Tensor, layout: str, N: int) -> Tensor:
    """A tensor of any layout as `[B, N, S, D]`."""
    if layout in ("BSH", "BSND"):
        return x.reshape(*x.shape[:2], N, -1).permute(0, 2, 1, 3)
    if layout == "SBH":
        return x.reshape(*x.shape[:2], N, -1).permute(1, 2, 0, 3)
    return x.permute(1, 0, 2)[None] if layout == "TND" else x


def from_BNSD(x: Tensor, layout: str) -> Tensor:
    """`[B, N, S, D]` in another layout."""
    if layout == "BSND":
        return x.permute(0, 2, 1, 3)
    if layout == "BSH":
        return x.permute(0, 2, 1, 3).flatten(2)
    if layout == "SBH":
        return x.permute(2, 0, 1, 3).flatten(2)
    return x[0].permute(1, 0, 2) if layout == "TND" else x


def module() -> types.ModuleType:
    """A module called torch_npu with the operators, and their `calls`."""
    operators, built = Operators(), types.ModuleType("torch_npu")
    for name in ("npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu", "calls"):
        setattr(built, name, getattr(operators, name))
    return built


@contextmanager
def installed() -> Iterator[list[Call]]:
    """Inside the block `import torch_npu` gives `module()`; yields the list of its calls."""
    before, built = sys.modules.get("torch_npu"), module()
    sys.modules["torch_npu"] = built
    try:
        yield built.calls
    finally:
        del sys.modules["torch_npu"]
        if before is not None:
            sys.modules["torch_npu"] = before
