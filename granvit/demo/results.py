"""What the demo's report shows of the evaluations: scores with intervals, aims, and the answers that are shown as pictures."""
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from granvit.config import RunConfig, load_config
from granvit.evaluate import Evaluation, evaluated_steps, evaluation_file, read_evaluation
from granvit.logs import read_metrics
from granvit.metrics import SCORES
from granvit.probe.scores import bootstrap, mean
from granvit.stages import Task

RUNS = ("stage1", "stage1_mixed", "guesser", "stage2")  # directories of the demo, in the order of the plan
NAMES = {"stage1": "stage 1", "stage1_mixed": "stage 1 with Caption2Bbox", "guesser": "guesser", "stage2": "stage 2"}
START = "start weights"
ROWS: dict[str, tuple[Task, str]] = {  # score -> task and title in the table
    "exact_match": ("bbox2caption", "Bbox2Caption, exact match"),
    "rouge_l": ("bbox2caption", "Bbox2Caption, ROUGE-L"),
    "acc_iou50": ("caption2bbox", "Caption2Bbox, ACC@IoU0.5"),
    "unparsable": ("caption2bbox", "Caption2Bbox, answers that are no box"),
}
RIGHT: dict[Task, str] = {"bbox2caption": "exact_match", "caption2bbox": "acc_iou50"}  # the score that is 1 for a right answer
WORST: dict[Task, str] = {"bbox2caption": "rouge_l", "caption2bbox": "mean_iou"}  # the score that the worst answers are sorted by
Prediction = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of the demo: its configuration, its evaluations in order of steps (at least one), and the
    last step that it trained."""

    name: str
    path: Path
    config: RunConfig
    evaluations: list[Evaluation]
    trained: int

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1]

    @property
    def finished(self) -> bool:
        """Whether the newest evaluation is that of the last step. A run that states epochs and no steps counts as finished."""
        return self.config.train.steps is None or self.last.step >= self.config.train.steps

    @property
    def title(self) -> str:
        """What the newest evaluation is of, as the head of a column."""
        name = {"stage1": "after stage 1", "stage2": "after stage 2", "guesser": "guesser (no image)"}.get(self.name)
        if self.finished:
            return name or NAMES[self.name]
        return f"{NAMES[self.name]}, step {self.last.step} of {self.config.train.steps}"

    @property
    def label(self) -> str:
        """A short name of the newest evaluation."""
        return NAMES[self.name] if self.finished else f"{NAMES[self.name]}, step {self.last.step}"


def read_runs(root: Path) -> dict[str, Run]:
    """The runs in `root` that have an evaluation of trained weights, in the order of `RUNS`.

    `ValueError` if stage 1 is not among them, or if an evaluation lacks a score (of an earlier version).
    """
    found = {name: root / name for name in RUNS if any(evaluated_steps(root / name))}
    if "stage1" not in found:
        raise ValueError(f"{root / 'stage1'}: no evaluation in {root / 'stage1' / 'eval'}; `python scripts/demo.py` makes it")
    return {name: _read_run(name, path) for name, path in found.items()}


def _read_run(name: str, path: Path) -> Run:
    evaluations = [read_evaluation(evaluation_file(path, step)) for step in evaluated_steps(path)]
    for evaluation in evaluations:
        for task, names in SCORES.items():
            if task in evaluation.table and (missing := set(names) - evaluation.table[task].keys()):
                file = evaluation_file(path, evaluation.step)
                raise ValueError(f"{file}: no score {min(missing)} of {task}; an earlier version wrote it, choose another --out")
    trained = [record["step"] for _, record in read_metrics(path / "metrics.jsonl", sys.maxsize)]
    return Run(name, path, load_config(path / "config.yaml"), evaluations, max(trained, default=evaluations[-1].step))


@dataclass(frozen=True)
class Percent:
    """A mean score in percent with its 95% interval."""

    value: float
    low: float
    high: float


def percent(evaluation: Evaluation, score: str) -> Percent:
    """The mean of a score of `ROWS` over the questions of its task, in percent, with a 95% interval: bootstrap over images, the
    questions about an image stay together. `ValueError` if the evaluation has no answers of this task."""
    own = predictions(evaluation, ROWS[score][0])
    images = np.array([prediction["record"] for prediction in own])
    values = np.array([prediction["scores"][score] for prediction in own], np.float64)
    found = bootstrap(mean, images, values, seed=0)
    low, high = found.interval
    return Percent(100 * found.value, 100 * low, 100 * high)


def predictions(evaluation: Evaluation, task: Task) -> list[Prediction]:
    """The answers to one task, in the store's order. `ValueError` if there are none."""
    own = [prediction for prediction in evaluation.predictions if prediction["task"] == task]
    if not own:
        raise ValueError(f"the evaluation after step {evaluation.step} has no answers of {task}; add it to eval.tasks")
    return own


