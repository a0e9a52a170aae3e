"""Folders that appear complete or not at all: after a crash of the machine, beside other processes, and after killed ones."""
import json
import os
from pathlib import Path

import pytest

from granvit.data.gran.make_unit import COUNTS, Counts, read_counts
from granvit.data.gran.units import remove_partials, whole_folder


def test_all_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename

    def noting_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noting_rename(source, target):
        events.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    with whole_folder(tmp_path / "unit") as folder:
        for name in ("unit.json", "fingerprints.bin", "refused.jsonl"):
            (folder / name).write_bytes(b"x")
    assert events == ["fingerprints.bin", "refused.jsonl", "unit.json", folder.name, "renamed", tmp_path.name]
    assert sorted(path.name for path in (tmp_path / "unit").iterdir()) == sorted(events[:3])


def test_of_two_processes_that_make_a_folder_the_first_one_s_stays(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "unit") as folder:
        (folder / "a").write_text("ours")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            with whole_folder(tmp_path / "unit") as other:
                assert other != folder and (folder / "a").exists()
                (other / "a").write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["unit"]
    assert (tmp_path / "unit" / "a").read_text() == "theirs"


def test_another_error_of_renaming_is_not_hidden(tmp_path):
    (tmp_path / "unit").write_text("a file")
    with pytest.raises(NotADirectoryError), whole_folder(tmp_path / "unit"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["unit"]


def test_what_killed_processes_left_is_removed_and_a_late_one_cannot_make_its_folder(tmp_path):
    finished = [tmp_path / name for name in ("read/a-0/000000", "units/a-0/000000", "store", "x.partial")]
    for folder in finished:
        folder.mkdir(parents=True)
        (folder / "file").touch()
    left = []
    for folder in finished:
        late = whole_folder(folder.with_name(f"{folder.name}1"))
        left.append((late, late.__enter__()))
        (left[-1][1] / "file").touch()
    remove_partials(tmp_path)
    assert sorted(path for path in tmp_path.rglob("file")) == sorted(folder / "file" for folder in finished)
    for late, folder in left:
        assert not folder.exists()
        with pytest.raises(FileNotFoundError):
            late.__exit__(None, None, None)
    assert sorted(path for path in tmp_path.rglob("file")) == sorted(folder / "file" for folder in finished)


@pytest.mark.parametrize("text", [None, "", '{"records_read": 5', "\0" * 600, "[]", "{}", '{"unknown": 1}'])
def test_damaged_counts_are_named_with_what_to_do(tmp_path, text):
    unit = tmp_path / "000007"
    unit.mkdir()
    if text is not None:
        (unit / COUNTS).write_text(text)
    with pytest.raises(ValueError, match=rf"{unit / COUNTS}: .*remove this folder.*{unit}"):
        read_counts(unit)


def test_counts_are_read_as_they_were_written(tmp_path):
    counts = Counts(records_read=1)
    counts.images_dropped["a reason"] += 1
    (tmp_path / COUNTS).write_text(json.dumps(vars(counts)))
    assert read_counts(tmp_path) == counts
