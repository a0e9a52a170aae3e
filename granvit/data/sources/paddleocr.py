"""Results of PaddleOCR 3's OCR pipeline, as `save_to_json` writes them: one JSON file per image, `NAME_res.json`.

https://github.com/PaddlePaddle/PaddleOCR/blob/main/docs/version3.x/pipeline_usage/OCR.en.md

    {"input_path": "images/a.png", "page_index": null, "model_settings": {"use_doc_preprocessor": false, ...},
     "dt_polys": [...], "rec_texts": ["Total", "4.95"], "rec_scores": [0.99, 0.87],
     "rec_polys": [[[1, 2], [9, 2], [9, 5], [1, 5]], ...], "rec_boxes": [[1, 2, 9, 5], ...], ...}

`rec_texts`, `rec_scores` and `rec_polys` belong together. A box is the upright rectangle around a polygon, in pixels. Neither
`rec_boxes`, which is empty for seals, nor `dt_polys`, which also has what was not recognized, is read. The mapping may be inside
`res`, as in the result's attribute `json`.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from granvit.data.sources.annotated import Annotated, RawRegion, Refused
from granvit.data.sources.per_image import OtherFormat, file_parts, printable, read_files, read_tree, text_of
from granvit.data.sources.polygons import box_of_points

_ENDINGS = (".json",)


@dataclass(frozen=True)
class PaddleOcr:
    """`annotations`: the folder of JSON files. Texts with a lower score than `min_score` are refused.

    The image is `input_path`; where that starts with the folder `inputs`, relative to it. Refused are results of a page of a
    document (there is no image of it), and those of images that the pipeline turned or unwarped before it read them (its
    document preprocessor, on by default): their boxes are not those of the image.
    """

    annotations: str | Path
    min_score: float = 0.0
    inputs: str = ""

    def parts(self) -> Sequence[str]:
        return file_parts(self.annotations, _ENDINGS, "annotations")

    def read(self, part: str) -> Iterator[Annotated | Refused]:
        return read_files(self.annotations, _ENDINGS, part, self._image, "a result of PaddleOCR 3: it has no rec_texts")

    def _image(self, path: Path, name: str) -> Annotated:
        tree = read_tree(path)
        if isinstance(tree, dict) and isinstance(tree.get("res"), dict):
            tree = tree["res"]
        if not isinstance(tree, dict) or "rec_texts" not in tree:
            raise OtherFormat
        image = tree.get("input_path")
        if not isinstance(image, str):
            raise ValueError("result names no image")
        if tree.get("page_index") is not None:
            raise ValueError("result is of a page of a document")
        if _was_changed(tree.get("doc_preprocessor_res")):
            raise ValueError("image was turned or unwarped before it was read")
        texts, scores, polygons = (tree.get(key) for key in ("rec_texts", "rec_scores", "rec_polys"))
        if not isinstance(texts, list) or not isinstance(scores, list) or not isinstance(polygons, list):
            raise ValueError("texts, scores or polygons are not a list")
        if not len(texts) == len(scores) == len(polygons):
            raise ValueError("texts, scores and polygons differ in number")
        regions: list[RawRegion] = []
        refused: list[tuple[str, str]] = []
        for number, (text, score, polygon) in enumerate(zip(texts, scores, polygons, strict=True)):
            try:
                if isinstance(score, bool) or not isinstance(score, int | float):
                    raise ValueError("score is not a number")
                if not score >= self.min_score:  # also NaN
                    raise ValueError("score is below the threshold")
                regions.append(RawRegion(box_of_points(polygon), text_of(text)))
            except ValueError as error:
                refused.append((f"text {number}", str(error)))
        return Annotated(printable(name), self._below_inputs(image), tuple(regions), refused=tuple(refused))

    def _below_inputs(self, image: str) -> str:
        path = PurePosixPath(image)
        return path.relative_to(self.inputs).as_posix() if self.inputs and path.is_relative_to(self.inputs) else image


def _was_changed(preprocessed: Any) -> bool:
    if not isinstance(preprocessed, dict):
        return False
    settings = preprocessed.get("model_settings")
    unwarped = isinstance(settings, dict) and bool(settings.get("use_doc_unwarping"))
    return unwarped or preprocessed.get("angle", -1) not in (-1, 0)
