"""The demo's own small pretrained pair: what it learns from, and the directories it is shipped in.

GranViT starts from a pretrained language model and a pretrained encoder. The demo downloads none, so it makes a small pair:
- the decoder, on text alone. A row's image slot holds a text map: one token for each patch of the image saying what covers
  it (a word of the object's caption, or a sign for bare ground), made from the annotations, never from pixels. Bbox2Caption
  and global questions, and in which rows and columns of the map an object is, teach it to look up WHERE in its context, as a
  large language model can;
- the encoder, on whole images with their global captions through the frozen decoder: an image-level encoder, as SigLIP is.
Neither sees Caption2Bbox, nor a region question about an image.
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

GROUND = "."  # what a map writes where there is no object
WHERE = "where is "
FUNCTION_WORDS = {"the", "word", "in", '"'}


def _content_tokens(caption: str, chat: Chat) -> list[int]:
    """The caption's tokens as its answer spells them, without function words and quotation marks."""
    ids = chat.answer_ids(caption)[:-1]
    return [i for i in ids if chat.decode([i]).strip() not in FUNCTION_WORDS]


def text_map(record: ImageRecord, chat: Chat, grid: int) -> list[int]:
    """One token for each of `grid` x `grid` cells of the padded frame, row by row.

    A cell belongs to the region that covers most of it; a region writes the content words of its caption into its cells,
    over and over, in an order drawn from the record's id. It has a cell for every word if it touches that many.
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
    """Where each object is: the lines of the grid nearest to the sides of its box."""
    turns = []
    for region in record.regions:
        left, top, right, bottom = (int(side * grid + 0.5) for side in box_to_square(region.box, record.width, record.height))
        turns.append((WHERE + region.caption, place(top, bottom, left, right)))
    return turns


def place(top: int, bottom: int, left: int, right: int) -> str:
    """A rectangle of the map, in lines of its grid, as answers name it."""
    return f"rows {top} to {bottom} columns {left} to {right}"


def compose_text(packer: Packer, record: ImageRecord, questions: Sequence[Question], bucket: Bucket) -> Batch:
    """A row about the record's text map in place of its image (`granvit.data.loader.Loader`'s `compose`)."""
    grid = packer.vision.grid
    cells = text_map(record, packer.chat, grid)
    turns = [question.turn(record) for question in questions]
    turns += where_turns(record, grid)
    return packer.text_row(record.id, cells, turns, bucket)


def publish_language(run: Path, language: LanguageConfig, tokenizer: Path, out: Path) -> None:
    """Writes a run's decoder as transformers ships a Qwen2: config.json, model.safetensors, tokenizer.json."""
    _publish(run, QWEN2, QWEN2.write_config(None, language), out)
    (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())


def publish_vision(run: Path, vision: VisionConfig, out: Path) -> None:
    """Writes a run's encoder, all of whose blocks were trained, as transformers ships a SigLIP vision tower."""
    _publish(run, SIGLIP, SIGLIP.write_config(vision, None), out)


def _newest(run: Path):
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise ValueError(f"{run}: no checkpoint; `python scripts/demo.py prepare` makes it")
    return checkpoint.tensors("model")


def _publish(run: Path, layout: Layout, config: dict, out: Path) -> None:
    names = ((layout.spellings[0].foreign(name), array) for name, array in _newest(run))
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: array for name, array in names if name}, out / "model.safetensors", metadata=dict(layout.metadata))
    (out / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=1))
