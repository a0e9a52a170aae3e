"""The order of the data, and the pipeline that follows it."""
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from granvit.config import RunConfig, parse_config
from granvit.data import lengths as lengths_module
from granvit.data import shares as shares_module
from granvit.data.batch import Batch, Packer
from granvit.data.chat import Chat, train_tokenizer
from granvit.data.conversations import build_conversations
from granvit.data.lengths import TurnLengths, text_lengths
from granvit.data.loader import Loader, held_out, splitmix64, stratified
from granvit.data.prompts import format_box, question_text
from granvit.data.records import ImageRecord
from granvit.data.store import Store, write_store
from granvit.stages import REGION_TASKS as TASKS
from tests.conftest import random_record, spoken, write_spoken

BUCKETS = [{"length": 600, "answers": 120}, {"length": 1100, "answers": 250}]


def run(store_path: Path, stage: str = "stage1", mix=None, regions_per_row=4, rate=1.0, data=None, **train) -> RunConfig:
    return parse_config(
        {
            "stage": stage,
            "output": "unused",
            "seed": 3,
            "model": {"vision": "tiny-vision", "language": "tiny-language", "init": "random"},
            "data": {
                "sources": [{"path": str(store_path), "rate": rate}],
                "mix": mix,
                "regions_per_row": regions_per_row,
                "buckets": BUCKETS,
                **(data or {}),
            },
            "train": {"global_batch": 4 * regions_per_row, "micro_batch": 1, **train},
            "distill": {"crop_size": 16},
        },
        "test",
    )


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch)]
    return all(x.tobytes() == y.tobytes() if isinstance(x, np.ndarray) else x == y for x, y in pairs)


def questions_in(loader: Loader, epoch: int) -> Counter:
    """(source, image, task, region) of every row of an epoch, in the order of the steps."""
    asked: Counter = Counter()
    first = loader.plan.steps(epoch)
    for step in range(first, first + loader.plan.epoch_steps(epoch)):
        e, _, rows = loader.plan.batch(step)
        assert e == epoch
        for source, image, questions in loader.plan.contents(e, rows[rows >= 0]):
            assert len([q for q in questions if q.region is not None]) <= loader.plan.K
            asked.update((source, image, q.task, q.region) for q in questions)
    return asked


def all_questions(records: list[ImageRecord], mix: dict) -> Counter:
    asked: Counter = Counter()
    for image, record in enumerate(records):
        for task in TASKS:
            if task == "global":
                asked.update([(0, image, task, None)] * (record.global_caption is not None and task in mix))
            else:
                asked.update((0, image, task, region) for region in range(len(record.regions) if task in mix else 0))
    return asked


@pytest.mark.parametrize("regions_per_row", [1, 3, 8])
@pytest.mark.parametrize("mix", [{"global": 1, "bbox2caption": 1}, dict.fromkeys(TASKS, 1), {"global": 1}, {"caption2bbox": 1}])
def test_an_epoch_asks_every_question_once(store, records, vision, chat, regions_per_row, mix):
    loader = Loader(run(store.path, mix=mix, regions_per_row=regions_per_row), vision, chat, 0, 1)
    for epoch in (0, 1):
        assert questions_in(loader, epoch) == all_questions(records, mix)


def test_sources_are_mixed_each_at_its_rate(store, records, tmp_path, vision, chat):
    write_store([random_record(f"r{i}", 6, i) for i in range(50)], tmp_path / "second")
    sources = [{"path": str(store.path), "rate": 0.0}, {"path": str(tmp_path / "second")}]
    asked = questions_in(Loader(run(store.path, data={"sources": sources}), vision, chat, 0, 1), 0)
    assert sum(n for (source, _, task, _), n in asked.items() if source == 1 and task == "bbox2caption") == 300
    assert {task for source, _, task, _ in asked if source == 0} == {"global"}  # rates are of region questions
    assert sum(n for (source, *_), n in asked.items() if source == 0) == store.globals


def test_epochs_differ_in_order(store, vision, chat):
    loader = Loader(run(store.path), vision, chat, 0, 1)
    steps = loader.plan.epoch_steps(0)
    first, second = (np.concatenate([loader.plan.batch(s + e * steps)[2] for s in range(steps)]) for e in (0, 1))
    assert sorted(first) == sorted(second) and first.tolist() != second.tolist()


