"""The one training loop, for every stage and both frameworks.

One step: read this rank's micro-batches, sum the counts of the global batch over the ranks, call the engine's step, write one
line of metrics, save a checkpoint and evaluate if they are due. A step with a non-finite loss or gradient is left out: it is
counted and logged, and no weight changes. All decisions that concern all ranks (counts, a request to stop, a failed checkpoint)
are shared through `engine.all_sum`, so that no rank waits for one that has ended.
"""
import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from granvit.agreement import broadcast, ranks_where
from granvit.checkpoint.run import Checkpoint
from granvit.checkpoint.run_writer import CheckpointWriter
from granvit.config import RunConfig
from granvit.data.batch import Batch
from granvit.engine import LOSSES, NonFiniteLoss, StepInputs, StepResult, TrainEngine
from granvit.evaluate import Evaluation
from granvit.logs import MetricsFile, TensorBoard, log
from granvit.models import PARTS
from granvit.progress import Progress, StepTimes
from granvit.schedule import alphas, learning_rates

BAD_AFTER = 1000  # data.max_bad_fraction is enforced after this many items
NAMED = 10  # each rank's log names this many bad items; later ones are only counted


class Batches(Protocol):
    """The interface of `granvit.data.loader.Loader` that the trainer uses."""

    steps: int

    def batches(self, start_step: int) -> Generator[list[Batch], None, None]:
        """This rank's micro-batches of every step after `start_step`."""


class TrainingStopped(RuntimeError):
    """The run cannot continue (loss not finite, out of memory, checkpoint not saved); the message says why and what to do."""


@dataclass(frozen=True)
class Counts:
    """Counts over the global batch of one step: supervised tokens, valid boxes, questions, skipped items, row tokens (without
    padding), and ranks that were asked to stop."""

    tokens: float
    boxes: float
    questions: float
    skipped: float
    row_tokens: float
    stop: float


class Output:
    """Rank 0's output: metrics.jsonl, TensorBoard files and the progress line."""

    def __init__(self, run: Path, after_step: int, steps: int, log_every: int):
        self.metrics = MetricsFile(run / "metrics.jsonl", after_step)
        self.board = TensorBoard(run / "tensorboard", after_step)
        self.progress = Progress(steps, log_every)

    def step(self, record: dict, times: StepTimes) -> None:
        self.metrics.write(record)
        self.board.write(record["step"], {f"train/{k}": v for k, v in record.items() if k != "step"})
        self.progress.step(record, times)

    def evaluation(self, step: int, found: Evaluation) -> None:
        """Writes the evaluation after `step`. Does nothing if a run that was interrupted has written it already."""
        self.progress.held_out = found.held_out.get("loss")
        if self.metrics.last.get("step") == step and "held_out" in self.metrics.last:
            return
        self.metrics.write({"step": step, "held_out": {**found.held_out, **found.table}})
        scores = {f"{task}/{name}": value for task, of_task in found.table.items() for name, value in of_task.items()}
        self.board.write(step, {f"eval/{name}": value for name, value in {**found.held_out, **scores}.items()})

    def close(self) -> None:
        self.progress.close()
        self.board.close()
        self.metrics.close()


