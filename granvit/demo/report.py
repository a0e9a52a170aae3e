"""The demo's report: report.md with a table and pictures, made from the evaluations and metrics of the demo's runs."""
import json
import os
import platform
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from granvit.checkpoint.run import newest_checkpoint
from granvit.config import load_config
from granvit.data.images import decode
from granvit.data.prompts import parse_box
from granvit.data.records import ImageRecord
from granvit.data.store import MAX_PIXELS, Store
from granvit.evaluate import Evaluation, evaluated_steps, evaluation_file, read_evaluation
from granvit.metrics import SCORES, iou

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle

PREDICTED, TRUE = "#14c414", "#f02020"
COLUMNS = ("guesser", "stage1", "stage1_mixed", "stage2")
TITLES = {
    "guesser": "guesser (no image)",
    "stage1": "after stage 1",
    "stage1_mixed": "stage 1 with Caption2Bbox",
    "stage2": "after stage 2",
}

ROWS = {
    "rouge_l": "Bbox2Caption, ROUGE-L",
    "rouge_l_ascii": "the same over rouge-score's own tokens (a-z, 0-9)",
    "exact_match": "Bbox2Caption, exact match",
    "acc_iou50": "Caption2Bbox, ACC@IoU0.5",
    "unparsable": "Caption2Bbox, unparsable answers",
}


def percent(evaluation: Evaluation, score: str) -> float:
    """The mean of a score, which belongs to Bbox2Caption or to Caption2Bbox, in percent."""
    return 100 * (evaluation.table["bbox2caption"] | evaluation.table["caption2bbox"])[score]


def evaluations(run: Path) -> list[Evaluation]:
    """A run's evaluations in order of steps. `ValueError` if it has none, or if one lacks a score (of an earlier version)."""
    found = [read_evaluation(evaluation_file(run, step)) for step in evaluated_steps(run)]
    if not found:
        raise ValueError(f"{run}: no evaluation in {run / 'eval'}; `python scripts/demo.py` makes it")
    for evaluation in found:
        for task, names in SCORES.items():
            if task in evaluation.table and (missing := set(names) - evaluation.table[task].keys()):
                file = evaluation_file(run, evaluation.step)
                raise ValueError(f"{file}: no score {min(missing)} of {task}; an earlier version wrote it, choose another --out")
    return found


def machine() -> str:
    """A description of this machine and its Python."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{len(os.sched_getaffinity(0))} CPU core(s) ({model}), {platform.system()}, Python {platform.python_version()}"


def write_report(root: Path, framework: str, seconds: dict[str, float]) -> Path:
    """Writes report.md and its pictures into `root`; `seconds` is the time that each part took. Returns the report's path."""
    runs = {name: evaluations(root / name) for name in COLUMNS}
    last = {name: found[-1] for name, found in runs.items()}
    _draw_curve(root, runs, root / "figure4a.png")
    source = load_config(root / "stage1" / "config.yaml").eval.source
    assert source is not None
    store = Store(source)
    records = {record.id: record for record in map(store.record, range(store.records)) if isinstance(record, ImageRecord)}
    _draw_boxes(records, last, root / "caption2bbox.png")
    _draw_captions(records, last, root / "bbox2caption.png")
    _draw_small(records, last, root / "answers_small.png")
    path = root / "report.md"
    path.write_text(_text(root, last, framework, seconds))
    return path


