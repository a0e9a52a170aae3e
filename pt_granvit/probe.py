"""Region features and crop features of one encoder (see `granvit.probe.features.RegionEncoder`).

Layout letters: B images, K boxes per image, R image side, r crop side, N patches, C width, g patches along a side of a crop.
"""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from granvit.models import Level
from pt_granvit.arrays import DTYPES
from pt_granvit.distill import side, student_features
from pt_granvit.distributed import choose_device
from pt_granvit.vision import VisionEncoder


class RegionEncoder:
    """`granvit.probe.features.RegionEncoder` over PyTorch."""

    def __init__(self, directory: str | Path, level: Level, crop_size: int, dtype: str | None, device: str):
        self.level, self.device = level, choose_device(device)
        self.dtype_name = dtype or ("float32" if self.device == "cpu" else "bfloat16")
        stored = DTYPES[self.dtype_name]
        self.encoder = VisionEncoder.from_pretrained(directory, dtype=stored, device=self.device)
        config = self.encoder.config
        self.crop_encoder = self.encoder
        if crop_size // config.patch_size != config.grid:
            self.crop_encoder = VisionEncoder.from_pretrained(directory, crop_size, stored, self.device)

    @torch.inference_mode()
    def features(self, pixels_B3RR: np.ndarray, boxes_BK4: np.ndarray, crops_BK3rr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean ROIAlign features `[B, K, C]` and cosines between boxes and crops `[B, K, K]`, float32."""
        pixels, boxes, crops = (torch.from_numpy(array).to(self.device) for array in (pixels_B3RR, boxes_BK4, crops_BK3rr))
        B, K = boxes.shape[:2]
        image_BNC = self._at_level(self.encoder, pixels)
        crops_BKNC = self._at_level(self.crop_encoder, crops.flatten(0, 1)).unflatten(0, (B, K)).float()
        regions_BKNC = student_features(image_BNC, boxes, side(crops_BKNC.shape[2]), None).flatten(2, 3).float()
        cosines_BKK = unit(regions_BKNC).flatten(2) @ unit(crops_BKNC).flatten(2).transpose(1, 2) / crops_BKNC.shape[2]
        return regions_BKNC.mean(2).cpu().numpy(), cosines_BKK.cpu().numpy()

    def _at_level(self, encoder: VisionEncoder, pixels_B3RR: Tensor) -> Tensor:
        return encoder.levels(encoder.normalise(pixels_B3RR))[self.level]


def unit(features: Tensor) -> Tensor:
    """Features divided by their lengths along the last axis."""
    return features * (features.square().sum(-1, keepdim=True) + 1e-12).rsqrt()
