"""The benchmarks `order` and `seeds` of scripts/bench.py: the steps of stages 1 and 2 under several orders of the data, with
simulated lengths; and a toy stage 1 trained in this checkout's order of the data and in another's.

`order` runs the real `Plan` with the shipped configurations over simulated stores of lengths, with 1/90 of Gran-29M (`--scale`).
`order --scale paper` measures time and memory of the real `Loader` and `Plan` over indexes of Gran-29M's size.
- Stated by the paper: images and regions of both sources (Table 6), captions of at most 10 words.
- From the analysis of the paper's Table 9: the mean lengths of rows of one question (`MEANS`).
- Assumed: 1 + Poisson regions per natural image and 1 + geometric per OCR image (with Table 6's means); region captions of 1 to
  10 words, equally likely, with 1.4 tokens a word; global captions of log-normal length, sigma 0.3; 20 template tokens and 1024
  image tokens a row; 26 tokens a box.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from bench_process import alone, memory
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from granvit.checkpoint.run import newest_checkpoint
from granvit.config import CONFIGS, RunConfig, load_config, parse_config, resolve_models
from granvit.data.chat import load_chat
from granvit.data.loader import Loader
from granvit.data.sampler import WINDOW, Plan
from granvit.data.store import REGIONS, TEXT_SIDE, VERSION
from granvit.data.store_writer import write_store
from granvit.demo.pair import SHIPPED
from granvit.demo.scenes import scenes
from granvit.engine import StepInputs
from granvit.launch import load_engine_class
from granvit.plan import ANSWER, SOURCES, TEMPLATE, TEXT
from granvit.stages import TASKS

IMAGE_TOKENS = 1024
PREFIX, BOX = IMAGE_TOKENS + TEMPLATE, ANSWER["caption2bbox"]
MEANS = {task: IMAGE_TOKENS + text for task, text in TEXT.items()}  # tokens of a row that asks one question
STEPS = 2016  # a whole number of windows
RANKS = (128, 8)
RUNS = ("stage1", "stage2", "stage1_packed", "stage2_packed")


class SimulatedStore:
    """A store with the sizes of its texts, but without texts and images: one image for every `scale` of the paper's."""

    kind = REGIONS

    def __init__(self, images: int, regions: int, natural: bool, rng: np.random.Generator, scale: int):
        self.path = Path("natural" if natural else "ocr")
        more = regions / images - 1
        counts = 1 + (rng.poisson(more, images // scale) if natural else rng.geometric(1 / (1 + more), images // scale) - 1)
        self.records, self.regions = len(counts), int(counts.sum())
        self.region_starts = np.concatenate([[0], np.cumsum(counts)])
        sizes = np.ones(self.records + self.regions, np.uint64)  # of texts; an absent global caption has size 0
        if not natural:
            sizes[self.region_starts[:-1] + np.arange(self.records)] = 0
        self.text_ends = np.concatenate([np.zeros(1, np.uint64), np.cumsum(sizes)])


class SimulatedTurns:
    """Stands for `TurnLengths`."""

    def __init__(self, store: SimulatedStore, rng: np.random.Generator):
        texts = store.records + store.regions
        self.answers = np.ceil(1.4 * rng.integers(1, 11, texts)).astype(np.int64) + 1
        self.fixed = {
            "bbox2caption": MEANS["bbox2caption"] - PREFIX + 1 - round(self.answers.mean()),
            "caption2bbox": MEANS["caption2bbox"] - PREFIX + 1 - round(self.answers.mean()) - BOX,
            "global": 17,
        }
        paragraph, sigma = MEANS["global"] - PREFIX + 1 - self.fixed["global"], 0.3
        drawn = rng.lognormal(np.log(paragraph) - sigma**2 / 2, sigma, store.records)
        self.answers[store.region_starts[:-1] + np.arange(store.records)] = np.round(drawn)

    def tokens_of(self, task: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        to_box = task == TASKS.index("caption2bbox")
        fixed = np.array([self.fixed.get(name, 0) for name in TASKS])[task]
        answers = np.where(to_box, BOX, self.answers[text])
        return fixed + self.answers[text] + np.where(to_box, BOX, 0) - 1, answers


class SimulatedPrefixes:
    """Stands for `PrefixLengths`."""

    def tokens_of(self, images: np.ndarray) -> np.ndarray:
        return np.full(len(images), PREFIX)

    def has_image(self, images: np.ndarray) -> np.ndarray:
        return np.ones(len(images), bool)


@dataclass
class Rows:
    """The rows of some steps: bucket, tokens and image `[steps, rows]`, and questions of each task `[steps, rows, TASKS]`."""

    buckets: np.ndarray
    tokens: np.ndarray
    images: np.ndarray
    asked: np.ndarray

    def reordered(self, order: np.ndarray) -> "Rows":
        """The rows in another order: `order` is a permutation of the rows of all steps."""
        shape = self.buckets.shape
        flat = (x.reshape(-1, *x.shape[2:])[order].reshape(x.shape) for x in (self.buckets, self.tokens, self.images, self.asked))
        assert order.size == shape[0] * shape[1]
        return Rows(*flat)


def simulated(config: RunConfig, scale: int) -> Plan:
    """The real plan of a configuration over simulated stores."""
    rng = np.random.default_rng(0)
    stores = [SimulatedStore(*source, natural, rng, scale) for source, natural in zip(SOURCES, (True, False), strict=True)]
    return Plan(
        stores, [SimulatedTurns(store, rng) for store in stores], config.data.sources,
        config.stage_spec.mix, config.data.regions_per_row, config.train.global_batch,
        config.data.buckets, [SimulatedPrefixes() for _ in stores], config.seed,
    )  # fmt: skip


def rows_of(plan: Plan) -> Rows:
    """The rows of the plan's first steps, a whole number of windows."""
    steps = min(STEPS, plan.epoch_steps(0) - 1) // WINDOW * WINDOW
    if not steps:
        raise ValueError(f"--scale: an epoch has {plan.epoch_steps(0)} steps, fewer than a window of {WINDOW}; lower the number")
    found = []
    for step in range(steps):
        _, buckets, numbers = plan.batch(step)
        tokens, images = np.full(len(numbers), PREFIX), np.zeros(len(numbers), np.int64)
        asked = np.zeros((len(numbers), len(TASKS)), np.int64)
        row, task, text, source = [], [], [], []
        for r, (s, image, questions) in enumerate(plan.contents(0, numbers)):
            images[r] = image + s * plan.stores[0].records
            for question in questions:
                row.append(r)
                source.append(s)
                task.append(TASKS.index(question.task))
                text.append(plan.stores[s].region_starts[image] + image + (0 if question.region is None else 1 + question.region))
        row, task, text, source = map(np.array, (row, task, text, source))
        np.add.at(asked, (row, task), 1)
        for s in np.unique(source):
            np.add.at(tokens, row[source == s], plan.lengths[s].tokens_of(task[source == s], text[source == s])[0])
        found.append((buckets, tokens, images, asked))
    return Rows(*map(np.stack, zip(*found, strict=True)))


def _plain(rows: Rows) -> np.ndarray:
    """The rows of each window in a random order; it stands for the order of the shuffle, which the plan has sorted."""
    rng = np.random.default_rng(1)
    span = WINDOW * rows.buckets.shape[1]
    return np.concatenate([first + rng.permutation(span) for first in range(0, rows.buckets.size, span)])


def _sorted_windows(rows: Rows) -> np.ndarray:
    """The rows of each window sorted by bucket. (The order of the steps does not affect the figures.)"""
    plain, span = _plain(rows).reshape(-1, WINDOW * rows.buckets.shape[1]), rows.buckets.reshape(-1)
    return np.concatenate([window[np.argsort(span[window], kind="stable")] for window in plain])


def _sorted_steps(rows: Rows) -> np.ndarray:
    """The rows of each plain step sorted by bucket."""
    plain, buckets = _plain(rows).reshape(rows.buckets.shape), rows.buckets.reshape(-1)
    return np.concatenate([step[np.argsort(buckets[step], kind="stable")] for step in plain])


def _as_planned(rows: Rows) -> np.ndarray:
    return np.arange(rows.buckets.size)


SCHEMES: dict[str, tuple[Callable[[Rows], np.ndarray], str]] = {
    "sorted windows; step (old)": (_sorted_windows, "step"),
    "plain; step": (_plain, "step"),
    "plain; micro-batch": (_sorted_steps, "micro-batch"),
    "stratified; micro-batch": (_as_planned, "micro-batch"),
    "stratified; round (chosen)": (_as_planned, "round"),
}


def shapes(buckets: np.ndarray, unit: str, world: int, each: int) -> np.ndarray:
    """Bucket of every micro-batch, `[steps, rounds, ranks]`."""
    dealt = buckets.reshape(len(buckets), -1, world, each).max(3)
    if unit == "step":
        return np.broadcast_to(dealt.max((1, 2), keepdims=True), dealt.shape)
    return np.broadcast_to(dealt.max(2, keepdims=True), dealt.shape) if unit == "round" else dealt


def waits(shapes_TMW: np.ndarray, buckets: int) -> tuple[int, int]:
    """The largest number of shapes that one rank compiles, and the number of steps in which at least one rank compiles."""
    steps = len(shapes_TMW)
    met = np.stack([(shapes_TMW == bucket).any(1) for bucket in range(buckets)])  # [buckets, steps, ranks]
    first = np.where(met.any(1), met.argmax(1), steps)  # [buckets, ranks]
    return int((first < steps).sum(0).max()), len(np.unique(first[first < steps]))


def _shares(rows: Rows) -> str:
    """For each task its share of a step's questions (mean, range), and the largest deviation from the overall share, in binomial
    standard deviations."""
    asked = rows.asked.sum(1)
    questions, lines = asked.sum(1), []
    for task, name in enumerate(TASKS):
        share = asked[:, task].sum() / questions.sum()
        if share:
            off = (asked[:, task] / questions - share) / np.sqrt(share * (1 - share) / questions)
            own = asked[:, task] / questions
            lines.append(f"{name} {own.mean():.3f}, {own.min():.3f} to {own.max():.3f}, {abs(off).max():.1f} sd")
    return "\n".join(lines)


def order(console: Console, scale: int) -> None:
    """Prints a table for every configuration: shares of the tasks in a step, images, padding and compilations."""
    for name in RUNS:
        config = load_config(CONFIGS / f"{name}.yaml")
        plan = simulated(config, scale)
        rows = rows_of(plan)
        lengths, each = np.array([bucket.length for bucket in plan.buckets]), config.train.micro_batch
        asked = rows.asked.sum((0, 1))
        expected = ", ".join(f"{task} {n / asked.sum():.3f}" for task, n in zip(TASKS, asked, strict=True) if n)
        table = Table(title=f"{name}.yaml, {len(rows.buckets)} steps of {rows.buckets.shape[1]} rows; shares: {expected}",
                      caption=f"buckets {lengths.tolist()}; mean row {rows.tokens.mean():.0f} tokens",
                      box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fmt: skip
        table.add_column("order; a shape for each", no_wrap=True)
        table.add_column("shares of a step: mean, range, worst", no_wrap=True)
        for column in ("images", "ranks", "padding", "critical", "compiled", "waits"):
            table.add_column(column, justify="right", no_wrap=True)
        for scheme, (reorder, unit) in SCHEMES.items():
            ours = rows.reordered(reorder(rows))
            images = np.mean([len(np.unique(step)) for step in ours.images])
            cells = []
            for world in RANKS:
                found = shapes(ours.buckets, unit, world, each)
                padded, path = lengths[found].mean(), lengths[found].sum(1).max(1).mean() / found.shape[1]
                compiled, waited = waits(found, len(lengths))
                mean = ours.tokens.mean()
                cells.append((str(world), f"{padded / mean:.3f}", f"{path / mean:.3f}", str(compiled), str(waited)))
            table.add_row(scheme, _shares(ours), f"{images:.1f}", *("\n".join(column) for column in zip(*cells, strict=True)))
        console.print(table)
    console.print(
        "sd: binomial standard deviations of a step's share. images: distinct images in a step. padding: tokens with padding / "
        "tokens of the rows. critical: tokens with padding of the slowest rank in a step / mean tokens of a rank's rows. "
        "compiled: shapes that one rank compiles. waits: steps in which a rank compiles and the others wait."
    )


TOKENIZER = SHIPPED / "language" / "tokenizer.json"
WORLD, RANK = 128, 77  # ranks at paper scale, and the one that is measured
SHARDED = 4 * WINDOW  # steps of which that rank takes its rows
RATES = (1.0, 0.492)  # of the regions of natural and OCR images, as in stage1.yaml
READY, STEP, MEMORY = 60.0, 0.025, 3e9  # limits: processor seconds up to a first step, of a further step; bytes of a process


def write_index(folder: Path, images: int, regions: int, natural: bool, scale: int) -> None:
    """Writes a store of this many images that can be opened, has the sizes of all texts and their token lengths (`answers.u2`),
    and whose texts and images are missing: its texts are a file without blocks, its shard is empty."""
    rng = np.random.default_rng(natural)
    store = SimulatedStore(images, regions, natural, rng, scale)
    folder.mkdir()
    np.minimum(SimulatedTurns(store, rng).answers, 2**16 - 1).astype("<u2").tofile(folder / "answers.u2")
    store.region_starts.astype("<i8").tofile(folder / "region_starts.i8")
    store.text_ends.astype("<u8").tofile(folder / "text_ends.u8")
    with open(folder / "texts.bin", "wb") as texts:
        texts.truncate(int(store.text_ends[-1]))
    (folder / "shard.array_record").touch()
    names = (*TEXT_SIDE, "shard.array_record")
    manifest = {
        "format": REGIONS.format, "version": VERSION, "images": store.records, "regions": store.regions,
        "globals": store.records if natural else 0, "bbox_frame": None, "refused": {},
        "shards": [{"file": "shard.array_record", "images": store.records}],
        "bytes": {name: (folder / name).stat().st_size for name in names},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _with_lengths(function: Callable, *arguments: Any) -> Any:
    """The function's result; in it the token lengths of a store are those of `answers.u2`."""
    lengths = lambda store, chat, role: np.memmap(store.path / "answers.u2", "<u2", "r")  # noqa: E731
    with mock.patch("granvit.data.lengths.text_lengths", lengths):
        return function(*arguments)


def _loader(stores: Sequence[Path], counted: bool) -> Loader:
    """The rank's loader of stage1.yaml with these stores, and with a tokenizer that is at hand. `counted`: the sources state how
    many questions an epoch has, nearly as many as with the rates of stage1.yaml."""
    path = CONFIGS / "stage1.yaml"
    sources: list[dict[str, Any]] = []
    for store, rate in zip(stores, RATES, strict=True):
        manifest = json.loads((store / "manifest.json").read_text())
        count = {"bbox2caption": round(rate * manifest["regions"]), "global": round(0.997 * manifest["globals"])}
        sources.append({"path": str(store), **({"count": count} if counted else {"rate": rate})})
    config = load_config(path, [f"data.sources={json.dumps(sources)}", f"model.tokenizer={TOKENIZER}"])
    vision, language = resolve_models(config)
    return Loader(config, vision, load_chat(config, language), RANK, WORLD)


@dataclass(frozen=True)
class Process:
    """What a process needed: processor seconds until its plan was ready, and of its first step; wall seconds of both; processor
    seconds of each further step. A hash of the rows that the rank has in step `at`. VmHWM, and RssFile at the end, in bytes.
    Images, regions and steps of the epoch."""

    ready: float
    first: float
    wall: float
    step: float
    at: int
    rows: str
    peak: int
    mapped: int
    images: int
    regions: int
    steps: int


def _take(plan: Plan, step: int) -> str:
    """What the rank reads in a step: a hash of the sources, images and questions of its rows."""
    epoch, _, rows = plan.batch(step)
    each = len(rows) // WORLD
    return hashlib.sha256(repr(plan.contents(epoch, rows[RANK * each : (RANK + 1) * each])).encode()).hexdigest()


def _measured(make_plan: Callable[[], Plan], at: int | None) -> Process:
    """Makes a plan and takes the rank's rows: of step `at`; or if it is None, of the first `SHARDED` steps, and then of a step in
    the middle of the epoch."""
    began, used = time.perf_counter(), time.process_time()
    plan = make_plan()
    steps = plan.epoch_steps(0)
    ready = time.process_time()
    _take(plan, at or 0)
    first, wall = time.process_time(), time.perf_counter() - began
    for step in range(1, SHARDED if at is None else 1):
        _take(plan, step)
    each = (time.process_time() - first) / (SHARDED - 1)
    at = at or int(0.617 * steps)
    images, regions = (sum(getattr(store, what) for store in plan.stores) for what in ("records", "regions"))
    return Process(ready - used, first - ready, wall, each, at, _take(plan, at), memory("VmHWM"), memory("RssFile"), images,
                   regions, steps)  # fmt: skip


def _rank(stores: Sequence[Path], counted: bool, at: int | None) -> Process:
    """A rank from its start: opens the stores and makes the plan of the epoch."""
    return _measured(lambda: _loader(stores, counted).plan, at)


def _send(stores: Sequence[Path], counted: bool, file: Path) -> None:
    """Writes a rank's plan as its reading processes get it."""
    file.write_bytes(ForkingPickler.dumps(_loader(stores, counted).plan))


def _reader(file: Path, at: int) -> Process:
    """A reading process of the rank from the moment at which it has the rank's plan."""
    return _measured(lambda: ForkingPickler.loads(file.read_bytes()), at)


def paper_scale(console: Console, scale: int = 1) -> None:
    """Prints time and memory of a rank of stage 1 and of its reading processes over an index of the paper's size. `scale`: as for
    `SimulatedStore`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, stores = Path(temporary), []
        for source, natural in zip(SOURCES, (True, False), strict=True):
            stores.append(folder / ("natural" if natural else "ocr"))
            alone(write_index, stores[-1], *source, natural, scale)
        for counted in (False, True):
            first: Process = alone(_with_lengths, _rank, stores, counted, None)
            resumed: Process = alone(_with_lengths, _rank, stores, counted, first.at)
            alone(_with_lengths, _send, stores, counted, folder / "plan")
            reader: Process = alone(_with_lengths, _reader, folder / "plan", first.at)
            console.print(_paper_table("counts" if counted else "rates", first, resumed, reader))
    console.print(
        f"Seconds are of the processor; every process here uses one core (wall: with what else ran on this machine). Limits: "
        f"{READY:.0f} s until the rows of the first step are known, {STEP * 1e3:.0f} ms for each of {SHARDED - 1} further steps, "
        f"{MEMORY / 1e9:.0f} GB (VmHWM). files: pages of mapped files at the end, which the processes of a machine share. same: "
        f"the rank has the same rows in the step at which the others resume."
    )


def _paper_table(chosen_by: str, first: Process, resumed: Process, reader: Process) -> Table:
    title = f"stage1.yaml by {chosen_by}: {first.images:,} images, {first.regions:,} regions, {first.steps:,} steps an epoch"
    caption = f"rank {RANK} of {WORLD}; resumed at step {first.at:,}"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("process", "plan, s", "first step, s", "wall, s", "a step, ms", "peak, GB", "files, GB", "same", "limits"):
        table.add_column(column, justify="left" if column == "process" else "right", no_wrap=True)
    for name, one in (("rank, from the start", first), ("rank, resumed", resumed), ("its reader, resumed", reader)):
        within = one.ready + one.first <= READY and one.step <= STEP and one.peak <= MEMORY
        step = f"{one.step * 1e3:.1f}" if one is first else ""
        table.add_row(name, f"{one.ready:.1f}", f"{one.first:.2f}", f"{one.wall:.1f}", step, f"{one.peak / 1e9:.2f}",
                      f"{one.mapped / 1e9:.2f}", "yes" if one.rows == first.rows else "NO",
                      "ok" if within else "exceeded")  # fmt: skip
    return table


TOY_STEPS, SEEDS = 300, 5


def _toy(folder: Path, stage: str, output: Path, seed: int, **model: str) -> dict:
    """The configuration of a run of the tiny models on the demo's scenes. A fifth of the questions are global; these need another
    bucket than region questions, so that an order by bucket separates the two."""
    return {
        "stage": stage,
        "output": str(output),
        "seed": seed,
        "model": {"vision": "tiny-vision", "language": "tiny-language", "init": "random", **model},
        "data": {
            "sources": [{"path": str(folder / "train")}],
            "mix": {"global": 1.0, "bbox2caption": 1.0},
            "buckets": [{"length": 270, "answers": 40}, {"length": 360, "answers": 200}],
        },
        "train": {"global_batch": 32, "micro_batch": 8, "epochs": 20, "steps": TOY_STEPS, "checkpoint_every": TOY_STEPS},
        "optimizer": {"lr": 5e-3},
        "runtime": {"device": "cpu"},
    }


def _train(checkout: Path, tree: dict) -> Path:
    """Runs a checkout's script for the stage; returns the run's directory."""
    run = Path(tree["output"])
    config = run.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, checkout / "scripts" / f"{tree['stage']}.py", "--framework", "torch", "--config", config]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{checkout}: {done.stderr}")
    return run


def _held_out_loss(folder: Path, tree: dict, run: Path, task: str) -> tuple[float, int]:
    """Caption loss per token of a run's last checkpoint on the held-out questions of one task, and the number of tokens."""
    import torch

    tree = {**tree, "data": {**tree["data"], "sources": [{"path": str(folder / "heldout")}], "mix": {task: 1.0}}}
    config = parse_config({**tree, "train": {**tree["train"], "epochs": 1, "steps": None}}, "held-out")
    checkpoint = newest_checkpoint(run)
    engine = load_engine_class("torch")(config, checkpoint.vision, checkpoint.language, checkpoint.tensors("model"))
    total, tokens = 0.0, 0
    for batches in Loader(config, checkpoint.vision, load_chat(config, checkpoint.language), 0, 1).batches():
        for batch in batches:
            with torch.no_grad():
                caption = engine.losses(batch, StepInputs(1, 0.0, 1.0, batch.tokens, batch.boxes))[1]
            total, tokens = total + float(caption) * batch.tokens, tokens + int(batch.tokens)
    return total / tokens, tokens


def seeds(console: Console, other: Path) -> None:
    """Trains toy stage 1 from the same decoder in both checkouts' orders; prints the held-out caption loss over the seeds."""
    tasks, here = ("global", "bbox2caption"), Path(__file__).resolve().parents[1]
    title = f"toy stage 1, {TOY_STEPS} steps of 32 rows, {SEEDS} seeds: held-out caption loss a token, mean (sd over seeds)"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("order", "all", *tasks, "per seed", "sd of a step's training loss"):
        table.add_column(column, justify="left" if column == "order" else "right")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_store(scenes("train", 600, 0), folder / "train")
        write_store(scenes("heldout", 200, 0), folder / "heldout")
        start = _train(other, _toy(folder, "stage2", folder / "start", 0))
        for name, checkout in (("other", other.resolve()), ("this", here)):
            found, spread = [], []
            for seed in range(SEEDS):
                tree = _toy(folder, "stage1", folder / f"{name}{seed}", seed, init_from=str(start))
                run = _train(checkout, tree)
                losses, tokens = zip(*(_held_out_loss(folder, tree, run, task) for task in tasks), strict=True)
                found.append((np.average(losses, weights=tokens), *losses))
                lines = (run / "metrics.jsonl").read_text().splitlines()[-100:]
                spread.append(np.std([json.loads(line)["loss_caption"] for line in lines]))
                console.print(f"[dim]{name} seed {seed}: {found[-1][0]:.4f}[/]", highlight=False)
            means, deviations = np.mean(found, 0), np.std(found, 0, ddof=1)
            cells = [f"{mean:.4f} ({deviation:.4f})" for mean, deviation in zip(means, deviations, strict=True)]
            table.add_row(name, *cells, " ".join(f"{losses[0]:.4f}" for losses in found), f"{np.mean(spread):.4f}")
    console.print(table)
