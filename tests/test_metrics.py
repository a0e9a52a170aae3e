"""Scores against slow or published definitions, and the evaluation's sums over ranks."""
import json
import string
import unicodedata
from collections import Counter

import numpy as np
import pytest

from granvit.evaluate import Evaluator, evaluation_file, forget_evaluations, read_evaluation
from granvit.metrics import SCORES, exact_match, iou, rouge_l, rouge_l_ascii, score, words
from granvit.stages import REGION_TASKS
from tests.helpers import run_config


def painted_iou(a, b, side=400):
    """IoU by counting cells of a fine grid."""
    x = (np.arange(side) + 0.5) / side
    inside = [((x > c[0]) & (x < c[2]))[None, :] & ((x > c[1]) & (x < c[3]))[:, None] for c in (a, b)]
    union = (inside[0] | inside[1]).sum()
    return (inside[0] & inside[1]).sum() / union if union else 0.0


def test_iou_against_painted_boxes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (tuple(np.sort(rng.uniform(0, 1, (2, 2)), axis=0).ravel()) for _ in range(2))
        assert iou(a, b) == pytest.approx(painted_iou(a, b), abs=0.03)


@pytest.mark.parametrize(
    "a, b, expected",
    [((0, 0, 1, 1), (0, 0, 1, 1), 1.0), ((0, 0, 0.5, 1), (0.5, 0, 1, 1), 0.0), ((0, 0, 1, 1), (0, 0, 0.5, 1), 0.5),
     ((0.2, 0.2, 0.2, 0.2), (0.2, 0.2, 0.2, 0.2), 0.0)],
)  # fmt: skip
def test_iou_of_simple_boxes(a, b, expected):
    assert iou(a, b) == pytest.approx(expected)


def slow_rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, by brute force over the answer's subsequences."""
    a, r = answer.split(), reference.split()
    longest = 0
    for mask in range(2 ** len(a)):
        chosen = [word for i, word in enumerate(a) if mask >> i & 1]
        rest = iter(r)
        if all(word in rest for word in chosen):
            longest = max(longest, len(chosen))
    if not longest:
        return 0.0
    precision, recall = longest / len(a), longest / len(r)
    return 2 * precision * recall / (precision + recall)


def test_rouge_l_against_brute_force():
    rng = np.random.default_rng(1)
    words = np.array(["red", "blue", "circle", "small", "cup"])
    for _ in range(100):
        answer, reference = (" ".join(words[rng.integers(0, 5, rng.integers(1, 8))]) for _ in range(2))
        assert rouge_l(answer, reference) == pytest.approx(slow_rouge_l(answer, reference))


def test_both_rouge_l_are_one_number_for_ascii_captions():
    rng = np.random.default_rng(2)
    pieces = np.array([*string.printable, *["cup", "Red", "42", "don't", "x_1", "a-b"] * 20, *[" "] * 60])
    different = 0
    for _ in range(2000):
        answer, reference = ("cup" + "".join(rng.choice(pieces, rng.integers(0, 30))) for _ in range(2))
        assert rouge_l(answer, reference) == rouge_l_ascii(answer, reference)
        different += 0 < rouge_l(answer, reference) < 1
    assert different > 1000
    assert rouge_l("", "a cup") == rouge_l_ascii("", "a cup") == rouge_l("...", "a cup") == rouge_l_ascii("...", "a cup") == 0


