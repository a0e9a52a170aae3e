"""Shards of images as WebDataset writes them: tar files, read in a stream (https://github.com/webdataset/webdataset).

Files with the same path up to the first dot of their name follow each other and form a sample: `a/0001.jpg`, `a/0001.txt`. Only
uncompressed `.tar` files are read, with the standard library: importing `webdataset` imports PyTorch, and its reader passes over
links without a word. Nothing is written to disk, and only the image and its caption are read.
"""
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from granvit.data.sources.annotated import Annotated, Refused
from granvit.data.sources.folder import IMAGE_ENDINGS, caption_of
from granvit.data.sources.inputs import CUT
from granvit.data.sources.per_image import file_parts, part_files, printable, text_of

_NAME = re.compile(r"((?:.*/)?[^./]+)(\.[^/]*)", re.DOTALL)  # key and ending
_MOST = 1 << 28  # bytes of one file that are read into memory


@dataclass
class _Sample:
    key: str
    images: list[bytes] = field(default_factory=list)
    caption: str | None = None
    refused: list[tuple[str, str]] = field(default_factory=list)

    def finished(self, shard: str) -> Annotated | Refused:
        name = printable(f"{shard} {self.key}")
        if too_large := [reason for what, reason in self.refused if what == "image"]:
            return Refused(name, too_large[0])
        if len(self.images) == 1:
            return Annotated(name, self.images[0], global_caption=self.caption, refused=tuple(self.refused))
        return Refused(name, "sample has more than one image" if self.images else "sample has no image")


@dataclass(frozen=True)
class Tar:
    """`shards`: the folder of tar files; those in folders below are read too.

    `captions`: `txt` takes the sample's `.txt` as the image's global caption, `json` the key `caption` of its `.json`, as
    img2dataset writes it. A file whose path leads out of the archive, a link, a device, and a file above 256 MB are refused.
    """

    shards: str | Path
    captions: Literal["txt", "json"] | None = None

    def parts(self) -> Sequence[str]:
        parts = file_parts(self.shards, (".tar",), "shards")
        return [name for part in parts for name in part_files(self.shards, (".tar",), part)]

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        path = Path(self.shards, part)
        with open(path, "rb") as file:
            try:
                archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the `with` is below)
            except tarfile.TarError:
                raise ValueError(f"{path}: is not an uncompressed tar file") from None
            with archive:
                yield from self._samples(archive, file, part)

    def _samples(self, archive: tarfile.TarFile, file: BinaryIO, part: str) -> Iterator[Annotated | Refused]:
        sample: _Sample | None = None
        try:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                if member.isdir():
                    continue
                named = _NAME.fullmatch(member.name)
                if reason := _refusal(member):
                    yield Refused(printable(f"{part} {member.name}"), reason)
                elif named is None:
                    yield Refused(printable(f"{part} {member.name}"), "name of the file has no key and ending")
                else:
                    if sample and sample.key != named[1]:
                        yield sample.finished(part)
                        sample = None
                    sample = sample or _Sample(named[1])
                    self._take(sample, named[2].lower(), archive, member)
            reason = _damage(archive, file)
        except (tarfile.TarError, ValueError, OSError):  # ValueError: numbers in a damaged header
            reason = _damage(archive, file) or "file is damaged"
        whole = sample and sample.images and (self.captions is None or sample.caption is not None)
        if sample and (whole or not reason):
            yield sample.finished(part)
        if reason:
            yield Refused(part, reason)

    def _take(self, sample: _Sample, ending: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Reads a file of a sample, if it is wanted."""
        is_image = ending in IMAGE_ENDINGS
        if not is_image and ending != f".{self.captions}":
            return
        what = "image" if is_image else "global"
        if member.size > _MOST:
            sample.refused.append((what, "file is above 256 MB"))
            return
        reader = archive.extractfile(member)
        assert reader is not None  # it is a regular file
        data = reader.read()
        if is_image:
            sample.images.append(data)
            return
        try:
            sample.caption = caption_of(data) if self.captions == "txt" else _json_caption(data)
        except ValueError as error:
            sample.refused.append((what, str(error)))


def _refusal(member: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "path of the file leads out of the archive"
    if member.issym() or member.islnk():
        return "file is a link"
    return None if member.isfile() else "file is a device or a pipe"


def _damage(archive: tarfile.TarFile, file: BinaryIO) -> str | None:
    """What is wrong where `archive` stopped to read; None if the end is marked there, by a block of zeros."""
    size = os.fstat(file.fileno()).st_size
    read_to_end = file.tell() >= size
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block == tarfile.NUL * tarfile.BLOCKSIZE:
        return None
    return CUT if read_to_end or len(block) < tarfile.BLOCKSIZE else "file is damaged"


def _json_caption(data: bytes) -> str | None:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("caption is not in valid JSON") from None
    if not isinstance(tree, dict):
        raise ValueError("caption is not in a mapping")
    return None if tree.get("caption") is None else text_of(tree["caption"])
