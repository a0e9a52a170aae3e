"""The training loop with a numpy engine: order, resume, bad data, NaN, stop. No framework, no processes."""
import contextlib
import json
import logging
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from granvit import trainer as trainer_module
from granvit.checkpoint.pretrained import start_weights
from granvit.checkpoint.resume import check_same_run
from granvit.checkpoint.run import newest_checkpoint
from granvit.checkpoint.run_writer import CheckpointNotSaved, CheckpointWriter
from granvit.config import DistillSection, OptimizerSection, language_config, vision_config
from granvit.evaluate import Evaluation
from granvit.logs import MetricsFile
from granvit.schedule import alphas, learning_rates
from granvit.trainer import Trainer, TrainingStopped
from tests.helpers import rewrite_as_format_1, run_config
from tests.toy import ToyEngine, ToyLoader, ToyRanks

VISION, LANGUAGE = vision_config("tiny-vision"), language_config("tiny-language")
STEPS = 9


def configuration(**sections):
    return run_config(train={"steps": STEPS, "checkpoint_every": 3, "keep_checkpoints": 2, "log_every": 4}, **sections)


def trainer_in(directory, config, change=lambda step, batch: batch, should_stop=lambda: False, **arguments):
    """A trainer that resumes what is in the directory, and the checkpoint it resumes from."""
    checkpoint = newest_checkpoint(directory)
    start = start_weights(config, VISION, LANGUAGE) if checkpoint is None else checkpoint.tensors("model")
    parts = {} if checkpoint is None else {name: part.start for name, part in checkpoint.parts.items()}
    writer = CheckpointWriter(directory, config, VISION, LANGUAGE, parts)
    engine = ToyEngine(config, VISION, LANGUAGE, writer.record_start(start) if checkpoint is None else start)
    loader = ToyLoader(STEPS, change)
    return Trainer(config, engine, loader, directory, writer, should_stop, **arguments), checkpoint


def metrics(directory) -> list[dict]:
    """Every step's object, less what a clock decides."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def final_bytes(directory) -> dict[str, bytes]:
    path = newest_checkpoint(directory).path
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


@pytest.fixture
def uninterrupted(tmp_path):
    directory = tmp_path / "uninterrupted"
    trainer, _ = trainer_in(directory, configuration())
    assert trainer.run(None)
    return directory


def test_a_run_writes_every_step_and_keeps_the_newest_checkpoints(uninterrupted):
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not [name for name in lines[0] if name.startswith("lr_")]
    assert list(lines[0])[:8] == ["step", "loss", "loss_caption", "loss_distill", "grad_norm", "lr", "questions", "skipped"]
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == ["step_0000006", "step_0000009"]
    assert list((uninterrupted / "tensorboard").iterdir())


def test_the_rates_of_parts_that_differ_are_in_the_metrics(tmp_path):
    parts = {"vision": {"lr": 2e-3}, "projector": {"weight_decay": 0.5}}
    trainer, _ = trainer_in(tmp_path, configuration(optimizer={"lr": 1e-2, "parts": parts}))
    trainer.run(None)
    for line in metrics(tmp_path):
        assert line["lr_vision"] == pytest.approx(0.2 * line["lr"]) and "lr_projector" not in line


def test_metrics_read_back_exactly(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    values = np.random.default_rng(0).normal(size=100) * 10.0 ** np.arange(-50, 50)
    for step, value in enumerate(values, 1):
        file.write({"step": step, "loss": float(value)})
    assert [line["loss"] for line in metrics(tmp_path)] == values.tolist()
    with pytest.raises(ValueError):
        file.write({"step": 101, "loss": float("nan")})


@pytest.mark.parametrize("dies_in_step", [1, 3, 4, 8])
def test_resume_after_a_crash_is_exact(tmp_path, uninterrupted, dies_in_step):
    """The crash comes before the step's metrics are written; an incomplete last line is what kill -9 can leave."""

    def crash(step, batch):
        if step == dies_in_step:
            raise KeyboardInterrupt
        return batch

    directory = tmp_path / "crashed"
    trainer, _ = trainer_in(directory, configuration(), crash)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(None)
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')
    trainer, checkpoint = trainer_in(directory, configuration())
    assert (checkpoint.step if checkpoint else 0) == (dies_in_step - 1) // 3 * 3
    assert trainer.run(checkpoint)
    assert metrics(directory) == metrics(uninterrupted)
    assert final_bytes(directory) == final_bytes(uninterrupted)


