"""Bare images in folders, and how folders of files are cut into parts."""
import os
import tracemalloc

import pytest

from granvit.data.sources import per_image
from granvit.data.sources.annotated import Annotated
from granvit.data.sources.folder import Folder
from tests.sources.reading import everything

FILES = {
    "a.jpg": "A cup.\n", "b.JPEG": None, "c.png": "", "d.webp": "Eine Tasse für «Tee»", "sub/e.bmp": None,
    "sub/f.gif": "<image>\nx",
    "sub/deep/g.tif": None, "sub/deep/h.tiff": None, "sub/deep/i.ppm": None, "sub/x.y.jpg": "Two dots.", "z/j.jpg": None,
}  # fmt: skip
ORDER = [
    "a.jpg", "b.JPEG", "c.png", "d.webp", "sub/e.bmp", "sub/f.gif", "sub/x.y.jpg", "sub/deep/g.tif", "sub/deep/h.tiff",
    "sub/deep/i.ppm", "z/j.jpg",
]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    for name, caption in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not read")
        for ending in (".txt", ".caption"):
            if caption is not None:
                path.with_suffix(ending).write_text(caption + ending)
    (tmp_path / "README.md").write_text("")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_images_in_order(images):
    reader = Folder(images)
    assert reader.parts() == [".:0", "sub:0", "sub/deep:0", "z:0"]
    assert everything(reader) == [Annotated(name, name) for name in ORDER]


@pytest.mark.parametrize("ending", [".txt", ".caption"])
def test_captions_beside_images(images, ending):
    expected = [Annotated(name, name, global_caption=None if FILES[name] is None else FILES[name] + ending) for name in ORDER]
    assert everything(Folder(images, ending)) == expected


def test_captions_that_cannot_be_read_are_refused(images):
    (images / "a.txt").write_bytes(b"\xff")
    (images / "c.txt").unlink()
    (images / "c.txt").mkdir()
    (images / "d.txt").write_bytes(b"\xef\xbb\xbfA cup.")
    first, _, third, fourth, *_ = everything(Folder(images, ".txt"))
    assert first == Annotated("a.jpg", "a.jpg", refused=(("global", "caption is not UTF-8"),))
    assert third == Annotated("c.png", "c.png", refused=(("global", "file cannot be read (IsADirectoryError)"),))
    assert fourth == Annotated("d.webp", "d.webp", global_caption="A cup.")


def test_large_folders_are_cut_into_parts(images, monkeypatch):
    monkeypatch.setattr(per_image, "FILES_IN_PART", 3)
    reader = Folder(images)
    assert reader.parts() == [".:0", ".:3", "sub:0", "sub/deep:0", "z:0"]
    assert [record.image for record in reader.read(".:3")] == ["d.webp"]
    assert [record.image for record in everything(reader)] == ORDER


def test_a_folder_is_listed_once_for_its_parts_and_again_after_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(per_image, "FILES_IN_PART", 3)
    names = [f"{number}.jpg" for number in range(8)]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    reader, listed, scandir = Folder(tmp_path), [], per_image.os.scandir
    parts = reader.parts()
    monkeypatch.setattr(per_image.os, "scandir", lambda place: listed.append(place) or scandir(place))
    assert [record.image for part in parts for record in reader.read(part)] == names
    assert len(listed) == 1
    (tmp_path / "00.jpg").write_bytes(b"x")
    os.utime(tmp_path, ns=(1, 1))
    assert [record.image for record in reader.read(".:0")] == ["0.jpg", "00.jpg", "1.jpg"]


def test_counting_does_not_list_the_names(tmp_path):
    for number in range(1000):
        (tmp_path / f"{number:0200}.jpg").touch()
    tracemalloc.start()
    Folder(tmp_path).parts()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # the names take 250 kB


def test_folders_that_hold_no_image(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=rf"images {tmp_path}.*\.jpg"):
        Folder(tmp_path).parts()
    with pytest.raises(ValueError, match=r"images .*a\.txt"):
        Folder(tmp_path / "a.txt").parts()


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / "\udcff.jpg").write_bytes(b"x")
    (record,) = everything(Folder(tmp_path))
    assert record == Annotated("\\udcff.jpg", "\udcff.jpg") and record.id.encode() and (tmp_path / record.image).is_file()


def test_folders_with_the_ending_of_files_do_not_push_files_out_of_parts(images, monkeypatch):
    monkeypatch.setattr(per_image, "FILES_IN_PART", 4)
    (images / "Z.jpg").mkdir()
    assert [record.image for record in everything(Folder(images))] == ORDER


def test_a_folder_whose_name_has_a_colon(tmp_path):
    (tmp_path / "a:0").mkdir()
    (tmp_path / "a:0" / "b.jpg").write_bytes(b"x")
    reader = Folder(tmp_path)
    assert reader.parts() == ["a:0:0"] and [record.image for record in everything(reader)] == ["a:0/b.jpg"]
