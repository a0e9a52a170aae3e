"""Predicts what a stage costs before it is started: FLOPs, memory per device and days, from its configuration.

    python scripts/plan.py --config configs/stage1.yaml --device 910B3 --count 128 --mfu 0.4 [key=value ...]

Nothing is run; no weights and no device are needed. The formulas are those of `granvit.cost`. Two countings stand side by side:

  in full   every block of the encoder, rows of exactly their tokens, logits at every token. This is the usual counting of a
            model's cost, and the one to compare with other models and with the MFU that others report.
  as run    what this code computes: only the encoder's blocks that are used, rows filled up to their bucket, logits at the
            bucket's answers, the teacher on as many crops in every row as a row may have boxes, recomputation where it is on.

The questions are counted in the stores of `data.sources` if all of them are there, otherwise they are the paper's. Region stages
only (stage1, stage2): what conversations cost depends on their lengths, which the paper does not give.
"""
import argparse
import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from granvit.config import (
    CONFIGS,
    Bucket,
    RunConfig,
    Source,
    find_config,
    language_config,
    load_config,
    read_yaml,
    resolve_models,
    vision_config,
)
from granvit.cost import forward_flops, training_flops
from granvit.data.draw import available
from granvit.data.store import REGIONS, Store
from granvit.exit_status import exit_status
from granvit.logs import to_console
from granvit.memory import predicted_memory
from granvit.models import PARTS, LanguageConfig, VisionConfig
from granvit.stages import REGION_TASKS, Task

TERA, GIGA, HOUR = 1e12, 1e9, 3600.0
PLANNED = ("stage1", "stage2")


@dataclass(frozen=True)
class Device:
    """`peak` in FLOP/s of dense bfloat16 matrix products, `memory` in bytes for a program, `frameworks` that run on it."""

    peak: float
    memory: float
    frameworks: tuple[str, ...]


_ASCEND, _CUDA = ("mindspore", "torch"), ("torch",)
# 910B: the published peaks; of 64 GB a program can use 62.3, of the B4's 32 GB the same share. A100, H100 and H200 (SXM): dense
# bfloat16 (half of what the data sheets of H100 and H200 state, which is with sparsity) and memory of NVIDIA's data sheets.
DEVICES = {
    "910B1": Device(373.88 * TERA, 62.3 * GIGA, _ASCEND),
    "910B2": Device(353.89 * TERA, 62.3 * GIGA, _ASCEND),
    "910B3": Device(294.91 * TERA, 62.3 * GIGA, _ASCEND),
    "910B4": Device(245.76 * TERA, 31.1 * GIGA, _ASCEND),
    "A100": Device(312 * TERA, 80 * GIGA, _CUDA),
    "H100": Device(989.4 * TERA, 80 * GIGA, _CUDA),
    "H200": Device(989.4 * TERA, 141 * GIGA, _CUDA),
}

# The paper: images and regions of Gran-29M's natural and OCR sources (Table 6), questions of an epoch (sections 4.1 and 5.1).
SOURCES = ((23_964_098, 81_997_719), (5_550_550, 101_560_803))
QUESTIONS: dict[Task, float] = {"global": 23.9e6, "bbox2caption": 130e6, "caption2bbox": 24e6}
RATES: dict[Task, tuple[float, float]] = {"global": (1, 0), "bbox2caption": (1, 0.492), "caption2bbox": (1, 1)}  # by source
SHARES: dict[Task, float] = {"global": 1, "bbox2caption": 1, "caption2bbox": 0.131}  # `data.mix` of the paper's two stages
# Mean tokens of a row with one question, without its image tokens, of which `TEMPLATE` stand before the question; and how many of
# them are supervised. The first are those with which the paper's Table 9 agrees; the answers are caption lengths as in
# scripts/bench_order.py, and decide only which bucket a row takes.
TEXT: dict[Task, int] = {"global": 200, "bbox2caption": 90, "caption2bbox": 75}
ANSWER: dict[Task, int] = {"global": 164, "bbox2caption": 9, "caption2bbox": 26}
TEMPLATE = 20
TABLE_9 = {"encoder frozen": (3.24, 1.62), "encoder tunable": (4.25, 2.09)}  # the paper's TFLOPs and TMACs of one sample
TABLE_9_TOKENS = 1146  # the row length at which the first line gives the paper's MACs

