"""Shared fixtures: a tiny encoder, a tiny chat, tiny images and stores."""
import io

import numpy as np
import pytest
from PIL import Image

from granvit.config import vision_config
from granvit.data.chat import Chat, byte_tokenizer
from granvit.data.records import ImageRecord, Region
from granvit.data.store import Store, write_store


def encoded_image(width: int, height: int, seed: int = 0, file_format: str = "PNG") -> bytes:
    """An image file of smooth random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def random_record(name: str, regions: int, seed: int, global_caption: bool = True, words: int = 3) -> ImageRecord:
    """A record of a random size with `regions` random boxes; every caption is unique to its region."""
    rng = np.random.default_rng(seed)
    width, height = (int(v) for v in rng.integers(20, 60, 2))
    made = []
    for number in range(regions):
        x1, x2 = sorted(rng.uniform(0, 1, 2))
        y1, y2 = sorted(rng.uniform(0, 1, 2))
        made.append(Region((x1, y1, x2, y2), " ".join([f"{name}-{number}"] + ["word"] * int(rng.integers(0, words)))))
    caption = f"all of {name}" if global_caption else None
    return ImageRecord(name, width, height, encoded_image(width, height, seed), caption, tuple(made))


@pytest.fixture(scope="session")
def vision():
    return vision_config("tiny-vision")


@pytest.fixture(scope="session")
def chat():
    return Chat(byte_tokenizer("qwen2.5"), "qwen2.5")


@pytest.fixture(scope="session")
def records():
    """Forty images of 0 to 7 regions; one in three has no global caption."""
    made = [random_record(f"image{i}", int(n), i, i % 3 != 0) for i, n in enumerate(np.random.default_rng(0).integers(0, 8, 40))]
    return [record for record in made if record.regions or record.global_caption]


@pytest.fixture(scope="session")
def store(records, tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "store"
    write_store(records, path, shard_bytes=20_000)  # several shards
    return Store(path)
