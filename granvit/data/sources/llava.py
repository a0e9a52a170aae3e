"""LLaVA's conversations as files: a JSON list or one conversation per line, and LLaVA-OneVision's lists of such files.

A list of several GB is read in a stream: what is in memory is a piece of the file and one conversation. The list of files is YAML
(https://github.com/LLaVA-VL/LLaVA-NeXT, `scripts/train/onevision.yaml`); other keys are ignored:

    datasets:
      - json_path: a.json
        sampling_strategy: all         # or absent
      - json_path: b.jsonl
        sampling_strategy: "first:10%" # or end:10%, random:10%; a number of conversations without the %

A share is rounded up. `first` and `end` take the beginning and the end of the file. `random` takes that many at random, in the
order of the file: the same ones for the same seed, name of the file, and number of conversations. A relative `json_path` is
relative to the list's folder.
"""
import codecs
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from granvit.config import read_yaml

_PIECE = 1 << 20
_NEAR = 16  # characters; more than a number's sign and exponent, a literal or an escape have
_CUT = "the file ends in the middle"
_SPACE = re.compile(r"[ \t\n\r]*")
_RULE = re.compile(r"(first|end|random):(\d+)(%?)")
Entry = tuple[str, Any]  # a conversation's place in the file, and its parsed JSON or, from JSON lines, its line


class Rule(NamedTuple):
    """Which conversations of a file are taken: `number` of them, or this percentage of all."""

    kind: str
    number: int
    is_share: bool


@dataclass(frozen=True)
class ConversationFile:
    """One file of conversations, and which of them are taken; None: all."""

    path: Path
    rule: Rule | None = None

    def entries(self, seed: int) -> Iterator[Entry]:
        """The conversations that are taken, in order.

        A rule that needs the number of conversations (all but `first` with a number) reads the file twice. `ValueError` names the
        file where a JSON list is damaged, or cut off.
        """
        if self.rule is None:
            return entries(self.path)
        kind, number, is_share = self.rule
        if kind == "first" and not is_share:
            return islice(entries(self.path), number)
        count = sum(1 for _ in entries(self.path))
        taken = min(count, -(-number * count // 100) if is_share else number)
        if kind == "random":
            return _sample(entries(self.path), count, taken, random.Random(f"{seed} {self.path.name}"))
        start = count - taken if kind == "end" else 0
        return islice(entries(self.path), start, start + taken)


def conversation_files(path: Path) -> list[ConversationFile]:
    """The files of a list (`.yaml` or `.yml`), otherwise the file itself. `ValueError` names the list and what is wrong in it."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return [ConversationFile(path)]
    sets = read_yaml(path).get("datasets")
    if not isinstance(sets, list) or not sets:
        raise ValueError(f"{path}: has no list `datasets`")
    files = []
    for number, entry in enumerate(sets):
        name = entry.get("json_path") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"{path}: datasets[{number}] has no json_path")
        strategy = entry.get("sampling_strategy", "all")
        found = _RULE.fullmatch(strategy) if isinstance(strategy, str) else None
        if strategy != "all" and found is None:
            raise ValueError(
                f"{path}: datasets[{number}].sampling_strategy is {strategy!r}; it must be all, or first, end or random with a "
                "number or a share, as in first:10%"
            )
        file = path.parent / name
        if not file.is_file():
            raise ValueError(f"{path}: datasets[{number}].json_path {file}: no such file")
        files.append(ConversationFile(file, Rule(found[1], int(found[2]), bool(found[3])) if found else None))
    return files


def entries(path: Path) -> Iterator[Entry]:
    """For each conversation its place in the file, and its parsed JSON or its line.

    `ValueError` names the file where a JSON list is damaged or cut off. Damaged lines are the caller's to find.
    """
    with open(path, "rb") as file:
        is_list = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        if not is_list:
            file.seek(0)
            yield from ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())
    if is_list:
        with open(path, encoding="utf-8-sig", errors="surrogatepass", newline="") as text:
            try:
                yield from ((f"entry {number}", tree) for number, tree in enumerate(_List(text), 1))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"conversations {path}: not valid JSON: {error}") from None


class _List:
    """Iterates over the entries of one JSON list, by the rules of `json.load`. `ValueError` where the text is not valid.

    (ijson is not used: its fast parser silently replaces text that is no valid Unicode, such as "\\ud800", by "?".)
    """

    def __init__(self, file: TextIO):
        self._file = file
        self._text, self._at = "", 0  # what was read of the file, and where the part that was not used begins
        self._number = 0  # of entries that were read
        self._decode = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[Any]:
        self._expect("[")
        if self._sign() != "]":
            yield self._value()
            while self._sign() == ",":
                self._at += 1
                yield self._value()
        self._expect("]")
        if self._sign():
            raise ValueError("there is text after the list")

    def _more(self) -> bool:
        """Reads on; False, and nothing changes, at the end of the file."""
        piece = self._file.read(max(_PIECE, len(self._text) - self._at))
        if piece:
            self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def _sign(self) -> str:
        """The next character that is not white space, which is not used up; empty at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _expect(self, sign: str) -> None:
        found = self._sign()
        if found != sign:
            raise ValueError(f"{sign!r} expected, {found!r} found" if found else _CUT)
        self._at += 1

    def _value(self) -> Any:
        self._sign()
        while True:
            error = None
            try:
                value, stop = self._decode(self._text, self._at)
            except json.JSONDecodeError as damage:
                error, stop = damage.msg, damage.pos
                if error.startswith("Unterminated string"):  # its position is the beginning of the string
                    stop = len(self._text)
            # What follows can change what was found near the end: 12 may go on as 12.5.
            near_end = len(self._text) - stop < _NEAR
            if near_end and self._more():
                continue
            if error:
                raise ValueError(_CUT if near_end else f"{error} in entry {self._number + 1}")
            self._at = stop
            self._number += 1
            return value


def _sample(items: Iterator[Entry], count: int, taken: int, chance: random.Random) -> Iterator[Entry]:
    """`taken` of the `count` items, in order: each is taken with the share that is still to be taken of those that are left."""
    for number, item in enumerate(items):
        if chance.random() * (count - number) < taken:
            taken -= 1
            yield item