RowClass = tuple[int, int]  # numbers of region questions and of global questions


@dataclass(frozen=True)
class Images:
    """Images of which an epoch asks alike. `images[n]` is how many have n regions. `asked` is, by region task, the probability
    that an epoch asks about a region; for `global` that it asks about an image."""

    images: np.ndarray
    asked: dict[Task, float]

    @property
    def questions(self) -> dict[Task, float]:
        """Expected questions of an epoch."""
        regions = float(self.images @ np.arange(len(self.images)))
        return {t: p * (float(self.images.sum()) if t == "global" else regions) for t, p in self.asked.items()}

    def with_region_questions(self) -> np.ndarray:
        """`[n]`: the expected number of images about which n region questions are asked."""
        probabilities = [p for task, p in self.asked.items() if task != "global"]
        found = np.zeros((len(self.images) - 1) * len(probabilities) + 1)
        for regions in np.flatnonzero(self.images):
            spread = np.ones(1)
            for p in probabilities:
                spread = np.convolve(spread, _binomial(int(regions), p))
            found[: len(spread)] += self.images[regions] * spread
        return found


def _binomial(n: int, p: float) -> np.ndarray:
    """The probabilities of 0 to n successes in n trials, `[n + 1]`."""
    if p <= 0 or p >= 1:
        return np.eye(n + 1)[n if p >= 1 else 0]
    log_n = math.lgamma(n + 1)
    ways = [log_n - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    return np.exp(np.array(ways) + np.arange(n + 1) * math.log(p) + np.arange(n, -1, -1) * math.log1p(-p))


def paper_images(mix: dict[Task, float]) -> list[Images]:
    """Gran-29M as the paper describes it. Every image of a source has its mean number of regions, rounded down or up so that the
    mean is met. Tasks are asked as often as the paper says, times the share in `mix` over that of the paper's stage."""
    found = []
    for source, (images, regions) in enumerate(SOURCES):
        fewest, more = divmod(regions, images)
        counts = np.zeros(fewest + 2)
        counts[fewest:] = images - more, more
        asked: dict[Task, float] = {}
        for task in _asked_tasks(mix):
            of_all = sum(s[task != "global"] * rate for s, rate in zip(SOURCES, RATES[task], strict=True))
            asked[task] = min(1.0, mix[task] / SHARES[task] * RATES[task][source] * QUESTIONS[task] / of_all)
        found.append(Images(counts, asked))
    return found


def store_images(config: RunConfig) -> list[Images] | None:
    """The images of the configuration's stores, of each store those with and those without a global caption; None unless all
    stores are there. `ValueError` names a store that holds no regions or cannot be used."""
    if not all(Path(source.path).is_dir() for source in config.data.sources):
        return None
    mix, found = config.stage_spec.mix, []
    for source in config.data.sources:
        store = Store(source.path)
        if store.kind != REGIONS:
            raise ValueError(f"store {store.path}: holds conversations; {config.stage} is planned on region stores")
        first_texts = store.region_starts[:-1] + np.arange(store.records)
        captioned = store.text_ends[first_texts + 1] > store.text_ends[first_texts]
        regions = np.diff(store.region_starts)
        for share in (0.0, 1.0):
            asked = {
                task: mix[task] * _rate(source, store, task) * (share if task == "global" else 1.0) for task in _asked_tasks(mix)
            }
            found.append(Images(np.bincount(regions[captioned == share], minlength=1).astype(float), asked))
    return found


def _rate(source: Source, store: Store, task: Task) -> float:
    """The share of a store's questions of a task that its source uses."""
    if source.count is None:
        return 1.0 if task == "global" else source.rate
    return source.count.get(task, 0) / max(available(store, task), 1)


def _asked_tasks(mix: dict[Task, float]) -> list[Task]:
    return [task for task in REGION_TASKS if mix.get(task, 0) > 0]


def row_classes(sources: Sequence[Images], per_row: int) -> dict[RowClass, float]:
    """The expected number of rows of an epoch by their questions (the rule of `granvit.data.sampler`): up to `per_row` region
    questions about an image share a row, the global question joins the first of them; with 1 every question has its own."""
    rows: dict[RowClass, float] = {}

    def add(row: RowClass, count: float) -> None:
        if count > 0:
            rows[row] = rows.get(row, 0.0) + count

    for source in sources:
        captioned = source.asked.get("global", 0.0)
        for asked, images in enumerate(source.with_region_questions()):
            if per_row == 1:
                add((1, 0), images * asked)
                add((0, 1), images * captioned)
                continue
            first = min(asked, per_row)
            add((first, 1), images * captioned)
            if asked:
                full, rest = divmod(asked - first, per_row)
                add((first, 0), images * (1 - captioned))
                add((per_row, 0), images * full)
                add((rest, 0), images * bool(rest))
    return dict(sorted(rows.items()))


@dataclass(frozen=True)
class Plan:
    """The cost of a stage as `config` sets it, with `vision` and `language`, asking about the images of `sources`. FLOPs."""

    config: RunConfig
    vision: VisionConfig
    language: LanguageConfig
    sources: Sequence[Images]

    @cached_property
    def questions(self) -> dict[Task, float]:
        """Questions of an epoch, by task."""
        tasks = _asked_tasks(self.config.stage_spec.mix)
        return {task: sum(source.questions[task] for source in self.sources) for task in tasks}

    @cached_property
    def rows(self) -> dict[RowClass, float]:
        """Rows of an epoch, by their questions."""
        return row_classes(self.sources, self.config.data.regions_per_row)

    def _mean(self, of: dict[Task, int]) -> float:
        """The mean over the region questions of an epoch."""
        asked = {task: count for task, count in self.questions.items() if task != "global"}
        return sum(count * of[task] for task, count in asked.items()) / max(sum(asked.values()), 1)

    def tokens(self, row: RowClass) -> int:
        """Tokens of a row."""
        text = row[0] * (self._mean(TEXT) - TEMPLATE) + row[1] * (TEXT["global"] - TEMPLATE)
        return self.vision.image_tokens + TEMPLATE + round(text)

    def bucket(self, row: RowClass) -> Bucket:
        """The smallest bucket that holds a row; the largest, if none does."""
        tokens, answers = self.tokens(row), row[0] * self._mean(ANSWER) + row[1] * ANSWER["global"]
        buckets = self.config.data.buckets
        return next((b for b in buckets if b.length >= tokens and b.answers >= answers), buckets[-1])

    def sample(self, task: Task) -> tuple[int, dict[str, float], dict[str, float]]:
        """A sample of one question, in full: its tokens, and the FLOPs of its forward pass and of training on it, by module."""
        tokens, crops = self.vision.image_tokens + TEXT[task], int(self.config.stage_spec.distill and task != "global")
        model = self.vision.with_all_blocks, self.language
        shape = tokens, tokens, crops, self.config.crop_size(self.vision)
        return tokens, forward_flops(*model, *shape), training_flops(*model, self.config.stage_spec.trains, *shape)

    def in_full(self, row: RowClass) -> float:
        """FLOPs of training on one row, in full."""
        tokens, crops = self.tokens(row), min(row[0], self.config.boxes_per_row)
        trains, crop_size = self.config.stage_spec.trains, self.config.crop_size(self.vision)
        return sum(training_flops(self.vision.with_all_blocks, self.language, trains, tokens, tokens, crops, crop_size).values())

    def as_run(self, row: RowClass) -> float:
        """FLOPs that this code computes for one row."""
        bucket, trains, crop_size = self.bucket(row), self.config.stage_spec.trains, self.config.crop_size(self.vision)
        shape = bucket.length, bucket.answers, self.config.boxes_per_row, crop_size
        return sum(training_flops(self.vision, self.language, trains, *shape, self.config.runtime.recompute).values())

    @cached_property
    def epoch_in_full(self) -> float:
        """FLOPs of an epoch, in full."""
        return sum(count * self.in_full(row) for row, count in self.rows.items())

    @cached_property
    def epoch_as_run(self) -> float:
        """FLOPs that this code computes in an epoch."""
        return sum(count * self.as_run(row) for row, count in self.rows.items())

    def unpacked(self) -> "Plan":
        """The same questions, each in a row of its own."""
        data = self.config.data.model_copy(update={"regions_per_row": 1})
        return Plan(self.config.model_copy(update={"data": data}), self.vision, self.language, self.sources)

    def memory(self, device: Device) -> tuple[int, int]:
        """Bytes of the state and of a step's peak on every device: the larger of the predictions of the device's frameworks."""
        both = [predicted_memory(self.config, self.vision, self.language, framework) for framework in device.frameworks]
        return both[0][0], max(peak for _, peak in both)


def table_9() -> dict[str, tuple[float, float]]:
    """The two lines of the paper's Table 9 by formula, FLOPs and MACs: SigLIP2-So400m and Qwen2.5-1.5B, one row, no logits. The
    first line leaves out the pass of the frozen encoder, as the paper's does."""
    vision, language = vision_config("siglip2-so400m-patch16-512"), language_config("qwen2.5-1.5b")
    cost = forward_flops(vision, language, TABLE_9_TOKENS, 0)
    frozen = cost["projector"] + cost["language"]
    return {line: (flops, flops / 2) for line, flops in zip(TABLE_9, (frozen, frozen + cost["vision"]), strict=True)}


def decoders() -> list[str]:
    """The decoders of configs/models, by name, without those of the tests and of the demo."""
    paths = sorted((CONFIGS / "models").glob("*.yaml"))
    return [path.stem for path in paths if not path.stem.startswith(("tiny-", "demo-")) and "vocab" in read_yaml(path)]


def find_device(name: str) -> Device:
    """`ValueError` with the nearest name, if there is no such device."""
    if name not in DEVICES:
        near = difflib.get_close_matches(name.upper(), DEVICES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DEVICES)}"
        raise ValueError(f"--device {name!r} is unknown; {hint}")
    return DEVICES[name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML of the run, as for scripts/stage1.py")
    parser.add_argument("--device", default="910B3", help=f"{', '.join(DEVICES)} (default: %(default)s)")
    parser.add_argument("--count", type=int, default=128, help="number of devices (default: %(default)s)")
    mfu_help = "share of the devices' peak that is reached, which nothing here predicts (default: %(default)s)"
    parser.add_argument("--mfu", type=float, default=0.4, help=mfu_help)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers to this file too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the YAML, as in train.micro_batch=1")
    options = parser.parse_intermixed_args(arguments)
    to_console(0)
    return exit_status(lambda: _plan(options), [])


def _plan(options: argparse.Namespace) -> None:
    device = find_device(options.device)
    if options.count < 1:
        raise ValueError(f"--count {options.count}: expected a number of devices, 1 or more")
    if not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu {options.mfu}: expected a share of the peak, above 0 and at most 1")
    config = load_config(find_config(options.config), options.overrides)
    if config.stage not in PLANNED:
        raise ValueError(f"{options.config} configures {config.stage!r}; planned are {', '.join(PLANNED)}")
    if foreign := [task for task, share in config.stage_spec.mix.items() if share > 0 and task not in REGION_TASKS]:
        raise ValueError(f"{options.config}: data.mix names {', '.join(foreign)}; planned are {', '.join(REGION_TASKS)}")
    config.local_micro_batches(options.count)
    vision, language = resolve_models(config)
    stores = store_images(config)
    sources = paper_images(config.stage_spec.mix) if stores is None else stores
    plan = Plan(config, vision, language, sources)
    if not plan.rows:
        raise ValueError(f"{options.config}: data.sources have no question of the tasks in data.mix: {config.stage_spec.mix}")
    names = decoders()
    others = [config.model.language, *(name for name in names if name != language.name)]
    compared = [Plan(config, vision, language_config(name), sources) for name in others]
    compared.sort(key=lambda other: other.epoch_in_full)
    fleet = Fleet(options.device, device, options.count, options.mfu)
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(plan, compared, fleet, stores is not None), indent=1) + "\n")
    show(Console(width=max(Console().width, 100)), options.config, plan, compared, fleet, stores is not None)


