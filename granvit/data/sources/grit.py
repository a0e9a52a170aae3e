"""GRIT's Parquet files (https://huggingface.co/datasets/zzliang/GRIT, paper https://arxiv.org/abs/2306.14824).

Columns are `key`, `caption`, `url`, `width`, `height`, `noun_chunks`, `ref_exps` and others. The last two are lists of
`[start, end, x1, y1, x2, y2, score]`: the characters of the caption that the box belongs to, and the box relative to the image's
width and height. A referring expression is a noun chunk with the words that depend on it; both have the same boxes.

The images have to be downloaded, with img2dataset; `--save_additional_columns` puts `noun_chunks` and `ref_exps` into the Parquet
files that it writes beside the images, and these have a `key` that names the image. So they are the ones to read.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.inputs import Damaged, need_folder, read_parquet
from granvit.data.sources.polygons import box_of_xyxy, whole_size


@dataclass(frozen=True)
class Grit:
    """Phrases of captions as regions, from the Parquet files in `folder`. The caption is the global caption.

    `image` is the path of an image, in which `{key}` is the row's key and `{file}` the name of the Parquet file without
    `.parquet`: `{file}/{key}.jpg` for img2dataset's format files. `phrases` says which list is read. A key may come again in
    another row or file; so the id is the file's name with the number of the row, from 0.
    """

    folder: str | Path
    image: str = "{file}/{key}.jpg"
    phrases: Literal["ref_exps", "noun_chunks"] = "ref_exps"

    def parts(self) -> Sequence[str]:
        """The Parquet files of the folder. `ValueError` if there is none."""
        names = sorted(path.name for path in need_folder(self.folder, "folder").glob("*.parquet"))
        if not names:
            raise ValueError(f"folder {self.folder}: has no .parquet file")
        return names

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        """The rows of a file, in order. `ValueError` if it is not Parquet or lacks a column."""
        path = Path(self.folder, part)
        try:
            for number, row in enumerate(read_parquet(path, ("key", "caption", "width", "height", self.phrases))):
                yield self._annotated(f"{path.stem}/{number}", path.stem, row)
        except Damaged as damage:
            yield Refused(damage.name, damage.reason)

    def _annotated(self, name: str, file: str, row: dict[str, Any]) -> Annotated | Refused:
        key, caption, phrases = row["key"], row["caption"], row[self.phrases]
        if isinstance(key, bool) or not isinstance(key, int | str) or key == "":
            return Refused(name, "key is neither a whole number nor text")
        if not isinstance(caption, str):
            return Refused(name, "caption is not text")
        if not isinstance(phrases, list):
            return Refused(name, "phrases are not a list")
        regions = []
        refused = []
        for place, phrase in enumerate(phrases):
            try:
                regions.append(_region(phrase, caption))
            except ValueError as error:
                refused.append((f"phrase {place}", str(error)))
        return Annotated(
            id=name,
            image=self.image.replace("{file}", file).replace("{key}", str(key)),
            regions=tuple(regions),
            global_caption=caption,
            unit="relative",
            size=whole_size(row["width"], row["height"]),
            refused=tuple(refused),
        )


def _region(phrase: Any, caption: str) -> RawRegion:
    if not isinstance(phrase, list) or len(phrase) != 7 or any(not isinstance(value, int | float) for value in phrase):
        raise ValueError("phrase is not seven numbers")
    start, end = phrase[:2]
    if not (0 <= start < end <= len(caption) and start == int(start) and end == int(end)):
        raise ValueError("phrase is not a part of the caption")
    return RawRegion(box_of_xyxy(phrase[2:6]), caption[int(start) : int(end)])
