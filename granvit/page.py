"""A page of headings, text, tables and pictures, written as Markdown and as one self-contained HTML file.

All texts are plain: what they contain of either language is escaped. Pictures are PNG or JPEG files beside the Markdown; the HTML
file holds them as data URIs.
"""
import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

RIGHT_COLOUR, WRONG_COLOUR = "#00805e", "#c8400a"  # they differ for the colour-blind too
RIGHT_SIGN, WRONG_SIGN = "✓", "✗"
STYLE = f"""
body{{font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#222;background:#fff;max-width:60rem;margin:0 auto;
padding:1rem}}
h1{{font-size:1.7rem;line-height:1.2}}h2{{font-size:1.3rem;margin-top:2.5rem;border-bottom:1px solid #ddd}}h3{{font-size:1.05rem}}
.wide{{overflow-x:auto}}table{{border-collapse:collapse;font-size:.9rem;margin:.5rem 0}}
th,td{{border-bottom:1px solid #ddd;padding:.35rem .6rem;text-align:left;vertical-align:top}}th{{border-bottom:2px solid #888}}
td:not(:first-child){{font-variant-numeric:tabular-nums}}td small{{display:block;color:#666;white-space:nowrap}}
figure{{margin:1rem 0}}figcaption,.note{{font-size:.85rem;color:#555}}img{{max-width:100%;height:auto;display:block}}
.cards{{display:grid;grid-template-columns:repeat(4,1fr);gap:1rem}}.five{{grid-template-columns:repeat(5,1fr)}}
.three{{grid-template-columns:repeat(3,1fr);gap:1.5rem 1rem}}.card .label{{margin-top:.15rem}}.card .number{{display:inline}}
.card{{break-inside:avoid;overflow-wrap:anywhere;font-size:.8rem;line-height:1.35}}.card img{{width:100%;margin-bottom:.3rem}}
.card b,.card span{{display:block}}.right{{color:{RIGHT_COLOUR}}}.wrong{{color:{WRONG_COLOUR}}}
td.exact{{white-space:pre-wrap;overflow-wrap:anywhere;min-width:9rem}}.number{{color:#fff;padding:0 .35rem;border-radius:.2rem}}
summary{{cursor:pointer;color:#555;font-size:.9rem}}
pre{{background:#f4f4f4;padding:.6rem;overflow-x:auto}}
@media(max-width:40rem){{.cards,.five,.three{{grid-template-columns:1fr 1fr}}}}
@media print{{body{{max-width:none;font-size:10pt}}h2,h3{{break-after:avoid}}figure,table{{break-inside:avoid}}}}
"""


