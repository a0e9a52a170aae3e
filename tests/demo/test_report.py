"""The demo's report as a whole: its two pages, complete, partial, and with odd captions."""
import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from granvit.demo import features, report
from granvit.demo.figures import _font, _spread, _wrapped
from granvit.demo.report import write_report
from granvit.page import escape_markdown
from tests.demo.toy_demo import IMAGES, ODD, REGIONS, evaluation, right, write_demo, write_run
from tests.probe.conftest import VISION

SECONDS = {"data": 5.0, "stage1": 50.0}
PICTURES = {"figure4a.png", "bbox2caption.png", "bbox2caption_worst.png", "caption2bbox.png", "caption2bbox_worst.png",
            "features_pca.png", "features_similarity.png", "times.png"}  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, and the text of the body."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.style, self._tag = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._tag = tag

    def handle_data(self, data):
        if self._tag == "style":
            self.style += data
        elif data.strip():
            self.texts.append(data)


class StubEncoder:
    """Stands for a `RegionEncoder`: features are the corners of the boxes, rotated into eight channels."""

    def features(self, pixels_B3RR, boxes_BK4, crops_BK3rr):
        assert crops_BK3rr.shape[:2] == boxes_BK4.shape[:2] and len(pixels_B3RR) == len(boxes_BK4)
        brightness = pixels_B3RR.mean((1, 2, 3))[:, None, None] / 255
        return (boxes_BK4 @ np.random.default_rng(0).standard_normal((4, 8)) + brightness).astype(np.float32), None


def _stub(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint of stage 1 that is there, and a stub for the encoders, in this process."""
    patch.setattr(report, "newest_checkpoint", lambda run: SimpleNamespace(vision=VISION, step=8))
    patch.setattr(features, "load_region_encoder", lambda *arguments: StubEncoder())
    patch.setattr(report, "features_of", lambda framework, directories, *arguments:
                  [features.patch_features(framework, directory, *arguments) for directory in directories])  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished demo, its report, and the page."""
    root = tmp_path_factory.mktemp("finished")
    write_demo(root, "stage1", "stage1_mixed", "guesser", "stage2")
    with pytest.MonkeyPatch.context() as patch:
        _stub(patch)
        path = write_report(root, "torch", SECONDS)
    assert path == root / "report.md"
    return root, path.read_text(), (root / "report.html").read_text()


def test_markdown_names_every_picture_and_html_holds_them(finished):
    root, markdown, html = finished
    named = re.findall(r"\]\((\w+\.png)\)", markdown)
    assert set(named) == PICTURES and len(named) == len(PICTURES)
    for name in named:
        assert Image.open(root / name).format == "PNG"
    page = Page(html)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4 + 12 + 10 + 12 + 10  # figures, and cards by themselves
    for attributes in images:
        assert len(attributes["alt"]) > 10
        Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2]))).load()


def test_the_page_refers_to_nothing_outside_and_runs_nothing(finished):
    page = Page(finished[2])
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "a", "base", "form"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in page.style and "@import" not in page.style


def test_odd_captions_are_shown_as_they_are(finished, tmp_path):
    """The odd caption is the only one that was answered wrongly, so it is the first of the worst."""
    root = shutil.copytree(finished[0], tmp_path / "demo")
    odd = lambda task, image, region: "nothing" if region.caption == ODD else region.caption  # noqa: E731
    (root / "stage1" / "eval" / "step_0000008.json").write_text(json.dumps(evaluation(8, odd)))
    write_report(root, "torch", SECONDS)
    page = Page((root / "report.html").read_text())
    assert ODD in page.texts
    assert any(ODD in attributes.get("alt", "") for _, attributes in page.tags)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in Page(finished[2]).tags}  # no tag from the caption


def test_markdown_is_escaped():
    assert escape_markdown("a|b <i> [x](y) `c` *d* _e_ stage1_mixed\n- f & $g$") == (
        r"a\|b \<i\> \[x\](y) \`c\` \*d\* \_e\_ stage1_mixed - f \& \$g\$"
    )


def test_tables_hold_all_columns(finished):
    _, markdown, html = finished
    lines = markdown.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| %"))
    assert lines[first].split(" | ")[1:] == [
        "start weights (before stage 1)", "guesser (no image)", "after stage 1", "stage 1 with Caption2Bbox", "after stage 2 |"
    ]  # fmt: skip
    for line in lines[first + 2 : first + 6]:
        assert len(re.findall(r"\d+\.\d \(\d+\.\d to \d+\.\d\)", line)) == 5
    assert f"{IMAGES * REGIONS} questions" in markdown and "MindSpore" not in markdown and "seed 7" in markdown
    assert markdown.index("| Aim") < markdown.index("\n## ")  # the demo prints what stands before the first section
    page = Page(html)
    marked = [attributes["class"] for tag, attributes in page.tags if tag == "td" and "class" in attributes]
    assert len(marked) == 4 and set(marked) <= {"right", "wrong"}


def test_the_small_picture_suits_the_readme(finished):
    picture = Image.open(finished[0] / "answers_small.png")
    assert picture.mode == "P" and (finished[0] / "answers_small.png").stat().st_size < 200_000
    assert picture.width > 4 * 190 and picture.height > 2 * 190


def test_the_first_report_comes_right_after_stage_1(tmp_path, monkeypatch):
    _stub(monkeypatch)
    write_demo(tmp_path, "stage1", start=False)
    write_report(tmp_path, "torch", SECONDS)
    markdown = (tmp_path / "report.md").read_text()
    head = markdown.partition("\n## ")[0]
    assert "| % | after stage 1 |" in head and "Start weights: no column" in head
    for name in ("stage 2", "guesser", "stage 1 with Caption2Bbox"):
        assert f"{name} has no evaluation yet" in head
    assert head.count("still to come |") == 6  # three aims, twice each
    assert "Still to come, with stage 2." in markdown and "features_pca.png" in markdown
    assert not (tmp_path / "caption2bbox.png").exists() and not (tmp_path / "answers_small.png").exists()


def test_an_unfinished_run_is_shown_with_its_step(tmp_path):
    write_demo(tmp_path, "stage1")
    write_run(tmp_path, "stage2", {4: right(0.5, 6)}, start=60)
    write_report(tmp_path, "torch", SECONDS)
    markdown = (tmp_path / "report.md").read_text()
    assert "stage 2, step 4 of 8 |" in markdown and "stage 2 is at step 4 of 8" in markdown
    assert "Still to come, with the checkpoint of stage 1." in markdown
    assert "worst answers after stage 2, step 4" in markdown


def test_labels_are_moved_apart_and_keep_their_order():
    heights = [50.0, 3.0, 2.0, 51.0, 90.0, 2.5]
    placed = _spread(heights, 4)
    assert placed[4] == 90 and np.mean(placed[:1] + placed[3:4]) == pytest.approx(50.5)
    in_order = [placed[i] for i in np.argsort(heights)]
    assert (np.diff(in_order) >= 4 - 1e-9).all()


def test_answers_are_wrapped_to_two_lines_of_the_pictures_width():
    font, width = _font("DejaVuSans.ttf", 13), 200
    assert _wrapped("✓ stage 1: a cup", font, width) == ["✓ stage 1: a cup"]
    text = '✗ stage 1: the word "exit" in white (0.00)'
    lines = _wrapped(text, font, width)
    assert len(lines) == 2 and " ".join(lines) == text
    for long in (text * 3, "x" * 90, f"short {'x' * 90}"):
        lines = _wrapped(long, font, width)
        assert 1 <= len(lines) <= 2 and lines[-1].endswith("…") and max(map(font.getlength, lines)) <= width
