"""LLaVA's files of conversations in a stream, and LLaVA-OneVision's lists of files."""
import io
import json
import random
import tracemalloc

import pytest

from granvit.data.conversations import build_conversations, main
from granvit.data.sources import llava
from granvit.data.sources.llava import ConversationFile, Rule, conversation_files, entries
from granvit.data.store import Store
from tests.conftest import spoken


def _read(path):
    """The entries' trees or lines, and the error's message if there is one."""
    found = []
    try:
        for _, tree in entries(path):
            found.append(tree)
    except ValueError as error:
        return found, str(error)
    return found, None


TREES = [
    spoken("a", "<image>\nWhat is it?", "A \"cup\" {of} [tea], \\ ok.", image="a.jpg"),
    spoken("b", "Who?", "«Moi» 😀 ."), {"id": 123456789012345678901234567890, "n": -1.5e-300, "conversations": []},
    {}, [], [[[]], {"a": [{}]}], "text, ]", 12.25, -0.5e10, 7, True, None, float("inf"), "\ud800",
    spoken("é" * 40, "<|im_end|>", "]},"),
]  # fmt: skip


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("piece", [1, 2, 3, 17, 64, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_list_is_read_as_json_reads_it_wherever_its_pieces_end(tmp_path, monkeypatch, indent, piece, ascii_only):
    monkeypatch.setattr(llava, "_PIECE", piece)
    path = tmp_path / "a.json"
    text = json.dumps(TREES, indent=indent, ensure_ascii=ascii_only) + "\n "
    path.write_bytes(b"\xef\xbb\xbf \r\n" + text.encode(errors="surrogatepass"))
    assert list(entries(path)) == [(f"entry {number}", tree) for number, tree in enumerate(TREES, 1)]
    path.write_text(" [ ] ")
    assert list(entries(path)) == []


def test_a_list_cut_off_anywhere_gives_what_was_whole_and_an_error(tmp_path, monkeypatch):
    trees = [spoken("a", "<image>\n\"What\" is it?", "\\ é"), {"id": 1.5e-30}, [True, None, {}], "b"]
    text = json.dumps(trees)
    ends = [len(json.dumps(trees[:number])) - 1 for number in range(1, 5)]  # of each tree
    path = tmp_path / "a.json"
    for piece in (5, 1 << 20):
        monkeypatch.setattr(llava, "_PIECE", piece)
        for length in range(1, len(text)):
            path.write_text(text[:length])
            found, error = _read(path)
            assert found == trees[: sum(end <= length for end in ends)]
            assert error == f"conversations {path}: not valid JSON: the file ends in the middle"


@pytest.mark.parametrize(
    "text, whole",
    [("[1, 2, }]", 2), ("[1, 2 3]", 2), ("[1, 2],", 2), ("[1, 2] [3]", 2), ("[1, {'a': 2}, 3]", 1), ("[1,, 2]", 1),
     ("[1, 2,]", 2), ("[1, \"a\nb\", 2, 3, 4, 5, 6, 7, 8]", 1), ('[1, "\\x", 2, 3, 4, 5, 6, 7, 8, 9]', 1),
     ("[1, " + "[" * 100_000, 1),
     ('[1, {"a" 2}, 3, 4, 5, 6, 7, 8, 9]', 1)],
)  # fmt: skip
def test_a_damaged_list_gives_what_was_whole_and_an_error(tmp_path, text, whole):
    path = tmp_path / "a.json"
    path.write_text(text)
    found, error = _read(path)
    assert len(found) == whole and "a.json" in error and "not valid JSON" in error
    path.write_bytes(b'[1, "\xff"]')
    assert "not valid JSON" in _read(path)[1]


def test_damage_is_found_without_reading_on(monkeypatch):
    monkeypatch.setattr(llava, "_PIECE", 100)
    file = io.StringIO("[1, oops, " + "2, " * 10_000 + "3]")
    with pytest.raises(ValueError, match="entry 2"):
        list(llava._List(file))
    assert file.tell() < 1000


def test_the_list_is_not_in_memory(tmp_path):
    path = tmp_path / "a.json"
    one = json.dumps(spoken("a", "<image>\nWhat is it?", "A cup. " * 120, image="a.jpg")).encode()
    with open(path, "wb") as file:
        file.write(b"[" + one)
        for _ in range(60):
            file.write((b", " + one) * 500)
        file.write(b"]")
    assert path.stat().st_size > 25_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in entries(path)) == 30_001
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def _numbers(file, seed=0):
    return [tree["id"] for _, tree in file.entries(seed)]


@pytest.mark.parametrize(
    "rule, expected",
    [(None, range(15)), (Rule("first", 4, False), range(4)), (Rule("first", 10, True), range(2)),
     (Rule("end", 4, False), range(11, 15)), (Rule("end", 20, True), range(12, 15)), (Rule("end", 0, True), []),
     (Rule("first", 0, False), []),
     (Rule("first", 99, False), range(15)), (Rule("end", 99, False), range(15)), (Rule("end", 100, True), range(15)),
     (Rule("random", 100, True), range(15)), (Rule("random", 99, False), range(15)), (Rule("random", 0, True), [])],
)  # fmt: skip
@pytest.mark.parametrize("lines", [True, False])
def test_rules_take_their_share_rounded_up(tmp_path, rule, expected, lines):
    trees = [{"id": number} for number in range(15)]
    path = tmp_path / "a"
    path.write_text("\n\n".join(map(json.dumps, trees)) if lines else json.dumps(trees))
    taken = [tree if isinstance(tree, dict) else json.loads(tree) for _, tree in ConversationFile(path, rule).entries(0)]
    assert [tree["id"] for tree in taken] == list(expected)


def test_random_takes_the_number_once_each_in_order_and_depends_on_seed_and_name_only(tmp_path):
    paths = [tmp_path / "x" / "a.json", tmp_path / "y" / "a.json", tmp_path / "y" / "b.json"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([{"id": number} for number in range(200)]))
    files = [ConversationFile(path, Rule("random", 15, True)) for path in paths]
    taken = _numbers(files[0])
    assert len(taken) == 30 and taken == sorted(set(taken)) and taken == _numbers(files[0]) == _numbers(files[1])
    random.random()
    assert len({tuple(taken), tuple(_numbers(files[0], 1)), tuple(_numbers(files[2]))}) == 3
    often = [number for seed in range(60) for number in _numbers(files[0], seed)]
    assert set(often) == set(range(200)) and 60 * 30 * 0.4 < sum(number < 100 for number in often) < 60 * 30 * 0.6


LIST = """
datasets:
  - json_path: {folder}/a.json
    sampling_strategy: "first:50%"
  - json_path: b.jsonl # a comment
    sampling_strategy: "end:2"
  # - json_path: absent.json
  #   sampling_strategy: "all"
  - json_path: a.json
    sampling_strategy: all
  - json_path: a.json
    other: 1
  - json_path: a.json
    sampling_strategy: random:10%
"""


def test_a_list_of_files_is_read_file_by_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([spoken(f"a{n}", "Who?", f"{n}.") for n in range(5)]))
    lines = [json.dumps(spoken("", "Who?", f"b{n}.") | {"id": None}) for n in range(4)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n{")
    (tmp_path / "sets.yaml").write_text(LIST.format(folder=tmp_path))
    a, b = tmp_path / "a.json", tmp_path / "b.jsonl"
    assert conversation_files(tmp_path / "sets.yaml") == [
        ConversationFile(a, Rule("first", 50, True)), ConversationFile(b, Rule("end", 2, False)), ConversationFile(a),
        ConversationFile(a), ConversationFile(a, Rule("random", 10, True)),
    ]  # fmt: skip
    assert conversation_files(a) == [ConversationFile(a)]
    images = tmp_path / "images"
    images.mkdir()
    assert main([str(tmp_path / "sets.yaml"), str(images), str(tmp_path / "store"), "--seed", "3"]) == 0
    store = Store(tmp_path / "store")
    names = [store.record(number).id for number in range(store.records)]
    every = [f"a{n}" for n in range(5)]
    assert names[:-1] == ["a0", "a1", "a2", "b.jsonl line 4", *every, *every] and names[-1] in every
    refused = json.loads((tmp_path / "store" / "refused.jsonl").read_text())
    assert refused == {"what": "b.jsonl line 5", "reason": "line is not valid JSON"}
    last = {
        build_conversations(tmp_path / "sets.yaml", images, tmp_path / f"store{seed}", seed=seed)
        and Store(tmp_path / f"store{seed}").record(len(names) - 1).id
        for seed in range(12)
    }
    assert len(last) > 1


@pytest.mark.parametrize(
    "text, message",
    [("datasets: [", "not valid YAML"), ("- json_path: a.json", "mapping"), ("datasets: []", "list `datasets`"),
     ("datasets: [{sampling_strategy: all}]", r"datasets\[0\] has no json_path"), ("datasets: [a.json]", r"datasets\[0\]"),
     ("datasets: [{json_path: a.json}, {json_path: no.json}]", r"datasets\[1\]\.json_path .*no\.json"),
     ("datasets: [{json_path: a.json, sampling_strategy: 'last:5'}]", r"datasets\[0\]\.sampling_strategy.*last:5"),
     ("datasets: [{json_path: a.json, sampling_strategy: 'first:5.5%'}]", r"sampling_strategy.*first:5\.5%"),
     ("datasets: [{json_path: a.json, sampling_strategy: 5}]", r"sampling_strategy is 5"),
     ("datasets: [{json_path: a.json, sampling_strategy: first}]", r"sampling_strategy")],
)  # fmt: skip
def test_a_wrong_list_of_files_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text("[]")
    path = tmp_path / "sets.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"sets\.yaml: .*{message}"):
        conversation_files(path)


def test_a_damaged_list_leaves_no_store(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps([spoken("a", "Who?", "Me.")] * 200)[:-9])
    assert main([str(tmp_path / "a.json"), str(tmp_path), str(tmp_path / "store")]) == 2
    assert "a.json: not valid JSON: the file ends in the middle" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
