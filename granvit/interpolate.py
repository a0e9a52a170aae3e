"""Bicubic resampling of a square grid as one constant matrix, which both frameworks use."""
import numpy as np


def _taps(size_from: int, size_to: int) -> np.ndarray:
    """Cubic convolution weights `[size_to, size_from]`, a = -0.75, half-pixel centres, no antialiasing, edges repeated."""
    a = -0.75
    matrix = np.zeros((size_to, size_from))
    for row in range(size_to):
        centre = (row + 0.5) * size_from / size_to - 0.5
        first = int(np.floor(centre)) - 1
        for tap in range(first, first + 4):
            d = abs(centre - tap)
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[row, min(max(tap, 0), size_from - 1)] += weight
    return matrix


def position_matrix(grid_from: int, grid_to: int) -> np.ndarray:
    """`[grid_to**2, grid_from**2]` float32: `matrix @ positions` resamples a row-major grid of position embeddings.

    Equal to torch's `interpolate(mode="bicubic", align_corners=False, antialias=False)`, which all supported encoders use.
    """
    taps = _taps(grid_from, grid_to)
    return np.kron(taps, taps).astype(np.float32)
