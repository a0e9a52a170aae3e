"""The order of the data."""
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from granvit.data.conversations import build_conversations
from granvit.data.loader import Loader
from granvit.data.sampler import splitmix64, stratified
from granvit.data.store_writer import write_store
from granvit.stages import REGION_TASKS as TASKS
from tests.conftest import random_record, spoken, write_spoken
from tests.data.test_loader import all_questions, run


def questions_in(loader: Loader, epoch: int) -> Counter:
    """(source, image, task, region) of every row of an epoch, in the order of the steps."""
    asked: Counter = Counter()
    first = loader.plan.steps(epoch)
    for step in range(first, first + loader.plan.epoch_steps(epoch)):
        e, _, rows = loader.plan.batch(step)
        assert e == epoch
        for source, image, questions in loader.plan.contents(e, rows[rows >= 0]):
            assert len([q for q in questions if q.region is not None]) <= loader.plan.regions_per_row
            asked.update((source, image, q.task, q.region) for q in questions)
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
    """Within the spread of plain sampling, although lengths are grouped (those of packed rows depend on their questions)."""
    data = {"sources": many(tmp_path), "buckets": [{"length": length, "answers": length // 2} for length in buckets]}
    config = run("", stage, mix=mix, regions_per_row=regions_per_row, data=data, global_batch=32)
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
