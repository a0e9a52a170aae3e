"""The protocol that each framework implements and the one trainer drives."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from granvit.config import RunConfig
from granvit.data.batch import Batch, PromptBatch
from granvit.models import LanguageConfig, VisionConfig
from granvit.stages import Stage

LOSSES = ("loss", "loss_caption", "loss_distill")
Group = Literal["model", "teacher", "first_moment", "second_moment"]


@dataclass(frozen=True)
class StepInputs:
    """What changes from step to step without changing the graph.

    `step` counts the updates made so far, this one included, for AdamW's bias correction: a step that was left out
    (`NonFiniteLoss`) is none. `learning_rate` is that of `optimizer.lr`; parts with their own scale it. `tokens` and `boxes` are
    the supervised tokens and valid boxes of the GLOBAL batch (all ranks, all micro-batches). `averaged_micro_batches` is 0
    under `train.loss_reduction: global`, else the number of the global batch's micro-batches, whose losses are averaged.
    """

    step: int
    learning_rate: float
    alpha: float
    tokens: float
    boxes: float
    averaged_micro_batches: int = 0

    def divisors(self, batch: Batch) -> tuple[float, float]:
        """What the sums over one micro-batch's tokens and boxes are divided by, so that the micro-batches' shares add up to the
        global batch's loss.

        `global`: the global counts. `per_device`: the micro-batch's own counts times the number of micro-batches, as a framework
        does that averages gradients over devices and accumulation steps, each the gradient of a mean. A micro-batch without a
        token or without a box adds 0 to that mean and counts as one of its members.
        """
        if self.averaged_micro_batches:
            return max(batch.tokens, 1) * self.averaged_micro_batches, max(batch.boxes, 1) * self.averaged_micro_batches
        return max(self.tokens, 1), max(self.boxes, 1)


UNDIVIDED = StepInputs(step=1, learning_rate=0.0, alpha=0.0, tokens=1, boxes=1)  # losses stay sums


@dataclass(frozen=True)
class StepResult:
    """Of the global batch, its losses averaged as `train.loss_reduction` says.

    `feature_std` is how far the teacher's features spread over the cells of a box: the root of their variance over the cells, per
    channel, averaged over channels and valid boxes. 0 means that all cells of a box hold one vector: a collapsed teacher (or no
    box in the batch, or an ROI grid of one cell).
    """

    loss: float
    loss_caption: float
    loss_distill: float
    grad_norm: float
    feature_std: float


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient norm of the global batch is NaN or infinite; no weight was changed.

    `micro_batches` lists the indices of this rank's micro-batches whose own loss was not finite (empty: another rank's, or
    the gradient alone).
    """

    def __init__(self, message: str, micro_batches: Sequence[int]):
        super().__init__(message)
        self.micro_batches = tuple(micro_batches)


class Ranks(Protocol):
    """The processes of one run, joined before anything that takes long: this one's number, and sums over all."""

    rank: int
    world: int
    device: str  # cpu, cuda or npu: what `runtime.device` chose

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small float32 vector over the ranks; whole numbers below 2**24 are exact."""

    def leave(self) -> None:
        """Leaves the process group."""


class TrainEngine(Protocol):
    """One framework's model, optimizer and collectives behind numpy.

    `start` streams every parameter of `parameter_shapes` under its name. Without `ranks` it joins the launcher's process group,
    or runs alone where there is none. `stage` replaces the configuration's (`granvit.stages.ANSWER`: no masters, no moments, no
    teacher).
    The teacher (where the stage has one) starts as the student; `load("teacher", ...)` replaces it. bfloat16 arrays are
    `ml_dtypes.bfloat16`, in and out.
    """

    ranks: Ranks
    rank: int
    world: int
    device: str
    implementations: dict[str, str]  # operator -> the implementation that runs, for the log
    compilations: dict[str, int]  # graph -> how often it was compiled

    def __init__(self, config: RunConfig, vision: VisionConfig, language: LanguageConfig,
                 start: Iterable[tuple[str, np.ndarray]], ranks: Ranks | None = None,
                 stage: Stage | None = None): ...  # fmt: skip

    @staticmethod
    def memory(device: str) -> int:
        """Bytes that one rank has on the device that `runtime.device` names."""

    @staticmethod
    def join(device: str) -> Ranks:
        """Chooses the device that `runtime.device` names and joins the launcher's process group, where there is one."""

    def step(self, micro_batches: Sequence[Batch], step_inputs: StepInputs) -> StepResult:
        """Forward and backward over this rank's micro-batches, all-reduce (sum), clip, AdamW, EMA.

        Raises `NonFiniteLoss` on every rank, before any weight changes, where the global loss or gradient norm is not finite.
        """

    def loss_sums(self, micro_batches: Iterable[Batch]) -> np.ndarray:
        """Caption and distillation loss summed over the supervised tokens and the valid boxes of some batches, undivided, `[2]`.

        Of this rank alone, float32. Forward only: nothing changes.
        """

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small float32 vector over the ranks; counts below 2**24 are exact."""

    def tensors(self, group: Group) -> Iterator[tuple[str, np.ndarray]]:
        """This group's tensors one at a time under the parameters' names (`teacher.…` for the teacher; moments: trained only)."""

    def load(self, group: Group, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        """Replaces the group's tensors; the caller has checked names and shapes against the architecture."""

    def generate(self, prompts: PromptBatch, max_new_tokens: int, stop_token: int) -> np.ndarray:
        """Greedy continuation of each row, int32 `[B, max_new_tokens]`, filled with `stop_token` after it first appears."""

    def close(self) -> None:
        """Leaves the process group."""
