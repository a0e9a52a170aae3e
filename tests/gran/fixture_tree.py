"""Writes a small tree of sources, one of each format in its true shape, and the configuration of a build of them.

    python -m tests.gran.fixture_tree FOLDER

Every source has `COUNT` images of `WIDTH` x `HEIGHT` pixels, numbered, with a box each (`box_of`) and its caption, or a global
caption where the format has no boxes. Of each source one image is cut off (`CUT`), one is missing where images are files of their
own (`GONE`), and one has a box outside of it (`OUTSIDE`). Two images of another source come again (`AGAIN`).
"""
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from granvit.config import dump_config
from granvit.data.sources import FORMATS
from tests.gran.small_tree import SMALL, picture
from tests.helpers import run_config
from tests.sources import (
    test_coco,
    test_cord,
    test_docbank,
    test_flickr30k_entities,
    test_grit,
    test_paddleocr,
    test_pubtables,
    test_quads,
    test_refcoco,
    test_tar,
    test_textocr,
    test_umg,
    test_visual_genome,
)

COUNT, WIDTH, HEIGHT = 16, 48, 40
CUT, GONE, OUTSIDE, AGAIN = 3, 5, 7, (14, 15)
Box = tuple[int, int, int, int]
HOLD_IMAGES = ("cord_parquet", "refcoco_images", "tar")
WITHOUT_BOXES = ("folder", "tar")


def box_of(number: int) -> Box:
    """The box of an image, xyxy in pixels."""
    return (20, 6, 90, 34) if number == OUTSIDE else (4 + number % 5, 6, 30, 34 - number % 3)


def caption_of(form: str, number: int) -> str:
    """The caption of the box, or of the image where the format has no boxes. Boxes of COCO have a category."""
    return "dog" if form in ("coco", "coco_results") else f"thing {number}"


