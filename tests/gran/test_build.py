"""A build from sources of every format: the same stores for any number of ranks and after any interruption, all counted."""
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from granvit.data.filters import Filters
from granvit.data.gran.command import build, main
from granvit.data.gran.config import MixConfig, read_build
from granvit.data.gran.join import BUILT
from granvit.data.gran.ranks import Ranks
from granvit.data.sources import FORMATS
from granvit.data.store import Store
from granvit.data.store_writer import REFUSED
from tests.gran import small_tree
from tests.gran.fixture_tree import (
    AGAIN,
    COUNT,
    CUT,
    GONE,
    HEIGHT,
    HOLD_IMAGES,
    OUTSIDE,
    WIDTH,
    WITHOUT_BOXES,
    box_of,
    caption_of,
    write_tree,
)
from tests.gran.mpi import mpiexec

STORES = ("boxes", "plain")


def hashes(out: Path) -> dict[str, str]:
    """Of all files of the stores (with the counted tokens), of the mixes and of the report."""
    folders = [out / name for name in (*STORES, "mixes")]
    files = [*out.glob("report*"), *(path for folder in folders for path in folder.rglob("*") if path.is_file())]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    """The directory of a build by one process, and the hashes of its files."""
    out = tmp_path_factory.mktemp("built")
    assert build(read_build(tree), out, Ranks()) == [out / store for store in STORES]
    made = hashes(out)
    assert {"boxes/lengths", "plain/lengths", "mixes", "."} < {str(Path(name).parent) for name in made}
    return out, made


def test_every_record_is_written_or_counted(built):
    sources: dict = {}
    for store in STORES:
        sources |= json.loads((built[0] / store / BUILT).read_text())["sources"]
    assert sources.keys() == FORMATS.keys() and sum(found["records_read"] for found in sources.values()) >= 300
    for name, found in sources.items():
        expected = Counter({"image file is truncated or damaged": 1})
        if name not in HOLD_IMAGES and name != "folder":
            expected["image file is missing"] = 1
        if name not in WITHOUT_BOXES:
            expected["image: number of boxes"] = 1
            assert found["regions_dropped"]["box lies outside the image"] == 1
        if name == "jsonl":
            expected["image: duplicate of another one"] = len(AGAIN)
        assert found["images_dropped"] == expected, name
        assert found["records_read"] == COUNT - (name == "folder") == found["images_written"] + expected.total()
        assert found["regions_read"] == found["regions_written"] + sum(found["regions_dropped"].values())
        assert found["regions_read"] == (0 if name in WITHOUT_BOXES else COUNT)


@pytest.mark.parametrize("store", STORES)
def test_every_dropped_image_is_listed(built, store):
    """Also those of a unit that was written once more without its duplicates."""
    sources = json.loads((built[0] / store / BUILT).read_text())["sources"].values()
    dropped = sum((Counter(found["images_dropped"]) for found in sources), Counter[str]())
    listed = Counter(json.loads(line)["reason"] for line in (built[0] / store / REFUSED).read_text().splitlines())
    assert {reason: listed[reason] for reason in dropped} == dropped


@pytest.mark.parametrize("store", STORES)
def test_the_stores_hold_the_boxes_and_captions_of_every_format(built, store):
    expected = []
    for form in FORMATS:
        if (store == "plain") != (form in WITHOUT_BOXES):
            continue
        numbers = list(range(COUNT))
        if form == "folder":  # images lie in two folders in turn
            numbers = [*range(0, COUNT, 2), *range(1, COUNT, 2)]
        if form == "cord_parquet":  # and rows in two files
            numbers = [*range(0, COUNT, 2), *range(1, COUNT, 2)]
        left_out = {CUT} | (set() if form in WITHOUT_BOXES else {OUTSIDE}) | (set() if form in HOLD_IMAGES else {GONE})
        left_out |= set(AGAIN) if form == "jsonl" else set()
        expected += [(form, number) for number in numbers if number not in left_out]
    found = Store(built[0] / store)
    assert found.records == len(expected)
    for place, (form, number) in enumerate(expected):
        record, wanted = found.record(place), caption_of(form, number)
        assert (record.width, record.height) == (WIDTH, HEIGHT)
        if form in WITHOUT_BOXES:
            assert (record.global_caption, record.regions) == (wanted, ())
            continue
        (region,) = record.regions
        assert region.caption == wanted
        pixels = [value * side for value, side in zip(region.box, (WIDTH, HEIGHT, WIDTH, HEIGHT), strict=True)]
        assert pixels == pytest.approx(box_of(number), abs=0.03 if form == "docbank" else 1e-4), (form, number)  # thousandths


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_number_of_ranks_changes_nothing(tree, built, tmp_path, size):
    ranks = mpiexec(size, "--config", str(tree), "--out", str(tmp_path))
    printed = ranks.communicate(timeout=300)[0]
    assert ranks.returncode == 0, printed
    assert hashes(tmp_path) == built[1]
    assert not list(tmp_path.rglob("*partial*")) and not list(tmp_path.glob(".taken-*"))


