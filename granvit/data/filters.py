"""The filters of Gran-29M: which images and regions are kept, by bounds that say whether they include their limit.

The defaults are the paper's (section 3): the shorter side of the image is above 448 pixels, the aspect ratio of image and box
lies between 1/3 and 3 (both included here; the paper does not say), a box has more than 100^2 pixels, and an image has at least
one box. Sizes are those of the original image, upright. The paper's own pictures of OCR data show boxes far outside of these
bounds, so each source has its own filters.
"""
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from granvit.data.prompts import Box
from granvit.data.records import ImageRecord, Region
from granvit.models import Strict

NUMBER_OF_BOXES = "image: number of boxes"  # a reason


def _number(value: object) -> Fraction:
    """A number, or a fraction such as "1/3", exactly. `ValueError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Fraction)):
        raise ValueError(f"{value!r} is not a number or a fraction such as 1/3")
    return Fraction(value)


Number = Annotated[Fraction, BeforeValidator(_number)]


class Bounds(Strict):
    """Limits of a quantity. `above` and `below` exclude their limit, `at_least` and `at_most` include it."""

    above: Number | None = None
    at_least: Number | None = None
    below: Number | None = None
    at_most: Number | None = None

    def hold(self, value: Fraction) -> bool:
        """Whether a value lies within all limits that are set."""
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )


THIRD_TO_THREE = Bounds(at_least=Fraction(1, 3), at_most=Fraction(3))


class Filters(Strict):
    """The filters of a source. `boxes` bounds the number of regions that are left; an image without regions is judged by it too.

    `caption_words` bounds the words of a region's caption, by white space. `repeated_captions: drop` leaves out all regions of an
    image whose caption another region of it has too (compared without case and spacing): Caption2Bbox has no one answer for them.
    """

    shorter_side: Bounds = Bounds(above=Fraction(448))
    image_aspect: Bounds = THIRD_TO_THREE
    box_aspect: Bounds = THIRD_TO_THREE
    box_area: Bounds = Bounds(above=Fraction(100**2))
    boxes: Bounds = Bounds(at_least=Fraction(1))
    caption_words: Bounds = Bounds()
    repeated_captions: Literal["keep", "drop"] = Field("keep")


@dataclass(frozen=True)
class Filtered:
    """What is left of a record (None: nothing), why the image was left out (None: it was not), and the regions left out of an
    image by reason. The regions of an image that is left out count under its own reason."""

    record: ImageRecord | None
    image_reason: str | None
    region_reasons: Counter[str]


def apply_filters(record: ImageRecord, filters: Filters) -> Filtered:
    """Applies the filters in the order of their fields. A region is counted once, under the first bound that it violates.

    A box's sides are those of the stored box times the image's width and height, rounded to 1/1000 of a pixel: stored boxes are
    relative, and a box of exactly 100 x 100 pixels must not become one of 100.0000001.
    """
    width, height = record.width, record.height
    if (of_image := image_reason(width, height, filters)) is not None:
        return Filtered(None, of_image, Counter({of_image: len(record.regions)}))
    reasons: Counter[str] = Counter()
    repeated = _repeated(record.regions) if filters.repeated_captions == "drop" else set()
    kept = []
    for region in record.regions:
        reason = _region_reason(region, width, height, filters)
        if reason is None and _comparable(region.caption) in repeated:
            reason = "region: repeated caption"
        if reason is None:
            kept.append(region)
        else:
            reasons[reason] += 1
    if not filters.boxes.hold(Fraction(len(kept))):
        return Filtered(None, NUMBER_OF_BOXES, reasons + Counter({NUMBER_OF_BOXES: len(kept)}))
    return Filtered(replace(record, regions=tuple(kept)), None, reasons)


def image_reason(width: int, height: int, filters: Filters) -> str | None:
    """Why an image of this size is left out whatever its regions are, None if it is not: known before anything is annotated."""
    if not filters.shorter_side.hold(Fraction(min(width, height))):
        return "image: shorter side"
    return None if filters.image_aspect.hold(Fraction(width, height)) else "image: aspect ratio"


def box_reason(box: Box, width: int, height: int, filters: Filters) -> str | None:
    """Why a region with this box is left out whatever its caption is, None if it is not: known before it has a caption."""
    x1, y1, x2, y2 = box
    across, down = _pixels((x2 - x1) * width), _pixels((y2 - y1) * height)
    if not down or not filters.box_aspect.hold(across / down):
        return "region: aspect ratio of the box"
    return None if filters.box_area.hold(across * down) else "region: area of the box"


def has_too_few_boxes(count: int, filters: Filters) -> bool:
    """Whether an image with so many regions is left out, however many of them are left out later."""
    return not Bounds(above=filters.boxes.above, at_least=filters.boxes.at_least).hold(Fraction(count))


def _region_reason(region: Region, width: int, height: int, filters: Filters) -> str | None:
    if (of_box := box_reason(region.box, width, height, filters)) is not None:
        return of_box
    return None if filters.caption_words.hold(Fraction(len(region.caption.split()))) else "region: words of the caption"


def _pixels(length: float) -> Fraction:
    return Fraction(round(length * 1000), 1000)


def _comparable(caption: str) -> str:
    return " ".join(caption.casefold().split())


def _repeated(regions: tuple[Region, ...]) -> set[str]:
    counts = Counter(_comparable(region.caption) for region in regions)
    return {caption for caption, count in counts.items() if count > 1}
