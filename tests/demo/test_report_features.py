"""Features of the demo's report against the encoder itself, an eigendecomposition, and loops."""
import sys

import numpy as np
import pytest

from granvit.data.images import box_to_square, decode, to_square
from granvit.data.store import MAX_PIXELS
from granvit.demo.features import CELLS, component_colours, features_of, similarity_map
from granvit.models import vision_shapes
from tests.demo.toy_demo import RECORDS
from tests.probe.conftest import VISION, values, write_encoder


def test_features_are_those_of_every_patch_and_of_regions_by_roi_align(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from pt_granvit import load_encoder
    from tests.probe.test_features import pooled

    for name, seed in (("encoder", 1), ("other", 2)):
        write_encoder(tmp_path / name, VISION, values(vision_shapes(VISION), seed))
    records = RECORDS[:3]
    monkeypatch.delitem(sys.modules, "pt_granvit.probe", raising=False)
    found, again = features_of("torch", [tmp_path / "encoder", tmp_path / "other"], "penultimate", VISION, records)
    assert "pt_granvit.probe" not in sys.modules  # they were computed in another process
    assert not np.allclose(found.patches_BggC, again.patches_BggC)  # each directory has its own features
    encoder = load_encoder(tmp_path / "encoder", device="cpu")
    for b, record in enumerate(records):
        pixels = torch.from_numpy(to_square(decode(record.image, MAX_PIXELS), VISION)[None])
        with torch.no_grad():
            expected = encoder(encoder.normalise(pixels), level="penultimate")[0].numpy()
        map_HWC = expected.reshape(VISION.grid, VISION.grid, -1).astype(np.float64)
        np.testing.assert_allclose(found.patches_BggC[b], map_HWC, rtol=1e-4, atol=1e-5)
        for k, region in enumerate(record.regions):
            roi = pooled(map_HWC, box_to_square(region.box, record.width, record.height), CELLS)
            np.testing.assert_allclose(found.regions_BKC[b, k], roi.mean((0, 1)), rtol=1e-4, atol=1e-5)


def test_components_are_the_eigenvectors_with_the_largest_variance():
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((5, 4, 4, 10)) * np.linspace(4, 0.5, 10) @ np.linalg.qr(rng.standard_normal((10, 10)))[0] + 3
    colours, shares = component_colours(patches)
    flat = patches.reshape(-1, 10)
    variances, vectors = np.linalg.eigh(np.cov(flat.T))
    np.testing.assert_allclose(shares, variances[::-1][:3] / variances.sum())
    assert colours.shape == (5, 4, 4, 3) and colours.min() == 0 and colours.max() == 1
    for k in range(3):
        vector = vectors[:, -1 - k]
        vector = vector * np.sign(vector[np.abs(vector).argmax()])
        value = (flat - flat.mean(0)) @ vector
        low, high = np.percentile(value, (2, 98))
        np.testing.assert_allclose(colours[..., k].ravel(), np.clip((value - low) / (high - low), 0, 1), atol=1e-9)


def test_features_that_are_all_equal_are_grey():
    colours, shares = component_colours(np.ones((2, 3, 3, 8)))
    assert (colours == 0.5).all() and (shares == 0).all()


def test_similarity_is_the_cosine():
    rng = np.random.default_rng(1)
    region, patches = rng.standard_normal(6), rng.standard_normal((3, 3, 6))
    found = similarity_map(region, patches)
    for i in range(3):
        for j in range(3):
            u, v = region, patches[i, j]
            assert found[i, j] == pytest.approx(sum(u * v) / (sum(u * u) * sum(v * v)) ** 0.5)
    assert similarity_map(region, region[None, None] * 2)[0, 0] == pytest.approx(1)
