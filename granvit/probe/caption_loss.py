"""The Bbox2Caption loss of a run's whole model (encoder, projector and decoder) on a sample's regions."""
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from granvit.checkpoint.run import Checkpoint
from granvit.data.batch import Packer, Question
from granvit.data.chat import Chat
from granvit.engine import TrainEngine
from granvit.probe.sample import Sample, read_record


@dataclass(frozen=True)
class CaptionLosses:
    """The caption loss of each row of up to `data.regions_per_row` questions. `image_N` int64 is the position of its image in the
    sample; `loss_N` (nats) and `tokens_N` float64 are sums over its supervised tokens. `questions` counts the regions in the
    rows, `skipped` those that did not fit."""

    image_N: np.ndarray
    loss_N: np.ndarray
    tokens_N: np.ndarray
    questions: int
    skipped: int


def check_projector(checkpoint: Checkpoint) -> None:
    """`ValueError` if the run's projector expects features of another width than its encoder has."""
    expected = checkpoint.shapes("model")["projector.linear_1.weight"][1]
    if expected != checkpoint.vision.token_width:
        raise ValueError(
            f"{checkpoint.path}: its projector expects features of width {expected}, its encoder {checkpoint.vision.name!r} has "
            f"{checkpoint.vision.token_width}: they belong to different runs"
        )


def caption_losses(checkpoint: Checkpoint, chat: Chat, Engine: type[TrainEngine], sample: Sample, device: str, dtype: str,
                   done: Callable[[int], None]) -> CaptionLosses:  # fmt: skip
    """Asks Bbox2Caption about every region of the sample as in training: up to `data.regions_per_row` questions in a row, with
    the run's tiling. Each row is a batch of its own, so that losses can be attributed to images; all have the largest of
    `data.buckets`, so MindSpore compiles one graph. `done` is called with the number of images finished.
    """
    runtime = checkpoint.config.runtime.model_copy(update={"device": device, "compute": dtype})
    config = checkpoint.config.model_copy(update={"runtime": runtime})
    stage = replace(config.stage_spec, trains=frozenset(), distill=False)
    engine = Engine(config, checkpoint.vision, checkpoint.language, checkpoint.tensors("model"), stage=stage)
    packer = Packer(checkpoint.vision, chat, 0, checkpoint.vision.covered_pixels, 1.0, config.data.max_pixels)
    bucket, together = config.data.buckets[-1], config.data.regions_per_row
    images, losses, tokens, questions, skipped = [], [], [], 0, 0
    for number, regions in enumerate(sample.regions_of):
        record = read_record(sample.store, sample.images[number])
        for first in range(0, len(regions), together):
            asked = [Question("bbox2caption", region) for region in regions[first : first + together]]
            row = packer.row(record, asked, bucket)
            questions, skipped = questions + row.questions, skipped + len(asked) - row.questions
            if row.questions:
                images.append(number)
                losses.append(float(engine.loss_sums([row])[0]))
                tokens.append(row.tokens)
        done(1)
    if not images:
        raise ValueError(f"{checkpoint.path}: no Bbox2Caption question fits into its largest bucket {bucket}; use --no-loss")
    return CaptionLosses(np.array(images), np.array(losses), np.array(tokens), questions, skipped)
