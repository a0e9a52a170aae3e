"""DocBank's token files (https://github.com/doc-analysis/DocBank, https://arxiv.org/abs/2006.01038): one text file per page.

A line is a token, tab-separated: text, x0, y0, x1, y1, R, G, B, font, label. The four coordinates are thousandths of the page's
width and height; regions have them as relative boxes, 0..1. `##LTFigure##` stands for a figure and `##LTLine##` for a drawn line:

    NLDSA	362	108	418	121	0	0	0	EJVNGV+CMR10	paragraph

Tokens are in the order of extraction, from the top of the page down: the rows of two columns alternate.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.per_image import OtherFormat, around, file_parts, printable, read_bytes, read_files, with_ending

_ENDINGS = (".txt",)
_GAP = 1.5  # of a line's height: words are closer than this, columns are not


class _Token(NamedTuple):
    text: str
    box: tuple[float, float, float, float]  # in thousandths, in which distances are compared without rounding
    label: str


@dataclass(frozen=True)
class DocBank:
    """`annotations`: the folder of text files (`DocBank_500K_txt`). The image of `a.txt` is `a_ori.jpg` (`DocBank_500K_ori_img`).

    `group` says which tokens form a region; their texts are joined with spaces, and its box is the smallest that holds theirs.
    `line`: consecutive tokens of one label that share half of the lower one's height and follow each other from left to right
    with a gap of at most 1.5 times that height: a line of one column. `label`: consecutive tokens of one label; where a page has
    two columns, their texts alternate and the box holds both. A figure is a region without a caption; drawn lines are refused.
    """

    annotations: str | Path
    group: Literal["line", "label"] = "line"

    def parts(self) -> Sequence[str]:
        return file_parts(self.annotations, _ENDINGS, "annotations")

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        return read_files(self.annotations, _ENDINGS, part, self._image, "a token file of DocBank: ten columns with tabs between")

    def _image(self, path: Path, name: str) -> Annotated:
        try:
            lines = read_bytes(path).decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise ValueError("file is not UTF-8") from None
        regions: list[RawRegion] = []
        refused: list[tuple[str, str]] = []
        run: list[_Token] = []
        tokens = malformed = 0
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            tokens += 1
            token = _token(line)
            if token is None:
                malformed += 1
                refused.append((f"line {number}", "line is not a token with four coordinates and a label"))
            elif token.text == "##LTLine##":
                refused.append((f"line {number}", "a drawn line has no text"))
            elif not token.text.strip():
                refused.append((f"line {number}", "token has no text"))
            elif token.text == "##LTFigure##":
                regions += _region(run)
                run = []
                regions += _region([token._replace(text="")])
            else:
                if run and not self._joins(run[-1], token):
                    regions += _region(run)
                    run = []
                run.append(token)
        regions += _region(run)
        if tokens and malformed == tokens:
            raise OtherFormat
        image = with_ending(name, "_ori.jpg")
        return Annotated(printable(image), image, tuple(regions), unit="relative", refused=tuple(refused))

    def _joins(self, before: _Token, token: _Token) -> bool:
        if before.label != token.label or self.group == "label":
            return before.label == token.label
        left, top, right, bottom = before.box
        x1, y1, _, y2 = token.box
        height = min(bottom - top, y2 - y1)
        return min(bottom, y2) - max(top, y1) >= height / 2 and left <= x1 <= right + _GAP * height


def _token(line: str) -> _Token | None:
    columns = line.removesuffix("\r").split("\t")
    if len(columns) != 10:
        return None
    try:
        x1, y1, x2, y2 = (float(value) for value in columns[1:5])
    except ValueError:
        return None
    return _Token(columns[0], (x1, y1, x2, y2), columns[9])


def _region(run: list[_Token]) -> list[RawRegion]:
    if not run:
        return []
    x1, y1, x2, y2 = (value / 1000 for value in around([token.box for token in run]))
    return [RawRegion((x1, y1, x2, y2), " ".join(token.text for token in run))]
