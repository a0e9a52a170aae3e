"""Which implementation of an operator runs where (PyTorch). The first row that fits is taken; `runtime.kernels` names others.

What was run: everything on `cpu`. Rows of `npu` follow the documented interfaces; no device was at hand (docs/kernels.md).
"""
from collections.abc import Mapping

import torch

from granvit.kernels import ANY, COMPOSED, OPERATORS, Kernels, Row
from pt_granvit.ops.cross_entropy import rows_in_chunk

HALF = "bfloat16 float16"
SHARED = "ops.attention.shared_prefix_mask"


def few_logits(positions: int, vocab: int) -> str:
    """Why the cross-entropy is not computed in chunks."""
    return "all logits fit one chunk" if positions <= rows_in_chunk(positions, vocab) else ""


# fmt: off
TABLE = (
    # operator         name          devices     dtypes  function                         and what else decides
    Row("attention",     "npu_fusion", "npu",      HALF,   "ops.attention.npu_fusion",      mask=SHARED),
    Row("attention",     "sdpa",       "cpu cuda", ANY,    "ops.attention.sdpa",            mask=SHARED),
    Row("attention",     COMPOSED,     ANY,        ANY,    "ops.attention.composed",        mask=SHARED),
    Row("roi_align",     COMPOSED,     ANY,        ANY,    "ops.roi_align.roi_align"),
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


def kernels_for(device: str, dtype: torch.dtype, named: Mapping[str, str] | None = None) -> Kernels:
    """The implementations for a device (cpu, cuda, npu) and a compute dtype. `named`: see `runtime.kernels`."""
    return Kernels("pt_granvit", TABLE, device, str(dtype).removeprefix("torch."), named or {})


PLAIN = kernels_for("cpu", torch.float32, dict.fromkeys(OPERATORS, COMPOSED))
