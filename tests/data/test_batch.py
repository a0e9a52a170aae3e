"""Rows compared with a slow, independent construction from strings; questions that do not fit."""
from dataclasses import fields, replace

import numpy as np
import pytest

from granvit.config import Bucket
from granvit.data.batch import Batch, Packer, Question, join, prompt_batch
from granvit.data.images import box_to_square, crop, decode, to_square
from granvit.data.prompts import answer_text, question_text
from granvit.data.records import Conversation, ImageRecord
from tests.conftest import random_record

BUCKET = Bucket(length=1200, answers=200)
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def packer(vision, chat):
    return Packer(vision, chat, boxes=3, crop_size=24, crop_scale=1.0, max_pixels=10**6)


def tokens_of(chat, text: str) -> list[int]:
    """Encodes byte by byte, with control tokens recognised: an independent way to the same ids."""
    ids = []
    while text:
        control = next((token for token in SPECIAL if text.startswith(token)), None)
        ids.append(chat.tokenizer.token_to_id(control) if control else chat.tokenizer.encode(text[0]).ids[0])
        text = text[len(control or text[0]) :]
    return ids


def alone(chat, vision, question: str, answer: str) -> tuple[list[int], int]:
    """The whole conversation of one question as one sequence, and where its answer starts."""
    prefix = tokens_of(chat, BEFORE) + [chat.pad_token] * vision.patches + tokens_of(chat, "\n")
    asked = prefix + tokens_of(chat, f"{question}<|im_end|>\n<|im_start|>assistant\n")
    return asked + tokens_of(chat, f"{answer}<|im_end|>"), len(asked)


def seen(batch: Batch, row: int, position: int) -> tuple[list[int], list[int]]:
    """Tokens and position ids that one index of a row attends to."""
    segment = batch.segments_BS[row]
    keys = [j for j in range(position + 1) if segment[j] in (0, segment[position])]
    return batch.token_ids_BS[row, keys].tolist(), batch.positions_BS[row, keys].tolist()


def test_every_answer_sees_exactly_its_own_conversation(packer, chat, vision):
    """Every supervised index attends to exactly the single-question conversation up to there; its target is the next token."""
    record = random_record("a", 3, 1)
    questions = [Question("bbox2caption", 2), Question("caption2bbox", 0), Question("bbox2caption", 0), Question("global")]
    batch = packer.row(record, questions, BUCKET)
    place = 0
    for question in questions:
        if question.region is None:
            texts = question_text("global"), record.global_caption
        else:
            region = record.regions[question.region]
            box, caption = region.box, region.caption
            texts = question_text(question.task, box, caption), answer_text(question.task, box, caption)
        conversation, start = alone(chat, vision, *texts)
        for target in range(start, len(conversation)):
            assert batch.answer_weights_BA[0, place] == 1
            assert batch.answer_targets_BA[0, place] == conversation[target]
            ids, positions = seen(batch, 0, batch.answer_positions_BA[0, place])
            assert ids == conversation[:target]
            assert positions == list(range(target))
            place += 1
    assert batch.tokens == place and batch.answer_weights_BA[0, place:].sum() == 0
    assert batch.questions == 4 and batch.record_ids == ("a",) and batch.skipped == ()
    assert (batch.segments_BS[0, batch.image_positions_BN[0]] == 0).all()
    assert batch.segments_BS.max() == 4 and batch.segments_BS.min() == -1


