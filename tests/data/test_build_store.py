"""Building region stores, and what is refused."""
import json

import pytest

from granvit.data.build_store import build_store, main
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from tests.conftest import encoded_image, random_record


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
    assert "exists already" in capsys.readouterr().err
    assert main(["absent.jsonl", *arguments[1:]]) == 2
    assert "no such file" in capsys.readouterr().err


def test_nothing_usable_leaves_nothing(sources):
    (sources / "empty.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"no usable image.*line has no image path"):
        build_store(sources / "empty.jsonl", sources / "images", sources / "out")
    assert not list(sources.glob("out*"))


def test_verify_names_the_files_that_differ(tmp_path, capsys):
    path = tmp_path / "store"
    write_store([random_record(f"r{i}", 2, i) for i in range(3)], path, shard_bytes=1)

    def verify() -> int:
        with pytest.raises(SystemExit) as ended:
            main(["--verify", str(path)])
        return ended.value.code

    assert verify() == 0
    total = sum(file.stat().st_size for file in path.iterdir() if file.name != "manifest.json")
    assert f"{path}: all files have the contents that were written ({total:,} bytes)" in capsys.readouterr().out

    texts = path / "texts.bin"
    texts.write_bytes(texts.read_bytes().upper())
    shard = path / "shard-00001.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    (path / "shard-00002.array_record").unlink()
    assert verify() == 2
    printed = capsys.readouterr()
    size = shard.stat().st_size
    assert [line for line in printed.out.splitlines() if line] == [
        f"{shard}: has {size} bytes instead of {size + 1}",
        f"{path / 'shard-00002.array_record'}: is missing",
        f"{texts}: has other contents than its SHA-256 in manifest.json",
    ]
    assert "damaged files: 3" in printed.err


def test_verify_needs_hashes(tmp_path, capsys):
    write_store([random_record("r", 2, 0)], tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    del manifest["sha256"]
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    for path, message in ((tmp_path / "store", "has no hashes"), (tmp_path / "absent", "this is not a store")):
        with pytest.raises(SystemExit) as ended:
            main(["--verify", str(path)])
        assert ended.value.code == 2 and message in capsys.readouterr().err
