"""Self-distillation (paper section 4.3): MSE(teacher(crop), ROIAlign(student features)), and the EMA teacher.

The paper leaves two points open. Here the teacher is updated once per optimizer step, in float32; and the loss is the mean over
elements, then over the valid boxes of the global batch.

Layout letters: B rows, T views per row, K boxes per row, N patches, C width, g cells along a side of the ROI grid, r crop side.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from pt_granvit.arrays import to_float32_or_wider
from pt_granvit.ops import roi_align as roi_ops
from pt_granvit.vision import VisionEncoder


def side(patches: int) -> int:
    """Cells along one side of a square grid."""
    return round(patches**0.5)


def teacher_features(teacher: VisionEncoder, crops_BK3rr: Tensor, grid: int) -> Tensor:
    """The teacher's features of each crop, `[B, K, grid, grid, C]`, without gradient. They are average-pooled if `grid` is
    smaller than the teacher's own patch grid."""
    B, K = crops_BK3rr.shape[:2]
    with torch.no_grad():
        _, features = teacher.encode(crops_BK3rr.flatten(0, 1))
        cell = side(features.shape[1]) // grid
        return features.reshape(B, K, grid, cell, grid, cell, -1).mean((3, 5))


def student_features(student_BNC: Tensor, boxes_BK4: Tensor, grid: int, grids_B2: Tensor | None,
                     roi_align: Callable[..., Tensor] = roi_ops.roi_align) -> Tensor:  # fmt: skip
    """The student's features under each box, `[B, K, grid, grid, C]`.

    With tiling, `grids_B2` holds the rows and columns of tiles of each image, and `student_BNC` the features of all views,
    `[B T, N, C]`. The boxes refer to the map that the tiles form; view 0 (the whole image) is not used. `roi_align` is the
    implementation for images without tiles.
    """
    N = student_BNC.shape[1]
    features_BHWC = student_BNC.unflatten(1, (side(N), side(N)))
    if grids_B2 is None:
        return roi_align(features_BHWC, boxes_BK4, grid)
    return roi_ops.roi_align_tiled(features_BHWC.unflatten(0, (len(grids_B2), -1))[:, 1:], grids_B2, boxes_BK4, grid)


def distill_sums(student_BNC: Tensor, teacher_BKggC: Tensor, boxes_BK4: Tensor, weights_BK: Tensor,
                 loss: str, grids_B2: Tensor | None = None,
                 roi_align: Callable[..., Tensor] = roi_ops.roi_align) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The distillation loss and the variance of the teacher's features, each summed over the valid boxes; float32 scalars.

    Loss of a box: for `mse` the mean of the squared difference over the box's elements, for `cosine` the mean of 1 - cosine over
    its cells. Variance of a box (logged only): over its cells for each channel, then averaged over the channels.
    """
    features = student_features(student_BNC, boxes_BK4, teacher_BKggC.shape[2], grids_B2, roi_align)
    student = to_float32_or_wider(features)
    teacher = to_float32_or_wider(teacher_BKggC)
    if loss == "mse":
        per_box = (teacher - student).square().mean((2, 3, 4))
    elif loss == "cosine":
        lengths = (teacher.square().sum(-1) * student.square().sum(-1) + 1e-12).sqrt()
        per_box = (1 - (teacher * student).sum(-1) / lengths).mean((2, 3))
    else:
        raise ValueError(f"distill.loss '{loss}' has no formula in distill_sums")
    weights = weights_BK.to(per_box.dtype)
    return (per_box * weights).sum(), (teacher.var((2, 3), correction=0).mean(-1) * weights).sum()


@torch.no_grad()
def ema_(teacher: list[Tensor], student: list[Tensor], alpha: float) -> None:
    """`teacher = alpha * teacher + (1 - alpha) * student`, in place, float32."""
    torch._foreach_mul_(teacher, alpha)
    torch._foreach_add_(teacher, student, alpha=1 - alpha)
