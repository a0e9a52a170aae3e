"""A small tree of sources: for tests that need a build, not every format."""
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

SMALL = {"shorter_side": {"above": 20}, "box_area": {"above": 16}}


def picture(seed: int, width: int = 48, height: int = 40, form: str = "PNG", **options: Any) -> bytes:
    """An image of noise that no other seed resembles."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def write_tree(root: Path) -> Path:
    """Two sources in the folder `root`, 130 images with duplicates among them, and their configuration; returns its path."""
    (root / "images").mkdir(parents=True)
    lines = []
    for number in range(90):
        name = f"{number:03d}.png"
        (root / "images" / name).write_bytes(picture(number % 85))  # 85 to 89 repeat 0 to 4
        boxes = [[2, 2, 12, 12], [5, 6, 25, 20], [0, 0, 3, 3], [10, 10, 60, 20]][: number % 5]
        regions = [{"box": box, "caption": f"thing {k} of {number}"} for k, box in enumerate(boxes)]
        lines.append(json.dumps({"image": name, "regions": regions, "global": f"picture {number}"}))
    lines[7] = '{"image": "missing.png", "regions": [{"box": [1, 1, 20, 20], "caption": "gone"}]}'
    lines[8] = '{"image": "../outside.png", "regions": []}'
    lines[9] = "not JSON"
    (root / "lines.jsonl").write_text("\n".join(lines) + "\n")
    for shard in range(2):
        with tarfile.open(root / f"shard{shard}.tar", "w") as archive:
            for number in range(20):
                for ending, data in ((".png", picture(200 + 20 * shard + number)), (".txt", f"tar {number}".encode())):
                    info = tarfile.TarInfo(f"{number:04d}{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    (root / "tars").mkdir()
    for shard in range(2):
        (root / f"shard{shard}.tar").rename(root / "tars" / f"shard{shard}.tar")
    tree = {
        "out": str(root / "out"),
        "unit_images": 16,
        "sources": {
            "lines": {"store": "natural", "images": str(root / "images"), "filters": SMALL,
                      "read": {"format": "jsonl", "annotations": str(root / "lines.jsonl"), "boxes": "absolute"}},
            "tars": {"store": "plain", "read": {"format": "tar", "shards": str(root / "tars"), "captions": "txt"},
                     "filters": {**SMALL, "boxes": {}}},
        },
    }  # fmt: skip
    path = root / "build.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
