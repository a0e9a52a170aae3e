"""The model on held-out data: the training's loss, and answers that are scored. RUN/eval/step_XXXXXXX.json keeps both."""
import json
import os
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
    """`held_out`: loss, loss_caption, loss_distill and how many questions they are of, or nothing. `table`: scores of answers.
    `settings`: the keys of `eval` that they depend on."""

    held_out: dict[str, float]
    table: Table
    settings: dict[str, Any]


class Evaluator:
    """Evaluates one run on `eval.source`, once after each step that it is asked for.

    The losses are of the training's objective, parts and task shares, over `eval.rows` rows: the same ones at every step, for
    every seed and any number of ranks. What cannot be done with the store is logged and left out: losses of the tasks that it
    does not hold, answers where it holds conversations. `ValueError` where nothing is left.
    """

    def __init__(self, engine: TrainEngine, config: RunConfig, vision: VisionConfig, chat: Chat, run: Path,
                 compose: Compose = Packer.row):  # fmt: skip
        self.engine, self.config, self.vision, self.chat, self.run = engine, config, vision, chat, run
        self.settings = config.eval.model_dump(mode="json", exclude={"every", "batch"})
        assert config.eval.source is not None
        store = Store(config.eval.source)
        self.answers = store.kind == REGIONS and bool(config.eval.tasks)
        if config.eval.tasks and not self.answers:
            log.info(f"eval.source {store.path} is a {store.kind.format} store: held-out loss alone, no answers")
        asked = {task: share for task, share in config.stage_spec.mix.items() if share > 0}
        held = {task: share for task, share in asked.items() if task in store.kind.tasks}
        self.loader: Loader | None = None
        if held and config.eval.rows:
            if len(held) < len(asked):
                log.info(f"held-out loss of {', '.join(held)} alone: eval.source {store.path} does not hold the other tasks")
            try:
                self.loader = _held_out_rows(config, held, vision, chat, engine.rank, engine.world, compose)
            except ValueError as error:
                raise ValueError(f"eval.source {store.path}: no held-out loss can be computed ({error})") from None
        elif config.eval.rows:
            log.info(f"no held-out loss: eval.source {store.path} holds none of the tasks that are trained: {', '.join(asked)}")
        if self.loader is None and not self.answers:
            raise ValueError(
                f"eval.source {store.path} is a {store.kind.format} store, on which a run that trains {', '.join(asked)} with "
                f"eval.rows {config.eval.rows} and eval.tasks {list(config.eval.tasks)} cannot be evaluated"
            )

    def __call__(self, step: int) -> Evaluation | None:
        """The evaluation after `step`. One that was kept before an interruption is read, and rank 0 alone has it."""
        rank, path = self.engine.rank, evaluation_file(self.run, step)
        kept = read_evaluation(path) if rank == 0 and path.exists() else None
        if kept is not None and kept.settings != self.settings:
            log.info(f"{path} was made with other settings of eval: it is made again")
            kept = None
        if self.engine.all_sum(np.array([kept is not None], np.float32))[0]:
            return kept
        losses = self._losses() if self.loader is not None else {}
        table: Table = {}
        predictions: list[dict[str, Any]] = []
        if self.answers:
            table, predictions = _answer(self.engine, self.config, self.vision, self.chat, self.run, step)
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            found = {"step": step, "settings": self.settings, "table": table, "held_out": losses, "predictions": predictions}
            temporary.write_text(json.dumps(found, indent=1, allow_nan=False))
            os.replace(temporary, path)
        return Evaluation(losses, table, self.settings)

    def _losses(self) -> dict[str, float]:
        """Losses over all held-out rows: sums over sums, each divided by its own count. A loss that is not finite is left out."""
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
            raise ValueError(f"eval.source {self.config.eval.source}: no supervised token in {self.config.eval.rows} rows")
        caption, distill = caption / tokens, distill / max(boxes, 1)
        losses = {"loss": caption + self.config.distill.weight * distill, "loss_caption": caption, "loss_distill": distill}
        if not np.isfinite(list(losses.values())).all():
            log.warning(f"the held-out loss is not finite: {losses}")
            losses = {}
        return losses | {"questions": questions, "skipped": skipped}


