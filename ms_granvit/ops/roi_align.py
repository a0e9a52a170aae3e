"""ROIAlign as two matrix products.

With a fixed 2x2 grid of samples per bin and average pooling, bilinear sampling separates: `out[k] = My[k] . F . Mx[k]^T`.
Layout letters: B images, K boxes per image, H x W feature cells, C width, g output cells along a side.
"""
import mindspore as ms
from mindspore import Tensor, ops

SAMPLES = 2  # per bin and axis


def sampling_matrix(low_BK: Tensor, high_BK: Tensor, grid: int, cells: int) -> Tensor:
    """Average bilinear weights `[B, K, grid, cells]` of `grid` bins between two coordinates in 0..1 along one axis.

    Half-pixel aligned (torchvision's `aligned=True`): coordinate c lies at c * cells - 0.5; samples are clamped to the
    centres of the border cells.
    """
    B, K = low_BK.shape
    ticks = (ops.cast(ops.arange(grid * SAMPLES), ms.float32) + 0.5) / (grid * SAMPLES)
    at = (ops.expand_dims(low_BK, -1) + ops.expand_dims(high_BK - low_BK, -1) * ticks) * cells - 0.5
    at = ops.expand_dims(ops.clamp(at, 0.0, cells - 1.0), -1)
    weights = ops.relu(1 - ops.abs(at - ops.cast(ops.arange(cells), ms.float32)))
    return ops.mean(weights.reshape(B, K, grid, SAMPLES, cells), 3)


def roi_align(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    """Features under each box, `[B, K, grid, grid, C]`, in the features' dtype; boxes are xyxy in 0..1 of the feature map.

    The row product runs as `[K g, H] x [H, W C]`, once per image, so the map is never gathered per box.
    """
    B, H, W, C = features_BHWC.shape
    K = boxes_BK4.shape[1]
    rows = ops.cast(sampling_matrix(boxes_BK4[..., 1], boxes_BK4[..., 3], grid, H), features_BHWC.dtype)
    columns = ops.cast(sampling_matrix(boxes_BK4[..., 0], boxes_BK4[..., 2], grid, W), features_BHWC.dtype)
    banded = ops.BatchMatMul()(rows.reshape(B, K * grid, H), features_BHWC.reshape(B, H, W * C))
    columns = ops.broadcast_to(ops.expand_dims(columns, 2), (B, K, grid, grid, W))
    return ops.BatchMatMul()(columns, banded.reshape(B, K, grid, W, C))
