"""A grid file: which settings are compared over which seeds. It is read, checked, and expanded into cells.

    question: Does self-distillation help?
    stages:                                   # name: the configuration of a stage, and overrides for all settings
      stage1: {config: configs/demo/stage1.yaml, overrides: [train.steps=300]}
      stage2: {config: configs/demo/stage2.yaml}
    settings:                                 # name: the chain of stages in their order, each with its own overrides
      without: {stage1: [distill.weight=0], stage2: []}
      with: {stage1: [], stage2: []}
    directions:                               # optional: what the paper found
      - {metric: bbox2caption/exact_match, above: with, below: without, paper: "Table 3: 75.55 against 75.06"}

A cell is one setting with one seed. The grid sets seed, output and, after the first stage of a chain, `model.init_from`.
docs/ablations.md describes all keys.
"""
import difflib
import hashlib
import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from granvit.ablation.start_files import start_files
from granvit.config import RunConfig, dump_config, find_config, load_config, read_yaml, resolve_models, validate
from granvit.data.store import Store
from granvit.launch import Framework
from granvit.metrics import SCORES
from granvit.models import Strict
from granvit.stages import REGION_TASKS

METRICS = tuple(f"{task}/{score}" for task in REGION_TASKS for score in SCORES[task])
SET_BY_THE_GRID = ("seed", "output", "stage")


class StageEntry(Strict):
    """One stage: the YAML file of its run, and `key=value` overrides that all settings share."""

    config: str
    overrides: tuple[str, ...] = ()


class Direction(Strict):
    """What the paper found: on `metric` the setting `above` has a larger score than `below`. `paper` quotes its numbers."""

    metric: str
    above: str
    below: str
    paper: str


class Grid(Strict):
    """The keys of a grid file. Differences are taken to the first setting."""

    question: str
    stages: dict[str, StageEntry] = Field(min_length=1)
    settings: dict[str, dict[str, tuple[str, ...]]] = Field(min_length=2)
    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    metrics: tuple[str, ...] = Field(("bbox2caption/exact_match", "bbox2caption/rouge_l", "caption2bbox/acc_iou50"), min_length=1)
    directions: tuple[Direction, ...] = ()
    note: str = ""


@dataclass(frozen=True, eq=False)
class StageRun:
    """One training run. Cells whose chains of configurations are equal share it. `command_line`: --config and overrides."""

    key: str
    stage: str
    config: RunConfig
    command_line: tuple[str, ...]
    before: "StageRun | None"

    @property
    def directory(self) -> Path:
        return Path(self.config.output)


@dataclass(frozen=True, eq=False)
class Cell:
    """One setting with one seed, and the runs of its chain in their order. `problem` says why it cannot run (None: it can)."""

    setting: str
    seed: int
    runs: tuple[StageRun, ...]
    problem: str | None

    @property
    def name(self) -> str:
        return f"{self.setting!r}, seed {self.seed}"


def read_grid(path: Path) -> Grid:
    """Reads and checks a grid file. `ValueError` names the file and every unknown key with the nearest known one."""
    with naming(path):
        grid = validate(Grid, read_yaml(path), str(path))
        _check_names(grid)
    return grid


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A `ValueError` from inside also names the grid file."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from None


def _check_names(grid: Grid) -> None:
    """`ValueError` for names of stages, settings or metrics that do not exist, and for values that are there twice."""
    for stage in grid.stages:
        if not re.fullmatch(r"[\w-]+", stage):
            raise ValueError(f"stages: the name {stage!r} is also that of directories; take letters, digits, '_' and '-'")
    for name, chain in grid.settings.items():
        if not chain:
            raise ValueError(f"settings.{name}: no stage; name at least one of {', '.join(grid.stages)}")
        for stage in chain:
            _check_known(stage, grid.stages, f"settings.{name}: stage")
    for metric in grid.metrics:
        _check_known(metric, METRICS, "metrics: metric")
    for number, direction in enumerate(grid.directions):
        _check_known(direction.metric, grid.metrics, f"directions.{number}.metric:")
        _check_known(direction.above, grid.settings, f"directions.{number}.above: setting")
        _check_known(direction.below, grid.settings, f"directions.{number}.below: setting")
        if direction.above == direction.below:
            raise ValueError(f"directions.{number}: above and below are the same setting {direction.above!r}")
    for key in ("seeds", "metrics"):
        values = getattr(grid, key)
        if len(set(values)) < len(values):
            raise ValueError(f"{key} lists a value twice: {list(values)}")


def _check_known(name: str, known: Collection[str], what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"{what} {name!r} does not exist; {hint}")


