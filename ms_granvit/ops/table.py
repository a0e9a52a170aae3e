"""Which implementation of an operator runs where (MindSpore). The first row that fits is taken; `runtime.kernels` names others.

What was run: everything on `cpu`. Rows of `npu` follow the documented interfaces; no device was at hand (docs/kernels.md).
"""
import os

import mindspore as ms

from granvit import native
from granvit.cost import few_logits
from granvit.kernels import ANY, COMPOSED, OPERATORS, Kernels, Named, Row
from ms_granvit.ops.ascendc import roi_align as ascendc

HALF = "bfloat16 float16"
WIDE = "float32 bfloat16 float16"
SHARED = "ops.attention.shared_prefix_mask"


def no_custom() -> str | None:
    """What the C++ kernels lack in MindSpore: the library, or a path that `ops.Custom` takes."""
    path, allowed = native.library(), os.environ.get("MS_CUSTOM_AOT_WHITE_LIST")
    if path is None:
        return native.why_missing()
    if ":" in str(path):
        return f"ops.Custom takes no path with a colon, as {path} has: install GranViT elsewhere"
    if allowed is not None and os.path.realpath(allowed) not in os.path.realpath(path):
        return f"MS_CUSTOM_AOT_WHITE_LIST={allowed} does not hold {path}: unset it, or set it to that folder"
    return None


def wide_grid(grid: int) -> str:
    """Why the Ascend C kernel of ROIAlign does not take a grid."""
    return "its grids have at most 64 cells along a side" if grid > 64 else ""


# fmt: off
TABLE = (
    # operator         name        devices  dtypes     function                         and what else decides
    Row("attention",     "flash",    "npu",   HALF,      "ops.attention.flash",           mask=SHARED),
    Row("attention",     "native",   "cpu",   "float32", "ops.native.attention",          mask="ops.native.segments",
        cannot=native.cannot_attend, unwise=native.unwise, missing=no_custom),
    Row("attention",     COMPOSED,   ANY,     ANY,       "ops.attention.composed",        mask=SHARED),
    Row("roi_align",     "ascend",   "npu",   WIDE,      "ops.ascendc.roi_align.roi_align",
        cannot=wide_grid, missing=ascendc.missing,
        by_name="was not run on a device, and the estimate sees no gain (docs/kernels.md)"),
    Row("roi_align",     "native",   "cpu",   "float32", "ops.native.roi_align",          unwise=native.unwise,
        missing=no_custom),
    Row("roi_align",     COMPOSED,   ANY,     ANY,       "ops.roi_align.roi_align"),
    Row("layer_norm",    "native",   "cpu",   "float32", "ops.native_small.layer_norm",   unwise=native.unwise,
        missing=no_custom),
    Row("layer_norm",    COMPOSED,   ANY,     ANY,       "ops.layer_norm.composed"),
    Row("rms_norm",      "fused",    "npu",   ANY,       "ops.rms_norm.fused"),
    Row("rms_norm",      "native",   "cpu",   "float32", "ops.native_small.rms_norm",     unwise=native.unwise,
        missing=no_custom),
    Row("rms_norm",      "product",  "cpu",   "float32", "ops.rms_norm.product"),
    Row("rms_norm",      COMPOSED,   ANY,     ANY,       "ops.rms_norm.composed"),
    Row("rope",          "native",   "cpu",   "float32", "ops.native_small.rope",         unwise=native.unwise,
        missing=no_custom),
    Row("rope",          COMPOSED,   ANY,     ANY,       "ops.rope.composed"),
    Row("swiglu",        "native",   "cpu",   "float32", "ops.native_small.swiglu",       unwise=native.unwise,
        missing=no_custom),
    Row("swiglu",        COMPOSED,   ANY,     ANY,       "ops.activations.swiglu"),
    Row("gelu",          "fused",    "npu",   ANY,       "ops.activations.fused_gelu"),
    Row("gelu",          "native",   "cpu",   "float32", "ops.native_small.gelu",         unwise=native.unwise,
        missing=no_custom),
    Row("gelu",          COMPOSED,   ANY,     ANY,       "ops.activations.gelu"),
    Row("cross_entropy", "chunked",  ANY,     ANY,       "ops.cross_entropy.chunked",     unwise=few_logits),
    Row("cross_entropy", COMPOSED,   ANY,     ANY,       "ops.cross_entropy.composed"),
    Row("adamw",         "native",   "cpu",   "float32", "ops.native_small.adamw",        unwise=native.unwise,
        missing=no_custom),
    Row("adamw",         COMPOSED,   ANY,     ANY,       "ops.adamw.composed"),
)
# fmt: on


def kernels_for(device: str, dtype: ms.Type, named: Named | None = None) -> Kernels:
    """The implementations for a device (cpu, npu) and a compute dtype. `named`: see `runtime.kernels`."""
    return Kernels("ms_granvit", TABLE, device, str(dtype).lower(), named or {})


PLAIN = kernels_for("cpu", ms.float32, dict.fromkeys(OPERATORS, COMPOSED))