@dataclass(frozen=True)
class Heading:
    """`level` is 1 to 3."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Cell:
    """A cell with a detail, which is set smaller."""

    text: str
    detail: str


@dataclass(frozen=True)
class Number:
    """A cell with a white number on a colour (of the form #rrggbb)."""

    text: str
    colour: str


@dataclass(frozen=True)
class Exact:
    """A cell whose text keeps its spaces and line breaks in HTML."""

    text: str


AnyCell = str | Cell | Number | Exact


@dataclass(frozen=True)
class Table:
    """A table. Cells that begin with a sign for right or wrong have its colour in HTML."""

    header: Sequence[str]
    rows: Sequence[Sequence[AnyCell]]


@dataclass(frozen=True)
class Picture:
    """The PNG or JPEG (.jpg) file `name` beside the page; `alt` describes it in words."""

    name: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Answer:
    """What one run answered, and whether that is right."""

    run: str
    text: str
    right: bool

    @property
    def marked(self) -> str:
        """The answer with a sign before it."""
        return f"{RIGHT_SIGN if self.right else WRONG_SIGN} {self.run}: {self.text}"


@dataclass(frozen=True)
class Card:
    """`picture_HW3` is uint8 with the boxes drawn; `alt` describes it in words."""

    picture_HW3: np.ndarray
    title: str
    answers: tuple[Answer, ...]
    alt: str


@dataclass(frozen=True)
class Labelled:
    """`picture_HW3` is uint8 with numbered boxes drawn, `labels` say what the numbers mean, `note` and `alt` describe it."""

    picture_HW3: np.ndarray
    title: str
    note: str
    labels: tuple[tuple[Number, str], ...]
    alt: str


@dataclass(frozen=True)
class Gallery:
    """Cards, 3 to 5 in a row: one PNG or JPEG file in Markdown, single pictures with text in HTML."""

    name: str
    alt: str
    cards: Sequence[Card | Labelled]
    columns: int


@dataclass(frozen=True)
class Code:
    """A command."""

    text: str


@dataclass(frozen=True)
class Folded:
    """A table under a line that shows and hides it in HTML; `shown` is how it is at first."""

    line: str
    table: Table
    shown: bool


Block = Heading | Text | Items | Table | Picture | Gallery | Code | Folded


def escape_markdown(text: str) -> str:
    """The text so that CommonMark with GitHub's tables shows it unchanged, on one line."""
    text = re.sub(r"([\\`*\[\]<>|~$&])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page in CommonMark with GitHub's tables."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    escaped = escape_markdown
    match block:
        case Heading(level, text):
            return f"{'#' * level} {escaped(text)}"
        case Text(text):
            return escaped(text)
        case Items(texts):
            return "\n".join(f"- {escaped(text)}" for text in texts)
        case Table(header, rows):
            lines = [map(escaped, header), ["---"] * len(header), *(map(_markdown_cell, row) for row in rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Picture(name, alt, caption):
            return f"![{escaped(alt)}]({name})\n\n{escaped(caption)}"
        case Gallery(name, alt):
            return f"![{escaped(alt)}]({name})"
        case Code(text):
            return f"```\n{text}\n```"
        case Folded(line, table):
            return f"{escaped(line)}\n\n{_markdown(table)}"


def _markdown_cell(cell: AnyCell) -> str:
    if isinstance(cell, Cell):
        return f"{escape_markdown(cell.text)} ({escape_markdown(cell.detail)})"
    return escape_markdown(cell if isinstance(cell, str) else cell.text)


def to_html(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The page as one HTML file without scripts and without references to other files. Pictures are read from `folder`."""
    html = ElementTree.Element("html", lang="en")
    head = ElementTree.SubElement(html, "head")
    ElementTree.SubElement(head, "meta", charset="utf-8")
    ElementTree.SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    _add(head, "title", title)
    _add(head, "style", STYLE)
    body = ElementTree.SubElement(html, "body")
    for block in blocks:
        _add_block(body, block, folder)
    return "<!doctype html>\n" + ElementTree.tostring(html, encoding="unicode", method="html") + "\n"


def _add(parent: ElementTree.Element, tag: str, text: str, **attributes: str) -> ElementTree.Element:
    element = ElementTree.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _add_block(body: ElementTree.Element, block: Block, folder: Path) -> None:
    match block:
        case Heading(level, text):
            _add(body, f"h{level}", text)
        case Text(text):
            _add(body, "p", text)
        case Items(texts):
            items = ElementTree.SubElement(body, "ul")
            for text in texts:
                _add(items, "li", text)
        case Table(header, rows):
            table = ElementTree.SubElement(ElementTree.SubElement(body, "div", {"class": "wide"}), "table")
            line = ElementTree.SubElement(table, "tr")
            for text in header:
                _add(line, "th", text)
            for row in rows:
                line = ElementTree.SubElement(table, "tr")
                for cell in row:
                    _add_cell(line, cell)
        case Picture(name, alt, caption):
            figure = ElementTree.SubElement(body, "figure")
            _add_image(figure, "jpeg" if name.endswith(".jpg") else "png", (folder / name).read_bytes(), alt)
            _add(figure, "figcaption", caption)
        case Gallery():
            kind = {3: "cards three", 4: "cards", 5: "cards five"}[block.columns]
            grid = ElementTree.SubElement(body, "div", {"class": kind})
            for card in block.cards:
                _add_card(grid, card)
        case Code(text):
            _add(body, "pre", text)
        case Folded(line, table):
            details = ElementTree.SubElement(body, "details", {"open": "open"} if block.shown else {})
            _add(details, "summary", line)
            _add_block(details, table, folder)


def _add_cell(line: ElementTree.Element, cell: AnyCell) -> None:
    if isinstance(cell, Number):
        _add_number(_add(line, "td", ""), cell)
        return
    if isinstance(cell, Exact):
        _add(line, "td", cell.text, **{"class": "exact"})
        return
    text = cell.text if isinstance(cell, Cell) else cell
    kind = {RIGHT_SIGN: "right", WRONG_SIGN: "wrong"}.get(text[:1])
    element = _add(line, "td", text, **({"class": kind} if kind else {}))
    if isinstance(cell, Cell):
        _add(element, "small", cell.detail)


def _add_number(parent: ElementTree.Element, number: Number) -> ElementTree.Element:
    return _add(parent, "span", number.text, **{"class": "number", "style": f"background:{number.colour}"})


def _add_card(grid: ElementTree.Element, card: Card | Labelled) -> None:
    element = ElementTree.SubElement(grid, "div", {"class": "card"})
    buffer = io.BytesIO()
    Image.fromarray(card.picture_HW3).save(buffer, "JPEG", quality=85, subsampling=0)
    _add_image(element, "jpeg", buffer.getvalue(), card.alt)
    _add(element, "b", card.title)
    if isinstance(card, Labelled):
        _add(element, "span", card.note, **{"class": "note"})
        for number, text in card.labels:
            label = _add(element, "div", "", **{"class": "label"})
            _add_number(label, number).tail = f" {text}"
        return
    for answer in card.answers:
        _add(element, "span", answer.marked, **{"class": "right" if answer.right else "wrong"})


def _add_image(parent: ElementTree.Element, kind: str, data: bytes, alt: str) -> None:
    ElementTree.SubElement(parent, "img", src=f"data:image/{kind};base64,{base64.b64encode(data).decode()}", alt=alt)
