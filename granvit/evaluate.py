"""Evaluation on held-out data: training loss and scored answers, both saved in RUN/eval/step_XXXXXXX.json."""
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from granvit.config import RunConfig, Source
from granvit.data.batch import Batch, Packer
from granvit.data.chat import Chat
from granvit.data.heldout import held_out
from granvit.data.loader import Compose, Loader
from granvit.data.store import REGIONS, Store
from granvit.engine import TrainEngine
from granvit.logs import log
from granvit.metrics import SCORES, score
from granvit.models import VisionConfig

Table = dict[str, dict[str, float]]  # task -> "samples" and the mean of each score


@dataclass(frozen=True)
class Evaluation:
    """The evaluation after `step`, with the keys of its file. `settings`: the keys of `eval` that the results depend on.

    `table`: scores of the answers by task. `held_out`: loss, loss_caption, loss_distill, and the numbers of questions and skipped
    items; empty without held-out loss. `predictions`: on rank 0 the answers of all ranks in the store's order.
    """

    step: int
    settings: dict[str, Any]
    table: Table
    held_out: dict[str, float]
    predictions: list[dict[str, Any]]


class Evaluator:
    """Evaluates one run on `eval.source`. Call it with the number of the step that was just trained (0: the start
    weights); all ranks must call it.

    The held-out losses have the loss terms and task shares of the training, over about `eval.rows` rows: the same rows at every
    step, for every seed and any number of ranks. Losses of tasks that the store does not hold are left out, and so are answers
    if the store holds conversations; the log says so. `ValueError` if neither a loss nor answers can be computed.
    """

    def __init__(self, engine: TrainEngine, config: RunConfig, vision: VisionConfig, chat: Chat, run: Path,
                 compose: Compose = Packer.row):  # fmt: skip
        self.engine, self.config, self.vision, self.chat, self.run = engine, config, vision, chat, run
        self.settings = config.eval.model_dump(mode="json", exclude={"every", "start", "batch"})
        assert config.eval.source is not None
        store = Store(config.eval.source)
        self.answers = store.kind == REGIONS and bool(config.eval.tasks)
        if config.eval.tasks and not self.answers:
            log.info(f"eval.source {store.path} is a {store.kind.format} store: held-out loss only, no answers")
        asked = {task: share for task, share in config.stage_spec.mix.items() if share > 0}
        held = {task: share for task, share in asked.items() if task in store.kind.tasks}
        self.loader: Loader | None = None
        if held and config.eval.rows:
            if len(held) < len(asked):
                log.info(f"held-out loss of {', '.join(held)} only: eval.source {store.path} does not hold the other tasks")
            try:
                self.loader = _held_out_rows(config, held, vision, chat, engine.rank, engine.world, compose)
            except ValueError as error:
                raise ValueError(f"eval.source {store.path}: no held-out loss can be computed ({error})") from None
        elif config.eval.rows:
            log.info(f"no held-out loss: eval.source {store.path} holds none of the trained tasks: {', '.join(asked)}")
        if self.loader is None and not self.answers:
            raise ValueError(
                f"eval.source {store.path} is a {store.kind.format} store, on which a run that trains {', '.join(asked)} with "
                f"eval.rows {config.eval.rows} and eval.tasks {list(config.eval.tasks)} cannot be evaluated; name a "
                f"store with these tasks, or set eval.source=null"
            )

    def __call__(self, step: int) -> Evaluation | None:
        """The evaluation after `step`. If an interrupted run has saved it, rank 0 returns the saved one and other ranks None."""
        rank, path = self.engine.rank, evaluation_file(self.run, step)
        kept = read_evaluation(path) if rank == 0 and path.exists() else None
        if kept is not None and kept.settings != self.settings:
            log.info(f"{path} was computed with other eval settings; evaluating again")
            kept = None
        if self.engine.all_sum(np.array([kept is not None], np.float32))[0]:
            return kept
        losses = self._losses() if self.loader is not None else {}
        table, predictions = self._answer(step) if self.answers else ({}, [])
        found = Evaluation(step, self.settings, table, losses, predictions)
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(vars(found), indent=1, allow_nan=False))
            os.replace(temporary, path)
        return found

    def _losses(self) -> dict[str, float]:
        """Losses over all held-out rows: sums divided by the counts of tokens and boxes. No losses if one is not finite."""
        loader = self.loader
        assert loader is not None
        counts = np.zeros(4, np.float32)  # tokens, boxes, questions, skipped

        def rows() -> Iterator[Batch]:
            for micro_batches in loader.batches():
                for batch in micro_batches:
                    counts[:] += batch.tokens, batch.boxes, batch.questions, len(batch.skipped)
                    yield batch

        sums = self.engine.loss_sums(rows())
        caption, distill, tokens, boxes, questions, skipped = self.engine.all_sum(np.concatenate([sums, counts])).tolist()
        if not tokens:
            raise ValueError(
                f"eval.source {self.config.eval.source}: no supervised token in {self.config.eval.rows} rows; "
                f"take longer data.buckets"
            )
        caption, distill = caption / tokens, distill / max(boxes, 1)
        losses = {"loss": caption + self.config.distill.weight * distill, "loss_caption": caption, "loss_distill": distill}
        if not np.isfinite(list(losses.values())).all():
            log.warning(f"the held-out loss is not finite: {losses}")
            losses = {}
        return losses | {"questions": questions, "skipped": skipped}

    def _answer(self, step: int) -> tuple[Table, list[dict[str, Any]]]:
        """Answers the questions of `eval.tasks` about `eval.images` images of `eval.source`, distributed over the ranks.

        Returns the table, and the predictions: of all ranks in the store's order on rank 0, of this rank elsewhere. Ranks pass
        their predictions to rank 0 in files in RUN/eval, a directory that all ranks must see.
        """
        engine, settings, chat = self.engine, self.config.eval, self.chat
        assert settings.source is not None
        own_predictions: list[tuple[int, dict[str, Any]]] = []
        batches = held_out(
            Store(settings.source), settings.tasks, chat, self.vision, settings.batch, settings.images,
            engine.rank, engine.world, self.config.data.max_pixels,
        )  # fmt: skip
        for batch_number, (prompts, questions) in enumerate(batches):
            ids_BT = engine.generate(prompts, settings.max_new_tokens, chat.stop_token)
            first = (batch_number * engine.world + engine.rank) * settings.batch
            for b, (record_id, task, question, reference, box) in enumerate(questions):
                answer = chat.decode(ids_BT[b])
                scores = score(task, answer, reference, box)
                own_predictions.append((first + b, {"record": record_id, "task": task, "question": question,
                                        "reference": reference, "box": box, "answer": answer, "scores": scores}))  # fmt: skip
        table = self._sum_over_ranks([prediction for _, prediction in own_predictions])
        folder = self.run / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        _rank_file(folder, step, engine.rank).write_text(json.dumps(own_predictions))
        engine.all_sum(np.zeros(1, np.float32))  # wait until every rank has written its file
        if engine.rank:
            return table, [prediction for _, prediction in own_predictions]
        files = [_rank_file(folder, step, rank) for rank in range(engine.world)]
        merged = sorted((item for file in files for item in json.loads(file.read_text())), key=lambda item: item[0])
        for file in files:
            file.unlink()
        return table, [prediction for _, prediction in merged]

    def _sum_over_ranks(self, predictions: list[dict[str, Any]]) -> Table:
        tasks = self.config.eval.tasks
        columns = [(task, name) for task in tasks for name in ("samples", *SCORES[task])]
        sums = dict.fromkeys(columns, 0.0)
        for prediction in predictions:
            sums[prediction["task"], "samples"] += 1
            for name, value in prediction["scores"].items():
                sums[prediction["task"], name] += value
        own = np.array([sums[column] for column in columns], np.float32)
        totals = dict(zip(columns, self.engine.all_sum(own).tolist(), strict=True))
        table: Table = {task: {} for task in tasks}
        for (task, name), total in totals.items():
            table[task][name] = total if name == "samples" else total / max(totals[task, "samples"], 1)
        return table


