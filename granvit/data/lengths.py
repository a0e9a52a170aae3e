"""Token lengths of every question, answer and conversation of a store, computed once from its text files.

They determine which row shape (bucket) a row needs before any image is read. The text files do not have the boxes: each box is
counted with the token length of the longest box text (three decimals), so that a row always fits the bucket chosen for it.
"""
import errno
import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from granvit.data.chat import Chat
from granvit.data.images import image_tokens
from granvit.data.prompts import GLOBAL, answer_text, question_text
from granvit.data.shares import make_in_shares
from granvit.data.store import CONVERSATIONS, Store
from granvit.models import VisionConfig
from granvit.stages import TASKS, Task

_CHUNK = 8192  # records encoded at a time
_SHARE = 1 << 17  # texts per share of the work
_LONGEST = np.iinfo(np.uint16).max  # longer texts are stored as this length: no bucket is so long
Role = Literal["answer", "question", "conversation"]
_COLUMNS = {"answer": 1, "question": 1, "conversation": 2}


def _shares(store: Store) -> list[tuple[int, int]]:
    """First record and end (exclusive) of consecutive ranges of records with about `_SHARE` texts each."""
    records = max(_SHARE * store.records // (store.records + store.regions), 1)
    return list(pairwise([*range(0, store.records, records), store.records]))


def _encode(store: Store, chat: Chat, role: Role, records: tuple[int, int]) -> Iterator[bytes]:
    """The `text_lengths` of records `records[0]` to `records[1]` - 1, as bytes."""
    for first in range(*records, _CHUNK):
        last = min(first + _CHUNK, records[1])
        numbers = store.region_starts[first : last + 1] + np.arange(first, last + 1)
        texts = store.texts(int(numbers[0]), int(numbers[-1]))
        if role == "answer":
            lengths = np.array(chat.answer_lengths(texts))
        elif role == "conversation":
            lengths = np.array(chat.conversation_lengths([json.loads(text)["turns"] for text in texts]))
        else:
            lengths = np.array(chat.question_lengths([question_text("caption2bbox", caption=text) for text in texts]))
            lengths[numbers[:-1] - numbers[0]] = 0
        yield np.minimum(lengths, _LONGEST).astype("<u2").tobytes()


def text_lengths(store: Store, chat: Chat, role: Role) -> np.ndarray:
    """The token lengths of all texts of the store, memory-mapped uint16.

    Role answer: `[records + regions]`, `len(answer_ids(text))`. Role question: `[records + regions]`, the length of the
    caption2bbox question with the text (0 for global captions, which no such question has). Role conversation: `[records, 2]`,
    input tokens after the prefix and supervised tokens.

    Computed once per store, tokenizer and template, and kept in STORE/lengths, or in `~/.cache/granvit` if the store is
    read-only. Processes that call this at the same time share the work (`make_in_shares`). `ValueError` if the kept file has the
    wrong size, or if neither directory is writable.
    """
    columns, shares = _COLUMNS[role], _shares(store)
    texts = store.records + store.regions
    name = f"lengths-{store.fingerprint}-{chat.fingerprint}-{role}.u2"
    for folder in (store.path / "lengths", Path("~/.cache/granvit")):
        path = folder.expanduser() / name
        try:
            if not path.exists():
                sizes = [int(store.region_starts[b] - store.region_starts[a]) + b - a for a, b in shares]
                what = f"counting the tokens of {store.path} ({role}), once"
                make_in_shares(path, sizes, lambda n: _encode(store, chat, role, shares[n]), what)
        except PermissionError:
            continue
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            continue
        if path.stat().st_size != 2 * texts * columns:
            raise ValueError(f"{path}: does not have {texts * columns} lengths; remove the file, and it will be computed again")
        lengths = np.memmap(path, "<u2", "r")
        return lengths if columns == 1 else lengths.reshape(-1, columns)
    raise ValueError(f"store {store.path}: neither {store.path / 'lengths'} nor ~/.cache/granvit is writable; make one writable")


class PrefixLengths:
    """The number of tokens of each record's shared prefix. With tiling it depends on the image's size (`store.sizes`). A
    conversation without an image has no image tokens.

    `ValueError` with tiling if the store has no image sizes.
    """

    def __init__(self, store: Store, chat: Chat, vision: VisionConfig):
        if vision.tiles and store.sizes is None:
            raise ValueError(f"store {store.path}: has no image sizes (sizes.u4); vision.tiling needs them: rebuild the store")
        self._store, self._chat, self._vision = store, chat, vision

    def tokens_of(self, records: np.ndarray) -> np.ndarray:
        """int64: the prefix lengths of the records with these indices."""
        if self._store.sizes is None:
            return np.full(len(records), self._chat.prefix_length(self._vision.image_tokens))
        widths, heights = self._store.sizes[records].T
        with_image = self._chat.prefix_length(0) + image_tokens(np.maximum(widths, 1), np.maximum(heights, 1), self._vision)
        return np.where(widths > 0, with_image, len(self._chat.prefix_before))

    def has_image(self, records: np.ndarray) -> np.ndarray:
        """bool: whether the records with these indices have an image."""
        return np.ones(len(records), bool) if self._store.sizes is None else self._store.sizes[records, 0] > 0


class TurnLengths:
    """Upper bounds of the lengths of questions with their answers (exact for conversations), for arrays of texts of one store."""

    def __init__(self, store: Store, chat: Chat, tasks: frozenset[Task]):
        self._arguments = (store, chat, tasks)
        if store.kind == CONVERSATIONS:
            self._conversations = text_lengths(store, chat, "conversation")
            self._counted = [self._conversations]
            return
        boxes = [(value / 1000,) * 4 for value in range(1001)]
        self._longest_box = max(chat.answer_lengths([answer_text("caption2bbox", box, "") for box in boxes]))
        box_question = max(chat.question_lengths([question_text("bbox2caption", box) for box in boxes]))
        self._fixed = {"global": chat.question_lengths([GLOBAL])[0], "bbox2caption": box_question}
        self._answers = text_lengths(store, chat, "answer")
        self._questions = text_lengths(store, chat, "question") if "caption2bbox" in tasks else None
        self._counted = [self._answers] + ([] if self._questions is None else [self._questions])

    def __reduce__(self):
        return TurnLengths, self._arguments

    def digest(self) -> str:
        """SHA-256 of all lengths. They determine the order of the data, so they must be the same on all ranks."""
        digest = hashlib.sha256()
        for lengths in self._counted:
            digest.update(lengths.data)
        return digest.hexdigest()

    def tokens_of(self, task: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64: the number of input tokens after the prefix, and of supervised tokens, of each turn.

        `task` are indices into `TASKS`, `text` are indices into the store's texts.
        """
        tokens, answers = np.zeros(len(task), np.int64), np.zeros(len(task), np.int64)
        for index, name in enumerate(TASKS):
            selected = task == index
            if not selected.any():
                continue
            if name == "conversation":
                tokens[selected], answers[selected] = self._conversations[text[selected]].astype(np.int64).T
                continue
            if name == "caption2bbox":
                assert self._questions is not None
                question, answers[selected] = self._questions[text[selected]].astype(np.int64), self._longest_box
            else:
                question, answers[selected] = self._fixed[name], self._answers[text[selected]]
            tokens[selected] = question + answers[selected] - 1  # the last end-of-turn token is a target only
        return tokens, answers
