import pytest

from granvit.data.sources.inputs import Damaged, need_file, need_folder, read_json, read_parquet


def _read(path, **wanted):
    found = []
    try:
        for entry in read_json(path, **wanted):
            found.append(entry)
    except Damaged as damage:
        found.append(damage.reason)
    return found


def _write(path, data):
    path.write_bytes(data)
    return path


def test_lists_and_mappings(tmp_path):
    path = _write(tmp_path / "a.json", b'\xef\xbb\xbf {"x": {"list": [9]},"list": [1, {"a": 2.5}], "map": {"k": [3], "l": null}}')
    assert _read(path, lists=["list"], maps=["map"]) == [
        ("list", 0, 1), ("list", 1, {"a": 2.5}), ("map", "k", [3]), ("map", "l", None)
    ]
    assert _read(path, lists=["missing"]) == []
    assert _read(_write(tmp_path / "b.json", b'[1, [2], "3"]'), lists=[""]) == [("", 0, 1), ("", 1, [2]), ("", 2, "3")]


def test_what_was_whole_comes_before_the_damage(tmp_path):
    assert _read(_write(tmp_path / "a.json", b'[1, {"a": 2}, {"a": '), lists=[""]) == [
        ("", 0, 1), ("", 1, {"a": 2}), "file ends in the middle"
    ]
    assert _read(_write(tmp_path / "b.json", b"[1, 2, }"), lists=[""]) == [("", 0, 1), ("", 1, 2), "file is not valid JSON"]
    assert _read(_write(tmp_path / "c.json", b"[1, NaN, 2]"), lists=[""]) == [("", 0, 1), "file is not valid JSON"]


def test_damage_far_behind_the_start_of_a_file(tmp_path):
    whole = b"[" + b", ".join(b'{"n": %d}' % n for n in range(100_000))
    found = _read(_write(tmp_path / "a.json", whole + b', {"n"'), lists=[""])
    assert found[:-1] == [("", n, {"n": n}) for n in range(100_000)] and found[-1] == "file ends in the middle"


@pytest.mark.parametrize("data", [b"", b"   ", b"\x89PNG", b"<xml/>", b'{"a": 1}', b"17"])
def test_other_files_are_named(tmp_path, data):
    with pytest.raises(ValueError, match=r"a\.json"):
        _read(_write(tmp_path / "a.json", data), lists=[""])


def test_a_list_where_a_mapping_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json: is not a JSON mapping"):
        _read(_write(tmp_path / "a.json", b"[]"), lists=["x"])


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ValueError, match=r"regions .*none"):
        need_file(tmp_path / "none", "regions")
    with pytest.raises(ValueError, match=r"folder .*none"):
        need_folder(tmp_path / "none", "folder")
    assert need_folder(tmp_path, "folder") == tmp_path


def test_parquet_that_is_not_parquet_or_cut_off(tmp_path):
    with pytest.raises(ValueError, match=r"a\.parquet"):
        list(read_parquet(_write(tmp_path / "a.parquet", b"{}"), ["a"]))
    with pytest.raises(Damaged, match="ends in the middle"):
        list(read_parquet(_write(tmp_path / "b.parquet", b"PAR1" + bytes(100)), ["a"]))
