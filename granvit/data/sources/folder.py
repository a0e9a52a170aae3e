"""Images in a folder and the folders below, with or without a text file of the same name beside each, its global caption."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from granvit.data.sources.annotated import Annotated, Refused
from granvit.data.sources.per_image import file_parts, part_files, printable, read_bytes, with_ending

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Folder:
    """`images`: the folder; images are known by their ending. The id of an image is its path.

    `captions`: `.txt` or `.caption` reads the UTF-8 file with this ending in place of the image's; an image without one has no
    caption.
    """

    images: str | Path
    captions: Literal[".txt", ".caption"] | None = None

    def parts(self) -> Sequence[str]:
        return file_parts(self.images, IMAGE_ENDINGS, "images")

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        for name in part_files(self.images, IMAGE_ENDINGS, part):
            caption = None
            refused: tuple[tuple[str, str], ...] = ()
            if self.captions:
                path = Path(self.images, with_ending(name, self.captions))
                try:
                    caption = caption_of(read_bytes(path)) if path.exists() else None
                except ValueError as error:
                    refused = (("global", str(error)),)
            yield Annotated(printable(name), name, global_caption=caption, refused=refused)


def caption_of(data: bytes) -> str:
    """A text file's contents; `ValueError` with the reason if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("caption is not UTF-8") from None
