"""Shared fixtures: a tiny encoder, a tiny chat, tiny images and stores."""
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from granvit.config import vision_config
from granvit.data.chat import Chat, byte_tokenizer
from granvit.data.conversations import build_conversations
from granvit.data.records import ImageRecord, Region
from granvit.data.store import Store
from granvit.data.store_writer import write_store


def encoded_image(width: int, height: int, seed: int = 0, file_format: str = "PNG") -> bytes:
    """An image file of random pixels."""
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


def spoken(name: str, *texts: str, image: str | None = None) -> dict:
    """A conversation in LLaVA's JSON."""
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {})


def write_spoken(folder: Path, trees: list) -> tuple[Path, Path]:
    """A JSON file of conversations, and the folder of their images."""
    images = folder / "images"
    images.mkdir()
    for tree in trees:
        if isinstance(tree, dict) and isinstance(tree.get("image"), str):
            (images / tree["image"]).write_bytes(encoded_image(40, 20))
    (folder / "conversations.json").write_text(json.dumps(trees))
    return folder / "conversations.json", images


@pytest.fixture(scope="session")
def chats():
    """Thirty conversations of one to three turns; one in three is without an image."""
    made = []
    for i in range(30):
        name, rng = f"talk{i}", np.random.default_rng(i)
        texts = [f"{name} {('asks', 'says')[n % 2]} {n}" + " word" * int(rng.integers(0, 6)) for n in range(2 * (i % 3) + 2)]
        if i % 3:
            texts[0] = f"<image>\n{texts[0]}"
        made.append(spoken(name, *texts, image=f"{name}.png" if i % 3 else None))
    return made


@pytest.fixture(scope="session")
def chat_store(chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    build_conversations(*write_spoken(folder, chats), folder / "store")
    return Store(folder / "store")


@pytest.fixture(scope="session")
def caption_store(tmp_path_factory):
    """Twelve captions as BLIP-LAION-CC-SBU-558K has them."""
    folder = tmp_path_factory.mktemp("captions")
    trees = [spoken(f"c{i}", "Describe it.\n<image>", f"a picture of {i} cups", image=f"{i}.png") for i in range(12)]
    build_conversations(*write_spoken(folder, trees), folder / "store")
    return Store(folder / "store")


FIRST = ("tests/pt/test_device.py", "tests/test_runs.py", "tests/parity/test_check.py")


def pytest_collection_modifyitems(items):
    """Sorts the tests. Those of the stand-in device come first, because autograd only knows devices that are registered before
    its first backward pass. The longest files follow, so that a parallel run does not start one of them last."""
    items.sort(key=lambda item: next((i for i, path in enumerate(FIRST) if item.nodeid.startswith(path)), len(FIRST)))
