"""The operators that parity compares one by one, with inputs that include their edge cases."""
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from granvit.kernels import Operator
from parity.fixture import Fixture


@dataclass(frozen=True)
class Case:
    """One call of `granvit.introspection.Introspection.operate`. `kernel` is the operator of `granvit.kernels` that it runs, if
    it is one that has several implementations, and `sizes` what its choice depends on."""

    label: str
    operator: str
    arrays: list[np.ndarray]
    differentiate: int
    out: tuple[int, ...]  # shape of the output
    options: dict[str, Any] = field(default_factory=dict)
    kernel: Operator | None = None
    sizes: dict[str, Any] = field(default_factory=dict)


def cases(fixture: Fixture) -> Iterator[Case]:
    """Every operator, with its edge cases."""
    rng = np.random.default_rng((fixture.seed, 21))
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731

    features = normal(2, 6, 6, 8)
    boxes = np.array([
        [[0.1, 0.2, 0.7, 0.55], [0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5]],  # inside; the whole image; empty
        [[0.9, 0.9, 1, 1], [0.31, 0.3, 0.33, 0.31], [0, 0.4, 0.05, 1]],  # a corner; smaller than a cell; along a border
    ], np.float32)  # fmt: skip
    roi_align = {"options": {"grid": 3}, "kernel": "roi_align", "sizes": {"grid": 3}}
    yield Case("roi_align", "roi_align", [features, boxes], 1, (2, 3, 3, 3, 8), **roi_align)
    outside = np.array([[[-0.2, 0.5, 0.3, 1.4]], [[0.8, 0.7, 0.1, 0.2]]], np.float32)  # beyond the image; inverted
    yield Case("roi_align, one box, width 13", "roi_align", [normal(2, 5, 7, 13), outside], 1, (2, 1, 3, 3, 13), **roi_align)

    segments = np.array([[0] * 8 + [1] * 5 + [2] * 4 + [-1] * 3, [0] * 6 + [1] * 6 + [2] * 3 + [3] * 5], np.int32)
    q, k, v = normal(2, 4, 20, 8), normal(2, 2, 20, 8), normal(2, 2, 20, 8)
    masked = {"kernel": "attention", "sizes": {"head_dim": 8, "masked": True, "cached": False}}
    yield Case("attention, shared prefix, grouped queries", "attention", [q, k, v, segments], 3, q.shape, **masked)
    unmasked = {"kernel": "attention", "sizes": {"head_dim": 8, "masked": False, "cached": False}}
    yield Case("attention over all", "attention_all", [q, 4 * normal(2, 4, 20, 8), normal(2, 4, 20, 8)], 3, q.shape, **unmasked)
    wide = {"kernel": "attention", "sizes": {"head_dim": 72, "masked": True, "cached": False}}
    one = [normal(1, 2, 33, 72) for _ in range(3)]
    yield Case("attention, one row, head width 72", "attention", [*one, np.array([[0] * 9 + [1] * 24], np.int32)], 3,
               one[0].shape, **wide)  # fmt: skip

    positions = np.stack([np.arange(20), np.r_[np.arange(8), np.arange(8, 14), np.arange(8, 14)]]).astype(np.int32)
    for theta in (1e4, 1e6):
        yield Case(f"rope, theta {theta:.0e}", "rope", [q, positions], 1, q.shape, {"theta": theta}, "rope")

    for eps in (1e-5, 1e-6):
        small = normal(3, 7, 16) * 10.0 ** rng.uniform(-2.5, 1, (3, 7, 1)).astype(np.float32)  # some rows are as small as eps
        weight, bias = 1 + 0.3 * normal(16), 0.3 * normal(16)
        yield Case(f"layer norm, eps {eps:.0e}", "layer_norm", [small, weight, bias], 1, small.shape, {"eps": eps}, "layer_norm")
        yield Case(f"RMS norm, eps {eps:.0e}", "rms_norm", [small, weight], 1, small.shape, {"eps": eps}, "rms_norm")

    line = np.r_[np.linspace(-9, 9, 181), 3 * rng.standard_normal(75)].astype(np.float32)
    for kind in ("gelu_tanh", "gelu", "quick_gelu", "silu"):
        yield Case(kind, kind, [line], 1, line.shape, kernel="gelu" if kind == "gelu_tanh" else None)
    yield Case("swiglu", "swiglu", [line, rng.permutation(line)], 2, line.shape, kernel="swiglu")

    hidden, head = normal(5, 12), normal(31, 12)
    targets, weights = rng.integers(0, 31, 5).astype(np.int32), np.array([1, 0, 1, 0.5, 1], np.float32)
    yield Case("cross-entropy", "cross_entropy", [hidden, head, targets, weights], 2, (), kernel="cross_entropy",
               sizes={"positions": 5, "vocab": 31, "trained": True})  # fmt: skip

    vision = fixture.vision
    table = normal(vision.patches + vision.class_token, vision.width)
    for grid in (vision.grid - 1, 2 * vision.grid + 1):
        out = (1, grid**2 + vision.class_token, vision.width)
        options = {"vision": vision, "image_size": grid * vision.patch_size}
        yield Case(f"positions, {vision.grid} to {grid} a side", "positions", [table], 1, out, options)

    pixels = np.resize(np.arange(256, dtype=np.uint8), (1, 3, vision.image_size, vision.image_size))
    yield Case("pixels", "pixels", [pixels], 0, pixels.shape, {"vision": vision})

    tiles, grids = normal(2, 4, 3, 3, 8), np.array([[2, 2], [1, 3]], np.int32)  # the second image has one tile less
    yield Case("roi_align over tiles", "roi_align_tiled", [tiles, grids, boxes], 1, (2, 3, 3, 3, 8), {"grid": 3})
    yield Case("pixel shuffle", "pixel_shuffle", [normal(2, 16, 8)], 1, (2, 4, 32))
