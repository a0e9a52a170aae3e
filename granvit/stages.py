"""A stage as data: what it trains, which questions it mixes, which loss terms it has (paper section 4.1, SPEC section 1).

The paper's order: projector, stage1, stage2, (continued,) sft.
"""
from dataclasses import dataclass
from typing import Literal, get_args

RegionTask = Literal["global", "bbox2caption", "caption2bbox"]  # asked about a record of a region store
Task = Literal[RegionTask, "conversation"]  # a conversation is asked whole, out of a store of conversations
REGION_TASKS: tuple[RegionTask, ...] = get_args(RegionTask)
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True)
class Stage:
    """`trains` names parts; the others are frozen. `mix` is the share of the available questions of each task that an
    epoch asks. `distill` adds the self-distillation term. `blind` zeroes the image tokens: the guesser who reads the
    question alone, the honest floor of both tasks. `plain` shows the image and then the answer, without question and chat
    template."""

    name: str
    trains: frozenset[str]
    mix: dict[Task, float]
    distill: bool = False
    blind: bool = False
    plain: bool = False


_ALL = frozenset({"vision", "projector", "language"})

STAGES = {
    stage.name: stage
    for stage in (
        Stage("projector", frozenset({"projector"}), {"conversation": 1.0}, plain=True),
        Stage("stage1", frozenset({"vision", "projector"}), {"global": 1.0, "bbox2caption": 1.0}, distill=True),
        Stage("stage2", frozenset({"projector", "language"}), {"global": 1.0, "caption2bbox": 1.0}),
        Stage("continued", _ALL, {"conversation": 1.0}),
        Stage("sft", _ALL, {"conversation": 1.0}),
        Stage("pretrain_text", frozenset({"language"}), {"global": 1.0, "bbox2caption": 1.0}, blind=True),
        Stage("pretrain_image", frozenset({"vision", "projector"}), {"global": 1.0}),
        Stage("guesser", frozenset({"language"}), {"bbox2caption": 1.0, "caption2bbox": 1.0}, blind=True),
    )
}
ANSWER = Stage("answer", frozenset(), {})  # no run's: a finished run is asked about a picture, and nothing trains
