"""Fixed-shape arrays that a step consumes, and the shared-prefix packer that makes them.

A row is a `Batch` of B = 1; `join` stacks rows. `Packer` builds them: prefix once, then every question (or a whole conversation)
as a segment of its own, whose last token (the end of the answer's turn) is a target but never an input, since nothing follows it.

Layout letters: B rows, T views per row, K regions per row, N image tokens, S sequence, A supervised positions, R image side, r
crop side.
"""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from granvit.config import Bucket
from granvit.data.chat import Chat, TurnIds
from granvit.data.images import box_to_features, crop, decode, image_tokens, tile_grids, to_views, token_places
from granvit.data.prompts import answer_text, question_text
from granvit.data.records import Conversation, ImageRecord
from granvit.models import VisionConfig
from granvit.stages import Task


@dataclass(frozen=True)
class Batch:
    """One image per row, up to K region questions and one global question about it (DESIGN, "A batch").

    Segment 0 is the prefix (system turn, user header, image tokens), 1.. are questions with their answers, -1 is padding. A
    token may attend to a key iff the key is not later in the row and its segment is 0 or the token's own. Positions
    restart after the prefix in every segment. The turns of a conversation are one segment.
    """

    pixels_B3RR: np.ndarray  # uint8, RGB in the padded frame, normalised inside the graph; with tiling [B, T, 3, R, R]
    image_weights_B: np.ndarray  # float32: 1 an image row; 0 a text row, whose image positions hold ordinary token ids
    token_ids_BS: np.ndarray  # int32; the id at an image position of an image row is replaced by an image feature
    positions_BS: np.ndarray  # int32
    segments_BS: np.ndarray  # int32
    image_positions_BN: np.ndarray  # int32, where image token n stands in its row; -1 where its tile is absent
    answer_positions_BA: np.ndarray  # int32, the position whose output predicts the target (0 where the weight is 0)
    answer_targets_BA: np.ndarray  # int32
    answer_weights_BA: np.ndarray  # float32, 1 supervised, 0 not
    boxes_BK4: np.ndarray  # float32, xyxy over the feature map that regions are read from, 0..1; the boxes that are distilled
    box_weights_BK: np.ndarray  # float32, 1 valid, 0 not
    crops_BK3rr: np.ndarray  # uint8, the teacher's views, squashed to r x r
    record_ids: tuple[str, ...]  # per row; "" for a row of weight zero
    questions: int  # questions with at least one supervised token
    skipped: tuple[tuple[str, str], ...] = ()  # (record id, reason) of what could not be used
    grids_B2: np.ndarray | None = None  # int32, rows and columns of tiles; None without tiling

    @property
    def tokens(self) -> float:
        """Supervised tokens."""
        return float(self.answer_weights_BA.sum())

    @property
    def boxes(self) -> float:
        """Valid boxes."""
        return float(self.box_weights_BK.sum())


@dataclass(frozen=True)
class PromptBatch:
    """One open question per row, right-padded, for generation."""

    pixels_B3RR: np.ndarray  # uint8; with tiling [B, T, 3, R, R]
    token_ids_BS: np.ndarray  # int32
    lengths_B: np.ndarray  # int32, tokens of the prompt
    image_positions_BN: np.ndarray  # int32; -1 where the token's tile is absent


@dataclass(frozen=True)
class Question:
    """One question about an image: `region` indexes the record's regions; None for the global question."""

    task: Task
    region: int | None = None

    def turn(self, record: ImageRecord) -> tuple[str, str]:
        """The question's and the answer's text."""
        if self.region is None:
            assert record.global_caption is not None, record.id
            return question_text("global"), record.global_caption
        region = record.regions[self.region]
        return question_text(self.task, region.box, region.caption), answer_text(self.task, region.box, region.caption)


def record_pixels(record: ImageRecord | Conversation, max_pixels: int) -> np.ndarray:
    """The record's image, uint8 `[H, W, 3]`; `ValueError` with the reason where it cannot be used."""
    image_HW3 = decode(record.image, max_pixels)
    if image_HW3.shape[:2] != (record.height, record.width):
        raise ValueError("image is not of the size that its record states")
    return image_HW3