def test_a_build_killed_anywhere_ends_with_the_same_stores(tree, built, tmp_path):
    """Killed when so many parts and units are there, when the first store is joined, and when the first mix is written."""
    finished = sorted(random.Random(16).sample(range(60), 4))
    reached = [lambda n=n: len([*tmp_path.glob("read/*/*"), *tmp_path.glob("units/*/*")]) > n for n in finished]
    reached += [lambda: any((tmp_path / store).exists() for store in STORES), lambda: any(tmp_path.glob("mixes/*.yaml")), None]
    killed = 0
    for number, condition in enumerate(reached):
        ranks = mpiexec(2, "--config", str(tree), "--out", str(tmp_path))
        while condition is not None and ranks.poll() is None:
            if condition():
                below = _below(ranks.pid)  # mpiexec's own helper, then the ranks
                one = number % 2 == 1 and len(below) == 3
                for process in [below[-1]] if one else [ranks.pid, *below]:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                break
            time.sleep(0.002)
        printed = ranks.communicate(timeout=300)[0]
        assert condition is not None or ranks.returncode == 0, printed
        killed += ranks.returncode != 0
    assert killed >= 5
    assert hashes(tmp_path) == built[1]


def _below(process: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            found += [int(child), *_below(int(child))]
    return found


def test_changed_files_are_read_again(tree, built, tmp_path):
    config = read_build(tree)
    one = {"jsonl": config.sources["jsonl"]}
    lines = tmp_path / "all.jsonl"
    shutil.copy(tree.parent / "jsonl" / "all.jsonl", lines)
    one["jsonl"].read["annotations"] = str(lines)
    config = config.model_copy(update={"sources": one})
    (store,) = build(config, tmp_path / "out", Ranks())
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "units").rglob("*")}
    build(config, tmp_path / "out", Ranks())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "units").rglob("*")} == made
    lines.write_text(lines.read_text().replace("thing 4", "thing four"))
    build(config, tmp_path / "out", Ranks())
    assert [record.regions[0].caption for record in map(Store(store).record, range(4))][3] == "thing four"


def test_nothing_of_others_is_replaced(tree, built, tmp_path, capsys):
    """A folder that is no store of a build stays, and so does a store that has sources that this build leaves out."""
    mine = tmp_path / "boxes" / "mine.jpg"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    assert main(["--config", str(tree), "--out", str(tmp_path)]) == 2
    assert f"{mine.parent}: is there and is not a store of a build" in capsys.readouterr().err and mine.read_bytes() == b"mine"
    config = read_build(tree)
    kept = {name: source for name, source in config.sources.items() if name not in ("grit", "coco")}
    without = config.model_copy(update={"sources": kept})
    with pytest.raises(ValueError, match="boxes: was built from coco, grit too, which this build leaves out"):
        build(without, built[0], Ranks())
    assert hashes(built[0]) == built[1]


def test_a_changed_filter_makes_a_source_anew_and_an_earlier_mix_goes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("granvit"), "propagate", True)
    caplog.set_level(logging.INFO, "granvit")
    config = read_build(small_tree.write_tree(tmp_path))
    before = config.model_copy(update={"mixes": {"m": MixConfig(questions={"global": "all"})}})
    natural, plain = build(before, tmp_path / "out", Ranks())
    images = Store(natural).records
    mine = tmp_path / "out" / "mixes" / "mine.yaml"
    mine.write_text("sources: []\n")
    unchanged = {path: path.stat().st_mtime_ns for path in plain.rglob("*")}
    stricter = config.sources["lines"].model_copy(update={"filters": Filters(**small_tree.SMALL, boxes={"at_least": 2})})
    build(config.model_copy(update={"sources": config.sources | {"lines": stricter}}), tmp_path / "out", Ranks())
    assert 0 < Store(natural).records < images and list(mine.parent.iterdir()) == [mine]
    assert "sources.lines is made anew" in caplog.text and "sources.tars is made anew" not in caplog.text
    assert {path: path.stat().st_mtime_ns for path in plain.rglob("*")} == unchanged


@pytest.mark.parametrize("change, named", [
    ({"read": {"format": "jsnl"}}, "did you mean 'jsonl'"),
    ({"read": {"format": "jsonl", "annotation": "a"}}, "unknown key 'annotation'"),
    ({"annotate": [{"kind": "ocrr"}]}, "did you mean 'ocr'"),
    ({"filters": {"boxes": {"above": "x"}}}, "sources.jsonl.filters.boxes.above"),
])  # fmt: skip
def test_a_mistake_in_the_configuration_is_named(tree, tmp_path, capsys, change, named):
    found = yaml.safe_load(tree.read_text())
    found["sources"]["jsonl"] |= change
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(found))
    assert main(["--config", str(path)]) == 2
    assert named in capsys.readouterr().err
