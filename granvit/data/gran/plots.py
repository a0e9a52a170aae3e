"""The pictures of a build's report: distributions as bar plots, and contact sheets of annotated images."""
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from math import sqrt
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from granvit.data.gran.make_unit import EDGES
from granvit.data.records import ImageRecord
from granvit.data.store import Store
from granvit.data.view import legend_block, marked_boxes, pixels_of, stacked, text_block
from granvit.page import Labelled, Number
from granvit.pictures import draw_numbered_boxes, number_colour

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

COLUMNS = 3
LISTED = 10  # boxes of an image that are numbered and listed, at most; the others are outlined
_WIDTH, _HEIGHT = 464, 620  # pixels, the largest sides of an image on a contact sheet
_COLOURS = {"natural": "#2a6fb0", "ocr": "#d9792b"}
NAMES = {"natural": "natural", "ocr": "OCR"}


def _counts(edges: Sequence[float]) -> list[str]:
    """Labels of bins of whole numbers."""
    bins = [f"{low:g}" if high == low + 1 else f"{low:g}–{high - 1:g}" for low, high in pairwise(edges)]
    return [*bins, f"{edges[-1]:g}+"]


def _sides(edges: Sequence[float]) -> list[str]:
    """Labels of bins of areas: the sides of squares."""
    ends = [f"{sqrt(edge):.0f}" for edge in edges]
    return [f"below {ends[1]}", *(f"{low}–{high}" for low, high in pairwise(ends[1:])), f"{ends[-1]}+"]


def _ratios(edges: Sequence[float]) -> list[str]:
    """Labels of bins of aspect ratios."""
    exact = [Fraction(edge).limit_denominator(9) for edge in edges]
    ends = [f"{ratio.numerator}:{ratio.denominator}" for ratio in exact]
    return [f"below\n{ends[1]}", *(f"{low}–\n{high}" for low, high in pairwise(ends[1:])), f"{ends[-1]}\nor more"]


# Histogram -> title, what is counted, and labels of the bins.
_PANELS: dict[str, tuple[str, str, Callable[[Sequence[float]], list[str]]]] = {
    "boxes": ("Boxes per image", "images", _counts),
    "area": ("Area of a box, as the side of a square of this area, pixels", "boxes", _sides),
    "aspect": ("Aspect ratio of a box (width to height)", "boxes", _ratios),
    "words": ("Words of a region's caption", "boxes", _counts),
}


def draw_distributions(histograms: Mapping[str, Mapping[str, Sequence[int]]], path: Path) -> None:
    """Draws the histograms of `granvit.data.gran.make_unit.Counts`, one panel each, as shares of the images or boxes of a data
    type. `histograms`: data type (natural, ocr) -> name -> counts. A bin for 0 is left out where it is empty."""
    figure, grid = plt.subplots(2, 2, figsize=(11, 6.8), dpi=120)
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    width = 0.84 / len(histograms)
    for (name, (title, unit, labelled)), axes in zip(_PANELS.items(), grid.flat, strict=True):
        labels = labelled(EDGES[name])
        first = int(labels[0] == "0" and not any(of_kind[name][0] for of_kind in histograms.values()))
        for number, (kind, of_kind) in enumerate(histograms.items()):
            counts = np.array(of_kind[name])
            if not counts.any():
                continue
            shares = (100 * counts / counts.sum())[first:]
            places = np.arange(first, len(labels)) + (number - (len(histograms) - 1) / 2) * width
            told = f"{NAMES[kind]}: {counts.sum():,} {unit}"
            bars = axes.bar(places, shares, width, color=_COLOURS[kind], label=told)
            texts = [_share(share) if share else "" for share in shares]
            axes.bar_label(bars, texts, padding=1, fontsize=7, color="#444444")
        axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
        axes.set_xticks(range(first, len(labels)), labels[first:], fontsize=8)
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.tick_params(axis="y", labelsize=8)
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
        axes.margins(y=0.12)
        if axes.containers:
            axes.legend(fontsize=8, frameon=False, loc="best")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _share(percent: float) -> str:
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}" if percent >= 0.05 else "<0.1"


def sample_cards(store: Store, count: int, seed: int) -> list[Labelled]:
    """Cards of `count` records of a region store (all, if it has fewer), drawn at random by `seed`, in the store's order. Of more
    than `LISTED` boxes, so many are drawn at random for numbers and captions."""
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(store.records, min(count, store.records), replace=False).tolist())
    return [_card(store, index, rng) for index in chosen]


def _card(store: Store, index: int, rng: np.random.Generator) -> Labelled:
    record = store.record(index)
    assert isinstance(record, ImageRecord)
    marked = marked_boxes(record)
    listed = set(rng.choice(len(marked), min(LISTED, len(marked)), replace=False).tolist())
    shown = [each for number, each in enumerate(marked) if number in listed]
    others = [each.box for number, each in enumerate(marked) if number not in listed]
    picture = draw_numbered_boxes(pixels_of(store, record), {each.number: each.box for each in shown}, others, _WIDTH, _HEIGHT)
    boxes = f"{len(marked)} box{'es' * (len(marked) != 1)}"
    note = f"{record.width} x {record.height} pixels, {boxes}" + f", of which {len(shown)} are numbered" * bool(others)
    if record.global_caption is not None:
        note += f". Image: {record.global_caption}"
    labels = tuple((Number(str(each.number), number_colour(each.number)), each.text) for each in shown)
    return Labelled(np.asarray(picture), record.id, note, labels, f"{record.id} with {boxes}")


def draw_contact_sheet(cards: Sequence[Labelled], path: Path) -> None:
    """Draws the cards, `COLUMNS` in a row, with their texts below the pictures."""
    drawn = [stacked([Image.fromarray(card.picture_HW3), text_block([card.title, card.note], _WIDTH),
                      legend_block([(int(number.text), text) for number, text in card.labels], 1, _WIDTH)], _WIDTH)
             for card in cards]  # fmt: skip
    rows = [drawn[first : first + COLUMNS] for first in range(0, len(drawn), COLUMNS)]
    heights = [max(card.height for card in row) for row in rows]
    sheet = Image.new("RGB", (COLUMNS * max(card.width for card in drawn), sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, card in enumerate(row):
            sheet.paste(card, (column * card.width, sum(heights[:number])))
    sheet.save(path, quality=85)