SCRIPTS = {
    "Chinese": "一个红色的圆圈", "Japanese": "赤い円とがいこつ", "Cyrillic": "красный круг", "Greek": "κόκκινος κύκλος",
    "Hebrew": "עיגול אדום", "Arabic": "دائرة حمراء", "Hindi": "लाल वृत्त", "Thai": "วงกลมสีแดง", "Korean": "빨간 원",
    "accents": "café à la crème",
    "symbols": "★ → €", "emoji": "👩\u200d🚀🇫🇷", "ASCII symbols": "!?", "nothing": "",
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_equal_captions_score_1_in_any_script(script):
    text = SCRIPTS[script]
    assert rouge_l(text, text) == 1
    assert rouge_l(text.upper(), f" {unicodedata.normalize('NFD', text)}\n") == 1  # case, composition and space do not count
    for other, there in SCRIPTS.items():
        assert other == script or rouge_l(text, there) < 0.5


def test_words_of_each_kind_of_script():
    assert words("A red_cup, don't!") == ["a", "red", "cup", "don", "t"]
    assert words("红色CUP杯 2個") == ["红", "色", "cup", "杯", "2", "個"]
    assert words("लाल वृत्त") == ["लाल", "वृत्त"]  # vowel signs are marks, and part of the word
    assert words("ที่นี่") == ["ที่", "นี่"]
    assert words("ＲＥＤ ｶﾞ Straße") == ["red", "ガ", "strasse"]
    assert words("caf\u00e9") == words("cafe\u0301") != words("caf")
    assert words("★ bar") == ["bar"] and words("★→") == ["★", "→"]
    assert rouge_l("红色的杯", "红色杯子") == pytest.approx(0.75)  # 红色杯 of four


def test_exact_match_ignores_case_and_surrounding_space_alone():
    assert exact_match(" A red cup\n", "a red cup") == 1
    assert exact_match("a red  cup", "a red cup") == 0


@pytest.mark.parametrize("answer", ["", "no box", "[0.1, 0.2, 0.3]", "[0.9, 0.1, 0.2, 0.8]", "[nan, 0, 1, 1]", "[0, 0, 2, 1]"])
def test_an_answer_that_does_not_parse_counts_0(answer):
    assert score("caption2bbox", answer, "", (0, 0, 1, 1)) == {"acc_iou50": 0.0, "mean_iou": 0.0, "unparsable": 1.0}


def test_the_threshold_counts_as_a_hit():
    scores = score("caption2bbox", "It is [0, 0, 0.5, 1].", "", (0, 0, 1, 1))
    assert scores == {"acc_iou50": 1.0, "mean_iou": 0.5, "unparsable": 0.0}


def test_every_task_has_its_scores():
    for task in REGION_TASKS:
        assert tuple(score(task, "a", "a", (0, 0, 1, 1))) == SCORES[task]


ROOM = {"buckets": [{"length": 400, "answers": 96}, {"length": 480, "answers": 128}]}  # for every question of the store


class Parrot:
    """An engine that answers `answer` to everything; two of them sum as two ranks would."""

    def __init__(self, chat, answer: str, rank: int = 0, world: int = 1, other: list | None = None):
        self.chat, self.answer, self.rank, self.world, self.others = chat, answer, rank, world, other or []
        self.sent, self.rows = [], []

    def loss_sums(self, micro_batches):
        micro_batches = list(micro_batches)
        self.rows += [i for batch in micro_batches for i in batch.record_ids if i]
        answers = [(b.answer_targets_BA * b.answer_weights_BA).sum() for b in micro_batches]
        boxes = [b.boxes_BK4[b.box_weights_BK > 0].sum() for b in micro_batches]
        return np.array([sum(answers), sum(boxes)]).astype(np.float32)

    def generate(self, prompts, max_new_tokens, stop_token):
        ids = [*self.chat.answer_ids(self.answer)][:max_new_tokens]
        row = ids + [stop_token] * (max_new_tokens - len(ids))
        return np.tile(np.array(row, np.int32), (len(prompts.lengths_B), 1))

    def all_sum(self, values):
        self.sent.append(values)
        return values + (self.others[len(self.sent) - 1] if self.others else 0)


def test_two_ranks_evaluate_what_one_does(store, vision, chat, tmp_path):
    """Rank 1 first: its sums are played to rank 0, which finds rank 1's file beside its own and merges."""
    tasks = ["global", "bbox2caption", "caption2bbox"]
    config = run_config(
        data=ROOM,
        train={"global_batch": 4, "micro_batch": 2},
        distill={"weight": 0.5},
        eval={"source": str(store.path), "images": 7, "batch": 3, "max_new_tokens": 40, "tasks": tasks, "rows": 10},
    )
    alone = Parrot(chat, "[0.1, 0.1, 0.9, 0.9]")
    single = Evaluator(alone, config, vision, chat, tmp_path / "one")(5)
    second = Parrot(chat, "[0.1, 0.1, 0.9, 0.9]", 1, 2)
    Evaluator(second, config, vision, chat, tmp_path / "two")(5)
    first = Parrot(chat, "[0.1, 0.1, 0.9, 0.9]", 0, 2, second.sent)
    evaluator = Evaluator(first, config, vision, chat, tmp_path / "two")
    double = evaluator(5)
    assert Counter(alone.rows) == Counter(first.rows + second.rows) and len(alone.rows) == 12  # 10, in whole batches of 4
    assert first.rows and second.rows
    assert double.held_out == pytest.approx(single.held_out, rel=1e-6) and single.held_out["questions"] > 12
    assert single.held_out["loss"] == single.held_out["loss_caption"] + 0.5 * single.held_out["loss_distill"]
    for task in tasks:
        assert double.table[task] == pytest.approx(single.table[task], rel=1e-6)
    single = single.table
    assert [p.name for p in (tmp_path / "two/eval").iterdir()] == ["step_0000005.json"]
    written, of_one = (json.loads(evaluation_file(tmp_path / name, 5).read_text()) for name in ("two", "one"))
    predictions = written["predictions"]
    assert written["table"] == double.table and predictions == of_one["predictions"] and len(predictions) > 10
    first.rows.clear()
    assert read_evaluation(evaluation_file(tmp_path / "two", 5)) == double
    first.others = []
    assert evaluator(5) == double and not first.rows, "an evaluation that was kept is read"
    boxes = [p for p in predictions if p["task"] == "caption2bbox"]
    expected = np.mean([iou((0.1, 0.1, 0.9, 0.9), p["box"]) >= 0.5 for p in boxes])
    assert single["caption2bbox"]["acc_iou50"] == pytest.approx(expected)
    assert {p["answer"] for p in predictions} == {"[0.1, 0.1, 0.9, 0.9]"}


def test_a_kept_evaluation_of_other_settings_or_of_a_later_step_is_made_again(store, vision, chat, tmp_path):
    def evaluator(**changed):
        settings = {"source": str(store.path), "rows": 4, "images": 2, "batch": 2, "max_new_tokens": 4, **changed}
        engine = Parrot(chat, "no")
        return engine, Evaluator(engine, run_config(data=ROOM, eval=settings), vision, chat, tmp_path)

    other, no_matter = {"images": 1}, {"batch": 1, "every": 9, "start": True}
    for changed, made in (({}, True), ({}, False), (no_matter, False), (other, True), (other, False)):
        engine, evaluate = evaluator(**changed)
        evaluate(5)
        assert bool(engine.rows) == made, changed
    forget_evaluations(tmp_path, 5)
    assert evaluation_file(tmp_path, 5).exists()
    forget_evaluations(tmp_path, 4)
    assert not evaluation_file(tmp_path, 5).exists()


def test_what_a_held_out_store_cannot_answer_is_left_out_or_refused(store, chat_store, vision, chat, tmp_path):
    """Conversations have a loss alone; regions in a stage of conversations answers alone; nothing in common is an error."""
    made = {"train": {"global_batch": 2}, "data": {"regions_per_row": 1, "buckets": [{"length": 480, "answers": 128}]}}

    def evaluator(stage, source, **evaluation):
        held = {"source": str(source.path), "images": 2, "max_new_tokens": 4, "rows": 4, **evaluation}
        config = run_config(stage=stage, eval=held, **made)
        return Evaluator(Parrot(chat, "no"), config, vision, chat, tmp_path / f"{stage}-{source.kind.format}")

    talk = evaluator("sft", chat_store)(1)
    assert talk.table == {} and talk.held_out["loss"] == talk.held_out["loss_caption"] > 0 == talk.held_out["loss_distill"]
    regions = evaluator("sft", store)(1)
    assert regions.held_out == {} and set(regions.table) == {"bbox2caption", "caption2bbox"}
    assert evaluator("stage1", store, rows=0)(1).held_out == {}
    assert evaluator("stage2", store, tasks=[])(1).table == {}
    with pytest.raises(ValueError, match=r"eval\.source.*granvit-conversations"):
        evaluator("stage1", chat_store)
    with pytest.raises(ValueError, match=r"eval\.rows 4.*eval\.tasks \[\]"):
        evaluator("sft", store, tasks=[])
