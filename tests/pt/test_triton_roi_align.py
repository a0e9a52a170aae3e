"""ROIAlign in Triton against its definition in float64, values and gradients.

On a machine with CUDA the tests run there. On CPU they run in Triton's interpreter, in a process of its own: the interpreter must
be chosen before Triton is imported, for the whole process.
"""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (CUDA builds of torch bring it)", allow_module_level=True)

from pt_granvit.ops import roi_align as composed  # noqa: E402
from pt_granvit.ops import triton_roi_align  # noqa: E402
from tests.test_roi_align import BOXES, slow_roi_align  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device; test_in_the_interpreter runs it on CPU"
)
ROUNDING = {torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of a number near 1
UNUSUAL_BOXES = {
    "inverted": (0.8, 0.7, 0.2, 0.1),
    "of no width": (0.4, 0.2, 0.4, 0.9),
    "outside": (-0.6, -0.4, 1.7, 1.2),
    "nowhere near": (2.0, 2.0, 3.0, 3.0),
}


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout


def both(features, boxes, grid, cotangent, roi_align=triton_roi_align.roi_align):
    """Output and the gradient of the features, float64 on CPU."""
    x = features.to(DEVICE).detach().requires_grad_()
    y = roi_align(x, boxes.to(DEVICE), grid)
    assert y.dtype == features.dtype
    (gradient,) = torch.autograd.grad(y, x, cotangent.to(y))
    assert gradient.dtype == features.dtype and gradient.shape == features.shape
    return y.detach().double().cpu(), gradient.double().cpu()


def assert_near(found, expected, dtype, cells):
    """Coordinates are float32 numbers up to `cells`, so their error grows with it."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=max(4, cells) * ROUNDING[dtype] * scale)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@on_device
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_values_and_gradients_follow_the_definition(dtype):
    H, W, C, grid = 4, 5, 3, 2
    boxes = torch.tensor([list(BOXES.values()), [*UNUSUAL_BOXES.values(), BOXES["inside"]]])
    features = random(2, H, W, C, dtype=dtype)
    cotangent = random(2, boxes.shape[1], grid, grid, C, dtype=dtype, seed=1)
    y, gradient = both(features, boxes, grid, cotangent)

    expected_y, expected_gradient = torch.zeros_like(y), torch.zeros_like(gradient)
    basis = np.eye(H * W).reshape(H, W, H * W)
    for b, k in np.ndindex(*boxes.shape[:2]):
        box = boxes[b, k].double().numpy()
        expected_y[b, k] = torch.from_numpy(slow_roi_align(features[b].double().numpy(), box, grid))
        weights = torch.from_numpy(slow_roi_align(basis, box, grid))  # of each feature cell in each output cell
        expected_gradient[b] += torch.einsum("ijn,ijc->nc", weights, cotangent[b, k].double()).reshape(H, W, C)
    assert_near(y, expected_y, dtype, 4)
    assert_near(gradient, expected_gradient, dtype, 4)


@on_device
@pytest.mark.parametrize("H, W, C, grid", [(2, 34, 3, 33), (2, 3, 65, 2), (1, 1, 1, 1)])
def test_sizes_beyond_one_tile_and_of_one_cell(H, W, C, grid):
    boxes = torch.tensor([[[0.02, 0.1, 0.97, 0.9]]])
    features, cotangent = random(1, H, W, C), random(1, 1, grid, grid, C, seed=1)
    y, gradient = both(features, boxes, grid, cotangent)
    expected = both(features.double(), boxes.double(), grid, cotangent.double(), composed.roi_align)
    assert_near(y, expected[0], torch.float32, W)
    assert_near(gradient, expected[1], torch.float32, W)


@on_device
def test_nan_in_a_box_reaches_the_output_as_in_the_composed_form():
    boxes = torch.tensor([[[0.1, 0.1, 0.9, 0.9], [0.1, float("nan"), 0.9, 0.9]], [[0.1, 0.1, 0.9, 0.9], [0.2, 0.2, 0.8, 0.8]]])
    features, cotangent = random(2, 3, 4, 2), random(2, 2, 2, 2, 2, seed=1)
    found = both(features, boxes, 2, cotangent)
    expected = both(features, boxes, 2, cotangent, composed.roi_align)
    for x, y in zip(found, expected, strict=True):
        assert y.isnan().any()
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6, equal_nan=True)


@on_device
@pytest.mark.parametrize("B, K", [(2, 0), (0, 2)])
def test_without_boxes_or_images_the_gradient_is_zero(B, K):
    y, gradient = both(random(B, 3, 4, 2), torch.zeros(B, K, 4), 2, torch.ones(B, K, 2, 2, 2))
    assert y.shape == (B, K, 2, 2, 2)
    assert gradient.shape == (B, 3, 4, 2) and not gradient.any()


@on_device
def test_tensors_that_are_not_contiguous():
    features = random(2, 3, 7, 4).transpose(2, 3)[:, :, 1:, :5]
    boxes = torch.tensor([[[0.1, 0.2, 0.9, 0.8]]]).expand(2, 3, 4)
    cotangent = torch.ones(()).expand(2, 3, 2, 2, 5)
    found = both(features, boxes, 2, cotangent)
    expected = both(features.contiguous(), boxes.contiguous(), 2, cotangent.contiguous())
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@on_device
def test_the_operator_obeys_the_rules_of_custom_operators():
    """Schema, fake implementation and registered gradient, as `torch.compile` needs them."""
    features, boxes = random(1, 2, 3, 2).to(DEVICE), torch.tensor([[[0.1, 0.2, 0.9, 0.8]]]).to(DEVICE)
    torch.library.opcheck(triton_roi_align.forward, (features.requires_grad_(), boxes, 2))
    torch.library.opcheck(triton_roi_align.backward, (random(1, 1, 2, 2, 2).to(DEVICE), boxes, 2, 3))


@on_device
def test_compiled_without_a_graph_break_values_and_gradients_are_the_same():
    compiled = torch.compile(triton_roi_align.roi_align, backend="aot_eager", fullgraph=True)
    arguments = random(1, 2, 3, 2), torch.tensor([[[0.1, 0.2, 0.9, 0.8]]]), 2, random(1, 1, 2, 2, 2, seed=1)
    found, expected = both(*arguments, compiled), both(*arguments)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_dtype_that_has_no_kernel_is_refused():
    with pytest.raises(ValueError, match="features_BHWC"):
        triton_roi_align.roi_align(random(1, 2, 3, 2).double(), torch.zeros(1, 1, 4), 2)