class Packer:
    """Builds rows for one encoder and one chat template.

    `boxes` is the number of distilled boxes a row has room for (0: the stage does not distil), `crop_size` the side of the
    teacher's crops in pixels, `crop_scale` their enlargement.
    """

    def __init__(self, vision: VisionConfig, chat: Chat, boxes: int, crop_size: int, crop_scale: float, max_pixels: int):
        self.vision, self.chat = vision, chat
        self.boxes, self.crop_size, self.crop_scale, self.max_pixels = boxes, crop_size, crop_scale, max_pixels

    def row(self, record: ImageRecord, questions: Sequence[Question], bucket: Bucket) -> Batch:
        """An image and questions about it.

        A question that does not fit in what is left of the bucket is left out whole and named in `skipped`; an image that cannot
        be used, or a row without any question left, is a row of weight zero.
        """
        try:
            image_HW3 = record_pixels(record, self.max_pixels)
        except ValueError as error:
            return self.empty(bucket, ((record.id, str(error)),))
        image_ids = self._image_ids(record.width, record.height)
        text, placed = self._lay_out(image_ids, self._segments(question.turn(record) for question in questions), bucket)
        skipped = tuple(
            (record.id if q.region is None else f"{record.id} region {q.region}", _too_long(q.task, bucket))
            for q, fits in zip(questions, placed, strict=True)
            if not fits
        )
        if not any(placed):
            return self.empty(bucket, skipped)
        regions = dict.fromkeys(q.region for q, fits in zip(questions, placed, strict=True) if fits and q.region is not None)
        return Batch(
            **self._image(image_HW3),
            **text,
            **self._distilled(record, image_HW3, list(regions)[: self.boxes]),
            record_ids=(record.id,),
            questions=sum(placed),
            skipped=skipped,
        )

    def text_row(self, record_id: str, image_ids: Sequence[int], turns: Sequence[tuple[str, str]], bucket: Bucket) -> Batch:
        """A row without an image: `image_ids` (as many as the smallest image has tokens) stand at the image positions as ordinary
        tokens, and `turns` are (question, answer) texts about them. What does not fit is left out whole and named in `skipped`.
        """
        if len(image_ids) != (tokens := len(self._image_ids(1, 1))):
            raise ValueError(f"text row {record_id}: {len(image_ids)} ids for {tokens} image positions")
        text, placed = self._lay_out(image_ids, self._segments(turns), bucket)
        skipped = ((record_id, _too_long("text", bucket)),) * (len(placed) - sum(placed))
        if not any(placed):
            return self.empty(bucket, skipped)
        return Batch(
            **self._no_image(), **text, **self._no_boxes(), record_ids=(record_id,), questions=sum(placed), skipped=skipped
        )

    def conversation_row(self, record: Conversation, bucket: Bucket) -> Batch:
        """A conversation as one segment: every turn sees those before it.

        Its turns from the first that does not fit in the bucket on are left out and named in `skipped`; a conversation that
        cannot be used is a row of weight zero.
        """
        try:
            image = self._image(record_pixels(record, self.max_pixels)) if record.image else self._no_image()
            turns = self.chat.conversation_ids(record.turns, bool(record.image))
        except ValueError as error:
            return self.empty(bucket, ((record.id, str(error)),))
        image_ids = self._image_ids(record.width, record.height) if record.image else None
        text, (turns_placed,) = self._lay_out(image_ids, [turns], bucket)
        left_out = range(turns_placed, len(turns))
        skipped = tuple((f"{record.id} turn {turn}", _too_long("conversation", bucket)) for turn in left_out)
        if not turns_placed:
            return self.empty(bucket, skipped)
        return Batch(**image, **text, **self._no_boxes(), record_ids=(record.id,), questions=turns_placed, skipped=skipped)

    def empty(self, bucket: Bucket, skipped: tuple[tuple[str, str], ...] = ()) -> Batch:
        """A row of weight zero: a prefix, nothing supervised, nothing distilled, no division by zero in any attention row."""
        text, _ = self._lay_out(self._image_ids(1, 1), [], bucket)
        return Batch(**self._no_image(), **text, **self._no_boxes(), record_ids=("",), questions=0, skipped=skipped)

    def _image_ids(self, width: int, height: int) -> list[int]:
        """What stands in a row where the tokens of an image of this size are to come."""
        return [self.chat.pad_token] * int(image_tokens(width, height, self.vision))

    def _segments(self, turns: Iterable[tuple[str, str]]) -> list[TurnIds]:
        """Each question with its answer as a segment of its own."""
        return [[(self.chat.question_ids(question), self.chat.answer_ids(answer))] for question, answer in turns]

    def _lay_out(self, image_ids: Sequence[int] | None, segments: Sequence[TurnIds], bucket: Bucket) -> tuple[dict, list[int]]:
        """The text arrays of one row (`image_ids` None: no place for an image), and how many turns of each segment found room."""
        before, after = self.chat.prefix_before, self.chat.prefix_after
        prefix = list(before) if image_ids is None else [*before, *image_ids, *after]
        if len(prefix) > bucket.length:
            raise ValueError(f"data.buckets: length {bucket.length} does not hold the prefix of {len(prefix)} tokens")
        token_ids_BS = np.full((1, bucket.length), self.chat.pad_token, np.int32)
        positions_BS = np.zeros((1, bucket.length), np.int32)
        segments_BS = np.full((1, bucket.length), -1, np.int32)
        answers_BA = np.zeros((2, 1, bucket.answers), np.int32)  # positions, targets
        weights_BA = np.zeros((1, bucket.answers), np.float32)
        token_ids_BS[0, : len(prefix)] = prefix
        positions_BS[0, : len(prefix)] = np.arange(len(prefix))
        segments_BS[0, : len(prefix)] = 0
        end, answered, number, placed = len(prefix), 0, 0, []
        for turns in segments:
            start, turns_placed = end, 0
            for question_ids, answer_ids in turns:
                ids = question_ids + answer_ids[:-1]
                if end + len(ids) > bucket.length or answered + len(answer_ids) > bucket.answers:
                    break
                turn, supervised = slice(end, end + len(ids)), slice(answered, answered + len(answer_ids))
                token_ids_BS[0, turn] = ids
                answers_BA[0, 0, supervised] = end + len(question_ids) - 1 + np.arange(len(answer_ids))
                answers_BA[1, 0, supervised] = answer_ids
                weights_BA[0, supervised] = 1
                end, answered, turns_placed = turn.stop, supervised.stop, turns_placed + 1
            number += turns_placed > 0
            positions_BS[0, start:end] = len(prefix) + np.arange(end - start)
            segments_BS[0, start:end] = number
            placed.append(turns_placed)
        return {
            "token_ids_BS": token_ids_BS,
            "positions_BS": positions_BS,
            "segments_BS": segments_BS,
            "answer_positions_BA": answers_BA[0],
            "answer_targets_BA": answers_BA[1],
            "answer_weights_BA": weights_BA,
        }, placed

    def _distilled(self, record: ImageRecord, image_HW3: np.ndarray, regions: Sequence[int]) -> dict:
        arrays = self._no_boxes()
        for k, region in enumerate(regions):
            box = record.regions[region].box
            arrays["boxes_BK4"][0, k] = box_to_features(box, record.width, record.height, self.vision)
            arrays["box_weights_BK"][0, k] = 1
            arrays["crops_BK3rr"][0, k] = crop(image_HW3, box, self.crop_scale, self.crop_size, self.vision.resize)
        return arrays

    def _no_boxes(self) -> dict:
        whole_image = np.array([0, 0, 1, 1], np.float32)  # weight 0, but a box that no ROIAlign divides by zero over
        return {
            "boxes_BK4": np.tile(whole_image, (1, self.boxes, 1)),
            "box_weights_BK": np.zeros((1, self.boxes), np.float32),
            "crops_BK3rr": np.zeros((1, self.boxes, 3, self.crop_size, self.crop_size), np.uint8),
        }

    def _image(self, image_HW3: np.ndarray) -> dict:
        height, width = image_HW3.shape[:2]
        arrays = {
            "pixels_B3RR": to_views(image_HW3, self.vision)[None],
            "image_weights_B": np.ones(1, np.float32),
            "image_positions_BN": image_positions(width, height, self.chat, self.vision)[None],
        }
        if self.vision.tiles:
            arrays["grids_B2"] = tile_grids(width, height, self.vision).astype(np.int32)[None]
        return arrays

    def _no_image(self) -> dict:
        smallest = np.zeros((1, 1, 3), np.uint8)
        return self._image(smallest) | {"image_weights_B": np.zeros(1, np.float32)}