@dataclass(frozen=True)
class Column:
    """One column of the table: an evaluation, and its title."""

    title: str
    evaluation: Evaluation


def columns(runs: dict[str, Run]) -> list[Column]:
    """The columns of the table: start weights, guesser, stage 1, stage 1 with Caption2Bbox, stage 2; those that exist."""
    first = runs["stage1"].evaluations[0]
    found = [Column(f"{START} (before stage 1)", first)] if first.step == 0 else []
    return found + [Column(run.title, run.last) for name in ("guesser", "stage1", "stage1_mixed", "stage2")
                    if (run := runs.get(name)) is not None]  # fmt: skip


@dataclass(frozen=True)
class Aim:
    """An aim of the demo, what this run reached, and whether that meets the aim; None where a run is still to come."""

    text: str
    reached: str
    met: bool | None


def aims(runs: dict[str, Run]) -> list[Aim]:
    """The demo's four aims. A run counts when it is finished."""
    value = {(name, score): percent(run.last, score).value for name, run in runs.items() if run.finished
             for score in ("exact_match", "acc_iou50")}  # fmt: skip
    stage1, guesser = value.get(("stage1", "exact_match")), value.get(("guesser", "exact_match"))
    stage2, mixed = value.get(("stage2", "acc_iou50")), value.get(("stage1_mixed", "acc_iou50"))
    show = lambda number: "still to come" if number is None else f"{number:.1f}%"  # noqa: E731
    both = None if mixed is None or stage2 is None else mixed <= stage2 / 4
    against = "" if both is None else f" against a quarter of {show(stage2)}"
    return [
        Aim("Bbox2Caption, exact match after stage 1: at least 60%", show(stage1), None if stage1 is None else stage1 >= 60),
        Aim("The guesser's exact match: below 6%", show(guesser), None if guesser is None else guesser < 6),
        Aim("Caption2Bbox, ACC@IoU0.5 after stage 2: at least 60%", show(stage2), None if stage2 is None else stage2 >= 60),
        Aim("ACC@IoU0.5 of stage 1 with Caption2Bbox: at most a quarter of that after stage 2", show(mixed) + against, both),
    ]


def random_sample(evaluation: Evaluation, task: Task, count: int, seed: int) -> list[Prediction]:
    """One question about each of up to `count` images. Images and questions are drawn at random; the draw depends on the seed,
    the task and which questions were asked, not on the answers."""
    by_image: dict[str, list[Prediction]] = {}
    for prediction in predictions(evaluation, task):
        by_image.setdefault(prediction["record"], []).append(prediction)
    rng = np.random.default_rng((seed, list(RIGHT).index(task)))
    chosen = rng.permutation(len(by_image))[:count]
    images = list(by_image.values())
    return [images[image][int(rng.integers(len(images[image])))] for image in chosen]


def worst(evaluation: Evaluation, task: Task, count: int) -> list[Prediction]:
    """The `count` answers with the lowest score (`WORST`), the lowest first; equal ones in the store's order."""
    return sorted(predictions(evaluation, task), key=lambda prediction: prediction["scores"][WORST[task]])[:count]


def answer_to(evaluation: Evaluation, asked: Prediction) -> Prediction:
    """The answer of another evaluation to the same question. `ValueError` if it was not asked."""
    own = (prediction for prediction in evaluation.predictions if _question(prediction) == _question(asked))
    found = next(own, None)
    if found is None:
        raise ValueError(f"the evaluation after step {evaluation.step} lacks a question about {asked['record']} that another run "
                         f"was asked; runs of one demo are evaluated on the same images")  # fmt: skip
    return found


def _question(prediction: Prediction) -> Iterable[Any]:
    return prediction["record"], prediction["task"], prediction["question"]
