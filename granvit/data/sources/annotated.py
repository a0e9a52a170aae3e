"""What readers of public data sets hand over: images with their annotations, as the source states them.

A reader translates one FORMAT, not one data set. It neither opens images nor checks boxes against them: that is done once, for
all formats, by what reads its `Annotated`. It reads in a stream: memory does not grow with the size of the source.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from granvit.data.records import BboxFrame, BoxUnit


@dataclass(frozen=True)
class RawRegion:
    """A box as written, as xyxy, and its caption; empty if the source has none.

    The box has the source's unit and frame. It can be inverted, outside of the image, or NaN.
    """

    box: tuple[float, float, float, float]
    caption: str


@dataclass(frozen=True)
class Annotated:
    """One image and what the source says about it.

    `id` is unique in the source. `image` is the path of the image relative to the source's folder of images (with `/`), or the
    encoded file itself. `size` is width and height as the source states them, None if it does not. `refused` has
    `(what, reason)` for each annotation of the image that could not be read; reasons are fixed sentences, so that they can be
    counted.
    """

    id: str
    image: str | bytes
    regions: tuple[RawRegion, ...] = ()
    global_caption: str | None = None
    unit: BoxUnit = "absolute"
    frame: BboxFrame = "image"
    size: tuple[int, int] | None = None
    refused: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Refused:
    """A whole record that could not be read: what it is (an id, or a place in a file), and the reason, a fixed sentence."""

    what: str
    reason: str


class Reader(Protocol):
    """Reads one source. Its fields are the source's keys in the configuration: paths and choices of the format."""

    def parts(self) -> Sequence[str]:
        """Names of the pieces that can be read independently of each other, in a fixed order: files, mostly.

        `ValueError` names a file or folder that is missing, and what to do.
        """
        ...

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        """The records of a part, in a fixed order. A damaged record is a `Refused`; where the rest of the part cannot be read, as
        in a JSON file that is cut off, the last item is one. `ValueError` if the part is of another format."""
        ...
