"""The interface between the trainer (`granvit.trainer`) and the frameworks: each framework implements `TrainEngine`."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from granvit.config import RunConfig
from granvit.data.batch import Batch, PromptBatch
from granvit.kernels import Kernels
from granvit.models import LanguageConfig, VisionConfig
from granvit.stages import Stage

LOSSES = ("loss", "loss_caption", "loss_distill")
Group = Literal["model", "teacher", "first_moment", "second_moment"]


@dataclass(frozen=True)
class StepInputs:
    """The numbers that differ between steps; they are inputs of the graph, so it is not recompiled.

    `step` is the number of updates including this one, for AdamW's bias correction; steps that were left out (`NonFiniteLoss`) do
    not count. `learning_rate` is the scheduled value of `optimizer.lr`; parts with an `lr` of their own scale it. `tokens` and
    `boxes` are the numbers of supervised tokens and valid boxes in the GLOBAL batch (all ranks, all micro-batches).
    `averaged_micro_batches` is 0 with `train.loss_reduction: global`, else the number of micro-batches in the global batch, whose
    losses are averaged.
    """

    step: int
    learning_rate: float
    alpha: float
    tokens: float
    boxes: float
    averaged_micro_batches: int = 0

    def divisors(self, batch: Batch) -> tuple[float, float]:
        """Divisors of one micro-batch's loss sums over tokens and over boxes. The divided sums of all micro-batches add up to the
        loss of the global batch.

        `global`: the counts of the global batch. `per_device`: the counts of the micro-batch times the number of micro-batches,
        which gives the mean over micro-batches of their mean losses. A micro-batch without a token (box) counts in that mean
        with loss 0.
        """
        if self.averaged_micro_batches:
            return max(batch.tokens, 1) * self.averaged_micro_batches, max(batch.boxes, 1) * self.averaged_micro_batches
        return max(self.tokens, 1), max(self.boxes, 1)


UNDIVIDED = StepInputs(step=1, learning_rate=0.0, alpha=0.0, tokens=1, boxes=1)  # divisors of 1: losses stay sums


@dataclass(frozen=True)
class StepResult:
    """Results of one step for the global batch. Losses are averaged according to `train.loss_reduction`.

    `feature_std` is the spread of the teacher's features over the cells of a box: the root of the variance over the cells,
    averaged over channels and valid boxes. It is 0 if all cells of a box have the same vector (a collapsed teacher), if the batch
    has no box, and if the ROI grid has one cell.
    """

    loss: float
    loss_caption: float
    loss_distill: float
    grad_norm: float
    feature_std: float


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient norm of the global batch is NaN or infinite; no weight was changed.

    `micro_batches` are the indices of this rank's micro-batches with a non-finite loss. It is empty if only other ranks have
    such micro-batches, or if only the gradient is not finite.
    """

    def __init__(self, message: str, micro_batches: Sequence[int]):
        super().__init__(message)
        self.micro_batches = tuple(micro_batches)


class Ranks(Protocol):
    """The process group of a run: this process's rank, the number of ranks, and sums over all ranks."""

    rank: int
    world: int
    device: str  # cpu, cuda or npu, as chosen by `runtime.device`

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small float32 vector over the ranks; whole numbers below 2**24 are exact."""

    def leave(self) -> None:
        """Leaves the process group."""


class TrainEngine(Protocol):
    """One framework's model, optimizer and collectives. All arguments and results are numpy arrays.

    `start` yields every parameter of `parameter_shapes` as (name, array). Without `ranks` the engine joins the launcher's process
    group, or runs as a single process if there is none. `stage` replaces the stage of `config` (`granvit.stages.ANSWER`: no
    masters, no moments, no teacher). The teacher (where the stage has one) starts as a copy of the student;
    `load("teacher", ...)` replaces it. bfloat16 arrays are `ml_dtypes.bfloat16`, as input and output.
    """

    ranks: Ranks
    rank: int
    world: int
    device: str
    kernels: Kernels  # the implementations of operators in use
    compilations: dict[str, int]  # graph -> number of compilations

    def __init__(self, config: RunConfig, vision: VisionConfig, language: LanguageConfig,
                 start: Iterable[tuple[str, np.ndarray]], ranks: Ranks | None = None,
                 stage: Stage | None = None): ...  # fmt: skip

    @staticmethod
    def memory(device: str) -> int:
        """Memory in bytes that one rank has on `device` (a value of `runtime.device`)."""

    @staticmethod
    def join(device: str) -> Ranks:
        """Selects the device (a value of `runtime.device`) and joins the launcher's process group, if there is one."""

    def step(self, micro_batches: Sequence[Batch], step_inputs: StepInputs) -> StepResult:
        """Forward and backward over this rank's micro-batches, all-reduce (sum), clip, AdamW, EMA.

        Raises `NonFiniteLoss` on every rank, before any weight changes, where the global loss or gradient norm is not finite.
        """

    def loss_sums(self, micro_batches: Iterable[Batch]) -> np.ndarray:
        """Caption loss summed over the supervised tokens and distillation loss summed over the valid boxes, float32 `[2]`.

        Sums over this rank's batches only. Forward pass only: no weight and no state changes.
        """

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small float32 vector over the ranks; counts below 2**24 are exact."""

    def tensors(self, group: Group) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (parameter name, array) for one group. Teacher names begin with `teacher.`; only trained parts have moments."""

    def load(self, group: Group, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        """Replaces the group's tensors. Names and shapes are not checked: the caller has done that."""

    def generate(self, prompts: PromptBatch, max_new_tokens: int, stop_token: int) -> np.ndarray:
        """Greedy continuation of each row, int32 `[B, max_new_tokens]`, filled with `stop_token` after it first appears."""

    def close(self) -> None:
        """Leaves the process group."""
