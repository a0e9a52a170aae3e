"""Lines of text with their boxes, by PaddleOCR's models as the package `rapidocr` carries and runs them (PP-OCRv6 small, for
Chinese, English and other Latin script), with onnxruntime on the CPU. Nothing is downloaded.

The paper used PaddleOCR 3.0. `rapidocr-onnxruntime`, the package's earlier name, carries PP-OCRv4, which joins English words.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from granvit.data.annotate.annotator import (
    Failed,
    FoundRegion,
    KnownImage,
    Result,
    failed,
    fingerprint,
    needed,
    relative_box,
)

MODELS = {
    "Det": "PP-OCRv6_det_small.onnx",
    "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
    "Rec": "PP-OCRv6_rec_small.onnx",
}
# The package enlarges the shorter side to 736 pixels, so that time and memory grow with the ratio of the sides: an image of
# 500 x 1 pixels takes minutes.
LONGEST = 8


@dataclass(frozen=True)
class Ocr:
    """Adds a region per line of text, in reading order; its caption is the text, its score that of recognition.

    The box is the smallest upright one around the found polygon. Lines with a score below `score` are dropped. `threads` is the
    number of onnxruntime's threads; results do not depend on it. An image that is more than 8 times as long as wide, or as wide
    as long, fails.
    """

    finds_regions: ClassVar[bool] = True
    score: float = 0.8
    threads: int = 1

    @cached_property
    def version(self) -> str:
        return fingerprint({"ocr": 1, "score": self.score}, ["rapidocr", "onnxruntime"], self._files.values())

    @property
    def _files(self) -> dict[str, Path]:
        folder = Path(needed("rapidocr", "onnxruntime").__file__).parent / "models"
        files = {part: folder / name for part, name in MODELS.items()}
        for path in files.values():
            if not path.is_file():
                raise ValueError(f"{path}: no such file, though rapidocr's wheel has it; pip install -e '.[annotate]'")
        return files

    @cached_property
    def _engine(self) -> Any:
        threads = "EngineConfig.onnxruntime.{}_op_num_threads"
        params = {
            **{f"{part}.model_path": str(path) for part, path in self._files.items()},
            **{threads.format(kind): self.threads for kind in ("intra", "inter")},
            "Global.text_score": self.score,
            "Global.log_level": "error",
        }
        engine = needed("rapidocr").RapidOCR(params=params)
        blank = np.full((48, 48, 3), 255, np.uint8)
        for use_det in (False, True):  # loads the three models now, so that a damaged file is not taken for a bad image
            try:
                engine(blank, use_det=use_det)
            except Exception as error:
                raise ValueError(f"rapidocr cannot use its models in {self._files['Det'].parent}: {error}") from error
        return engine

    def annotate(self, batch: Sequence[KnownImage]) -> list[Result]:
        engine = self._engine
        return [self._annotated(image, engine) for image in batch]

    def _annotated(self, image: KnownImage, engine: Any) -> Result:
        try:
            regions = self._lines(image.pixels_HW3, engine)
        except Failed as error:
            return failed(image, str(error))
        return Result((*image.regions, *regions), image.global_caption)

    def _lines(self, pixels_HW3: np.ndarray, engine: Any) -> list[FoundRegion]:
        height, width = pixels_HW3.shape[:2]
        if max(width, height) > LONGEST * min(width, height):
            raise Failed("image is too narrow to be read")
        try:
            found = engine(np.ascontiguousarray(pixels_HW3[:, :, ::-1]))  # BGR
        except Exception as error:  # of OpenCV, onnxruntime or the package
            raise Failed(f"text recognition failed ({type(error).__name__})") from error
        if found.boxes is None:
            return []
        regions = []
        for polygon_42, text, score in zip(found.boxes, found.txts, found.scores, strict=True):
            (x1, y1), (x2, y2) = polygon_42.min(0).tolist(), polygon_42.max(0).tolist()
            box = relative_box(x1, y1, x2, y2, width, height)
            if box is not None and text.strip():
                regions.append(FoundRegion(box, text.strip(), float(score)))
        return regions
