"""Reading region stores, and refusing damaged ones."""
import errno
import hashlib
import json
import os
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from granvit.data import store as store_module
from granvit.data.store import OPEN_SHARDS, Store, read_shards
from granvit.data.store_writer import write_store
from tests.conftest import random_record


def test_reads_back_what_was_written(store, records):
    assert len(list(store.path.glob("*.array_record"))) > 1
    assert (store.records, store.regions) == (len(records), sum(len(record.regions) for record in records))
    assert store.globals == sum(record.global_caption is not None for record in records)
    reopened = pickle.loads(pickle.dumps(store))
    for index in (0, len(records) - 1, *range(len(records))):
        assert reopened.record(index) == records[index]
    texts = store.texts(0, store.records + store.regions)
    assert texts == [t for r in records for t in (r.global_caption or "", *(region.caption for region in r.regions))]
    first = int(store.region_starts[5]) + 5
    assert store.texts(first, first + 1) == [records[5].global_caption or ""]


def _manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def _hashes(path, changes):
    _manifest(path, sha256=json.loads((path / "manifest.json").read_text())["sha256"] | changes)


def _entry(path, name, index, value):
    numbers = np.fromfile(path / name, "<i8")
    numbers[index] = value
    numbers.tofile(path / name)


def _cut(path, name):
    (path / name).write_bytes((path / name).read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: [f.unlink() for f in p.iterdir()], "granvit.data.build_store"),
        (lambda p: (p / "manifest.json").unlink(), r"manifest\.json.*granvit\.data\.build_store"),
        (lambda p: (p / "manifest.json").write_text("{"), r"manifest\.json.*granvit\.data\.build_store"),
        (lambda p: (p / "manifest.json").write_text("[]"), r"manifest\.json.*granvit-regions"),
        (lambda p: _manifest(p, format="webdataset"), r"manifest\.json.*granvit-regions"),
        (lambda p: _manifest(p, version=2), r"version 2\b.*\b1\b"),
        (lambda p: _cut(p, "shard-00000.array_record"), r"shard-00000\.array_record.* \d+ .* \d+ "),
        (lambda p: _cut(p, "text_ends.u8"), r"text_ends\.u8"),
        (lambda p: (p / "texts.bin").unlink(), r"texts\.bin"),
        (lambda p: _manifest(p, images=3), r"\b3\b.*'images'.*\b4\b"),
        (lambda p: _manifest(p, regions=11), "region_starts"),
        (lambda p: _manifest(p, regions="12"), r"manifest\.json: regions"),
        (lambda p: _manifest(p, bbox_frames="image"), "'bbox_frames'.*'bbox_frame'"),
        (lambda p: _manifest(p, shards=[{"fil": "a", "images": 4}]), "'shards.0.fil'.*'shards.0.file'"),
        (lambda p: _manifest(p, shards=[{"file": "../x", "images": 4}]), r"'\.\./x'"),
        (lambda p: _manifest(p, shards=[{"file": "x", "images": 4}]), "'x'"),
        (lambda p: _manifest(p, bytes={}), "'shard-00000.array_record'"),
        (lambda p: _hashes(p, {"texts.bin": "0" * 63}), r"sha256\.texts\.bin"),
        (lambda p: _hashes(p, {"texts.bin": "G" * 64}), r"sha256\.texts\.bin"),
        (lambda p: _hashes(p, {"../x": "0" * 64}), r"'\.\./x' under only one"),
        (lambda p: _manifest(p, sha256={"sizes.u4": "0" * 64}), "'region_starts.i8' under only one"),
        (lambda p: _entry(p, "region_starts.i8", 2, 1 << 40), "region_starts.i8"),
        (lambda p: _entry(p, "text_ends.u8", 3, 0), "text_ends.u8"),
    ],
)
def test_a_store_that_cannot_be_used_says_where_and_what_to_do(tmp_path, damage, message):
    path = tmp_path / "store"
    write_store([random_record(f"r{i}", 3, i) for i in range(4)], path)
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        Store(path)
    assert str(path) in str(caught.value)


def test_a_store_that_is_not_there():
    with pytest.raises(ValueError, match=r"/nowhere.*granvit\.data\.build_store"):
        Store("/nowhere")


def test_a_flipped_byte_is_noticed(tmp_path):
    write_store([random_record(f"r{i}", 3, i) for i in range(4)], tmp_path / "store")
    shard = tmp_path / "store" / "shard-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[data.index(b'"id":"r2"')] ^= 1
    shard.write_bytes(data)
    store = Store(tmp_path / "store")
    assert store.record(1).id == "r1"
    with pytest.raises(ValueError, match="damaged"):
        store.record(2)


def test_a_store_without_hashes_keeps_its_fingerprint(tmp_path):
    """Runs and their checkpoints have recorded it."""
    path = tmp_path / "store"
    write_store([random_record("r", 3, 0)], path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    store = Store(path)
    assert store.record(0).id == "r"
    assert store.fingerprint == hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()[:16]


def _open_shards(path):
    names = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(name.startswith(f"{path}/shard-") for name in names)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """Records, and a store with a shard for each."""
    path = tmp_path_factory.mktemp("many") / "store"
    records = [random_record(f"r{i}", 1, i) for i in range(OPEN_SHARDS + 20)]
    write_store(records, path, shard_bytes=1)
    return records, Store(path)


def test_few_shards_are_open_at_a_time(many_shards):
    records, store = many_shards
    for index in (*range(len(records)), 0, len(records) - 1):
        assert store.record(index) == records[index]
    assert _open_shards(store.path) == OPEN_SHARDS


def test_threads_share_the_open_shards(many_shards, monkeypatch):
    records, store = many_shards
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 2)
    store = Store(store.path)
    order = np.random.default_rng(0).integers(0, len(records), 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(store.record, order))
    assert found == [records[index] for index in order]


@contextmanager
def _no_descriptor_left():
    free = os.dup(0)
    os.close(free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_too_many_open_files_are_not_damaged_data(many_shards):
    """A `ValueError` would be counted, and the record left out of training."""
    records, store = many_shards
    store = Store(store.path)
    shard = store.path / "shard-00003.array_record"
    with _no_descriptor_left(), pytest.raises(OSError, match=f"{shard}: too many open files.*raise `ulimit -n`") as caught:
        store.record(3)
    assert caught.value.errno == errno.EMFILE
    with _no_descriptor_left(), pytest.raises(OSError, match="too many open files"):
        next(read_shards([(shard, 1)]))
    assert store.record(3) == records[3]  # the failure is not kept