def _held_out_rows(config: RunConfig, mix: dict, vision: VisionConfig, chat: Chat, rank: int, world: int,
                   compose: Compose) -> Loader:  # fmt: skip
    """The training's loader turned to `eval.source`, for as many of the first steps of its first epoch as hold `eval.rows` rows.

    Where the store holds fewer rows, the last step is filled up with rows of weight zero. Steps have the training's size, so that
    graphs are of the training's shapes.
    """
    sources = (Source(path=config.eval.source),)
    data = config.data.model_copy(update={"sources": sources, "mix": mix, "workers": 0})
    train = config.train.model_copy(update={"epochs": 1, "steps": None})
    loader = Loader(config.model_copy(update={"data": data, "train": train, "seed": 0}), vision, chat, rank, world, compose)
    loader.steps = min(-(-config.eval.rows // config.train.global_batch), loader.steps)
    return loader


def _answer(
    engine: TrainEngine, config: RunConfig, vision: VisionConfig, chat: Chat, run: Path, step: int
) -> tuple[Table, list[dict[str, Any]]]:
    """Answers the questions of `eval.tasks` about `eval.images` images of `eval.source`, shared out over the ranks.

    Every rank gets the table; rank 0 gets all predictions, in the store's order. Each rank's own predictions pass through a file
    in RUN/eval, which all ranks must see.
    """
    assert config.eval.source is not None
    own_predictions: list[tuple[int, dict[str, Any]]] = []
    batches = held_out(
        Store(config.eval.source), config.eval.tasks, chat, vision, config.eval.batch, config.eval.images,
        engine.rank, engine.world, config.data.max_pixels,
    )  # fmt: skip
    for batch_number, (prompts, questions) in enumerate(batches):
        ids_BT = engine.generate(prompts, config.eval.max_new_tokens, chat.stop_token)
        first = (batch_number * engine.world + engine.rank) * config.eval.batch
        for b, (record_id, task, question, reference, box) in enumerate(questions):
            answer = chat.decode(ids_BT[b])
            scores = score(task, answer, reference, box)
            own_predictions.append((first + b, {"record": record_id, "task": task, "question": question, "reference": reference,
                                    "box": box, "answer": answer, "scores": scores}))  # fmt: skip
    table = _sum_over_ranks(engine, config, [prediction for _, prediction in own_predictions])
    folder = run / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    _rank_file(folder, step, engine.rank).write_text(json.dumps(own_predictions))
    engine.all_sum(np.zeros(1, np.float32))  # every rank's file is written
    if engine.rank:
        return table, [prediction for _, prediction in own_predictions]
    files = [_rank_file(folder, step, rank) for rank in range(engine.world)]
    merged = sorted((item for file in files for item in json.loads(file.read_text())), key=lambda item: item[0])
    predictions = [prediction for _, prediction in merged]
    for file in files:
        file.unlink()
    return table, predictions


def forget_evaluations(run: Path, after_step: int) -> None:
    """Removes the kept evaluations of steps after `after_step`, from where a resumed run goes on."""
    for path in (run / "eval").glob("step_*.json"):
        number = path.stem.removeprefix("step_")
        if number.isdigit() and int(number) > after_step:
            path.unlink()


def evaluation_file(run: Path, step: int) -> Path:
    """Where the evaluation after `step` is kept."""
    return run / "eval" / f"step_{step:07d}.json"


def read_evaluation(path: Path) -> Evaluation:
    """What an evaluation's file keeps, less the predictions; `ValueError` where it is none."""
    try:
        tree = json.loads(path.read_text())
        held_out = tree.get("held_out", {})  # earlier versions kept no held-out losses
        table = {task: {name: float(value) for name, value in scores.items()} for task, scores in tree["table"].items()}
        return Evaluation({name: float(value) for name, value in held_out.items()}, table, tree.get("settings", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an evaluation ({error}); move it away to do without it") from None


def _rank_file(folder: Path, step: int, rank: int) -> Path:
    return folder / f".step_{step:07d}.rank_{rank:05d}.json"


def _sum_over_ranks(engine: TrainEngine, config: RunConfig, predictions: list[dict[str, Any]]) -> Table:
    columns = [(task, name) for task in config.eval.tasks for name in ("samples", *SCORES[task])]
    sums = dict.fromkeys(columns, 0.0)
    for prediction in predictions:
        sums[prediction["task"], "samples"] += 1
        for name, value in prediction["scores"].items():
            sums[prediction["task"], name] += value
    totals = dict(zip(columns, engine.all_sum(np.array([sums[c] for c in columns], np.float32)).tolist(), strict=True))
    table: Table = {task: {} for task in config.eval.tasks}
    for (task, name), total in totals.items():
        table[task][name] = total if name == "samples" else total / max(totals[task, "samples"], 1)
    return table
