"""The questions of an evaluation on a held-out region store, in batches of one shape."""
from collections.abc import Iterator, Sequence

import numpy as np

from granvit.data.batch import PromptBatch, Question, prompt_batch, record_pixels
from granvit.data.chat import Chat
from granvit.data.images import image_tokens, to_views
from granvit.data.prompts import Box
from granvit.data.records import ImageRecord
from granvit.data.store import MAX_PIXELS, REGIONS, Store
from granvit.models import VisionConfig
from granvit.stages import Task

HeldOut = tuple[str, Task, str, str, Box | None]  # record id, task, question, reference answer, box


def held_out(
    store: Store,
    tasks: Sequence[Task],
    chat: Chat,
    vision: VisionConfig,
    batch: int,
    images: int,
    rank: int = 0,
    world: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[PromptBatch, list[HeldOut]]]:
    """Yields this rank's batches of all questions of `tasks` about `images` images, spaced evenly over the store.

    All batches have one shape. Batch b belongs to rank b mod `world`. The last batch repeats its last question to fill the
    arrays; its list of `HeldOut` is shorter. `ValueError` names a record that cannot be read: it is not left out, because scores
    over fewer questions would not be comparable.
    """
    if store.kind != REGIONS:
        raise ValueError(f"eval.source {store.path} is a {store.kind.format} store; it must be a region store")
    chosen = np.unique(np.linspace(0, store.records - 1, min(images, store.records)).round().astype(int)).tolist()
    items: list[tuple[int, HeldOut]] = []
    sizes: dict[int, tuple[int, int]] = {}
    for image in chosen:
        record = _held_out_record(store, image)
        sizes[image] = record.width, record.height
        for task in tasks:
            if task == "global":
                questions_of_task = [Question(task)] if record.global_caption is not None else []
            else:
                questions_of_task = [Question(task, region) for region in range(len(record.regions))]
            for question in questions_of_task:
                box = None if question.region is None else record.regions[question.region].box
                items.append((image, (record.id, task, *question.turn(record), box)))
    if not items:
        raise ValueError(f"store {store.path}: no question of the tasks {list(tasks)} to evaluate")
    lengths = chat.question_lengths([item[2] for _, item in items])
    tokens = {image: int(image_tokens(*size, vision)) for image, size in sizes.items()}
    length = max(chat.prefix_length(tokens[image]) + question for (image, _), question in zip(items, lengths, strict=True))
    for first in range(rank * batch, len(items), world * batch):
        part = items[first : first + batch]
        rows = part + [part[-1]] * (batch - len(part))
        pixels = {}
        for image, (record_id, *_) in part:
            if image not in pixels:
                try:
                    pixels[image] = to_views(record_pixels(_held_out_record(store, image), max_pixels), vision)
                except ValueError as error:
                    raise ValueError(f"store {store.path}: held-out record {record_id}: {error}") from None
        pixels_B3RR = np.stack([pixels[image] for image, _ in rows])
        row_sizes, questions = [sizes[image] for image, _ in rows], [item[2] for _, item in rows]
        yield prompt_batch(pixels_B3RR, questions, chat, vision, length, row_sizes), [item for _, item in part]


def _held_out_record(store: Store, image: int) -> ImageRecord:
    try:
        record = store.record(image)
    except ValueError as error:
        raise ValueError(f"store {store.path}: held-out image {image}: {error}") from None
    assert isinstance(record, ImageRecord)  # the store is one of regions
    return record