def test_a_run_begun_with_checkpoints_of_format_1_ends_the_same(tmp_path, uninterrupted):
    asked = iter([False] * 4 + [True] * 99)
    trainer, _ = trainer_in(tmp_path / "former", configuration(), should_stop=lambda: next(asked))
    trainer.run(None)
    rewrite_as_format_1(newest_checkpoint(tmp_path / "former").path)
    trainer, checkpoint = trainer_in(tmp_path / "former", configuration())
    assert check_same_run(checkpoint, configuration(), VISION, LANGUAGE, 1) == []
    assert trainer.run(checkpoint) is True
    assert metrics(tmp_path / "former") == metrics(uninterrupted)
    assert final_bytes(tmp_path / "former") == final_bytes(uninterrupted)


def test_asked_to_stop_saves_after_the_step_and_resumes(tmp_path, uninterrupted):
    asked = iter([False] * 4 + [True] * 99)
    trainer, _ = trainer_in(tmp_path / "stopped", configuration(), should_stop=lambda: next(asked))
    assert trainer.run(None) is False
    assert newest_checkpoint(tmp_path / "stopped").step == 5
    trainer, checkpoint = trainer_in(tmp_path / "stopped", configuration())
    assert trainer.run(checkpoint) is True
    assert metrics(tmp_path / "stopped") == metrics(uninterrupted)
    assert final_bytes(tmp_path / "stopped") == final_bytes(uninterrupted)


def test_a_complete_run_trains_no_further(uninterrupted):
    before = final_bytes(uninterrupted), metrics(uninterrupted)
    trainer, checkpoint = trainer_in(uninterrupted, configuration())
    assert trainer.run(checkpoint) is True
    assert (final_bytes(uninterrupted), metrics(uninterrupted)) == before


def poisoned(*steps):
    """A change that makes the loss of these steps NaN."""
    return lambda step, batch: replace(batch, boxes_BK4=batch.boxes_BK4 * np.nan) if step in steps else batch


def test_a_step_that_is_not_finite_is_left_out_and_counts_as_no_update(tmp_path):
    """AdamW's correction and the EMA rate's warm-up count updates; the learning rate and the data follow the steps."""
    config = configuration(distill={"alpha": 0.8, "alpha_warmup": 6})
    trainer, _ = trainer_in(tmp_path / "run", config, poisoned(2, 5))
    seen, step = [], trainer.engine.step
    trainer.engine.step = lambda batches, step_inputs: seen.append(step_inputs) or step(batches, step_inputs)
    assert trainer.run(None)
    assert [s.step for s in seen] == [1, 2, 2, 3, 4, 4, 5, 6, 7]
    expected = ToyEngine(config, VISION, LANGUAGE, start_weights(config, VISION, LANGUAGE))
    rates, ema_rates = learning_rates(config.optimizer, STEPS), alphas(config.distill, STEPS)
    for update, number in enumerate((1, 3, 4, 6, 7, 8, 9), 1):
        (batches,) = list(ToyLoader(number).batches(number - 1))
        step_inputs = replace(seen[0], step=update, learning_rate=rates[number - 1], alpha=ema_rates[update - 1])
        expected.step(batches, step_inputs)
    for group in ("model", "teacher", "first_moment", "second_moment"):
        for (name, found), (_, value) in zip(trainer.engine.tensors(group), expected.tensors(group), strict=True):
            np.testing.assert_array_equal(found, value, err_msg=name)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "loss" not in line] == [2, 5]
    assert [line["step"] for line in lines if "non_finite" in line] == [2, 5]
    assert newest_checkpoint(tmp_path / "run").counters == {"questions": 2 * STEPS, "skipped": 0, "non_finite": 2}

    def crash(step, batch):
        if step == 8:
            raise KeyboardInterrupt
        return poisoned(2, 5)(step, batch)

    trainer, _ = trainer_in(tmp_path / "crashed", config, crash)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(None)
    trainer, checkpoint = trainer_in(tmp_path / "crashed", config)
    assert checkpoint.counters["non_finite"] == 2 and trainer.run(checkpoint)
    assert metrics(tmp_path / "crashed") == lines
    assert final_bytes(tmp_path / "crashed") == final_bytes(tmp_path / "run")


