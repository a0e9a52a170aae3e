"""The data pipeline."""
import os
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
from granvit.data.batch import Batch, Packer
from granvit.data.loader import Loader
from granvit.data.records import ImageRecord
from granvit.data.store_writer import write_store
from granvit.stages import REGION_TASKS as TASKS
from tests.conftest import random_record

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
            "train": {"global_batch": 4, "micro_batch": 1, **train},
            "distill": {"crop_size": 16},
        },
        "test",
    )


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch)]
    return all(x.tobytes() == y.tobytes() if isinstance(x, np.ndarray) else x == y for x, y in pairs)


def all_questions(records: list[ImageRecord], mix: dict) -> Counter:
    asked: Counter = Counter()
    for image, record in enumerate(records):
        for task in TASKS:
            if task == "global":
                asked.update([(0, image, task, None)] * (record.global_caption is not None and task in mix))
            else:
                asked.update((0, image, task, region) for region in range(len(record.regions) if task in mix else 0))
    return asked


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_ranks_share_out_what_one_rank_reads(store, vision, chat, stage):
    """Every step: the rows, and what is left out of them, are the same for any number of ranks and any micro-batch; the ranks
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
    """The contents of a row, without its padding."""
    used, supervised = row.segments_BS[0] >= 0, row.answer_weights_BA[0] > 0
    text = [row.token_ids_BS[0, used], row.positions_BS[0, used], row.segments_BS[0, used]]
    text += [row.answer_positions_BA[0, supervised], row.answer_targets_BA[0, supervised]]
    image = [row.pixels_B3RR, row.image_positions_BN, row.boxes_BK4, row.box_weights_BK, row.crops_BK3rr]
    return row.record_ids, *(array.tobytes() for array in text + image)


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
    """A row gets the larger bucket only if it, or another row of its batch, needs it."""
    loader = Loader(run(store.path, mix=dict.fromkeys(TASKS, 1)), vision, chat, 0, 1)
    seen, asked = Counter(), 0
    for micro_batches in loader.batches():
        seen[micro_batches[0].token_ids_BS.shape[1]] += 1
        for batch in micro_batches:
            assert batch.skipped == ()
            asked += batch.questions
    assert set(seen) == {600, 1100} and asked == sum(all_questions(records, dict.fromkeys(TASKS, 1)).values())


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
    """A zombie (state Z) is not running."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