def expand(grid: Grid, framework: Framework, out: Path, ranks: int = 1) -> list[Cell]:
    """The cells of a grid, all settings of the first seed first. Runs are put into OUT/cells/STAGE-KEY.

    A run's key is a hash of its configuration, of the keys before it in its chain, of its start files and stores, and of the
    framework. The number of ranks and `train.micro_batch` are part of it only where a result depends on them: with
    `train.loss_reduction=per_device`. `ValueError` if a configuration is not valid, or if settings are not evaluated on the same
    questions. A start file or store that is missing does not stop the other cells: it is the `problem` of those that need it.
    """
    cells = []
    for seed in grid.seeds:
        for setting, chain in grid.settings.items():
            runs: list[StageRun] = []
            problem = None
            for stage, overrides in chain.items():
                try:
                    runs.append(_stage_run(grid.stages[stage], stage, overrides, seed, framework, out, ranks, runs))
                except MissingStart as error:
                    problem = f"{stage}: {error}"
                    break
                except ValueError as error:
                    raise ValueError(f"settings.{setting}.{stage}: {error}") from None
            cells.append(Cell(setting, seed, tuple(runs), problem))
    _check_evaluation(grid, cells)
    return cells


class MissingStart(ValueError):
    """A file that a run starts from, or a store, is missing or damaged."""


def _stage_run(entry: StageEntry, stage: str, own: tuple[str, ...], seed: int, framework: Framework, out: Path, ranks: int,
               chain: list[StageRun]) -> StageRun:  # fmt: skip
    """The run of one stage of a cell; `chain` are the runs before it."""
    before = chain[-1] if chain else None
    overrides = [*entry.overrides, *own]
    for assignment in overrides:
        key = assignment.partition("=")[0]
        if key in SET_BY_THE_GRID or (before is not None and key == "model.init_from"):
            raise ValueError(f"override {assignment!r}: the grid sets {key}; leave it out")
    overrides.append(f"seed={seed}")
    path = find_config(entry.config)
    relevant = load_config(path, [*overrides, "output=unset", *([] if before is None else ["model.init_from=null"])])
    vision, language = resolve_models(relevant)
    try:
        files = start_files(relevant, first=before is None)
    except ValueError as error:
        raise MissingStart(str(error)) from None
    divided = f"{ranks} ranks"
    if relevant.train.loss_reduction == "global":
        divided, any_size = "", relevant.train.model_copy(update={"micro_batch": 1})
        relevant = relevant.model_copy(update={"train": any_size})
    parts = [before.key if before else "", framework, dump_config(relevant), divided, repr(vision), repr(language), files]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    overrides.append(f"output={_quoted(out / 'cells' / f'{stage}-{key}')}")
    if before is not None:
        overrides.append(f"model.init_from={_quoted(before.directory)}")
    return StageRun(key, stage, load_config(path, overrides), ("--config", str(path), *overrides), before)


def _quoted(path: Path) -> str:
    """A path as a quoted YAML string, so that blanks, ':' and '#' in it have no meaning."""
    return json.dumps(str(path), ensure_ascii=False)


def _check_evaluation(grid: Grid, cells: list[Cell]) -> None:
    """`ValueError` unless the last run of every cell is evaluated on the same questions, of the tasks that the metrics need."""
    tasks = {metric.partition("/")[0] for metric in grid.metrics}
    first: tuple[str, dict] | None = None
    for cell in cells:
        if cell.problem is not None:
            continue
        run = cell.runs[-1]
        evaluation = run.config.eval
        if evaluation.source is None:
            raise ValueError(f"settings.{cell.setting}: {run.stage} has no eval.source, so it gives no scores; set it")
        if missing := sorted(tasks.difference(evaluation.tasks)):
            raise ValueError(f"settings.{cell.setting}: eval.tasks of {run.stage} lacks {missing[0]}, which the metrics need")
        asked = evaluation.model_dump(include={"source", "images", "max_new_tokens"})
        first = first or (cell.setting, asked)
        if asked != first[1]:
            raise ValueError(f"settings {first[0]!r} and {cell.setting!r} are evaluated differently: {first[1]} and {asked}")


def compared_stores(cells: list[Cell]) -> dict[str, set[str]]:
    """Held-out store -> the stores on which runs of a cell that uses it are trained, for the check of leakage."""
    found: dict[str, set[str]] = {}
    for cell in cells:
        if cell.problem is None:
            source = cell.runs[-1].config.eval.source
            assert source is not None  # `_check_evaluation`
            found.setdefault(source, set()).update(s.path for run in cell.runs for s in run.config.data.sources)
    return found


def check_tasks(grid: Grid, cells: list[Cell]) -> None:
    """`ValueError` if a held-out store has no question of a task that the metrics need."""
    for source in compared_stores(cells):
        store = Store(source)
        questions = {"bbox2caption": store.regions, "caption2bbox": store.regions, "global": store.globals}
        for metric in grid.metrics:
            if not questions[metric.partition("/")[0]]:
                held = ", ".join(task for task, number in questions.items() if number) or "no regions and no global captions"
                raise ValueError(f"metric {metric}: eval.source {source} has no such question; it has {held}")
