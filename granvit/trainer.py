"""The one training loop, for every stage and both frameworks.

A step: this rank's micro-batches; what the global batch holds, summed over the ranks; the engine's step; one line of
metrics; evaluation and checkpoint where they are due. Everything that ranks must agree on (counts, the wish to stop, whether a
checkpoint was written) passes through `engine.all_sum`, so no rank waits for one that has left.
"""
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from granvit.checkpoint.run import Checkpoint, CheckpointWriter
from granvit.config import RunConfig
from granvit.data.batch import Batch
from granvit.engine import NonFiniteLoss, Scalars, StepResult, TrainEngine
from granvit.logs import MetricsFile, TensorBoard, log
from granvit.progress import Progress, StepTimes
from granvit.schedule import alphas, learning_rates

BAD_AFTER = 1000  # items after which data.max_bad_fraction is enforced
NAMED = 10  # bad records that each rank's log names; the others are counted
REASONS_BYTES = 2048  # of a rank's list of reasons, when the ranks sum them


class Batches(Protocol):
    """What the trainer needs of `granvit.data.loader.Loader`."""

    steps: int

    def batches(self, start_step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every step after `start_step`."""


class TrainingStopped(RuntimeError):
    """The run cannot go on (loss not finite, no checkpoint possible); the message says why and what was kept."""


@dataclass(frozen=True)
class Counts:
    """What the global batch of one step holds: supervised tokens, valid boxes, questions, items that could not be used, row
    tokens (all that is not padding), and how many ranks wish to stop."""

    tokens: float
    boxes: float
    questions: float
    skipped: float
    row_tokens: float
    stop: float


class Output:
    """What rank 0 shows and keeps of every step."""

    def __init__(self, run: Path, after_step: int, steps: int, log_every: int):
        self.metrics = MetricsFile(run / "metrics.jsonl", after_step)
        self.board = TensorBoard(run / "tensorboard", after_step)
        self.progress = Progress(steps, log_every)

    def step(self, record: dict, times: StepTimes) -> None:
        self.metrics.write(record)
        self.board.write(record["step"], {f"train/{k}": v for k, v in record.items() if k != "step"})
        self.progress.step(record, times)

    def close(self) -> None:
        self.progress.close()
        self.board.close()
        self.metrics.close()


class Trainer:
    """Drives one engine through one run.

    `writer` is None on ranks other than 0. `should_stop` says whether this rank was asked to stop. `evaluate(step)` scores the
    model on held-out data (None: the run has none); `evaluated(step)` says whether that was done before.
    """

    def __init__(self, config: RunConfig, engine: TrainEngine, loader: Batches, run: Path, writer: CheckpointWriter | None,
                 should_stop: Callable[[], bool], evaluate: Callable[[int], dict[str, dict[str, float]]] | None = None,
                 evaluated: Callable[[int], bool] = lambda step: False):  # fmt: skip
        self.config, self.engine, self.loader, self.run_directory, self.writer = config, engine, loader, run, writer
        self.should_stop, self.evaluate, self.evaluated = should_stop, evaluate, evaluated
        self.step = 0
        self.questions = self.skipped = 0  # over the whole run, all ranks
        self.skipped_here: Counter[str] = Counter()  # reasons, this rank, since its start
        self.output: Output | None = None

    def run(self, checkpoint: Checkpoint | None) -> bool:
        """Trains from `checkpoint` (None: from the start weights) to the last step; False where it was asked to stop before."""
        steps, config, engine = self.loader.steps, self.config, self.engine
        rates, ema_rates = learning_rates(config.optimizer, steps), alphas(config.distill, steps)
        if checkpoint is not None:
            self._resume(checkpoint)
        if engine.rank == 0:
            self.output = Output(self.run_directory, self.step, steps, config.train.log_every)
        batches = self.loader.batches(self.step)
        stop = False
        try:
            for step in range(self.step + 1, steps + 1):
                began = time.perf_counter()
                micro_batches = next(batches)
                waiting = time.perf_counter() - began
                counts = self._count(micro_batches)
                self._check_data(step, counts)
                scalars = Scalars(step, rates[step - 1], ema_rates[step - 1], counts.tokens, counts.boxes)
                try:
                    result = engine.step(micro_batches, scalars)
                except NonFiniteLoss as error:
                    self._stop_non_finite(step, micro_batches, error)
                self.step = step
                self.questions += int(counts.questions)
                self.skipped += int(counts.skipped)
                self._record(result, scalars, counts, time.perf_counter() - began, waiting)
                stop = counts.stop > 0 and step < steps
                if step % config.train.checkpoint_every == 0 or step == steps or stop:
                    self._save()
                if config.eval.every and step % config.eval.every == 0 and not stop:
                    self._evaluate()
                if stop:
                    log.info(f"asked to stop: saved step {step} of {steps}")
                    break
            if not stop:
                self._evaluate()
            self._log_skipped()
        finally:
            batches.close()
            if self.output is not None:
                self.output.close()
        return not stop

    def _resume(self, checkpoint: Checkpoint) -> None:
        groups = ("first_moment", "second_moment", *(("teacher",) if self.config.stage_spec.distill else ()))
        for group in groups:
            self.engine.load(group, checkpoint.tensors(group))
        self.step = checkpoint.step
        self.questions, self.skipped = checkpoint.counters["questions"], checkpoint.counters["skipped"]
        log.info(f"resumed from {checkpoint.path}")

    def _count(self, micro_batches: Sequence[Batch]) -> Counts:
        """Counts this rank's batches, names what they could not use, and sums over the ranks."""
        skipped = [item for batch in micro_batches for item in batch.skipped]
        for record_id, reason in skipped:
            if self.skipped_here.total() < NAMED:
                log.warning(f"skipped {record_id}: {reason}")
            self.skipped_here[reason] += 1
        own = (
            sum(batch.tokens for batch in micro_batches),
            sum(batch.boxes for batch in micro_batches),
            sum(batch.questions for batch in micro_batches),
            len(skipped),
            sum(int((batch.segments_BS >= 0).sum()) for batch in micro_batches),
            self.should_stop(),
        )
        return Counts(*self.engine.all_sum(np.array(own, np.float32)).tolist())

    def _check_data(self, step: int, counts: Counts) -> None:
        """`ValueError`, on all ranks alike, where the data cannot be trained on."""
        skipped = self.skipped + int(counts.skipped)
        seen, allowed = self.questions + int(counts.questions) + skipped, self.config.data.max_bad_fraction
        if seen >= BAD_AFTER and skipped > allowed * seen:
            self._log_skipped()
            raise ValueError(
                f"step {step}: {skipped} of {seen} records or questions could not be used, more than data.max_bad_fraction "
                f"{allowed}. {self.run_directory}/log names the first of each rank; mend the data or raise the limit"
            )
        if counts.tokens == 0:
            self._log_skipped()
            raise ValueError(
                f"step {step}: no supervised token in the whole global batch ({int(counts.skipped)} items skipped): tokenizer "
                f"and chat template do not match the model, or data.buckets are too short for every question"
            )

    def _record(self, result: StepResult, scalars: Scalars, counts: Counts, seconds: float, waiting: float) -> None:
        if self.output is None:
            return
        variance = result.feature_std**2
        record = {
            "step": scalars.step,
            "loss": result.loss,
            "loss_caption": result.loss_caption,
            "loss_distill": result.loss_distill,
            "grad_norm": result.grad_norm,
            "lr": float(scalars.learning_rate),
            "regions": int(counts.questions),  # questions answered, the global ones included
            "skipped": int(counts.skipped),
            "seconds": seconds,
            "tokens": int(counts.tokens),
            "boxes": int(counts.boxes),
            "feature_std": result.feature_std,
            "distill_relative": result.loss_distill / variance if variance > 0 else 0.0,  # to the teacher's variance
        }
        self.output.step(record, StepTimes(seconds, waiting, counts.questions, counts.row_tokens))

    def _evaluate(self) -> None:
        """Scores the model after the current step, unless that was done before an interruption."""
        if self.evaluate is None or self._any_rank(self.engine.rank == 0 and self.evaluated(self.step)):
            return
        for task, scores in self.evaluate(self.step).items():
            if self.output is not None:
                self.output.board.write(self.step, {f"eval/{task}/{name}": value for name, value in scores.items()})
            line = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            log.info(f"step {self.step} held-out {task}: {line}")

    def _save(self) -> None:
        """Rank 0 writes (all ranks hold the same weights); the others wait for its word, and go down with it if it fails."""
        error: Exception | None = None
        if self.writer is not None:
            try:
                saved = self.writer.save(self.engine, self.step, {"questions": self.questions, "skipped": self.skipped})
                parts = "; ".join(
                    f"{name} {part.hash[:12]} ({f'moved {part.distance:.6g}' if part.trained else 'frozen'})"
                    for name, part in saved.parts.items()
                )
                log.info(f"checkpoint {saved.path}: {parts}")
            except Exception as failure:  # told to the other ranks below, then raised
                error = failure
        if self._any_rank(error is not None):
            raise error or TrainingStopped(f"rank 0 could not save step {self.step}; its log says why")

    def _any_rank(self, flag: bool) -> bool:
        return bool(self.engine.all_sum(np.array([flag], np.float32))[0] > 0)

    def _stop_non_finite(self, step: int, micro_batches: Sequence[Batch], error: NonFiniteLoss) -> None:
        """Keeps the state before the step, names ranks and records, stops all ranks."""
        records = [i for m in error.micro_batches for i in micro_batches[m].record_ids if i]
        culprit = np.zeros(self.engine.world, np.float32)
        culprit[self.engine.rank] = len(error.micro_batches)
        ranks = np.flatnonzero(self.engine.all_sum(culprit)).tolist()
        self._save()
        self._log_skipped()
        here = f" records of rank {self.engine.rank}: {', '.join(records)};" if records else ""
        where = f"rank(s) {', '.join(map(str, ranks))}" if ranks else "no rank's own loss (the gradient overflowed)"
        kept = f"the state before it is saved as step {self.step}"
        raise TrainingStopped(f"step {step}: {error}; from {where};{here} {kept}") from error

    def _log_skipped(self) -> None:
        """Logs how much could not be used since this start, by reason, summed over the ranks, which all call it together."""
        if not self._any_rank(self.skipped_here.total() > 0):
            return
        lines = [f"{count} {reason}\n".encode() for reason, count in self.skipped_here.most_common()]
        kept = [line for line, end in zip(lines, accumulate(map(len, lines)), strict=True) if end <= REASONS_BYTES]
        texts = np.zeros((self.engine.world, REASONS_BYTES), np.float32)
        texts[self.engine.rank] = np.frombuffer(b"".join(kept).ljust(REASONS_BYTES, b"\0"), np.uint8)
        everywhere: Counter[str] = Counter()
        for text in self.engine.all_sum(texts.ravel()).astype(np.uint8).reshape(texts.shape):
            for line in text.tobytes().rstrip(b"\0").decode().splitlines():
                count, reason = line.split(" ", 1)
                everywhere[reason] += int(count)
        for reason, count in everywhere.most_common():
            log.warning(f"skipped {count} on {self.engine.world} rank(s): {reason}")
        if len(kept) < len(lines):
            log.warning(f"skipped on rank {self.engine.rank} for {len(lines) - len(kept)} more, rarer reasons")
