"""Writing stores: complete or not at all."""
import subprocess
import sys
from dataclasses import replace

import pytest

from granvit.data.store import Store
from granvit.data.store_writer import write_store
from tests.conftest import random_record


def test_a_failed_or_killed_build_leaves_no_store(tmp_path):
    def records():
        yield random_record("a", 2, 0)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        write_store(records(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

    script = (
        "import os, signal, sys; from tests.conftest import random_record; from granvit.data.store_writer import write_store\n"
        "def records():\n yield random_record('a', 2, 0)\n os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_store(records(), sys.argv[1])"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], check=False)
    assert killed.returncode == -9 and not (tmp_path / "out").exists()
    write_store([random_record("b", 2, 0)], tmp_path / "out")  # leftovers of the killed build do no harm
    assert Store(tmp_path / "out").record(0).id == "b"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_programs_own_mistakes_are_errors(tmp_path):
    record = random_record("a", 2, 0)
    inverted = replace(record.regions[1], box=(0.5, 0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="'a' region 1: box is inverted"):
        write_store([replace(record, regions=(record.regions[0], inverted))], tmp_path / "out")
    with pytest.raises(ValueError, match="caption is empty"):
        write_store([replace(record, global_caption=" ")], tmp_path / "out")
