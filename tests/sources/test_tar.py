"""Shards as WebDataset writes them."""
import io
import json
import tarfile

import pytest

from granvit.data.sources import tar
from granvit.data.sources.annotated import Annotated, Refused
from granvit.data.sources.tar import Tar
from tests.sources.reading import everything

FILES = {  # two images without captions, one with a path, one with two dots; other files are not read
    "000000000.jpg": b"jpg 0", "000000000.txt": b"A cup.", "000000000.json": b'{"caption": "A red cup.", "key": "000000000"}',
    "000000001.jpg": b"jpg 1", "000000001.txt": "Thé".encode(), "000000001.json": json.dumps({"caption": "Thé"}).encode(),
    "000000002.png": b"png 2",
    "a/b.c/000000003.JPEG": b"jpg 3", "a/b.c/000000003.TXT": b"\xef\xbb\xbfBOM", "a/b.c/000000003.json": b'{"caption": null}',
    "000000004.seg.png": b"mask", "000000004.cls": b"7", "000000004.webp": b"webp 4",
    "000000005.txt": b"<image>\n<|im_end|>", "000000005.json": b'{"caption": ""}', "000000005.bmp": b"bmp 5",
    "000000006.jpg": b"", "000000007.pyd": b"\x80\x04N.", "000000007.gif": b"gif 7", "000000008.tif": b"tif 8",
    "x/000000008.tif": b"tif",
    "000000009.jpg": b"jpg 9", "000000009.pth": b"\x80\x04N.",
}  # fmt: skip
EXPECTED = [  # key, image, caption of the text file, caption of the JSON file
    ("000000000", b"jpg 0", "A cup.", "A red cup."), ("000000001", b"jpg 1", "Thé", "Thé"), ("000000002", b"png 2", None, None),
    ("a/b.c/000000003", b"jpg 3", "BOM", None), ("000000004", b"webp 4", None, None),
    ("000000005", b"bmp 5", "<image>\n<|im_end|>", ""), ("000000006", b"", None, None), ("000000007", b"gif 7", None, None),
    ("000000008", b"tif 8", None, None), ("x/000000008", b"tif", None, None), ("000000009", b"jpg 9", None, None),
]  # fmt: skip


def _entry(name, data=b"", kind=tarfile.REGTYPE, link="", size=None):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, len(data) if size is None else size
    return entry, data


