"""The Ascend C kernels of ROIAlign, run on the host, against their formula in float64. No device is involved."""
import numpy as np
import pytest

from .harness import SANITIZE, TYPES, UB, Sizes, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

ROUNDOFF = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # of the result, which is summed in float32
SMALL_UB = 40 * 1024

# name: sizes, cores, bytes of UB. The map and the tiles are chosen so that every path of the tiling is taken.
CASES = {
    "one box, one core": (Sizes(1, 5, 7, 20, 1, 4), 1, UB),
    "a single cell": (Sizes(2, 1, 1, 3, 2, 2), 2, UB),
    "odd widths": (Sizes(2, 6, 4, 33, 5, 3), 3, UB),
    "more cores than rows": (Sizes(2, 6, 4, 33, 5, 3), 40, UB),
    "36 x 36 cells": (Sizes(1, 36, 36, 80, 5, 7), 5, UB),
    "several tiles of channels, the last one short": (Sizes(1, 8, 8, 200, 5, 6), 2, 24 * 1024),
    "tiles below 64 channels": (Sizes(1, 40, 24, 50, 5, 5), 2, SMALL_UB),
    "many bins in a small box": (Sizes(1, 9, 9, 16, 5, 32), 1, UB),
    "bins of a row in several parts": (Sizes(1, 6, 8, 192, 5, 31), 1, 96 * 1024),
}


def boxes_of(sizes, seed=0):
    """Random boxes. If the first image has five, four are special: of zero width, on the border, beyond it, inverted."""
    rng = np.random.default_rng(seed)
    low = rng.random((sizes.B, sizes.K, 2))
    boxes = np.concatenate([low, low + rng.random(low.shape) * (1 - low)], -1)
    special = np.array([[0.3, 0.2, 0.3, 0.9], [0, 0, 1, 1], [-0.4, 0.5, 1.3, 1.2], [0.8, 0.9, 0.1, 0.2]])[: sizes.K - 1]
    boxes[0, 1 : 1 + len(special)] = special
    return boxes.astype(np.float32)


def weights(low_BK, high_BK, grid, cells):
    """`[B, K, grid, cells]` by definition: two samples a bin, clamped to the centres of the border cells, bilinear, averaged."""
    ticks = (np.arange(2 * grid) + 0.5) / (2 * grid)
    points = (low_BK[..., None] + (high_BK - low_BK)[..., None] * ticks) * cells - 0.5
    distance = np.abs(np.clip(points, 0, cells - 1)[..., None] - np.arange(cells))
    return np.maximum(1 - distance, 0).reshape(*low_BK.shape, grid, 2, cells).mean(-2)


def expected(kind, array, boxes_BK4, sizes):
    boxes = boxes_BK4.astype(np.float64)
    rows = weights(boxes[..., 1], boxes[..., 3], sizes.g, sizes.H)
    columns = weights(boxes[..., 0], boxes[..., 2], sizes.g, sizes.W)
    if kind == "forward":
        return np.einsum("bkih,bhwc,bkjw->bkijc", rows, array, columns, optimize=True)
    return np.einsum("bkih,bkijc,bkjw->bhwc", rows, array, columns, optimize=True)


def random_array(kind, sizes, dtype, seed=1):
    B, H, W, C, K, g = sizes
    shape = (B, H, W, C) if kind == "forward" else (B, K, g, g, C)
    return np.random.default_rng(seed).standard_normal(shape).astype(TYPES[dtype][1]).astype(np.float64)


def assert_close(got, want, dtype):
    """Coordinates and sums are float32: errors of a few of its units, times the number of cells, relative to the largest one."""
    bound = 4e-6 * np.abs(want).max() + ROUNDOFF[dtype] * np.abs(want)
    assert np.all(np.abs(got - want) <= bound), np.max(np.abs(got - want) - bound)


