"""Building, reading and refusing region stores."""
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from granvit.data.store import Store, build_store, main, write_store
from tests.conftest import encoded_image, random_record


def test_reads_back_what_was_written(store, records):
    assert len(list(store.path.glob("*.array_record"))) > 1
    assert (store.images, store.regions) == (len(records), sum(len(record.regions) for record in records))
    assert store.globals == sum(record.global_caption is not None for record in records)
    reopened = pickle.loads(pickle.dumps(store))
    for index in (0, len(records) - 1, *range(len(records))):
        assert reopened.record(index) == records[index]
    texts = store.texts(0, store.images + store.regions)
    assert texts == [t for r in records for t in (r.global_caption or "", *(region.caption for region in r.regions))]
    first = int(store.region_starts[5]) + 5
    assert store.texts(first, first + 1) == [records[5].global_caption or ""]


@pytest.fixture
def sources(tmp_path):
    """A JSON-lines file of four good and eight bad lines, and the images."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(encoded_image(40, 20))
    (images / "broken.png").write_bytes(encoded_image(40, 20)[:200])
    (images / "text.png").write_text("<html>")
    (images / "huge.png").write_bytes(encoded_image(200, 200))
    good = {"box": [4, 2, 20, 18], "caption": "a cup, «rouge»"}
    lines = [
        {"image": "a.png", "id": "first", "global": "A desk.", "regions": [good, {"box": [20, 2, 4, 18], "caption": "inverted"}]},
        {"image": "a.png", "global": "A desk.", "source": "other keys are ignored"},
        {"image": "a.png", "id": None, "regions": [good]},
        {"image": "a.png", "id": 7, "global": " ", "regions": [good]},
        {"image": "broken.png", "regions": [good]},
        {"image": "text.png", "regions": [good]},
        {"image": "huge.png", "regions": [good]},
        {"image": "absent.png", "regions": [good]},
        {"image": "a.png"},
        {"regions": [good]},
        ["a.png"],
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n{not json\n")
    return tmp_path


def test_bad_lines_are_counted_by_reason_and_the_first_named(sources):
    summary = build_store(sources / "lines.jsonl", sources / "images", sources / "out", unit="absolute", max_pixels=10_000)
    assert (summary.images, summary.regions, summary.globals) == (4, 3, 2)
    assert summary.refused == {
        "box is inverted": 1,
        "global caption is empty": 1,
        "image file is truncated or damaged": 1,
        "not an image file": 1,
        "image has more pixels than data.max_pixels (of a builder: --max-pixels)": 1,
        "image file cannot be read (FileNotFoundError)": 1,
        "no region and no global caption": 1,
        "line has no image path": 2,
        "line is not valid JSON": 1,
    }
    assert summary.first_refused[0] == "first region 1: box is inverted"
    assert len(summary.first_refused) == 10
    store = Store(sources / "out")
    assert [store.record(i).id for i in range(4)] == ["first", "a.png", "a.png", "7"]
    assert store.record(0).regions[0].box == (0.1, 0.1, 0.5, 0.9)
    assert store.record(0).regions[0].caption == "a cup, «rouge»"


def test_everything_refused_is_named_beside_the_data(sources, capsys):
    """More than the ten that are printed, in the order of the input; a name that is no Unicode does not stop the build."""
    with open(sources / "lines.jsonl", "a") as file:
        file.write('{"image": "text.png", "id": "\\ud800"}\n')
    places = [str(sources / name) for name in ("lines.jsonl", "images", "out")]
    assert main([*places, "--boxes", "absolute", "--max-pixels", "10000"]) == 0
    printed = capsys.readouterr().out
    refused = [json.loads(line) for line in (sources / "out" / "refused.jsonl").read_text().splitlines()]
    assert len(refused) == 11 and f"all 11: {sources / 'out' / 'refused.jsonl'}" in printed
    assert refused[0] == {"what": "first region 1", "reason": "box is inverted"}
    assert refused[-2:] == [
        {"what": "line 13", "reason": "line is not valid JSON"},
        {"what": "?", "reason": "not an image file"},
    ]
    write_store([random_record("a", 2, 0)], sources / "good")
    assert not (sources / "good" / "refused.jsonl").exists()


def test_the_command_prints_counts_and_refuses_to_overwrite(sources, capsys):
    arguments = [str(sources / name) for name in ("lines.jsonl", "images", "out")] + ["--boxes", "absolute"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "5 images, 4 regions, 2 global captions" in printed and "refused 1: box is inverted" in printed
    assert main(arguments) == 2
    assert str(sources / "out") in capsys.readouterr().err
    assert main(["absent.jsonl", *arguments[1:]]) == 2
    assert "absent.jsonl" in capsys.readouterr().err


def test_nothing_usable_leaves_nothing(sources):
    (sources / "empty.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="no image path"):
        build_store(sources / "empty.jsonl", sources / "images", sources / "out")
    assert not list(sources.glob("out*"))


def test_a_failed_or_killed_build_leaves_no_store(tmp_path):
    def records():
        yield random_record("a", 2, 0)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        write_store(records(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

    script = (
        "import os, signal, sys; from tests.conftest import random_record; from granvit.data.store import write_store\n"
        "def records():\n yield random_record('a', 2, 0)\n os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_store(records(), sys.argv[1])"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], check=False)
    assert killed.returncode == -9 and not (tmp_path / "out").exists()
    write_store([random_record("b", 2, 0)], tmp_path / "out")  # what the killed one left does not stand in the way
    assert Store(tmp_path / "out").record(0).id == "b"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_programs_own_mistakes_are_errors(tmp_path):
    record = random_record("a", 2, 0)
    inverted = replace(record.regions[1], box=(0.5, 0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"'a' region 1.*inverted"):
        write_store([replace(record, regions=(record.regions[0], inverted))], tmp_path / "out")
    with pytest.raises(ValueError, match="caption is empty"):
        write_store([replace(record, global_caption=" ")], tmp_path / "out")


def _manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def _entry(path, name, index, value):
    numbers = np.fromfile(path / name, "<i8")
    numbers[index] = value
    numbers.tofile(path / name)


def _cut(path, name):
    (path / name).write_bytes((path / name).read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: [f.unlink() for f in p.iterdir()], "granvit.data.store"),
        (lambda p: (p / "manifest.json").unlink(), r"manifest\.json.*granvit\.data\.store"),
        (lambda p: (p / "manifest.json").write_text("{"), r"manifest\.json.*granvit\.data\.store"),
        (lambda p: (p / "manifest.json").write_text("[]"), r"manifest\.json.*granvit-regions"),
        (lambda p: _manifest(p, format="webdataset"), r"manifest\.json.*granvit-regions"),
        (lambda p: _manifest(p, version=2), r"version 2\b.*\b1\b"),
        (lambda p: _cut(p, "shard-00000.array_record"), r"shard-00000\.array_record.* \d+ .* \d+ "),
        (lambda p: _cut(p, "text_ends.u8"), r"text_ends\.u8"),
        (lambda p: (p / "texts.bin").unlink(), r"texts\.bin"),
        (lambda p: _manifest(p, images=3), r"\b3\b.*'images'.*\b4\b"),
        (lambda p: _manifest(p, regions=11), "text side"),
        (lambda p: _manifest(p, regions="12"), r"manifest\.json: regions"),
        (lambda p: _manifest(p, bbox_frames="image"), "'bbox_frames'.*'bbox_frame'"),
        (lambda p: _manifest(p, shards=[{"fil": "a", "images": 4}]), "'shards.0.fil'.*'shards.0.file'"),
        (lambda p: _manifest(p, shards=[{"file": "../x", "images": 4}]), r"'\.\./x'"),
        (lambda p: _manifest(p, shards=[{"file": "x", "images": 4}]), "'x'"),
        (lambda p: _manifest(p, bytes={}), "'shard-00000.array_record'"),
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
    with pytest.raises(ValueError, match=r"/nowhere.*granvit\.data\.store"):
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
