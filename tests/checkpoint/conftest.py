"""A toy run with checkpoints."""
import pytest

from granvit.checkpoint.pretrained import start_weights
from granvit.checkpoint.run_writer import CheckpointWriter
from granvit.config import language_config, vision_config
from granvit.engine import StepInputs
from tests.helpers import run_config
from tests.toy import ToyEngine, toy_batch

VISION, LANGUAGE = vision_config("tiny-vision"), language_config("tiny-language")


def as_bytes(tensors) -> dict[str, tuple]:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in tensors}


def engine_after(config, steps: int) -> ToyEngine:
    engine = ToyEngine(config, VISION, LANGUAGE, start_weights(config, VISION, LANGUAGE))
    for step in range(1, steps + 1):
        engine.step([toy_batch(step)], StepInputs(step, 0.01, 0.9, 8, 2))
    return engine


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 2 and 4: its directory, its configuration, its engine after step 4."""
    config = run_config(train={"keep_checkpoints": 2})
    writer = CheckpointWriter(tmp_path, config, VISION, LANGUAGE)
    ToyEngine(config, VISION, LANGUAGE, writer.record_start(start_weights(config, VISION, LANGUAGE)))
    writer.save(engine_after(config, 2), 2, {"questions": 20, "skipped": 1})
    engine = engine_after(config, 4)
    writer.save(engine, 4, {"questions": 40, "skipped": 1})
    return tmp_path, config, engine
