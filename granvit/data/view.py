"""Draws records of a store with their boxes, questions and answers, to look at before training.

    python scripts/view_data.py STORE [--id ID ... | --random N --seed S | --first N] [--out FILE.html | --out FOLDER]

One page without references to other files: each record's picture with numbered boxes, their captions and sizes, and each question
with its answer as training asks them. Of a conversation: its turns, and the boxes that stand in them. With a folder, one PNG file
per record, with the captions below the picture.
"""
import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw

from granvit.data.batch import Question, record_pixels
from granvit.data.prompts import Box, format_box, replace_boxes
from granvit.data.records import Conversation, ImageRecord
from granvit.data.store import MAX_PIXELS, Record, Store
from granvit.exit_status import exit_status
from granvit.logs import to_console
from granvit.page import Block, Exact, Folded, Heading, Number, Picture, Table, Text, to_html
from granvit.pictures import WIDTH, Font, draw_numbered_boxes, number_colour, text_font
from granvit.stages import Task

DRAWN = 100  # boxes drawn on one picture, at most; all are listed
SHOWN = 12  # questions that are shown at once; more are folded
FIRST = 8  # records, by default
_MARGIN, _LINE, _TEXT = 14, 20, 14  # pixels: margin and line of a PNG file's text, font size


@dataclass(frozen=True)
class Marked:
    """A box with its number, counted from 1 in the record, and what is said of it."""

    number: int
    box: Box
    text: str

    def pixels(self, record: Record) -> str:
        """Width and height in pixels of the original image."""
        x1, y1, x2, y2 = self.box
        return f"{(x2 - x1) * record.width:.0f}\u00a0x\u00a0{(y2 - y1) * record.height:.0f}"  # not broken between lines


@dataclass(frozen=True)
class Asked:
    """A question with its answer, as training asks it, and the number of its box or turn (None: of the whole image)."""

    task: Task
    number: int | None
    question: str
    answer: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", metavar="STORE", type=Path, help="a store of regions or of conversations")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--id", nargs="+", metavar="ID", help="records with these ids (of equal ids the first)")
    which.add_argument("--random", type=int, metavar="N", help="N records at random")
    which.add_argument("--first", type=int, metavar="N", default=FIRST, help="the first N records (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of --random (default: %(default)s)")
    out_help = "a page, if it ends with .html; otherwise a folder for PNG files (default: %(default)s)"
    parser.add_argument("--out", type=Path, metavar="PATH", default=Path("view.html"), help=out_help)
    options = parser.parse_args(arguments)
    to_console(0)
    return exit_status(lambda: _view(options), [])


def _view(options: argparse.Namespace) -> None:
    for name in ("random", "first"):
        count = getattr(options, name)
        if count is not None and count < 1:
            raise ValueError(f"--{name} {count}: expected a number of records, 1 or more")
    store = Store(options.store)
    if options.id is not None:
        how, indices = "chosen by id", find_ids(store, options.id)
    elif options.random is not None:
        count = min(options.random, store.records)
        how = f"chosen at random, seed {options.seed}"
        indices = sorted(np.random.default_rng(options.seed).choice(store.records, count, replace=False).tolist())
    else:
        how, indices = "the first ones", list(range(min(options.first, store.records)))
    if options.out.suffix == ".html":
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(store, indices, how))
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        for index in indices:
            sheet(store, index).save(options.out / f"record-{index:07d}.png")
    print(f"{options.out}: {len(indices)} of {store.records} records of {store.path}, {how}")


def find_ids(store: Store, ids: Sequence[str]) -> list[int]:
    """The index of the first record with each id, in the order of `ids`. Reads records until all are found. `ValueError` names
    store and ids that are not there."""
    found: dict[str, int] = {}
    for index in range(store.records):
        found.setdefault(_record(store, index).id, index)
        if all(wanted in found for wanted in ids):
            return [found[wanted] for wanted in ids]
    missing = ", ".join(repr(wanted) for wanted in ids if wanted not in found)
    raise ValueError(f"store {store.path}: no record with the id {missing}; ids are like {next(iter(found))!r}")


def _record(store: Store, index: int) -> Record:
    try:
        return store.record(index)
    except ValueError as error:
        raise ValueError(f"store {store.path}: record number {index}: {error}") from None


def drawn_boxes(marked: Sequence[Marked]) -> Sequence[Marked]:
    """The boxes that are drawn: all, or `DRAWN` of them, always the same, drawn at random (every n-th could be one column)."""
    if len(marked) <= DRAWN:
        return marked
    chosen = np.random.default_rng(0).choice(len(marked), DRAWN, replace=False)
    return [marked[index] for index in sorted(chosen.tolist())]


