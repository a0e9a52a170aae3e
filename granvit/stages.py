"""The training stages: the parts that each trains, the tasks that it mixes, its loss terms (paper section 4.1).

The paper's order: projector, stage1, stage2, (continued,) sft.
"""
from dataclasses import dataclass
from typing import Literal, get_args

RegionTask = Literal["global", "bbox2caption", "caption2bbox"]  # questions about an image of a region store
Task = Literal[RegionTask, "conversation"]  # a conversation, from a store of conversations, is one question
REGION_TASKS: tuple[RegionTask, ...] = get_args(RegionTask)
TASKS: tuple[Task, ...] = get_args(Task)
StageName = Literal["projector", "stage1", "stage2", "continued", "sft", "pretrain_text", "pretrain_image", "guesser"]
# scripts/NAME.py, granvit-train NAME
WITH_SCRIPTS: tuple[StageName, ...] = ("projector", "stage1", "stage2", "continued", "sft")


@dataclass(frozen=True)
class Stage:
    """One training stage.

    `trains` names the parts that are trained; the others are frozen. `mix` is the share of the available questions of each task
    that one epoch uses. `distill` adds the self-distillation term. `zero_image_tokens` replaces the image tokens by zeros: the
    decoder answers from the question alone, a baseline that a useful model must exceed. `plain` is LLaVA's name for rows of image
    and answer, without question and chat template (`granvit.data.chat`).
    """

    name: str
    trains: frozenset[str]
    mix: dict[Task, float]
    distill: bool = False
    zero_image_tokens: bool = False
    plain: bool = False
    after: StageName | None = None  # the stage whose run it starts from in the paper


_ALL = frozenset({"vision", "projector", "language"})

STAGES = {
    stage.name: stage
    for stage in (
        Stage("projector", frozenset({"projector"}), {"conversation": 1.0}, plain=True),
        Stage(
            "stage1", frozenset({"vision", "projector"}), {"global": 1.0, "bbox2caption": 1.0}, distill=True, after="projector"
        ),
        Stage("stage2", frozenset({"projector", "language"}), {"global": 1.0, "caption2bbox": 1.0}, after="stage1"),
        Stage("continued", _ALL, {"conversation": 1.0}, after="stage2"),
        Stage("sft", _ALL, {"conversation": 1.0}, after="stage2"),
        Stage("pretrain_text", frozenset({"language"}), {"global": 1.0, "bbox2caption": 1.0}, zero_image_tokens=True),
        Stage("pretrain_image", frozenset({"vision", "projector"}), {"global": 1.0}),
        Stage("guesser", frozenset({"language"}), {"bbox2caption": 1.0, "caption2bbox": 1.0}, zero_image_tokens=True),
    )
}
ANSWER = Stage("answer", frozenset(), {})  # not a training stage: `granvit.predict` uses it, because nothing is trained there
