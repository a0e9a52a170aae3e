"""The Bbox2Caption loss of a run's whole model (encoder, projector and decoder) on a sample's regions."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from granvit.checkpoint.run import Checkpoint
from granvit.config import Bucket
from granvit.data.batch import Packer, Question
from granvit.data.chat import Chat
from granvit.data.images import image_tokens
from granvit.data.records import ImageRecord
from granvit.engine import TrainEngine
from granvit.logs import log_kernels
from granvit.probe.sample import Sample, read_record


@dataclass(frozen=True)
class CaptionLosses:
    """The caption loss of each row of up to `data.regions_per_row` questions. `image_N` int64 is the position of its image in the
    sample; `loss_N` (nats) and `tokens_N` float64 are sums over its supervised tokens.

    `asked_R` bool says of each region of the sample whether it is in a row. `too_long` counts the regions that do not fit even
    alone into the largest of `data.buckets`, `unusable` those of images that the run does not accept (`data.max_pixels`).
    `tokenizer` is the fingerprint of tokenizer and chat template.
    """

    image_N: np.ndarray
    loss_N: np.ndarray
    tokens_N: np.ndarray
    asked_R: np.ndarray
    too_long: int
    unusable: int
    tokenizer: str

    @property
    def questions(self) -> int:
        """The number of regions with a loss."""
        return int(self.asked_R.sum())


def check_projector(checkpoint: Checkpoint) -> None:
    """`ValueError` if the run's projector expects features of another width than its encoder has."""
    expected = checkpoint.shapes("model")["projector.linear_1.weight"][1]
    if expected != checkpoint.vision.token_width:
        raise ValueError(
            f"{checkpoint.path}: its projector expects features of width {expected}, its encoder {checkpoint.vision.name!r} has "
            f"{checkpoint.vision.token_width}: they belong to different runs"
        )


def question_lengths(record: ImageRecord, regions: Sequence[int], chat: Chat) -> np.ndarray:
    """Length in a row and supervised tokens of the Bbox2Caption question about each region, int64 `[regions, 2]`."""
    turns = [Question("bbox2caption", region).turn(record) for region in regions]
    answers = np.array(chat.answer_lengths([answer for _, answer in turns]))
    questions = np.array(chat.question_lengths([question for question, _ in turns]))
    return np.column_stack([questions + answers - 1, answers])  # the last token of an answer is not an input


def plan_rows(lengths_Q2: np.ndarray, prefix: int, buckets: Sequence[Bucket], together: int) -> list[tuple[Bucket, list[int]]]:
    """Distributes the questions about one image over rows, in order, and chooses for each row the smallest bucket that holds it.

    `lengths_Q2` is the result of `question_lengths`, `prefix` the length of the shared prefix. A row has up to `together`
    questions and fits into the last bucket, the largest. A question that does not fit into it even alone is in no row.
    """

    def smallest(row: list[int]) -> Bucket | None:
        length, answers = lengths_Q2[row].sum(0)
        return next((bucket for bucket in buckets if prefix + length <= bucket.length and answers <= bucket.answers), None)

    rows: list[list[int]] = []
    for number in range(len(lengths_Q2)):
        if rows and len(rows[-1]) < together and smallest([*rows[-1], number]) is not None:
            rows[-1].append(number)
        elif smallest([number]) is not None:
            rows.append([number])
    return [(bucket, row) for row in rows if (bucket := smallest(row)) is not None]


def caption_losses(checkpoint: Checkpoint, chat: Chat, Engine: type[TrainEngine], sample: Sample, device: str, dtype: str,
                   done: Callable[[int], None]) -> CaptionLosses:  # fmt: skip
    """Asks Bbox2Caption about every region of the sample as in training: up to `data.regions_per_row` questions in a row, with
    the run's tiling, in the smallest of `data.buckets` that holds the row (see `plan_rows`). Each row is a batch of its own, so
    that losses can be attributed to images; MindSpore compiles one graph for each bucket in use. `done` is called with the number
    of images finished. `ValueError` if no region fits.
    """
    runtime = checkpoint.config.runtime.model_copy(update={"device": device, "compute": dtype})
    config = checkpoint.config.model_copy(update={"runtime": runtime})
    stage = replace(config.stage_spec, trains=frozenset(), distill=False)
    vision = checkpoint.vision
    engine = Engine(config, vision, checkpoint.language, checkpoint.tensors("model"), stage=stage)
    log_kernels(engine.kernels)
    packer = Packer(vision, chat, 0, vision.covered_pixels, 1.0, config.data.max_pixels)
    images, losses, tokens = [], [], []
    asked_R = np.zeros(len(sample.captions_R), bool)
    too_long = unusable = first = 0
    for number, regions in enumerate(sample.regions_of):
        record = read_record(sample.store, sample.images[number])
        prefix = chat.prefix_length(int(image_tokens(record.width, record.height, vision)))
        rows = plan_rows(question_lengths(record, regions, chat), prefix, config.data.buckets, config.data.regions_per_row)
        too_long += len(regions) - sum(len(chosen) for _, chosen in rows)
        for bucket, chosen in rows:
            row = packer.row(record, [Question("bbox2caption", regions[place]) for place in chosen], bucket)
            if not row.questions:
                unusable += len(chosen)
                continue
            assert row.questions == len(chosen)  # because the bucket was chosen for them
            asked_R[first + np.array(chosen)] = True
            images.append(number)
            losses.append(float(engine.loss_sums([row])[0]))
            tokens.append(row.tokens)
        first += len(regions)
        done(1)
    if not images:
        raise ValueError(
            f"{checkpoint.path}: no Bbox2Caption question can be asked: {too_long} do not fit into its largest bucket "
            f"({config.data.buckets[-1]}), {unusable} are about images that it does not accept (data.max_pixels); use --no-loss"
        )
    return CaptionLosses(np.array(images), np.array(losses), np.array(tokens), asked_R, too_long, unusable,
                         chat.contents_fingerprint)  # fmt: skip
