"""Answers of the demo as cards: a held-out picture with boxes, the truth as title, and what the runs answered."""
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from granvit.data.batch import record_pixels
from granvit.data.prompts import Box, parse_box
from granvit.data.records import ImageRecord
from granvit.data.store import MAX_PIXELS
from granvit.demo.results import RIGHT, START, Prediction, Run, answer_to
from granvit.page import RIGHT_COLOUR, WRONG_COLOUR, Answer, Card
from granvit.pictures import outline

TRUE_COLOUR = "#111111"
SIDE = 320  # pixels, the longer side of a card's picture
_LINE, _RIM = 4, 2  # pixels: a box's line, and the white rim on both sides of it


def draw_boxes(record: ImageRecord, boxes: Sequence[tuple[Box, str]]) -> np.ndarray:
    """The record's image enlarged to `SIDE`, with outlines of (box, colour) that have a white rim, uint8 `[H, W, 3]`."""
    image = Image.fromarray(record_pixels(record, MAX_PIXELS))
    scale = SIDE / max(image.size)
    size = round(image.width * scale), round(image.height * scale)
    picture = image.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    for box, colour in boxes:
        x1, y1, x2, y2 = (np.array(box) * np.tile(size, 2)).round().astype(int).tolist()
        outline(draw, (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), colour, _LINE, _RIM)
    return np.asarray(picture)


def caption_card(record: ImageRecord, asked: Prediction, runs: dict[str, Run]) -> Card:
    """Bbox2Caption: the box in the question, and the captions by start weights, guesser, stage 1 and stage 2."""
    answered = [(run.label, run.last) for name in ("guesser", "stage1", "stage2") if (run := runs.get(name)) is not None]
    if (first := runs["stage1"].evaluations[0]).step == 0:
        answered.insert(0, (START, first))
    return _caption_card(record, asked, [_caption_answer(label, answer_to(found, asked)) for label, found in answered])


def worst_caption_card(record: ImageRecord, asked: Prediction, run: Run) -> Card:
    """Bbox2Caption: the box in the question, and the caption by one run with its ROUGE-L in brackets."""
    answer = _caption_answer(run.label, asked)
    text = f"{answer.text} ({asked['scores']['rouge_l']:.2f})"
    return _caption_card(record, asked, [Answer(answer.run, text, answer.right)])


def _caption_card(record: ImageRecord, asked: Prediction, answers: list[Answer]) -> Card:
    alt = f"Held-out image {record.id} with a box around: {asked['reference']}"
    return Card(draw_boxes(record, [(asked["box"], TRUE_COLOUR)]), asked["reference"], tuple(answers), alt)


def _caption_answer(label: str, prediction: Prediction) -> Answer:
    return Answer(label, prediction["answer"].strip() or "(nothing)", prediction["scores"][RIGHT["bbox2caption"]] == 1)


def box_card(record: ImageRecord, asked: Prediction, run: Run, beside: Run | None = None) -> Card:
    """Caption2Bbox: the true box, the box by `run`, and in words those by `beside` and `run`. `asked` is `run`'s answer; it is
    quoted if it is no box."""
    caption = next(region.caption for region in record.regions if region.box == tuple(asked["box"]))
    answers = [] if beside is None else [_box_answer(beside.label, answer_to(beside.last, asked), "no box")]
    own = _box_answer(run.label, asked, f"no box, but “{asked['answer'].strip()}”")
    boxes, found = [(asked["box"], TRUE_COLOUR)], parse_box(asked["answer"])
    if found is not None:
        boxes.append((found, RIGHT_COLOUR if own.right else WRONG_COLOUR))
    alt = f"Held-out image {record.id} with the true box of: {caption}" + ("" if found is None else ", and the answered box")
    return Card(draw_boxes(record, boxes), caption, (*answers, own), alt)


def _box_answer(label: str, prediction: Prediction, no_box: str) -> Answer:
    scores = prediction["scores"]
    text = no_box if scores["unparsable"] else f"IoU {scores['mean_iou']:.2f}"
    return Answer(label, text, scores[RIGHT["caption2bbox"]] == 1)
