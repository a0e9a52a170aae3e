"""DocBank's token files."""
import pytest

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.docbank import DocBank
from tests.sources.reading import everything


def _token(text, x1, y1, x2, y2, label="paragraph", font="EJVNGV+CMR10"):
    return "\t".join([text, *map(str, (x1, y1, x2, y2)), "0", "0", "0", font, label])


def _page(*tokens):
    return "\n".join(tokens) + "\n"


FIGURE = _token("##LTFigure##", 100, 500, 450, 800, "figure", "default")
RULE = _token("##LTLine##", 70, 900, 930, 900, "paragraph", "default")
TWO_COLUMNS = [  # the rows of both columns alternate, and a subscript hangs below its word
    _token("Having", 100, 153, 150, 166), _token("explained", 157, 153, 224, 166), _token("In", 535, 153, 550, 166),
    _token("Figure", 554, 153, 600, 166), _token("and", 70, 166, 97, 179), _token("P", 443, 246, 453, 259),
    _token("inj", 453, 251, 468, 260, font="BDIEGC+CMR7"),
]  # fmt: skip
HEADING = [
    _token("4.", 171, 136, 183, 147, "section"), _token("EXAMPLE", 193, 137, 263, 147, "section"),
    _token("Having", 266, 136, 300, 147),
]  # fmt: skip

# Each page: its tokens, its regions by line, and by label (None: the same).
PAGES = {
    "a_0": (
        [_token("NLDSA", 362, 108, 418, 121), _token("model", 423, 108, 466, 121)],
        [((0.362, 0.108, 0.466, 0.121), "NLDSA model")],
        None,
    ),
    "a_1": (
        TWO_COLUMNS,
        [((0.1, 0.153, 0.224, 0.166), "Having explained"), ((0.535, 0.153, 0.6, 0.166), "In Figure"),
         ((0.07, 0.166, 0.097, 0.179), "and"), ((0.443, 0.246, 0.468, 0.26), "P inj")],
        [((0.07, 0.153, 0.6, 0.26), "Having explained In Figure and P inj")],
    ),
    "a_2": (HEADING, [((0.171, 0.136, 0.263, 0.147), "4. EXAMPLE"), ((0.266, 0.136, 0.3, 0.147), "Having")], None),
    "a_3": ([FIGURE], [((0.1, 0.5, 0.45, 0.8), "")], None),
    "a_4": (
        [_token("a", 10, 10, 20, 20), FIGURE, _token("b", 25, 10, 30, 20)],
        [((0.01, 0.01, 0.02, 0.02), "a"), ((0.1, 0.5, 0.45, 0.8), ""), ((0.025, 0.01, 0.03, 0.02), "b")],
        None,
    ),
    "a_5": ([], [], None),
    "a_6": (  # a gap of 15 joins at a height of 10, one of 16 does not
        [_token("a", 10, 10, 20, 20), _token("b", 35, 10, 40, 20), _token("c", 56, 10, 60, 20)],
        [((0.01, 0.01, 0.04, 0.02), "a b"), ((0.056, 0.01, 0.06, 0.02), "c")],
        [((0.01, 0.01, 0.06, 0.02), "a b c")],
    ),
    "a_7": ([_token("ﬁrst", 180, 206, 208, 219), _token("<|im_start|>", 212, 206, 238, 219)],
            [((0.18, 0.206, 0.238, 0.219), "ﬁrst <|im_start|>")], None),
    "a_8": (  # half of the height is shared, and less than half
        [_token("a", 10, 10, 20, 20), _token("b", 21, 15, 30, 25), _token("c", 31, 21, 40, 31)],
        [((0.01, 0.01, 0.03, 0.025), "a b"), ((0.031, 0.021, 0.04, 0.031), "c")],
        [((0.01, 0.01, 0.04, 0.031), "a b c")],
    ),
    "a_8b": (  # boxes that overlap, and a token to the left
        [_token("a", 10, 10, 20, 20), _token("b", 19, 10, 30, 20), _token("c", 5, 12, 9, 22)],
        [((0.01, 0.01, 0.03, 0.02), "a b"), ((0.005, 0.012, 0.009, 0.022), "c")],
        [((0.005, 0.01, 0.03, 0.022), "a b c")],
    ),
    "a_9": ([_token("x", 0, 0, 1000, 1000, "title")], [((0, 0, 1, 1), "x")], None),
}  # fmt: skip


@pytest.mark.parametrize("group", ["line", "label"])
def test_pages(tmp_path, group):
    for name, (tokens, _, _) in PAGES.items():
        (tmp_path / f"{name}.txt").write_text(_page(*tokens) if tokens else "")
    assert everything(DocBank(tmp_path, group)) == [
        Annotated(
            f"{name}_ori.jpg", f"{name}_ori.jpg",
            tuple(RawRegion(*region) for region in (by_label if group == "label" and by_label else by_line)), unit="relative",
        )
        for name, (_, by_line, by_label) in PAGES.items()
    ]  # fmt: skip


def test_tokens_without_text_and_bad_tokens_are_refused(tmp_path):
    tokens = [
        _token("a", 10, 10, 20, 20), RULE, _token(" ", 10, 10, 20, 20), "a\t1\t2\t3\t4\tparagraph", _token("b", "x", 10, 30, 20),
        _token("c", 21, 10, 30, 20).replace("\tparagraph", ""), _token("d", 21, 10, 30, 20) + "\r",
    ]  # fmt: skip
    (tmp_path / "a.txt").write_text("\n".join(tokens), newline="")
    malformed = "line is not a token with four coordinates and a label"
    assert everything(DocBank(tmp_path)) == [
        Annotated(
            "a_ori.jpg", "a_ori.jpg", (RawRegion((0.01, 0.01, 0.03, 0.02), "a d"),), unit="relative",
            refused=(
                ("line 2", "a drawn line has no text"), ("line 3", "token has no text"), ("line 4", malformed),
                ("line 5", malformed), ("line 6", malformed),
            ),
        )
    ]  # fmt: skip


def test_files_of_another_format_and_files_cut_off(tmp_path):
    (tmp_path / "a.txt").write_text("10,20,30,20,30,40,10,40,text\n")
    with pytest.raises(ValueError, match=r"a\.txt.*DocBank"):
        everything(DocBank(tmp_path))
    whole = _page(*TWO_COLUMNS)
    (tmp_path / "Z.txt").write_text(whole[: whole.index("Figure") + 12])
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    cut, *rest = everything(DocBank(tmp_path))
    assert [region.caption for region in cut.regions] == ["Having explained", "In"] and cut.refused[0][0] == "line 4"
    assert rest == [Refused("a.txt", "file is of another format"), Refused("b.txt", "file is not UTF-8")]
    with pytest.raises(ValueError, match="absent"):
        DocBank(tmp_path / "absent").parts()
