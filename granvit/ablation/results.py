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


Table = Mapping[tuple[str, str], Scores]  # (setting, metric) -> scores


def results(grid: Grid, scores: Table, problems: Mapping[Cell, str], name: str) -> dict[str, Any]:
    """What results.json holds, without anything that differs from run to run: neither times nor paths.

    `scores` are those of `read_scores`. `problems` are the cells that are not in them, listed under `failed`.
    """
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


@dataclass(frozen=True)
class _Answers:
    """One task of one cell: `questions` (record, question) in their order, and the values of each score."""

    questions: list[tuple[str, str]]
    values: dict[str, np.ndarray]


def read_scores(grid: Grid, cells: list[Cell]) -> tuple[dict[tuple[str, str], Scores], dict[Cell, str]]:
    """The scores of the cells, read from the newest evaluation of the last run of each, and the cells without usable scores.

    The reason names a cell's evaluation if it is missing or cannot be read, or if the cell was asked other questions than the
    first one that can be read: then its scores cannot be paired with the others'.
    """
    rows: dict[tuple[str, str], list[tuple[int, np.ndarray]]] = {}
    counts: dict[str, np.ndarray] = {}
    first: tuple[Cell, dict[str, _Answers]] | None = None
    problems: dict[Cell, str] = {}
    for cell in cells:
        try:
            found = _answers(grid, cell)
            first = first or (cell, found)
            _check_same_questions(first, cell, found)
        except (ValueError, OSError) as error:
            problems[cell] = f"{cell.runs[-1].stage}: {error}"
            continue
        for metric in grid.metrics:
            task, _, score = metric.partition("/")
            records = [record for record, _ in found[task].questions]
            images = {record: number for number, record in enumerate(dict.fromkeys(records))}
            of_question = np.array([images[record] for record in records], np.int64)
            counts[task] = np.bincount(of_question, minlength=len(images))
            sums_I = np.bincount(of_question, found[task].values[score], minlength=len(images))
            rows.setdefault((cell.setting, metric), []).append((cell.seed, sums_I))
    scores = {
        (setting, metric): Scores(
            tuple(seed for seed, _ in found), np.stack([sums for _, sums in found]), counts[metric.partition("/")[0]]
        )
        for (setting, metric), found in rows.items()
    }
    return scores, problems


def _answers(grid: Grid, cell: Cell) -> dict[str, _Answers]:
    """Task -> the answers of a cell. `ValueError` if its evaluation is missing or damaged, or has no answer of a task."""
    run = cell.runs[-1].directory
    steps = evaluated_steps(run)
    if not steps:
        raise ValueError(f"{run}/eval has no evaluation; remove {run} and repeat the command")
    path, found = evaluation_file(run, steps[-1]), {}
    again = f"remove {path} and {run / 'finished.json'}, and repeat the command: it evaluates the run again"
    try:
        predictions = read_evaluation(path).predictions
        for task in dict.fromkeys(metric.partition("/")[0] for metric in grid.metrics):
            own = [prediction for prediction in predictions if prediction["task"] == task]
            names = [metric.partition("/")[2] for metric in grid.metrics if metric.startswith(f"{task}/")]
            values = {name: np.array([prediction["scores"][name] for prediction in own], np.float64) for name in names}
            found[task] = _Answers([(prediction["record"], prediction["question"]) for prediction in own], values)
    except (ValueError, KeyError, TypeError) as error:
        text = str(error) if str(path) in str(error) else f"{path}: not a valid evaluation file ({error!r})"
        raise ValueError(f"{text}; {again}") from None
    for task, answers in found.items():
        if not answers.questions:
            raise ValueError(f"{path} has no answer of {task}; {again}")
        if not all(np.isfinite(values).all() for values in answers.values.values()):
            raise ValueError(f"{path} has a score of {task} that is not a number; {again}")
    return found


def _check_same_questions(first: tuple[Cell, dict[str, _Answers]], cell: Cell, found: dict[str, _Answers]) -> None:
    """`ValueError` unless a cell was asked the questions of the first one, about the same images in the same order."""
    for task, answers in found.items():
        expected = first[1][task].questions
        if answers.questions != expected:
            images, theirs = (len({record for record, _ in questions}) for questions in (answers.questions, expected))
            raise ValueError(
                f"{cell.runs[-1].directory}: asked {len(answers.questions)} {task} questions about {images} images, and "
                f"{first[0].name} {len(expected)} about {theirs}, not the same ones; their scores cannot be paired"
            )


def _summary(scores: Scores) -> dict[str, Any]:
    found = interval(scores.sums_SI, scores.counts_I)
    per_seed = (scores.sums_SI.sum(1) / scores.counts_I.sum()).tolist()
    return _numbers(found) | {"per_seed": dict(zip(map(str, scores.seeds), per_seed, strict=True))}


def _difference(scores: Table, metric: str, above: str, below: str) -> dict[str, Any]:
    """The difference `above` - `below` over the seeds that both have, paired by seed and image, and the verdict."""
    a, b = scores.get((above, metric)), scores.get((below, metric))
    seeds = tuple(seed for seed in a.seeds if seed in b.seeds) if a is not None and b is not None else ()
    if a is None or b is None or not seeds:
        nothing = Interval(math.nan, -math.inf, math.inf, 0, 0, "no finished seed")
        return _numbers(nothing) | {"verdict": NOT_MEASURED}
    found = interval(a.of(seeds) - b.of(seeds), a.counts_I)
    return _numbers(found) | {"verdict": verdict(found)}


def _numbers(found: Interval) -> dict[str, Any]:
    """An interval for JSON: a mean that is not known, and ends where no interval is claimed, become None."""
    mean, low, high = (value if math.isfinite(value) else None for value in (found.mean, found.low, found.high))
    return {**vars(found), "mean": mean, "low": low, "high": high}