def test_too_many_in_a_row_stop_the_run_and_the_same_command_goes_on_behind_them(tmp_path):
    change = poisoned(1, 4, 5, 6, 7)
    trainer, _ = trainer_in(tmp_path, configuration(), change)
    stopped = r"step 7\b.*nan.*\b0\b.*image-6-0, image-6-1.*train\.skip_non_finite.*\b3\b.*step 7"
    with pytest.raises(TrainingStopped, match=stopped):
        trainer.run(None)
    trainer, checkpoint = trainer_in(tmp_path, configuration(), change)
    assert (checkpoint.step, checkpoint.counters["non_finite"]) == (7, 5)
    assert trainer.run(checkpoint)
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [2, 3, 8, 9]


def test_a_loss_that_is_never_finite_again_replaces_no_good_checkpoint(tmp_path):
    config, change = configuration(), poisoned(*range(4, STEPS + 1))
    config = config.model_copy(update={"train": config.train.model_copy(update={"skip_non_finite": 0})})
    trainer, _ = trainer_in(tmp_path, config, change)
    with pytest.raises(TrainingStopped, match="step 4"):
        trainer.run(None)
    for _ in range(2):
        trainer, checkpoint = trainer_in(tmp_path, config, change)
        with pytest.raises(TrainingStopped, match=r"step 5.*step_0000004"):
            trainer.run(checkpoint)
        assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step_0000003", "step_0000004"]


def test_nothing_is_saved_where_no_step_was_ever_finite(tmp_path):
    """The start weights may be the cause. A checkpoint of them would be resumed instead of better ones."""
    trainer, _ = trainer_in(tmp_path, configuration(), poisoned(*range(1, STEPS + 1)))
    with pytest.raises(TrainingStopped, match=r"step 4.*runtime\.compute"):
        trainer.run(None)
    assert newest_checkpoint(tmp_path) is None


def test_a_checkpoint_that_is_due_at_a_step_left_out_is_made_after_the_next(tmp_path):
    trainer, _ = trainer_in(tmp_path, configuration(), poisoned(6))
    assert trainer.run(None)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_0000007", "step_0000009"]


def test_a_checkpoint_of_an_earlier_version_has_left_no_step_out(uninterrupted):
    trainer, checkpoint = trainer_in(uninterrupted, configuration())
    counters = {name: checkpoint.counters[name] for name in ("questions", "skipped")}
    assert trainer.run(checkpoint.model_copy(update={"counters": counters})) and trainer.non_finite == 0


def test_one_ranks_loss_leaves_the_step_out_on_all_and_both_reductions_are_told_to_the_engine(tmp_path, monkeypatch):
    logged = Messages()
    monkeypatch.setattr(trainer_module.log, "handlers", [logged])

    def run(rank, reduction, change):
        config = configuration()
        config = config.model_copy(update={"train": config.train.model_copy(update={"loss_reduction": reduction})})
        start, folder = start_weights(config, VISION, LANGUAGE), tmp_path / reduction
        folder.mkdir(exist_ok=True)
        writer = CheckpointWriter(folder / "run", config, VISION, LANGUAGE) if rank == 0 else None
        start = start if writer is None else writer.record_start(start)
        engine = ToyEngine(config, VISION, LANGUAGE, start, ToyRanks(rank, 2, folder))
        averaged, step = set(), engine.step
        engine.step = lambda batches, step_inputs: averaged.add(step_inputs.averaged_micro_batches) or step(batches, step_inputs)
        assert Trainer(config, engine, ToyLoader(STEPS, change), folder / "run", writer, lambda: False).run(None)
        return averaged, {name: array.copy() for name, array in engine.tensors("model")}

    for reduction, expected in (("global", {0}), ("per_device", {2})):  # two ranks of one micro-batch
        with ThreadPoolExecutor(2) as pool:
            ran = [pool.submit(run, rank, reduction, poisoned(5) if rank else lambda step, batch: batch) for rank in range(2)]
            (averaged, weights), (_, others) = (one.result() for one in ran)
        assert averaged == expected
        for name, array in weights.items():
            np.testing.assert_array_equal(array, others[name])
    assert sum(line.startswith("left out: step 5: loss nan; from rank(s) 1") for line in logged.kept) == 4
    assert any("records of rank 1: image-4-0, image-4-1" in line for line in logged.kept)


