"""Which implementation of an operator runs where (MindSpore). The first row that fits is taken; `runtime.kernels` names others.

What was run: everything on `cpu`. Rows of `npu` follow the documented interfaces; no device was at hand (docs/kernels.md).
"""

from typing import Any

import mindspore as ms

from granvit import native
from granvit.kernels import ANY, COMPOSED, OPERATORS, Kernels, Named, Row
from ms_granvit.ops.ascendc import roi_align as ascendc
from ms_granvit.ops.cross_entropy import rows_in_chunk

HALF = "bfloat16 float16"
WIDE = "float32 bfloat16 float16"
SHARED = "ops.attention.shared_prefix_mask"


def few_logits(positions: int, vocab: int) -> str:
    """Why the cross-entropy is not computed in chunks."""
    return "all logits fit one chunk" if positions <= rows_in_chunk(positions, vocab) else ""


def wide_grid(grid: int) -> str:
    """Why the Ascend C kernel of ROIAlign does not take a grid."""
    return "its grids have at most 64 cells along a side" if grid > 64 else ""


def no_segments(head_dim: int, masked: bool, cached: bool) -> str:
    """Why an implementation that takes segments does not run: generation with caches has another mask."""
    return "generation with caches has no segments" if cached else ""


def plain_loops(**sizes: Any) -> str:
    """Why the C++ kernels are not the default on this processor. Without AVX2 they were slower than the framework's on x86-64; on
    other machines they were not timed."""
    return "the processor has no AVX2" if native.library() and native.instruction_set() == "base" else ""


# fmt: off
TABLE = (
    # operator         name        devices  dtypes     function                         and what else decides
    Row("attention",     "flash",    "npu",   HALF,      "ops.attention.flash",           mask=SHARED),
    Row("attention",     "native",   "cpu",   "float32", "ops.native.attention",          mask="ops.native.segments",
        cannot=no_segments, unwise=plain_loops, missing=native.why_missing),
    Row("attention",     COMPOSED,   ANY,     ANY,       "ops.attention.composed",        mask=SHARED),
    Row("roi_align",     "ascend",   "npu",   WIDE,      "ops.ascendc.roi_align.roi_align",
        cannot=wide_grid, missing=ascendc.missing,
        by_name="was not run on a device, and the estimate sees no gain (docs/kernels.md)"),
    Row("roi_align",     "native",   "cpu",   "float32", "ops.native.roi_align",          unwise=plain_loops,
        missing=native.why_missing),
    Row("roi_align",     COMPOSED,   ANY,     ANY,       "ops.roi_align.roi_align"),
    Row("rms_norm",      "fused",    "npu",   ANY,       "ops.rms_norm.fused"),
    Row("rms_norm",      "product",  "cpu",   "float32", "ops.rms_norm.product"),
    Row("rms_norm",      COMPOSED,   ANY,     ANY,       "ops.rms_norm.composed"),
    Row("rope",          COMPOSED,   ANY,     ANY,       "ops.rope.composed"),
    Row("swiglu",        COMPOSED,   ANY,     ANY,       "ops.activations.swiglu"),
    Row("gelu",          "fused",    "npu",   ANY,       "ops.activations.fused_gelu"),
    Row("gelu",          COMPOSED,   ANY,     ANY,       "ops.activations.gelu"),
    Row("cross_entropy", "chunked",  ANY,     ANY,       "ops.cross_entropy.chunked",     unwise=few_logits),
    Row("cross_entropy", COMPOSED,   ANY,     ANY,       "ops.cross_entropy.composed"),
    Row("adamw",         COMPOSED,   ANY,     ANY,       "ops.adamw.composed"),
)
# fmt: on


def kernels_for(device: str, dtype: ms.Type, named: Named | None = None) -> Kernels:
    """The implementations for a device (cpu, npu) and a compute dtype. `named`: see `runtime.kernels`."""
    return Kernels("ms_granvit", TABLE, device, str(dtype).lower(), named or {})


PLAIN = kernels_for("cpu", ms.float32, dict.fromkeys(OPERATORS, COMPOSED))
