"""ROIAlign as two matrix products.

With a fixed 2x2 grid of samples per bin and average pooling, bilinear sampling separates: `out[k] = My[k] . F . Mx[k]^T`.
Layout letters: B images, T tiles per image, K boxes per image, H x W feature cells, C width, g output cells along a side, p = 2 g
samples along it.
"""
import torch
from torch import Tensor

SAMPLES = 2  # per bin and axis


def sampling_matrix(low_BK: Tensor, high_BK: Tensor, grid: int, cells: int) -> Tensor:
    """Average bilinear weights `[B, K, grid, cells]` of `grid` bins between two coordinates in 0..1 along one axis.

    Half-pixel aligned (torchvision's `aligned=True`): coordinate c lies at c * cells - 0.5; samples are clamped to the
    centres of the border cells.
    """
    return average_weights(sample_points(low_BK, high_BK, grid, cells).clamp(0, cells - 1), cells)


def tile_matrix(low_BK: Tensor, high_BK: Tensor, grid: int, cells: int, tiles_BT: Tensor, tile_BT: Tensor) -> Tensor:
    """The columns `[B, T, K, grid, cells]` of a `sampling_matrix` that belong to one tile. The axis has `tiles_BT` tiles of
    `cells` cells; `tile_BT` is the number of the tile. For a number beyond the last tile the result is zero."""
    whole = (tiles_BT * cells)[..., None, None]
    points = sample_points(low_BK[:, None], high_BK[:, None], grid, whole).clamp(min=0).minimum(whole - 1)
    return average_weights(points - (tile_BT * cells)[..., None, None], cells)


def sample_points(low: Tensor, high: Tensor, grid: int, cells: int | Tensor) -> Tensor:
    """Coordinates of the samples of `grid` bins, in cells, `[..., p]`."""
    ticks = (torch.arange(grid * SAMPLES, device=low.device, dtype=low.dtype) + 0.5) / (grid * SAMPLES)
    return (low[..., None] + (high - low)[..., None] * ticks) * cells - 0.5


def average_weights(points: Tensor, cells: int) -> Tensor:
    """Bilinear weights of samples at `points` `[..., p]`, averaged over each bin, `[..., p / 2, cells]`."""
    index = torch.arange(cells, device=points.device, dtype=points.dtype)
    weights = (1 - (points[..., None] - index).abs()).clamp(min=0)
    return weights.unflatten(-2, (-1, SAMPLES)).mean(-2)


def roi_align(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    """Features under each box, `[B, K, grid, grid, C]`, in the features' dtype; boxes are xyxy in 0..1 of the feature map.

    The row product runs as `[K g, H] x [H, W C]`, once per image, so the map is never gathered per box.
    """
    H, W = features_BHWC.shape[1:3]
    x1, y1, x2, y2 = boxes_BK4.unbind(-1)
    return sample(features_BHWC, sampling_matrix(y1, y2, grid, H), sampling_matrix(x1, x2, grid, W))


def roi_align_tiled(tiles_BTHWC: Tensor, grids_B2: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    """`roi_align` of feature maps that are given as tiles, `[B, K, grid, grid, C]`; the maps are not assembled.

    `grids_B2[b]` is the number of rows and of columns of tiles in the map of image b. Its tiles come row by row; further tiles in
    `tiles_BTHWC` are padding and are ignored. `out = My . F . Mx^T` is a sum over the map's cells, so the tiles' shares add up.
    """
    B, T, H, W, _ = tiles_BTHWC.shape
    x1, y1, x2, y2 = boxes_BK4.unbind(-1)
    rows_BT, columns_BT = (n[:, None].expand(B, T) for n in grids_B2.unbind(-1))
    number = torch.arange(T, device=grids_B2.device)
    rows = tile_matrix(y1, y2, grid, H, rows_BT, number // columns_BT)
    columns = tile_matrix(x1, x2, grid, W, columns_BT, number % columns_BT)
    shares = sample(tiles_BTHWC.flatten(0, 1), rows.flatten(0, 1), columns.flatten(0, 1))
    return shares.unflatten(0, (B, T)).sum(1)


def sample(features_BHWC: Tensor, rows_BKgH: Tensor, columns_BKgW: Tensor) -> Tensor:
    """`rows . features . columns^T` for each box, `[B, K, g, g, C]`, in the features' dtype."""
    B, H, W, C = features_BHWC.shape
    _, K, g, _ = rows_BKgH.shape
    rows, columns = rows_BKgH.to(features_BHWC.dtype), columns_BKgW.to(features_BHWC.dtype)
    banded = torch.matmul(rows.reshape(B, K * g, H), features_BHWC.reshape(B, H, W * C))
    return torch.matmul(columns[:, :, None], banded.reshape(B, K, g, W, C))
