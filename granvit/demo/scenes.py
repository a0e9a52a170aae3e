"""The demo's region data: photographs with coloured shapes and words drawn onto them.

The backgrounds are crops of photographs from scikit-image's package (nothing is downloaded); training and held-out scenes use
different photographs. Each scene has four objects that do not overlap. An object is one of 4 shapes in 6 colours and 2 sizes, or
one of 8 words in 6 colours. All words have four letters, so that the shape of a box says little about the word. Boxes are exact:
the extent of the outline, or of the glyphs at `SUPERSAMPLING` times the size. Scenes are square, 128 x 128 pixels, so the demo
does not use padding; the tests do.
"""
import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from granvit.data.records import ImageRecord, Region

PHOTOGRAPHS = {
    "train": ("astronaut.png", "brick.png", "camera.png", "coffee.png", "coins.png", "grass.png", "hubble_deep_field.jpg",
              "ihc.png", "rocket.jpg"),
    "heldout": ("chelsea.png", "gravel.png", "moon.png", "motorcycle_left.png", "retina.jpg"),
}  # fmt: skip
COLOURS = {
    "red": (214, 40, 40),
    "yellow": (246, 205, 40),
    "green": (40, 158, 66),
    "blue": (42, 92, 214),
    "purple": (142, 62, 176),
    "white": (244, 244, 240),
}
SHAPES = ("circle", "square", "triangle", "star")
WORDS = ("exit", "stop", "cafe", "taxi", "open", "sale", "milk", "park")
SIZES = {"small": (22.0, 28.0), "large": (40.0, 52.0)}  # pixels, the larger side
WORD_HEIGHT = (16, 22)  # font size in pixels
OBJECTS = 4
WORD_SHARE = 0.25
SIDE = 128  # pixels
MARGIN = 3  # pixels between two boxes, and between a box and the border
SUPERSAMPLING = 4
WORD_RIM = 3  # supersampled pixels


def scenes_version() -> str:
    """A hash of this file. Where it changes, scenes of the same seed are taken to be others."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Stamp:
    """One object, ready to be pasted.

    `mask` is the coverage of the whole object, `inner` that of the part inside its rim, both at `SUPERSAMPLING` times the size in
    the image. `extent` is (width, height) in pixels of the image.
    """

    caption: str
    colour: str
    mask: Image.Image
    inner: Image.Image
    extent: tuple[float, float]


@cache
def _photograph(name: str) -> Image.Image:
    import skimage.data

    path = Path(skimage.data.__file__).parent / name
    if not path.exists():
        raise ValueError(
            f"{path}: no such photograph, though scikit-image's wheel has it; pip install --force-reinstall scikit-image"
        )
    return Image.open(path).convert("RGB")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"), size)


def _outline(shape: str, angle: float) -> np.ndarray:
    """Vertices `[n, 2]` of the shape about its centre, circumradius 1, turned by `angle` radians."""
    turns = {
        "circle": np.linspace(0, 2 * np.pi, 64, endpoint=False),
        "square": np.arange(4) * np.pi / 2 + np.pi / 4,
        "triangle": np.arange(3) * 2 * np.pi / 3 - np.pi / 2,
        "star": np.arange(10) * np.pi / 5 - np.pi / 2,
    }[shape]
    radius = np.where(np.arange(10) % 2, 0.45, 1.0) if shape == "star" else np.ones(len(turns))
    return radius[:, None] * np.stack([np.cos(turns + angle), np.sin(turns + angle)], -1)


def _shape(rng: np.random.Generator) -> Stamp:
    size, colour, shape = (str(rng.choice(options)) for options in (list(SIZES), list(COLOURS), SHAPES))
    vertices = _outline(shape, rng.uniform(-0.25, 0.25))
    vertices -= vertices.min(0)
    vertices *= rng.uniform(*SIZES[size]) / vertices.max()
    width, height = vertices.max(0)
    canvas = (int(np.ceil(width)) * SUPERSAMPLING, int(np.ceil(height)) * SUPERSAMPLING)
    mask, inner = Image.new("L", canvas), Image.new("L", canvas)
    ImageDraw.Draw(mask).polygon([tuple(v) for v in vertices * SUPERSAMPLING], fill=255)
    centre = vertices.mean(0)
    ImageDraw.Draw(inner).polygon([tuple(v) for v in (centre + (vertices - centre) * 0.86) * SUPERSAMPLING], fill=255)
    return Stamp(f"{size} {colour} {shape}", colour, mask, inner, (float(width), float(height)))


def _word(rng: np.random.Generator) -> Stamp:
    word, colour = str(rng.choice(WORDS)), str(rng.choice(list(COLOURS)))
    font = _font(int(rng.integers(*WORD_HEIGHT, endpoint=True)) * SUPERSAMPLING)
    x1, y1, x2, y2 = map(int, font.getbbox(word, stroke_width=WORD_RIM))
    mask, inner = Image.new("L", (x2 - x1, y2 - y1)), Image.new("L", (x2 - x1, y2 - y1))
    ImageDraw.Draw(mask).text((-x1, -y1), word, font=font, fill=255, stroke_width=WORD_RIM)
    ImageDraw.Draw(inner).text((-x1, -y1), word, font=font, fill=255)
    ink = mask.getbbox()  # the box of the drawn pixels; the font's own box has margins
    assert ink is not None, word
    left, top, right, bottom = ink
    across, down = (-(-side // SUPERSAMPLING) * SUPERSAMPLING for side in (right - left, bottom - top))
    mask, inner = (layer.crop((left, top, left + across, top + down)) for layer in (mask, inner))
    return Stamp(f'the word "{word}" in {colour}', colour, mask, inner,
                 ((right - left) / SUPERSAMPLING, (bottom - top) / SUPERSAMPLING))  # fmt: skip


def _background(rng: np.random.Generator, split: str) -> Image.Image:
    """A randomly placed, scaled, mirrored and lit crop of one of the split's photographs."""
    photograph = _photograph(str(rng.choice(PHOTOGRAPHS[split])))
    room = min(photograph.size) / SIDE
    side = SIDE * rng.uniform(min(1.0, room), min(room, 3.5))
    x, y = rng.uniform(0, photograph.width - side), rng.uniform(0, photograph.height - side)
    crop = photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop.point([int(v) for v in np.clip(np.arange(256) * rng.uniform(0.7, 1.1), 0, 255)] * 3)


