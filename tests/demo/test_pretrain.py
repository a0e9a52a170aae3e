"""What the demo's start weights have seen: the training rows of both runs, read back as text."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer

from granvit.config import CONFIGS, load_config, resolve_models
from granvit.data import prompts
from granvit.data.batch import Packer, prompt_batch
from granvit.data.chat import Chat, train_tokenizer
from granvit.data.loader import Loader
from granvit.data.prompts import parse_box, question_text
from granvit.data.store_writer import write_store
from granvit.demo import pretrain
from granvit.demo.pretrain import PHRASES, Asked, Pretraining, prompts_of, tokenizer_texts
from granvit.demo.scenes import scene
from granvit.demo.text_maps import WHERE, compose_text, text_map

RECORDS = [scene("train", 1000, index) for index in range(24)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    write_store(iter(RECORDS), folder / "store")
    tokenizer = train_tokenizer([text for record in RECORDS for text in tokenizer_texts(record)], 512, "qwen2.5", PHRASES)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def rows_of(part: str, files):
    """(question, answer, whether there is an image) of every segment in the first steps of a run."""
    config = load_config(CONFIGS / "demo" / f"{part}.yaml",
                         [f"data.sources=[{{path: {files / 'store'}}}]", f"model.tokenizer={files / 'tokenizer.json'}",
                          "model.init_from=null", "model.init=random", "data.workers=0", "train.epochs=20"])  # fmt: skip
    vision, language = resolve_models(config)
    chat = Chat(Tokenizer.from_file(str(files / "tokenizer.json")), language.chat)
    loader = Loader(config, vision, chat, 0, 1, compose_text if part == "pretrain_text" else Packer.row)
    batches = loader.batches()
    for _ in range(6):
        for batch in next(batches):
            assert not batch.skipped
            for row in range(len(batch.token_ids_BS)):
                segments = batch.segments_BS[row]
                of_answers = segments[batch.answer_positions_BA[row]]
                for segment in range(1, segments.max() + 1):
                    own = (of_answers == segment) & (batch.answer_weights_BA[row] > 0)
                    answer = chat.decode(batch.answer_targets_BA[row][own].tolist()).strip()
                    text = chat.tokenizer.decode(batch.token_ids_BS[row][segments == segment], skip_special_tokens=True)
                    yield text, answer, bool(batch.image_weights_B[row])
    batches.close()


def test_the_decoder_sees_no_image_and_answers_no_coordinate(files):
    asks_for_a_box = prompts.CAPTION2BBOX.partition("{caption}")[0].strip()
    kinds = {"where": 0, "global": 0, "region": 0}
    for text, answer, has_image in rows_of("pretrain_text", files):
        assert not has_image and asks_for_a_box not in text
        assert parse_box(answer) is None and "0." not in answer and "[" not in answer
        kinds["where" if text.startswith(WHERE) else "global" if text.startswith(prompts.GLOBAL) else "region"] += 1
    assert min(kinds.values()) > 20, kinds


def test_the_encoder_sees_whole_images_and_global_captions_alone(files):
    captions = {record.global_caption for record in RECORDS}
    rows = list(rows_of("pretrain_image", files))
    assert len(rows) > 50
    for text, answer, has_image in rows:
        assert has_image and answer in captions and text.startswith(prompts.GLOBAL) and "[" not in text


def test_both_are_trained_on_the_training_photographs(tmp_path, monkeypatch):
    """The store that both configurations name is drawn from the photographs of the training split."""
    drawn = {}
    monkeypatch.setattr(pretrain, "scenes", lambda split, count, seed: (split, seed))
    monkeypatch.setattr(pretrain, "write_store", lambda records, out: drawn.update({out: records}))
    monkeypatch.setattr(pretrain, "Store", lambda path: SimpleNamespace(record=lambda index: RECORDS[index % len(RECORDS)]))
    monkeypatch.setattr(pretrain, "train_tokenizer", lambda *_: SimpleNamespace(save=lambda path: None))
    making = Pretraining(tmp_path, 1000, "torch")
    making.make("data")
    for part in ("pretrain_text", "pretrain_image"):
        sources = making.config(part).data.sources
        assert [drawn[Path(source.path)] for source in sources] == [("train", 1000)]


def test_a_text_map_is_asked_with_its_tokens_in_the_image_s_place(files):
    config = load_config(CONFIGS / "demo" / "pretrain_text.yaml")
    vision, language = resolve_models(config)
    chat = Chat(Tokenizer.from_file(str(files / "tokenizer.json")), language.chat)
    blank, question = np.zeros((3, vision.image_size, vision.image_size), np.uint8), question_text("global")
    cells = text_map(RECORDS[0], chat, vision.grid)
    asked = prompts_of([Asked(blank, cells, question, ""), Asked(blank, None, question, "")], chat, vision)
    plain = prompt_batch(np.stack([blank] * 2), [question] * 2, chat, vision)
    places = plain.image_positions_BN[0]
    assert asked.token_ids_BS[0, places].tolist() == cells and (asked.image_positions_BN[0] == -1).all()
    assert np.array_equal(asked.token_ids_BS[1], plain.token_ids_BS[1])
    assert np.array_equal(np.delete(asked.token_ids_BS[0], places), np.delete(plain.token_ids_BS[0], places))
    assert np.array_equal(asked.image_positions_BN[1], places)
