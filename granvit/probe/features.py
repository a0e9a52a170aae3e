"""Features of a sample's regions from one encoder, computed by either framework.

Layout letters: B images in a batch, K regions per image, R image side, r crop side, C width, N regions in the sample.
"""
import importlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from granvit.data.batch import record_pixels
from granvit.data.images import box_to_features, crop, to_square
from granvit.data.store import MAX_PIXELS
from granvit.launch import FRAMEWORKS, Framework, load_engine_class
from granvit.models import Level, VisionConfig
from granvit.probe.sample import Sample, read_record
from granvit.probe.scores import pair_cosines

_THREADS = 4  # that read, decode and crop
_AHEAD = 3  # batches prepared ahead
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
Done = Callable[[int], None]  # called with the number of images finished


class RegionEncoder(Protocol):
    """One framework's encoder, for evaluation. `ms_granvit.probe` and `pt_granvit.probe` implement it.

    `device` is cpu, cuda or npu; `dtype_name` is the dtype of weights and activations.
    """

    device: str
    dtype_name: str

    def __init__(self, directory: str | Path, level: Level, crop_size: int, dtype: str | None, device: str):
        """Loads the encoder of `directory` (see `load_encoder`). Features are those of `level`.

        `crop_size` is the side of the crops; if their patch grid is not the image's, positions are resampled. `dtype` is float32
        or bfloat16; None: float32 on cpu, bfloat16 on an accelerator. `device` is a value of `runtime.device`.
        """

    def features(self, pixels_B3RR: np.ndarray, boxes_BK4: np.ndarray, crops_BK3rr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean ROIAlign feature under each box, float32 `[B, K, C]`, and the cosines of each box with each crop, float32
        `[B, K, K]`.

        Pixels are uint8, boxes float32 xyxy relative to the feature map. ROIAlign has one cell for each patch of a crop. A cosine
        is computed for each cell between the ROIAlign feature and the crop's patch feature, and averaged over the cells.
        """


def load_region_encoder(framework: Framework, directory: str | Path, level: Level, crop_size: int, dtype: str | None,
                        device: str) -> RegionEncoder:  # fmt: skip
    """The framework's `RegionEncoder`; `ValueError` if the framework is not installed."""
    load_engine_class(framework)  # says how to install it
    return importlib.import_module(f"{FRAMEWORKS[framework][0]}.probe").RegionEncoder(directory, level, crop_size, dtype, device)


@dataclass(frozen=True)
class RegionFeatures:
    """Features of all regions of a sample, float32 `[N, C]`, and the cosines of each region with its own crop and (mean) with the
    other crops of its image, float64 `[N]`; both are NaN for the only region of an image."""

    features_NC: np.ndarray
    matched_N: np.ndarray
    mismatched_N: np.ndarray


def compute_features(encoder: RegionEncoder, vision: VisionConfig, crop_size: int, sample: Sample, batch: int,
                     done: Done) -> RegionFeatures:  # fmt: skip
    """Runs the encoder over the sample's images and crops in batches of `batch` images, all of one shape.

    Images with fewer regions than the sample's largest number are padded with boxes, and the last batch with images, which are
    left out of the result. The image is the whole image at the encoder's own resolution (no tiles). `ValueError` names an image
    that cannot be decoded.
    """
    features, matched, mismatched = [], [], []
    for first, arrays in _batches(vision, crop_size, sample, batch):
        features_BKC, cosines_BKK = encoder.features(*arrays)
        here = sample.regions_of[first : first + batch]
        for b, regions in enumerate(here):
            count = len(regions)
            features.append(features_BKC[b, :count])
            own, others = (pair_cosines(cosines_BKK[b, :count, :count].astype(np.float64)) if count > 1
                           else (np.array([np.nan]), np.array([np.nan])))  # fmt: skip
            matched.append(own)
            mismatched.append(others)
        done(len(here))
    found = RegionFeatures(np.concatenate(features), np.concatenate(matched), np.concatenate(mismatched))
    if not np.isfinite(found.features_NC).all():
        raise ValueError(f"{vision.name}: its features are not finite; the weights are damaged, or float32 is needed (--dtype)")
    return found


def _batches(vision: VisionConfig, crop_size: int, sample: Sample, batch: int) -> Iterator[tuple[int, Arrays]]:
    """Yields the position of the first image and the arrays of each batch; threads prepare the next ones."""
    firsts = deque(range(0, len(sample.images), batch))
    waiting: deque[tuple[int, list[Future[Arrays]]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            while firsts or waiting:
                while firsts and len(waiting) < _AHEAD:
                    first = firsts.popleft()
                    numbers = range(first, min(first + batch, len(sample.images)))
                    waiting.append((first, [pool.submit(_image_arrays, vision, crop_size, sample, i) for i in numbers]))
                first, rows = waiting.popleft()
                pixels, boxes, crops = (np.stack(arrays) for arrays in zip(*(row.result() for row in rows), strict=True))
                missing = batch - len(rows)
                yield first, tuple(np.concatenate([a, np.repeat(a[-1:], missing, 0)]) for a in (pixels, boxes, crops))
        finally:
            pool.shutdown(cancel_futures=True)


def _image_arrays(vision: VisionConfig, crop_size: int, sample: Sample, number: int) -> Arrays:
    """Pixels `[3, R, R]`, boxes `[K, 4]` and crops `[K, 3, r, r]` of image `number` of the sample, padded to K regions."""
    record = read_record(sample.store, sample.images[number])
    try:
        image_HW3 = record_pixels(record, MAX_PIXELS)
    except ValueError as error:
        raise ValueError(f"store {sample.store.path}: record {record.id}: {error}") from None
    boxes_K4 = np.tile(np.array([0, 0, 1, 1], np.float32), (sample.most_regions, 1))  # with an area, for ROIAlign
    crops_K3rr = np.zeros((sample.most_regions, 3, crop_size, crop_size), np.uint8)
    for k, region in enumerate(sample.regions_of[number]):
        box = record.regions[region].box
        boxes_K4[k] = box_to_features(box, record.width, record.height, vision)
        crops_K3rr[k] = crop(image_HW3, box, 1.0, crop_size, vision.resize)
    return to_square(image_HW3, vision), boxes_K4, crops_K3rr
