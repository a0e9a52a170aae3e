"""A test double for the trainer's tests: `ToyEngine` implements `TrainEngine` in numpy; `ToyLoader` gives it batches.

Run as a script, this file is the training command with `ToyEngine` in place of a framework's engine, for tests that kill
processes: `python tests/toy.py [arguments of scripts/stage1.py]`. Environment variables plant faults.
"""
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from granvit.config import RunConfig
from granvit.data.batch import Batch, PromptBatch
from granvit.engine import Group, NonFiniteLoss, StepInputs, StepResult
from granvit.kernels import Kernels
from granvit.models import LanguageConfig, VisionConfig, part_of


class ToyRanks:
    """Ranks that exchange sums through files in a directory. As in a framework, they wait forever for a rank that has died."""

    device = "toy"

    def __init__(self, rank: int = 0, world: int = 1, exchange: Path | None = None):
        self.rank, self.world, self.exchange = rank, world, exchange
        self.sums = 0

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        if self.world == 1:
            return values.astype(np.float32)
        self.sums += 1
        files = [self.exchange / f"sum_{self.sums}_{rank}.npy" for rank in range(self.world)]
        temporary = files[self.rank].with_suffix(".tmp")
        with open(temporary, "wb") as file:
            np.save(file, values.astype(np.float32))
        os.replace(temporary, files[self.rank])
        while not all(file.exists() for file in files):
            time.sleep(0.01)
        return sum(np.load(file) for file in files)

    def leave(self) -> None:
        pass


