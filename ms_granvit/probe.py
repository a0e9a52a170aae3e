"""Region features and crop features of one encoder (see `granvit.probe.features.RegionEncoder`).

Layout letters: B images, K boxes per image, R image side, r crop side, N patches, C width, g patches along a side of a crop.
"""
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from granvit.models import Level
from ms_granvit.arrays import DTYPES
from ms_granvit.distill import side, student_features
from ms_granvit.distributed import use_device
from ms_granvit.vision import VisionEncoder


class RegionEncoder(nn.Cell):
    """`granvit.probe.features.RegionEncoder` over MindSpore: one graph, compiled at the first batch."""

    def __init__(self, directory: str | Path, level: Level, crop_size: int, dtype: str | None, device: str):
        super().__init__(auto_prefix=False)
        self.device = device = use_device(device)
        if device == "cpu" and dtype not in (None, "float32"):
            raise ValueError(f"--dtype {dtype}: MindSpore computes in float32 on cpu; leave --dtype out")
        ms.set_context(mode=ms.GRAPH_MODE)
        self.level, self.dtype_name = level, dtype or ("float32" if device == "cpu" else "bfloat16")
        stored = DTYPES[self.dtype_name]
        self.encoder = VisionEncoder.from_pretrained(directory, dtype=stored, device=device)
        config = self.encoder.config
        self.crop_encoder = self.encoder
        if crop_size // config.patch_size != config.grid:
            self.crop_encoder = VisionEncoder.from_pretrained(directory, crop_size, stored, device)
            self.crop_encoder.update_parameters_name("crop.")

    def features(self, pixels_B3RR: np.ndarray, boxes_BK4: np.ndarray, crops_BK3rr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean ROIAlign features `[B, K, C]` and cosines between boxes and crops `[B, K, K]`, float32."""
        regions_BKC, cosines_BKK = self(Tensor(pixels_B3RR), Tensor(boxes_BK4), Tensor(crops_BK3rr))
        return regions_BKC.asnumpy(), cosines_BKK.asnumpy()

    def construct(self, pixels_B3RR: Tensor, boxes_BK4: Tensor, crops_BK3rr: Tensor) -> tuple[Tensor, Tensor]:
        B, K, _, r, _ = crops_BK3rr.shape
        image_BNC = self.at_level(self.encoder, pixels_B3RR)
        crops_BNC = ops.cast(self.at_level(self.crop_encoder, crops_BK3rr.reshape(B * K, 3, r, r)), ms.float32)
        N, C = crops_BNC.shape[1:]
        regions_BKNC = ops.cast(student_features(image_BNC, boxes_BK4, side(N), None), ms.float32).reshape(B, K, N, C)
        own = unit(regions_BKNC).reshape(B, K, N * C)
        cosines_BKK = ops.BatchMatMul(transpose_b=True)(own, unit(crops_BNC).reshape(B, K, N * C)) / N
        return ops.mean(regions_BKNC, 2), cosines_BKK

    def at_level(self, encoder: VisionEncoder, pixels_B3RR: Tensor) -> Tensor:
        return encoder.levels(encoder.normalise(pixels_B3RR))[self.level]


def unit(features: Tensor) -> Tensor:
    """Features divided by their lengths along the last axis."""
    return features * ops.rsqrt(ops.sum(ops.square(features), -1, True) + 1e-12)