def test_the_cases_cut_everything(harness):
    cut = set()
    for sizes, cores, ub in CASES.values():
        for kind in ("forward", "backward"):
            _, counts = harness("float16").run(kind, None, boxes_of(sizes), sizes, cores, ub)
            limits = {"tile": sizes.C, "bins": sizes.g, "rows": sizes.g if kind == "forward" else sizes.H}
            cut |= {(kind, name) for name, limit in limits.items() if counts[name] < limit and limit % counts[name]}
    assert len(cut) == 6, cut  # each quantity is cut, and its last piece is shorter, in both passes


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_against_the_formula(harness, case, dtype, kind):
    sizes, cores, ub = CASES[case]
    boxes, array = boxes_of(sizes), random_array(kind, sizes, dtype)
    out, counts = harness(dtype).run(kind, array, boxes, sizes, cores, ub)
    assert_close(out, expected(kind, array, boxes, sizes), dtype)
    assert counts["ub_peak"] == counts["ub_planned"] <= ub


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_memory_and_arithmetic_under_the_sanitizers(harness, kind):
    sizes = Sizes(2, 6, 4, 33, 5, 3)
    boxes, array = boxes_of(sizes), random_array(kind, sizes, "float16")
    out, _ = harness("float16", *SANITIZE).run(kind, array, boxes, sizes, 3)
    assert_close(out, expected(kind, array, boxes, sizes), "float16")


def test_backward_is_the_adjoint_of_forward(harness):
    sizes = Sizes(2, 7, 9, 24, 5, 4)
    boxes, x, dy = boxes_of(sizes), random_array("forward", sizes, "float32", 2), random_array("backward", sizes, "float32", 3)
    y, _ = harness("float32").run("forward", x, boxes, sizes, 3)
    dx, _ = harness("float32").run("backward", dy, boxes, sizes, 3)
    assert np.vdot(y, dy) == pytest.approx(np.vdot(x, dx), rel=1e-5)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_the_number_of_cores_does_not_change_a_bit(harness, kind):
    sizes = Sizes(2, 12, 5, 70, 5, 6)
    boxes, array = boxes_of(sizes), random_array(kind, sizes, "float32")
    one, many = (harness("float32").run(kind, array, boxes, sizes, cores) for cores in (1, 40))
    assert one[1]["rows"] > many[1]["rows"]
    np.testing.assert_array_equal(one[0], many[0])


def test_a_box_with_nan_gives_nan_and_leaves_the_others_alone(harness):
    sizes = Sizes(1, 6, 5, 16, 3, 3)
    boxes, x = boxes_of(sizes), random_array("forward", sizes, "float32")
    want = expected("forward", x, boxes, sizes)
    boxes[0, 1, 2] = np.nan
    out, _ = harness("float32").run("forward", x, boxes, sizes)
    assert np.isnan(out[0, 1]).all()
    assert_close(out[:, [0, 2]], want[:, [0, 2]], "float32")


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_rows_are_copied_once_and_the_output_is_written_once(harness, kind):
    """One box over the whole map with as many bins as cells: each row goes to UB once, and two rows once more for each further
    band, because the samples of a band's outer rows touch them."""
    sizes = Sizes(1, 16, 16, 64, 1, 16)
    boxes, array = np.array([[[0, 0, 1, 1]]], np.float32), random_array(kind, sizes, "float16")
    _, counts = harness("float16").run(kind, array, boxes, sizes, 1)
    bands, size = -(-16 // counts["rows"]), 16 * 16 * 64 * 2
    assert counts["bytes_out"] == size
    assert counts["bytes_in"] == size + 2 * (bands - 1) * size // 16


TOO_FINE, TOO_WIDE, NO_ROOM = (Sizes(1, 4, 4, 16, 1, 65), UB), (Sizes(1, 4, 5000, 16, 1, 2), UB), (Sizes(1, 4, 4, 16, 1, 2), 8192)


@pytest.mark.parametrize("sizes, ub", [TOO_FINE, TOO_WIDE, NO_ROOM])
def test_the_tiling_refuses_what_it_cannot_cut(harness, sizes, ub):
    for kind in ("forward", "backward"):
        with pytest.raises(RuntimeError, match="tiling refuses"):
            harness("float32").run(kind, None, boxes_of(sizes), sizes, ub=ub)