@dataclass(frozen=True)
class Fleet:
    """`count` devices that reach the share `mfu` of their peak."""

    name: str
    device: Device
    count: int
    mfu: float

    @property
    def speed(self) -> float:
        """FLOP/s of all devices."""
        return self.count * self.device.peak * self.mfu


def as_json(plan: Plan, compared: Sequence[Plan], fleet: Fleet, from_stores: bool) -> dict[str, Any]:
    """All numbers, in FLOPs, bytes and seconds."""
    samples = {}
    for task in plan.questions:
        tokens, forward, training = plan.sample(task)
        samples[task] = {"tokens": tokens, "forward": forward, "training": training, "total": sum(training.values())}
    rows = [
        {"region_questions": r, "global_questions": g, "rows": count, "tokens": plan.tokens((r, g)),
         "bucket": plan.bucket((r, g)).model_dump(), "in_full": plan.in_full((r, g)), "as_run": plan.as_run((r, g))}
        for (r, g), count in plan.rows.items()
    ]  # fmt: skip
    return {
        "device": {"name": fleet.name, "peak": fleet.device.peak, "memory": fleet.device.memory, "count": fleet.count,
                   "mfu": fleet.mfu},
        "table_9": {line: {"flops": found[0], "macs": found[1]} for line, found in table_9().items()},
        "samples": samples,
        "questions": plan.questions,
        "questions_from": "stores" if from_stores else "paper",
        "rows": rows,
        "unpacked_over_packed": plan.unpacked().epoch_in_full / plan.epoch_in_full,
        "decoders": {each.language.name: _totals(each, fleet) for each in compared},
    }  # fmt: skip


