"""Which implementation of an operator runs where (MindSpore). The first row that fits is taken; `runtime.kernels` names others.

What was run: everything on `cpu`. Rows of `npu` follow the documented interfaces; no device was at hand (docs/kernels.md).
"""
import mindspore as ms

from granvit import native
from granvit.kernels import ANY, COMPOSED, OPERATORS, Kernels, Named, Row
from ms_granvit.ops.ascendc import roi_align as ascendc
from ms_granvit.ops.cross_entropy import rows_in_chunk

HALF = "bfloat16 float16"
WIDE = "float32 bfloat16 float16"
SHARED = "ops.attention.shared_prefix_mask"


def few_logits(positions: int, vocab: int, trained: bool) -> str:
    """Why the cross-entropy is not computed in chunks. The gradient of a trained head is summed over the chunks, which takes more
    memory than the logits of few positions."""
    if positions <= rows_in_chunk(positions, vocab):
        return "all logits fit one chunk"
    return "the head is trained, and its gradient would exist twice" if trained and positions * vocab < 1 << 28 else ""


def wide_grid(grid: int) -> str:
    """Why the Ascend C kernel of ROIAlign does not take a grid."""
    return "its grids have at most 64 cells along a side" if grid > 64 else ""


# fmt: off
TABLE = (
    # operator         name        devices  dtypes     function                         and what else decides
    Row("attention",     "flash",    "npu",   HALF,      "ops.attention.flash",           mask=SHARED),
    Row("attention",     "native",   "cpu",   "float32", "ops.native.attention",          mask="ops.native.segments",
        cannot=native.cannot_attend, unwise=native.unwise, missing=native.why_missing),
    Row("attention",     COMPOSED,   ANY,     ANY,       "ops.attention.composed",        mask=SHARED),
    Row("roi_align",     "ascend",   "npu",   WIDE,      "ops.ascendc.roi_align.roi_align",
        cannot=wide_grid, missing=ascendc.missing,
        by_name="was not run on a device, and the estimate sees no gain (docs/kernels.md)"),
    Row("roi_align",     "native",   "cpu",   "float32", "ops.native.roi_align",          unwise=native.unwise,
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