def pixels_of(store: Store, record: Record) -> np.ndarray:
    """The record's image, uint8 `[H, W, 3]`. `ValueError` names store and record if it cannot be decoded."""
    try:
        return record_pixels(record, max(MAX_PIXELS, record.width * record.height))
    except ValueError as error:
        raise ValueError(f"store {store.path}: record {record.id!r}: {error}") from None


def _drawn(store: Store, record: Record, marked: Sequence[Marked]) -> Image.Image:
    """The record's image with its boxes."""
    return draw_numbered_boxes(pixels_of(store, record), {each.number: each.box for each in drawn_boxes(marked)})


def marked_boxes(record: Record) -> list[Marked]:
    """The boxes of a record: of the regions, or of a conversation those that stand in its texts, each once."""
    if isinstance(record, ImageRecord):
        return [Marked(number, region.box, region.caption) for number, region in enumerate(record.regions, 1)]
    places: dict[Box, list[str]] = {}
    for turn, texts in enumerate(record.turns, 1):
        for part, text in zip(("question", "answer"), texts, strict=True):
            for box in _boxes_in(text):
                places.setdefault(box, []).append(f"{part} {turn}")
    return [Marked(n, box, ", ".join(dict.fromkeys(where))) for n, (box, where) in enumerate(places.items(), 1)]


def _boxes_in(text: str) -> list[Box]:
    found: list[Box] = []

    def note(box: Box, step: float) -> Box:
        found.append(box)
        return box

    replace_boxes(text, note)
    return [box for box in found if 0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1]


def questions(record: Record) -> Iterator[Asked]:
    """Every question about a record that a stage can ask, with its answer, as `granvit.data.batch` puts them."""
    if isinstance(record, Conversation):
        for turn, texts in enumerate(record.turns, 1):
            yield Asked("conversation", turn, *texts)
        return
    if record.global_caption is not None:
        yield Asked("global", None, *Question("global").turn(record))
    for task in ("bbox2caption", "caption2bbox"):
        for region in range(len(record.regions)):
            yield Asked(task, region + 1, *Question(task, region).turn(record))


def facts(record: Record, marked: Sequence[Marked]) -> str:
    """Size and counts of a record, and how many of its boxes are drawn."""
    if isinstance(record, Conversation):
        told = [f"{len(record.turns)} turn{'s' * (len(record.turns) != 1)}"]
        boxes = f"{len(marked)} box{'es' * (len(marked) != 1)} in them"
    else:
        told, boxes = [], f"{len(marked)} region{'s' * (len(marked) != 1)}"
        told.append("a global caption" if record.global_caption is not None else "no global caption")
    if marked or not isinstance(record, Conversation):
        told.append(boxes)
    size = f"{record.width} x {record.height} pixels" if record.image else "no image"
    drawn = drawn_boxes(marked)
    limited = f" {len(drawn)} of the {len(marked)} boxes, chosen at random, are drawn; all are listed."
    return f"{size}, {', '.join(told)}." + limited * (len(drawn) < len(marked))


def page(store: Store, indices: Sequence[int], how: str) -> str:
    """An HTML page of the records with these indices. `ValueError` names a record that cannot be read."""
    kind = "conversations" if store.kind.tasks == ("conversation",) else "images"
    title = f"{store.path.name}: {len(indices)} of {store.records} {kind}"
    blocks: list[Block] = [Heading(1, title), Text(f"Store {store.path}; {how}.")]
    with TemporaryDirectory() as folder:
        for index in indices:
            record = _record(store, index)
            marked = marked_boxes(record)
            blocks += [Heading(2, record.id), Text(f"Record number {index}: {facts(record, marked)}")]
            if record.image:
                name = f"{index}.jpg"
                _drawn(store, record, marked).save(Path(folder) / name, quality=90, subsampling=0)
                blocks.append(Picture(name, f"{record.id} with {len(drawn_boxes(marked))} numbered boxes", ""))
            blocks += _lists(record, marked)
        return to_html(title, blocks, Path(folder))