def _totals(plan: Plan, fleet: Fleet) -> dict[str, float]:
    """An epoch in numbers."""
    rows, questions, (state, peak) = sum(plan.rows.values()), sum(plan.questions.values()), plan.memory(fleet.device)
    totals: dict[str, float] = {"state_bytes": state, "peak_bytes": peak}
    for name, flops in (("in_full", plan.epoch_in_full), ("as_run", plan.epoch_as_run)):
        seconds = flops / fleet.speed
        totals |= {f"{name}_flops": flops, f"{name}_flops_per_question": flops / questions, f"{name}_seconds": seconds,
                   f"{name}_images_per_second": rows / seconds, f"{name}_questions_per_second": questions / seconds}  # fmt: skip
    return totals


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _tera(flops: float) -> str:
    return f"{flops / TERA:.2f}"


def _time(seconds: float) -> str:
    return f"{seconds / HOUR:.1f} h" if seconds < 48 * HOUR else f"{seconds / HOUR / 24:.1f} days"


def show(console: Console, path: str, plan: Plan, compared: Sequence[Plan], fleet: Fleet, from_stores: bool) -> None:
    """Prints the plan."""
    trains = " and ".join(part for part in PARTS if part in plan.config.stage_spec.trains)
    peak = f"peak {fleet.device.peak / TERA:g} TFLOP/s each, of which {fleet.mfu:.0%} are reached"
    console.print(f"{path}: {plan.config.stage}, {plan.vision.name} with {plan.language.name}, trains {trains}", highlight=False)
    console.print(f"{fleet.count} x {fleet.name}: {peak}", highlight=False)
    tables = (_samples(plan), _paper(), _rows(plan), _epoch(plan, fleet, from_stores), _decoders(compared, fleet))
    for title, table in tables:
        console.print(f"\n[bold]{title}[/]", highlight=False)
        console.print(table)
    console.print()
    for note in notes(plan, from_stores):
        console.print(f"- {note}", highlight=False, markup=False)


