"""ROIAlign as Triton kernels, forward and backward, with the mathematics of `pt_granvit.ops.roi_align.roi_align`.

`out[k] = My[k] . F . Mx[k]^T`. Forward, a program makes a row of output cells: it adds up the few feature rows that have a
weight in My, then multiplies by Mx. Backward, a program makes a tile of one row of feature cells, in the same way with the
transposed matrices, and adds up the boxes one after another: no atomics, so the bits do not depend on scheduling. The kernels
compute the weights themselves; weights, products and sums are float32 for every dtype of the features.

What was done with them (none of it on a GPU or NPU; the sizes of the tiles are not tuned):

- triton 3.6.0: run on CPU by its interpreter (TRITON_INTERPRET=1, set before the import), and compiled for sm_80 and sm_90.
- triton-ascend 3.2.0: run by its interpreter, and lowered to Linalg for Ascend910B3; the step from there to a binary needs CANN.
  For it the kernels keep to masked loads and stores of rows that are contiguous in memory, `tl.where`, `tl.dot` of float32 tiles
  with `ieee`, `range` loops without `break`, and `if` of a scalar. Its launch has 16 bits for the number of programs (`B K g`
  times the tiles of columns and of channels): beyond 65535, set TRITON_ALL_BLOCKS_PARALLEL=1.

Layout letters: B images, K boxes per image, H x W feature cells, C width, g output cells along a side.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from pt_granvit.ops.roi_align import SAMPLES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_TILE = 16  # tl.dot takes no less along any axis
LARGEST_TILE = 32
CHANNELS = 64  # per program
PER_BIN = tl.constexpr(SAMPLES)


@triton.jit
def bin_weight(low, high, bins, cells, bin, cell):
    """Weight of a feature cell in an output cell along one axis: the mean of the bilinear weights of the bin's samples.

    Comparisons, not minimum and maximum, so that a NaN in a box reaches the output.
    """
    total = (bin + cell) * 0.0
    for sample in tl.static_range(PER_BIN):
        tick = (bin * PER_BIN + sample + 0.5) / (bins * PER_BIN)
        point = (low + (high - low) * tick) * cells - 0.5
        point = tl.where(point < 0, 0.0, point)
        point = tl.where(point > cells - 1, cells - 1.0, point)
        weight = 1.0 - tl.abs(point - cell)
        total += tl.where(weight < 0, 0.0, weight)
    return total / PER_BIN


@triton.jit
def forward_kernel(features, boxes, out, K, H, W, C, grid, BINS: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr):
    """One program: row i of the output cells of one box, BINS of its columns, CHANNELS channels."""
    box = (tl.program_id(0) // grid).to(tl.int64)
    i = tl.program_id(0) % grid
    j = tl.program_id(1) * BINS + tl.arange(0, BINS)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    x1, y1 = tl.load(boxes + box * 4), tl.load(boxes + box * 4 + 1)
    x2, y2 = tl.load(boxes + box * 4 + 2), tl.load(boxes + box * 4 + 3)
    image = features + box // K * (H * W * C)
    result = tl.zeros((BINS, CHANNELS), tl.float32)
    for first in range(0, W, CELLS):
        x = first + tl.arange(0, CELLS)
        inside = (x < W)[:, None] & (c < C)[None, :]
        band = tl.zeros((CELLS, CHANNELS), tl.float32)
        for y in range(H):
            weight = bin_weight(y1, y2, grid, H, i, y)
            if weight != 0:
                row = tl.load(image + (y * W + x)[:, None] * C + c[None, :], mask=inside, other=0.0)
                band += weight * row.to(tl.float32)
        columns = bin_weight(x1, x2, grid, W, j[:, None], x[None, :])
        result = tl.dot(columns, band, result, input_precision="ieee")
    cells = out + (box * grid + i) * (grid * C) + j[:, None] * C + c[None, :]
    tl.store(cells, result.to(out.dtype.element_ty), mask=(j < grid)[:, None] & (c < C)[None, :])


@triton.jit
def backward_kernel(d_out, boxes, d_features, K, H, W, C, grid, BINS: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr):
    """One program: CELLS feature cells of row y of one image, CHANNELS channels."""
    image = (tl.program_id(0) // H).to(tl.int64)
    y = tl.program_id(0) % H
    x = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    result = tl.zeros((CELLS, CHANNELS), tl.float32)
    for k in range(K):
        box = image * K + k
        x1, y1 = tl.load(boxes + box * 4), tl.load(boxes + box * 4 + 1)
        x2, y2 = tl.load(boxes + box * 4 + 2), tl.load(boxes + box * 4 + 3)
        for first in range(0, grid, BINS):
            j = first + tl.arange(0, BINS)
            inside = (j < grid)[:, None] & (c < C)[None, :]
            band = tl.zeros((BINS, CHANNELS), tl.float32)
            for i in range(grid):
                weight = bin_weight(y1, y2, grid, H, i, y)
                if weight != 0:
                    row = tl.load(d_out + (box * grid + i) * (grid * C) + j[:, None] * C + c[None, :], mask=inside, other=0.0)
                    band += weight * row.to(tl.float32)
            columns = bin_weight(x1, x2, grid, W, j[None, :], x[:, None])
            result = tl.dot(columns, band, result, input_precision="ieee")
    cells = d_features + (image * H + y) * (W * C) + x[:, None] * C + c[None, :]
    tl.store(cells, result.to(d_features.dtype.element_ty), mask=(x < W)[:, None] & (c < C)[None, :])


def tile(size: int) -> int:
    """Tile along an axis of `size` cells: a power of two that `tl.dot` takes."""
    return min(max(triton.next_power_of_2(size), SMALLEST_TILE), LARGEST_TILE)


@torch.library.custom_op("granvit::roi_align_triton", mutates_args=())
def forward(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    B, H, W, C = features_BHWC.shape
    K = boxes_BK4.shape[1]
    out = features_BHWC.new_empty(B, K, grid, grid, C)
    if out.numel():
        bins = tile(grid)
        programs = (B * K * grid, triton.cdiv(grid, bins), triton.cdiv(C, CHANNELS))
        features, boxes = features_BHWC.contiguous(), boxes_BK4.contiguous()
        forward_kernel[programs](features, boxes, out, K, H, W, C, grid, bins, tile(W), CHANNELS)
    return out


@forward.register_fake
def _(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    B, _, _, C = features_BHWC.shape
    return features_BHWC.new_empty(B, boxes_BK4.shape[1], grid, grid, C)


@torch.library.custom_op("granvit::roi_align_triton_backward", mutates_args=())
def backward(d_out_BKggC: Tensor, boxes_BK4: Tensor, H: int, W: int) -> Tensor:
    B, K, grid, _, C = d_out_BKggC.shape
    d_features = d_out_BKggC.new_empty(B, H, W, C)
    if d_features.numel():
        cells = tile(W)
        programs = (B * H, triton.cdiv(W, cells), triton.cdiv(C, CHANNELS))
        d_out, boxes = d_out_BKggC.contiguous(), boxes_BK4.contiguous()
        backward_kernel[programs](d_out, boxes, d_features, K, H, W, C, grid, tile(grid), cells, CHANNELS)
    return d_features


@backward.register_fake
def _(d_out_BKggC: Tensor, boxes_BK4: Tensor, H: int, W: int) -> Tensor:
    B, *_, C = d_out_BKggC.shape
    return d_out_BKggC.new_empty(B, H, W, C)


def _keep(ctx, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    features_BHWC, boxes_BK4, _ = inputs
    ctx.save_for_backward(boxes_BK4)
    ctx.size = features_BHWC.shape[1:3]


def _differentiate(ctx, d_out_BKggC: Tensor) -> tuple[Tensor, None, None]:
    return backward(d_out_BKggC, *ctx.saved_tensors, *ctx.size), None, None


forward.register_autograd(_differentiate, setup_context=_keep)


def roi_align(features_BHWC: Tensor, boxes_BK4: Tensor, grid: int) -> Tensor:
    """`pt_granvit.ops.roi_align.roi_align`: features under each box, `[B, K, grid, grid, C]`, in the features' dtype.

    Features are float32, bfloat16 or float16; boxes are float32, xyxy in 0..1 of the feature map, and get no gradient. Boxes that
    are inverted or outside give what the formula gives, NaN gives NaN. `ValueError` for other dtypes.
    """
    if features_BHWC.dtype not in DTYPES or boxes_BK4.dtype != torch.float32:
        raise ValueError(
            f"features_BHWC is {features_BHWC.dtype} and boxes_BK4 {boxes_BK4.dtype}: the Triton roi_align takes features in "
            "float32, bfloat16 or float16 and boxes in float32; the composed roi_align takes others"
        )
    return forward(features_BHWC, boxes_BK4, grid)