def image_of(form: str, number: int, ending: str) -> bytes:
    """The file of an image."""
    again = form == "jsonl" and number in AGAIN
    seed = number - AGAIN[0] if again else 1000 * list(FORMATS).index(form) + number
    data = picture(seed, WIDTH, HEIGHT, {".jpg": "JPEG", ".png": "PNG"}[ending])
    return data[: len(data) // 2] if number == CUT else data


def write_tree(root: Path) -> Path:
    """Writes the tree into `root`, which exists, and its configuration; returns the path of that."""
    sources = {}
    for form in FORMATS:
        folder = root / form
        folder.mkdir()
        read = globals()[f"_{form}"](folder)
        images = {} if form in HOLD_IMAGES else {"images": str(folder / read.pop("below", "images"))}
        filters = SMALL | ({"boxes": {}} if form in WITHOUT_BOXES else {})
        sources[form] = {"store": "plain" if form in WITHOUT_BOXES else "boxes", "read": {"format": form} | read, **images,
                         "filters": filters}  # fmt: skip
    path = root / "build.yaml"
    stage = root / "stage1.yaml"  # with the built-in tokenizer of bytes
    stage.write_text(dump_config(run_config()))
    mixes = {"half": {"questions": {"bbox2caption": "all", "global": {"plain": 20}}, "fraction": 0.5}}
    tree = {"out": str(root / "out"), "unit_images": 6, "sources": sources, "mixes": mixes, "stages": [str(stage)]}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def _save(folder: Path, name: str, number: int) -> str:
    """Writes an image of the source in `folder` to its images, unless it is to be missing; returns its name."""
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if number != GONE:
        path.write_bytes(image_of(folder.name, number, path.suffix))
    return name


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _json(path: Path, tree: Any) -> str:
    _text(path, json.dumps(tree))
    return str(path)


def _xywh(number: int) -> list[int]:
    x1, y1, x2, y2 = box_of(number)
    return [x1, y1, x2 - x1, y2 - y1]


def _corners(number: int) -> list[int]:
    x1, y1, x2, y2 = box_of(number)
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def _coco_images(folder: Path) -> list[dict]:
    return [test_coco._image(n, _save(folder, f"{n:012}.jpg", n), WIDTH, HEIGHT) for n in range(COUNT)]


def _coco(folder: Path) -> dict:
    boxes = [test_coco._box(100 + n, n, 18, _xywh(n)) for n in range(COUNT)]
    tree = test_coco.INSTANCES | {"images": _coco_images(folder), "annotations": boxes}
    return {"file": _json(folder / "instances.json", tree)}


def _coco_results(folder: Path) -> dict:
    found = [{"image_id": n, "category_id": 18, "bbox": _xywh(n), "score": 0.5} for n in range(COUNT)]
    tree = test_coco.INSTANCES | {"images": _coco_images(folder), "annotations": []}
    return {"results": _json(folder / "results.json", found), "images": _json(folder / "images.json", tree)}


def _receipt(number: int) -> dict:
    """One line with two words side by side."""
    (x1, y1, x2, y2), words = box_of(number), f"thing {number}".split()
    found = [test_cord._word(words[0], x1, y1, 18, y2 - 1), test_cord._word(words[1], 21, y1 + 1, x2, y2)]
    meta = {"version": "2.0.0", "split": "train", "image_id": number, "image_size": {"width": WIDTH, "height": HEIGHT}}
    return {"meta": meta, "valid_line": [{"words": found, "category": "menu.nm", "group_id": 3}], "roi": {}, "dontcare": []}


def _cord(folder: Path) -> dict:
    for n in range(COUNT):
        _json(folder / "json" / f"{_save(folder, f'receipt_{n:05d}.png', n)[:-4]}.json", _receipt(n))
    return {"annotations": str(folder / "json")}


def _cord_parquet(folder: Path) -> dict:
    for file in range(2):
        rows = [{"image": {"bytes": image_of("cord_parquet", n, ".png"), "path": None}, "ground_truth": json.dumps(_receipt(n))}
                for n in range(COUNT) if n % 2 == file]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{file:05d}-of-00002.parquet")
    return {"annotations": str(folder)}


def _docbank(folder: Path) -> dict:
    for n in range(COUNT):
        x1, y1, x2, y2 = (round(1000 * value / side) for value, side in zip(box_of(n), 2 * (WIDTH, HEIGHT), strict=True))
        tokens = [test_docbank._token("thing", x1, y1, 400, y2), test_docbank._token(str(n), 420, y1, x2, y2)]
        name = _save(folder, f"1.tar_1401.0001.gz_{n:02}_ori.jpg", n)
        _text(folder / "txt" / name.replace("_ori.jpg", ".txt"), test_docbank._page(*tokens))
    return {"annotations": str(folder / "txt")}


def _flickr30k_entities(folder: Path) -> dict:
    for n in range(COUNT):
        name, (x1, y1, x2, y2) = str(1000 + n), box_of(n)
        _save(folder, f"{name}.jpg", n)
        thing = test_flickr30k_entities._thing(["7"], (x1 + 1, y1 + 1, x2, y2))
        _text(folder / "Annotations" / f"{name}.xml", test_flickr30k_entities._annotation(name, (WIDTH, HEIGHT), thing))
        _text(folder / "Sentences" / f"{name}.txt", f"[/EN#7/other thing {n}] lies here .\n")
    return {"annotations": str(folder / "Annotations"), "sentences": str(folder / "Sentences")}


def _folder(folder: Path) -> dict:
    for n in range(COUNT):
        name = _save(folder, f"{n % 2}/{n // 2:02}.png", n)
        if n != GONE:
            _text(folder / "images" / name.replace(".png", ".txt"), f"thing {n}\n")
    return {"images": str(folder / "images"), "captions": ".txt"}


def _grit(folder: Path) -> dict:
    rows = []
    for n in range(COUNT):
        x1, y1, x2, y2 = box_of(n)
        phrase = [0, len(f"thing {n}"), x1 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y2 / HEIGHT, 0.9]
        rows.append(test_grit._row(f"{n:09}", f"thing {n} lies here", [phrase], [phrase], (WIDTH, HEIGHT)))
        _save(folder, f"00000/{n:09}.jpg", n)
    (folder / "parquet").mkdir()
    test_grit._write(folder / "parquet" / "00000.parquet", rows)
    return {"folder": str(folder / "parquet")}


def _jsonl(folder: Path) -> dict:
    lines = [{"image": _save(folder, f"{n}.jpg", n), "regions": [{"box": box_of(n), "caption": f"thing {n}"}]}
             for n in range(COUNT)]  # fmt: skip
    _text(folder / "all.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
    return {"annotations": str(folder / "all.jsonl"), "boxes": "absolute"}


def _paddleocr(folder: Path) -> dict:
    for n in range(COUNT):
        found = (f"thing {n}", 0.9, test_paddleocr._quad(*box_of(n)))
        _json(folder / "json" / f"{n:02}_res.json", test_paddleocr._result(f"/pages/{_save(folder, f'{n:02}.png', n)}", found))
    return {"annotations": str(folder / "json"), "inputs": "/pages"}


def _poie(folder: Path) -> dict:
    lines = [test_quads._product(n, test_quads._text(_corners(n), f"thing {n}"))
             | {"file_name": _save(folder, f"{n}.jpg", n), "width": WIDTH, "height": HEIGHT} for n in range(COUNT)]  # fmt: skip
    _text(folder / "train.txt", "\n".join(map(json.dumps, lines)) + "\n")
    return {"annotations": str(folder / "train.txt")}


def _quads(folder: Path) -> dict:
    for n in range(COUNT):
        name = _save(folder, f"X{n:011}.jpg", n)
        _text(folder / "images" / name.replace(".jpg", ".txt"), ",".join(map(str, _corners(n))) + f",thing {n}\r\n")
    return {"annotations": str(folder / "images")}


def _references() -> tuple[list[dict], list[dict]]:
    """References, and the annotations that they refer to."""
    references = [test_refcoco._reference(n, 50 + n, 100 + n, "train", f"thing {n}") for n in range(COUNT)]
    return references, [test_refcoco._box(50 + n, 100 + n, _xywh(n)) for n in range(COUNT)]


def _refcoco(folder: Path) -> dict:
    references, boxes = _references()
    images = [test_refcoco._image(100 + n, WIDTH, HEIGHT) for n in range(COUNT)]
    for n, image in enumerate(images):
        _save(folder, image["file_name"], n)
    instances = test_refcoco.INSTANCES | {"images": images, "annotations": boxes}
    pickled = test_refcoco._write_pickle(folder / "refs(unc).p", references)
    return {"references": str(pickled), "instances": _json(folder / "instances.json", instances)}


def _refcoco_images(folder: Path) -> dict:
    rows = [test_refcoco._image_row(image_of("refcoco_images", n, ".jpg"), _xywh(n), [f"thing {n}"]) for n in range(COUNT)]
    pq.write_table(pa.Table.from_pylist(rows, test_refcoco.IMAGES), folder / "val-00000-of-00001.parquet")
    return {"folder": str(folder)}


def _refcoco_table(folder: Path) -> dict:
    rows = []
    for n, (reference, box) in enumerate(zip(*_references(), strict=True)):
        image = test_refcoco._image(100 + n, WIDTH, HEIGHT)
        rows.append(reference | {
            "raw_anns": json.dumps(box), "raw_image_info": json.dumps(image), "raw_sentences": "[]", "bbox": box_of(n),
            "image_path": _save(folder, f"coco/train2014/{image['file_name']}", n), "captions": [f"thing {n}"],
            "global_image_id": f"coco.{100 + n}", "anns_id": str(50 + n),
        })  # fmt: skip
    (folder / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, test_refcoco.TABLE), folder / "parquet" / "train-00000-of-00001-3f.parquet")
    return {"folder": str(folder / "parquet")}


def _tar(folder: Path) -> dict:
    half = COUNT // 2
    for shard in range(2):
        entries = [test_tar._entry(f"{n:09}{ending}", data) for n in range(shard * half, shard * half + half)
                   for ending, data in ((".png", image_of("tar", n, ".png")), (".txt", f"thing {n}".encode()))]  # fmt: skip
        test_tar._write(folder / f"{shard:05}.tar", entries, tarfile.PAX_FORMAT)
    return {"shards": str(folder), "captions": "txt"}


def _textocr(folder: Path) -> dict:
    images = [test_textocr._image(f"{n:016x}", WIDTH, HEIGHT) for n in range(COUNT)]
    for n, image in enumerate(images):
        _save(folder, image["file_name"], n)
    words = [test_textocr._word(f"{n:016x}_1", f"{n:016x}", _xywh(n), f"thing {n}") for n in range(COUNT)]
    return {"file": _json(folder / "TextOCR_0.1_train.json", test_textocr._tree(images, words))}


def _umg(folder: Path) -> dict:
    for n in range(COUNT):
        region = test_umg._region([_corners(n)], f"thing {n}", "thing")
        name = _save(folder, f"SBU/{n // 8:05}/{n:09}.png", n)
        _json(folder / "images" / name.replace(".png", ".json"), test_umg._tree(f"picture {n}", region))
    return {"folder": str(folder / "images")}


def _visual_genome(folder: Path) -> dict:
    images = [test_visual_genome._image(n, _save(folder, f"VG_100K/{n}.jpg", n), WIDTH, HEIGHT) for n in range(COUNT)]
    regions = [{"regions": [test_visual_genome._region(50 + n, n, *_xywh(n), f"thing {n}")], "id": n} for n in range(COUNT)]
    return {"regions": _json(folder / "region_descriptions.json", regions), "images": _json(folder / "image_data.json", images)}


def _voc(folder: Path) -> dict:
    for n in range(COUNT):
        size = f"<size><width>{{}}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        xml = test_pubtables._xml(_save(folder, f"PMC{n:02}.jpg", n), [(f"thing {n}", *box_of(n))], size, WIDTH)
        _text(folder / "xml" / f"PMC{n:02}.xml", xml)
    return {"annotations": str(folder / "xml")}


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    print(write_tree(Path(sys.argv[1])))
