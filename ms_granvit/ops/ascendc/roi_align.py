"""ROIAlign by the Ascend C operators of this folder, called through `ops.Custom`. Opt-in: nobody has run it on a device.

The operators' names, inputs and attributes are those of `op_host/granvit_roi_align.cpp`. Attributes are passed as arguments, as
in MindSpore's own tests of `ops.Custom` with aclnn operators. Shape functions see no values, so each grid and each size of the
feature map has its own operator.
"""
import functools
import os
from pathlib import Path

from mindspore import Tensor, ops
from mindspore.ops import CustomRegOp, DataType

FORWARD, BACKWARD, TARGET = "aclnnGranvitRoiAlign", "aclnnGranvitRoiAlignGrad", "Ascend"
HEADER = "op_api/include/aclnn_granvit_roi_align.h"  # where MindSpore looks for an operator's declaration


def missing() -> str:
    """What this machine lacks to run it, or ""."""
    custom = os.environ.get("ASCEND_CUSTOM_OPP_PATH", "").split(":")
    vendors = Path(os.environ.get("ASCEND_OPP_PATH", "/nonexistent"), "vendors").glob("*")
    if any((Path(folder) / HEADER).is_file() for folder in [*custom, *vendors] if folder):
        return ""
    return "its operator package is not installed; ms_granvit/ops/ascendc/README.md has the command that builds it"


def registration(name: str, array: str, attributes: tuple[str, ...], output: str) -> dict:
    """What `ops.Custom` has to know: inputs `array` and `boxes`, integer attributes, one output in the dtype of `array`."""
    info = CustomRegOp(name).input(0, array, "required").input(1, "boxes", "required").output(0, output, "required")
    for attribute in attributes:
        info = info.attr(attribute, "required", "int")
    for dtype in (DataType.F32_Default, DataType.F16_Default, DataType.BF16_Default):
        info = info.dtype_format(dtype, DataType.F32_Default, dtype)
    return info.target(TARGET).get_op_info()


@functools.cache
def backward(height: int, width: int) -> ops.Custom:
    """`backward(...)(out_grad_BKggC, boxes_BK4, height, width)` is the gradient of the features, `[B, height, width, C]`."""
    return ops.Custom(
        BACKWARD,
        lambda grad, boxes, h, w: [grad[0], height, width, grad[4]],
        lambda grad, boxes, h, w: grad,
        "aot",
        reg_info=registration(BACKWARD, "out_grad", ("height", "width"), "features_grad"),
    )


@functools.cache
def forward(height: int, width: int, grid: int) -> ops.Custom:
    """`forward(...)(features_BHWC, boxes_BK4, grid)` is `[B, K, grid, grid, C]`. The boxes get a gradient of zero."""
    gradient = backward(height, width)

    def bprop(features, boxes, bins, out, dout):
        return gradient(dout, boxes, height, width), ops.zeros_like(boxes), 0

    return ops.Custom(
        FORWARD,
        lambda features, boxes, bins: [features[0], boxes[1], grid, grid, features[3]],
        lambda features, boxes, bins: features,
        "aot",
        bprop,
        registration(FORWARD, "features", ("grid",), "out"),
    )


def roi_align(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    """Features under each box, `[B, K, grid, grid, C]`, in the features' dtype (float32, float16 or bfloat16), summed in float32.

    `boxes_BK4` are xyxy in 0..1 of the feature map, float32. The mathematics is that of `ms_granvit/ops/roi_align.py`; unlike
    there, no gradient reaches the boxes. `grid` is at most 64 (`ROI_MAX_GRID`); the tiling refuses more.
    """
    return forward(features_BHWC.shape[1], features_BHWC.shape[2], grid)(features_BHWC, boxes_BK4, grid)