def _too_long(task: str, bucket: Bucket) -> str:
    return f"{task} question does not fit in a row of {bucket.length} tokens, {bucket.answers} of them answers"


def join(rows: Sequence[Batch]) -> Batch:
    """Rows of one bucket as one batch."""
    names = [f.name for f in fields(Batch) if isinstance(getattr(rows[0], f.name), np.ndarray)]
    arrays = {name: np.concatenate([getattr(row, name) for row in rows]) for name in names}
    return Batch(
        **arrays,
        record_ids=tuple(i for row in rows for i in row.record_ids),
        questions=sum(row.questions for row in rows),
        skipped=tuple(s for row in rows for s in row.skipped),
    )


def image_positions(width: int, height: int, chat: Chat, vision: VisionConfig) -> np.ndarray:
    """Where the tokens of an image of this size stand in their row, int32 `[N]`; -1 for those of tiles that it has not."""
    places_N = token_places(width, height, vision)
    return np.where(places_N >= 0, len(chat.prefix_before) + places_N, -1).astype(np.int32)


def prompt_batch(
    pixels_B3RR: np.ndarray,
    questions: Sequence[str],
    chat: Chat,
    vision: VisionConfig,
    length: int | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> PromptBatch:
    """One open question per row about that row's image (as `to_views` shows it), right-padded to `length` (default: the longest).

    `sizes` are the images' own widths and heights, from which their tiles follow: with tiling they must be given.
    """
    assert sizes is not None or not vision.tiles
    sizes = sizes or [(vision.image_size, vision.image_size)] * len(questions)
    images = [[chat.pad_token] * int(image_tokens(*size, vision)) for size in sizes]
    rows = [
        [*chat.prefix_before, *image, *chat.prefix_after, *chat.question_ids(question)]
        for image, question in zip(images, questions, strict=True)
    ]
    length = length or max(map(len, rows))
    token_ids_BS = np.full((len(rows), length), chat.pad_token, np.int32)
    for b, row in enumerate(rows):
        token_ids_BS[b, : len(row)] = row  # numpy raises where `length` is too short: the caller's mistake
    lengths_B = np.array([len(row) for row in rows], np.int32)
    positions_BN = np.stack([image_positions(*size, chat, vision) for size in sizes])
    return PromptBatch(pixels_B3RR, token_ids_BS, lengths_B, positions_BN)
