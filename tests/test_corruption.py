"""Files damaged at random: reading gives the values that were written, or raises a `ValueError` or `OSError` that names a file.

A seed determines the cases. `python -m tests.test_corruption COUNT SEED` runs more of them.
"""
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from granvit.checkpoint.contents import open_contents
from granvit.checkpoint.history import history
from granvit.checkpoint.layouts import Layout
from granvit.checkpoint.layouts.qwen2 import QWEN2
from granvit.checkpoint.layouts.siglip import SIGLIP
from granvit.checkpoint.pretrained import start_weights
from granvit.checkpoint.run import newest_checkpoint, state_digest
from granvit.checkpoint.run_writer import CheckpointWriter
from granvit.checkpoint.tensors import TensorWriter
from granvit.config import dump_config, load_config, resolve_models
from granvit.data.chat import Chat, byte_tokenizer
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from granvit.init import initial_values
from granvit.logs import MetricsFile
from granvit.models import parameter_shapes, part_of
from tests.conftest import random_record
from tests.helpers import rewrite_as_format_1, run_config
from tests.toy import ToyEngine

CASES = 150  # for each of the three readers
KINDS = ("flip", "swap", "insert", "zero", "cut", "empty", "misspell")
MODEL = {"init": "pretrained", "weights_vision": "vision", "weights_language": "language"}


