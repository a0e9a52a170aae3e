"""Checkpoints loaded into the other framework, and converted to foreign layouts and back: no byte may differ."""
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from granvit.checkpoint.convert import convert
from granvit.checkpoint.run import Checkpoint, newest_checkpoint
from granvit.checkpoint.run_writer import CheckpointWriter
from granvit.checkpoint.tensors import TensorSet
from granvit.engine import Group
from granvit.launch import load_engine_class
from parity.compare import Row
from parity.fixture import Fixture

GROUPS: tuple[Group, ...] = ("model", "teacher", "first_moment", "second_moment")


def rows(fixture: Fixture) -> Iterator[Row]:
    """A row for every tensor of every round trip; its error is the share of bytes that differ."""
    with tempfile.TemporaryDirectory(prefix="granvit-parity-") as folder:
        for source, target in (("mindspore", "torch"), ("torch", "mindspore")):
            yield from _resume(fixture, source, target, Path(folder) / source)
        checkpoint = newest_checkpoint(Path(folder) / "mindspore")
        assert checkpoint is not None
        for layout in layouts(fixture):
            yield from _convert(checkpoint, layout, Path(folder))


def layouts(fixture: Fixture) -> list[str]:
    """The foreign layouts that can hold the fixture's models."""
    c, found = fixture.language, ["mindspore", "qwen2" if fixture.is_qwen2 else "llama"]
    if fixture.is_siglip:
        found += ["siglip", "llava"]
    if c.heads * c.head_dim == c.width:
        found.append("mindformers")
    return found


def notes(fixture: Fixture) -> list[str]:
    """Which round trips were not made, and why."""
    if "mindformers" in layouts(fixture):
        return []
    return [f"checkpoint: MindFormers' layout cannot hold {fixture.language.name!r} (its heads are not width / heads wide)"]


def _convert(checkpoint: Checkpoint, layout: str, folder: Path) -> Iterator[Row]:
    """Converts the checkpoint to a foreign layout and back: a row for every tensor that the layout holds."""
    foreign, returned = folder / f"in {layout}", folder / f"from {layout}"
    convert(checkpoint.path, foreign, layout)
    convert(foreign, returned, "default")
    tensors = TensorSet(returned, "model")
    for name, array in checkpoint.tensors("model"):
        if name in tensors.shapes:
            yield bytes_row(f"{layout} and back", name, array, tensors.read(name))


def _resume(fixture: Fixture, source: str, target: str, run: Path) -> Iterator[Row]:
    """Loads the checkpoint after a step in `source` into `target`: weights, teacher and moments."""
    config = fixture.config("stage1")
    batches = fixture.step_batches(1)
    writer = CheckpointWriter(run, config, fixture.vision, fixture.language)
    start = writer.record_start(fixture.weights.items())
    engine = load_engine_class(source)(config, fixture.vision, fixture.language, start)
    engine.step(batches, fixture.step_inputs(1, batches))
    writer.save(engine, 1, {"questions": 0, "skipped": 0})
    checkpoint = newest_checkpoint(run)
    other = load_engine_class(target)(config, fixture.vision, fixture.language, checkpoint.tensors("model"))
    for group in GROUPS[1:]:
        other.load(group, checkpoint.tensors(group))
    for group in GROUPS:
        found = dict(other.tensors(group))
        for name, array in engine.tensors(group):
            yield bytes_row(f"{group}, {source} to {target}", name, array, found.get(name))


def bytes_row(kind: str, name: str, expected: np.ndarray, found: np.ndarray | None) -> Row:
    """The verdict on one tensor's raw bytes. Its error is the share of bytes that differ."""
    nothing, exact = (0.0, 0.0), (np.finfo(float).tiny,) * 2
    if found is None:
        return Row("checkpoint", kind, name, expected.shape, nothing, (np.nan, np.nan), exact, "missing")
    a, b = (np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8) for x in (expected, found))
    share = float((a != b).mean()) if a.shape == b.shape and a.size else float(a.shape != b.shape)
    return Row("checkpoint", kind, name, expected.shape, nothing, (share, share), exact, "" if share == 0 else "other bytes")
