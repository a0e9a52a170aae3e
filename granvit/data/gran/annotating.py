"""Annotates the images of a build. Boxes and images that the filters leave out whatever their captions are get no caption: each
costs a request to a large model."""
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from granvit.data.annotate.annotator import Chain, KnownImage, Result
from granvit.data.filters import NUMBER_OF_BOXES, Filters, box_reason, has_too_few_boxes


@dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """An image after its annotators. `known` is what was known before, `result` what is known now, both without the regions that
    were left out before captions were written; `dropped` counts those by reason. `reason`: why the image was left out then (None:
    it was not)."""

    known: KnownImage
    result: Result
    dropped: Counter[str] = field(default_factory=Counter)
    reason: str | None = None


def annotate_images(chain: Chain, images: Sequence[KnownImage], filters: Filters) -> list[AnnotatedImage]:
    """Annotates images. Before annotators that only write captions, and come after all that find regions, the regions that break
    a bound of the box are left out, and then the images that have too few regions.

    What is written and counted is the same as with these filters at the end, with two exceptions. A region that breaks a bound
    counts under it, though it may have got no caption. And it is not known whether its caption would have repeated another one's.
    """
    finders, captioners = chain.halves()
    done = [AnnotatedImage(image, result) for image, result in zip(images, finders.annotate(images), strict=True)]
    if not captioners.annotators:
        return done
    done = [image if image.result.failure is not None else _filtered(image, filters) for image in done]
    asked = [number for number, image in enumerate(done) if image.result.failure is None and image.reason is None]
    shown = [KnownImage(images[n].pixels_HW3, done[n].result.regions, done[n].result.global_caption) for n in asked]
    for number, result in zip(asked, captioners.annotate(shown), strict=True):
        refused = (*done[number].result.refused, *result.refused)
        done[number] = replace(done[number], result=replace(result, refused=refused))
    return done


def _filtered(image: AnnotatedImage, filters: Filters) -> AnnotatedImage:
    known, result = image.known, image.result
    height, width = known.pixels_HW3.shape[:2]
    reasons = [box_reason(region.box, width, height, filters) for region in result.regions]
    kept = [number for number, reason in enumerate(reasons) if reason is None]
    names = {f"region {number}": f"region {place}" for place, number in enumerate(kept)}
    gone = {f"region {number}" for number, reason in enumerate(reasons) if reason is not None}
    return AnnotatedImage(
        replace(known, regions=tuple(known.regions[number] for number in kept if number < len(known.regions))),
        replace(
            result,
            regions=tuple(result.regions[number] for number in kept),
            refused=tuple((names.get(what, what), reason) for what, reason in result.refused if what not in gone),
        ),
        Counter(reason for reason in reasons if reason is not None),
        NUMBER_OF_BOXES if has_too_few_boxes(len(kept), filters) else None,
    )
