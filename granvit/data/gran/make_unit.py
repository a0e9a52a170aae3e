"""Makes a unit: opens its images, annotates and filters them, and writes what is left as a small store of its own.

A unit's folder has the files of a store (granvit/data/store.py; also if no image is left), `fingerprints.bin`
(`granvit.data.leakage.fingerprint_of` for each image), and `unit.json` with the counts. It appears complete or not at all.
"""
import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from granvit.data.annotate.annotator import Chain, FoundRegion, KnownImage, Result
from granvit.data.filters import Filtered, apply_filters, image_reason
from granvit.data.gran.annotating import annotate_images
from granvit.data.gran.config import BuildConfig, ImageLimits, SourceConfig
from granvit.data.gran.failing import Failing
from granvit.data.gran.open_record import Opened, open_record
from granvit.data.gran.units import Item, Unit, items_of, whole_folder
from granvit.data.leakage import fingerprint_of
from granvit.data.records import ImageRecord, Region
from granvit.data.sources.annotated import Refused
from granvit.data.store import REGIONS
from granvit.data.store_writer import StoreWriter
from granvit.logs import log

BATCH = 16  # images that are decoded and annotated together
_PROGRESS = 60.0  # seconds between two lines about a unit
COUNTS, FINGERPRINTS = "unit.json", "fingerprints.bin"
# Edges of the report's histograms; the last bin of each is open.
EDGES: dict[str, list[float]] = {
    "boxes": [0, 1, 2, 3, 5, 8, 12, 20, 40, 80, 160],
    "area": [0, 10**3, 3162, 10**4, 31623, 10**5, 316228, 10**6],
    "aspect": [0, 1 / 3, 0.5, 2 / 3, 1, 1.5, 2, 3],
    "words": [0, 1, 2, 3, 5, 8, 12, 20, 40],
}


