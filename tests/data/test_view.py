"""Drawing records of a store: the right records, texts as training asks them, boxes where they are, and nothing that escapes."""
import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from granvit.data.batch import Question
from granvit.data.conversations import build_conversations
from granvit.data.prompts import format_box
from granvit.data.records import ImageRecord, Region
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from granvit.data.view import DRAWN, find_ids, main, marked_boxes, page, questions, sheet
from granvit.pictures import HEIGHT, WIDTH, draw_numbered_boxes, number_colour
from tests.conftest import encoded_image, spoken, write_spoken

ODD = '<img src="https://evil.example/x.png" onerror="alert(1)">'


class Page(HTMLParser):
    """Tags with their attributes, all text, and the tables as lists of rows of texts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def grey_record(name: str, boxes: list, width: int = 200, height: int = 100) -> ImageRecord:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(buffer, "PNG")
    regions = tuple(Region(box, f"caption {number}") for number, box in enumerate(boxes, 1))
    return ImageRecord(name, width, height, buffer.getvalue(), None, regions)


def many_boxes(count: int) -> list:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.9, (count, 2))
    return [(x, y, x + 0.08, y + 0.05) for x, y in corners.tolist()]


def test_a_page_has_every_question_as_training_asks_it(store, records):
    shown = Page(page(store, [0, 5], "the first ones"))
    for record in (records[0], records[5]):
        asked = [Question("global")] * (record.global_caption is not None)
        asked += [Question(task, n) for task in ("bbox2caption", "caption2bbox") for n in range(len(record.regions))]
        assert len(asked) == len(list(questions(record)))
        for question in asked:
            number = "" if question.region is None else str(question.region + 1)
            assert [question.task, number, *question.turn(record)] in shown.rows
        for number, region in enumerate(record.regions, 1):
            x1, y1, x2, y2 = region.box
            size = f"{(x2 - x1) * record.width:.0f}\xa0x\xa0{(y2 - y1) * record.height:.0f}"
            assert [str(number), region.caption, format_box(region.box), size] in shown.rows
        assert record.id in shown.text and f"{record.width} x {record.height} pixels" in shown.text
    assert len(shown.pictures()) == 2


def test_a_page_refers_to_nothing_outside_and_escapes_captions(tmp_path):
    region = Region((0, 0, 0.5, 0.5), f"{ODD} &amp;")
    record = ImageRecord("<script>1</script>", 40, 30, encoded_image(40, 30), f"a {ODD}", (region,))
    write_store([record], tmp_path / "store")
    html = page(Store(tmp_path / "store"), [0], "the first ones")
    shown = Page(html)
    known = "html head meta title style body h1 h2 p figure img figcaption div table tr th td span details summary"
    assert {tag for tag, _ in shown.tags} <= set(known.split())
    for tag, attributes in shown.tags:
        assert not {name for name in attributes if name.startswith("on") or name in ("href", "srcset", "action")}
        if "src" in attributes:
            assert tag == "img" and attributes["src"].startswith("data:image/jpeg;base64,")
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    assert "url(" not in style and "@import" not in style
    assert shown.text.count(f"{ODD} &amp;") == 3  # legend, Bbox2Caption's answer, Caption2Bbox's question
    assert shown.text.count(record.id) == 1


def test_line_breaks_of_a_caption_are_kept(tmp_path):
    record = ImageRecord("a", 40, 30, encoded_image(40, 30), "two\n  lines", ())
    write_store([record], tmp_path / "store")
    assert ["two\n  lines"] in Page(page(Store(tmp_path / "store"), [0], "")).rows


def test_boxes_are_outlined_outside_in_the_colour_of_their_number():
    grey = np.full((100, 200, 3), 128, np.uint8)
    boxes = {1: (0.1, 0.2, 0.5, 0.6), 7: (0.7, 0.5, 1.0, 1.0)}
    picture = np.asarray(draw_numbered_boxes(grey, boxes))
    assert picture.shape == (464, 928, 3)  # 4.64 times
    inside = picture[int(0.2 * 464) + 1 : int(0.6 * 464), int(0.1 * 928) + 1 : int(0.5 * 928)]
    assert (inside == 128).all()
    for number, (x1, y1, x2, y2) in boxes.items():
        colour = list(bytes.fromhex(number_colour(number)[1:]))
        rows, columns = np.nonzero((picture == colour).all(-1))
        left, bottom = max(x1 * 928 - 3, 0), min(y2 * 464 + 2, 463)
        assert abs(columns.min() - left) <= 3 and abs(rows.max() - bottom) <= 3
        assert columns.max() >= min(x2 * 928, 922) and rows.min() <= y1 * 464


@pytest.mark.parametrize("width, height", [(3000, 20), (20, 3000), (1, 1), (4000, 3000)])
def test_pictures_of_any_shape_fit_the_page(width, height):
    picture = draw_numbered_boxes(np.zeros((height, width, 3), np.uint8), {1: (0.0, 0.0, 1.0, 1.0), 2: (0.5, 0.5, 0.6, 0.6)})
    assert picture.width <= WIDTH and picture.height <= HEIGHT


def test_numbers_of_a_crowded_picture_do_not_cover_each_other():
    boxes = {n + 1: (n % 6 / 6 + 0.02, n // 6 / 10 + 0.03, n % 6 / 6 + 0.14, n // 6 / 10 + 0.07) for n in range(60)}
    picture = np.asarray(draw_numbered_boxes(np.full((1400, 928, 3), 128, np.uint8), boxes))
    for number in boxes:  # each tag is there: a white rim around a filled rectangle
        x1, y1 = round(boxes[number][0] * 928), round(boxes[number][1] * 1400)
        colour = list(bytes.fromhex(number_colour(number)[1:]))
        above = picture[y1 - 20 : y1 - 4, x1 - 4 : x1 + 24]
        assert (above == colour).all(-1).sum() > 40, number


def test_of_hundreds_of_boxes_some_are_drawn_and_all_listed(tmp_path):
    write_store([grey_record("crowd", many_boxes(340))], tmp_path / "store")
    store = Store(tmp_path / "store")
    shown = Page(page(store, [0], "the first ones"))
    assert f"{DRAWN} of the 340 boxes, chosen at random, are drawn; all are listed" in shown.text
    assert [row[0] for row in shown.rows if row[1:2] and row[1].startswith("caption ")] == [str(n) for n in range(1, 341)]
    assert ("details", {}) in shown.tags  # folded: 680 questions
    assert sheet(store, 0).height > 340 / 3 * 20


def test_conversations_are_shown_with_the_boxes_in_their_texts(tmp_path):
    trees = [spoken("talk", "<image>\nWhat is at [0.1, 0.2, 0.5, 0.9]?", "A cup.", "And the rest?",
                    "At [0.5, 0.5, 0.8, 0.75], not at [0.1, 0.2, 0.5, 0.9].", image="a.png"),
             spoken("words", "Hello?", f"Hi {ODD}.")]  # fmt: skip
    build_conversations(*write_spoken(tmp_path, trees), tmp_path / "store", frame="image")
    store = Store(tmp_path / "store")
    shown = Page(page(store, [0, 1], "the first ones"))
    assert ["1", "question 1, answer 2", "[0.1, 0.2, 0.5, 0.9]", "16\xa0x\xa014"] in shown.rows  # of 40 x 20 pixels
    assert ["2", "answer 2", "[0.5, 0.5, 0.8, 0.75]", "12\xa0x\xa05"] in shown.rows
    assert ["conversation", "1", "What is at [0.1, 0.2, 0.5, 0.9]?", "A cup."] in shown.rows
    assert ["conversation", "1", "Hello?", f"Hi {ODD}."] in shown.rows
    assert len(shown.pictures()) == 1 and "no image, 1 turn." in shown.text
    assert marked_boxes(store.record(1)) == []
    assert sheet(store, 1).width == sheet(store, 0).width


def test_records_are_chosen_by_id_at_random_and_from_the_start(store, records, tmp_path, capsys):
    ids = [records[7].id, records[2].id]
    assert find_ids(store, ids) == [7, 2]

    def shown(*arguments):
        assert main([str(store.path), "--out", str(tmp_path / "new" / "page.html"), *arguments]) == 0
        tags = Page((tmp_path / "new" / "page.html").read_text())
        return re.findall(r"Record number (\d+)", tags.text)

    assert shown("--id", *ids) == ["7", "2"]
    assert shown("--first", "3") == ["0", "1", "2"]
    drawn = shown("--random", "5", "--seed", "1")
    assert len(set(drawn)) == 5 and drawn == shown("--random", "5", "--seed", "1") != shown("--random", "5", "--seed", "2")
    assert len(shown("--random", "99")) == store.records
    assert f"{store.records} of {store.records} records" in capsys.readouterr().out


def test_a_folder_gets_one_picture_per_record(store, tmp_path):
    assert main([str(store.path), "--first", "2", "--out", str(tmp_path / "pictures")]) == 0
    files = sorted((tmp_path / "pictures").iterdir())
    assert [file.name for file in files] == ["record-0000000.png", "record-0000001.png"]
    assert all(Image.open(file).width > WIDTH for file in files)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--id", "image7", "nowhere"], "'nowhere'; ids are like 'image"),
        (["--random", "0"], "--random 0"),
        (["--first", "-1"], "--first -1"),
    ],
)
def test_mistakes_are_named_in_one_line(store, arguments, message, tmp_path, capsys):
    assert main([str(store.path), "--out", str(tmp_path / "page.html"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert str(store.path) in error or message.startswith("--")
    assert not (tmp_path / "page.html").exists()


def test_a_store_that_is_not_there_or_damaged_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    write_store([grey_record("good", many_boxes(2)), grey_record("bad", many_boxes(2))], tmp_path / "store")
    shard = next((tmp_path / "store").glob("*.array_record"))
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"IHDR", b"XXXX"))
    assert main([str(tmp_path / "store"), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "store") in error and ("good" in error or "number 0" in error)