class Trainer:
    """Drives one engine through one run.

    `writer` is None on ranks other than 0. `should_stop` returns whether this rank was asked to stop. `evaluate` evaluates the
    model after a step, as `granvit.evaluate.Evaluator` (None: no evaluation).

    `non_finite` counts the steps that were left out in the whole run. The learning rate depends on the number of steps, left-out
    ones included. AdamW's bias correction and the warm-up of the EMA rate depend on the number of updates, without them.
    """

    def __init__(self, config: RunConfig, engine: TrainEngine, loader: Batches, run: Path, writer: CheckpointWriter | None,
                 should_stop: Callable[[], bool], evaluate: Callable[[int], Evaluation | None] | None = None):  # fmt: skip
        self.config, self.engine, self.loader, self.run_directory, self.writer = config, engine, loader, run, writer
        self.should_stop, self.evaluate = should_stop, evaluate
        self.step = 0
        self.questions = self.skipped = self.non_finite = 0  # over the whole run, all ranks
        self.in_a_row = 0  # consecutive steps left out, up to the newest one
        self.skipped_here: Counter[str] = Counter()  # reason -> items that this rank skipped since its start
        self.output: Output | None = None

    def run(self, checkpoint: Checkpoint | None) -> bool:
        """Trains from `checkpoint` (None: from the start weights) to the last step. Returns False if it was stopped before."""
        steps, config, engine = self.loader.steps, self.config, self.engine
        rates, ema_rates = learning_rates(config.optimizer, steps), alphas(config.distill, steps)
        if checkpoint is not None:
            self._resume(checkpoint)
        if engine.rank == 0:
            self.output = Output(self.run_directory, -1 if checkpoint is None else self.step, steps, config.train.log_every)
        batches = self.loader.batches(self.step)
        stop = due = False
        try:
            self._evaluate()  # of the start weights, or if the run was interrupted between this checkpoint and its evaluation
            for step in range(self.step + 1, steps + 1):
                began = time.perf_counter()
                micro_batches = next(batches)
                waiting = time.perf_counter() - began
                counts = self._count(micro_batches)
                self._check_data(step, counts)
                averaged = engine.world * len(micro_batches) if config.train.loss_reduction == "per_device" else 0
                update = step - self.non_finite
                step_inputs = StepInputs(update, rates[step - 1], ema_rates[update - 1], counts.tokens, counts.boxes, averaged)
                result, left_out = None, ""
                try:
                    result = engine.step(micro_batches, step_inputs)
                    self.in_a_row = 0
                except NonFiniteLoss as error:
                    left_out = self._leave_out(step, micro_batches, error)
                self.step = step
                self.questions += int(counts.questions)
                self.skipped += int(counts.skipped)
                self._record(result, step_inputs, counts, time.perf_counter() - began, waiting)
                if self.in_a_row > config.train.skip_non_finite:
                    self._stop_non_finite(left_out, checkpoint)
                stop = counts.stop > 0 and step < steps
                due = due or step % config.train.checkpoint_every == 0  # after a left-out step: at the next one
                if (due and result is not None) or step == steps or stop:
                    self._save()
                    due = False
                if stop:
                    log.info(f"asked to stop: saved step {step} of {steps}")
                    break
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
        self.non_finite = checkpoint.counters.get("non_finite", 0)  # earlier versions have no such counter
        log.info(f"resumed from {checkpoint.path}")

    def _count(self, micro_batches: Sequence[Batch]) -> Counts:
        """Counts of the global batch. Logs the items that this rank skipped."""
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
        """`ValueError`, on all ranks, if too many items were skipped or the global batch has no supervised token."""
        skipped = self.skipped + int(counts.skipped)
        items, allowed = self.questions + int(counts.questions) + skipped, self.config.data.max_bad_fraction
        if items >= BAD_AFTER and skipped > allowed * items:
            self._log_skipped()
            raise ValueError(
                f"step {step}: {skipped} of {items} records or questions could not be used, more than data.max_bad_fraction "
                f"{allowed}. {self.run_directory}/log names the first of each rank; repair the data or raise the limit"
            )
        if counts.tokens == 0:
            self._log_skipped()
            raise ValueError(
                f"step {step}: no supervised token in the whole global batch ({int(counts.skipped)} items skipped): use the "
                f"model's tokenizer and chat template, or longer data.buckets"
            )

    def _record(self, result: StepResult | None, step_inputs: StepInputs, counts: Counts, seconds: float, waiting: float) -> None:
        """Writes one line of metrics. A step that was left out (`result` None) has `non_finite` instead of losses."""
        if self.output is None:
            return
        rate, rates = float(step_inputs.learning_rate), self.config.optimizer
        record: dict[str, float] = {"step": self.step}
        if result is None:
            record["non_finite"] = 1
        else:
            record |= {name: getattr(result, name) for name in (*LOSSES, "grad_norm")}
        record |= {
            "lr": rate,
            "questions": int(counts.questions),  # region questions, global questions and conversations
            "skipped": int(counts.skipped),
            "seconds": seconds,
            "tokens": int(counts.tokens),
            "boxes": int(counts.boxes),
        }
        if result is not None:
            variance = result.feature_std**2
            record["feature_std"] = result.feature_std
            if self.config.train.loss_reduction == "global":  # with per_device the loss is no mean over boxes
                # With `mse`, a student whose cells all equal the mean of the teacher's cells in the box has the value 1.
                record["distill_relative"] = result.loss_distill / variance if variance > 0 else 0.0
        shares = {part: rates.of_part(part)[0] / rates.lr for part in PARTS if part in self.config.stage_spec.trains}
        record |= {f"lr_{part}": rate * share for part, share in shares.items() if share != 1}
        self.output.step(record, StepTimes(seconds, waiting, counts.questions, counts.row_tokens))

    def _evaluate(self) -> None:
        """Evaluates the model if that is due after the current step. An evaluation that was saved before is not repeated."""
        every = self.config.eval.every
        due = self.step == self.loader.steps or (every and self.step % every == 0)
        if self.step == 0:
            due = self.config.eval.start
        if self.evaluate is None or not due:
            return
        found = self.evaluate(self.step)
        if found is None or self.output is None:
            return
        self.output.evaluation(self.step, found)
        for name, values in (("loss", found.held_out), *found.table.items()):
            if values:
                line = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
                log.info(f"step {self.step} held-out {name}: {line}")

    def _save(self) -> None:
        """Rank 0 writes a checkpoint (all ranks have the same weights). The others wait for it and also stop if it fails."""
        error: Exception | None = None
        if self.writer is not None:
            try:
                counters = {"questions": self.questions, "skipped": self.skipped, "non_finite": self.non_finite}
                saved = self.writer.save(self.engine, self.step, counters, last=self.step == self.loader.steps)
                parts = "; ".join(
                    f"{name} {part.hash[:12]} ({f'moved {part.distance:.6g}' if part.trained else 'frozen'})"
                    for name, part in saved.parts.items()
                )
                log.info(f"checkpoint {saved.path}: {parts}")
            except Exception as failure:  # raised below, after the other ranks know of it
                error = failure
        if ranks_where(self.engine.ranks, error is not None):
            raise error or TrainingStopped(f"rank 0 could not save step {self.step}; see its log for the reason")

    def _leave_out(self, step: int, micro_batches: Sequence[Batch], error: NonFiniteLoss) -> str:
        """Counts and logs a step that is left out. Returns a description with the ranks and this rank's records concerned."""
        records = [i for m in error.micro_batches for i in micro_batches[m].record_ids if i]
        ranks = ranks_where(self.engine.ranks, bool(error.micro_batches))
        self.non_finite, self.in_a_row = self.non_finite + 1, self.in_a_row + 1
        here = f"; records of rank {self.engine.rank}: {', '.join(records)}" if records else ""
        where = f"rank(s) {', '.join(map(str, ranks))}" if ranks else "the gradient, all losses are finite"
        what = f"step {step}: {error}; from {where}{here}"
        log.warning(f"left out: {what}")
        return what

    def _stop_non_finite(self, what: str, checkpoint: Checkpoint | None) -> None:
        """Stops all ranks after too many consecutive steps were left out, and saves a checkpoint that counts these steps.

        If every step since `checkpoint` (None: since the start weights) was left out, no checkpoint is saved. Then the weights
        may be the cause, and a run that is restarted repeatedly would replace older, good checkpoints by copies of them.
        """
        limit = f"train.skip_non_finite allows {self.config.train.skip_non_finite} in a row"
        self._log_skipped()
        if self.step - (0 if checkpoint is None else checkpoint.step) == self.in_a_row:
            since, remedy = "the start weights", "check the weights and runtime.compute"
            if checkpoint is not None:
                since, remedy = str(checkpoint.path), "go back to an earlier checkpoint by moving this one away"
            raise TrainingStopped(
                f"{what}; {limit}, and no step since {since} was finite. No checkpoint was saved: {remedy}, or raise "
                f"train.skip_non_finite"
            )
        self._save()
        raise TrainingStopped(f"{what}; {limit}; saved as step {self.step}: the same command continues after it")

    def _log_skipped(self) -> None:
        """Logs the numbers of skipped items since this start by reason, summed over the ranks. All ranks must call it."""
        if not ranks_where(self.engine.ranks, self.skipped_here.total() > 0):
            return
        own = json.dumps(dict(self.skipped_here.most_common()))
        everywhere: Counter[str] = Counter()
        for rank in range(self.engine.world):
            everywhere.update(json.loads(broadcast(self.engine.ranks, own, rank)))
        for reason, count in everywhere.most_common():
            log.warning(f"skipped {count} on {self.engine.world} rank(s): {reason}")
