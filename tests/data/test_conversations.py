"""LLaVA's conversations: validated, stored, packed into rows."""
import json
from collections import Counter
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest

from granvit.config import RunConfig, parse_config
from granvit.data.batch import Batch
from granvit.data.chat import Chat, byte_tokenizer
from granvit.data.conversations import build_conversations, main
from granvit.data.heldout import held_out
from granvit.data.images import decode, tile_grids, to_views, token_places
from granvit.data.lengths import PrefixLengths, TurnLengths
from granvit.data.loader import Loader
from granvit.data.records import BboxFrame
from granvit.data.store import Store
from granvit.stages import TASKS
from tests.conftest import encoded_image, spoken, write_spoken

BUCKETS = [{"length": 200, "answers": 40}, {"length": 400, "answers": 160}]


def built(folder, trees, **options):
    """A store of some JSON, and its records by id."""
    summary = build_conversations(*write_spoken(folder, trees), folder / "store", **options)
    store = Store(folder / "store")
    return summary, {record.id: record for record in map(store.record, range(store.records))}


def test_every_form_of_a_conversation_is_read(tmp_path):
    roles = {"id": 7, "conversations": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": " Hello! "}]}
    trees = [
        spoken("start", "<image>\nWhat is it?", " A cup.\n", "Red?", "«Oui»", image="a.png") | {"model": "", "other": 1},
        spoken("end", "What is it?\n<image>", "A cup.", image="a.png"),
        spoken("alone", "<image>", "A cup.", image="a.png"),
        spoken("one of one", "<image>\nWhat?", "A cup.") | {"image": ["a.png"]},
        spoken("text", "Who?", "Me.") | {"image": None},
        roles,
        {key: value for key, value in spoken("", "Who?", "Nobody.").items() if key != "id"},
        spoken("", "Who?", "No one.") | {"id": None},
    ]
    summary, records = built(tmp_path, trees)
    assert (summary.conversations, summary.turns, summary.images, summary.refused) == (8, 9, 4, {})
    assert {name: record.turns for name, record in records.items()} == {
        "start": (("What is it?", "A cup."), ("Red?", "«Oui»")),
        "end": (("What is it?", "A cup."),),
        "alone": (("", "A cup."),),
        "one of one": (("What?", "A cup."),),
        "text": (("Who?", "Me."),),
        "7": (("Hi.", "Hello!"),),
        "entry 7": (("Who?", "Nobody."),),
        "entry 8": (("Who?", "No one."),),
    }
    assert (records["start"].width, records["start"].height) == (40, 20)
    assert records["start"].image == encoded_image(40, 20) and records["text"].image == b""
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n\n".join(map(json.dumps, trees)) + "\n{broken\n")
    summary = build_conversations(lines, tmp_path / "images", tmp_path / "again")
    assert summary.refused == {"line is not valid JSON": 1} and summary.first_refused == ["line 16: line is not valid JSON"]
    again = Store(tmp_path / "again")
    assert [again.record(i).turns for i in range(8)] == [record.turns for record in records.values()]


@pytest.mark.parametrize("text", ["[%s]", " \n[%s]", "%s\n"])
def test_a_byte_order_mark_changes_nothing(tmp_path, text):
    path, images = write_spoken(tmp_path, [])
    path.write_text(text % json.dumps(spoken("a", "Who?", "Me.")), encoding="utf-8-sig")
    build_conversations(path, images, tmp_path / "store")
    assert Store(tmp_path / "store").record(0).turns == (("Who?", "Me."),)


@pytest.mark.parametrize("speaker", ["system", ["human"], {"name": "human"}, None])
def test_a_speaker_that_is_nobody_known_is_refused_whatever_it_is(tmp_path, speaker):
    strange = {"id": "x", "conversations": [{"from": speaker, "value": "Hi."}]}
    summary, _ = built(tmp_path, [spoken("good", "Who?", "Me."), strange])
    assert summary.refused == {"a turn's speaker is neither human nor gpt": 1} and summary.conversations == 1


WRONG = {
    "entry is not a mapping with conversations": "talk",
    "conversations is not a list of turns": {"id": "x", "conversations": "hello"},
    "a turn is not a mapping": {"id": "x", "conversations": ["hello", "you"]},
    "a turn has no text": spoken("x", "Who?", None),
    "a turn's text is not valid Unicode": spoken("x", "Who?", "\ud800"),
    "a turn's speaker is neither human nor gpt": {"id": "x", "conversations": [{"from": "system", "value": "Be good."}]},
    "turns do not alternate between human and gpt, the human first": {
        "id": "x", "conversations": spoken("x", "Who?", "Me.")["conversations"][::-1]},
    "the last question has no answer": spoken("x", "Who?", "Me.", "Why?"),
    "an answer is empty": spoken("x", "Who?", " \n"),
    "a question is empty": spoken("x", "Who?", "Me.", "", "You."),
    "<image> in a conversation without an image": spoken("x", "<image>\nWho?", "Me."),
    "no <image> for the image": spoken("x", "Who?", "Me.", image="a.png"),
    "more than one <image> for one image": spoken("x", "<image>\nWho?", "Me.", "<image>\nWhy?", "So.", image="a.png"),
    "<image> outside the first question": spoken("x", "Who?", "Me.", "<image>\nWhy?", "So.", image="a.png"),
    "<image> inside a sentence": spoken("x", "Is <image> a cup?", "Yes.", image="a.png"),
    "conversation has more than one image": spoken("x", "<image>", "Me.") | {"image": ["a.png", "a.png"]},
    "image is not a path": spoken("x", "<image>", "Me.") | {"image": {"bytes": "..."}},
    "conversation has a video": spoken("x", "<image>", "Me.") | {"video": "a.mp4"},
    "image file cannot be read (FileNotFoundError)": spoken("x", "<image>", "Me.") | {"image": ["absent.png"]},
    "not an image file": spoken("x", "<image>", "Me.") | {"image": ["text.png"]},
    "a text's box lies outside the image": spoken("x", "<image>", "[0.1, 0.1, 0.5, 0.9]", image="a.png"),
    "a text's box is inverted": spoken("x", "<image>", "[0.5, 0.4, 0.1, 0.6]", image="a.png"),
}  # fmt: skip


@pytest.mark.parametrize("reason", WRONG)
def test_a_conversation_that_does_not_line_up_is_refused_with_its_id(tmp_path, reason):
    good = spoken("good", "<image>\nWhere?", "There.", image="a.png")
    path, images = write_spoken(tmp_path, [good, WRONG[reason], good])
    (images / "text.png").write_text("<html>")
    summary = build_conversations(path, images, tmp_path / "store", frame="padded_square")
    assert summary.refused == {reason: 1} and summary.conversations == 2
    assert summary.first_refused == [f"{'x' if isinstance(WRONG[reason], dict) else 'entry 2'}: {reason}"]


def test_boxes_of_the_padded_square_become_the_images(tmp_path):
    """A 40 x 20 image: the square is 40 x 40, with 10 rows above."""
    texts = [
        "<image>\nWhat is in [0.1, 0.35, 0.5, 0.7]?", "A cup, not [0.123,0.3,0.456,0.5].",
        "One-hot [0, 1, 0, 0], pixels [10, 10, 50.5, 45]?", "All: [0.0, 0.25, 1.0, 0.75].", "A speck?", "[0.5, 0.5, 0.5, 0.5]",
    ]  # fmt: skip
    _, records = built(tmp_path, [spoken("a", *texts, image="a.png")], frame="padded_square")
    assert records["a"].turns == (
        ("What is in [0.1, 0.2, 0.5, 0.9]?", "A cup, not [0.123, 0.1, 0.456, 0.5]."),
        ("One-hot [0, 1, 0, 0], pixels [10, 10, 50.5, 45]?", "All: [0.0, 0.0, 1.0, 1.0]."),
        ("A speck?", "[0.5, 0.5, 0.5, 0.5]"),
    )


@pytest.mark.parametrize("turned", [False, True])
def test_boxes_that_two_decimals_carry_over_the_edge_are_clipped_and_others_refused(tmp_path, turned):
    """A 60 x 50 image: its edges are at 5 / 60 = 0.083 and 55 / 60 = 0.917 of the square, in two decimals 0.08 and 0.92."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "b.png").write_bytes(encoded_image(50, 60) if turned else encoded_image(60, 50))
    boxes = {"near": [0.2, 0.08, 0.3, 0.92], "over": [0.2, 0.07, 0.3, 0.5], "precise": [0.2, 0.079, 0.3, 0.5]}
    if turned:
        boxes = {name: [y1, x1, y2, x2] for name, (x1, y1, x2, y2) in boxes.items()}
    trees = [spoken(name, "<image>", f"at {box}", image="b.png") for name, box in boxes.items()]
    (tmp_path / "json").write_text(json.dumps(trees))
    summary = build_conversations(tmp_path / "json", folder, tmp_path / "store", frame="padded_square")
    assert summary.first_refused == ["over: a text's box lies outside the image", "precise: a text's box lies outside the image"]
    ((_, answer),) = Store(tmp_path / "store").record(0).turns
    assert answer == ("at [0.0, 0.2, 1.0, 0.3]" if turned else "at [0.2, 0.0, 0.3, 1.0]")


@pytest.mark.parametrize("frame", get_args(BboxFrame))
def test_a_box_a_little_outside_is_a_box_in_every_frame(tmp_path, frame):
    """A 40 x 20 image. A number above 1.1 or below -0.1 is a pixel or no coordinate: such a bracket is not changed."""
    texts = {
        "right": "[0.1, 0.35, 1.001, 0.7]", "above": "[0.1, -0.002, 0.4, 0.7]", "far": "[0.1, 0.35, 1.1, 0.7]",
        "inverted": "[0.5, 0.4, 0.1, 0.6]", "pixels": "[0.5, 0.4, 9.5, 0.6]", "inside": "[.10,0.30, 5e-1 ,0.70]",
    }  # fmt: skip
    trees = [spoken(name, "<image>\nWhere?", f"at {text}", image="a.png") for name, text in texts.items()]
    summary, records = built(tmp_path, trees, frame=frame)
    assert summary.first_refused == [
        *(f"{name}: a text's box lies outside the image" for name in ("right", "above", "far")),
        "inverted: a text's box is inverted",
    ]
    answers = {name: record.turns[0][1] for name, record in records.items()}
    inside = "[0.1, 0.3, 0.5, 0.7]" if frame == "image" else "[0.1, 0.1, 0.5, 0.9]"
    assert answers == {"pixels": f"at {texts['pixels']}", "inside": f"at {inside}"}


def test_a_frame_must_be_stated_where_there_are_boxes_about_an_image(tmp_path):
    box = "[0.1, 0.35, 0.5, 0.7]"
    trees = [spoken("talk", "A box?", box), spoken("shown", "<image>", box, image="a.png")]
    path, images = write_spoken(tmp_path, trees)
    with pytest.raises(ValueError, match=r"shown.*\[0\.1, 0\.35, 0\.5, 0\.7\].*--bbox-frame"):
        build_conversations(path, images, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    build_conversations(path, images, tmp_path / "as_they_are", frame="image")
    store = Store(tmp_path / "as_they_are")
    assert [store.record(i).turns[0][1] for i in (0, 1)] == [box] * 2
    assert json.loads((store.path / "manifest.json").read_text())["bbox_frame"] == "image"
    path.write_text(json.dumps(trees[:1]))
    build_conversations(path, images, tmp_path / "text")
    assert json.loads((tmp_path / "text" / "manifest.json").read_text())["bbox_frame"] is None


def test_the_command_prints_counts_and_explains_bad_files(tmp_path, capsys):
    path, images = write_spoken(tmp_path, [spoken("a", "Who?", "Me."), spoken("b", "Who?", "")])
    assert main([str(path), str(images), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "1 conversations, 0 of them about an image, 1 turns" in printed
    assert "refused 1: an answer is empty" in printed and "b: an answer is empty" in printed and "refused.jsonl" not in printed
    assert json.loads((tmp_path / "out" / "refused.jsonl").read_text()) == {"what": "b", "reason": "an answer is empty"}
    path.write_text(json.dumps([spoken("a", "Who?", "Me.")] + [spoken(f"b{i}", "Who?", "") for i in range(12)]))
    assert main([str(path), str(images), str(tmp_path / "more")]) == 0
    assert f"all 12: {tmp_path / 'more' / 'refused.jsonl'}" in capsys.readouterr().out
    assert len((tmp_path / "more" / "refused.jsonl").read_text().splitlines()) == 12
    for text, message in (("[{", "not valid JSON"), ("[]", "no usable conversation; refused: the input is empty")):
        path.write_text(text)
        assert main([str(path), str(images), str(tmp_path / "other")]) == 2
        assert message in capsys.readouterr().err
    assert main(["absent.json", str(images), str(tmp_path / "other")]) == 2
    assert "absent.json" in capsys.readouterr().err


def run(stage: str, *stores, **data) -> RunConfig:
    """A tiny run; `data` is merged over its section."""
    return parse_config(
        {
            "stage": stage,
            "output": "unused",
            "seed": 3,
            "model": {"vision": "tiny-vision", "language": "tiny-language", "init": "random"},
            "data": {"sources": [{"path": str(store.path)} for store in stores], "buckets": BUCKETS, **data},
            "train": {"global_batch": 4, "micro_batch": 2},
        },
        "test",
    )


def test_an_epoch_shows_every_conversation_once_in_fixed_shapes(chat_store, chats, vision, chat):
    loader = Loader(run("sft", chat_store), vision, chat, 0, 1)
    shown, shapes, turns = Counter(), {}, 0
    for micro_batches in loader.batches():
        for batch in micro_batches:
            arrays = {f.name: getattr(batch, f.name).shape for f in fields(Batch) if f.type is np.ndarray}
            assert shapes.setdefault(batch.token_ids_BS.shape[1], arrays) == arrays
            shown.update(name for name in batch.record_ids if name)
            turns += batch.questions
            assert batch.skipped == ()
    assert shown == {tree["id"]: 1 for tree in chats}
    assert turns == sum(len(tree["conversations"]) // 2 for tree in chats)
    assert set(shapes) == {200, 400}


def test_lengths_are_those_of_the_packed_rows(chat_store, vision, chat):
    lengths = TurnLengths(chat_store, chat, frozenset(TASKS))
    loader = Loader(run("sft", chat_store), vision, chat, 0, 1)
    prefixes = PrefixLengths(chat_store, chat, vision).tokens_of(np.arange(chat_store.records))
    packer, bucket = loader._assemble.packer, loader.plan.buckets[-1]
    tokens, answers = lengths.tokens_of(np.full(chat_store.records, TASKS.index("conversation")), np.arange(chat_store.records))
    for image in range(chat_store.records):
        row = packer.conversation_row(chat_store.record(image), bucket)
        assert (row.segments_BS >= 0).sum() == prefixes[image] + tokens[image]
        assert row.tokens == answers[image]


def test_with_tiling_a_row_is_as_long_as_its_image_makes_it(tmp_path, vision, chat):
    """Tiles of 32 pixels, 4 tokens a view: a global view and as many tiles as the image has; nothing where there is no image."""
    tiled = vision.model_copy(update={"tiles": 6})
    views = {"wide": (90, 70, 1 + 6), "small": (20, 30, 1 + 1), "square": (500, 500, 1 + 4), "long": (300, 20, 1 + 6)}
    trees = [spoken(name, "<image>\nWhat is it?", "A cup.", "Red?", "Blue.", image=f"{name}.png") for name in views]
    path, images = write_spoken(tmp_path, [*trees, spoken("talk", "Who?", "Me.")])
    for name, (width, height, _) in views.items():
        (images / f"{name}.png").write_bytes(encoded_image(width, height))
    build_conversations(path, images, tmp_path / "store")
    store = Store(tmp_path / "store")
    loader = Loader(run("sft", store), tiled, chat, 0, 1)
    packer, bucket, numbers = loader._assemble.packer, loader.plan.buckets[-1], np.arange(store.records)
    tasks = np.full(store.records, TASKS.index("conversation"))
    tokens, answers = TurnLengths(store, chat, frozenset(TASKS)).tokens_of(tasks, numbers)
    prefixes = PrefixLengths(store, chat, tiled).tokens_of(numbers)
    before = len(chat.prefix_before)
    for image, name in enumerate([*views, "talk"]):
        record = store.record(image)
        row = packer.conversation_row(record, bucket)
        assert row.record_ids == (name,) and not row.skipped
        assert (row.segments_BS >= 0).sum() == prefixes[image] + tokens[image]
        assert (row.segments_BS == 0).sum() == prefixes[image] and row.tokens == answers[image]
        if name == "talk":
            assert prefixes[image] == before and row.image_weights_B == 0
            continue
        width, height, shown = views[name]
        assert prefixes[image] == chat.prefix_length(4 * shown) and row.image_weights_B == 1
        places = token_places(width, height, tiled)
        assert (places >= 0).sum() == 4 * shown
        np.testing.assert_array_equal(row.image_positions_BN[0], np.where(places >= 0, before + places, -1))
        np.testing.assert_array_equal(row.grids_B2[0], tile_grids(width, height, tiled))
        np.testing.assert_array_equal(row.pixels_B3RR[0], to_views(decode(record.image, 10**6), tiled))
    batches = [batch for micro_batches in loader.batches() for batch in micro_batches]
    assert sorted(name for batch in batches for name in batch.record_ids if name) == sorted([*views, "talk"])
    assert not any(batch.skipped for batch in batches)


def test_captions_are_shown_plainly_and_other_conversations_are_not(caption_store, chat_store, vision):
    chat = Chat(byte_tokenizer("qwen2.5"), "qwen2.5", plain=True)
    loader = Loader(run("projector", caption_store), vision, chat, 0, 1)
    batches = [batch for micro_batches in loader.batches() for batch in micro_batches]
    assert sorted(name for b in batches for name in b.record_ids if name) == sorted(f"c{i}" for i in range(12))
    for batch in batches:
        np.testing.assert_array_equal(batch.image_positions_BN, np.tile(np.arange(vision.patches), (2, 1)))
        for row, name in enumerate(batch.record_ids):
            if name:
                caption = chat.answer_ids(f"a picture of {name[1:]} cups")
                supervised = batch.answer_weights_BA[row] > 0
                positions = vision.patches - 1 + np.arange(len(caption))  # the last image token predicts the first of the caption
                assert batch.answer_targets_BA[row, supervised].tolist() == caption
                assert batch.answer_positions_BA[row, supervised].tolist() == positions.tolist()
    loader = Loader(run("projector", chat_store), vision, chat, 0, 1)
    refused = Counter(reason for step in loader.batches() for batch in step for _, reason in batch.skipped)
    assert refused == {
        "a conversation without an image has no plain form": 10,
        "a conversation of several turns has no plain form": 20,
    }


def test_regions_and_conversations_mix_where_the_mix_names_both(chat_store, store, records, vision, chat):
    config = run("sft", chat_store, store, mix={"conversation": 1.0, "caption2bbox": 1.0})
    loader = Loader(config, vision, chat, 0, 1)
    asked = Counter()
    for step in range(loader.plan.epoch_steps(0)):
        _, _, rows = loader.plan.batch(step)
        asked.update(question.task for *_, questions in loader.plan.contents(0, rows[rows >= 0]) for question in questions)
    assert asked == {"conversation": 30, "caption2bbox": sum(len(record.regions) for record in records)}


def test_a_sources_rate_is_the_share_of_its_conversations(chat_store, vision, chat):
    sources = [{"path": str(chat_store.path), "rate": rate} for rate in (0.0, 1.0)]
    loader = Loader(run("sft", sources=sources), vision, chat, 0, 1)
    rows = np.concatenate([loader.plan.batch(step)[2] for step in range(loader.plan.epoch_steps(0))])
    assert Counter(source for source, *_ in loader.plan.contents(0, rows[rows >= 0])) == {1: 30}


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_at_a_step_gives_the_identical_bytes(chat_store, vision, chat, workers):
    config = run("sft", chat_store, workers=workers)
    whole = list(Loader(run("sft", chat_store), vision, chat, 0, 1).batches())
    rest = list(Loader(config, vision, chat, 0, 1).batches(3))
    assert len(rest) == len(whole) - 3 > 0
    for ours, theirs in zip(rest, whole[3:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch))


def test_a_store_of_the_other_kind_and_a_task_of_no_store_are_named(chat_store, store, vision, chat):
    with pytest.raises(ValueError, match=f"{store.path}.*granvit-regions.*'conversation'"):
        Loader(run("sft", chat_store, store), vision, chat, 0, 1)
    with pytest.raises(ValueError, match=f"{chat_store.path}.*granvit-conversations"):
        Loader(run("stage2", chat_store), vision, chat, 0, 1)
    with pytest.raises(ValueError, match=rf"data\.mix.*conversation.*{store.path}"):
        Loader(run("stage2", store, mix={"conversation": 0.1, "caption2bbox": 1.0}), vision, chat, 0, 1)
    with pytest.raises(ValueError, match=r"data\.mix.*global, caption2bbox"):
        Loader(run("sft", chat_store, mix={"conversation": 1.0, "global": 1.0, "caption2bbox": 0.5}), vision, chat, 0, 1)
    Loader(run("sft", chat_store, mix={"conversation": 1.0, "caption2bbox": 0.0}), vision, chat, 0, 1)
    with pytest.raises(ValueError, match=r"eval\.source.*granvit-conversations"):
        next(held_out(chat_store, ("global",), chat, vision, 2, 2))