TURNS = (("What is it?", "A cup."), ("Which colour?", "Red, mostly."), ("Since when?", "Always."))


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text"])
def test_every_turn_of_a_conversation_sees_all_before_it(packer, chat, vision, with_image):
    """One segment: a supervised index attends to the whole conversation up to there; its target is the next token."""
    record = random_record("a", 0, 1)
    image = record.image if with_image else b""
    batch = packer.conversation_row(Conversation("talk", record.width, record.height, image, TURNS), BUCKET)
    conversation = tokens_of(chat, BEFORE) + ([chat.pad_token] * vision.patches + tokens_of(chat, "\n")) * with_image
    expected = []
    for number, (question, answer) in enumerate(TURNS):
        header = "\n<|im_start|>user\n" if number else ""
        conversation += tokens_of(chat, f"{header}{question}<|im_end|>\n<|im_start|>assistant\n")
        answer_ids = tokens_of(chat, f"{answer}<|im_end|>")
        expected += range(len(conversation), len(conversation) + len(answer_ids))
        conversation += answer_ids
    for place, target in enumerate(expected):
        assert batch.answer_weights_BA[0, place] == 1 and batch.answer_targets_BA[0, place] == conversation[target]
        assert seen(batch, 0, batch.answer_positions_BA[0, place]) == (conversation[:target], list(range(target)))
    assert batch.tokens == len(expected) and batch.questions == 3 and batch.skipped == () and batch.record_ids == ("talk",)
    assert batch.image_weights_B.tolist() == [with_image]
    assert len(set(batch.image_positions_BN[0].tolist())) == vision.patches  # each place once, of a text row too
    if with_image:
        np.testing.assert_array_equal(batch.pixels_B3RR[0], to_square(decode(image, 10**6), vision))


def test_turns_beyond_the_bucket_are_left_out_and_named(packer):
    whole = packer.conversation_row(Conversation("talk", 0, 0, b"", TURNS), BUCKET)
    used, answers = int((whole.segments_BS >= 0).sum()), int(whole.tokens)
    for bucket in (Bucket(length=used - 1, answers=answers), Bucket(length=used, answers=answers - 1)):
        batch = packer.conversation_row(Conversation("talk", 0, 0, b"", TURNS), bucket)
        ((what, why),) = batch.skipped
        assert what == "talk turn 2" and "does not fit" in why and batch.questions == 2
        assert batch.tokens == answers - len("Always.") - 1
    none = packer.conversation_row(Conversation("talk", 0, 0, b"", TURNS), Bucket(length=BUCKET.length, answers=6))
    assert none.record_ids == ("",) and none.tokens == 0
    assert [what for what, _ in none.skipped] == ["talk turn 0", "talk turn 1", "talk turn 2"]


def test_boxes_and_crops_are_those_of_the_rows_regions_once_each(packer, vision):
    record = random_record("a", 5, 2)
    asked = [Question("caption2bbox", 3), Question("bbox2caption", 3), Question("bbox2caption", 1), Question("global")]
    batch = packer.row(record, asked, BUCKET)
    picture = decode(record.image, 10**6)
    np.testing.assert_array_equal(batch.box_weights_BK, [[1, 1, 0]])
    for k, region in enumerate((3, 1)):
        box = record.regions[region].box
        np.testing.assert_allclose(batch.boxes_BK4[0, k], box_to_square(box, record.width, record.height), rtol=1e-6)
        np.testing.assert_array_equal(batch.crops_BK3rr[0, k], crop(picture, box, 1.0, 24, vision.resize))
    np.testing.assert_array_equal(batch.pixels_B3RR[0], to_square(picture, vision))
    many = packer.row(record, [Question("bbox2caption", region) for region in range(5)], BUCKET)
    assert many.boxes == 3  # room for three


def test_shapes_and_dtypes_never_depend_on_the_content(packer):
    record = random_record("a", 4, 3)
    rows = [
        packer.row(record, [Question("bbox2caption", 0)], BUCKET),
        packer.row(record, [Question("global")], BUCKET),
        packer.row(replace(record, image=b"broken"), [Question("global")], BUCKET),
        packer.text_row("t", range(16), [("what?", "that")], BUCKET),
        packer.empty(BUCKET),
        packer.conversation_row(Conversation("c", record.width, record.height, record.image, TURNS), BUCKET),
        packer.conversation_row(Conversation("d", 0, 0, b"", TURNS[:1]), BUCKET),
        packer.conversation_row(Conversation("e", 8, 8, b"broken", TURNS[:1]), BUCKET),
    ]
    shapes = [{f.name: (getattr(row, f.name).shape, getattr(row, f.name).dtype) for f in fields(Batch) if f.type is np.ndarray} for row in rows]  # fmt: skip # noqa: E501
    assert all(shape == shapes[0] for shape in shapes)
    batch = join(rows)
    assert batch.pixels_B3RR.shape == (8, 3, 32, 32) and batch.crops_BK3rr.shape == (8, 3, 3, 24, 24)
    assert batch.record_ids == ("a", "a", "", "t", "", "c", "d", "") and batch.questions == 7
    assert batch.skipped == (("a", "not an image file"), ("e", "not an image file"))
    assert batch.image_weights_B.tolist() == [1, 1, 0, 0, 0, 1, 0, 0]
    for row in range(8):  # every index attends to at least one key
        assert batch.segments_BS[row, 0] == 0


