"""The demo's report: report.md and report.html with a table and pictures, made from what the demo's runs have written so far."""
import os
import platform
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import cast

import numpy as np

from granvit.checkpoint.run import newest_checkpoint
from granvit.data.images import box_to_features
from granvit.data.records import ImageRecord
from granvit.data.store import Store
from granvit.demo.answers import TRUE_COLOUR, box_card, caption_card, draw_boxes, worst_caption_card
from granvit.demo.features import CELLS, component_colours, features_of, similarity_map
from granvit.demo.figures import draw_cards, draw_components, draw_curve, draw_similarity, draw_times
from granvit.demo.results import (
    NAMES,
    ROWS,
    RUNS,
    WORST,
    Percent,
    Prediction,
    Run,
    aims,
    columns,
    percent,
    predictions,
    random_sample,
    read_runs,
    worst,
)
from granvit.demo.times import KINDS, Times, read_times
from granvit.launch import Framework
from granvit.page import (
    RIGHT_SIGN,
    WRONG_SIGN,
    Block,
    Card,
    Cell,
    Code,
    Gallery,
    Heading,
    Items,
    Picture,
    Table,
    Text,
    to_html,
    to_markdown,
)
from granvit.stages import Task

SHOWN = 12  # pictures of a random sample
WORST_SHOWN = 10
FEATURES_SHOWN, FEATURES_FITTED = 6, 24  # images whose features are shown, and to which the components are fitted
FRAMEWORKS = {"mindspore": "MindSpore", "torch": "PyTorch"}
LEGEND = f"Green with {RIGHT_SIGN}: right. Orange-red with {WRONG_SIGN}: wrong. "


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
    """Writes report.md, report.html and the pictures into `root`, from what has been evaluated so far.

    `framework` (mindspore or torch) computes the features. `seconds` is the time that each finished part took, from the start of
    its process to its end. Returns the path of report.md. `ValueError` if stage 1 was not evaluated, or if an earlier version
    wrote the evaluations.
    """
    runs = read_runs(root)
    store = Store(root / "data" / "heldout")
    records = {record.id: record for record in map(store.record, range(store.records)) if isinstance(record, ImageRecord)}
    times = read_times(root, list(runs), seconds)
    title = f"GranViT's demo: {FRAMEWORKS[framework]}, seed {runs['stage1'].config.seed}"
    blocks = [
        *_head(title, framework, runs, times),
        *_curve(root, runs),
        *_captions(root, runs, records),
        *_boxes(root, runs, records),
        *_features(root, cast(Framework, framework), runs, list(records.values())),
        *_times(root, runs, times, seconds),
        *_training(root, runs),
        *_command(root, framework, runs),
    ]
    _draw_small(root, runs, records)
    path = root / "report.md"
    path.write_text(to_markdown(blocks))
    path.with_suffix(".html").write_text(to_html(title, blocks, root))
    return path


def _head(title: str, framework: str, runs: dict[str, Run], times: Times) -> list[Block]:
    """What was run, the table, how to read it, and the aims."""
    stage1 = runs["stage1"]
    asked = predictions(stage1.last, "bbox2caption")
    images = len({prediction["record"] for prediction in asked})
    unfinished = [run for run in runs.values() if not run.finished]
    missing = [f"{NAMES[run.name]} is at step {run.trained} of {run.config.train.steps}" for run in unfinished]
    missing += [f"{NAMES[name]} has no evaluation yet" for name in RUNS if name not in runs]
    facts = [f"{FRAMEWORKS[framework]}, seed {stage1.config.seed}, {machine()}."]
    if times.began is not None:
        end = max(part.spans[-1].end for part in times.parts.values())
        took = "" if missing or times.left_out else f"; with the data it took {end / 60:.1f} minutes"
        facts.append(f"Training began on {_date(times.began)}{took}.")
    facts.append(f"Held-out: {len(asked)} questions of each task about {images} images.")
    if missing:
        facts.append(f"The demo is not finished: {'; '.join(missing)}. What needs these runs is still to come.")
    cells: list[list[str | Cell]] = [
        [row_title, *(_cell(percent(column.evaluation, score)) for column in columns(runs))]
        for score, (_, row_title) in ROWS.items()
    ]  # fmt: skip
    marks = {None: "still to come", True: f"{RIGHT_SIGN} met", False: f"{WRONG_SIGN} not met"}
    return [
        Heading(1, title),
        Text("A tiny GranViT is trained in the paper's two stages, on pictures made for it: in stage 1 the encoder, until the "
             "frozen decoder can say what is inside a box (Bbox2Caption); in stage 2 the decoder, until it finds in the frozen "
             "encoder's features where something is (Caption2Bbox). All scores are of held-out pictures, on photographs that "
             "training did not use."),
        Items(facts),
        Table(["%", *(column.title for column in columns(runs))], cells),
        Text("With each number stands its 95% interval (bootstrap over the images; questions about one image stay together). It "
             "says how much the number depends on the choice of held-out images, not how much it differs between seeds. If all "
             "answers score the same, it has no width."),
        Items(_column_notes(runs)),
        Table(["Aim", "This run", ""], [[aim.text, aim.reached, marks[aim.met]] for aim in aims(runs)]),
    ]  # fmt: skip