def make_run(path: Path) -> Callable[[], object]:
    """A run with a trained and a frozen part, an evaluation and metrics; returns what reads all of it."""
    config = run_config(output=str(path))
    vision, language = resolve_models(config)
    values = initial_values(parameter_shapes(vision, language), 0)
    writer = CheckpointWriter(path, config, vision, language)
    writer.save(ToyEngine(config, vision, language, writer.record_start(values.items())), 2, {"questions": 8, "skipped": 0})
    (path / "config.yaml").write_text(dump_config(config))
    metrics = [{"step": step, "loss": 1.5, "loss_caption": 1.0, "loss_distill": 0.5} for step in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (path / "eval").mkdir()
    table = {"bbox2caption": {"samples": 4.0, "rouge_l": 0.25}}
    (path / "eval" / "step_0000002.json").write_text(json.dumps({"step": 2, "table": table, "predictions": []}))

    def read() -> object:
        checkpoint = newest_checkpoint(path)
        history(checkpoint)
        load_config(path / "config.yaml")
        MetricsFile(path / "metrics.jsonl", 2).close()
        groups = ("model", "teacher", "first_moment", "second_moment")
        return checkpoint.step, {(group, n): a.tobytes() for group in groups for n, a in checkpoint.tensors(group)}

    return read


def make_store(path: Path) -> Callable[[], object]:
    """A store of two shards; returns what reads every record and every text. Texts and sizes have no checksum: only read."""
    write_store([random_record(f"r{i}", 3, i) for i in range(6)], path, shard_bytes=9000)

    def read() -> object:
        store = Store(path)
        assert len(store.texts(0, store.records + store.regions)) == store.records + store.regions
        return [store.record(i) for i in range(store.records)]

    return read


def publish(path: Path, layout: Layout, tensors: dict[str, np.ndarray], config: dict, shard_bytes: int) -> None:
    path.mkdir(parents=True)
    named = {layout.spellings[0].foreign(name): array for name, array in tensors.items()}
    with TensorWriter(path, "model", {n: a.shape for n, a in named.items()}, shard_bytes, checksums=False) as writer:
        for name, array in named.items():
            writer.add(name, array)
        writer.finish()
    (path / "config.json").write_text(json.dumps(config))


def make_published(path: Path) -> Callable[[], object]:
    """An encoder and a decoder as published; returns what starts a run from them. There are no checksums: only read."""
    model = MODEL | {key: str(path / MODEL[key]) for key in ("weights_vision", "weights_language")}
    config = run_config(model=model)
    vision, language = resolve_models(config)
    values = initial_values(parameter_shapes(vision.with_all_blocks, language), 0)
    parts = {part: {n: a for n, a in values.items() if part_of(n) == part} for part in ("vision", "language")}
    publish(path / "vision", SIGLIP, parts["vision"], SIGLIP.write_config(vision, None), 1 << 30)
    publish(path / "language", QWEN2, parts["language"], QWEN2.write_config(None, language), 40_000)
    pixels = {"image_mean": list(vision.mean), "image_std": list(vision.std), "resample": 3}
    (path / "vision" / "preprocessor_config.json").write_text(json.dumps(pixels))
    byte_tokenizer("qwen2.5").save(str(path / "language" / "tokenizer.json"))

    def read() -> object:
        for name, _ in start_weights(config, vision, language):
            assert name in values
        open_contents(path / "vision")
        Chat.from_file(path / "language" / "tokenizer.json", "qwen2.5").answer_ids("a cup")

    return read


def misspelled(rng: np.random.Generator, data: bytes) -> bytes:
    """JSON with one random key misspelled. The checksum in a state.json is recomputed, so that it does not reveal the change."""
    tree = json.loads(data)
    objects, todo = [], [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            objects += [node] if node else []
            todo += node.values()
        elif isinstance(node, list):
            todo += node
    if not objects:
        return b"[]"
    target = objects[rng.integers(len(objects))]
    key = list(target)[rng.integers(len(target))]
    target[key + "s"] = target.pop(key)
    if isinstance(tree, dict) and "sha256" in tree and "parts" in tree:
        tree["sha256"] = state_digest({k: v for k, v in tree.items() if k != "sha256"})
    return json.dumps(tree).encode()


def damaged(rng: np.random.Generator, kind: str, data: bytes) -> bytes:
    """The bytes with one damage of this kind, in half of the cases in the first 4 KB, where headers are."""
    at = int(rng.integers(min(len(data), 4096) if rng.integers(2) else len(data)))
    changed = bytearray(data)
    if kind == "flip":
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == "swap":
        other = min(at + 1, len(data) - 1)
        changed[at], changed[other] = changed[other], changed[at]
    elif kind == "insert":
        changed.insert(at, int(rng.integers(256)))
    elif kind == "zero":
        changed[at] = 0
    elif kind == "cut":
        del changed[at:]
    elif kind == "empty":
        changed.clear()
    return bytes(changed)


def put(path: Path, data: bytes) -> None:
    """Replaces a file by a new one; memory maps of the old file stay valid."""
    temporary = path.with_name(".put")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def faults(root: Path, make: Callable, count: int, seed: int) -> list[str]:
    """Damages one file at a time; returns the cases with a wrong outcome."""
    rng, found = np.random.default_rng(seed), []
    read = make(root)
    expected = read()
    originals = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    files = list(originals)
    for number in range(count):
        path = files[rng.integers(len(files))]
        kind = KINDS[rng.integers(len(KINDS))]
        if kind == "misspell":
            json_files = [file for file in files if file.suffix == ".json"]
            path = json_files[rng.integers(len(json_files))]
            new = misspelled(rng, originals[path])
        else:
            new = damaged(rng, kind, originals[path])
        put(path, new)
        case = f"{number} {kind} {path.relative_to(root)}"
        try:
            if read() != expected:
                found.append(f"{case}: other values, without an error")
        except (ValueError, OSError) as error:
            said = str(error)
            if "\n" in said.strip() and path.suffix != ".yaml":
                found.append(f"{case}: several lines: {said}")
            elif "record is damaged" not in said and not any(name in said for name in (path.name, path.parent.name, str(root))):
                found.append(f"{case}: names no file: {type(error).__name__}: {said}")
        except BaseException as error:
            found.append(f"{case}: {type(error).__name__}: {error}")
        put(path, originals[path])
        for file in root.rglob("*"):
            if file.is_file() and file not in originals:
                file.unlink()
        if path.name != "metrics.jsonl" and (metrics := root / "metrics.jsonl") in originals:
            put(metrics, originals[metrics])
    return found


MAKERS = {"run": make_run, "store": make_store, "published": make_published}


@pytest.mark.parametrize("what", MAKERS)
def test_a_damaged_file_is_named_or_does_no_harm(what, tmp_path):
    assert faults(tmp_path / what, MAKERS[what], CASES, 0) == []


def without_config(state: dict) -> None:
    del state["config"]


def with_no_questions_per_row(state: dict) -> None:
    state["config"]["data"]["regions_per_row"] = 0


def with_rows_as_text(state: dict) -> None:
    state["config"]["train"]["global_batch"] = "4"


def with_a_list_as_section(state: dict) -> None:
    state["config"]["train"] = [4]


@pytest.mark.parametrize("change", [without_config, with_no_questions_per_row, with_rows_as_text, with_a_list_as_section])
def test_a_state_of_format_1_that_cannot_be_converted_is_named(change, tmp_path):
    """Its checksum is right: the fault shows only when `train.global_batch` is converted to rows."""
    make_run(tmp_path)
    checkpoint = newest_checkpoint(tmp_path).path
    rewrite_as_format_1(checkpoint)
    assert newest_checkpoint(tmp_path).config.train.global_batch == 2
    state = json.loads((checkpoint / "state.json").read_text())
    del state["sha256"]
    change(state)
    (checkpoint / "state.json").write_text(json.dumps({"sha256": state_digest(state)} | state))
    with pytest.raises(ValueError, match=r"step_0000002/state\.json: .*damaged"):
        newest_checkpoint(tmp_path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, maker in MAKERS.items():
            print("\n".join([f"== {name}", *faults(Path(folder) / name, maker, int(sys.argv[1]), int(sys.argv[2]))]), flush=True)