def test_shares_ask_their_part_anew_in_every_epoch(tmp_path, vision, chat):
    write_store([random_record(f"r{i}", 6, i) for i in range(200)], tmp_path / "s")
    mix = {"global": 0.5, "bbox2caption": 1.0, "caption2bbox": 0.2}
    loader = Loader(run(tmp_path / "s", mix=mix, rate=0.5), vision, chat, 0, 1)
    epochs = [questions_in(loader, epoch) for epoch in range(3)]
    for asked in epochs:
        assert max(asked.values()) == 1
        count = Counter(task for _, _, task, _ in asked)
        for task, share, available in (("global", 0.5, 200), ("bbox2caption", 0.5, 1200), ("caption2bbox", 0.1, 1200)):
            assert abs(count[task] - share * available) < 5 * (available * share * (1 - share)) ** 0.5
    assert epochs[0] != epochs[1] != epochs[2]
    again = Loader(run(tmp_path / "s", mix=mix, rate=0.5), vision, chat, 0, 1)
    assert questions_in(again, 2) == epochs[2]  # also without the epochs before it


def test_hash_is_splitmix64():
    """The generator's published first outputs for seed 0; keys give other, evenly spread streams."""
    assert splitmix64(np.arange(3)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    streams = [splitmix64(np.arange(10_000), *key) for key in ((1, 2), (2, 1), (1, 2, 0), (3,))]
    assert len(set(np.concatenate(streams).tolist())) == 40_000
    for stream in streams:
        assert abs((stream >> np.uint64(63)).mean() - 0.5) < 0.02


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_ranks_share_out_what_one_rank_reads(store, vision, chat, stage):
    """Every step: the rows are the same for any number of ranks and any micro-batch, and so is what they leave out; the ranks
    have the same shapes in the same order. Some rows are longer than the largest bucket, whoever is beside them."""
    short = [{"length": 300, "answers": 60}, {"length": 600, "answers": 120}]

    def loaders(world: int, micro_batch: int) -> list[Loader]:
        config = run(store.path, stage, data={"buckets": short}, micro_batch=micro_batch)
        return [Loader(config, vision, chat, rank, world) for rank in range(world)]

    one = list(loaders(1, 1)[0].batches())
    shapes, skipped = Counter(), 0
    for world, micro_batch in ((2, 1), (4, 1), (1, 4), (2, 2)):
        for whole, *ranks in zip(one, *(loader.batches() for loader in loaders(world, micro_batch)), strict=True):
            by_rank = [[b.token_ids_BS.shape for b in batches] for batches in ranks]
            assert by_rank == [by_rank[0]] * world
            shapes.update(by_rank[0])
            batches = [b for rank in ranks for b in rank]
            assert sorted(map(unpadded, rows_of(batches))) == sorted(map(unpadded, rows_of(whole)))
            named = sorted(s for b in batches for s in b.skipped)
            assert named == sorted(s for b in whole for s in b.skipped)
            skipped += len(named)
    assert skipped and {length for _, length in shapes} == {300, 600} and {rows for rows, _ in shapes} == {1, 2, 4}


def rows_of(batches: list[Batch]) -> list[Batch]:
    """Batches cut into batches of one row."""
    return [
        replace(batch, **{k: v[row : row + 1] for k, v in vars(batch).items() if isinstance(v, (np.ndarray, tuple)) and len(v)})
        for batch in batches
        for row in range(len(batch.record_ids))
    ]


def unpadded(row: Batch) -> tuple:
    """What a row holds, whatever its bucket."""
    used, supervised = row.segments_BS[0] >= 0, row.answer_weights_BA[0] > 0
    text = [row.token_ids_BS[0, used], row.positions_BS[0, used], row.segments_BS[0, used]]
    text += [row.answer_positions_BA[0, supervised], row.answer_targets_BA[0, supervised]]
    image = [row.pixels_B3RR, row.image_positions_BN, row.boxes_BK4, row.box_weights_BK, row.crops_BK3rr]
    return row.record_ids, *(array.tobytes() for array in text + image)


def many(tmp_path: Path) -> tuple[list[dict], Path]:
    """Sources of 600 images of 0 to 4 regions and of 150 of 8 without a global caption, whose texts are longer."""
    first = [random_record(f"r{i}", i % 5, i) for i in range(600)]
    write_store(first, tmp_path / "first")
    write_store([random_record(f"t{i}", 8, i, False, words=12) for i in range(150)], tmp_path / "second")
    return [{"path": str(tmp_path / "first")}, {"path": str(tmp_path / "second"), "rate": 0.5}]


@pytest.mark.parametrize("stage, regions_per_row, mix, buckets", [
    ("stage1", 1, None, (240, 280, 320)),
    ("stage2", 1, {"global": 1.0, "caption2bbox": 0.4}, (240, 280, 320)),
    ("stage1", 4, {"global": 0.5, "bbox2caption": 1.0, "caption2bbox": 0.3}, (420, 600, 800)),
])  # fmt: skip
def test_every_step_holds_tasks_and_sources_in_their_shares(tmp_path, vision, chat, stage, regions_per_row, mix, buckets):
    """Within what plain sampling would give, though lengths are grouped (those of packed rows follow from what they ask)."""
    data = {"sources": many(tmp_path), "buckets": [{"length": length, "answers": length // 2} for length in buckets]}
    config = run("", stage, mix=mix, regions_per_row=regions_per_row, data=data, global_batch=32 * regions_per_row)
    plan = Loader(config, vision, chat, 0, 1).plan
    counts, lengths = [], []
    for step in range(plan.epoch_steps(0) - 1):  # all but the one that is filled up
        _, row_buckets, rows = plan.batch(step)
        assert (rows >= 0).all() and (np.diff(row_buckets) >= 0).all()
        lengths.append(row_buckets)
        asked = Counter((source, q.task) for source, _, questions in plan.contents(0, rows) for q in questions)
        counts.append(asked)
    total = sum(counts, Counter())
    assert len(counts) > 8 and len(total) >= 3
    assert regions_per_row > 1 or np.mean(lengths, 1).std() > 1.5 * np.std(lengths) / 32**0.5
    for kind, number in total.items():
        share = number / total.total()
        off = [(c[kind] / c.total() - share) / (share * (1 - share) / c.total()) ** 0.5 for c in counts]
        assert max(map(abs, off)) < 3, (kind, off)
        assert np.std(off) < 1.2, kind


def test_conversations_without_an_image_are_in_every_step_in_their_share(tmp_path, vision, chat):
    """They are shorter than all others: an order by length alone would put them into steps of their own."""
    trees = []
    for i in range(480):
        texts = "<image>\nWhat is it?" if i % 3 else "Who?", "A cup.", *(["Red?", "Blue, I think."] * (i % 4))
        trees.append(spoken(f"t{i}", *texts, image="a.png" if i % 3 else None))
    build_conversations(*write_spoken(tmp_path, trees), tmp_path / "store")
    buckets = {"buckets": [{"length": n, "answers": n} for n in (120, 200, 400)]}
    config = run(tmp_path / "store", "sft", data=buckets, global_batch=24, regions_per_row=1)
    plan = Loader(config, vision, chat, 0, 1).plan
    for step in range(plan.epoch_steps(0)):
        images = np.array([image for _, image, _ in plan.contents(0, plan.batch(step)[2])])
        assert abs((plan.stores[0].sizes[images, 0] == 0).sum() - 8) <= 1
    assert len({tuple(plan.batch(step)[1]) for step in range(plan.epoch_steps(0))}) > 1


def test_only_an_epochs_last_step_is_filled_up(store, records, vision, chat):
    plan = Loader(run(store.path, regions_per_row=1, global_batch=128), vision, chat, 0, 1).plan
    filled = [int((plan.batch(step)[2] < 0).sum()) for step in range(plan.steps(2))]
    ends = [plan.steps(1) - 1, plan.steps(2) - 1]
    assert [step for step, rows in enumerate(filled) if rows] == ends


@pytest.mark.parametrize("classes", [1, 3, 40])
def test_any_run_of_stratified_rows_holds_each_class_in_its_share(classes):
    rng = np.random.default_rng(classes)
    of = rng.integers(0, classes, 1000) ** 2 // classes
    buckets = rng.integers(0, 5, 1000)
    order = stratified(of, buckets, rng)
    assert sorted(order) == list(range(1000))
    for one in np.unique(of):
        places = np.flatnonzero(of[order] == one)
        assert (np.diff(buckets[order][places]) >= 0).all()
        expected = np.arange(1001) * len(places) / 1000
        found = np.concatenate([[0], np.cumsum(of[order] == one)])
        assert abs(found - expected).max() < 1 + len(np.unique(of)) * len(places) / 1000


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_a_step_gives_the_identical_bytes(store, vision, chat, workers):
    config = run(store.path, data={"workers": workers}, steps=20)  # more than an epoch
    loader = Loader(config, vision, chat, 1, 2)
    assert loader.plan.epoch_steps(0) < 20 == loader.steps
    whole = list(Loader(run(store.path, steps=20), vision, chat, 1, 2).batches())
    for start in (0, 15) if workers else (0, 5, 14, 19, 20):
        rest = list(Loader(config, vision, chat, 1, 2).batches(start))
        assert len(rest) == 20 - start
        assert all(same(a, b) for x, y in zip(rest, whole[start:], strict=True) for a, b in zip(x, y, strict=True))


def test_a_row_always_fits_its_bucket_and_both_buckets_are_used(store, records, vision, chat):
    """A row of the larger bucket is there because of itself or of a neighbour in its batch, never every row."""
    loader = Loader(run(store.path, mix=dict.fromkeys(TASKS, 1)), vision, chat, 0, 1)
    seen, asked = Counter(), 0
    for micro_batches in loader.batches():
        seen[micro_batches[0].token_ids_BS.shape[1]] += 1
        for batch in micro_batches:
            assert batch.skipped == ()
            asked += batch.questions
    assert set(seen) == {600, 1100} and asked == sum(all_questions(records, dict.fromkeys(TASKS, 1)).values())


def test_lengths_bound_the_packers_rows_closely(store, records, chat):
    tokenizer = train_tokenizer(["Describe the content within the box word all of image"], 330, "qwen2.5")
    for speaker in (chat, Chat(tokenizer, "qwen2.5")):
        lengths = TurnLengths(store, speaker, frozenset(TASKS))
        for image, record in enumerate(records[:10]):
            first = int(store.region_starts[image]) + image
            for number, region in enumerate(record.regions):
                for task, box in ((1, (0.123, 0.456, 0.678, 0.789)), (2, (0.123, 0.456, 0.678, 0.789)), (1, region.box)):
                    tokens, answers = lengths.of(np.array([task]), np.array([first + 1 + number]))
                    asked = question_text(TASKS[task], box, region.caption)
                    answer = speaker.answer_ids(format_box(box) if task == 2 else region.caption)
                    true = len(speaker.question_ids(asked)) + len(answer) - 1, len(answer)
                    assert true[0] <= tokens[0] and true[1] <= answers[0]
                    if box != region.box:
                        assert true == (tokens[0], answers[0])


def test_lengths_are_computed_once_per_tokenizer(store, chat, monkeypatch):
    first = text_lengths(store, chat, "answer")
    assert first[0] == len(chat.answer_ids(store.texts(0, 1)[0]))
    monkeypatch.setattr(Chat, "_lengths", lambda *_: pytest.fail("computed twice"))
    np.testing.assert_array_equal(text_lengths(store, chat, "answer"), first)


COUNT = """
import logging, os, sys, time
from granvit.data import lengths, shares
from granvit.data.chat import Chat, byte_tokenizer
from granvit.data.store import Store

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
lengths._SHARE, shares.LOG_EVERY, shares._POLL = 50, 0.1, 0.1
counted = lengths._encode

def slowly(store, chat, role, images):
    print(images[0], flush=True)
    if len(sys.argv) > 2 and images[0] > 100:
        time.sleep(60)
    time.sleep(0.05)
    yield from counted(store, chat, role, images)

lengths._encode = slowly
lengths.text_lengths(Store(sys.argv[1]), Chat(byte_tokenizer('qwen2.5'), 'qwen2.5'), 'answer')
"""


def test_shares_whose_directory_goes_before_the_first_look_are_made_again(tmp_path, monkeypatch):
    """Another process removes it once it sees the result, which this one may see later (NFS)."""
    progress = shares_module._Progress

    def gone(parts, *rest):
        monkeypatch.setattr(shares_module, "_Progress", progress)
        parts.rmdir()
        return progress(parts, *rest)

    monkeypatch.setattr(shares_module, "_Progress", gone)
    monkeypatch.setattr(shares_module, "_POLL", 0.0)
    shares_module.make_in_shares(tmp_path / "lengths.u2", [1, 1], lambda n: [bytes([n])], "two bytes")
    assert (tmp_path / "lengths.u2").read_bytes() == b"\0\1" and shares_module._Progress is progress


def test_processes_share_the_counting_and_finish_what_a_killed_one_began(tmp_path, chat):
    """The first stops for ever within a share and is killed; the second waits for it, counts the rest and joins it all."""
    write_store([random_record(f"r{i}", i % 7, i % 40) for i in range(300)], tmp_path / "store")
    script = tmp_path / "count.py"
    script.write_text(COUNT)

    def start(*arguments: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, script, tmp_path / "store", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    first = start("stops")
    begun = []
    while not begun or begun[-1] <= 100:
        begun.append(int(first.stdout.readline()))
    second = start()
    others = []
    while len(others) < 300 // 12 - len(begun):  # all that the first has not begun: shares of 12 images
        others.append(int(second.stdout.readline()))
    assert not set(others) & set(begun)
    first.kill()
    first.communicate()
    output, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert list(map(int, output.split())) == [begun[-1]]  # the others' shares stay
    assert sorted([*begun, *others]) == list(range(0, 300, 12))
    assert re.search(r"counting the tokens of .*store \(answer\), once: [\d,]+ of 1,197 \(\d+%\), [\d,]+ a second", said), said
    folder = tmp_path / "store" / "lengths"
    assert [path.suffix for path in folder.iterdir()] == [".u2"]
    shared = next(folder.iterdir()).read_bytes()
    next(folder.iterdir()).unlink()
    assert text_lengths(Store(tmp_path / "store"), chat, "answer").tobytes() == shared


@pytest.mark.parametrize("role", ["answer", "question"])
def test_shares_join_to_what_one_share_holds(store, chat, role, tmp_path, monkeypatch):
    expected = np.array(text_lengths(store, chat, role))
    shutil.copytree(store.path, tmp_path / "copy", ignore=shutil.ignore_patterns("lengths"))
    monkeypatch.setattr(lengths_module, "_SHARE", 9)
    np.testing.assert_array_equal(text_lengths(Store(tmp_path / "copy"), chat, role), expected)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_counting_is_done_all_the_same(store, chat, tmp_path, monkeypatch, number):
    expected = np.array(text_lengths(store, chat, "answer"))
    shutil.copytree(store.path, tmp_path / "copy", ignore=shutil.ignore_patterns("lengths"))
    monkeypatch.setattr(shares_module.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, "no locks here")))
    np.testing.assert_array_equal(text_lengths(Store(tmp_path / "copy"), chat, "answer"), expected)


def test_a_read_only_store_keeps_its_lengths_in_the_home_directory(store, chat, tmp_path, monkeypatch):
    expected = text_lengths(store, chat, "answer")
    monkeypatch.setenv("HOME", str(tmp_path))
    reopened = Store(store.path)
    reopened.path = Path("/proc/1/nothing-can-be-made-here")
    monkeypatch.setattr(reopened, "texts", store.texts)
    monkeypatch.setattr(Path, "mkdir", _refusing(Path.mkdir, "/proc"))
    np.testing.assert_array_equal(text_lengths(reopened, chat, "answer"), expected)
    assert list((tmp_path / ".cache" / "granvit").glob("*.u2"))


def _refusing(mkdir, prefix):
    def wrapped(self, *args, **kwargs):
        if str(self).startswith(prefix):
            raise PermissionError(13, "read-only")
        return mkdir(self, *args, **kwargs)

    return wrapped


def test_the_tail_is_filled_with_rows_of_weight_zero(store, records, vision, chat):
    loader = Loader(run(store.path, regions_per_row=1), vision, chat, 0, 1)
    rows = [i for micro_batches in loader.batches() for b in micro_batches for i in b.record_ids]
    questions = sum(all_questions(records, {"global": 1, "bbox2caption": 1}).values())
    assert sum(i != "" for i in rows) == questions and len(rows) == -(-questions // 4) * 4 > questions


def test_bad_records_are_rows_of_weight_zero_that_are_named(tmp_path, vision, chat):
    records = [random_record(f"r{i}", 3, i) for i in range(8)]
    records[3] = replace(records[3], image=records[3].image[:200])
    long = replace(records[5].regions[0], caption="x" * 2000)
    records[5] = replace(records[5], regions=(long, *records[5].regions[1:]))
    write_store(records, tmp_path / "s")
    shard = tmp_path / "s" / "shard-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[data.index(b'"id":"r6"')] ^= 1
    shard.write_bytes(data)
    loader = Loader(run(tmp_path / "s"), vision, chat, 0, 1)
    batches = [b for micro_batches in loader.batches() for b in micro_batches]
    skipped = dict(s for b in batches for s in b.skipped)
    assert skipped.pop(f"{tmp_path / 's'} image 6") == "record is damaged in its shard"
    assert skipped.pop("r3") == "image file is truncated or damaged"
    assert "does not fit" in skipped.pop("r5 region 0") and not skipped
    assert sum(b.questions for b in batches) == 6 * 4 - 1
    assert sorted(i for b in batches for i in b.record_ids if i) == [f"r{i}" for i in (0, 1, 2, 4, 5, 7)]


def test_compose_decides_what_a_row_holds(store, vision, chat):
    def text_rows(packer: Packer, record, questions, bucket) -> Batch:
        return packer.text_row(record.id, [5] * vision.patches, [q.turn(record) for q in questions], bucket)

    loader = Loader(run(store.path), vision, chat, 0, 1, compose=text_rows)
    (batch, *_) = next(loader.batches())
    assert batch.image_weights_B.tolist() == [0] and batch.questions > 0
    assert (batch.token_ids_BS[0, batch.image_positions_BN[0]] == 5).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mix": {"global": 1.5}}, "between 0 and 1.*1.5"),
        ({"data": {"buckets": [{"length": 40, "answers": 10}]}}, r"\b40\b.*\b61\b"),
        ({"data": {"buckets": [{"length": 100, "answers": 10}, {"length": 200, "answers": 5}]}}, r"data\.buckets.*\[10, 5\]"),
        ({"mix": {"global": 0.0}}, r"data\.sources.*'global': 0\.0"),
        ({"data": {"sources": [{"path": "/nowhere"}]}}, "/nowhere"),
    ],
)
def test_what_cannot_be_loaded_is_named(store, vision, chat, changes, message):
    with pytest.raises(ValueError, match=message):
        Loader(run(store.path, **changes), vision, chat, 0, 1)


def test_held_out_questions_come_in_one_shape_and_are_shared_among_ranks(store, records, vision, chat):
    tasks = ("bbox2caption", "caption2bbox")
    whole = list(held_out(store, tasks, chat, vision, 8, 10))
    assert len({prompts.token_ids_BS.shape for prompts, _ in whole}) == 1
    items = [item for _, part in whole for item in part]
    by_id = {record.id: record for record in records}
    chosen = {item[0] for item in items}
    assert len(items) == sum(2 * len(by_id[i].regions) for i in chosen) and 5 < len(chosen) <= 10
    for prompts, part in whole:
        for row, (record_id, task, question, reference, box) in enumerate(part):
            region = next(r for r in by_id[record_id].regions if r.box == box)
            assert reference == (region.caption if task == "bbox2caption" else format_box(box))
            ids = prompts.token_ids_BS[row, : prompts.lengths_B[row]].tolist()
            assert ids[chat.prefix_length(vision.patches) :] == chat.question_ids(question)
    ranks = [list(held_out(store, tasks, chat, vision, 8, 10, rank, 2)) for rank in (0, 1)]
    assert sorted(i for rank in ranks for _, part in rank for i in part) == sorted(items)


def test_reading_processes_end_with_their_parent(store, tmp_path):
    """kill -9 of the training process leaves no reader behind."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, time\n"
        "from multiprocessing import active_children\n"
        "from pathlib import Path\n"
        "from granvit.config import vision_config\n"
        "from granvit.data.chat import Chat, byte_tokenizer\n"
        "from granvit.data.loader import Loader\n"
        "from tests.data.test_loader import run\n"
        "if __name__ == '__main__':\n"
        f"    config = run(Path({str(store.path)!r}), data={{'workers': 1}}, steps=1000)\n"
        "    batches = Loader(config, vision_config('tiny-vision'), Chat(byte_tokenizer('qwen2.5'), 'qwen2.5'), 0, 1).batches()\n"
        "    next(batches)\n"
        "    print(*[child.pid for child in active_children()], flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    readers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(readers) == 1 and Path(f"/proc/{readers[0]}").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while _running(readers[0]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _running(readers[0])


def _running(pid: int) -> bool:
    """A process that has ended but that nobody has waited for (state Z) is not running."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
