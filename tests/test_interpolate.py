"""The position matrix against torch's own bicubic interpolation."""
import numpy as np
import pytest

from granvit.interpolate import position_matrix


@pytest.mark.parametrize("grid_from, grid_to", [(8, 4), (4, 7), (5, 5), (32, 16)])
def test_position_matrix_is_bicubic_interpolation(grid_from, grid_to):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).standard_normal((grid_from**2, 6)).astype(np.float32)
    grid = torch.from_numpy(table.T.reshape(1, 6, grid_from, grid_from))
    expected = torch.nn.functional.interpolate(grid, size=(grid_to, grid_to), mode="bicubic", align_corners=False)
    expected = expected.reshape(6, -1).T.numpy()
    np.testing.assert_allclose(position_matrix(grid_from, grid_to) @ table, expected, atol=2e-6)
