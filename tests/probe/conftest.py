"""A store of images with coloured boxes, and tiny encoders in directories: two published ones, a constant one, and a run."""
import io

import numpy as np
import pytest
from PIL import Image

from granvit.checkpoint.pretrained import write_pretrained
from granvit.checkpoint.run_writer import CheckpointWriter
from granvit.config import language_config, vision_config
from granvit.data.records import ImageRecord, Region
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from granvit.init import initial_value
from granvit.models import VisionConfig, parameter_shapes, vision_shapes
from tests.helpers import run_config
from tests.toy import ToyEngine

VISION, LANGUAGE = vision_config("tiny-vision"), language_config("tiny-language")
WIDE = VISION.model_copy(update={"width": 24, "patch_size": 16, "built_level": "final"})
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def coloured(name: str, seed: int, regions: int) -> ImageRecord:
    """An image of noise with `regions` boxes of one colour each, which the caption names."""
    rng = np.random.default_rng(seed)
    width, height = 48, int(rng.integers(32, 56))
    pixels = rng.integers(90, 160, (height, width, 3)).astype(np.uint8)
    made = []
    for number in range(regions):
        left, top = int(rng.integers(0, 10)) + 16 * (number % 3), int(rng.integers(0, height - 20))
        across, down = int(rng.integers(5, 7)), int(rng.integers(5, 20))
        colour = list(COLOURS)[int(rng.integers(3))]
        pixels[top : top + down, left : left + across] = COLOURS[colour]
        box = (left / width, top / height, (left + across) / width, (top + down) / height)
        made.append(Region(box, f"{'tall' if down > 12 else 'flat'} box, {colour}"))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ImageRecord(name, width, height, buffer.getvalue(), f"all of {name}", tuple(made))


@pytest.fixture(scope="session")
def regions(tmp_path_factory):
    """Thirty images of one to three regions, and one without any."""
    path = tmp_path_factory.mktemp("probed") / "regions"
    write_store([coloured(f"r{i}", i, [3, 2, 3, 1, 2][i % 5]) for i in range(30)] + [coloured("none", 99, 0)], path)
    return Store(path)


@pytest.fixture(scope="session")
def trained_on(tmp_path_factory):
    """Eight other images."""
    path = tmp_path_factory.mktemp("probed") / "trained_on"
    write_store([coloured(f"t{i}", 1000 + i, 1) for i in range(8)], path)
    return Store(path)


def values(shapes, seed: int) -> dict[str, np.ndarray]:
    """Start weights that are large enough for the features of two images to differ."""
    rng = np.random.default_rng(seed)
    return {name: initial_value(name, shape, seed) + 0.2 * rng.standard_normal(shape).astype(np.float32)
            for name, shape in shapes.items()}  # fmt: skip


def write_encoder(path, vision, tensors) -> None:
    write_pretrained(path, vision, None, vision_shapes(vision), tensors.items())


def write_run(path, vision: VisionConfig, trained_on: Store, recorded: str | None = None, init_from=None, seed: int = 0,
              weight: float = 1.0) -> None:  # fmt: skip
    """A run's directory with a checkpoint after step 2, of random weights. `recorded` is the fingerprint of the training store in
    the checkpoint (default: the true one), `weight` that of self-distillation in its configuration."""
    model = {"vision": "tiny-vision", "language": "tiny-language", "init": "random"}
    config = run_config(
        output=str(path),
        seed=seed,
        distill={"weight": weight},
        model=model | ({} if init_from is None else {"init_from": str(init_from)}),
        data={"buckets": [{"length": 420, "answers": 100}], "sources": [{"path": str(trained_on.path)}]},
    )
    fingerprints = {f"store {trained_on.path}": recorded or trained_on.fingerprint}
    writer = CheckpointWriter(path, config, vision, LANGUAGE, fingerprints=fingerprints)
    start = values(parameter_shapes(vision, LANGUAGE), 3 + seed)
    writer.save(ToyEngine(config, vision, LANGUAGE, writer.record_start(start.items())), 2, {"questions": 8, "skipped": 0})


@pytest.fixture(scope="session")
def encoders(tmp_path_factory, trained_on):
    """Directories: `start`, `wide` (another width and patch size), `constant` (one vector for every patch), `run`."""
    folder = tmp_path_factory.mktemp("encoders")
    write_encoder(folder / "start", VISION, values(vision_shapes(VISION), 1))
    write_encoder(folder / "wide", WIDE, values(vision_shapes(WIDE), 2))
    zeros = {name: np.zeros(shape, np.float32) for name, shape in vision_shapes(VISION).items()}
    zeros["vision.embeddings.patch_embedding.bias"] = np.arange(1, VISION.width + 1, dtype=np.float32)
    write_encoder(folder / "constant", VISION, zeros)
    write_run(folder / "run", VISION, trained_on)
    return folder