def _date(time: datetime) -> str:
    return f"{time.day} {time:%B %Y}, {time:%H:%M}"


def _cell(score: Percent) -> Cell:
    return Cell(f"{score.value:.1f}", f"{score.low:.1f} to {score.high:.1f}")


def _column_notes(runs: dict[str, Run]) -> list[str]:
    """How to read the columns that the table has."""
    start = (
        "Start weights: the pretrained encoder and decoder with a new projector between them, before any training."
        if runs["stage1"].evaluations[0].step == 0
        else "Start weights: no column, because stage 1 was not evaluated before its first step (eval.start)."
    )
    notes = {
        "guesser": "Guesser: the same decoder, trained on both tasks without the image. It shows what the question alone gives "
        "away; the size and shape of a box already say much.",
        "stage1": "Stage 1: encoder and projector were trained on Bbox2Caption. Caption2Bbox was not asked in training.",
        "stage1_mixed": "Stage 1 with Caption2Bbox: stage 1 continued with both tasks, the decoder still frozen. In the paper "
        "(Fig. 4(a)) a frozen decoder reaches 13% ACC@IoU0.5, far less than in stage 2; hence the two stages.",
        "stage2": "Stage 2 starts from stage 1; projector and decoder were trained on Caption2Bbox and a little "
        "Bbox2Caption.",
    }
    return [start, *(note for name, note in notes.items() if name in runs)]


def _curve(root: Path, runs: dict[str, Run]) -> list[Block]:
    draw_curve(runs, root / "figure4a.png")
    caption = "Bars and bands: 95% intervals over images."
    if "stage1_mixed" in runs:
        caption += " Dashed, with open marks: stage 1 continued with Caption2Bbox mixed in, a branch that stage 2 does not use."
    if "guesser" in runs:
        caption += " Dotted: the guesser."
    alt = "Scores in percent over the optimizer steps of stage 1 and stage 2; the table has the last values"
    return [Heading(2, "Scores along the training, as in Fig. 4(a) of the paper"), Picture("figure4a.png", alt, caption)]


def _sample(run: Run, runs: dict[str, Run], task: Task) -> list[Prediction]:
    """The random sample of a task: the same questions for every report of a demo."""
    return random_sample(run.last, task, SHOWN, runs["stage1"].config.seed)


def _caption_cards(runs: dict[str, Run], records: dict[str, ImageRecord]) -> list[Card]:
    return [caption_card(records[asked["record"]], asked, runs) for asked in _sample(runs["stage1"], runs, "bbox2caption")]


def _box_cards(runs: dict[str, Run], records: dict[str, ImageRecord]) -> list[Card]:
    asked = _sample(runs["stage2"], runs, "caption2bbox")
    return [box_card(records[each["record"]], each, runs["stage2"], runs.get("stage1_mixed")) for each in asked]


def _captions(root: Path, runs: dict[str, Run], records: dict[str, ImageRecord]) -> list[Block]:
    """Bbox2Caption: a random sample, and the worst answers after stage 1."""
    run = runs["stage1"]
    lowest, cards = worst(run.last, "bbox2caption", WORST_SHOWN), _caption_cards(runs, records)
    return [
        Heading(2, "What is inside the box? (Bbox2Caption)"),
        Text(f"{len(cards)} held-out pictures, drawn at random by the seed, whatever the answers. The black box is the one asked "
             f"about; the bold line is the true caption. {LEGEND}Right is an exact match."),
        _gallery(root, "bbox2caption.png", "Held-out pictures with a box, its true caption, and the answers", cards),
        Heading(3, f"The {len(lowest)} worst answers {_after(run)}"),
        Text(_worst_note(run, "bbox2caption")),
        _gallery(root, "bbox2caption_worst.png", "The worst captions, each with its picture and the true caption",
                 [worst_caption_card(records[asked["record"]], asked, run) for asked in lowest]),
    ]  # fmt: skip


