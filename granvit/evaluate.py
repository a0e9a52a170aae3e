"""Generation over a held-out store, scored: the table that a run prints and RUN/eval/step_XXXXXXX.json with every answer."""
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from granvit.config import RunConfig
from granvit.data.chat import Chat
from granvit.data.loader import held_out
from granvit.data.store import Store
from granvit.engine import TrainEngine
from granvit.metrics import SCORES, score
from granvit.models import VisionConfig

Table = dict[str, dict[str, float]]  # task -> "samples" and the mean of each score


def evaluate(
    engine: TrainEngine, config: RunConfig, vision: VisionConfig, chat: Chat, run: Path, step: int
) -> tuple[Table, list[dict[str, Any]]]:
    """Answers the questions of `eval.tasks` about `eval.images` images of `eval.source`, shared out over the ranks.

    Every rank gets the table; rank 0 gets all predictions, in the store's order, and writes both to RUN/eval. Each rank's own
    predictions pass through a file in that directory, which all ranks must see.
    """
    own: list[tuple[int, dict[str, Any]]] = []
    batches = held_out(
        Store(config.eval.source), config.eval.tasks, chat, vision, config.eval.batch, config.eval.images,
        engine.rank, engine.world, config.data.max_pixels,
    )  # fmt: skip
    for k, (prompts, asked) in enumerate(batches):
        ids_BT = engine.generate(prompts, config.eval.max_new_tokens, chat.stop_token)
        first = (k * engine.world + engine.rank) * config.eval.batch
        for b, (record_id, task, question, reference, box) in enumerate(asked):
            answer = chat.decode(ids_BT[b])
            scores = score(task, answer, reference, box)
            own.append((first + b, {"record": record_id, "task": task, "question": question, "reference": reference,
                                    "box": box, "answer": answer, "scores": scores}))  # fmt: skip
    table = _sum_over_ranks(engine, config, [prediction for _, prediction in own])
    folder = run / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    _rank_file(folder, step, engine.rank).write_text(json.dumps(own))
    engine.all_sum(np.zeros(1, np.float32))  # every rank's file is written
    if engine.rank:
        return table, [prediction for _, prediction in own]
    files = [_rank_file(folder, step, rank) for rank in range(engine.world)]
    merged = sorted((item for file in files for item in json.loads(file.read_text())), key=lambda item: item[0])
    predictions = [prediction for _, prediction in merged]
    path = evaluation_file(run, step)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"step": step, "table": table, "predictions": predictions}, indent=1))
    os.replace(temporary, path)
    for file in files:
        file.unlink()
    return table, predictions


def evaluation_file(run: Path, step: int) -> Path:
    """Where the evaluation after `step` is kept."""
    return run / "eval" / f"step_{step:07d}.json"


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