class ToyEngine:
    """Adam on a quadratic loss: every trained weight moves towards a number that depends on the batch's token ids."""

    @staticmethod
    def memory(device: str) -> int:
        return 1 << 30

    def __init__(self, config: RunConfig, vision: VisionConfig, language: LanguageConfig, start: Iterable[tuple[str, np.ndarray]],
                 ranks: ToyRanks | None = None):  # fmt: skip
        self.ranks = ranks or ToyRanks()
        self.rank, self.world = self.ranks.rank, self.ranks.world
        self.config, self.stage = config, config.stage_spec
        self.device, self.kernels, self.compilations = "toy", Kernels("toy", (), "toy", "float32"), {"step": 1}
        self.weights = {name: np.array(array, np.float32) for name, array in start}
        self.trained = [name for name in self.weights if part_of(name) in self.stage.trains]
        self.first = {name: np.zeros_like(self.weights[name]) for name in self.trained}
        self.second = {name: np.zeros_like(self.weights[name]) for name in self.trained}
        self.teacher = {
            name.replace("vision.", "teacher.", 1): self.weights[name].copy()
            for name in self.weights
            if self.stage.distill and part_of(name) == "vision"
        }

    def step(self, micro_batches: Sequence[Batch], step_inputs: StepInputs) -> StepResult:
        own = sum(float((b.answer_targets_BA * b.answer_weights_BA).sum() + 0 * b.boxes_BK4.sum()) for b in micro_batches)
        target = np.float32(self.all_sum(np.array([own], np.float32))[0] / max(step_inputs.tokens, 1) / 1000)
        if not np.isfinite(target):
            bad = [i for i, b in enumerate(micro_batches) if not np.isfinite(b.boxes_BK4).all()]
            raise NonFiniteLoss(f"loss {target}", bad)
        squares = 0.0
        for name in self.trained:
            gradient = self.weights[name] - target
            squares += float(np.vdot(gradient, gradient))
            self.first[name] = np.float32(0.9) * self.first[name] + np.float32(0.1) * gradient
            self.second[name] = np.float32(0.99) * self.second[name] + np.float32(0.01) * gradient**2
            self.weights[name] = self.weights[name] - np.float32(step_inputs.learning_rate) * self.first[name] / (
                np.sqrt(self.second[name]) + np.float32(1e-3)
            )
        for name in self.teacher:
            student = self.weights[name.replace("teacher.", "vision.", 1)]
            self.teacher[name] = np.float32(step_inputs.alpha) * self.teacher[name] + np.float32(1 - step_inputs.alpha) * student
        return StepResult(squares, squares, 0.0, squares**0.5, 1.0)

    def loss_sums(self, micro_batches: Iterable[Batch]) -> np.ndarray:
        return np.array([sum(float((b.answer_targets_BA * b.answer_weights_BA).sum()) for b in micro_batches), 0], np.float32)

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        return self.ranks.all_sum(values)

    def tensors(self, group: Group) -> Iterator[tuple[str, np.ndarray]]:
        yield from self._group(group).items()

    def load(self, group: Group, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        for name, array in tensors:
            assert name in self._group(group)
            self._group(group)[name] = array

    def generate(self, prompts: PromptBatch, max_new_tokens: int, stop_token: int) -> np.ndarray:
        return np.full((len(prompts.lengths_B), max_new_tokens), stop_token, np.int32)

    def close(self) -> None:
        self.ranks.leave()

    def _group(self, group: Group) -> dict[str, np.ndarray]:
        return {"model": self.weights, "teacher": self.teacher, "first_moment": self.first, "second_moment": self.second}[group]


def toy_batch(step: int, rows: int = 2, skipped: tuple[tuple[str, str], ...] = ()) -> Batch:
    """A batch whose values depend only on the step, with images of one pixel."""
    rng = np.random.default_rng(step)
    ids = rng.integers(0, 99, (rows, 8)).astype(np.int32)
    ones = np.ones((rows, 4), np.float32)
    return Batch(
        pixels_B3RR=np.zeros((rows, 3, 1, 1), np.uint8), image_weights_B=ones[:, 0], token_ids_BS=ids, positions_BS=ids,
        segments_BS=np.zeros((rows, 8), np.int32), image_positions_BN=ids[:, :1], answer_positions_BA=ids[:, :4],
        answer_targets_BA=ids[:, :4], answer_weights_BA=ones, boxes_BK4=np.zeros((rows, 1, 4), np.float32),
        box_weights_BK=ones[:, :1], crops_BK3rr=np.zeros((rows, 1, 3, 1, 1), np.uint8),
        record_ids=tuple(f"image-{step}-{row}" for row in range(rows)), questions=rows, skipped=skipped,
    )  # fmt: skip


class ToyLoader:
    """Stands for `Loader`: its batches depend only on the step. `change` may replace a batch."""

    def __init__(self, steps: int, change=lambda step, batch: batch):
        self.steps, self.change = steps, change

    def batches(self, start_step: int) -> Iterator[list[Batch]]:
        for step in range(start_step, self.steps):
            yield [self.change(step + 1, toy_batch(step))]


def main() -> int:
    """scripts/stage1.py with the toy engine. Environment variables plant faults:

    TOY_FAIL=RANK:STEP: the rank raises an error in that step; TOY_RAISES is its message.
    TOY_PAUSE=SECONDS: every step takes so much longer.
    TOY_DISK=RANK:DIRECTORY: the rank's working directory, as if the rank were on another node with its own disk.
    TOY_STALE=RANK: the rank does not see the newest checkpoint of a run.
    TOY_VERSION=RANK:NAME:VERSION: the rank has this version of the package NAME.
    TOY_SCHEDULER=SECONDS: how long MindSpore's scheduler process lives.
    TOY_EXCHANGE=DIRECTORY: where the ranks exchange sums.
    TOY_ENGINE=real: the framework's own engine.
    """
    from granvit import launch, train
    from granvit.checkpoint import run, run_writer

    job = launch.detect_launch()
    exchange = Path(os.environ.get("TOY_EXCHANGE", "."))

    def planted(name: str) -> list[str]:
        rank, *rest = os.environ.get(name, "-1").split(":")
        return [*rest, ""] if job.rank == int(rank) else []

    class Engine(ToyEngine):
        @staticmethod
        def join(device: str) -> ToyRanks:
            return ToyRanks(job.rank, job.world, exchange)

        def step(self, micro_batches, step_inputs):
            time.sleep(float(os.environ.get("TOY_PAUSE", "0")))
            if (fail := planted("TOY_FAIL")) and step_inputs.step == int(fail[0]):
                raise RuntimeError(os.environ.get("TOY_RAISES", "planted fault"))
            return super().step(micro_batches, step_inputs)

    if disk := planted("TOY_DISK"):
        os.chdir(disk[0])
    if planted("TOY_STALE"):
        listed = run.saved_steps
        run.saved_steps = lambda directory: listed(directory)[:-1]
    if version := planted("TOY_VERSION"):
        installed = run_writer.metadata.version
        run_writer.metadata.version = lambda name: version[1] if name == version[0] else installed(name)
    if "TOY_ENGINE" not in os.environ:
        train.load_engine_class = lambda framework: Engine
        train._run_scheduler = lambda: time.sleep(float(os.environ.get("TOY_SCHEDULER", "0")))
    return train.train_command("stage1", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
