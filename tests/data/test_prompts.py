"""Coordinates as text."""
import random

import pytest

from granvit.data.prompts import answer_text, format_box, parse_box, question_text


def test_prints_as_in_the_papers_figures():
    assert format_box((0.19, 0.756, 0.417, 0.888)) == "[0.19, 0.756, 0.417, 0.888]"
    assert format_box((0.1384, 0.2076, 0.32649, 0.38)) == "[0.138, 0.208, 0.326, 0.38]"
    assert format_box((-0.0, 0.0, 1.0, 1)) == "[0.0, 0.0, 1.0, 1.0]"


def test_round_trip_of_ten_thousand_boxes_is_exact():
    draw = random.Random(0)
    for _ in range(10_000):
        xs, ys = (sorted(round(draw.random(), 3) for _ in range(2)) for _ in range(2))
        box = (xs[0], ys[0], xs[1], ys[1])
        assert parse_box(format_box(box)) == box
        assert parse_box(f"The region is at {format_box(box)}, I think.") == box


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box here",
        "0.1, 0.2, 0.3, 0.4",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "[0.1 0.2 0.3 0.4]",
        "[0.1, 0.2, 0.3, 0.4",
        "[0.1, 0.2, x, 0.4]",
        "[0.3, 0.2, 0.1, 0.4]",  # inverted
        "[0.1, 0.4, 0.3, 0.2]",
        "[0.1, 0.2, 1.3, 0.4]",  # outside
        "[-0.1, 0.2, 0.3, 0.4]",
        "[nan, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, inf, 0.4]",
        "[0.1, 0.2, 1e999, 0.4]",
        "[0.9, 0.2, 0.3, 0.4] or rather [0.1, 0.2, 0.3, 0.4]",  # the first bracket counts
    ],
)
def test_what_is_no_box(text):
    assert parse_box(text) is None


def test_brackets_that_are_not_four_numbers_are_passed_over():
    assert parse_box("see [1] and [a, b]: [ 0.1 ,0.2,.3, 4e-1 ]") == (0.1, 0.2, 0.3, 0.4)


def test_the_three_questions():
    box = (0.366, 0.627, 0.575, 0.873)
    assert question_text("bbox2caption", box) == (
        "Describe the content contained within the normalized bounding box coordinates [0.366, 0.627, 0.575, 0.873] "
        "in no more than 10 words."
    )
    assert question_text("caption2bbox", caption="a {box} {caption}") == (
        "Please provide the bounding box coordinate of the region this sentence describes: a {box} {caption}"
    )
    assert question_text("global") == "Describe in detail what is shown in the image in one paragraph"
    assert answer_text("caption2bbox", box, "cup") == "[0.366, 0.627, 0.575, 0.873]"
    assert answer_text("bbox2caption", box, "cup") == "cup"
