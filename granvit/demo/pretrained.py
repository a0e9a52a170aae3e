"""The demo's small pretrained decoder and encoder: their training rows, and their export in the layouts of transformers.

GranViT starts from a pretrained decoder and a pretrained encoder. The demo downloads none, it trains a small pair:
- The decoder learns from text alone. A row has a text map in the place of the image: one token for each patch, which names what
  covers the patch (a word of the object's caption, or "." for the background). The map is made from the annotations, not from
  pixels. The questions are Bbox2Caption, global captions, and in which rows and columns of the map an object is. They teach the
  decoder to find a position in its context, which a large language model can do already.
- The encoder learns from whole images and their global captions, through the frozen decoder. It is an image-level encoder, as
  SigLIP is.
Neither is trained on Caption2Bbox or on region questions about an image.
"""
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from granvit.checkpoint.layouts import Layout
from granvit.checkpoint.layouts.qwen2 import QWEN2
from granvit.checkpoint.layouts.siglip import SIGLIP
from granvit.checkpoint.run import newest_checkpoint
from granvit.config import Bucket
from granvit.data.batch import Batch, Packer, Question
from granvit.data.chat import Chat
from granvit.data.images import box_to_square
from granvit.data.records import ImageRecord
from granvit.models import LanguageConfig, VisionConfig

GROUND = "."  # the text of a map's cells without an object
WHERE = "where is "
FUNCTION_WORDS = {"the", "word", "in", '"'}


def _content_tokens(caption: str, chat: Chat) -> list[int]:
    """The tokens of the caption as an answer, without function words and quotation marks."""
    ids = chat.answer_ids(caption)[:-1]
    return [i for i in ids if chat.decode([i]).strip() not in FUNCTION_WORDS]


def text_map(record: ImageRecord, chat: Chat, grid: int) -> list[int]:
    """Token ids of the `grid` x `grid` cells of the image padded to a square, row by row.

    A cell belongs to the region that covers the largest share of it. The content words of the region's caption fill its cells,
    repeated, in a random order seeded by the record's id. A region fills the cells of which it covers more than 40%, and at least
    as many cells as it has words, if it has that many cells. Other cells hold `GROUND`.
    """
    rng = np.random.default_rng(list(record.id.encode()))
    edges = np.arange(grid + 1) / grid
    cells = np.full(grid**2, chat.answer_ids(GROUND)[0])
    boxes = [box_to_square(region.box, record.width, record.height) for region in record.regions]
    covered = np.array([
        np.outer(np.clip(np.minimum(y2, edges[1:]) - np.maximum(y1, edges[:-1]), 0, None),
                 np.clip(np.minimum(x2, edges[1:]) - np.maximum(x1, edges[:-1]), 0, None)).ravel()
        for x1, y1, x2, y2 in boxes
    ]) * grid**2  # fmt: skip
    owner_of_cell = covered.argmax(0)
    for number, region in enumerate(record.regions):
        words = rng.permutation(_content_tokens(region.caption, chat))
        own_share = np.where(owner_of_cell == number, covered[number], 0)
        by_share = np.argsort(-own_share, kind="stable")
        written_cells = [c for rank, c in enumerate(by_share) if own_share[c] > 0.4 or (own_share[c] > 0 and rank < len(words))]
        cells[written_cells] = np.resize(words, len(written_cells))
    return cells.tolist()


def where_turns(record: ImageRecord, grid: int) -> list[tuple[str, str]]:
    """(question, answer) for each region: the grid lines nearest to the sides of its box."""
    turns = []
    for region in record.regions:
        left, top, right, bottom = (int(side * grid + 0.5) for side in box_to_square(region.box, record.width, record.height))
        turns.append((WHERE + region.caption, place(top, bottom, left, right)))
    return turns


def place(top: int, bottom: int, left: int, right: int) -> str:
    """The answer text for a rectangle of the map, given by its grid lines."""
    return f"rows {top} to {bottom} columns {left} to {right}"


def compose_text(packer: Packer, record: ImageRecord, questions: Sequence[Question], bucket: Bucket) -> Batch:
    """A row with the record's text map in the place of its image (a `compose` function of `granvit.data.loader.Loader`)."""
    grid = packer.vision.grid
    cells = text_map(record, packer.chat, grid)
    turns = [question.turn(record) for question in questions]
    turns += where_turns(record, grid)
    return packer.text_row(record.id, cells, turns, bucket)


def publish_language(run: Path, language: LanguageConfig, tokenizer: Path, out: Path) -> None:
    """Writes a run's decoder to `out` in transformers' layout of Qwen2: config.json, model.safetensors, tokenizer.json."""
    _publish(run, QWEN2, QWEN2.write_config(None, language), out)
    (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())


def publish_vision(run: Path, vision: VisionConfig, out: Path) -> None:
    """Writes a run's encoder to `out` in transformers' layout of a SigLIP vision tower. All of its blocks must be built."""
    _publish(run, SIGLIP, SIGLIP.write_config(vision, None), out)


def _publish(run: Path, layout: Layout, config: dict, out: Path) -> None:
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise ValueError(f"{run}: no checkpoint; `python scripts/demo.py prepare` makes it")
    names = ((layout.spellings[0].foreign(name), array) for name, array in checkpoint.tensors("model"))
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: array for name, array in names if name}, out / "model.safetensors", metadata=dict(layout.metadata))
    (out / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=1))