@dataclass
class Counts:
    """What became of the records of a unit or source. `records_read` = `images_written` + all of `images_dropped`;
    `regions_read` + `regions_found` (by annotators) = `regions_written` + all of `regions_dropped`.

    `globals_dropped` are captions of images that were refused by themselves. `histograms` are of what was written, by `EDGES`:
    boxes of an image, pixels and aspect ratio of a box, words of a caption.
    """

    records_read: int = 0
    images_written: int = 0
    images_dropped: Counter[str] = field(default_factory=Counter)
    regions_read: int = 0
    regions_found: int = 0
    regions_written: int = 0
    regions_dropped: Counter[str] = field(default_factory=Counter)
    globals_written: int = 0
    globals_dropped: Counter[str] = field(default_factory=Counter)
    reencoded: int = 0
    histograms: dict[str, list[int]] = field(default_factory=lambda: {name: [0] * len(edges) for name, edges in EDGES.items()})

    def check(self) -> None:
        """Nothing disappears uncounted."""
        assert self.records_read == self.images_written + self.images_dropped.total(), self
        assert self.regions_read + self.regions_found == self.regions_written + self.regions_dropped.total(), self

    def add(self, other: "Counts") -> None:
        """Adds the counts of another unit."""
        for name in ("records_read", "images_written", "regions_read", "regions_found", "regions_written", "globals_written",
                     "reencoded"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("images_dropped", "regions_dropped", "globals_dropped"):
            getattr(self, name).update(getattr(other, name))
        for name, bins in self.histograms.items():
            self.histograms[name] = [a + b for a, b in zip(bins, other.histograms[name], strict=True)]

    def written(self, record: ImageRecord) -> None:
        """Counts a record that is written."""
        self.images_written += 1
        self.regions_written += len(record.regions)
        self.globals_written += record.global_caption is not None
        self._in_histogram("boxes", len(record.regions))
        for region in record.regions:
            x1, y1, x2, y2 = region.box
            across, down = (x2 - x1) * record.width, (y2 - y1) * record.height
            self._in_histogram("area", across * down)
            self._in_histogram("aspect", across / down)
            self._in_histogram("words", len(region.caption.split()))

    def _in_histogram(self, name: str, value: float) -> None:
        self.histograms[name][int(np.searchsorted(EDGES[name], value, "right")) - 1] += 1


def read_counts(folder: Path) -> Counts:
    """The counts of a unit that is made, by its folder. `ValueError` names their file if it is missing or damaged."""
    path = folder / COUNTS
    try:
        tree = json.loads(path.read_text())
        tree |= {name: Counter(tree[name]) for name in ("images_dropped", "regions_dropped", "globals_dropped")}
        return Counts(**tree)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is missing or damaged ({error}); remove this folder and start again: {folder}") from None


def make_unit(config: BuildConfig, unit: Unit, annotators: Chain) -> None:
    """Makes a unit, unless that is done. `OSError` names the file where the disk is full. `ValueError` names the source if its
    folder of images is missing, or its images fail for one reason that is not theirs (`Failing`)."""
    if unit.folder.exists():
        return
    source, counts = config.sources[unit.source], Counts()
    if source.images is not None and not Path(source.images).is_dir():
        raise ValueError(f"sources.{unit.source}.images {source.images}: no such folder")
    with whole_folder(unit.folder) as folder:
        writer = StoreWriter(folder, REGIONS, config.shard_megabytes << 20)
        with open(folder / FINGERPRINTS, "wb") as fingerprints, ThreadPoolExecutor(4) as pool:
            for record, print_of_image in _records(config, source, unit, annotators, counts, writer, pool):
                writer.add(record)
                counts.written(record)
                fingerprints.write(print_of_image.tobytes())
        writer.finish("image")
        counts.check()
        (folder / COUNTS).write_text(json.dumps(vars(counts), indent=1) + "\n")


def _records(config: BuildConfig, source: SourceConfig, unit: Unit, annotators: Chain, counts: Counts, writer: StoreWriter,
             pool: ThreadPoolExecutor) -> Iterator[tuple[ImageRecord, np.ndarray]]:  # fmt: skip
    """The records that are left, with their fingerprints, in the order of the source."""
    items = items_of(config, unit)
    folder = None if source.images is None else Path(source.images)
    failing, told = Failing(unit.source), time.monotonic()

    def drop(name: str, reason: str, regions: int) -> None:
        counts.images_dropped[reason] += 1
        if regions:
            counts.regions_dropped[f"image left out: {reason}"] += regions
        writer.refuse(name, reason)

    def opened_or_reason(item: Item) -> Opened | str:
        if isinstance(item, Refused):
            return item.reason
        try:
            return open_record(item, folder, config.max_pixels)
        except ValueError as error:
            return str(error)

    while batch := list(islice(items, BATCH)):
        usable: list[tuple[Opened, KnownImage]] = []
        for item, found in zip(batch, pool.map(opened_or_reason, batch), strict=True):
            counts.records_read += 1
            if isinstance(item, Refused):
                drop(item.what, str(found), 0)
                continue
            failing.looked(found)
            stated = len(item.regions) + sum(what != "global" for what, _ in item.refused)
            counts.regions_read += stated
            if isinstance(found, str):
                drop(item.id, found, stated)
                continue
            height, width = found.pixels_HW3.shape[:2]
            if (reason := image_reason(width, height, source.filters)) is not None:
                drop(item.id, reason, stated)
                continue
            _count_refused(found.id, found.refused, counts, writer)
            usable.append((found, _known(found, source)))
        annotated = annotate_images(annotators, [known for _, known in usable], source.filters)
        for (found, known), image in zip(usable, annotated, strict=True):
            result = image.result
            failing.told(image.known, result)
            counts.regions_found += image.dropped.total() + len(result.regions) - len(known.regions)
            counts.regions_dropped.update(image.dropped)
            if result.failure is not None:
                drop(found.id, result.failure, len(result.regions))
                continue
            if image.reason is None:
                filtered = apply_filters(_annotated(found, result, counts, writer), source.filters)
            else:
                filtered = Filtered(None, image.reason, +Counter({image.reason: len(result.regions)}))
            if filtered.record is None:
                assert filtered.image_reason is not None
                counts.images_dropped[filtered.image_reason] += 1
                writer.refuse(found.id, filtered.image_reason)
            counts.regions_dropped.update(filtered.region_reasons)
            if filtered.record is not None:
                kept, changed = within_limits(filtered.record, found.pixels_HW3, config.image)
                counts.reencoded += changed
                yield kept, fingerprint_of(found.pixels_HW3)
        if time.monotonic() - told > _PROGRESS:
            told = time.monotonic()
            log.info(f"{unit.source}, unit {unit.number}: {counts.records_read:,} images read, {counts.images_written:,} kept")
    failing.end()


def _count_refused(name: str, refused: tuple[tuple[str, str], ...], counts: Counts, writer: StoreWriter) -> None:
    for what, reason in refused:
        (counts.globals_dropped if what == "global" else counts.regions_dropped)[reason] += 1
        writer.refuse(f"{name} {what}", reason)


def _known(opened: Opened, source: SourceConfig) -> KnownImage:
    """What annotators are told. Captions that the source's configuration does not keep are left out."""
    regions = tuple(FoundRegion(box, caption if source.keep_region_captions else "") for box, caption in opened.regions)
    return KnownImage(opened.pixels_HW3, regions, opened.global_caption if source.keep_global_captions else None)


def _annotated(opened: Opened, result: Result, counts: Counts, writer: StoreWriter) -> ImageRecord:
    """The record after annotating, without the regions that have no caption. Those are counted by the annotator's reason, if it
    gave one."""
    reasons = dict(result.refused)
    regions = []
    for number, region in enumerate(result.regions):
        if region.caption.strip():
            regions.append(Region(region.box, region.caption.strip()))
            continue
        reason = reasons.get(f"region {number}", "region: no caption")
        counts.regions_dropped[reason] += 1
        writer.refuse(f"{opened.id} region {number}", reason)
    if "global" in reasons:
        counts.globals_dropped[reasons["global"]] += 1
        writer.refuse(f"{opened.id} global", reasons["global"])
    height, width = opened.pixels_HW3.shape[:2]
    return ImageRecord(opened.id, width, height, opened.image, result.global_caption or None, tuple(regions))


def within_limits(record: ImageRecord, pixels_HW3: np.ndarray, limits: ImageLimits) -> tuple[ImageRecord, bool]:
    """The record, and whether its image was encoded again: scaled down, or because its file was too large. Boxes are relative, so
    they stay. `pixels_HW3` are the decoded pixels."""
    side = max(record.width, record.height)
    if side <= limits.max_side and len(record.image) <= limits.max_bytes:
        return record, False
    scale = min(1.0, limits.max_side / side)
    size = max(round(record.width * scale), 1), max(round(record.height * scale), 1)
    image = Image.fromarray(pixels_HW3)
    if scale < 1:
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=limits.quality)
    return ImageRecord(record.id, *size, buffer.getvalue(), record.global_caption, record.regions), True
