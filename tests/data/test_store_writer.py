"""Writing stores: complete or not at all."""
import errno
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from granvit.data.store import Store
from granvit.data.store_writer import check_links, join_stores, write_store
from tests.conftest import random_record


def test_a_failed_or_killed_build_leaves_no_store(tmp_path):
    def records():
        yield random_record("a", 2, 0)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        write_store(records(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

    script = (
        "import os, signal, sys; from tests.conftest import random_record; from granvit.data.store_writer import write_store\n"
        "def records():\n yield random_record('a', 2, 0)\n os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_store(records(), sys.argv[1])"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], check=False)
    assert killed.returncode == -9 and not (tmp_path / "out").exists()
    write_store([random_record("b", 2, 0)], tmp_path / "out")  # leftovers of the killed build do no harm
    assert Store(tmp_path / "out").record(0).id == "b"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_programs_own_mistakes_are_errors(tmp_path):
    record = random_record("a", 2, 0)
    inverted = replace(record.regions[1], box=(0.5, 0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="'a' region 1: box is inverted"):
        write_store([replace(record, regions=(record.regions[0], inverted))], tmp_path / "out")
    with pytest.raises(ValueError, match="caption is empty"):
        write_store([replace(record, global_caption=" ")], tmp_path / "out")


def _manifest(path):
    return json.loads((path / "manifest.json").read_text())


def _hashes_on_disk(path):
    names = [*_manifest(path)["bytes"]]
    assert set(names) == {file.name for file in path.iterdir()} - {"manifest.json"}
    return {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture
def parts(tmp_path):
    """Two stores, of several shards and of one, and an empty directory."""
    write_store([random_record(f"a{i}", 2, i) for i in range(4)], tmp_path / "a", shard_bytes=1)
    write_store([random_record("b", 3, 9)], tmp_path / "b")
    (tmp_path / "out").mkdir()
    return [tmp_path / "a", tmp_path / "b"], tmp_path / "out"


def test_the_manifest_has_the_hash_of_every_file(parts):
    stores, out = parts
    join_stores(stores, ["x", "y"], out)
    for path in (*stores, out):
        assert _manifest(path)["sha256"] == _hashes_on_disk(path)
    assert Store(out).record(4).id == "b"


def test_parts_of_an_earlier_version_have_no_hashes(parts):
    stores, out = parts
    manifest = _manifest(stores[0])
    del manifest["sha256"]
    (stores[0] / "manifest.json").write_text(json.dumps(manifest))
    join_stores(stores, ["x", "y"], out)
    assert _manifest(out)["sha256"] == _hashes_on_disk(out)


def test_the_fingerprint_tells_contents_apart(tmp_path):
    """Equal sizes do not make two stores the same; equal records do."""
    record = random_record("a", 2, 0)
    write_store([record], tmp_path / "one")
    write_store([record], tmp_path / "same")
    write_store([replace(record, global_caption=record.global_caption.upper())], tmp_path / "other")
    assert _manifest(tmp_path / "one")["bytes"] == _manifest(tmp_path / "other")["bytes"]
    assert Store(tmp_path / "one").fingerprint == Store(tmp_path / "same").fingerprint != Store(tmp_path / "other").fingerprint


def test_a_file_system_without_hard_links_is_named(parts, monkeypatch):
    stores, out = parts
    out.rmdir()
    check_links(out)
    assert list(out.iterdir()) == []

    def link(source, target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)

    monkeypatch.setattr(os, "link", link)
    remedy = "must be on one file system, with hard links"
    with pytest.raises(ValueError, match=f"{out}.*{remedy}"):
        check_links(out)
    assert list(out.iterdir()) == []
    shard = "shard-00000.array_record"
    with pytest.raises(ValueError, match=f"{out / 'x-00000.array_record'}.*{stores[0] / shard}.*not permitted.*{remedy}"):
        join_stores(stores, ["x", "y"], out)