def _boxes(root: Path, runs: dict[str, Run], records: dict[str, ImageRecord]) -> list[Block]:
    """Caption2Bbox: a random sample, and the worst answers after stage 2."""
    blocks: list[Block] = [Heading(2, "Where is it? (Caption2Bbox)")]
    run = runs.get("stage2")
    if run is None:
        return [*blocks, Text("Still to come, with stage 2.")]
    lowest, cards = worst(run.last, "caption2bbox", WORST_SHOWN), _box_cards(runs, records)
    return [
        *blocks,
        Text(f"{len(cards)} held-out pictures, drawn at random by the seed, whatever the answers. The bold line is the caption "
             f"asked for. The black box is the true one, the coloured box the answer {_after(run)}. {LEGEND}Right is an "
             "intersection over union (IoU) of at least 0.5."),
        _gallery(root, "caption2bbox.png", "Held-out pictures with the true and the answered box", cards),
        Heading(3, f"The {len(lowest)} worst answers {_after(run)}"),
        Text(_worst_note(run, "caption2bbox")),
        _gallery(root, "caption2bbox_worst.png", "The worst boxes, each with its picture and the true box",
                 [box_card(records[asked["record"]], asked, run) for asked in lowest]),
    ]  # fmt: skip


def _after(run: Run) -> str:
    return f"after {run.label}"


def _worst_note(run: Run, task: Task) -> str:
    own, name = predictions(run.last, task), {"rouge_l": "ROUGE-L", "mean_iou": "IoU"}[WORST[task]]
    order = "Lowest ROUGE-L (in brackets) first." if task == "bbox2caption" else "Lowest IoU first."
    zero = sum(prediction["scores"][WORST[task]] == 0 for prediction in own)
    of_all = f" Of all {len(own)} answers {zero} have the {name} 0."
    ties = f" If more than {WORST_SHOWN} are equally bad, those are shown that come first in the store."
    return f"{order}{of_all if zero else ''}{ties}"


def _gallery(root: Path, name: str, alt: str, cards: Sequence[Card]) -> Gallery:
    columns_drawn = 4 if len(cards) > WORST_SHOWN else 5
    draw_cards(cards, columns_drawn, root / name)
    return Gallery(name, alt, cards, columns_drawn)


def _draw_small(root: Path, runs: dict[str, Run], records: dict[str, ImageRecord]) -> None:
    """The README's picture: the first four pictures of each random sample. Only after stage 2."""
    if "stage2" in runs:
        cards = [*_caption_cards(runs, records)[:4], *_box_cards(runs, records)[:4]]
        draw_cards(cards, 4, root / "answers_small.png", side=200, colours=256)


