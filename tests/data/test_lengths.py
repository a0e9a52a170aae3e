"""Token lengths, counted once and by several processes together."""
import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from granvit.data import lengths as lengths_module
from granvit.data import shares as shares_module
from granvit.data.chat import Chat, train_tokenizer
from granvit.data.lengths import TurnLengths, text_lengths
from granvit.data.prompts import format_box, question_text
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from granvit.stages import REGION_TASKS as TASKS
from tests.conftest import random_record


def test_lengths_bound_the_packers_rows_closely(store, records, chat):
    tokenizer = train_tokenizer(["Describe the content within the box word all of image"], 330, "qwen2.5")
    for speaker in (chat, Chat(tokenizer, "qwen2.5")):
        lengths = TurnLengths(store, speaker, frozenset(TASKS))
        for image, record in enumerate(records[:10]):
            first = int(store.region_starts[image]) + image
            for number, region in enumerate(record.regions):
                for task, box in ((1, (0.123, 0.456, 0.678, 0.789)), (2, (0.123, 0.456, 0.678, 0.789)), (1, region.box)):
                    tokens, answers = lengths.tokens_of(np.array([task]), np.array([first + 1 + number]))
                    asked = question_text(TASKS[task], box, region.caption)
                    answer = speaker.answer_ids(format_box(box) if task == 2 else region.caption)
                    true = len(speaker.question_ids(asked)) + len(answer) - 1, len(answer)
                    assert true[0] <= tokens[0] and true[1] <= answers[0]
                    if box != region.box:
                        assert true == (tokens[0], answers[0])


def test_lengths_are_computed_once_per_tokenizer(store, chat, monkeypatch):
    first = text_lengths(store, chat, "answer")
    assert first[0] == len(chat.answer_ids(store.texts(0, 1)[0]))
    monkeypatch.setattr(Chat, "_lengths", lambda *_: pytest.fail("computed twice"))
    np.testing.assert_array_equal(text_lengths(store, chat, "answer"), first)


COUNT = """
import logging, os, sys, time
from granvit.data import lengths, shares
from granvit.data.chat import Chat, byte_tokenizer
from granvit.data.store import Store

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
lengths._SHARE, shares.LOG_EVERY, shares._POLL = 50, 0.1, 0.1
counted = lengths._encode

def slowly(store, chat, role, images):
    print(images[0], flush=True)
    if len(sys.argv) > 2 and images[0] > 100:
        time.sleep(60)
    time.sleep(0.05)
    yield from counted(store, chat, role, images)

lengths._encode = slowly
lengths.text_lengths(Store(sys.argv[1]), Chat(byte_tokenizer('qwen2.5'), 'qwen2.5'), 'answer')
"""


def test_shares_whose_directory_goes_before_the_first_look_are_made_again(tmp_path, monkeypatch):
    """Another process removes it once it sees the result, which this one may see later (NFS)."""
    progress = shares_module._Progress

    def gone(parts, *rest):
        monkeypatch.setattr(shares_module, "_Progress", progress)
        parts.rmdir()
        return progress(parts, *rest)

    monkeypatch.setattr(shares_module, "_Progress", gone)
    monkeypatch.setattr(shares_module, "_POLL", 0.0)
    shares_module.make_in_shares(tmp_path / "lengths.u2", [1, 1], lambda n: [bytes([n])], "two bytes")
    assert (tmp_path / "lengths.u2").read_bytes() == b"\0\1" and shares_module._Progress is progress


def test_processes_share_the_counting_and_finish_what_a_killed_one_began(tmp_path, chat):
    """The first stops for ever within a share and is killed; the second waits for it, counts the rest and joins it all."""
    write_store([random_record(f"r{i}", i % 7, i % 40) for i in range(300)], tmp_path / "store")
    script = tmp_path / "count.py"
    script.write_text(COUNT)

    def start(*arguments: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, script, tmp_path / "store", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    first = start("stops")
    begun = []
    while not begun or begun[-1] <= 100:
        begun.append(int(first.stdout.readline()))
    second = start()
    others = []
    while len(others) < 300 // 12 - len(begun):  # all that the first has not begun: shares of 12 images
        others.append(int(second.stdout.readline()))
    assert not set(others) & set(begun)
    first.kill()
    first.communicate()
    output, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert list(map(int, output.split())) == [begun[-1]]  # the others' shares stay
    assert sorted([*begun, *others]) == list(range(0, 300, 12))
    assert re.search(r"counting the tokens of .*store \(answer\), once: [\d,]+ of 1,197 \(\d+%\), [\d,]+ per second", said), said
    folder = tmp_path / "store" / "lengths"
    assert [path.suffix for path in folder.iterdir()] == [".u2"]
    shared = next(folder.iterdir()).read_bytes()
    next(folder.iterdir()).unlink()
    assert text_lengths(Store(tmp_path / "store"), chat, "answer").tobytes() == shared


@pytest.mark.parametrize("role", ["answer", "question"])
def test_shares_join_to_what_one_share_holds(store, chat, role, tmp_path, monkeypatch):
    expected = np.array(text_lengths(store, chat, role))
    shutil.copytree(store.path, tmp_path / "copy", ignore=shutil.ignore_patterns("lengths"))
    monkeypatch.setattr(lengths_module, "_SHARE", 9)
    np.testing.assert_array_equal(text_lengths(Store(tmp_path / "copy"), chat, role), expected)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_counting_is_done_all_the_same(store, chat, tmp_path, monkeypatch, number):
    expected = np.array(text_lengths(store, chat, "answer"))
    shutil.copytree(store.path, tmp_path / "copy", ignore=shutil.ignore_patterns("lengths"))
    monkeypatch.setattr(shares_module.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, "no locks here")))
    np.testing.assert_array_equal(text_lengths(Store(tmp_path / "copy"), chat, "answer"), expected)


def test_a_read_only_store_keeps_its_lengths_in_the_home_directory(store, chat, tmp_path, monkeypatch):
    expected = text_lengths(store, chat, "answer")
    monkeypatch.setenv("HOME", str(tmp_path))
    reopened = Store(store.path)
    reopened.path = Path("/proc/1/nothing-can-be-made-here")
    monkeypatch.setattr(reopened, "texts", store.texts)
    monkeypatch.setattr(Path, "mkdir", _refusing(Path.mkdir, "/proc"))
    np.testing.assert_array_equal(text_lengths(reopened, chat, "answer"), expected)
    assert list((tmp_path / ".cache" / "granvit").glob("*.u2"))


def _refusing(mkdir, prefix):
    def wrapped(self, *args, **kwargs):
        if str(self).startswith(prefix):
            raise PermissionError(13, "read-only")
        return mkdir(self, *args, **kwargs)

    return wrapped