def _held_out_rows(config: RunConfig, mix: dict, vision: VisionConfig, chat: Chat, rank: int, world: int,
                   compose: Compose) -> Loader:  # fmt: skip
    """A loader of `eval.source` with the training's settings, which ends after the first steps that hold `eval.rows` rows.

    If the store has fewer rows, the last step is padded with rows of weight zero. Steps are as large as in training, so that
    batches have the training's shapes.
    """
    sources = (Source(path=config.eval.source),)
    data = config.data.model_copy(update={"sources": sources, "mix": mix, "workers": 0})
    train = config.train.model_copy(update={"epochs": 1, "steps": None})
    loader = Loader(config.model_copy(update={"data": data, "train": train, "seed": 0}), vision, chat, rank, world, compose)
    loader.steps = min(-(-config.eval.rows // config.train.global_batch), loader.steps)
    return loader


def forget_evaluations(run: Path, after_step: int) -> None:
    """Deletes the saved evaluations of steps after `after_step`, the step from which a run is resumed (-1: all of them)."""
    for step in evaluated_steps(run):
        if step > after_step:
            evaluation_file(run, step).unlink()


def evaluated_steps(run: Path) -> list[int]:
    """The steps after which an evaluation was saved, in ascending order."""
    names = [path.name for path in (run / "eval").glob("step_*.json")]
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step_(\d{7,})\.json", name)))


def evaluation_file(run: Path, step: int) -> Path:
    """The file of the evaluation after `step`."""
    return run / "eval" / f"step_{step:07d}.json"


def read_evaluation(path: Path) -> Evaluation:
    """Reads an evaluation's file; `ValueError` if it is not valid."""
    try:
        tree = json.loads(path.read_text())
        table = {task: {name: float(value) for name, value in scores.items()} for task, scores in tree["table"].items()}
        # Earlier versions saved no held-out losses and no settings.
        held_out = {name: float(value) for name, value in tree.get("held_out", {}).items()}
        return Evaluation(tree["step"], tree.get("settings", {}), table, held_out, tree["predictions"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a valid evaluation file ({error}); move it away to continue without it") from None


def _rank_file(folder: Path, step: int, rank: int) -> Path:
    return folder / f".step_{step:07d}.rank_{rank:05d}.json"
