"""A build from sources of several formats: the same stores for any number of ranks and after any interruption, all counted."""
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from granvit.data.gran.command import build, main
from granvit.data.gran.config import read_build
from granvit.data.gran.join import BUILT
from granvit.data.gran.ranks import Ranks
from granvit.data.store import Store

SMALL = {"shorter_side": {"above": 20}, "box_area": {"above": 16}}


def picture(seed: int, width: int = 48, height: int = 40, form: str = "PNG", **options) -> bytes:
    """An image of noise that no other seed resembles."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def write_tree(root: Path) -> Path:
    """Three sources in the folder `root`, 130 images with duplicates among them, and their configuration; returns its path."""
    (root / "images").mkdir(parents=True)
    lines = []
    for number in range(90):
        name = f"{number:03d}.png"
        (root / "images" / name).write_bytes(picture(number % 85))  # 85 to 89 repeat 0 to 4
        boxes = [[2, 2, 12, 12], [5, 6, 25, 20], [0, 0, 3, 3], [10, 10, 60, 20]][: number % 5]
        regions = [{"box": box, "caption": f"thing {k} of {number}"} for k, box in enumerate(boxes)]
        lines.append(json.dumps({"image": name, "regions": regions, "global": f"picture {number}"}))
    lines[7] = '{"image": "missing.png", "regions": [{"box": [1, 1, 20, 20], "caption": "gone"}]}'
    lines[8] = '{"image": "../outside.png", "regions": []}'
    lines[9] = "not JSON"
    (root / "lines.jsonl").write_text("\n".join(lines) + "\n")
    for shard in range(2):
        with tarfile.open(root / f"shard{shard}.tar", "w") as archive:
            for number in range(20):
                for ending, data in ((".png", picture(200 + 20 * shard + number)), (".txt", f"tar {number}".encode())):
                    info = tarfile.TarInfo(f"{number:04d}{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    (root / "tars").mkdir()
    for shard in range(2):
        (root / f"shard{shard}.tar").rename(root / "tars" / f"shard{shard}.tar")
    tree = {
        "out": str(root / "out"),
        "unit_images": 16,
        "sources": {
            "lines": {"store": "natural", "images": str(root / "images"), "filters": SMALL,
                      "read": {"format": "jsonl", "annotations": str(root / "lines.jsonl"), "boxes": "absolute"}},
            "tars": {"store": "plain", "read": {"format": "tar", "shards": str(root / "tars"), "captions": "txt"},
                     "filters": {**SMALL, "boxes": {}}},
        },
    }  # fmt: skip
    path = root / "build.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


class ThreadRanks(Ranks):
    """One of several ranks in one process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier):
        self.rank, self.size, self._world, self._barrier = rank, size, None, barrier

    def barrier(self) -> None:
        self._barrier.wait(60)


def hashes(*stores: Path) -> dict[str, str]:
    return {f"{store.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
            for store in stores for path in sorted(store.iterdir()) if path.is_file()}  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    return out, build(read_build(tree), out, Ranks())


@pytest.mark.parametrize("size", [2, 4])
def test_the_number_of_ranks_changes_nothing(tree, built, tmp_path, size):
    barrier = threading.Barrier(size)
    threads = [threading.Thread(target=build, args=(read_build(tree), tmp_path, ThreadRanks(rank, size, barrier)))
               for rank in range(size)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hashes(tmp_path / "natural", tmp_path / "plain") == hashes(*built[1])


def test_every_record_is_written_or_counted(built):
    _, stores = built
    natural = json.loads((stores[0] / BUILT).read_text())["sources"]["lines"]
    assert natural["records_read"] == 90
    dropped = Counter(natural["images_dropped"])
    assert dropped["image: duplicate of another one"] == 4  # 86 to 89 repeat 1 to 4; 85 and 0 have no regions
    assert dropped["image file is missing"] == dropped["path of the image leads out of the folder"] == 1
    assert dropped["line is not valid JSON"] == 1
    assert natural["images_written"] == 90 - dropped.total()
    regions = Counter(natural["regions_dropped"])
    assert natural["regions_read"] == natural["regions_written"] + regions.total()
    assert regions["region: area of the box"] and regions["box lies outside the image"]
    store = Store(stores[0])
    assert store.records == natural["images_written"] and store.regions == natural["regions_written"]
    plain = Store(stores[1])
    assert (plain.records, plain.globals, plain.regions) == (40, 40, 0)
    assert plain.record(21).image == picture(221) and plain.record(21).global_caption == "tar 1"


def test_a_build_killed_anywhere_ends_with_the_same_stores(tree, built, tmp_path):
    command = [sys.executable, "-c", "import sys; from granvit.data.gran.command import main; sys.exit(main())", "--config",
               str(tree), "--out", str(tmp_path / "out")]  # fmt: skip
    killed = 0
    for finished in (0, 1, 4, 7, None):  # kill it when so many parts and units are finished; None: not at all
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ)
        while finished is not None and process.poll() is None:
            there = [*(tmp_path / "out").glob("read/*/*"), *(tmp_path / "out").glob("units/*/*")]
            if len(there) > finished:  # with the one that is being written
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        printed = process.communicate(timeout=120)[0]
        killed += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), printed
    assert killed >= 3
    assert hashes(tmp_path / "out" / "natural", tmp_path / "out" / "plain") == hashes(*built[1])


def test_the_second_build_in_a_directory_is_refused(tree, tmp_path, capsys):
    from granvit.launch import RunLock, detect_launch

    held = RunLock(tmp_path, detect_launch())
    assert main(["--config", str(tree), "--out", str(tmp_path)]) == 2
    assert "is in use by" in capsys.readouterr().err
    held.release()


@pytest.mark.parametrize("change, named", [
    ({"read": {"format": "jsnl"}}, "did you mean 'jsonl'"),
    ({"read": {"format": "jsonl", "annotation": "a"}}, "unknown key 'annotation'"),
    ({"annotate": [{"kind": "ocrr"}]}, "did you mean 'ocr'"),
    ({"filters": {"boxes": {"above": "x"}}}, "sources.lines.filters.boxes.above"),
])  # fmt: skip
def test_a_mistake_in_the_configuration_is_named(tree, tmp_path, capsys, change, named):
    found = yaml.safe_load(tree.read_text())
    found["sources"]["lines"] |= change
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(found))
    assert main(["--config", str(path)]) == 2
    assert named in capsys.readouterr().err
