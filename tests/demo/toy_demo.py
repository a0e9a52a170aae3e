"""A demo directory as the demo's runs leave it, written by hand: stores, a start encoder, evaluations, metrics and logs."""
import io
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from PIL import Image

from granvit.config import dump_config
from granvit.data.prompts import question_text
from granvit.data.records import ImageRecord, Region
from granvit.data.store_writer import write_store
from granvit.metrics import SCORES, score
from granvit.models import vision_shapes
from tests.helpers import run_config
from tests.probe.conftest import VISION, values, write_encoder

ODD = '<b>|"cup" & \'saucer\' </div> [x](http://y) $1_ *`'  # a caption with characters of Markdown and HTML
IMAGES, REGIONS = 16, 3
STAGES = {"stage1": "stage1", "stage1_mixed": "stage1", "guesser": "guesser", "stage2": "stage2"}
BEGAN = datetime(2026, 3, 4, 5, 6, 7)


def record(number: int) -> ImageRecord:
    """An image of 60 x 40 pixels with three regions side by side."""
    regions = tuple(Region((0.05 + 0.3 * k, 0.1, 0.3 + 0.3 * k, 0.1 + 0.2 * (k + 1)), f"thing {number} {'abc'[k]}")
                    for k in range(REGIONS))  # fmt: skip
    if number == 3:
        regions = (Region(regions[0].box, ODD), *regions[1:])
    return ImageRecord(f"held-{number:03d}", 60, 40, _picture(number), f"all of {number}", regions)


def _picture(number: int) -> bytes:
    """A PNG file with a gradient."""
    across, down = np.meshgrid(np.linspace(0, 255, 60), np.linspace(0, 255, 40))
    buffer = io.BytesIO()
    Image.fromarray(np.stack([across, down, np.full_like(down, 15 * number)], -1).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


RECORDS = [record(number) for number in range(IMAGES)]
Answer = Callable[[str, ImageRecord, Region], str]  # task, record, region -> answer


def right(share: float, seed: int) -> Answer:
    """Answers of which about this share is right. A wrong caption is `red cup`, a wrong box shifted, some are no box."""
    rng = np.random.default_rng(seed)

    def answer(task: str, image: ImageRecord, region: Region) -> str:
        good, shift = rng.random() < share, rng.choice([0.02, 0.1, 0.4, np.nan])
        if task == "bbox2caption":
            return region.caption if good else "red cup"
        box = region.box if good else tuple(min(side + shift, 1.0) for side in region.box)
        return "no idea" if np.isnan(box).any() else f"[{', '.join(f'{side:.3f}' for side in box)}]"

    return answer


def predictions(answer: Answer) -> list[dict]:
    """The answers to both tasks about every region, in the order of the store."""
    made = []
    for image in RECORDS:
        for task in ("bbox2caption", "caption2bbox"):
            for region in image.regions:
                question = question_text(task, box=region.box, caption=region.caption)
                reference = region.caption if task == "bbox2caption" else str(region.box)
                text = answer(task, image, region)
                scores = score(task, text, reference, region.box)
                made.append({"record": image.id, "task": task, "question": question, "reference": reference,
                             "box": list(region.box), "answer": text, "scores": scores})  # fmt: skip
    return made


def evaluation(step: int, answer: Answer) -> dict:
    """The tree of an evaluation's file."""
    made = predictions(answer)
    table = {task: {"samples": IMAGES * REGIONS, **{name: float(np.mean([p["scores"][name] for p in made if p["task"] == task]))
                                                    for name in SCORES[task]}}
             for task in ("bbox2caption", "caption2bbox")}  # fmt: skip
    return {"step": step, "settings": {}, "table": table, "held_out": {}, "predictions": made}


def write_run(root: Path, name: str, evaluated: dict[int, Answer], start: float = 0.0, steps: int = 8) -> None:
    """A run with these evaluations, whose log begins `start` seconds after `BEGAN`. Set-up takes 5 s, the first step 10 s, every
    other one 2 s, an evaluation 3 s."""
    run = root / name
    (run / "eval").mkdir(parents=True)
    (run / "log").mkdir()
    config = run_config(stage=STAGES[name], seed=7, output=str(run), train={"steps": steps})
    (run / "config.yaml").write_text(dump_config(config))
    for step, answer in evaluated.items():
        (run / "eval" / f"step_{step:07d}.json").write_text(json.dumps(evaluation(step, answer)))
    now, lines, metrics = start + 5, [(start, "waiting for 2 ranks to meet"), (start + 5, "language: 9 parameters, frozen")], []
    for step in range(max(evaluated) + 1):
        if step:
            metrics.append({"step": step, "loss": 1.0, "seconds": 10.0 if step == 1 else 2.0})
            now += metrics[-1]["seconds"]
        if step in evaluated:
            now += 3
            lines += [(now, f"step {step} held-out {task}: samples 48") for task in SCORES]
    if max(evaluated) == steps:
        lines.append((now, f"run {run} is complete"))
    written = [f"{BEGAN + timedelta(seconds=time):%Y-%m-%d %H:%M:%S},000 INFO {text}" for time, text in lines]
    (run / "log" / "rank_00000.txt").write_text("\n".join(written) + "\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))


def write_demo(root: Path, *names: str, start: bool = True) -> None:
    """A demo whose runs `names` are finished. With `start` stage 1 was evaluated before its first step."""
    for split in ("train", "heldout"):
        write_store(RECORDS, root / "data" / split)
    write_encoder(root / "pretrained" / "vision", VISION, values(vision_shapes(VISION), 1))
    every = {
        "stage1": {**({0: right(0, 1)} if start else {}), 4: right(0.4, 2), 8: right(0.7, 3)},
        "stage1_mixed": {8: right(0.1, 4)},
        "guesser": {8: right(0.04, 5)},
        "stage2": {4: right(0.5, 6), 8: right(0.75, 7)},
    }
    for name in names:
        write_run(root, name, every[name], {"stage1": 0, "stage2": 60}.get(name, 65))
