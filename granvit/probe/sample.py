"""The regions that a probe looks at, and their division into classes, training and test images, small and large.

Everything here depends on the store and the seed alone, so that all encoders are compared on the same regions.
"""
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from granvit.data.prompts import Box
from granvit.data.records import ImageRecord
from granvit.data.store import REGIONS, Store

TRAIN_IMAGES = 3  # a class needs regions in so many training images
FEWEST = 2 * TRAIN_IMAGES - 1  # images: with fewer, one half is too small
WHOLE, LAST_WORD = "caption", "last-word"  # the values of `--label` that are not regular expressions


@dataclass(frozen=True)
class Sample:
    """The chosen images of a store (`images`: their indices) and regions. Arrays `_R` have one entry per chosen region, in order.

    `regions_of` holds for each chosen image the indices of its chosen regions; `image_R` int64 the position in `images` of a
    region's image; `area_R` float64 the area of its box divided by that of the image. `left_out` counts the regions of the
    chosen images that were not chosen.
    """

    store: Store
    images: tuple[int, ...]
    regions_of: tuple[tuple[int, ...], ...]
    captions_R: tuple[str, ...]
    image_R: np.ndarray
    area_R: np.ndarray
    left_out: int

    @property
    def most_regions(self) -> int:
        """The largest number of chosen regions of one image."""
        return max(map(len, self.regions_of))


def read_record(store: Store, image: int) -> ImageRecord:
    """Record `image` of a region store; `ValueError` names it if it is damaged."""
    try:
        record = store.record(image)
    except ValueError as error:
        raise ValueError(f"store {store.path}: image {image}: {error}") from None
    assert isinstance(record, ImageRecord)  # the store is one of regions
    return record


def choose(store: Store, images: int, regions: int, seed: int) -> Sample:
    """Chooses up to `images` images that have regions, evenly spaced over the store, and up to `regions` regions of each.

    If an image has more, they are chosen at random by `seed` and the image's index. `ValueError` if the store has no regions.
    """
    if store.kind != REGIONS:
        raise ValueError(f"store {store.path} is a {store.kind.format} store; the probe needs regions: name a region store")
    with_regions = np.flatnonzero(np.diff(store.region_starts) > 0)
    if not len(with_regions):
        raise ValueError(f"store {store.path} holds no regions, only global captions; name a store with regions")
    places = np.linspace(0, len(with_regions) - 1, min(images, len(with_regions))).round().astype(int)
    chosen = tuple(with_regions[places].tolist())
    regions_of: list[tuple[int, ...]] = []
    captions: list[str] = []
    areas: list[float] = []
    left_out = 0
    for image in chosen:
        record = read_record(store, image)
        count = len(record.regions)
        kept = np.random.default_rng((seed, image)).permutation(count)[:regions]
        regions_of.append(tuple(sorted(kept.tolist())))
        left_out += count - len(kept)
        captions += [record.regions[region].caption for region in regions_of[-1]]
        areas += [_area(record.regions[region].box) for region in regions_of[-1]]
    image_R = np.repeat(np.arange(len(chosen)), [len(kept) for kept in regions_of])
    return Sample(store, chosen, tuple(regions_of), tuple(captions), image_R, np.array(areas), left_out)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def labels(captions: Sequence[str], rule: str) -> list[str | None]:
    """The class of each caption in lower case, None for a caption without one.

    `rule` is `caption` (the whole caption), `last-word` (its last run of letters and digits), or a regular expression: the first
    text that it matches, or its first group if it has groups. `ValueError` if it is not a valid expression.
    """
    texts = [" ".join(caption.lower().split()) for caption in captions]
    if rule == WHOLE:
        return list(texts)
    if rule == LAST_WORD:
        return [words[-1] if (words := re.findall(r"\w+", text)) else None for text in texts]
    try:
        expression = re.compile(rule, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"--label {rule!r}: neither {WHOLE}, {LAST_WORD} nor a regular expression ({error})") from None
    group = min(expression.groups, 1)
    return [match[group] or None if (match := expression.search(text)) else None for text in texts]


@dataclass(frozen=True)
class Split:
    """The regions with a class, divided by image. `class_R` int64 is the index into `names`, -1 without a class; `train_R` and
    `test_R` are bool and false without a class. `distinct` counts the classes before rare ones were left out."""

    names: tuple[str, ...]
    class_R: np.ndarray
    train_R: np.ndarray
    test_R: np.ndarray
    distinct: int


def split(sample: Sample, rule: str, seed: int) -> Split:
    """Labels the regions and divides the images at random (`seed`) into two halves, for training and for testing.

    A class is kept if it has regions in at least `TRAIN_IMAGES` images of the training half and in one of the test half. The
    training half is the larger one if their number is odd. `ValueError` if the training half has fewer than `TRAIN_IMAGES` images
    or fewer images than there are classes, if there are fewer than two classes, or no test images.
    """
    count, path = len(sample.images), sample.store.path
    if count < FEWEST:
        few = "one image" if count == 1 else f"{count} images"
        raise ValueError(
            f"store {path}: {few} with regions; the probe needs at least {FEWEST}: one half trains, and a class needs "
            f"{TRAIN_IMAGES} training images; the other half tests. Raise --images or name a larger store"
        )
    training = (count + 1) // 2
    found = labels(sample.captions_R, rule)
    in_training = np.zeros(count, bool)
    in_training[np.random.default_rng(seed).permutation(count)[:training]] = True
    in_half = {half: Counter(name for name, image in set(zip(found, sample.image_R.tolist(), strict=True))
                             if in_training[image] == half) for half in (True, False)}  # fmt: skip
    distinct = [name for name in dict.fromkeys(found) if name is not None]
    names = sorted(name for name in distinct if in_half[True][name] >= TRAIN_IMAGES and in_half[False][name] >= 1)
    if len(names) < 2 or len(names) > training:
        examples = ", ".join(repr(name) for name in distinct[:3])
        few = "fewer images than classes" if len(distinct) > training else "too few regions per class"
        raise ValueError(
            f"store {path}: {few}: --label {rule} gives {len(distinct)} classes ({examples}, ...) in {count} images, {training} "
            f"of them for training, and {len(names)} classes have regions in {TRAIN_IMAGES} training images and a test image; at "
            f"least 2 and at most {training} classes can be probed: raise --images, name a larger store, or take coarser "
            f"classes, as in --label {LAST_WORD}"
        )
    index = {name: number for number, name in enumerate(names)}
    class_R = np.array([-1 if name is None else index.get(name, -1) for name in found])
    train_R = in_training[sample.image_R]
    return Split(tuple(names), class_R, train_R & (class_R >= 0), ~train_R & (class_R >= 0), len(distinct))


def size_groups(area_R: np.ndarray, small: float, large: float) -> dict[str, np.ndarray]:
    """Masks of the regions by size: `all`; `small` below the area `small`; `large` from `large` on; `medium` between. Groups
    without a region are left out."""
    masks = {"all": np.full(len(area_R), True), "small": area_R < small, "medium": (area_R >= small) & (area_R < large),
             "large": area_R >= large}  # fmt: skip
    return {name: mask for name, mask in masks.items() if mask.any()}
