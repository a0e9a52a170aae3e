"""The runs that led to a checkpoint, found through `model.init_from`, with their losses and evaluations."""
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from granvit.checkpoint.run import Checkpoint, newest_checkpoint
from granvit.engine import LOSSES
from granvit.evaluate import Table, evaluated_steps, evaluation_file, read_evaluation
from granvit.logs import read_metrics
from granvit.models import PARTS, vision_shapes

LAST_STEPS = 20  # losses are averaged over the last so many steps in metrics.jsonl


@dataclass(frozen=True)
class PastRun:
    """One run of a history. `losses` are means over the last `averaged` steps up to the checkpoint (0: there is no
    metrics.jsonl), `table` is the newest evaluation up to the checkpoint, made after step `table_step`. `went_on`: the next run
    did not start from this checkpoint, which is the newest of its run."""

    checkpoint: Checkpoint
    losses: dict[str, float]
    averaged: int
    table: Table
    table_step: int
    went_on: bool = False

    @property
    def directory(self) -> Path:
        return self.checkpoint.path.parents[1]


def chain(checkpoint: Checkpoint) -> tuple[list[Checkpoint], str | None]:
    """The newest checkpoints of the runs that led to a checkpoint, oldest first, and the checkpoint itself; and the value of
    `init_from` that has no checkpoint (None: all have).

    `ValueError` if a run descends from itself or a checkpoint is damaged.
    """
    found = [checkpoint]
    while (origin := found[0].config.model.init_from) is not None:
        if Path(origin).resolve() in (one.path.parents[1].resolve() for one in found):
            raise ValueError(f"{found[0].path}: model.init_from {origin} leads back to a run that started from it")
        parent = newest_checkpoint(origin)
        if parent is None:
            return found, origin
        found.insert(0, parent)
    return found, None


def history(checkpoint: Checkpoint) -> tuple[list[PastRun], str | None]:
    """The runs of the `chain` that led to a checkpoint, and the value of `init_from` that has no checkpoint (None: all have).

    `ValueError` if a run descends from itself or a file is damaged.
    """
    found, missing = chain(checkpoint)
    went_on = [not _hands_over(parent, child) for parent, child in pairwise(found)]
    return [_past(one, went) for one, went in zip(found, [*went_on, False], strict=True)], missing


def _hands_over(parent: Checkpoint, child: Checkpoint) -> bool:
    """Whether the child's start weights equal the parent's weights, for all parts with the same architecture in both."""
    comparable = set(PARTS)
    if vision_shapes(parent.vision) != vision_shapes(child.vision):
        comparable.remove("vision")
    if not parent.language.is_built_like(child.language):  # the child took only the encoder
        comparable &= {"vision"}
    return all(parent.parts[part].hash == child.parts[part].start for part in comparable)


def _past(checkpoint: Checkpoint, went_on: bool) -> PastRun:
    run = checkpoint.path.parents[1]
    records = (record for _, record in read_metrics(run / "metrics.jsonl", checkpoint.step))
    # Records without losses are of skipped steps or evaluations.
    whole = (record for record in records if all(isinstance(record.get(name), int | float) for name in LOSSES))
    averaged = deque(whole, maxlen=LAST_STEPS)
    losses = {name: sum(record[name] for record in averaged) / len(averaged) for name in LOSSES if averaged}
    step = max((step for step in evaluated_steps(run) if step <= checkpoint.step), default=0)
    table = read_evaluation(evaluation_file(run, step)).table if step else {}
    return PastRun(checkpoint, losses, len(averaged), table, step, went_on)