def _place(rng: np.random.Generator, stamps: list[Stamp]) -> list[tuple[int, int]] | None:
    """Random top left corners of the stamps, without overlap; None if one stamp found no place in 40 attempts."""
    occupied: list[tuple[float, float, float, float]] = []
    corners: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(stamps)), key=lambda i: -max(stamps[i].extent)):
        w, h = stamps[index].extent
        for _ in range(40):
            x = int(rng.integers(MARGIN, SIDE - int(np.ceil(w)) - MARGIN))
            y = int(rng.integers(MARGIN, SIDE - int(np.ceil(h)) - MARGIN))
            if all(x > b[2] + MARGIN or x + w + MARGIN < b[0] or y > b[3] + MARGIN or y + h + MARGIN < b[1] for b in occupied):
                break
        else:
            return None
        occupied.append((x, y, x + w, y + h))
        corners[index] = (x, y)
    return [corners[i] for i in range(len(stamps))]


def _paste(image: Image.Image, stamp: Stamp, corner: tuple[int, int], rng: np.random.Generator) -> None:
    """Draws the stamp onto the image: its colour, slightly varied, and a darker rim."""
    size = (stamp.mask.width // SUPERSAMPLING, stamp.mask.height // SUPERSAMPLING)
    colour = np.clip(np.array(COLOURS[stamp.colour]) * rng.uniform(0.9, 1.05) + rng.normal(0, 5, 3), 0, 255)
    for mask, tone in ((stamp.mask, colour * 0.55), (stamp.inner, colour)):
        coverage = mask.resize(size, Image.Resampling.BOX)
        image.paste(tuple(int(c) for c in tone), (*corner, corner[0] + size[0], corner[1] + size[1]), coverage)


def compose(rng: np.random.Generator, split: str, identifier: str) -> ImageRecord:
    """One scene: `OBJECTS` objects with distinct captions, and a global caption that names them from left to right."""
    corners = None
    while corners is None:
        stamps = [_word(rng) if rng.random() < WORD_SHARE else _shape(rng) for _ in range(OBJECTS)]
        if len({stamp.caption for stamp in stamps}) == OBJECTS:
            corners = _place(rng, stamps)
    image = _background(rng, split)
    regions = []
    for stamp, (x, y) in zip(stamps, corners, strict=True):
        _paste(image, stamp, (x, y), rng)
        box = (x / SIDE, y / SIDE, (x + stamp.extent[0]) / SIDE, (y + stamp.extent[1]) / SIDE)
        regions.append(Region(box, stamp.caption))
    named = sorted(regions, key=lambda r: r.box[0] + r.box[2])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return ImageRecord(
        id=identifier,
        width=SIDE,
        height=SIDE,
        image=buffer.getvalue(),
        global_caption="from left to right: " + ", ".join(r.caption for r in named),
        regions=tuple(regions),
    )


def scene(split: str, seed: int, index: int) -> ImageRecord:
    """Scene number `index` of the split (`train` or `heldout`); it depends only on the three arguments."""
    return compose(np.random.default_rng((seed, list(PHOTOGRAPHS).index(split), index)), split, f"{split}-{index:06d}")


def scenes(split: str, count: int, seed: int) -> Iterator[ImageRecord]:
    """The first `count` scenes of the split, computed on all cores."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(partial(scene, split, seed), range(count), chunksize=32)
