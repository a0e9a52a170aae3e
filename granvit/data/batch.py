"""The fixed-shape arrays of a training step, and the packer that builds them with one shared prefix per row.

A row is a `Batch` with B = 1; `join` concatenates rows. `Packer` builds a row: the prefix once, then each question with its
answer (or a whole conversation) as its own segment. The last token of a segment (end of turn) is a target but not an input.

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
    """One image per row, with up to K region questions and one global question about it.

    Segment 0 is the prefix (system turn, user header, image tokens), segments 1, 2, ... are the questions with their answers, -1
    is padding. All turns of a conversation are one segment. A token attends to a key iff the key is not later in the row and the
    key's segment is 0 or the token's own segment. In every segment the position ids start at the length of the prefix.
    """

    pixels_B3RR: np.ndarray  # uint8, RGB in the padded frame, normalised inside the graph; with tiling [B, T, 3, R, R]
    image_weights_B: np.ndarray  # float32: 1 with an image; 0 in a text row, whose image positions hold ordinary token ids
    token_ids_BS: np.ndarray  # int32; in a row with an image, image features replace the embeddings at the image positions
    positions_BS: np.ndarray  # int32
    segments_BS: np.ndarray  # int32
    image_positions_BN: np.ndarray  # int32, the index of image token n in its row; -1 where its tile is absent
    answer_positions_BA: np.ndarray  # int32, the index in the row whose output predicts the target (0 where the weight is 0)
    answer_targets_BA: np.ndarray  # int32
    answer_weights_BA: np.ndarray  # float32, 1 supervised, 0 not
    boxes_BK4: np.ndarray  # float32, the distilled boxes: xyxy, 0..1, relative to the feature map that ROIAlign reads
    box_weights_BK: np.ndarray  # float32, 1 valid, 0 not
    crops_BK3rr: np.ndarray  # uint8, the teacher's inputs: each box cut out of the image and resized to r x r
    record_ids: tuple[str, ...]  # per row; "" for a row of weight zero
    questions: int  # questions with at least one supervised token
    skipped: tuple[tuple[str, str], ...] = ()  # (name of the record, region or turn; reason) for all that was left out
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
    """One question without an answer per row, right-padded, for generation."""

    pixels_B3RR: np.ndarray  # uint8; with tiling [B, T, 3, R, R]
    token_ids_BS: np.ndarray  # int32
    lengths_B: np.ndarray  # int32, number of prompt tokens
    image_positions_BN: np.ndarray  # int32; -1 where the token's tile is absent


@dataclass(frozen=True)
class Question:
    """One question about an image. `region` is an index into the record's regions, None for the global question."""

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
    """The record's decoded image, uint8 `[H, W, 3]`; `ValueError` with the reason if it cannot be used."""
    image_HW3 = decode(record.image, max_pixels)
    if image_HW3.shape[:2] != (record.height, record.width):
        raise ValueError("image size differs from the width and height in its record")
    return image_HW3


class Packer:
    """Builds rows for one encoder and one chat template.

    `boxes` is the number of distilled boxes per row (0 if the stage does not distil), `crop_size` the side of the teacher's crops
    in pixels, `crop_scale` the factor by which a box is enlarged before it is cropped, `max_pixels` the largest image decoded.
    """

    def __init__(self, vision: VisionConfig, chat: Chat, boxes: int, crop_size: int, crop_scale: float, max_pixels: int):
        self.vision, self.chat = vision, chat
        self.boxes, self.crop_size, self.crop_scale, self.max_pixels = boxes, crop_size, crop_scale, max_pixels

    def row(self, record: ImageRecord, questions: Sequence[Question], bucket: Bucket) -> Batch:
        """A row with the record's image and these questions about it.

        A question that does not fit into the rest of the bucket is left out completely and listed in `skipped`. If the image
        cannot be used or no question fits, the result is a row of weight zero.
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
        """A row without an image: ordinary tokens `image_ids` at the image positions, and (question, answer) texts `turns`.

        `ValueError` unless `image_ids` has as many ids as the smallest image has tokens. A turn that does not fit is left out
        completely and listed in `skipped`.
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
        """A conversation as one segment: the tokens of a turn attend to all earlier turns.

        The first turn that does not fit into the bucket and all later ones are left out and listed in `skipped`. If the
        conversation cannot be used, the result is a row of weight zero.
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
        """A row of weight zero: nothing is supervised or distilled. It has a prefix, so that softmax never gets an empty row."""
        text, _ = self._lay_out(self._image_ids(1, 1), [], bucket)
        return Batch(**self._no_image(), **text, **self._no_boxes(), record_ids=("",), questions=0, skipped=skipped)

    def _image_ids(self, width: int, height: int) -> list[int]:
        """One placeholder id per token of an image of this size."""
        return [self.chat.pad_token] * int(image_tokens(width, height, self.vision))

    def _segments(self, turns: Iterable[tuple[str, str]]) -> list[TurnIds]:
        """One segment for each (question, answer)."""
        return [[(self.chat.question_ids(question), self.chat.answer_ids(answer))] for question, answer in turns]

    def _lay_out(self, image_ids: Sequence[int] | None, segments: Sequence[TurnIds], bucket: Bucket) -> tuple[dict, list[int]]:
        """The text arrays of one row, and how many turns of each segment fit. `image_ids` None: no image positions."""
        before, after = self.chat.prefix_before, self.chat.prefix_after
        prefix = list(before) if image_ids is None else [*before, *image_ids, *after]
        if len(prefix) > bucket.length:
            raise ValueError(f"data.buckets: length {bucket.length} does not hold the prefix of {len(prefix)} tokens; raise it")
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
        whole_image = np.array([0, 0, 1, 1], np.float32)  # weight 0, but with an area: ROIAlign would divide by zero
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
    """Concatenates rows of one bucket to one batch."""
    names = [f.name for f in fields(Batch) if isinstance(getattr(rows[0], f.name), np.ndarray)]
    arrays = {name: np.concatenate([getattr(row, name) for row in rows]) for name in names}
    return Batch(
        **arrays,
        record_ids=tuple(i for row in rows for i in row.record_ids),
        questions=sum(row.questions for row in rows),
        skipped=tuple(s for row in rows for s in row.skipped),
    )


def image_positions(width: int, height: int, chat: Chat, vision: VisionConfig) -> np.ndarray:
    """The index in its row of each token of an image of this size, int32 `[N]`; -1 for tokens of tiles that it does not have."""
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
    """One question per row about that row's image, right-padded to `length` (default: the longest row).

    `pixels_B3RR` holds the result of `to_views` for each image. `sizes` are the widths and heights of the original images, which
    determine their tiles; required with tiling.
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
        token_ids_BS[b, : len(row)] = row  # numpy raises if the caller's `length` is too short
    lengths_B = np.array([len(row) for row in rows], np.int32)
    positions_BN = np.stack([image_positions(*size, chat, vision) for size in sizes])
    return PromptBatch(pixels_B3RR, token_ids_BS, lengths_B, positions_BN)