def with_skipped(batch, skipped):
    return type(batch)(**{**vars(batch), "skipped": tuple(skipped)})


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.kept: list[str] = []

    def emit(self, record):
        self.kept.append(record.getMessage())


def test_bad_records_are_counted_named_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "BAD_AFTER", 20)
    logged = Messages()
    monkeypatch.setattr(trainer_module.log, "handlers", [logged])
    three = [("a", "truncated"), ("b", "truncated"), ("c", "box is inverted")]
    config = configuration(data={"max_bad_fraction": 0.5})
    trainer, _ = trainer_in(tmp_path, config, lambda step, batch: with_skipped(batch, three))
    with pytest.raises(ValueError, match=r"step 4\b.*12 of 20.*data\.max_bad_fraction 0\.5"):
        trainer.run(None)
    named = [f"skipped {record}: {reason}" for record, reason in three]
    counted = ["skipped 8 on 1 rank(s): truncated", "skipped 4 on 1 rank(s): box is inverted"]
    assert [line for line in logged.kept if line.startswith("skipped")] == (named * 4)[:10] + counted
    assert [line["skipped"] for line in metrics(tmp_path)] == [3, 3, 3]


def test_reasons_are_summed_over_the_ranks(tmp_path, monkeypatch):
    """Both ranks skip for one reason, each for one of its own, and the second for a reason longer than one message."""
    long = "a long reason, " * 400
    logged = Messages()
    monkeypatch.setattr(trainer_module.log, "handlers", [logged])
    own = (
        [("a", "truncated"), ("b", "truncated"), ("c", "box is inverted")],
        [("d", "truncated"), ("e", "caption is empty"), ("f", "caption is empty"), ("g", long)],
    )
    config = configuration(data={"max_bad_fraction": 1.0})

    def run(rank):
        start = start_weights(config, VISION, LANGUAGE)
        writer = CheckpointWriter(tmp_path / "run", config, VISION, LANGUAGE) if rank == 0 else None
        start = start if writer is None else writer.record_start(start)
        engine = ToyEngine(config, VISION, LANGUAGE, start, ToyRanks(rank, 2, tmp_path))
        loader = ToyLoader(STEPS, lambda step, batch: with_skipped(batch, own[rank]) if step == 5 else batch)
        assert Trainer(config, engine, loader, tmp_path / "run", writer, lambda: False).run(None)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    summed = {line for line in logged.kept if line.startswith("skipped") and "rank" in line}
    assert summed == {
        "skipped 3 on 2 rank(s): truncated",
        "skipped 2 on 2 rank(s): caption is empty",
        "skipped 1 on 2 rank(s): box is inverted",
        f"skipped 1 on 2 rank(s): {long}",
    }


def test_few_bad_records_do_not_stop_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "BAD_AFTER", 6)
    config = configuration(data={"max_bad_fraction": 0.2})
    trainer, _ = trainer_in(tmp_path, config, lambda step, batch: with_skipped(batch, [("a", "b")] if step == 5 else []))
    assert trainer.run(None)
    assert newest_checkpoint(tmp_path).counters == {"questions": 2 * STEPS, "skipped": 1, "non_finite": 0}


def test_a_batch_without_any_supervised_token_is_an_error(tmp_path):
    def silent(step, batch):
        return type(batch)(**{**vars(batch), "answer_weights_BA": np.zeros_like(batch.answer_weights_BA)})

    trainer, _ = trainer_in(tmp_path, configuration(), silent)
    with pytest.raises(ValueError, match="no supervised token"):
        trainer.run(None)


class Evaluations:
    """An evaluator that saves its results, as the real one does on disk. It raises once, in the evaluation after step `dies`."""

    def __init__(self, dies: int | None = None):
        self.kept, self.dies = {}, dies

    def __call__(self, step):
        if step == self.dies:
            self.dies = None
            raise KeyboardInterrupt
        assert list(self.kept) == sorted(self.kept)
        return self.kept.setdefault(step, Evaluation(step, {}, {"bbox2caption": {"samples": 1.0}}, {"loss": step / 3}, []))


