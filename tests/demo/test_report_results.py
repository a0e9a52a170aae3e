"""Numbers and choices of the demo's report: intervals, aims, random and worst answers, times."""
import json

import numpy as np
import pytest

from granvit.demo.answers import TRUE_COLOUR, box_card, caption_card
from granvit.demo.results import aims, answer_to, columns, percent, random_sample, read_runs, worst
from granvit.demo.times import KINDS, read_times
from granvit.evaluate import Evaluation
from granvit.page import RIGHT_COLOUR, WRONG_COLOUR
from tests.demo.toy_demo import RECORDS, evaluation, right, write_run

REPORTED = ("exact_match", "rouge_l", "acc_iou50", "unparsable")


def toy(step: int, share: float, seed: int) -> Evaluation:
    return Evaluation(**json.loads(json.dumps(evaluation(step, right(share, seed)))))


def clustered(seed: int, images: int = 60, questions: int = 4) -> Evaluation:
    """Answers that are all right or all wrong about an image, which makes the questions of an image one observation."""
    rng = np.random.default_rng(seed)
    made = [{"record": f"i{i}", "task": "bbox2caption", "question": str(q), "scores": {"exact_match": float(hit)}}
            for i, hit in enumerate(rng.random(images) < 0.4) for q in range(questions)]  # fmt: skip
    return Evaluation(1, {}, {}, {}, made)


def test_the_interval_is_that_of_a_bootstrap_over_images():
    """Against another implementation, a loop over samples of whole images, and against the normal approximation."""
    found = clustered(1)
    by_image = np.array([p["scores"]["exact_match"] for p in found.predictions]).reshape(60, 4).mean(1)
    rng = np.random.default_rng(99)
    draws = [100 * by_image[rng.integers(0, 60, 60)].mean() for _ in range(20_000)]
    score = percent(found, "exact_match")
    assert score.value == pytest.approx(100 * by_image.mean())
    np.testing.assert_allclose((score.low, score.high), np.percentile(draws, (2.5, 97.5)), atol=1.7)  # 1 of 60 images
    error = 100 * by_image.std() / np.sqrt(60)
    np.testing.assert_allclose((score.low, score.high), score.value + 1.96 * error * np.array([-1, 1]), atol=2)
    single = 100 * by_image.std() / np.sqrt(240)  # if questions were independent, the interval would be half as wide
    assert score.high - score.low > 1.7 * 2 * 1.96 * single


def test_the_mean_is_that_of_the_evaluations_table():
    found = toy(8, 0.6, 3)
    for score in REPORTED:
        table = found.table["bbox2caption"] | found.table["caption2bbox"]
        assert percent(found, score).value == pytest.approx(100 * table[score])


def test_the_random_sample_depends_on_the_seed_and_not_on_the_answers():
    asked = lambda sample: [(p["record"], p["question"]) for p in sample]  # noqa: E731
    good, bad = toy(4, 1.0, 1), toy(8, 0.0, 2)
    for task in ("bbox2caption", "caption2bbox"):
        first = asked(random_sample(good, task, 12, 0))
        assert first == asked(random_sample(bad, task, 12, 0))
        assert len({record for record, _ in first}) == 12  # an image each
        assert first != asked(random_sample(good, task, 12, 1))
        assert {p["task"] for p in random_sample(good, task, 12, 0)} == {task}
    assert len(random_sample(good, "caption2bbox", 99, 0)) == len(RECORDS)


@pytest.mark.parametrize(("task", "score"), [("bbox2caption", "rouge_l"), ("caption2bbox", "mean_iou")])
def test_the_worst_answers_are_the_worst_and_equal_ones_keep_their_order(task, score):
    found = toy(8, 0.7, 5)
    own = [p for p in found.predictions if p["task"] == task]
    chosen = worst(found, task, 10)
    places = [own.index(p) for p in chosen]
    assert len(set(places)) == 10
    kept = [p["scores"][score] for i, p in enumerate(own) if i not in places]
    assert max(p["scores"][score] for p in chosen) <= min(kept)
    keys = [(own[place]["scores"][score], place) for place in places]
    assert keys == sorted(keys)
    last = keys[-1]
    assert all(place > last[1] for place, p in enumerate(own) if p["scores"][score] == last[0] and place not in places)


def test_runs_columns_and_aims(tmp_path):
    write_run(tmp_path, "stage1", {0: right(0, 1), 8: right(0.9, 2)})
    runs = read_runs(tmp_path)
    assert [column.title for column in columns(runs)] == ["start weights (before stage 1)", "after stage 1"]
    assert [aim.met for aim in aims(runs)] == [True, None, None, None]
    write_run(tmp_path, "stage2", {4: right(0.9, 3)})
    runs = read_runs(tmp_path)
    assert columns(runs)[-1].title == "stage 2, step 4 of 8" and not runs["stage2"].finished
    assert [aim.met for aim in aims(runs)] == [True, None, None, None]  # an unfinished run meets nothing
    write_run(tmp_path, "stage1_mixed", {8: right(0.2, 4)})  # more than a quarter of stage 2's, and less than all of it
    write_run(tmp_path, "guesser", {8: right(0.5, 5)})
    file = tmp_path / "stage2" / "eval" / "step_0000008.json"
    file.write_text(json.dumps(evaluation(8, right(1, 6))))
    assert [aim.met for aim in aims(read_runs(tmp_path))] == [True, False, True, False]
    file.write_text(json.dumps(evaluation(8, right(0, 6))))
    assert [aim.met for aim in aims(read_runs(tmp_path))] == [True, False, False, False]


