"""The report of a build: its numbers are those of the stores, they add up, and captions of a source are only text in it."""
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from granvit.data.filters import Filters
from granvit.data.gran.command import build
from granvit.data.gran.config import BuildConfig, read_build
from granvit.data.gran.join import BUILT
from granvit.data.gran.plots import LISTED
from granvit.data.gran.ranks import Ranks
from granvit.data.gran.report import REASONS, SAMPLE, filters_in_words, write_report
from granvit.data.store import Store
from tests.data.test_view import ODD, Page
from tests.gran.small_tree import SMALL, picture, write_tree

STORES = ("natural", "plain", "hostile")
PAPER = {"lines": {"images": 200, "regions": 1000}, "hostile": {"images": 4, "regions": 8}}


def write_sources(root: Path) -> Path:
    """The sources of the build's tests, and two more: `hostile`, whose captions are markup, and `nothing`, of which no image is
    left. Returns the configuration's path."""
    path = write_tree(root)
    tree = yaml.safe_load(path.read_text())
    for name, captions, side in (("hostile", [f"{ODD} | [x](y) #{k}" for k in range(14)], 60), ("nothing", ["a"], 10)):
        (root / name).mkdir()
        (root / name / "a.png").write_bytes(picture(900 + side, side, side))
        regions = [{"box": [k, k, k + 20, k + 20], "caption": caption} for k, caption in enumerate(captions)]
        line = {"id": f"<b>{name}</b>", "image": "a.png", "global": f"all of {ODD}", "regions": regions}
        (root / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
        read = {"format": "jsonl", "annotations": str(root / f"{name}.jsonl"), "boxes": "absolute"}
        store = "hostile" if name == "hostile" else "natural"
        tree["sources"][name] = {"store": store, "images": str(root / name), "read": read, "filters": SMALL}
    for name, paper in PAPER.items():
        tree["sources"][name] |= {"paper": paper, "category": "FLICKR30k"}
    tree["sources"]["tars"]["data_type"] = "ocr"
    tree["sources"]["lines"] |= {"where": f"from {ODD}", "licence": "CC0"}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> tuple[BuildConfig, Path]:
    root = tmp_path_factory.mktemp("sources")
    config, out = read_build(write_sources(root)), tmp_path_factory.mktemp("built")
    build(config, out, Ranks())
    write_report(config, out)
    return config, out


def table(page: Page, first: str) -> list[list[str]]:
    """The rows below the header that begins with `first`, up to the next header."""
    start = next(number for number, row in enumerate(page.rows) if " ".join(row).startswith(first))
    width = len(page.rows[start])
    rows = page.rows[start + 1 :]
    end = next((n for n, row in enumerate(rows) if len(row) != width or row[0] in ("source", "data type", "sources")), len(rows))
    return rows[:end]


def whole(text: str) -> int:
    return int(text.replace(",", ""))


def counts_of(out: Path) -> dict[str, dict]:
    return {name: counts for store in STORES
            for name, counts in json.loads((out / store / BUILT).read_text())["sources"].items()}  # fmt: skip


def test_numbers_are_those_of_the_build_and_add_up(reported):
    _, out = reported
    page, counts = Page((out / "report.html").read_text()), counts_of(out)
    assert set(counts) == {"lines", "tars", "hostile", "nothing"}
    flows = table(page, "source images read")
    assert [row[0] for row in flows] == ["lines", "tars", "hostile", "nothing", "TOTAL"]
    for name, *texts in flows[:-1]:
        read, written, dropped, _, regions_read, found, regions_written, regions_dropped, globals_written = map(whole, texts)
        own = counts[name]
        assert (read, written) == (own["records_read"], own["images_written"])
        assert (regions_read, found, regions_written) == tuple(own[f"regions_{key}"] for key in ("read", "found", "written"))
        assert read == written + dropped and regions_read + found == regions_written + regions_dropped
        assert globals_written == own["globals_written"]
    for column in range(1, len(flows[0])):
        assert whole(flows[-1][column]) == sum(whole(row[column]) for row in flows[:-1])
    assert whole(flows[3][1]) == 1 and whole(flows[3][2]) == 0  # of `nothing` one image is read and none is written
    for kind, first in (("images_dropped", "source reason number of images read"),
                        ("regions_dropped", "source reason number of regions read and found")):  # fmt: skip
        shown = {(row[0], row[1]): whole(row[2]) for row in table(page, first)}
        assert shown == {(name, reason): n for name, own in counts.items() for reason, n in own[kind].items()}
    for store, images, regions, globals_, _ in table(page, "store, beside"):
        opened = Store(out / store)
        assert [opened.records, opened.regions, opened.globals] == [whole(images), whole(regions), whole(globals_)]
    markdown = (out / "report.md").read_text()
    for row in flows:
        assert f"| {' | '.join(row)} |" in markdown


def test_the_papers_tables_have_its_counts_beside_ours(reported):
    _, out = reported
    page, counts = Page((out / "report.html").read_text()), counts_of(out)
    sources = {row[1]: row for row in table(page, "data type data source")[:4]}
    assert list(sources) == ["lines", "hostile", "nothing", "tars"]  # natural ones first
    for name, paper in PAPER.items():
        images, regions = counts[name]["images_written"], counts[name]["regions_written"]
        shares = [f"{100 * images / paper['images']:.1f}%", f"{100 * regions / paper['regions']:.1f}%"]
        published = [f"{paper['images']:,}", f"{paper['regions']:,}"]
        assert sources[name] == ["natural", name, str(images), str(regions), *published, *shares]
    assert sources["tars"] == ["OCR", "tars", "40", "0", "-", "-", "-", "-"]
    both = [sum(counts[name][key] for name in PAPER) for key in ("images_written", "regions_written")]
    flickr = next(row for row in page.rows if row[1:2] == ["FLICKR30k"])
    shares = [f"{100 * ours / paper:.1f}%" for ours, paper in zip(both, (1269, 4351), strict=True)]
    assert flickr == ["natural", "FLICKR30k", *map(str, both), "1269", "4351", *shares]
    last = next(row for row in page.rows if row[4:6] == ["29.51M", "183.55M"])
    assert last[1:4] == ["TOTAL", *map(str, both)]


def test_long_lists_of_reasons_end_with_a_sum(reported, tmp_path):
    config, out = reported
    for name in STORES:
        shutil.copytree(out / name, tmp_path / name)
    tree = json.loads((out / "natural" / BUILT).read_text())
    own = tree["sources"]["lines"]
    own["images_dropped"] = {f"reason {number:02d}": number for number in range(1, 31)}
    own["records_read"] = own["images_written"] + sum(range(1, 31))
    (tmp_path / "natural" / BUILT).write_text(json.dumps(tree))
    write_report(config, tmp_path)
    rows = table(Page((tmp_path / "report.html").read_text()), "source reason number of images read")
    shown = [(row[1], whole(row[2])) for row in rows if row[0] == "lines"]
    assert shown == [(f"reason {n:02d}", n) for n in range(30, 30 - REASONS, -1)] + [("others (20 reasons)", sum(range(1, 21)))]


def test_captions_are_text_and_nothing_outside_is_referred_to(reported):
    _, out = reported
    html = (out / "report.html").read_text()
    page = Page(html)
    known = "html head meta title style body h1 h2 h3 p figure img figcaption div table tr th td small span b pre details summary"
    assert {tag for tag, _ in page.tags} <= set(known.split())
    for tag, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on") or name in ("href", "srcset", "action")}
        if "src" in attributes:
            assert tag == "img" and re.match("data:image/(png|jpeg);base64,", attributes["src"])
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    assert "url(" not in style and "@import" not in style
    assert page.text.count(f"from {ODD}") == page.text.count(f"all of {ODD}") == page.text.count("<b>hostile</b>") == 1
    assert page.text.count(f" {ODD} | [x](y) #") == LISTED
    assert "<img" not in (out / "report.md").read_text().replace("\\<", "")


def test_samples_have_the_captions_of_their_boxes(reported):
    _, out = reported
    html = (out / "report.html").read_text()
    page, titles = Page(html), re.findall(r"<b>(.*?)</b>", html)
    records = {record.id: record for name in ("natural", "plain") for record in _records(out / name)}
    assert len(page.pictures()) == 1 + 2 * SAMPLE + 1 and len(set(titles)) == 2 * SAMPLE + 1
    assert sum(len(records[title].regions) for title in titles[:-1]) > SAMPLE
    for title in titles[:-1]:
        for region in records[title].regions:
            assert region.caption in page.text
    for name in STORES:
        assert Image.open(out / f"report_sample_{name}.jpg").width > 1000


def _records(path: Path):
    store = Store(path)
    return map(store.record, range(store.records))


def test_the_report_follows_from_the_stores_alone(reported, tmp_path):
    config, out = reported
    for name in STORES:
        shutil.copytree(out / name, tmp_path / name)
    write_report(config, tmp_path)
    files = sorted(path.name for path in out.glob("report*"))
    assert len(files) == 6
    for name in files:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_bounds_say_whether_they_include_their_limit():
    shown = filters_in_words(Filters.model_validate({"box_area": {"above": 16, "at_most": "1/3"}, "boxes": {"below": 9}}))
    assert "shorter side of the image, pixels: above 448 (exclusive);" in shown
    assert "aspect ratio of a box: at least 1/3 (inclusive) and at most 3 (inclusive);" in shown
    assert "original image: above 16 (exclusive) and at most 1/3 (inclusive);" in shown
    assert "boxes of an image: below 9 (exclusive);" in shown and "region's caption: any;" in shown


def test_a_build_that_is_not_finished_is_named(reported, tmp_path):
    config, _ = reported
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "natural" / BUILT))):
        write_report(config, tmp_path)
