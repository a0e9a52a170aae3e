"""ROIAlign as two matrix products.

With a fixed 2x2 grid of samples per bin and average pooling, bilinear sampling separates: `out[k] = My[k] . F . Mx[k]^T`.
Layout letters: B images, K boxes per image, H x W feature cells, C width, g output cells along a side.
"""
import torch
from torch import Tensor

SAMPLES = 2  # per bin and axis


def sampling_matrix(low_BK: Tensor, high_BK: Tensor, grid: int, cells: int) -> Tensor:
    """Average bilinear weights `[B, K, grid, cells]` of `grid` bins between two coordinates in 0..1 along one axis.

    Half-pixel aligned (torchvision's `aligned=True`): coordinate c lies at c * cells - 0.5; samples are clamped to the
    centres of the border cells.
    """
    ticks = (torch.arange(grid * SAMPLES, device=low_BK.device, dtype=low_BK.dtype) + 0.5) / (grid * SAMPLES)
    at = (low_BK[..., None] + (high_BK - low_BK)[..., None] * ticks) * cells - 0.5
    at = at.clamp(0, cells - 1)
    index = torch.arange(cells, device=low_BK.device, dtype=low_BK.dtype)
    weights = (1 - (at[..., None] - index).abs()).clamp(min=0)
    return weights.unflatten(2, (grid, SAMPLES)).mean(3)


def roi_align(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    """Features under each box, `[B, K, grid, grid, C]`, in the features' dtype; boxes are xyxy in 0..1 of the feature map.

    The row product runs as `[K g, H] x [H, W C]`, once per image, so the map is never gathered per box.
    """
    B, H, W, C = features_BHWC.shape
    K = boxes_BK4.shape[1]
    x1, y1, x2, y2 = boxes_BK4.unbind(-1)
    rows = sampling_matrix(y1, y2, grid, H).to(features_BHWC.dtype)
    columns = sampling_matrix(x1, x2, grid, W).to(features_BHWC.dtype)
    banded = torch.matmul(rows.reshape(B, K * grid, H), features_BHWC.reshape(B, H, W * C))
    return torch.matmul(columns[:, :, None], banded.reshape(B, K, grid, W, C))