def _lists(record: Record, marked: Sequence[Marked]) -> Iterator[Block]:
    """The legend of the boxes, and the questions."""
    if isinstance(record, ImageRecord) and record.global_caption is not None:
        yield Table(("global caption",), [(Exact(record.global_caption),)])
    if marked:
        told = "caption" if isinstance(record, ImageRecord) else "stands in"
        number = lambda each: Number(str(each.number), number_colour(each.number))  # noqa: E731
        lines = [(number(each), Exact(each.text), format_box(each.box), each.pixels(record)) for each in marked]
        yield Table(("box", told, "x1, y1, x2, y2 of the image", "pixels"), lines)
    asked = list(questions(record))
    header = ("task", "turn" if isinstance(record, Conversation) else "box", "question", "answer")
    place = lambda each: "" if each.number is None else str(each.number)  # noqa: E731
    rows = [(each.task, place(each), Exact(each.question), Exact(each.answer)) for each in asked]
    line = f"{len(asked)} question{'s' * (len(asked) != 1)} with answers, as training asks them"
    yield Folded(line, Table(header, rows), len(asked) <= SHOWN)


def sheet(store: Store, index: int) -> Image.Image:
    """A record as one picture: the image with its boxes, and below it captions or turns. `ValueError` as for `page`."""
    record = _record(store, index)
    marked = marked_boxes(record)
    picture = _drawn(store, record, marked) if record.image else Image.new("RGB", (WIDTH, 1), "white")
    head, told = [f"{record.id}: {facts(record, marked)}"], []
    if isinstance(record, Conversation):
        legend = [(each.number, f"{format_box(each.box)} in {each.text}, {each.pixels(record)} pixels") for each in marked]
        told = [line for each in questions(record) for line in ("", f"Q: {each.question}", f"A: {each.answer}")]
    else:
        legend = [(each.number, f"{each.text} ({each.pixels(record)})") for each in marked]
        head += ["", f"Image: {record.global_caption}"] if record.global_caption is not None else []
    return stacked([picture, text_block(head), legend_block(legend, 1 if len(legend) <= 20 else 3), text_block(told)])


def stacked(blocks: Sequence[Image.Image], width: int = WIDTH) -> Image.Image:
    """The pictures, at most `width` pixels wide, one below the other with margins around. Those without height are left out."""
    parts = [block for block in blocks if block.height]
    whole = Image.new("RGB", (width + 2 * _MARGIN, sum(part.height + _MARGIN for part in parts) + _MARGIN), "white")
    top = _MARGIN
    for part in parts:
        whole.paste(part, (_MARGIN + (width - part.width) // 2, top))
        top += part.height + _MARGIN
    return whole


def text_block(lines: Sequence[str], width: int = WIDTH) -> Image.Image:
    """The lines, wrapped to `width` pixels."""
    font = text_font(_TEXT)
    wrapped = [part for line in lines for part in _wrapped(line, font, width)]
    block = Image.new("RGB", (width, len(wrapped) * _LINE), "white")
    for number, line in enumerate(wrapped):
        ImageDraw.Draw(block).text((0, number * _LINE + _LINE / 2), line, "#222222", font, anchor="lm")
    return block


def legend_block(legend: Sequence[tuple[int, str]], columns: int, whole: int = WIDTH) -> Image.Image:
    """The numbered lines of a legend, down the first column, then down the next, in all `whole` pixels wide."""
    width = (whole - (columns - 1) * _MARGIN) // columns
    entries = [_entry(number, text, width) for number, text in legend]
    each = -(-len(entries) // columns)
    stacks = [entries[first : first + each] for first in range(0, len(entries), each or 1)]
    block = Image.new("RGB", (whole, max((sum(entry.height for entry in stack) for stack in stacks), default=0)), "white")
    for column, stack in enumerate(stacks):
        top = 0
        for entry in stack:
            block.paste(entry, (column * (width + _MARGIN), top))
            top += entry.height
    return block


def _entry(number: int, text: str, width: int) -> Image.Image:
    """A number on its colour and the text beside it."""
    font = text_font(_TEXT)
    tag = round(font.getlength("000")) + 6
    body = text_block([text], width - tag - 8)
    entry = Image.new("RGB", (width, body.height), "white")
    draw = ImageDraw.Draw(entry)
    draw.rectangle((0, 1, tag, _LINE - 2), fill=number_colour(number))
    draw.text((tag / 2, _LINE / 2), str(number), "white", font, anchor="mm")
    entry.paste(body, (tag + 8, 0))
    return entry


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """The text on lines of at most `width` pixels, broken between words, or within one that is longer than a line."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}" if line else word
            while len(line) > 1 and font.getlength(line) > width:
                fitting = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
                lines.append(line[:fitting])
                line = line[fitting:]
        lines.append(line)
    return lines