def test_without_distillation_there_are_no_boxes(vision, chat):
    batch = Packer(vision, chat, 0, 32, 1.0, 10**6).row(random_record("a", 2, 4), [Question("bbox2caption", 0)], BUCKET)
    assert batch.boxes_BK4.shape == (1, 0, 4) and batch.crops_BK3rr.shape == (1, 0, 3, 32, 32) and batch.boxes == 0


def test_a_question_that_does_not_fit_is_named_and_the_others_stay(packer, chat, vision):
    record = random_record("a", 3, 5)
    long = replace(record.regions[1], caption="long " * 40)
    record = replace(record, regions=(record.regions[0], long, record.regions[2]))
    questions = [Question("bbox2caption", region) for region in range(3)]
    whole = packer.row(record, [questions[0], questions[2]], BUCKET)
    for bucket in (Bucket(length=1200, answers=100), Bucket(length=int((whole.segments_BS >= 0).sum()), answers=300)):
        batch = packer.row(record, questions, bucket)
        assert batch.questions == 2 and batch.tokens == whole.tokens and batch.boxes == 2
        ((what, why),) = batch.skipped
        assert what == "a region 1" and "does not fit" in why and str(bucket.length) in why
    alone = packer.row(record, [questions[1]], Bucket(length=1200, answers=100))
    assert alone.record_ids == ("",) and alone.questions == 0 and alone.tokens == 0 and len(alone.skipped) == 1


def test_an_image_of_another_size_than_its_record_is_a_row_of_weight_zero(packer):
    record = random_record("a", 1, 6)
    wrong = ImageRecord("a", record.width + 1, record.height, record.image, None, record.regions)
    assert packer.row(wrong, [Question("bbox2caption", 0)], BUCKET).skipped[0][1].startswith("image size differs")


def test_a_text_row_puts_ids_at_the_image_positions(packer, vision, chat):
    ids = list(range(7, 7 + vision.patches))
    batch = packer.text_row("map", ids, [("Where is it?", "there"), ("x" * 2000, "too long")], BUCKET)
    assert batch.token_ids_BS[0, batch.image_positions_BN[0]].tolist() == ids
    assert chat.decode(batch.answer_targets_BA[0]) == "there"
    assert batch.questions == 1 and len(batch.skipped) == 1
    with pytest.raises(ValueError, match="15 ids for 16"):
        packer.text_row("map", ids[1:], [], BUCKET)


def test_a_bucket_shorter_than_the_prefix_is_an_error(packer):
    with pytest.raises(ValueError, match="does not hold the prefix"):
        packer.empty(Bucket(length=20, answers=5))


def test_prompts_are_the_conversation_up_to_the_answer(chat, vision):
    questions = ["What is it?", "And where is it, then?"]
    prompts = prompt_batch(np.zeros((2, 3, 32, 32), np.uint8), questions, chat, vision, 200)
    assert prompts.token_ids_BS.shape == (2, 200)
    for row, question in enumerate(questions):
        conversation, start = alone(chat, vision, question, "")
        assert prompts.lengths_B[row] == start
        assert prompts.token_ids_BS[row, :start].tolist() == conversation[:start]
        assert (prompts.token_ids_BS[row, start:] == chat.pad_token).all()
        assert (prompts.token_ids_BS[row, prompts.image_positions_BN[row]] == chat.pad_token).all()
