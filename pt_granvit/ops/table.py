"""Which implementation of an operator runs where (PyTorch). The first row that fits is taken; `runtime.kernels` names others.

What was run: everything on `cpu`. Rows of `npu` follow the documented interfaces; no device was at hand (docs/kernels.md).
"""
from importlib.util import find_spec

import torch

from granvit import native
from granvit.cost import few_logits
from granvit.kernels import ANY, COMPOSED, OPERATORS, Kernels, Named, Row

HALF = "bfloat16 float16"
WIDE = "float32 bfloat16 float16"
SHARED = "ops.attention.shared_prefix_mask"


def not_flex(head_dim: int, masked: bool, cached: bool) -> str:
    """Why FlexAttention does not run."""
    if cached or not masked:
        return "it is for the shared-prefix mask of training rows"
    return "its kernels take heads of at least 16 channels" if head_dim < 16 else ""


def no_triton() -> str:
    """What this machine lacks to run Triton kernels, or ""."""
    return "" if find_spec("triton") else "triton is not installed; CUDA builds of torch bring it along"


# fmt: off
TABLE = (
    # operator         name          devices     dtypes  function                         and what else decides
    Row("attention",     "npu_fusion", "npu",      HALF,   "ops.attention.npu_fusion",      mask=SHARED),
    Row("attention",     "flex",       "cuda",     WIDE,   "ops.flex.attention",            mask="ops.flex.block_mask",
        cannot=not_flex, by_name="was not run on a GPU yet"),
    Row("attention",     "native",     "cpu",      "float32", "ops.native.attention",       mask="ops.native.segments",
        cannot=native.cannot_attend, unwise=native.unwise, missing=native.why_missing),
    Row("attention",     "sdpa",       "cpu cuda", ANY,    "ops.attention.sdpa",            mask=SHARED),
    Row("attention",     COMPOSED,     ANY,        ANY,    "ops.attention.composed",        mask=SHARED),
    Row("roi_align",     "triton",     "cuda",     WIDE,   "ops.triton_roi_align.roi_align",
        missing=no_triton, by_name="was not run on a GPU yet"),
    Row("roi_align",     "native",     "cpu",      "float32", "ops.native.roi_align",       unwise=native.unwise,
        missing=native.why_missing),
    Row("roi_align",     COMPOSED,     ANY,        ANY,    "ops.roi_align.roi_align"),
    Row("layer_norm",    COMPOSED,     ANY,        ANY,    "ops.layer_norm.composed"),
    Row("rms_norm",      "fused",      "npu",      HALF,   "ops.rms_norm.fused"),
    Row("rms_norm",      COMPOSED,     ANY,        ANY,    "ops.rms_norm.composed"),
    Row("rope",          "fused",      "npu",      HALF,   "ops.rope.fused"),
    Row("rope",          COMPOSED,     ANY,        ANY,    "ops.rope.composed"),
    Row("swiglu",        COMPOSED,     ANY,        ANY,    "ops.activations.swiglu"),
    Row("gelu",          COMPOSED,     ANY,        ANY,    "ops.activations.gelu"),
    Row("cross_entropy", "chunked",    ANY,        ANY,    "ops.cross_entropy.chunked",     unwise=few_logits),
    Row("cross_entropy", COMPOSED,     ANY,        ANY,    "ops.cross_entropy.composed"),
    Row("adamw",         COMPOSED,     ANY,        ANY,    "ops.adamw.composed"),
)
# fmt: on


def kernels_for(device: str, dtype: torch.dtype, named: Named | None = None) -> Kernels:
    """The implementations for a device (cpu, cuda, npu) and a compute dtype. `named`: see `runtime.kernels`."""
    return Kernels("pt_granvit", TABLE, device, str(dtype).removeprefix("torch."), named or {})


PLAIN = kernels_for("cpu", torch.float32, dict.fromkeys(OPERATORS, COMPOSED))
