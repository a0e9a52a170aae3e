"""Text maps: the rows on which the demo's decoder is pretrained, from text alone.

A row has a text map in the place of the image: one token for each patch, which names what covers the patch (a word of the
object's caption, or "." for the background). The map is made from the annotations, not from pixels. The questions are
Bbox2Caption, global captions, and in which rows and columns of the map an object is. They teach the decoder to find a position in
its context, which a large language model can do already.
"""
from collections.abc import Sequence

import numpy as np

from granvit.config import Bucket
from granvit.data.batch import Batch, Packer, Question
from granvit.data.chat import Chat
from granvit.data.images import box_to_square
from granvit.data.records import ImageRecord

GROUND = "."  # the text of a map's cells without an object
WHERE = "where is "
FUNCTION_WORDS = {"the", "word", "in", '"'}


def _content_tokens(caption: str, chat: Chat) -> list[int]:
    """The tokens of the caption as an answer, without function words and quotation marks."""
    ids = chat.answer_ids(caption)[:-1]
    return [i for i in ids if chat.decode([i]).strip() not in FUNCTION_WORDS]


def _written_cells(record: ImageRecord, chat: Chat, grid: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each region: the cells of the map (row * grid + column) that hold its words, and the words' token ids.

    A cell belongs to the region that covers the largest share of it. A region fills the cells of which it covers more than 40%,
    and at least as many cells as it has words, if it has that many cells. Its words are the content words of its caption, in a
    random order seeded by the record's id, and repeated until its cells are filled.
    """
    rng = np.random.default_rng(list(record.id.encode()))
    edges = np.arange(grid + 1) / grid
    boxes = [box_to_square(region.box, record.width, record.height) for region in record.regions]
    covered = np.array([
        np.outer(np.clip(np.minimum(y2, edges[1:]) - np.maximum(y1, edges[:-1]), 0, None),
                 np.clip(np.minimum(x2, edges[1:]) - np.maximum(x1, edges[:-1]), 0, None)).ravel()
        for x1, y1, x2, y2 in boxes
    ]) * grid**2  # fmt: skip
    owner_of_cell = covered.argmax(0)
    written = []
    for number, region in enumerate(record.regions):
        words = rng.permutation(_content_tokens(region.caption, chat))
        own_share = np.where(owner_of_cell == number, covered[number], 0)
        by_share = np.argsort(-own_share, kind="stable")
        cells = [c for rank, c in enumerate(by_share) if own_share[c] > 0.4 or (own_share[c] > 0 and rank < len(words))]
        written.append((np.array(cells, np.intp), np.resize(words, len(cells))))
    return written


def text_map(record: ImageRecord, chat: Chat, grid: int) -> list[int]:
    """Token ids of the `grid` x `grid` cells of the image padded to a square, row by row: a word of the region that covers the
    cell (`_written_cells`), or `GROUND`."""
    map_cells = np.full(grid**2, chat.answer_ids(GROUND)[0])
    for cells, words in _written_cells(record, chat, grid):
        map_cells[cells] = words
    return map_cells.tolist()


def where_turns(record: ImageRecord, chat: Chat, grid: int) -> list[tuple[str, str]]:
    """(question, answer) for each region with a word in the map: the grid lines around the cells that hold its words."""
    turns = []
    for region, (cells, _) in zip(record.regions, _written_cells(record, chat, grid), strict=True):
        if cells.size:
            rows, columns = np.divmod(cells, grid)
            turns.append((WHERE + region.caption, place(rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)))
    return turns


def place(top: int, bottom: int, left: int, right: int) -> str:
    """The answer text for a rectangle of the map, given by its grid lines."""
    return f"rows {top} to {bottom} columns {left} to {right}"


def compose_text(packer: Packer, record: ImageRecord, questions: Sequence[Question], bucket: Bucket) -> Batch:
    """A row with the record's text map in the place of its image (a `compose` function of `granvit.data.loader.Loader`)."""
    grid = packer.vision.grid
    cells = text_map(record, packer.chat, grid)
    turns = [question.turn(record) for question in questions]
    turns += where_turns(record, packer.chat, grid)
    return packer.text_row(record.id, cells, turns, bucket)