def _samples(plan: Plan) -> tuple[str, Table]:
    tasks = list(plan.questions)
    found = {task: plan.sample(task) for task in tasks}
    table = _table("module", *(f"{task}\n{kind}" for task in tasks for kind in ("forward", "training")))
    for module in (*PARTS, "teacher"):
        table.add_row(module, *(_tera(cost[module]) for task in tasks for cost in found[task][1:]))
    table.add_section()
    table.add_row("all", *(_tera(sum(cost.values())) for task in tasks for cost in found[task][1:]))
    lengths = ", ".join(f"{task} {found[task][0]} tokens" for task in tasks)
    return f"A sample of one question, in full, TFLOP ({lengths})", table


def _paper() -> tuple[str, Table]:
    table = _table("line", "TFLOP", "paper", "TMAC", "paper")
    for line, (flops, macs) in table_9().items():
        stated_flops, stated_macs = TABLE_9[line]
        cells = ((flops, stated_flops), (macs, stated_macs))
        texts = [text for own, stated in cells for text in (f"{own / TERA:.3f}", f"{stated} ({own / TERA / stated - 1:+.1%})")]
        table.add_row(line, *texts)
    return f"The paper's Table 9: SigLIP2 and Qwen2.5-1.5B, a forward pass over {TABLE_9_TOKENS} tokens, without logits", table


