"""Patch features of two encoders on held-out images for the demo's report: principal components and region similarity maps.

Layout letters: B images, K regions per image, N patches, g patches along a side, C width, R image side.
"""
import importlib
import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from granvit.data.batch import record_pixels
from granvit.data.images import box_to_features, to_square
from granvit.data.prompts import Box
from granvit.data.records import ImageRecord
from granvit.data.store import MAX_PIXELS
from granvit.launch import Framework
from granvit.models import Level, VisionConfig
from granvit.probe.features import load_region_encoder

CELLS = 4  # ROIAlign cells along a side of a region, as in the demo's self-distillation
_RANGE = (2, 98)  # percentiles of a component that become the darkest and the brightest value


@dataclass(frozen=True)
class Features:
    """Features of B images, float32: of every patch `[B, g, g, C]`, row by row, and the mean ROIAlign feature of every region,
    `[B, K, C]`. Images with fewer than K regions repeat their last one."""

    patches_BggC: np.ndarray
    regions_BKC: np.ndarray


def features_of(framework: Framework, directories: Sequence[Path], level: Level, vision: VisionConfig,
                records: Sequence[ImageRecord]) -> list[Features]:  # fmt: skip
    """`patch_features` of each encoder in `directories`, computed in a process that ends with this call.

    The demo starts training runs after its first report. A framework in the demo's own process would keep threads and hundreds
    of megabytes meanwhile, and set environment variables that the runs inherit.
    """
    # The warnings are about weights of a run that are no part of its encoder.
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=logging.disable, initargs=(logging.WARNING,)) as pool:
        futures = [pool.submit(patch_features, framework, directory, level, vision, records) for directory in directories]
        return [future.result() for future in futures]


def patch_features(framework: Framework, directory: Path, level: Level, vision: VisionConfig,
                   records: Sequence[ImageRecord]) -> Features:  # fmt: skip
    """Features of the encoder in `directory` (a run or a publisher's directory) on the records' images, each with at least one
    region, in one batch on the CPU. MindSpore's process stays in PyNative mode.

    A `RegionEncoder` averages the features under boxes. A box without extent at the centre of a patch gives the feature of that
    patch, and ROIAlign with `CELLS` x `CELLS` cells is that of as many parts of the box with one cell each.
    """
    pixels_B3RR = np.stack([to_square(record_pixels(record, MAX_PIXELS), vision) for record in records])
    most, grid = max(len(record.regions) for record in records), vision.grid
    centres = [(x, y, x, y) for y in (np.arange(grid) + 0.5) / grid for x in (np.arange(grid) + 0.5) / grid]
    rows = []
    for record in records:
        boxes = [box_to_features(region.box, record.width, record.height, vision) for region in record.regions]
        boxes += boxes[-1:] * (most - len(boxes))
        rows.append([*centres, *(part for box in boxes for part in _parts(box))])
    boxes_BK4 = np.array(rows, np.float32)
    crop_size = vision.patch_size  # one ROIAlign cell for each box; the crops themselves are not needed
    encoder = load_region_encoder(framework, directory, level, crop_size, None, "cpu")
    crops_BK3rr = np.zeros((*boxes_BK4.shape[:2], 3, crop_size, crop_size), np.uint8)
    if framework == "mindspore":  # compiling the graph takes longer than the one batch
        mindspore = importlib.import_module("mindspore")
        mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    found_BKC = encoder.features(pixels_B3RR, boxes_BK4, crops_BK3rr)[0]
    patches_BggC = found_BKC[:, : grid**2].reshape(len(records), grid, grid, -1)
    regions_BKC = found_BKC[:, grid**2 :].reshape(len(records), most, CELLS**2, -1).mean(2)
    if not np.isfinite(found_BKC).all():
        raise ValueError(f"{directory}: its features are not finite; the weights are damaged")
    return Features(patches_BggC, regions_BKC)


def _parts(box: Box) -> list[Box]:
    """The `CELLS` x `CELLS` equal parts of a box."""
    x1, y1, x2, y2 = box
    xs, ys = (np.linspace(low, high, CELLS + 1).tolist() for low, high in ((x1, x2), (y1, y2)))
    return [(xs[j], ys[i], xs[j + 1], ys[i + 1]) for i in range(CELLS) for j in range(CELLS)]


def component_colours(patches_BggC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first three principal components of the patch features as colours, float64 `[B, g, g, 3]` in 0..1, and the share of the
    variance that each of them has, `[3]`.

    The components are fitted to all given patches, centred by their mean. The sign of a component is chosen so that the channel
    with the largest weight counts positive. Each component is scaled so that 0 is the 2nd and 1 the 98th percentile over the
    given patches; values beyond are clipped. A component without variance is 0.5.
    """
    flat = patches_BggC.reshape(-1, patches_BggC.shape[-1]).astype(np.float64)
    centred = flat - flat.mean(0)
    _, lengths, basis = np.linalg.svd(centred, full_matrices=False)
    basis = basis[:3]
    basis *= np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(1)])[:, None]
    values = centred @ basis.T
    low, high = np.percentile(values, _RANGE, axis=0)
    spread = high - low
    scaled = np.where(spread > 1e-9, (values - low) / np.maximum(spread, 1e-9), 0.5).clip(0, 1)
    variances = lengths**2
    return scaled.reshape(*patches_BggC.shape[:3], 3), variances[:3] / max(variances.sum(), 1e-12)


def similarity_map(region_C: np.ndarray, patches_ggC: np.ndarray) -> np.ndarray:
    """The cosine of a region's feature with the feature of every patch, float64 `[g, g]`."""
    region_C, patches_ggC = region_C.astype(np.float64), patches_ggC.astype(np.float64)
    lengths = np.linalg.norm(patches_ggC, axis=-1) * np.linalg.norm(region_C)
    return patches_ggC @ region_C / np.maximum(lengths, 1e-12)
