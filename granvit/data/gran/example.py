"""Pictures for the worked example of a build (`make data`, configs/gran_example.yaml). Nothing is downloaded.

    python -m granvit.data.gran.example FOLDER                    # writes the sources
    python -m granvit.data.gran.example FOLDER --compare STORE    # how much of the unlabelled documents the build has read

FOLDER gets photographs from scikit-image's package, and from scikit-learn's where that is installed, with captions and boxes that
were written for them by hand, one photograph twice; the scanned pages of scikit-image; and documents that are drawn here, which
are letters, tables and receipts. `documents` have their true text and boxes beside them. `unlabelled` are more of them, whose
truth the build does not see: `unlabelled.jsonl` is for the comparison.
"""
import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from granvit.data.prompts import Box
from granvit.data.records import ImageRecord
from granvit.data.store import Store
from granvit.exit_status import exit_status
from granvit.logs import log, to_console
from granvit.metrics import iou

DOCUMENTS, UNLABELLED = 24, 12  # a third each are letters, tables and receipts
AGAIN = "again.jpg"  # a photograph that is there twice, in other bytes
Pixels = tuple[int, int, int, int]
_SCIKIT_IMAGE = "skimage/data"
_SCANS = ("page.png", "text.png")
# Photographs by package and file: the global caption, then boxes in pixels with their captions.
_PHOTOGRAPHS: dict[str, dict[str, tuple[str, tuple[tuple[Pixels, str], ...]]]] = {
    _SCIKIT_IMAGE: {
        "astronaut.png": ("A smiling astronaut in an orange suit before a flag and a model of a space shuttle", (
            ((0, 0, 95, 300), "a flag with red and white stripes"), ((157, 0, 306, 172), "the head of a smiling woman"),
            ((280, 326, 512, 512), "a helmet with a black visor"), ((350, 0, 450, 325), "a model of a space shuttle"))),
        "camera.png": ("A man in a dark coat looks through a camera on a tripod, on a lawn", (
            ((0, 65, 280, 512), "a man in a dark coat"), ((215, 190, 405, 512), "the legs of a tripod"),
            ((410, 122, 438, 196), "a tall tower in the distance"))),
        "chelsea.png": ("The face of a tabby cat with green eyes", (
            ((142, 88, 208, 145), "the left eye of a cat"), ((292, 104, 351, 154), "the right eye of a cat"),
            ((235, 220, 300, 262), "the nose of a cat"))),
        "coffee.png": ("A cup of coffee on a red saucer with a spoon, on a wooden table", (
            ((175, 10, 415, 310), "a white and red cup of coffee"), ((80, 98, 480, 400), "a red saucer"),
            ((315, 237, 415, 325), "the bowl of a spoon"))),
        "coins.png": ("Four rows of old coins on a dark ground", (((304, 14, 366, 71), "the coin at the upper right"),)),
        "hubble_deep_field.jpg": ("Many small galaxies before a black sky", ()),
        "moon.png": ("The grey surface of the moon with small craters", ()),
        "motorcycle_left.png": ("A red motorcycle in a garage", (
            ((115, 15, 715, 458), "a red motorcycle"), ((120, 258, 280, 452), "the rear wheel of a motorcycle"),
            ((0, 65, 215, 290), "a wooden bench"))),
        "retina.jpg": ("The retina of an eye with its blood vessels", ()),
        "rocket.jpg": ("A white rocket on its launch pad between towers, at dusk", (
            ((304, 126, 344, 400), "a white rocket"), ((12, 0, 90, 410), "the lattice tower on the left"),
            ((551, 0, 640, 410), "the lattice tower on the right"))),
    },
    "sklearn/datasets/images": {
        "china.jpg": ("A Chinese tower with several roofs above trees, and a lake behind it", (
            ((62, 20, 365, 388), "a tower with several roofs"),)),
        "flower.jpg": ("An orange dahlia before dark leaves", (
            ((167, 83, 449, 360), "an orange dahlia"), ((285, 372, 465, 427), "a part of a second flower"))),
    },
}  # fmt: skip
_WHO = ("The harbour office", "A small museum", "Our northern branch", "The weather service", "Every second school",
        "The city archive", "A group of students", "The repair shop")  # fmt: skip
_DOES = ("has ordered", "will inspect", "recently sold", "is looking for", "describes", "has measured", "keeps", "returned")
_WHAT = ("forty wooden boxes", "the old railway bridge", "two maps of the coast", "a copy of the contract", "several blue lamps",
         "the results of last year", "a list of all members", "nine kinds of apples")  # fmt: skip
_WHEN = ("before noon.", "without delay.", "for the third time.", "on Monday morning.", "as agreed.", "in good order.")
_TOWNS = ("Aberdeen", "Bergen", "Cordoba", "Dresden", "Esbjerg", "Ferrara", "Ghent", "Halifax", "Innsbruck", "Jaipur")
_GOODS = ("Bread", "Green tea", "Apples 1 kg", "Butter", "Olive oil", "Tomatoes", "Rice 500 g", "Honey", "Cheese", "Coffee")
_INK = (34, 34, 40)