def _write(path, entries, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as archive:
        for entry, data in entries:
            archive.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("captions", [None, "txt", "json"])
def test_samples(tmp_path, captions, form):
    _write(tmp_path / "00000.tar", [_entry(*file) for file in FILES.items()], form)
    _write(tmp_path / "00001.tar", [_entry("a/", kind=tarfile.DIRTYPE), _entry("a/000000000.jpg", b"x")], form)
    reader = Tar(tmp_path, captions)
    assert reader.parts() == ["00000.tar", "00001.tar"]
    assert everything(reader) == [
        *(
            Annotated(f"00000.tar {key}", image, global_caption={"txt": text, "json": json_text, None: None}[captions])
            for key, image, text, json_text in EXPECTED
        ),
        Annotated("00001.tar a/000000000", b"x"),
    ]


def test_what_is_not_a_file_in_the_archive_is_refused_and_the_rest_stays(tmp_path):
    _write(
        tmp_path / "a.tar",
        [
            _entry("../x.jpg", b"x"), _entry("/x.jpg", b"x"), _entry("a/../../x.jpg", b"x"), _entry("1.jpg", b"1"),
            _entry("2.jpg", kind=tarfile.SYMTYPE, link="/etc/hostname"), _entry("3.jpg", kind=tarfile.LNKTYPE, link="1.jpg"),
            _entry("4.jpg", kind=tarfile.CHRTYPE), _entry("5.jpg", kind=tarfile.FIFOTYPE), _entry("1.txt", b"A cup."),
            _entry("README", b"x"), _entry(".hidden", b"x"),
            _entry("6.jpg", b"x"), _entry("6.png", b"x"), _entry("7.txt", b"x"), _entry("8.jpg", b"8"), _entry("8.txt", b"\xff"),
            _entry("9.txt", b"\xff"),
            _entry("\udcff.jpg", b"9"),
        ],
    )  # fmt: skip
    outside = "path of the file leads out of the archive"
    no_key = "name of the file has no key and ending"
    assert everything(Tar(tmp_path, "txt")) == [
        Refused("a.tar ../x.jpg", outside), Refused("a.tar /x.jpg", outside), Refused("a.tar a/../../x.jpg", outside),
        Refused("a.tar 2.jpg", "file is a link"), Refused("a.tar 3.jpg", "file is a link"),
        Refused("a.tar 4.jpg", "file is a device or a pipe"), Refused("a.tar 5.jpg", "file is a device or a pipe"),
        Refused("a.tar README", no_key), Refused("a.tar .hidden", no_key),
        Annotated("a.tar 1", b"1", global_caption="A cup."), Refused("a.tar 6", "sample has more than one image"),
        Refused("a.tar 7", "sample has no image"), Annotated("a.tar 8", b"8", refused=(("global", "caption is not UTF-8"),)),
        Refused("a.tar 9", "sample has no image"), Annotated("a.tar \\udcff", b"9"),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"] and not (tmp_path.parent / "x.jpg").exists()


def test_captions_in_bad_json_and_large_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "_MOST", 30)
    captions = [b"{", b"[]", b'{"caption": 5}', b"[" * 29, b"x" * 31]
    entries = [_entry(f"{number}.{ending}", data) for number, caption in enumerate(captions) for ending, data in
               (("json", caption), ("jpg", b"x"))]  # fmt: skip
    _write(tmp_path / "a.tar", [*entries, _entry("5.jpg", b"x" * 31), _entry("6.jpg", b"x" * 31), _entry("6.png", b"x")])
    reasons = [
        "caption is not in valid JSON", "caption is not in a mapping", "caption is not text", "caption is not in valid JSON",
        "file is above 256 MB",
    ]  # fmt: skip
    assert everything(Tar(tmp_path, "json")) == [
        *(Annotated(f"a.tar {number}", b"x", refused=(("global", reason),)) for number, reason in enumerate(reasons)),
        Refused("a.tar 5", "file is above 256 MB"), Refused("a.tar 6", "file is above 256 MB"),
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_cut_off_anywhere_gives_what_was_whole(tmp_path, form):
    """The block of zeros after the last file marks the end: without it, the shard is cut off."""
    files = [(f"{number}.{ending}", b"%d" % number * 600) for number in range(3) for ending in ("jpg", "txt")]
    path = _write(tmp_path / "a.tar", [_entry(*file) for file in files], form)
    whole = path.read_bytes()
    records = [Annotated(f"a.tar {n}", b"%d" % n * 600, global_caption=f"{n}" * 600) for n in range(3)]
    assert everything(Tar(tmp_path, "txt")) == records
    step = 3 * 512  # a file with its header
    more = (600, step - 1, step + 5, 3 * step + 700, 6 * step - 900, 6 * step + 511)
    for length in (*range(step, 6 * step + 1, step), *more):
        path.write_bytes(whole[:length])
        complete = length // (2 * step)
        assert everything(Tar(tmp_path, "txt")) == [*records[:complete], Refused("a.tar", "file ends in the middle")], length
    path.write_bytes(whole[: 6 * step + 512])
    assert everything(Tar(tmp_path, "txt")) == records
    damaged = bytearray(whole)
    damaged[2 * step + 150] ^= 1  # the checksum of the third file's header
    path.write_bytes(damaged)
    assert everything(Tar(tmp_path, "txt")) == [records[0], Refused("a.tar", "file is damaged")]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_cut_off_in_a_long_name(tmp_path, form):
    """The name is in a file of its own, before the one that it belongs to."""
    key = "n" * 300
    path = _write(tmp_path / "a.tar", [_entry("1.jpg", b"1"), _entry(f"{key}.jpg", b"2")], form)
    first = Annotated("a.tar 1", b"1")
    assert everything(Tar(tmp_path)) == [first, Annotated(f"a.tar {key}", b"2")]
    whole = path.read_bytes()
    for length in (1024 + 300, 1024 + 512, 1024 + 700, 1024 + 1024, 1024 + 1100, 1024 + 1536):
        path.write_bytes(whole[:length])
        assert everything(Tar(tmp_path)) == [first, Refused("a.tar", "file ends in the middle")], length


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    _write(tmp_path / "a.tar", [_entry(f"{number}.jpg", b"x") for number in range(100)])
    kept = []
    opened = tarfile.open

    def watched(*arguments, **options):
        kept.append(opened(*arguments, **options))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tarfile, "open", watched)
        assert all(len(kept[0].members) <= 1 for _ in Tar(tmp_path).read("a.tar"))


def test_files_of_another_format_and_addresses(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"PAR1" * 300)
    with pytest.raises(ValueError, match=r"a\.tar.*tar file"):
        everything(Tar(tmp_path))
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(*_entry("a.jpg"))
    with pytest.raises(ValueError, match=r"a\.tar.*uncompressed"):
        everything(Tar(tmp_path))
    for address in ("pipe:touch gone", "https://example.org/shards"):
        with pytest.raises(ValueError, match=f"shards {address}"):
            Tar(address).parts()
    (tmp_path / "pipe:touch gone.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    with pytest.raises(ValueError, match=r"pipe:touch gone\.tar.*tar file"):
        list(Tar(tmp_path).read("pipe:touch gone.tar"))
