"""ROIAlign of both packages against a slow gather written from the definition, in float64, values and gradients."""
import numpy as np
import pytest

H, W, C, GRID = 4, 5, 3, 3
BOXES = {
    "inside": (0.21, 0.13, 0.77, 0.68),
    "whole image": (0.0, 0.0, 1.0, 1.0),
    "on the border": (0.0, 0.4, 0.3, 1.0),
    "less than one cell": (0.52, 0.61, 0.55, 0.63),
    "less than one cell in a corner": (0.99, 0.99, 1.0, 1.0),
}


def slow_roi_align(features_HWC: np.ndarray, box: tuple[float, ...], grid: int) -> np.ndarray:
    """Bilinear samples one by one: 2x2 per bin, at c * size - 0.5, neighbours clamped to the map; their mean."""
    height, width = features_HWC.shape[:2]
    x1, y1, x2, y2 = box

    def sample(y: float, x: float) -> np.ndarray:
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        fy, fx = y - top, x - left
        upper = features_HWC[top, left] * (1 - fx) + features_HWC[top, right] * fx
        lower = features_HWC[bottom, left] * (1 - fx) + features_HWC[bottom, right] * fx
        return upper * (1 - fy) + lower * fy

    out = np.zeros((grid, grid, features_HWC.shape[2]))
    for i in range(grid):
        for j in range(grid):
            for a in (0.25, 0.75):
                for b in (0.25, 0.75):
                    y = (y1 + (y2 - y1) * (i + a) / grid) * height - 0.5
                    x = (x1 + (x2 - x1) * (j + b) / grid) * width - 0.5
                    out[i, j] += sample(y, x) / 4
    return out


def torch_roi_align(features, boxes, cotangent):
    torch = pytest.importorskip("torch")
    from pt_granvit.ops.roi_align import roi_align

    x = torch.from_numpy(features).requires_grad_()
    y = roi_align(x, torch.from_numpy(boxes), GRID)
    y.backward(torch.from_numpy(cotangent))
    return y.detach().numpy(), x.grad.numpy()


def mindspore_roi_align(features, boxes, cotangent):
    ms = pytest.importorskip("mindspore")
    from ms_granvit.distributed import join
    from ms_granvit.ops.roi_align import roi_align

    join("cpu")  # an engine may not choose the device after the first kernel has run

    def weighted(x, b, g):
        y = roi_align(x, b, GRID)
        return (y * g).sum(), y

    run = ms.jit(ms.value_and_grad(weighted, 0, has_aux=True))
    (_, y), gradient = run(ms.Tensor(features), ms.Tensor(boxes), ms.Tensor(cotangent))
    return y.asnumpy(), gradient.asnumpy()


@pytest.mark.parametrize("implementation", [torch_roi_align, mindspore_roi_align])
def test_roi_align_equals_the_gather_and_its_gradient_is_the_adjoint(implementation):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, H, W, C)).astype(np.float32)
    boxes = np.array([list(BOXES.values()), list(BOXES.values())[::-1]], np.float32)
    cotangent = rng.standard_normal((2, len(BOXES), GRID, GRID, C)).astype(np.float32)
    values, gradient = implementation(features, boxes, cotangent)

    for b in range(2):
        for k, box in enumerate(boxes[b]):
            expected = slow_roi_align(features[b].astype(np.float64), box.astype(np.float64), GRID)
            np.testing.assert_allclose(values[b, k], expected, rtol=0, atol=3e-6, err_msg=f"image {b}, box {box}")

    adjoint = np.zeros((2, H, W, C))
    for b in range(2):
        for cell in np.ndindex(H, W):
            basis = np.zeros((H, W, 1))
            basis[cell] = 1
            for k, box in enumerate(boxes[b]):
                adjoint[b][cell] += (slow_roi_align(basis, box.astype(np.float64), GRID) * cotangent[b, k]).sum((0, 1))
    np.testing.assert_allclose(gradient, adjoint, rtol=0, atol=1e-5)
    assert (values * cotangent).sum() == pytest.approx((features * gradient).sum(), rel=1e-4)


def test_a_box_swapped_in_x_and_y_is_seen():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((H, W, C))
    x1, y1, x2, y2 = BOXES["inside"]
    assert np.abs(slow_roi_align(features, (x1, y1, x2, y2), GRID) - slow_roi_align(features, (y1, x1, y2, x2), GRID)).max() > 0.1
