"""Token lengths of every question and answer of a store, computed once from its text side.

They decide which row shape (bucket) a row needs before any image is read. Coordinates are not in the text side: they
count with the longest text that three decimals can give, so a row always fits the bucket chosen for it.
"""
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from granvit.data.chat import Chat
from granvit.data.images import image_tokens
from granvit.data.prompts import GLOBAL, answer_text, question_text
from granvit.data.store import Store
from granvit.models import VisionConfig
from granvit.stages import TASKS, Task

_CHUNK = 8192  # images encoded at a time
_LONGEST = np.iinfo(np.uint16).max  # a longer text fits no bucket either
Role = Literal["answer", "question"]
_log = logging.getLogger(__name__)


def _encode(store: Store, chat: Chat, role: Role) -> Iterator[np.ndarray]:
    """Lengths of all texts in order: as answers, or inside caption2bbox questions (0 for global captions, never asked so)."""
    for first in range(0, store.images, _CHUNK):
        last = min(first + _CHUNK, store.images)
        numbers = store.region_starts[first : last + 1] + np.arange(first, last + 1)
        texts = store.texts(int(numbers[0]), int(numbers[-1]))
        if role == "answer":
            lengths = np.array(chat.answer_lengths(texts))
        else:
            lengths = np.array(chat.question_lengths([question_text("caption2bbox", caption=text) for text in texts]))
            lengths[numbers[:-1] - numbers[0]] = 0
        yield np.minimum(lengths, _LONGEST).astype("<u2")


def text_lengths(store: Store, chat: Chat, role: Role) -> np.ndarray:
    """uint16 `[images + regions]`, mapped: `len(answer_ids(text))` of each text of the store, or the length of the
    caption2bbox question that holds it.

    Computed once per store, tokenizer and template, and kept beside the store, or in `~/.cache/granvit` where the store
    is read-only; several processes may ask at once, one of them computes.
    """
    count = store.images + store.regions
    name = f"lengths-{store.fingerprint}-{chat.fingerprint}-{role}.u2"
    for folder in (store.path / "lengths", Path.home() / ".cache" / "granvit"):
        path = folder / name
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                with open(path.with_suffix(".lock"), "wb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if not path.exists():
                        _log.info("counting the tokens of %d texts of %s (%s), once", count, store.path, role)
                        partial = path.with_suffix(f".partial-{os.getpid()}")
                        with open(partial, "wb") as file:
                            for lengths in _encode(store, chat, role):
                                file.write(lengths.tobytes())
                            os.fsync(file.fileno())
                        os.rename(partial, path)
        except PermissionError:
            continue
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            continue
        if path.stat().st_size != 2 * count:
            raise ValueError(f"{path}: not {count} lengths; remove the file, it is made again")
        return np.memmap(path, "<u2", "r")
    raise ValueError(f"store {store.path}: neither {store.path / 'lengths'} nor ~/.cache/granvit can be written")


class PrefixLengths:
    """Tokens of each image's shared prefix: with tiling they depend on the image's size, which the store knows.

    `ValueError` where it does not.
    """

    def __init__(self, store: Store, chat: Chat, vision: VisionConfig):
        if vision.tiles and store.sizes is None:
            raise ValueError(f"store {store.path}: was built before image sizes were kept, which vision.tiling needs; rebuild it")
        self._store, self._text, self._vision = store, chat.prefix_length(0), vision

    def of(self, images: np.ndarray) -> np.ndarray:
        """int64, for images of these numbers in the store."""
        if not self._vision.tiles:
            return np.full(len(images), self._text + self._vision.image_tokens)
        return self._text + image_tokens(*self._store.sizes[images].T, self._vision)


class TurnLengths:
    """Upper bounds of a turn's length, vectorised over texts of one store."""

    def __init__(self, store: Store, chat: Chat, tasks: frozenset[Task]):
        self._arguments = (store, chat, tasks)
        boxes = [(value / 1000,) * 4 for value in range(1001)]
        self._longest_box = max(chat.answer_lengths([answer_text("caption2bbox", box, "") for box in boxes]))
        box_question = max(chat.question_lengths([question_text("bbox2caption", box) for box in boxes]))
        self._fixed = {"global": chat.question_lengths([GLOBAL])[0], "bbox2caption": box_question}
        self._answers = text_lengths(store, chat, "answer")
        self._questions = text_lengths(store, chat, "question") if "caption2bbox" in tasks else None

    def __reduce__(self):
        return TurnLengths, self._arguments

    def of(self, task: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For turns of `task` (indices of TASKS) about text number `text`: input tokens, and supervised tokens among them."""
        tokens, answers = np.zeros(len(task), np.int64), np.zeros(len(task), np.int64)
        for index, name in enumerate(TASKS):
            mine = task == index
            if not mine.any():
                continue
            if name == "caption2bbox":
                question, answers[mine] = self._questions[text[mine]].astype(np.int64), self._longest_box
            else:
                question, answers[mine] = self._fixed[name], self._answers[text[mine]]
            tokens[mine] = question + answers[mine] - 1  # the end-of-turn token is a target only
        return tokens, answers