def _rows(plan: Plan) -> tuple[str, Table]:
    total = sum(plan.rows.values())
    table = _table("questions", "share", "tokens", "bucket", "in full", "as run")
    for row, count in plan.rows.items():
        asked = [f"{n} {name}" for n, name in zip(row, ("about regions", "global"), strict=True) if n]
        bucket = plan.bucket(row)
        table.add_row(" + ".join(asked), f"{count / total:.1%}", str(plan.tokens(row)), f"{bucket.length}/{bucket.answers}",
                      _tera(plan.in_full(row)), _tera(plan.as_run(row)))  # fmt: skip
    return "The rows of this configuration: questions, tokens, bucket (length/answers), TFLOP of training", table


def _epoch(plan: Plan, fleet: Fleet, from_stores: bool) -> tuple[str, Table]:
    totals, origin = _totals(plan, fleet), "counted in the stores" if from_stores else "the paper's numbers"
    asked = ", ".join(f"{_number(count)} {task}" for task, count in plan.questions.items())
    rows = sum(plan.rows.values())
    steps = math.ceil(rows / plan.config.train.global_batch)
    table = _table("", "in full", "as run")
    keys = ("in_full", "as_run")
    table.add_row("FLOPs", *(f"{totals[f'{key}_flops']:.3g}" for key in keys))
    table.add_row("TFLOP a question", *(_tera(totals[f"{key}_flops_per_question"]) for key in keys))
    table.add_row("questions/s", *(f"{totals[f'{key}_questions_per_second']:.0f}" for key in keys))
    table.add_row("images/s (every row encodes its image)", *(f"{totals[f'{key}_images_per_second']:.0f}" for key in keys))
    table.add_row("seconds a step", *(f"{totals[f'{key}_seconds'] / steps:.3f}" for key in keys))
    table.add_row("time", *(_time(totals[f"{key}_seconds"]) for key in keys))
    if plan.config.data.regions_per_row > 1:
        unpacked = plan.unpacked().epoch_in_full
        table.add_row("with one question a row: FLOPs", f"{unpacked:.3g}", "")
        table.add_row("with one question a row: times as much", f"{unpacked / plan.epoch_in_full:.2f}", "")
    return f"An epoch: {asked} ({origin}); {_number(rows)} rows, {steps} steps", table