@pytest.mark.parametrize("every, dies_in_step, dies_in_evaluation, start", [
    (4, None, None, False), (4, 5, None, True), (3, None, 6, False), (2, None, 9, False), (4, 2, None, True),
])  # fmt: skip
def test_evaluations_are_made_once_and_their_lines_survive_a_crash(tmp_path, every, dies_in_step, dies_in_evaluation, start):
    """Step 5: after the evaluation of step 4, whose metrics line the resumed run deletes. 6 and 9: between checkpoint and
    evaluation. Step 2: after the evaluation of the start weights (step 0), before the first checkpoint."""

    def crash(step, batch):
        if step == dies_in_step:
            raise KeyboardInterrupt
        return batch

    config, evaluate = configuration(eval={"source": "held", "every": every, "start": start}), Evaluations(dies_in_evaluation)
    trainer, checkpoint = trainer_in(tmp_path, config, crash, evaluate=evaluate)
    if dies_in_step or dies_in_evaluation:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(None)
        trainer, checkpoint = trainer_in(tmp_path, config, evaluate=evaluate)
    trainer.run(checkpoint)
    expected = [(0, True)] * start
    for step in range(1, STEPS + 1):
        expected += [(step, False)] + [(step, True)] * (step % every == 0 or step == STEPS)
    assert [(line["step"], "held_out" in line) for line in metrics(tmp_path)] == expected
    assert list(evaluate.kept) == [step for step, evaluated in expected if evaluated]
    line = next(line for line in metrics(tmp_path) if "held_out" in line)
    assert line["held_out"] == {"loss": line["step"] / 3, "bbox2caption": {"samples": 1.0}}
    progress = trainer.output.progress
    assert progress.held_out == STEPS / 3
    assert not progress.recent or f"  held-out {STEPS / 3:.4f}  " in progress.line(metrics(tmp_path)[start])
    before = metrics(tmp_path)
    trainer, checkpoint = trainer_in(tmp_path, config, evaluate=evaluate)
    trainer.run(checkpoint)
    assert metrics(tmp_path) == before


def test_a_failed_save_ends_the_run_and_says_why(tmp_path, monkeypatch):
    trainer, _ = trainer_in(tmp_path, configuration())

    def full(*_):
        raise OSError(28, "No space left")

    monkeypatch.setattr("os.rename", full)
    with pytest.raises(CheckpointNotSaved, match="No space left"):
        trainer.run(None)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting a small device needs root")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_keeps_the_previous_checkpoint_whole(small_disk, uninterrupted):
    """The disk fills up after the first checkpoint. Once there is room, the run resumes and ends like an undisturbed one."""
    ballast = small_disk / "ballast"

    def fill(step, batch):
        if step == 5:
            with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        return batch

    run = small_disk / "run"
    trainer, _ = trainer_in(run, configuration(), fill)
    with pytest.raises(OSError, match="No space left"):
        trainer.run(None)
    ballast.unlink()
    trainer, checkpoint = trainer_in(run, configuration())
    assert checkpoint.step == 3 and trainer.run(checkpoint)
    assert metrics(run) == metrics(uninterrupted) and final_bytes(run) == final_bytes(uninterrupted)


def test_learning_rate_warms_up_and_follows_the_cosine():
    rates = learning_rates(OptimizerSection(lr=2.0, warmup=0.1), 100)
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10)
    for step in (10, 55, 99):
        assert rates[step] == pytest.approx(1 + np.cos(np.pi * (step - 10) / 90))
    assert (np.diff(rates[10:]) < 0).all() and rates[-1] > 0
    constant = OptimizerSection(lr=2.0, warmup=0, schedule="constant")
    np.testing.assert_array_equal(learning_rates(constant, 5), np.full(5, 2.0))
    cooled = learning_rates(constant.model_copy(update={"cooldown": 0.4}), 10)
    np.testing.assert_allclose(cooled, [2, 2, 2, 2, 2, 2, 2, 1.5, 1, 0.5])


def test_alpha_rises_linearly_from_zero():
    np.testing.assert_allclose(alphas(DistillSection(alpha=0.8, alpha_warmup=4), 6), [0, 0.2, 0.4, 0.6, 0.8, 0.8])
    np.testing.assert_array_equal(alphas(DistillSection(alpha=0.8), 3), np.full(3, 0.8))
