"""The results of a grid: scores of every setting over seeds and images, differences to the first setting, and verdicts."""
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from granvit.ablation.grid import Cell, Grid
from granvit.ablation.statistics import Interval, interval, verdict
from granvit.evaluate import evaluated_steps, evaluation_file, read_evaluation

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Scores:
    """One metric of one setting: `sums_SI` sums of the score for each seed and image, `counts_I` questions about each image."""

    seeds: tuple[int, ...]
    sums_SI: np.ndarray
    counts_I: np.ndarray

    def of(self, seeds: tuple[int, ...]) -> np.ndarray:
        """The rows of `sums_SI` of these seeds."""
        return self.sums_SI[[self.seeds.index(seed) for seed in seeds]]


def results(grid: Grid, cells: list[Cell], problems: Mapping[Cell, str], name: str) -> dict[str, Any]:
    """What results.json holds, without anything that differs from run to run: neither times nor paths.

    Cells in `problems` are left out of all numbers and listed under `failed`. `ValueError` if a finished run has no evaluation,
    or if two cells were asked other questions.
    """
    scores = _read_scores(grid, [cell for cell in cells if cell not in problems])
    differences, reference = [], next(iter(grid.settings))
    for setting in list(grid.settings)[1:]:
        for metric in grid.metrics:
            found = _difference(scores, metric, setting, reference)
            word = {"reproduced": "higher", "not reproduced": "lower"}.get(found["verdict"], found["verdict"])
            differences.append({"setting": setting, "reference": reference, "metric": metric, **found, "verdict": word})
    return {
        "grid": name,
        "question": grid.question,
        "settings": [
            {"name": setting, "chain": {stage: list(overrides) for stage, overrides in chain.items()},
             "metrics": {metric: _summary(scores[setting, metric]) for metric in grid.metrics if (setting, metric) in scores}}
            for setting, chain in grid.settings.items()
        ],
        "differences": differences,
        "directions": [
            direction.model_dump() | _difference(scores, direction.metric, direction.above, direction.below)
            for direction in grid.directions
        ],
        "failed": [{"setting": cell.setting, "seed": cell.seed, "reason": reason} for cell, reason in problems.items()],
    }  # fmt: skip


def _read_scores(grid: Grid, cells: list[Cell]) -> dict[tuple[str, str], Scores]:
    """(setting, metric) -> scores, read from the newest evaluation of the last run of each cell."""
    rows: dict[tuple[str, str], list[tuple[int, np.ndarray]]] = {}
    asked: dict[str, tuple[str, list[tuple[str, str]]]] = {}  # task -> the first cell, and its questions
    counts: dict[str, np.ndarray] = {}
    for cell in cells:
        run = cell.runs[-1].directory
        steps = evaluated_steps(run)
        if not steps:
            raise ValueError(f"{run}: the run of {cell.name} is finished but has no evaluation; remove the directory")
        predictions = read_evaluation(evaluation_file(run, steps[-1])).predictions
        for metric in grid.metrics:
            task, _, score = metric.partition("/")
            own = [prediction for prediction in predictions if prediction["task"] == task]
            questions = [(prediction["record"], prediction["question"]) for prediction in own]
            first = asked.setdefault(task, (cell.name, questions))
            if questions != first[1]:
                raise ValueError(f"{run}: {cell.name} was asked other {task} questions than {first[0]}; they cannot be compared")
            images = {record: number for number, record in enumerate(dict.fromkeys(record for record, _ in questions))}
            of_question = np.array([images[record] for record, _ in questions], np.int64)
            values = np.array([prediction["scores"][score] for prediction in own], np.float64)
            counts[task] = np.bincount(of_question, minlength=len(images))
            sums_I = np.bincount(of_question, values, minlength=len(images))
            rows.setdefault((cell.setting, metric), []).append((cell.seed, sums_I))
    return {
        (setting, metric): Scores(
            tuple(seed for seed, _ in found), np.stack([sums for _, sums in found]), counts[metric.partition("/")[0]]
        )
        for (setting, metric), found in rows.items()
    }


def _summary(scores: Scores) -> dict[str, Any]:
    found = interval(scores.sums_SI, scores.counts_I)
    per_seed = (scores.sums_SI.sum(1) / scores.counts_I.sum()).tolist()
    return _numbers(found) | {"per_seed": dict(zip(map(str, scores.seeds), per_seed, strict=True))}


def _difference(scores: dict[tuple[str, str], Scores], metric: str, above: str, below: str) -> dict[str, Any]:
    """The difference `above` - `below` over the seeds that both have, paired by seed and image, and the verdict."""
    a, b = scores.get((above, metric)), scores.get((below, metric))
    seeds = tuple(seed for seed in a.seeds if seed in b.seeds) if a is not None and b is not None else ()
    if a is None or b is None or not seeds:
        return {"mean": None, "low": None, "high": None, "seeds": 0, "verdict": NOT_MEASURED}
    found = interval(a.of(seeds) - b.of(seeds), a.counts_I)
    return _numbers(found) | {"verdict": verdict(found)}


def _numbers(found: Interval) -> dict[str, Any]:
    """An interval for JSON: infinite ends (one seed) become None."""
    return {key: None if math.isinf(value) else value for key, value in vars(found).items()}
