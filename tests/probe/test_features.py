"""Region features and crop cosines of both frameworks against a computation region by region, in numpy."""
import numpy as np
import pytest

from granvit.data.images import box_to_square, crop, decode, to_square
from granvit.data.store import MAX_PIXELS
from granvit.probe.features import compute_features, load_region_encoder
from granvit.probe.sample import choose
from tests.probe.conftest import VISION

torch = pytest.importorskip("torch")
from pt_granvit import load_encoder  # noqa: E402 (needs torch)

CROP = 24  # not the image's side: positions are resampled


def bilinear(map_HWC: np.ndarray, x: float, y: float) -> np.ndarray:
    """The map at a point in cells, clamped to the centres of the border cells."""
    height, width = map_HWC.shape[:2]
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    a, b = x - left, y - top
    return ((1 - a) * (1 - b) * map_HWC[top, left] + a * (1 - b) * map_HWC[top, left + 1]
            + (1 - a) * b * map_HWC[top + 1, left] + a * b * map_HWC[top + 1, left + 1])  # fmt: skip


def pooled(map_HWC: np.ndarray, box, grid: int) -> np.ndarray:
    """ROIAlign with 2 x 2 samples per cell, `[grid, grid, C]`."""
    height, width = map_HWC.shape[:2]
    x1, y1, x2, y2 = box
    at = lambda low, high, cell, sample: low + (high - low) * (cell + (sample + 0.5) / 2) / grid  # noqa: E731
    return np.array([[np.mean([bilinear(map_HWC, at(x1, x2, j, b) * width - 0.5, at(y1, y2, i, a) * height - 0.5)
                               for a in range(2) for b in range(2)], 0) for j in range(grid)] for i in range(grid)])  # fmt: skip


@pytest.fixture(scope="module")
def expected(encoders, regions):
    """Mean features and cosines with own and other crops of every region, one image and one crop at a time."""
    whole, of_crops = (load_encoder(encoders / "start", side, device="cpu") for side in (None, CROP))

    def features(encoder, pixels_3RR):
        with torch.no_grad():
            found = encoder(encoder.normalise(torch.from_numpy(pixels_3RR[None])), level="penultimate")[0].numpy()
        side = int(len(found) ** 0.5)
        return found.reshape(side, side, -1).astype(np.float64)

    means, matched, mismatched = [], [], []
    for image in range(30):
        record = regions.record(image)
        pixels = decode(record.image, MAX_PIXELS)
        image_map = features(whole, to_square(pixels, VISION))
        boxes = [box_to_square(region.box, record.width, record.height) for region in record.regions]
        rois = [pooled(image_map, box, CROP // VISION.patch_size) for box in boxes]
        crops = [features(of_crops, crop(pixels, region.box, 1.0, CROP, VISION.resize)) for region in record.regions]

        def cosine(a, b):
            return np.mean([[u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(p, q, strict=True)]
                            for p, q in zip(a, b, strict=True)])  # fmt: skip

        for number, roi in enumerate(rois):
            means.append(roi.mean((0, 1)))
            matched.append(cosine(roi, crops[number]) if len(rois) > 1 else np.nan)
            others = [cosine(roi, other) for place, other in enumerate(crops) if place != number]
            mismatched.append(np.mean(others) if others else np.nan)
    return np.array(means), np.array(matched), np.array(mismatched)


@pytest.mark.parametrize("framework", ["torch", "mindspore"])
def test_features_and_cosines_are_those_of_each_region_by_itself(framework, encoders, regions, expected):
    pytest.importorskip(framework)
    sample, finished = choose(regions, 100, 8, 0), []
    encoder = load_region_encoder(framework, encoders / "start", "penultimate", CROP, None, "cpu")
    found = compute_features(encoder, VISION, CROP, sample, 8, finished.append)  # 30 images: the last batch is padded
    assert finished == [8, 8, 8, 6]
    means, matched, mismatched = expected
    np.testing.assert_allclose(found.features_NC, means, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.matched_N, matched, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.mismatched_N, mismatched, rtol=0, atol=1e-5)
    assert np.nanstd(mismatched) > 1e-3 and np.isnan(matched).sum() == 6
    if framework == "mindspore":
        assert len(encoder.compile_cache) == 1


def test_mindspore_refuses_bfloat16_on_cpu(encoders):
    pytest.importorskip("mindspore")
    with pytest.raises(ValueError, match="--dtype bfloat16"):
        load_region_encoder("mindspore", encoders / "start", "penultimate", 32, "bfloat16", "cpu")
