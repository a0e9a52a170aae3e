"""The model card of an exported run: README.md with the front matter that the Hugging Face hub reads."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from granvit.checkpoint.history import PastRun
from granvit.config import RunConfig, Source
from granvit.models import PARTS, Shapes, part_of

DIGITS = 16  # of a hash, as in the names of RUN/parts


@dataclass(frozen=True)
class Exported:
    """Content of a card about the exported folder: `about` describes it, `loading` is Python code that loads it, `remarks` are
    sentences on its use, on what was left out and on fillers, `parts` are the model's parts in it."""

    title: str
    about: str
    loading: str
    remarks: Sequence[str]
    parts: Sequence[str]
    pipeline: str
    license: str | None = None
    base_models: Sequence[str] = ()


def model_card(exported: Exported, runs: Sequence[PastRun], missing_origin: str | None, shapes: Shapes) -> str:
    """The card's text. `runs` and `missing_origin` are the result of `granvit.checkpoint.history.history`; `shapes` are those of
    the model's parameters."""
    front = {"library_name": "transformers", "pipeline_tag": exported.pipeline, "tags": ["granvit"]}
    if exported.license is not None:
        front["license"] = exported.license
    if exported.base_models:
        front["base_model"] = list(exported.base_models)
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {exported.title}",
        exported.about,
        f"## Load it\n\n```python\n{exported.loading}\n```",
        "## What to know",
        "\n".join(f"- {remark}" for remark in exported.remarks),
        "## Start weights, and their change in training",
        _parts(exported, runs, missing_origin, shapes),
        "## Training",
        *(_stage(number, run) for number, run in enumerate(runs, 1)),
        "## Versions that the checkpoint was written with",
        ", ".join(f"{name} {version}" for name, version in runs[-1].checkpoint.versions.items()) + ".",
    ]
    if exported.license is None:
        sections.append("No license is stated: whoever publishes this must choose one, within the terms of the start weights.")
    return "\n\n".join(sections) + "\n"


def short_path(path: str | Path) -> str:
    """A path as a card may show it: a relative path unchanged, of an absolute one only the last name."""
    return Path(path).name if Path(path).is_absolute() else str(path)


def _parts(exported: Exported, runs: Sequence[PastRun], missing_origin: str | None, shapes: Shapes) -> str:
    """A table with one row per part of the model: its start weights, their hash, its change in each run, its hash now."""
    names = [short_path(run.directory) for run in runs]
    header = ["part", "parameters", "start weights", "their hash", *(f"`{name}`" for name in names), "hash now"]
    rows = [header, ["---"] * len(header)]
    last = runs[-1].checkpoint
    for part in PARTS:
        here = [part == "vision" or run.checkpoint.language.is_built_like(last.language) for run in runs]
        first = runs[here.index(True)].checkpoint
        changes = [f"moved {p.distance:.4g}" if p.trained else "frozen" for p in (run.checkpoint.parts[part] for run in runs)]
        counted = sum(math.prod(shape) for name, shape in shapes.items() if part_of(name) == part)
        rows.append([
            part if part in exported.parts else f"{part} (not in this folder)",
            f"{counted:,}",
            _origin(part, first.config, missing_origin if all(here) else None),
            f"`{first.parts[part].start[:DIGITS]}`",
            *(change if same else "another" for change, same in zip(changes, here, strict=True)),
            f"`{last.parts[part].hash[:DIGITS]}`",
        ])  # fmt: skip
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{table}\n\nMoved: the L2 distance from the weights at the start of that run. A hash is the first {DIGITS} digits of a "
        f"sha256 over the tensors' names and sha256s, in the dtype that they are stored in (float32 for trained parts)."
    )


def _origin(part: str, config: RunConfig, missing_origin: str | None) -> str:
    if missing_origin is not None:
        return f"`{short_path(missing_origin)}`, a run that was not available"
    if config.model.init == "random" or part == "projector":
        return f"random, seed {config.seed}"
    return f"`{short_path(config.model.weights_vision if part == 'vision' else config.model.weights_language)}`"


def _part_of(source: Source) -> str:
    """Which part of a store a run used, in brackets; empty for all of it."""
    if source.count is not None:
        return f" ({', '.join(f'{count:,} {task}' for task, count in source.count.items())})"
    return f" ({source.rate:g} of its regions)" if source.rate != 1 else ""


def _stage(number: int, run: PastRun) -> str:
    """The section on one run: trained parts, data, optimizer, losses and evaluation."""
    checkpoint, config = run.checkpoint, run.checkpoint.config
    stage, rate, data = config.stage_spec, config.optimizer, config.data
    trains = " and ".join(part for part in PARTS if part in stage.trains)
    sources = ", ".join(f"`{short_path(source.path)}`{_part_of(source)}" for source in data.sources)
    mix = ", ".join(f"{task} {share:g}" for task, share in stage.mix.items())
    decay = f", weight decay {rate.weight_decay:g}" if rate.weight_decay else ""
    own = [f"{part} {rate.of_part(part)[0]:g}" for part in PARTS if rate.of_part(part)[0] != rate.lr]
    rates = f"{rate.lr:g}" + (f" ({', '.join(own)})" if own else "")
    lines = [
        f"### {number}. {stage.name} (`{short_path(run.directory)}`)",
        "",
        f"- {checkpoint.step:,} steps of {config.train.global_batch} rows, up to {data.regions_per_row} region question(s) a row"
        f"; trained: {trains}",
        f"- data: {sources}; questions asked (share of those there are): {mix}",
        f"- AdamW, learning rate {rates} ({rate.schedule}, warm-up {rate.warmup:g} of the steps){decay}; "
        f"{config.runtime.compute}, seed {config.seed}",
    ]
    if stage.distill:
        lines.append(f"- self-distillation: weight {config.distill.weight:g}, EMA rate {config.distill.alpha:g}")
    if checkpoint.counters.get("skipped"):
        lines.append(f"- {checkpoint.counters['skipped']:,} records or questions could not be used")
    if run.averaged:
        losses = ", ".join(f"{name} {value:.4g}" for name, value in run.losses.items())
        lines.append(f"- losses, mean of the last {run.averaged} steps: {losses}")
    else:
        lines.append("- losses: unknown, metrics.jsonl is missing")
    if run.went_on:
        lines.append("- the next run did not start from this run's newest checkpoint, which is the one described here")
    lines += ["", *_evaluation(run)]
    return "\n".join(lines)


def _evaluation(run: PastRun) -> list[str]:
    if not run.table:
        return ["There is no evaluation."]
    source = run.checkpoint.config.eval.source
    lines = [f"Held-out data{f' `{short_path(source)}`' if source else ''}, after step {run.table_step:,}:", ""]
    lines += ["| task | samples | scores |", "| --- | --- | --- |"]
    for task, scores in run.table.items():
        rest = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if name != "samples")
        lines.append(f"| {task} | {scores['samples']:.0f} | {rest} |")
    return lines
