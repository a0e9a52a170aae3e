"""Self-distillation (paper section 4.3): MSE(teacher(crop), ROIAlign(student features)), and the EMA teacher.

The paper leaves two points open. Here the teacher is updated once per optimizer step, in float32; and the loss is the mean over
elements, then over the valid boxes of the global batch.

Layout letters: B rows, T views per row, K boxes per row, N patches, C width, g cells along a side of the ROI grid, r crop side.
"""
from collections.abc import Callable

import mindspore as ms
from mindspore import Tensor, nn, ops

from ms_granvit.ops import roi_align as roi_ops


def side(patches: int) -> int:
    """Cells along one side of a square grid."""
    return int(patches**0.5 + 0.5)


def teacher_features(teacher: nn.Cell, crops_BK3rr: Tensor, grid: int) -> Tensor:
    """The teacher's features of each crop, `[B, K, grid, grid, C]`, without gradient. They are average-pooled if `grid` is
    smaller than the teacher's own patch grid."""
    B, K, _, r, _ = crops_BK3rr.shape
    features = ops.stop_gradient(teacher.encode(crops_BK3rr.reshape(B * K, 3, r, r))[1])
    cell = side(features.shape[1]) // grid
    if cell == 1:
        return features.reshape(B, K, grid, grid, -1)
    return ops.mean(features.reshape(B * K, grid, cell, grid, cell, -1), (2, 4)).reshape(B, K, grid, grid, -1)


def student_features(student_BNC: Tensor, boxes_BK4: Tensor, grid: int, grids_B2: Tensor | None,
                     roi_align: Callable[..., Tensor] = roi_ops.roi_align) -> Tensor:  # fmt: skip
    """The student's features under each box, `[B, K, grid, grid, C]`.

    With tiling, `grids_B2` holds the rows and columns of tiles of each image, and `student_BNC` the features of all views,
    `[B T, N, C]`. The boxes refer to the map that the tiles form; view 0 (the whole image) is not used. `roi_align` is the
    implementation for images without tiles.
    """
    B, N, C = student_BNC.shape
    if grids_B2 is None:
        return roi_align(student_BNC.reshape(B, side(N), side(N), C), boxes_BK4, grid)
    features_BTHWC = student_BNC.reshape(grids_B2.shape[0], -1, side(N), side(N), C)
    return roi_ops.roi_align_tiled(features_BTHWC[:, 1:], grids_B2, boxes_BK4, grid)


def distill_sums(student_BNC: Tensor, teacher_BKggC: Tensor, boxes_BK4: Tensor, weights_BK: Tensor,
                 loss: str, grids_B2: Tensor | None = None,
                 roi_align: Callable[..., Tensor] = roi_ops.roi_align) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The distillation loss and the variance of the teacher's features, each summed over the valid boxes; float32 scalars.

    Loss of a box: for `mse` the mean of the squared difference over the box's elements, for `cosine` the mean of 1 - cosine over
    its cells. Variance of a box (logged only): over its cells for each channel, then averaged over the channels.
    """
    features = student_features(student_BNC, boxes_BK4, teacher_BKggC.shape[2], grids_B2, roi_align)
    student = ops.cast(features, ms.float32)
    teacher = ops.cast(teacher_BKggC, ms.float32)
    if loss == "mse":
        per_box = ops.mean(ops.square(teacher - student), (2, 3, 4))
    elif loss == "cosine":
        lengths = ops.sqrt(ops.sum(ops.square(teacher), -1) * ops.sum(ops.square(student), -1) + 1e-12)
        per_box = ops.mean(1 - ops.sum(teacher * student, -1) / lengths, (2, 3))
    else:
        raise ValueError(f"distill.loss '{loss}' has no formula in distill_sums")
    centred = teacher - ops.mean(teacher, (2, 3), True)
    variance = ops.mean(ops.square(centred), (2, 3, 4))
    return ops.sum(per_box * weights_BK), ops.sum(variance * weights_BK)


class EMA(nn.Cell):
    """`teacher = alpha * teacher + (1 - alpha) * student`, in place, float32.

    Both factors are inputs, so that `1 - alpha` is rounded once, from float64.
    """

    def __init__(self, teacher: nn.Cell, student: nn.Cell):
        super().__init__(auto_prefix=False)
        self.teacher = ms.ParameterTuple(teacher.get_parameters())
        self.student = ms.ParameterTuple(student.get_parameters())
        assert [t.name.split(".", 1)[1] for t in self.teacher] == [s.name.split(".", 1)[1] for s in self.student]

    def construct(self, alpha: Tensor, one_minus_alpha: Tensor) -> Tensor:
        for i in range(len(self.teacher)):
            ops.assign(self.teacher[i], alpha * self.teacher[i] + one_minus_alpha * self.student[i])
        return alpha
