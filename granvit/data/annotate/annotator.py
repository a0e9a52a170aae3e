"""The interface of annotators, which add regions and captions to images, and chains of them.

The paper (section 3) detects boxes with ViTDet, writes captions with Qwen2.5-VL-7B, and reads OCR images with PaddleOCR. Here a
`Detector`, a `Captioner` and `Ocr` do that; the first two take any local model of their kind. Each works offline, except for the
server that `EndpointCaptioner` is pointed at.
"""
import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from granvit.data.prompts import Box


class Failed(Exception):
    """An image, or a part of it, could not be annotated. The text is a fixed sentence without names or numbers of the image."""


@dataclass(frozen=True)
class FoundRegion:
    """A box (xyxy relative to the image's width and height, 0 <= x1 < x2 <= 1, y alike) and what is known about it.

    `caption` is empty if there is none. `score` is the model's confidence in box or text, 0..1; None for boxes of a source.
    """

    box: Box
    caption: str = ""
    score: float | None = None


@dataclass(frozen=True, eq=False)
class KnownImage:
    """An image, upright RGB uint8 `[H, W, 3]` as `granvit.data.images.decode` returns it, and what is known about it so far."""

    pixels_HW3: np.ndarray
    regions: tuple[FoundRegion, ...] = ()
    global_caption: str | None = None


@dataclass(frozen=True)
class Result:
    """What is known about an image after an annotator: all its regions, those known before first, and its caption.

    `refused` has `(what, reason)` for each part that could not be annotated: "global", or "region N" of `regions`. `failure` is
    the reason if nothing could be done with the image; then the rest is what was known before. Reasons are fixed sentences
    without names or numbers of the image, so that equal reasons can be counted.
    """

    regions: tuple[FoundRegion, ...] = ()
    global_caption: str | None = None
    refused: tuple[tuple[str, str], ...] = ()
    failure: str | None = None


class Annotator(Protocol):
    """Adds regions or captions. Its fields are its keys in the configuration.

    Models are loaded and connections opened at first use; an annotator is copied to other processes before that.
    """

    @property
    def finds_regions(self) -> bool:
        """Whether it adds regions; others write captions alone."""
        ...

    @property
    def version(self) -> str:
        """Identifies model files, packages and all settings that results depend on: other results have another version.

        Computed from the contents of the model's files, which takes a second per gigabyte, once per object.
        """
        ...

    def annotate(self, batch: Sequence[KnownImage]) -> list[Result]:
        """One result per image, in order. A result depends on its image and the settings, not on the rest of the batch.

        An image that cannot be annotated has a result that says so. `ValueError` names what is wrong with the settings, the
        model's files or the installation; `ConnectionError` names a server that cannot be reached. Both concern all images, and
        a run should stop.
        """
        ...


@dataclass(frozen=True)
class Chain:
    """Annotators one after the other, such as detecting, captioning the boxes found, and captioning the image.

    An image that an annotator fails at is not given to those after it.
    """

    annotators: tuple[Annotator, ...]

    def halves(self) -> tuple["Chain", "Chain"]:
        """The annotators up to the last one that finds regions, and those after it. Either can be empty."""
        ends = [number for number, annotator in enumerate(self.annotators, 1) if annotator.finds_regions]
        end = max(ends, default=0)
        return Chain(self.annotators[:end]), Chain(self.annotators[end:])

    @property
    def finds_regions(self) -> bool:
        return any(annotator.finds_regions for annotator in self.annotators)

    @cached_property
    def version(self) -> str:
        return fingerprint({"chain": [annotator.version for annotator in self.annotators]})

    def annotate(self, batch: Sequence[KnownImage]) -> list[Result]:
        results = [Result(image.regions, image.global_caption) for image in batch]
        for annotator in self.annotators:
            alive = [number for number, result in enumerate(results) if result.failure is None]
            images = [replace(batch[n], regions=results[n].regions, global_caption=results[n].global_caption) for n in alive]
            for number, result in zip(alive, annotator.annotate(images), strict=True):
                results[number] = replace(result, refused=(*results[number].refused, *result.refused))
        return results


def failed(image: KnownImage, reason: str) -> Result:
    """The result of an image that nothing could be done with."""
    return Result(image.regions, image.global_caption, failure=reason)


def fingerprint(settings: Mapping[str, Any], packages: Iterable[str] = (), files: Iterable[Path] = ()) -> str:
    """Identifies settings (what JSON can hold), the installed versions of packages, and files with their names and contents."""
    tree = {
        "settings": settings,
        "packages": {name: package_version(name) for name in packages},
        "files": {path.name: _digest(path) for path in files},
    }
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def needed(*modules: str) -> Any:
    """Imports packages that only annotators need and returns the first. `ValueError` says what to install."""
    try:
        first, *_ = [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise ValueError(f"annotating needs {' and '.join(modules)} ({error}): pip install -e '.[annotate,torch]'") from None
    return first


def relative_box(x1: float, y1: float, x2: float, y2: float, width: int, height: int) -> Box | None:
    """A box in pixels, clipped to the image and divided by its size; None if no area is left or a number is NaN."""
    x1, x2 = (min(max(x / width, 0.0), 1.0) for x in (x1, x2))
    y1, y2 = (min(max(y / height, 0.0), 1.0) for y in (y1, y2))
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None
