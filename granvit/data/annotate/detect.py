"""Boxes of objects by a detection model of transformers in a local directory: DETR, RT-DETR, YOLOS and so on.

The paper detects with ViTDet, whose detector transformers does not have (only its backbone): a detector trained on the same
categories takes its place.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from granvit.data.annotate.annotator import FoundRegion, KnownImage, Result, failed, fingerprint, needed, relative_box
from granvit.data.annotate.model_directory import loaded, loaded_model, model_files


@dataclass(frozen=True)
class Detector:
    """Detects with the model in `directory`; an image that has regions keeps them and is not searched (paper section 3).

    Boxes with a confidence above `score` are kept, the most confident first. `label_captions`: their caption is the name of the
    label, otherwise it is empty. The model computes in float32 on `device` (granvit/data/annotate/device.py), one image
    at a time, because padding to a common size changes what it finds. Images are resized by the model's own processor, the one
    that uses Pillow. `device` is not part of `version`, though devices round differently.
    """

    finds_regions: ClassVar[bool] = True
    directory: str | Path
    score: float = 0.5
    label_captions: bool = False
    device: str = "cpu"

    @cached_property
    def version(self) -> str:
        settings = {"detector": 1, "score": self.score, "label_captions": self.label_captions}
        return fingerprint(settings, ["transformers"], model_files(self.directory))

    @cached_property
    def _model(self) -> Any:
        model_files(self.directory)
        auto_class = needed("transformers", "torch").AutoModelForObjectDetection
        return loaded_model(auto_class, self.directory, self.device, "float32")

    @cached_property
    def _processor(self) -> Any:
        return loaded(needed("transformers").AutoImageProcessor, self.directory, use_fast=False)

    def annotate(self, batch: Sequence[KnownImage]) -> list[Result]:
        model, processor = self._model, self._processor
        return [self._annotated(image, model, processor) for image in batch]

    def _annotated(self, image: KnownImage, model: Any, processor: Any) -> Result:
        if image.regions:
            return Result(image.regions, image.global_caption)
        height, width = image.pixels_HW3.shape[:2]
        try:
            inputs = processor(images=image.pixels_HW3, input_data_format="channels_last", return_tensors="pt").to(model.device)
            outputs = model(**inputs)
            found = processor.post_process_object_detection(outputs, threshold=self.score, target_sizes=[(height, width)])[0]
        except Exception as error:  # the size of this image can be the cause
            return failed(image, f"detection failed ({type(error).__name__})")
        regions = []
        scores, labels, boxes = (found[key].tolist() for key in ("scores", "labels", "boxes"))
        for score, label, (x1, y1, x2, y2) in zip(scores, labels, boxes, strict=True):
            relative = relative_box(x1, y1, x2, y2, width, height)
            if relative is not None:
                caption = str(model.config.id2label[label]) if self.label_captions else ""
                regions.append(FoundRegion(relative, caption, score))
        regions.sort(key=lambda region: (-(region.score or 0.0), region.box))
        return Result(tuple(regions), image.global_caption)