def _text(root: Path, last: dict[str, Evaluation], framework: str, seconds: dict[str, float]) -> str:
    parts = ("pretrain_text", "pretrain_image", *COLUMNS)
    checkpoints = {name: newest_checkpoint(root / name) for name in parts}
    configs = {name: checkpoint.config for name, checkpoint in checkpoints.items() if checkpoint is not None}
    stores = {split: Store(root / "data" / split) for split in ("train", "heldout")}
    row = lambda name, values: f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |"  # noqa: E731
    stage1, mixed, stage2, guesser = (last[name] for name in ("stage1", "stage1_mixed", "stage2", "guesser"))
    samples = int(stage1.table["bbox2caption"]["samples"])
    lines = [
        "# GranViT's demo",
        "",
        f"One run, seed {configs['stage1'].seed}, {framework}, {machine()}. Held-out: {samples} questions of each task about "
        f"{samples // 4} images whose backgrounds come from photographs that training did not use.",
        "",
        "| % | " + " | ".join(TITLES[name] for name in COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
        *(row(title, [percent(last[name], score) for name in COLUMNS]) for score, title in ROWS.items()),
        "",
        f"- Exact match of Bbox2Caption after stage 1: {percent(stage1, 'exact_match'):.1f}% against the guesser's "
        f"{percent(guesser, 'exact_match'):.1f}% (aim: at least 3 times).",
        f"- ACC@IoU0.5 after stage 2: {percent(stage2, 'acc_iou50'):.1f}% (aim: at least 20%). After stage 1 continued with "
        f"Caption2Bbox, with a frozen decoder: {percent(mixed, 'acc_iou50'):.1f}% (aim: at most a quarter of it). The guesser: "
        f"{percent(guesser, 'acc_iou50'):.1f}%.",
        "",
        "Stage 2 starts from the plain stage 1, which was not trained on Caption2Bbox, so its ACC@IoU0.5 is no test. The next "
        "column shows what a frozen decoder can learn of Caption2Bbox, as the paper's Fig. 4 does.",
        "",
        "The guesser is the baseline: the same decoder, fully trained on the same questions for as many steps as stage 1, with "
        "zeros in place of the image tokens. It sees only the question; the size and shape of a box already say much.",
        "",
        "![scores over training steps, like the paper's Fig. 4(a)](figure4a.png)",
        "",
        "## Caption2Bbox on held-out images: predicted green, true red",
        "![boxes](caption2bbox.png)",
        "",
        "## Bbox2Caption on held-out images",
        "![captions](bbox2caption.png)",
        "",
        "## Training of the parts",
        f"Data: {stores['train'].records} training and {stores['heldout'].records} held-out scenes of four "
        "objects (granvit/demo/scenes.py).",
        "",
        "| Part | Trained | Questions | Steps | Rows a step |",
        "|---|---|---|---|---|",
    ]
    content = {
        "pretrain_text": "Bbox2Caption, global captions, and in which rows and columns an object is, about text maps in place "
        "of images",
        "pretrain_image": "global captions of whole images (no region question)",
    }
    for name, config in configs.items():
        spec = config.stage_spec
        steps = json.loads((root / name / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        mix = content.get(name) or ", ".join(f"{task} {share:g}" for task, share in spec.mix.items() if share)
        mix += " (image tokens zeroed)" if name == "guesser" else ""
        lines.append(f"| {name} | {', '.join(sorted(spec.trains))} | {mix} | {steps} | {config.train.global_batch} |")
    lines += ["", "## Time", "", "| Part | Seconds |", "|---|---|"]
    lines += [f"| {name} | {value:.0f} |" for name, value in seconds.items()]
    lines += [f"| together | {sum(seconds.values()):.0f} |", ""]
    return "\n".join(lines)


def _draw_curve(root: Path, runs: dict[str, list[Evaluation]], path: Path) -> None:
    """Draws three scores over the steps of stage 1 and then stage 2; the guesser's scores are dotted lines."""
    first, second = runs["stage1"], runs["stage2"]
    border = first[-1].step
    steps = [e.step for e in first] + [border + e.step for e in second]
    points = [*first, *second]
    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=130)
    series = (
        ("Bbox2Caption ROUGE-L", "rouge_l", "#c0392b", "o"),
        ("Bbox2Caption exact match", "exact_match", "#e08e0b", "^"),
        ("Caption2Bbox ACC@IoU0.5", "acc_iou50", "#1f5fbf", "s"),
    )
    for label, key, colour, marker in series:
        values = [percent(evaluation, key) for evaluation in points]
        axes.plot(steps, values, color=colour, marker=marker, label=label, linewidth=2, markersize=6)
        floor = percent(runs["guesser"][-1], key)
        axes.axhline(floor, color=colour, linestyle=":", linewidth=1.4)
        lower = floor == min(floor, *(percent(runs["guesser"][-1], other) for _, other, *_ in series))
        axes.annotate(f"guesser {floor:.1f}", (1.005, floor), xycoords=("axes fraction", "data"), color=colour, fontsize=8,
                      va="top" if lower else "bottom")  # fmt: skip
        for at in (len(first) - 1, len(points) - 1):
            close_above = any(0 < percent(points[at], other) - values[at] < 8 for _, other, *_ in series)
            lift = -14 if close_above and values[at] > 5 else 7  # points; labels of values up to 5 stay above, clear of the axis
            axes.annotate(f"{values[at]:.1f}", (steps[at], values[at]), textcoords="offset points", xytext=(-4, lift), ha="right",
                          color=colour, fontsize=9)  # fmt: skip
    axes.axvspan(0, border, color="#f3f0e6", zorder=0)
    axes.axvspan(border, steps[-1], color="#e8eef5", zorder=0)
    for x, text in ((border / 2, "stage 1"), ((border + steps[-1]) / 2, "stage 2")):
        axes.annotate(text, (x, 1.015), xycoords=("data", "axes fraction"), ha="center", fontsize=10)
    frozen = "optimizer steps (stage 1: decoder frozen, stage 2: encoder frozen)"
    axes.set(xlim=(0, steps[-1]), ylim=(0, 100), xlabel=frozen, ylabel="% on held-out images")
    axes.legend(loc="upper left", fontsize=8, framealpha=0.9)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _answers(evaluation: Evaluation, task: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(record, question) -> prediction, for one task."""
    return {(p["record"], p["question"]): p for p in evaluation.predictions if p["task"] == task}


def _show(axes: plt.Axes, record: ImageRecord) -> np.ndarray:
    pixels = decode(record.image, MAX_PIXELS)
    axes.imshow(pixels, interpolation="bicubic")
    axes.axis("off")
    return np.tile([record.width, record.height], 2)


def _rectangle(axes: plt.Axes, box: Sequence[float], scale: np.ndarray, colour: str) -> None:
    x1, y1, x2, y2 = np.array(box) * scale - 0.5
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=4.5))
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2.5))


def _one_per_image(evaluation: Evaluation, task: str, count: int) -> list[dict[str, Any]]:
    """One question about each of the first `count` images: question i mod n of the n about image i, whatever its score."""
    by_image: dict[str, list[dict[str, Any]]] = {}
    for prediction in evaluation.predictions:
        if prediction["task"] == task:
            by_image.setdefault(prediction["record"], []).append(prediction)
    return [questions[i % len(questions)] for i, questions in enumerate(by_image.values())][:count]


def _draw_boxes(records: dict[str, ImageRecord], last: dict[str, Evaluation], path: Path) -> None:
    """Draws Caption2Bbox answers: for each image, the answer of `stage1_mixed` above that of `stage2`."""
    columns, rows = 4, 2
    chosen = _one_per_image(last["stage2"], "caption2bbox", columns * rows)
    figure, grid = plt.subplots(2 * rows, columns, figsize=(3.3 * columns, 7.2 * rows), dpi=100)
    for number, sample in enumerate(chosen):
        for line, name in enumerate(("stage1_mixed", "stage2")):
            axes = grid[2 * (number // columns) + line, number % columns]
            _draw_boxes_of_one(axes, records[sample["record"]], sample, last, name, fontsize=11)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _draw_boxes_of_one(axes: plt.Axes, record: ImageRecord, sample: dict[str, Any], last: dict[str, Evaluation], name: str,
                       fontsize: float) -> None:  # fmt: skip
    """Draws the image with the true box and the box answered by run `name`; the title has the caption and the IoU."""
    answer = _answers(last[name], "caption2bbox")[sample["record"], sample["question"]]["answer"]
    scale = _show(axes, record)
    _rectangle(axes, sample["box"], scale, TRUE)
    predicted = parse_box(answer)
    if predicted is None:
        outcome = "no box"
    else:
        _rectangle(axes, predicted, scale, PREDICTED)
        outcome = f"IoU {iou(predicted, sample['box']):.2f}"
    caption = next(region.caption for region in record.regions if region.box == tuple(sample["box"]))
    axes.set_title(f"{caption}\n{TITLES[name]}: {outcome}", fontsize=fontsize)


def _draw_captions(records: dict[str, ImageRecord], last: dict[str, Evaluation], path: Path) -> None:
    """Draws Bbox2Caption answers: the box in the question, and the captions by the guesser, stage 1 and stage 2."""
    columns, rows = 4, 3
    chosen = _one_per_image(last["stage1"], "bbox2caption", columns * rows)
    figure, grid = plt.subplots(rows, columns, figsize=(3.3 * columns, 4.3 * rows), dpi=100)
    for sample, axes in zip(chosen, grid.flat, strict=True):
        _draw_captions_of_one(axes, records[sample["record"]], sample, last, fontsize=9.5, width=48)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.97, bottom=0.07, wspace=0.06, hspace=0.36)
    figure.savefig(path)
    plt.close(figure)


def _draw_captions_of_one(axes: plt.Axes, record: ImageRecord, sample: dict[str, Any], last: dict[str, Evaluation],
                          fontsize: float, width: int) -> None:  # fmt: skip
    """Draws the image with the box in the question, its true caption as title, and three answers below it.

    Answers are shortened to `width` characters; an exact match is green.
    """
    scale = _show(axes, record)
    _rectangle(axes, sample["box"], scale, TRUE)
    axes.set_title(sample["reference"], fontsize=fontsize + 2.5, color=TRUE)
    for line, name in enumerate(("guesser", "stage1", "stage2")):
        prediction = _answers(last[name], "bbox2caption")[sample["record"], sample["question"]]
        right = prediction["answer"].strip() == sample["reference"]
        text = textwrap.shorten(f"{TITLES[name].partition(' (')[0]}: {prediction['answer']}", width)
        axes.annotate(text, (0.5, -0.05 - 0.08 * line), xycoords="axes fraction", ha="center", va="top", fontsize=fontsize,
                      color=PREDICTED if right else "black")  # fmt: skip


def _draw_small(records: dict[str, ImageRecord], last: dict[str, Evaluation], path: Path) -> None:
    """The README's picture: Bbox2Caption about the first four images, Caption2Bbox after stage 2 about the next four.

    A palette of 256 colours keeps the file under 200 KB.
    """
    columns = 4
    captions = _one_per_image(last["stage1"], "bbox2caption", columns)
    boxes = _one_per_image(last["stage2"], "caption2bbox", 2 * columns)[columns:]
    figure, grid = plt.subplots(2, columns, figsize=(2.7 * columns, 6.9), dpi=80)
    for sample, axes in zip(captions, grid[0], strict=True):
        _draw_captions_of_one(axes, records[sample["record"]], sample, last, fontsize=8.5, width=44)
    for sample, axes in zip(boxes, grid[1], strict=True):
        _draw_boxes_of_one(axes, records[sample["record"]], sample, last, "stage2", fontsize=9)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.96, bottom=0.01, wspace=0.06, hspace=0.4)
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(256).save(path, optimize=True)
    plt.close(figure)
