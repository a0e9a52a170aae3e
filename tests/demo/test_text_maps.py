"""The demo's text maps: they match the annotations, and the right tokens are supervised."""
import numpy as np
import pytest

from granvit.config import Bucket, language_config, vision_config
from granvit.data.batch import Packer, Question
from granvit.data.chat import Chat, train_tokenizer
from granvit.data.images import box_to_square
from granvit.data.prompts import question_text
from granvit.demo.scenes import scene
from granvit.demo.text_maps import GROUND, WHERE, compose_text, place, text_map

VISION, LANGUAGE = vision_config("demo-vision"), language_config("demo-language")
RECORDS = [scene("train", 0, index) for index in range(30)]


@pytest.fixture(scope="module")
def chat() -> Chat:
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", GROUND, place(0, 1, 2, 3)]
    texts += [t for r in RECORDS for g in r.regions for t in (question_text("bbox2caption", g.box), g.caption, g.caption)]
    return Chat(train_tokenizer(texts, LANGUAGE.vocab, "qwen2.5"), "qwen2.5")


def test_a_map_names_each_object_inside_its_box_and_nothing_outside(chat):
    grid = VISION.grid
    for record in RECORDS:
        words = np.array([chat.decode([i]).strip() for i in text_map(record, chat, grid)]).reshape(grid, grid)
        free = np.ones((grid, grid), bool)
        for region in record.regions:
            x1, y1, x2, y2 = np.array(box_to_square(region.box, record.width, record.height)) * grid
            rows, columns = slice(int(y1), int(np.ceil(y2))), slice(int(x1), int(np.ceil(x2)))
            shown = set(words[rows, columns].ravel())
            content = region.caption.replace('the word "', "").replace('" in', "").split()
            assert len(shown & set(content)) >= len(content) - 1, (region.caption, words)
            free[rows, columns] = False
        assert set(words[free]) <= {GROUND}


def test_a_row_asks_the_regions_of_its_map_and_where_they_are(chat):
    packer = Packer(VISION, chat, 0, VISION.image_size, 1.0, 10**6)
    record, bucket, grid = RECORDS[0], Bucket(length=720, answers=160), VISION.grid
    questions = [Question("bbox2caption", k) for k in range(4)]
    row, plain = compose_text(packer, record, questions, bucket), packer.row(record, questions, bucket)
    assert row.image_weights_B[0] == 0 and not row.pixels_B3RR.any() and not row.skipped
    regions = int(plain.answer_weights_BA.sum())
    np.testing.assert_array_equal(row.answer_targets_BA[0, :regions], plain.answer_targets_BA[0, :regions])
    cells = text_map(record, chat, grid)
    np.testing.assert_array_equal(row.token_ids_BS[0][row.image_positions_BN[0]], cells)
    for segment, region in enumerate(record.regions, 5):
        question, answer = _turn(row, segment, chat)
        assert question.startswith(WHERE + region.caption)
        top, bottom, left, right = (int(word) for word in answer.split()[1::2])
        shown = np.array(cells).reshape(grid, grid)[top:bottom, left:right]
        words = {chat.decode([token]).strip() for token in shown.ravel()} - {GROUND}
        assert words <= set(region.caption.replace('"', " ").split()), (region.caption, shown)
        box = box_to_square(region.box, record.width, record.height)
        np.testing.assert_allclose(np.array([left, top, right, bottom]) / grid, box, atol=0.7 / grid)
    assert row.segments_BS.max() == 8


def _turn(row, segment: int, chat: Chat) -> tuple[str, str]:
    """Texts of one segment: its input tokens (question and answer), and its supervised answer."""
    text = chat.tokenizer.decode(row.token_ids_BS[0][row.segments_BS[0] == segment], skip_special_tokens=True)
    own = (row.segments_BS[0][row.answer_positions_BA[0]] == segment) & (row.answer_weights_BA[0] > 0)
    return text, chat.decode(row.answer_targets_BA[0][own].tolist()).strip()