@dataclass
class Drawing:
    """A document while it is drawn, and its lines of text: boxes in pixels, as far as the letters go, with their texts."""

    width: int
    height: int
    paper: tuple[int, int, int]
    lines: list[tuple[Pixels, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (self.width, self.height), self.paper)
        self.draw = ImageDraw.Draw(self.image)

    def write(self, place: tuple[int, int], text: str, font: ImageFont.FreeTypeFont, anchor: str = "la") -> None:
        """Writes a line of text."""
        self.draw.text(place, text, _INK, font, anchor=anchor)
        mask = Image.new("L", (self.width, self.height))
        ImageDraw.Draw(mask).text(place, text, 255, font, anchor=anchor)
        box = mask.getbbox()  # ImageDraw.textbbox adds the room after the last letter
        assert box is not None, text
        self.lines.append((box, text))


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVu{name}.ttf"), size)


def _sentence(rng: np.random.Generator) -> str:
    return " ".join(str(rng.choice(words)) for words in (_WHO, _DOES, _WHAT, _WHEN))


def draw_letter(rng: np.random.Generator) -> Drawing:
    """A heading and paragraphs of justified length."""
    page = Drawing(700, 900, (252, 251, 247))
    page.write((60, 60), f"Letter from {rng.choice(_TOWNS)}", _font("Serif-Bold", 30))
    font, top = _font("Serif", 19), 140
    for _ in range(3):
        words = " ".join(_sentence(rng) for _ in range(4)).split()
        while words:
            count = next(n for n in range(len(words), 0, -1) if font.getlength(" ".join(words[:n])) <= 580)
            page.write((60, top), " ".join(words[:count]), font)
            words, top = words[count:], top + 30
        top += 24
    return page


def draw_table(rng: np.random.Generator) -> Drawing:
    """A title and a table with ruled lines; each cell is a line of text."""
    page = Drawing(760, 560, (255, 255, 255))
    page.write((380, 30), f"Passengers per month, {rng.integers(1950, 2025)}", _font("Sans-Bold", 24), "ma")
    edges, font = (40, 230, 400, 560, 720), _font("Sans", 18)
    rows: list[tuple[str, ...]] = [("Town", "Spring", "Summer", "Autumn")]
    for town in rng.choice(_TOWNS, 8, replace=False):
        rows.append((str(town), *(f"{number:,}" for number in rng.integers(100, 99999, 3))))
    for number, row in enumerate(rows):
        top = 90 + number * 48
        page.draw.rectangle((40, top, 720, top + 48), fill=(232, 238, 246) if number == 0 else None, outline=(120, 120, 120))
        for column, text in enumerate(row):
            place = (edges[column] + 14, top + 13) if column == 0 else (edges[column + 1] - 14, top + 13)
            page.write(place, text, font, "la" if column == 0 else "ra")
    for edge in edges:
        page.draw.line((edge, 90, edge, 90 + 48 * len(rows)), fill=(120, 120, 120))
    return page


def draw_receipt(rng: np.random.Generator) -> Drawing:
    """A receipt: names on the left, prices on the right, and their sum."""
    page = Drawing(460, 720, (248, 246, 240))
    page.write((230, 40), f"Market {rng.choice(_TOWNS)}", _font("SansMono-Bold", 26), "ma")
    page.write((230, 84), f"Receipt no. {rng.integers(10000, 99999)}", _font("SansMono", 18), "ma")
    font, bold, top, total = _font("SansMono", 19), _font("SansMono-Bold", 22), 150, 0
    for name in rng.choice(_GOODS, int(rng.integers(5, 9)), replace=False):
        cents = int(rng.integers(80, 2500))
        page.write((40, top), str(name), font)
        page.write((420, top), f"{cents / 100:.2f}", font, "ra")
        top, total = top + 42, total + cents
    page.draw.line((40, top + 6, 420, top + 6), fill=_INK, width=2)
    page.write((40, top + 26), "Total", bold)
    page.write((420, top + 26), f"{total / 100:.2f}", bold, "ra")
    page.write((230, top + 90), "Thank you for your visit", _font("SansMono", 17), "ma")
    return page


_KINDS: tuple[tuple[str, Callable[[np.random.Generator], Drawing]], ...] = (
    ("letter", draw_letter), ("table", draw_table), ("receipt", draw_receipt)
)  # fmt: skip


def write_documents(folder: Path, count: int, seed: int) -> None:
    """Draws `count` documents, in turn a letter, a table and a receipt, as JPEG files into `folder`, and their text and boxes
    (pixels) into the JSON lines FOLDER.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    trees = []
    for number in range(count):
        kind, draw = _KINDS[number % len(_KINDS)]
        page, name = draw(np.random.default_rng([seed, number])), f"{folder.name}-{kind}-{number:03d}.jpg"
        page.image.save(folder / name, quality=92, subsampling=0)
        trees.append({"image": name, "regions": [{"box": box, "caption": text} for box, text in page.lines]})
    _write_lines(folder, trees)


def write_photographs(folder: Path) -> None:
    """Copies the photographs into `folder`, the first one a second time as another file, and writes captions and boxes (pixels)
    into the JSON lines FOLDER.jsonl. `ValueError` if scikit-image is not installed."""
    folder.mkdir(parents=True, exist_ok=True)
    trees = []
    for place, photographs in _PHOTOGRAPHS.items():
        found = _package_folder(place)
        if found is None and place == _SCIKIT_IMAGE:
            raise ValueError("the example needs scikit-image, which is not installed: pip install -e '.[demo]'")
        if found is None:
            log.warning(f"{place.partition('/')[0]} is not installed: without its photographs {', '.join(photographs)}")
            continue
        for name, (caption, boxes) in photographs.items():
            shutil.copyfile(found / name, folder / name)
            regions = [{"box": box, "caption": text} for box, text in boxes]
            trees.append({"image": name, "global": caption, "regions": regions})
    first = trees[0]
    Image.open(folder / str(first["image"])).convert("RGB").save(folder / AGAIN, quality=60)
    _write_lines(folder, [*trees, first | {"image": AGAIN}])


def write_scans(folder: Path) -> None:
    """Copies the scanned pages of scikit-image, which is installed, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = _package_folder(_SCIKIT_IMAGE)
    assert found is not None
    for name in _SCANS:
        shutil.copyfile(found / name, folder / name)


def _package_folder(place: str) -> Path | None:
    """A folder of an installed package, which is not imported; None if the package is not there."""
    package, _, below = place.partition("/")
    spec = find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / below


def _write_lines(folder: Path, trees: Sequence[dict]) -> None:
    folder.with_name(f"{folder.name}.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in trees))


def write_sources(folder: Path, seed: int = 0, documents: int = DOCUMENTS, unlabelled: int = UNLABELLED) -> None:
    """Writes all sources of the example into `folder`. `ValueError` if scikit-image is not installed."""
    write_photographs(folder / "photographs")
    write_scans(folder / "scans")
    write_documents(folder / "documents", documents, seed)
    write_documents(folder / "unlabelled", unlabelled, seed + 1)


@dataclass(frozen=True)
class Comparison:
    """Of the unlabelled documents: lines of text, those that were read to the letter at their place, words, and those read; and
    the median IoU of the lines that were read with their true boxes (0 without any)."""

    lines: int
    lines_read: int
    words: int
    words_read: int
    median_iou: float


def compare(folder: Path, store: Store) -> Comparison:
    """Compares the regions of a store with the true text of the documents in `folder`/unlabelled. A line is read if a region with
    exactly its text holds the centre of its box. Documents that the store does not have count as not read."""
    trees = {tree["image"]: tree for tree in map(json.loads, (folder / "unlabelled.jsonl").read_text().splitlines())}
    of_image: dict[str, list[tuple[Box, str]]] = {}
    for index in range(store.records):
        record = store.record(index)
        assert isinstance(record, ImageRecord)
        if record.id in trees:
            scale = np.tile((record.width, record.height), 2)
            of_image[record.id] = [(tuple(np.array(region.box) * scale), region.caption) for region in record.regions]
    lines = words = words_read = 0
    overlaps = []
    for name, tree in trees.items():
        found = of_image.get(name, [])
        for region in tree["regions"]:
            lines += 1
            x1, y1, x2, y2 = region["box"]
            here = [box for box, text in found if text == region["caption"] and _holds(box, (x1 + x2) / 2, (y1 + y2) / 2)]
            overlaps += [max(iou(box, (x1, y1, x2, y2)) for box in here)] if here else []
        true = Counter(" ".join(region["caption"] for region in tree["regions"]).split())
        words += true.total()
        words_read += (true & Counter(" ".join(text for _, text in found).split())).total()
    return Comparison(lines, len(overlaps), words, words_read, float(np.median(overlaps)) if overlaps else 0.0)


def _holds(box: Box, x: float, y: float) -> bool:
    x1, y1, x2, y2 = box
    return x1 <= x <= x2 and y1 <= y <= y2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the sources are written")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn documents (default: %(default)s)")
    parser.add_argument("--compare", metavar="STORE", type=Path, help="writes nothing; compares this store with the true texts")
    options = parser.parse_args(arguments)
    to_console(0)
    return exit_status(lambda: _run(options), [])


def _run(options: argparse.Namespace) -> None:
    if options.compare is None:
        write_sources(options.folder, options.seed)
        print(f"{options.folder}: photographs, scans, documents, unlabelled")
        return
    found = compare(options.folder, Store(options.compare))
    print(f"Text of the unlabelled documents: {found.lines_read} of {found.lines} lines and {found.words_read} of {found.words} "
          "words were read to the letter.")  # fmt: skip
    print(f"Boxes of the lines that were read have a median IoU of {found.median_iou:.2f} with the letters.")


if __name__ == "__main__":
    sys.exit(main())