def _features(root: Path, framework: Framework, runs: dict[str, Run], records: Sequence[ImageRecord]) -> list[Block]:
    """Principal components of patch features, and region similarity maps, of the start encoder and after stage 1."""
    blocks: list[Block] = [Heading(2, "What stage 1 changed in the encoder")]
    checkpoint = newest_checkpoint(root / "stage1")
    if checkpoint is None:
        return [*blocks, Text("Still to come, with the checkpoint of stage 1.")]
    vision, level = checkpoint.vision, checkpoint.vision.level
    usable = [record for record in records if record.regions]
    order = np.random.default_rng(runs["stage1"].config.seed).permutation(len(usable))[:FEATURES_FITTED]
    fitted = [usable[number] for number in order]
    shown = fitted[:FEATURES_SHOWN]
    before, after = found = features_of(framework, [root / "pretrained" / "vision", root / "stage1"], level, vision, fitted)
    (colours_before, share_before), (colours_after, share_after) = (component_colours(each.patches_BggC) for each in found)
    pictures = [draw_boxes(record, []) for record in shown]
    draw_components(pictures, colours_before, colours_after, (share_before, share_after), root / "features_pca.png")
    maps = [[similarity_map(each.regions_BKC[b, 0], each.patches_BggC[b]) for b in range(len(shown))] for each in (before, after)]
    boxes = [record.regions[0].box for record in shown]
    on_map = [box_to_features(box, record.width, record.height, vision) for box, record in zip(boxes, shown, strict=True)]
    boxed = [draw_boxes(record, [(box, TRUE_COLOUR)]) for box, record in zip(boxes, shown, strict=True)]
    captions = [record.regions[0].caption for record in shown]
    draw_similarity(boxed, captions, on_map, maps[0], maps[1], root / "features_similarity.png")
    grid, step = vision.grid, f"step {checkpoint.step} of stage 1"
    return [
        *blocks,
        Text(f"Features of the {grid} x {grid} patches of held-out pictures, which were drawn at random by the seed: before, "
             f"from the start weights (pretrained/vision), and after {step}. They are the features that the projector reads "
             f"(level {level})."),
        Picture("features_pca.png", f"{len(shown)} pictures, and below each its patches coloured by principal components, before "
                "and after",
                f"The first three principal components of the patch features as red, green and blue. They are fitted for each "
                f"encoder by itself, to all patches of {len(fitted)} pictures, so colours of one row can be compared with each "
                "other and not with the other row. Sign: the channel with the largest weight counts positive. Scale: the 2nd "
                "percentile is dark, the 98th bright."),
        Picture("features_similarity.png", f"{len(shown)} regions, and below each the cosine of the region with every patch, "
                "before and after",
                f"Cosine of a region's feature (mean over {CELLS} x {CELLS} ROIAlign cells) with the feature of every patch of "
                "its picture. The region is the first one that the data lists for the picture. One scale for all maps."),
    ]  # fmt: skip


def _times(root: Path, runs: dict[str, Run], times: Times, seconds: dict[str, float]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Where the time went")]
    left_out = [Items([f"Not shown: {reason}." for reason in times.left_out])] if times.left_out else []
    if not times.parts:
        return [*blocks, *left_out]
    draw_times(times, root / "times.png")
    rows = []
    for name, part in times.parts.items():
        if all(span.kind is None for span in part.spans):
            continue
        step = "" if part.step_seconds is None else f"{part.step_seconds:.3f}"
        in_all = f"{part.spans[-1].end - part.spans[0].start:.0f}"
        rows.append([NAMES[name], in_all, *(f"{part.of_kind(kind):.0f}" for kind in KINDS), step])
    return [
        *blocks,
        Picture("times.png", "The demo's parts as bars over the seconds since the start; the table has the numbers",
                "Parts that run at the same time share the cores. The log tells when a part's training was set up and ended; the "
                "seconds outside of it (loading the framework before, ending the process after) are drawn at the beginning. The "
                "first evaluation compiles the generation of answers, which counts as evaluation."),
        Table(["Seconds", "In all", *KINDS, "One step"], rows),
        *([Text(f"Making the data took {seconds['data']:.0f} s.")] if "data" in seconds else []),
        *left_out,
    ]  # fmt: skip


def _training(root: Path, runs: dict[str, Run]) -> list[Block]:
    rows = []
    for name, run in runs.items():
        spec = run.config.stage_spec
        mix = ", ".join(f"{task} {share:g}" for task, share in spec.mix.items() if share)
        mix += " (image tokens set to zero)" if name == "guesser" else ""
        steps = str(run.trained) if run.finished else f"{run.trained} of {run.config.train.steps}"
        rows.append([NAMES[name], ", ".join(sorted(spec.trains)), mix, steps, str(run.config.train.global_batch)])
    counts = {split: Store(root / "data" / split).records for split in ("train", "heldout")}
    return [
        Heading(2, "What was trained, and on what"),
        Table(["Run", "Trained parts", "Questions, with their shares", "Steps", "Rows a step"], rows),
        Text(f"A row is one picture with questions about it. Data: {counts['train']} training and {counts['heldout']} held-out "
             "scenes, drawn onto photographs of which the two splits share none (granvit/demo/scenes.py). The start weights are "
             "a small encoder and decoder that are shipped with the code. They were trained neither on Caption2Bbox nor on "
             "a question about a region of an image; python scripts/demo.py pretrain makes them from nothing."),
    ]  # fmt: skip


def _command(root: Path, framework: str, runs: dict[str, Run]) -> list[Block]:
    seed = str(runs["stage1"].config.seed)
    command = ["python", "scripts/demo.py", "--framework", framework, "--seed", seed, "--out", str(root)]
    return [Heading(2, "Run it again"), Code(shlex.join(command))]