def _number(count: float) -> str:
    return f"{count / 1e6:.4g}M" if count >= 1e6 else f"{count:.0f}"


def _decoders(compared: Sequence[Plan], fleet: Fleet) -> tuple[str, Table]:
    config, memory = compared[0].config, fleet.device.memory
    rows = f"{config.train.micro_batch} row{'s' * (config.train.micro_batch > 1)} of {config.data.buckets[-1].length} tokens"
    tasks = list(compared[0].questions)
    table = _table("decoder", *(f"{task}\nTFLOP" for task in tasks), "in full", "as run", "state", "step", "share")
    for plan in compared:
        totals = _totals(plan, fleet)
        peak, state = totals["peak_bytes"], totals["state_bytes"]
        fits = f"{peak / memory:.0%}" + (": does not fit" if peak > memory else "")
        table.add_row(plan.language.name, *(_tera(sum(plan.sample(task)[2].values())) for task in tasks),
                      _time(totals["in_full_seconds"]), _time(totals["as_run_seconds"]), f"{state / GIGA:.1f}",
                      f"{peak / GIGA:.1f}", fits)  # fmt: skip
    memory_of = f"GB of a device's {memory / GIGA:g} ({rows}, recomputation {_switch(config)})"
    return f"Decoders: TFLOP of a sample, time of an epoch, {memory_of}", table


def _switch(config: RunConfig) -> str:
    return "on" if config.runtime.recompute else "off"


def notes(plan: Plan, from_stores: bool) -> list[str]:
    """What is assumed, in sentences."""
    config, vision, full = plan.config, plan.vision, plan.vision.with_all_blocks
    passes = {part: "3" if part in config.stage_spec.trains else "1" for part in PARTS}
    if passes["language"] == "1":
        passes["language"] = "2 (its attention 3: it has no weights)"
    if passes["projector"] == "1" and "vision" in config.stage_spec.trains:
        passes["projector"] = "2"
    teacher = ", teacher 1" if config.stage_spec.distill else ""
    found = [
        f"Forward passes: {', '.join(f'{part} {times}' for part, times in passes.items())}{teacher}. Matrix products only; "
        "attention is counted in full, without the saving of a causal mask.",
        f"In full: {full.built_layers} encoder blocks, logits at every token, no padding, no recomputation.",
        f"As run: {vision.built_layers} encoder blocks, rows filled up to their bucket, logits at the bucket's answers"
        + (f", the teacher on {config.boxes_per_row} crop(s) in every row" if config.boxes_per_row else "")
        + f", recomputation {_switch(config)}. A step lasts as long as its longest row (docs/order.md), which is not in it; nor "
        "are loading, communication and optimizer. Those are for --mfu.",
        "Tokens of a question are means that agree with the paper's Table 9; they are not counted in the stores.",
    ]
    if not from_stores:
        found.append("Not all of data.sources are there: the questions are the paper's 130M Bbox2Caption, 24M Caption2Bbox and "
                     "23.9M global, scaled with data.mix; the regions of an image are the means of its Table 6.")  # fmt: skip
    if vision.tiles:
        found.append(f"Every image has all {vision.tiles} tiles in the row's tokens; images of fewer have shorter rows.")
    if any(plan.tokens(row) > plan.bucket(row).length for row in plan.rows):
        found.append("Some rows are longer than the largest of data.buckets; training would leave questions out of them.")
    if config.runtime.compute != "bfloat16":
        found.append(f"The peak is that of bfloat16, but runtime.compute is {config.runtime.compute}.")
    found.append("Memory: formulas of docs/memory.md, on the largest bucket; of a device's frameworks the larger. Everything is "
                 "replicated: what does not fit needs a smaller decoder, train.micro_batch or runtime.recompute.")  # fmt: skip
    return found