def test_runs_of_an_earlier_version_or_without_evaluation_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"stage1.*no evaluation.*demo\.py"):
        read_runs(tmp_path)
    write_run(tmp_path, "stage1", {8: right(0.9, 2)})
    file = tmp_path / "stage1" / "eval" / "step_0000008.json"
    tree = json.loads(file.read_text())
    del tree["table"]["caption2bbox"]["mean_iou"]
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"step_0000008\.json: no score mean_iou of caption2bbox.*--out"):
        read_runs(tmp_path)


def test_start_weights_alone_are_no_result(tmp_path):
    write_run(tmp_path, "stage1", {0: right(0, 1)})
    with pytest.raises(ValueError, match="stage1"):
        read_runs(tmp_path)


def test_cards_say_and_show_what_is_right(tmp_path):
    write_run(tmp_path, "stage1", {0: right(0, 1), 8: right(1, 2)})
    write_run(tmp_path, "stage2", {8: right(0.5, 3)})
    runs = read_runs(tmp_path)
    rgb = lambda colour: tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))  # noqa: E731
    has = lambda card, colour: (card.picture_HW3 == rgb(colour)).all(-1).any()  # noqa: E731
    asked = random_sample(runs["stage1"].last, "bbox2caption", 1, 0)[0]
    image = next(record for record in RECORDS if record.id == asked["record"])
    card = caption_card(image, asked, runs)
    start, stage1, _ = card.answers
    assert (start.right, stage1.right) == (False, True)
    assert start.marked == "✗ start weights: red cup" and stage1.marked == f"✓ stage 1: {asked['reference']}"
    assert has(card, TRUE_COLOUR) and not has(card, RIGHT_COLOUR) and not has(card, WRONG_COLOUR)
    seen = set()
    for asked in (p for p in runs["stage2"].last.predictions if p["task"] == "caption2bbox"):
        card = box_card(next(record for record in RECORDS if record.id == asked["record"]), asked, runs["stage2"])
        good, no_box = asked["scores"]["mean_iou"] >= 0.5, asked["scores"]["unparsable"] == 1
        assert card.answers[-1].right == good and ("no box" in card.answers[-1].text) == no_box
        assert has(card, TRUE_COLOUR) or good  # a good answer may cover the true box
        assert (has(card, RIGHT_COLOUR), has(card, WRONG_COLOUR)) == (good, not good and not no_box)
        seen.add((good, no_box))
    assert len(seen) == 3


def test_a_question_that_another_run_was_not_asked_is_refused():
    asked = toy(8, 1, 1).predictions[0]
    with pytest.raises(ValueError, match=asked["record"]):
        answer_to(clustered(1), asked)


def test_times_follow_from_log_and_metrics(tmp_path):
    """Stage 1: 12 s outside the log, 5 s of set-up, 3 s of evaluation before the first step, which takes 10 s, then 7 x 2 s and
    two evaluations. The guesser runs beside stage 2."""
    write_run(tmp_path, "stage1", {0: right(0, 1), 4: right(0.4, 2), 8: right(0.7, 3)})
    write_run(tmp_path, "stage2", {8: right(0.7, 3)}, start=60)
    write_run(tmp_path, "guesser", {8: right(0.7, 3)}, start=70)
    inside = 5 + 10 + 7 * 2 + 3 * 3
    times = read_times(tmp_path, ["stage1", "stage2", "guesser"], {"data": 20.0, "stage1": inside + 12.0, "stage2": 40.0})
    assert times.left_out == [] and list(times.parts) == ["data", "stage1", "stage2", "guesser"]
    stage1 = times.parts["stage1"]
    assert [stage1.of_kind(kind) for kind in KINDS] == pytest.approx([12, 5, 10, 14, 9])
    ends = [20, 32, 37, 40, 50, 56, 59, 67, 70]
    assert [span.start for span in stage1.spans] == pytest.approx(ends[:-1])
    assert [span.end for span in stage1.spans] == pytest.approx(ends[1:])
    assert stage1.step_seconds == 2 and not stage1.running
    assert times.parts["data"].spans[0].end == pytest.approx(20)
    stage2, guesser = times.parts["stage2"], times.parts["guesser"]
    assert (stage2.spans[0].start, stage2.spans[-1].end) == pytest.approx((20 + 12 + 60 - 8, 20 + 12 + 60 + 32))
    assert guesser.spans[0].start == pytest.approx(20 + 12 + 70)  # no seconds are known of it


def test_a_later_continuation_leaves_no_gap_in_the_timeline(tmp_path):
    write_run(tmp_path, "stage1", {8: right(0.7, 3)})
    write_run(tmp_path, "stage2", {4: right(0.7, 3)}, start=86_400)
    times = read_times(tmp_path, ["stage1", "stage2"], {})
    assert times.parts["stage2"].spans[0].start == pytest.approx(32) and times.parts["stage2"].running


def test_a_resumed_run_is_left_out_of_the_timeline(tmp_path):
    write_run(tmp_path, "stage1", {8: right(0.7, 3)})
    times = read_times(tmp_path, ["stage1", "stage2"], {"stage1": 20.0})
    assert times.parts == {} and [reason.partition(":")[0] for reason in times.left_out] == ["stage1", "stage2"]
