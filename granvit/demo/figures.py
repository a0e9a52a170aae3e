"""Drawing of the demo's report: cards, scores over steps, features, and the timeline."""
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from granvit.data.prompts import Box
from granvit.demo.results import NAMES, Run, percent
from granvit.demo.times import KINDS, Times
from granvit.page import RIGHT_COLOUR, WRONG_COLOUR, Card

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

SERIES = (  # score, label, colour, marker
    ("rouge_l", "Bbox2Caption, ROUGE-L", "#4a9fd8", "o"),
    ("exact_match", "Bbox2Caption, exact match", "#123f7a", "^"),
    ("acc_iou50", "Caption2Bbox, ACC@IoU0.5", "#aa3377", "s"),
)
KIND_COLOURS = dict(zip(KINDS, ("#b8b8b8", "#8a8a8a", "#e69f00", "#3b75af", "#aa3377"), strict=True))
UNKNOWN = "#dddddd"


def draw_cards(cards: Sequence[Card], columns: int, path: Path, side: int = 264, colours: int | None = None) -> None:
    """Draws cards in rows: the title above each picture, its answers below. `side` is the longer side of a picture in pixels. A
    title is shortened to it, an answer is wrapped to two lines. The file has a palette of so many colours, or all of them."""
    gap, size = side // 20, round(side / 20)
    line, font, bold = round(1.45 * size), _font("DejaVuSans.ttf", size), _font("DejaVuSans-Bold.ttf", size)
    texts = [[(part, answer.right) for answer in card.answers for part in _wrapped(answer.marked, font, side)] for card in cards]
    rows = [texts[first : first + columns] for first in range(0, len(cards), columns)]
    heights = [side + line * (1 + max(map(len, row))) + 2 * gap for row in rows]
    image = Image.new("RGB", (columns * (side + gap) + gap, gap + sum(heights)), "white")
    draw = ImageDraw.Draw(image)
    for number, card in enumerate(cards):
        left, top = gap + number % columns * (side + gap), gap + sum(heights[: number // columns])
        picture = Image.fromarray(card.picture_HW3)
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        draw.text((left + side / 2, top), _shortened(card.title, bold, side), "#222222", bold, anchor="ma")
        image.paste(picture, (left + (side - picture.width) // 2, top + line + (side - picture.height) // 2))
        for row, (text, right) in enumerate(texts[number]):
            place = left + side / 2, top + line + side + gap // 3 + row * line
            draw.text(place, text, RIGHT_COLOUR if right else WRONG_COLOUR, font, anchor="ma")
    (image.quantize(colours) if colours else image).save(path, optimize=colours is not None)


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text on at most two lines of `width` pixels, broken between words; the rest is cut with an ellipsis."""
    words = text.split()
    fitting = [count for count in range(1, len(words) + 1) if font.getlength(" ".join(words[:count])) <= width]
    first = max(fitting, default=1)
    parts = [" ".join(words[:first]), " ".join(words[first:])]
    return [_shortened(part, font, width) for part in parts if part]


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, cut to `width` pixels with an ellipsis."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text} …") > width:
        text = text[:-1]
    return f"{text.rstrip()} …"


def draw_curve(runs: dict[str, Run], path: Path) -> None:
    """Draws three scores with their intervals over the steps of stage 1 and, after them, of stage 2. Stage 1 with Caption2Bbox
    branches off at the end of stage 1; the guesser's scores are dotted lines."""
    border = runs["stage1"].last.step
    stages = [(runs["stage1"], 0), *((run, border) for name, run in runs.items() if name == "stage2")]
    figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=120)
    end = border
    at_border, at_end = [], []  # labels: height, text, colour
    for score, label, colour, marker in SERIES:
        points = [(start + e.step, percent(e, score)) for run, start in stages for e in run.evaluations if start == 0 or e.step]
        xs, values = [x for x, _ in points], [p.value for _, p in points]
        spans = [[p.value - p.low for _, p in points], [p.high - p.value for _, p in points]]
        axes.errorbar(xs, values, yerr=spans, color=colour, marker=marker, markersize=5, linewidth=2, capsize=3, elinewidth=1,
                      label=label)  # fmt: skip
        axes.fill_between(xs, [p.low for _, p in points], [p.high for _, p in points], color=colour, alpha=0.12, linewidth=0)
        end = max(end, xs[-1])
        at_end.append((values[-1], f"{values[-1]:.1f}", colour))
        of_stage1 = percent(runs["stage1"].last, score).value
        if len(stages) > 1:
            at_border.append((of_stage1, f"{of_stage1:.1f}", colour))
        if "stage1_mixed" in runs:
            branch = [(border + e.step, percent(e, score)) for e in runs["stage1_mixed"].evaluations if e.step]
            spans = [[p.value - p.low for _, p in branch], [p.high - p.value for _, p in branch]]
            axes.plot([border, *(x for x, _ in branch)], [of_stage1, *(p.value for _, p in branch)], "--", color=colour)
            axes.errorbar([x for x, _ in branch], [p.value for _, p in branch], yerr=spans, fmt=marker, color=colour, capsize=3,
                          elinewidth=1, markersize=6, markerfacecolor="white")  # fmt: skip
            end = max(end, branch[-1][0])
        if "guesser" in runs:
            floor = percent(runs["guesser"].last, score).value
            axes.axhline(floor, color=colour, linestyle=":", linewidth=1.4)
            at_end.append((floor, f"guesser {floor:.1f}", colour))
    axes.set(xlim=(-0.015 * end, 1.015 * end), ylim=(-2, 102), ylabel="% on held-out images", xlabel="optimizer steps")
    axes.axvspan(-0.015 * end, border, color="#f4f1e8", zorder=0)
    axes.annotate("stage 1\ndecoder frozen", (border / 2, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=9)
    if len(stages) > 1:
        axes.axvspan(border, 1.015 * end, color="#eaf0f6", zorder=0)
        axes.annotate("stage 2\nencoder frozen", ((border + end) / 2, 1.01), xycoords=("data", "axes fraction"), ha="center",
                      fontsize=9)  # fmt: skip
    for (_, text, colour), height in zip(at_end, _spread([label[0] for label in at_end]), strict=True):
        axes.annotate(text, (1.01, height), xycoords=("axes fraction", "data"), color=colour, va="center", fontsize=9)
    for (_, text, colour), height in zip(at_border, _spread([label[0] for label in at_border]), strict=True):
        axes.annotate(text, (border, height), xytext=(-7, 9), textcoords="offset points", color=colour, ha="right", va="center",
                      fontsize=9, path_effects=[withStroke(linewidth=3, foreground="white")])  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    if "stage1_mixed" in runs:
        handles.append(Line2D([], [], color="#555555", linestyle="--"))
        labels.append(NAMES["stage1_mixed"])
    if "guesser" in runs:
        handles.append(Line2D([], [], color="#555555", linestyle=":"))
        labels.append("guesser (no image)")
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, fontsize=9, frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _spread(heights: Sequence[float], gap: float = 4.2) -> list[float]:
    """Heights of labels, moved apart where they are closer than `gap`; the order is kept."""
    order = np.argsort(heights, kind="stable")
    groups: list[list[float]] = []  # mean height and number of labels that touch
    for index in order:
        groups.append([heights[index], 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (mean, count), (below, others) = groups.pop(), groups.pop()
            groups.append([(mean * count + below * others) / (count + others), count + others])
    placed = [mean + gap * (k - (count - 1) / 2) for mean, count in groups for k in range(int(count))]
    found = [0.0] * len(heights)
    for index, height in zip(order, placed, strict=True):
        found[index] = height
    return found


def draw_components(pictures: Sequence[np.ndarray], before: np.ndarray, after: np.ndarray, shares: Sequence[np.ndarray],
                    path: Path) -> None:  # fmt: skip
    """Draws a column per image: the image, and its patches in the colours `[B, g, g, 3]` before and after stage 1. `shares` are
    the shares of the variance of the three components, before and after."""
    held = [f"({share.sum():.0%} of\nthe variance)" for share in shares]
    figure, grid = _picture_rows(["image", f"before\n{held[0]}", f"after\n{held[1]}"], len(pictures), above=0.06, right=0)
    for column, picture in enumerate(pictures):
        grid[0, column].imshow(picture)
        for row, colours in ((1, before), (2, after)):
            grid[row, column].imshow(colours[column], interpolation="nearest")
    figure.savefig(path)
    plt.close(figure)


def draw_similarity(pictures: Sequence[np.ndarray], captions: Sequence[str], boxes: Sequence[Box], before: Sequence[np.ndarray],
                    after: Sequence[np.ndarray], path: Path) -> None:  # fmt: skip
    """Draws a column per region: the image with the region's box (xyxy relative to the padded square), and the cosine of the
    region with every patch, `[g, g]`, before and after stage 1, on one scale for all."""
    figure, grid = _picture_rows(["image", "before", "after"], len(pictures), above=0.5, right=0.85)
    low = np.floor(10 * min(np.min(before), np.min(after))) / 10
    for column, (picture, caption, box) in enumerate(zip(pictures, captions, boxes, strict=True)):
        grid[0, column].imshow(picture)
        grid[0, column].set_title(textwrap.fill(textwrap.shorten(caption, 40), 20), fontsize=9, parse_math=False)
        for row, maps in ((1, before), (2, after)):
            shown = grid[row, column].imshow(maps[column], interpolation="nearest", cmap="viridis", vmin=low, vmax=1)
            side = len(maps[column])
            x1, y1, x2, y2 = np.array(box) * side - 0.5
            for width, colour in ((4.5, "black"), (2, "white")):
                grid[row, column].add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width))
    bar = figure.colorbar(shown, cax=figure.add_axes((0.945, 0.08, 0.012, 0.42)))
    bar.ax.tick_params(labelsize=8)
    bar.ax.set_title("cosine", fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def _picture_rows(names: Sequence[str], columns: int, above: float, right: float) -> tuple[plt.Figure, np.ndarray]:
    """Square axes without ticks `[rows, columns]`, each row with its name on the left. `above` and `right` are free inches."""
    side, left, gap = 1.6, 1.1, 0.06
    width, height = left + columns * (side + gap) + right, above + len(names) * (side + gap)
    figure, grid = plt.subplots(len(names), columns, figsize=(width, height), dpi=100, squeeze=False,
                                subplot_kw={"xticks": [], "yticks": []})  # fmt: skip
    figure.subplots_adjust(left=left / width, right=1 - (right + gap) / width, top=1 - above / height, bottom=gap / height,
                           wspace=gap / side, hspace=gap / side)  # fmt: skip
    for name, axes in zip(names, grid[:, 0], strict=True):
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return figure, grid


def draw_times(times: Times, path: Path) -> None:
    """Draws the parts as bars over the seconds since the start, coloured by the kind of work."""
    figure, axes = plt.subplots(figsize=(7.2, 1.3 + 0.42 * len(times.parts)), dpi=120)
    for row, part in enumerate(times.parts.values()):
        for span in part.spans:
            axes.barh(row, span.end - span.start, left=span.start, height=0.62, linewidth=0,
                      color=UNKNOWN if span.kind is None else KIND_COLOURS[span.kind])  # fmt: skip
        end = part.spans[-1].end
        axes.annotate(f"{end - part.spans[0].start:.0f} s{', running' * part.running}", (end, row), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(times.parts)), [NAMES.get(name, name) for name in times.parts], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(part.spans[-1].end for part in times.parts.values()))
    axes.set_xlabel("seconds since the start", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=[Patch(color=colour, label=kind) for kind, colour in KIND_COLOURS.items()], loc="upper center",
                bbox_to_anchor=(0.45, -0.32 * 3 / (1 + len(times.parts))), ncols=3, fontsize=8.5, frameon=False)  # fmt: skip
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
