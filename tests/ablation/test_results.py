"""Cells are compared on the same images and seeds: results of evaluation files that are written here."""
import json

import numpy as np
import pytest
from scipy import stats

from granvit.ablation.grid import expand, read_grid
from granvit.ablation.report import write_report
from granvit.ablation.results import read_scores, results
from granvit.evaluate import evaluation_file
from tests.ablation.conftest import grid_tree, write_grid

METRIC = "bbox2caption/exact_match"
IMAGES, SEEDS = 40, 3
KEYS = ("record", "task", "question", "scores")


@pytest.fixture
def grid(base, tmp_path):
    tree = grid_tree(base, seeds=list(range(SEEDS)), metrics=[METRIC])
    found = read_grid(write_grid(tmp_path / "grid.yaml", tree))
    return found, expand(found, "torch", tmp_path / "out")


def write_evaluation(cell, values_I, step=4, records=None):
    """The evaluation of a cell: image i has one question, with the score `values_I[i]`."""
    records = records or [f"h{i}" for i in range(len(values_I))]
    predictions = [
        dict(zip(KEYS, (record, "bbox2caption", f"what is in {record}?", {"exact_match": float(value)}), strict=True))
        for record, value in zip(records, values_I, strict=True)
    ]
    path = evaluation_file(cell.runs[-1].directory, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"step": step, "settings": {}, "table": {}, "held_out": {}, "predictions": predictions}))
    return path


def write_all(cells, values):
    """`values[setting, seed]` are a cell's scores of all images."""
    return {(cell.setting, cell.seed): write_evaluation(cell, values[cell.setting, cell.seed]) for cell in cells}


def simulated(of_image=2.0, step=0.1):
    """Scores with large effects of images and seeds that both settings share, and a difference of `step`."""
    rng = np.random.default_rng(0)
    images, seeds = rng.normal(0, of_image, IMAGES), rng.normal(0, 1, SEEDS)
    return {
        (setting, seed): images + seeds[seed] + above + rng.normal(0, 0.05, IMAGES)
        for setting, above in (("without", 0.0), ("with", step))
        for seed in range(SEEDS)
    }


def test_differences_are_paired_by_seed_and_image(grid):
    """What both settings share cancels: the interval is the t-interval of the paired differences of the seeds' means, as scipy
    computes it. Each setting's own interval is ten times as wide."""
    values = simulated()
    write_all(grid[1], values)
    scores, problems = read_scores(*grid)
    found = results(grid[0], scores, {}, "grid")
    assert not problems
    direction = found["directions"][0]
    of_seeds = [np.mean(values["with", seed] - values["without", seed]) for seed in range(SEEDS)]
    assert direction["mean"] == pytest.approx(np.mean(of_seeds)) and direction["verdict"] == "reproduced"
    own = found["settings"][0]["metrics"][METRIC]
    assert own["high"] - own["low"] > 10 * (direction["high"] - direction["low"])
    low, high = stats.t.interval(0.95, SEEDS - 1, np.mean(of_seeds), stats.sem(of_seeds))
    # At least that wide: the variance of seeds is not taken below what the rest of the scores implies.
    assert direction["low"] <= low + 1e-9 and high - 1e-9 <= direction["high"]


def test_seeds_are_paired_by_number_not_by_position(grid):
    """Without seed 0 of one setting, the difference is that of seeds 1 and 2."""
    values = simulated()
    write_all(grid[1], values)
    scores, _ = read_scores(grid[0], [cell for cell in grid[1] if (cell.setting, cell.seed) != ("with", 0)])
    found = results(grid[0], scores, {}, "grid")["directions"][0]
    assert found["seeds"] == 2
    assert found["mean"] == pytest.approx(np.mean([values["with", seed] - values["without", seed] for seed in (1, 2)]))


def test_without_a_common_seed_nothing_is_compared(grid):
    write_all(grid[1], simulated())
    some = [cell for cell in grid[1] if (cell.setting, cell.seed) in (("with", 0), ("without", 1))]
    found = results(grid[0], read_scores(grid[0], some)[0], {}, "grid")["directions"][0]
    assert (found["mean"], found["low"], found["seeds"], found["verdict"]) == (None, None, 0, "not measured")


@pytest.mark.parametrize(
    "records, message",
    [
        ([f"h{i}" for i in range(IMAGES - 1)] + ["other"], "asked 40 bbox2caption questions about 40 images"),
        ([f"h{i}" for i in range(IMAGES - 1)], "39 bbox2caption questions about 39 images, and 'without', seed 0 40 about 40"),
        ([f"h{i}" for i in reversed(range(IMAGES))], "not the same ones; their scores cannot be paired"),
    ],
)
def test_a_cell_with_other_images_is_named_and_left_out(grid, records, message):
    values = simulated()
    write_all(grid[1], values)
    odd = next(cell for cell in grid[1] if (cell.setting, cell.seed) == ("with", 2))
    write_evaluation(odd, values["with", 2][: len(records)], records=records)
    scores, problems = read_scores(*grid)
    assert list(problems) == [odd] and scores["with", METRIC].seeds == (0, 1)
    assert message in problems[odd] and problems[odd].startswith(f"stage1: {odd.runs[-1].directory}")


def bad_value(path):
    tree = json.loads(path.read_text())
    tree["predictions"][3]["scores"]["exact_match"] = float("nan")
    path.write_text(json.dumps(tree))


def other_task(path):
    path.write_text(path.read_text().replace("bbox2caption", "global"))


DAMAGES = [
    (lambda path: path.write_text(path.read_text()[:500]), "not a valid evaluation file"),
    (lambda path: path.write_text("[]"), "not a valid evaluation file"),
    (lambda path: path.write_bytes(b"\xff\xfe"), "not a valid evaluation file"),
    (lambda path: path.write_text(path.read_text().replace("exact_match", "rouge_l")), "not a valid evaluation file"),
    (lambda path: path.write_text(path.read_text().replace('"question"', '"asked"')), "not a valid evaluation file"),
    (bad_value, "a score of bbox2caption that is not a number"),
    (other_task, "no answer of bbox2caption"),
    (lambda path: path.unlink(), "no evaluation"),
    (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_an_unreadable_evaluation_is_a_failed_cell(grid, damage, message):
    paths = write_all(grid[1], simulated())
    damage(paths["without", 0])  # the first cell: another one becomes that to which questions are compared
    scores, problems = read_scores(*grid)
    (cell,) = problems
    assert (cell.setting, cell.seed) == ("without", 0) and message in problems[cell]
    assert str(cell.runs[-1].directory) in problems[cell]
    assert scores["without", METRIC].seeds == (1, 2) and scores["with", METRIC].seeds == (0, 1, 2)


def test_the_report_has_a_dash_and_the_reason_where_no_interval_is_claimed(grid, tmp_path):
    few = [cell for cell in grid[1] if cell.setting == "without"]
    for cell in few:
        write_evaluation(cell, [0.5, 0.0, 1.0])
    scores, problems = read_scores(grid[0], few)
    assert not problems
    text = write_report(grid[0], grid[1], scores, {}, tmp_path, "grid", "python scripts/ablate.py grid.yaml")
    assert "| without | 50.0 (-) | 3 |" in text
    assert "(-): no interval is claimed. Reason: 3 images, and at least 20 are needed" in text
    assert json.loads((tmp_path / "results.json").read_text())["settings"][0]["metrics"][METRIC]["low"] is None
