"""ROIAlign as two matrix products.

With a fixed 2x2 grid of samples per bin and average pooling, bilinear sampling separates: `out[k] = My[k] . F . Mx[k]^T`.
Layout letters: B images, T tiles per image, K boxes per image, H x W feature cells, C width, g output cells along a side, p = 2 g
samples along it.
"""
import mindspore as ms
from mindspore import Tensor, ops

SAMPLES = 2  # per bin and axis


def sampling_matrix(low_BK: Tensor, high_BK: Tensor, grid: int, cells: int) -> Tensor:
    """Average bilinear weights `[B, K, grid, cells]` of `grid` bins between two coordinates in 0..1 along one axis.

    Half-pixel aligned (torchvision's `aligned=True`): coordinate c lies at c * cells - 0.5; samples are clamped to the
    centres of the border cells.
    """
    points = sample_points(low_BK, high_BK, grid, cells)
    return nan_where_nan(points, average_weights(ops.clamp(points, 0.0, cells - 1.0), cells))


def tile_matrix(low_BK: Tensor, high_BK: Tensor, grid: int, cells: int, tiles_BT: Tensor, tile_BT: Tensor) -> Tensor:
    """The columns `[B, T, K, grid, cells]` of a `sampling_matrix` that belong to one tile. The axis has `tiles_BT` tiles of
    `cells` cells; `tile_BT` is the number of the tile. For a number beyond the last tile the result is zero."""
    B, T = tile_BT.shape
    whole = ops.cast(tiles_BT * cells, ms.float32).reshape(B, T, 1, 1)
    points = sample_points(ops.expand_dims(low_BK, 1), ops.expand_dims(high_BK, 1), grid, whole)
    inside = ops.minimum(ops.maximum(points, 0.0), whole - 1)
    return nan_where_nan(points, average_weights(inside - ops.cast(tile_BT * cells, ms.float32).reshape(B, T, 1, 1), cells))


def sample_points(low: Tensor, high: Tensor, grid: int, cells: int | Tensor) -> Tensor:
    """Coordinates of the samples of `grid` bins, in cells, `[..., p]`."""
    ticks = (ops.arange(grid * SAMPLES, dtype=ms.float32) + 0.5) / (grid * SAMPLES)
    return (ops.expand_dims(low, -1) + ops.expand_dims(high - low, -1) * ticks) * cells - 0.5


def nan_where_nan(points: Tensor, weights: Tensor) -> Tensor:
    """The weights `[..., g, cells]`, NaN for boxes whose samples `[..., p]` are NaN: MindSpore's minimum and maximum drop NaN."""
    return ops.where(ops.expand_dims(ops.isnan(points[..., :1]), -1), ops.full_like(weights, float("nan")), weights)


def average_weights(points: Tensor, cells: int) -> Tensor:
    """Bilinear weights of samples at `points` `[..., p]`, averaged over each bin, `[..., p / 2, cells]`."""
    weights = ops.relu(1 - ops.abs(ops.expand_dims(points, -1) - ops.arange(cells, dtype=ms.float32)))
    return ops.mean(weights.reshape(*points.shape[:-1], points.shape[-1] // SAMPLES, SAMPLES, cells), -2)


def roi_align(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    """Features under each box, `[B, K, grid, grid, C]`, in the features' dtype; boxes are xyxy in 0..1 of the feature map.

    The row product runs as `[K g, H] x [H, W C]`, once per image, so the map is never gathered per box.
    """
    H, W = features_BHWC.shape[1:3]
    rows = sampling_matrix(boxes_BK4[..., 1], boxes_BK4[..., 3], grid, H)
    return sample(features_BHWC, rows, sampling_matrix(boxes_BK4[..., 0], boxes_BK4[..., 2], grid, W))


def roi_align_tiled(tiles_BTHWC: Tensor, grids_B2: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    """`roi_align` of feature maps that are given as tiles, `[B, K, grid, grid, C]`; the maps are not assembled.

    `grids_B2[b]` is the number of rows and of columns of tiles in the map of image b. Its tiles come row by row; further tiles in
    `tiles_BTHWC` are padding and are ignored. `out = My . F . Mx^T` is a sum over the map's cells, so the tiles' shares add up.
    """
    B, T, H, W, C = tiles_BTHWC.shape
    K = boxes_BK4.shape[1]
    rows_BT, columns_BT = ops.broadcast_to(grids_B2[:, :1], (B, T)), ops.broadcast_to(grids_B2[:, 1:], (B, T))
    number = ops.broadcast_to(ops.expand_dims(ops.arange(T, dtype=grids_B2.dtype), 0), (B, T))
    rows = tile_matrix(boxes_BK4[..., 1], boxes_BK4[..., 3], grid, H, rows_BT, ops.floor_divide(number, columns_BT))
    columns = tile_matrix(boxes_BK4[..., 0], boxes_BK4[..., 2], grid, W, columns_BT, ops.floor_mod(number, columns_BT))
    features, rows = tiles_BTHWC.reshape(B * T, H, W, C), rows.reshape(B * T, K, grid, H)
    return ops.sum(sample(features, rows, columns.reshape(B * T, K, grid, W)).reshape(B, T, K, grid, grid, C), 1)


def sample(features_BHWC: Tensor, rows_BKgH: Tensor, columns_BKgW: Tensor) -> Tensor:
    """`rows . features . columns^T` for each box, `[B, K, g, g, C]`, in the features' dtype."""
    B, H, W, C = features_BHWC.shape
    K, g = rows_BKgH.shape[1:3]
    rows, columns = ops.cast(rows_BKgH, features_BHWC.dtype), ops.cast(columns_BKgW, features_BHWC.dtype)
    banded = ops.BatchMatMul()(rows.reshape(B, K * g, H), features_BHWC.reshape(B, H, W * C))
    columns = ops.broadcast_to(ops.expand_dims(columns, 2), (B, K, g, g, W))
    return ops.BatchMatMul()(columns, banded.reshape(B, K, g, W, C))
