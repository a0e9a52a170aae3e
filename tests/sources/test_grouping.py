import os
import tempfile

import pytest

from granvit.data.sources.grouping import Groups


def test_groups_come_in_the_order_of_the_images_and_their_rows_in_the_order_of_the_source():
    with Groups() as groups:
        groups.add_row(2, "a")
        groups.add_image(5, {"name": "five"})
        groups.add_row(5, {"box": [1, 2.5]})
        groups.add_row("2", ["b"])
        groups.add_image("2", None)
        groups.add_image(9, {})
        found = list(groups.read())
        assert not list(groups.without_image())
    assert found == [("5", {"name": "five"}, [{"box": [1, 2.5]}], []), ("2", None, ["a", ["b"]], []), ("9", {}, [], [])]


def test_an_image_that_comes_again_is_not_added():
    with Groups() as groups:
        assert groups.add_image(1, "first")
        assert not groups.add_image(1, "second")
        assert [group.image for group in groups.read()] == ["first"]


def test_annotations_whose_id_came_before_are_told_apart():
    with Groups() as groups:
        groups.add_image(1, None)
        groups.add_image(2, None)
        groups.add_row(1, "a", row_id=7)
        groups.add_row(2, "b", row_id="7")
        groups.add_row(2, "c", row_id=8)
        groups.add_row(2, "d")
        groups.add_row(2, "e")
        assert [(group.rows, group.repeated) for group in groups.read()] == [(["a"], []), (["c", "d", "e"], ["b"])]


def test_annotations_without_an_image():
    with Groups() as groups:
        groups.add_image(1, None)
        groups.add_row(3, "x")
        groups.add_row(1, "y")
        groups.add_row(2, "z")
        assert [group.rows for group in groups.read()] == [["y"]]
        assert list(groups.without_image()) == ["x", "z"]


@pytest.mark.parametrize("key", [None, 1.0, True, [1], {}])
def test_other_keys_are_refused(key):
    with Groups() as groups:
        with pytest.raises(ValueError, match="image id"):
            groups.add_image(key, None)
        with pytest.raises(ValueError, match="image id"):
            groups.add_row(key, None)
        if key is not None:
            with pytest.raises(ValueError, match="annotation id"):
                groups.add_row(1, None, row_id=key)


def test_text_that_is_not_valid_unicode_can_be_a_key():
    with Groups() as groups:
        groups.add_image("\ud800", "\udfff")
        groups.add_row("\ud800", "row")
        assert [(group.image, group.rows) for group in groups.read()] == [("\udfff", ["row"])]


def test_rows_that_are_nested_too_deeply_are_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with Groups() as groups, pytest.raises(ValueError, match="nested too deeply"):
        groups.add_row(1, deep)


def test_the_temporary_file_is_removed_also_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError), Groups() as groups:
        groups.add_row(1, "row")
        assert os.listdir(tmp_path)
        raise ZeroDivisionError
    assert not os.listdir(tmp_path)
