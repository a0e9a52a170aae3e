"""A run's checkpoints: whole or not there, exact, and refused when a byte has changed."""
import errno
import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from granvit.checkpoint import run as run_module
from granvit.checkpoint.pretrained import start_weights
from granvit.checkpoint.run import (
    CheckpointNotSaved,
    CheckpointWriter,
    check_same_data,
    check_same_run,
    newest_checkpoint,
    open_checkpoint,
)
from granvit.checkpoint.tensors import TensorSet, TensorWriter, write_set
from granvit.config import language_config, vision_config
from granvit.engine import Scalars
from granvit.models import VisionConfig, parameter_shapes, part_of
from tests.helpers import run_config
from tests.toy import ToyEngine, toy_batch

GROUPS = ("model", "teacher", "first_moment", "second_moment")
VISION, LANGUAGE = vision_config("tiny-vision"), language_config("tiny-language")


def engine_after(config, steps: int) -> ToyEngine:
    engine = ToyEngine(config, VISION, LANGUAGE, start_weights(config, VISION, LANGUAGE))
    for step in range(1, steps + 1):
        engine.step([toy_batch(step)], Scalars(step, 0.01, 0.9, 8, 2))
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


def resumed_writer(directory: Path, config) -> CheckpointWriter:
    start = {name: part.start for name, part in newest_checkpoint(directory).parts.items()}
    return CheckpointWriter(directory, config, VISION, LANGUAGE, start)


def as_bytes(tensors) -> dict[str, tuple]:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in tensors}


def test_every_group_comes_back_bit_for_bit(run):
    directory, config, engine = run
    saved = newest_checkpoint(directory)
    assert (saved.step, saved.config, saved.counters) == (4, config, {"questions": 40, "skipped": 1})
    for group in GROUPS:
        assert as_bytes(saved.tensors(group)) == as_bytes(engine.tensors(group)), group
    assert list(saved.shapes("model")) == list(parameter_shapes(VISION, LANGUAGE))


def test_a_frozen_part_is_written_once_and_trained_parts_are_measured_from_the_start(run):
    directory, config, engine = run
    saved = newest_checkpoint(directory)
    files = TensorSet(saved.path).shapes
    assert {part_of(name) for name in files} == {"vision", "projector"}
    assert saved.parts["language"].hash == saved.parts["language"].start
    start = engine_after(config, 0)
    for part in ("vision", "projector"):
        moved = [engine.weights[n].astype(float) - start.weights[n] for n in engine.weights if part_of(n) == part]
        expected = np.sqrt(sum((m**2).sum() for m in moved))
        assert saved.parts[part].distance == pytest.approx(expected, rel=1e-12) and expected > 0.01
        assert saved.parts[part].hash != saved.parts[part].start
    assert saved.parts["language"].distance == 0


def test_a_frozen_part_that_changed_is_an_error_not_a_checkpoint(run):
    directory, config, engine = run
    writer = resumed_writer(directory, config)
    engine.weights["language.model.norm.weight"][3] += 1e-3
    with pytest.raises(RuntimeError, match="'language'"):
        writer.save(engine, 6, {})
    assert newest_checkpoint(directory).step == 4


def test_old_checkpoints_are_thinned_after_the_new_one_is_whole(run):
    directory, config, engine = run
    writer = resumed_writer(directory, config)
    writer.save(engine, 6, {})
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["step_0000004", "step_0000006"]


def test_safetensors_library_reads_our_files(run):
    directory, _, engine = run
    with safe_open(directory / "checkpoints/step_0000004/model.safetensors", "np") as file:
        assert set(file.keys()) == set(engine.trained)
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            np.testing.assert_array_equal(file.get_tensor(name), engine.weights[name])


@pytest.mark.parametrize("file", ["model.safetensors", "teacher.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_named(run, file, damage):
    """Ten places in each file: the header, the data, the last byte."""
    path = run[0] / "checkpoints/step_0000004" / file
    whole = path.read_bytes()
    places = np.linspace(9, len(whole) - 1, 10).astype(int) if damage == "flip" else [len(whole) // 2, len(whole) - 1]
    for place in places:
        if damage == "flip":
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        elif damage == "truncate":
            path.write_bytes(whole[:place])
        else:
            path.unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"step_0000004"):
            saved = newest_checkpoint(run[0])
            for group in GROUPS:
                list(saved.tensors(group))


def test_damage_to_a_frozen_part_is_named(run):
    path = next(run[0].glob("parts/language-*/model.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="language-"):
        list(newest_checkpoint(run[0]).tensors("model"))


def test_half_written_directories_are_ignored_and_cleared(run):
    directory, config, _ = run
    half = directory / "checkpoints/.tmp-step_0000009-123"
    shutil.copytree(directory / "checkpoints/step_0000004", half)
    assert newest_checkpoint(directory).step == 4
    CheckpointWriter(directory, config, VISION, LANGUAGE)
    assert not half.exists()


@pytest.mark.parametrize("fails_at", [1, 3, 6])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(run, monkeypatch, fails_at):
    directory, config, engine = run
    writer = resumed_writer(directory, config)
    calls = iter(range(1, 1000))
    synced = run_module.os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointNotSaved, match=r"step_0000006.*No space left"):
        writer.save(engine, 6, {})
    monkeypatch.undo()
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["step_0000002", "step_0000004"]
    assert as_bytes(newest_checkpoint(directory).tensors("model")) == as_bytes(engine.tensors("model"))


@pytest.mark.parametrize("limit", [12_000, 20_000, 30_000, 40_000])  # bytes: within the encoder, and within the decoder
def test_a_full_disk_before_the_first_step_is_named_and_leaves_nothing_behind(tmp_path, limit):
    config = run_config()
    writer = CheckpointWriter(tmp_path, config, VISION, LANGUAGE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # as a disk does, it refuses the rest at every later attempt
    try:
        with pytest.raises(CheckpointNotSaved, match=str(tmp_path)):
            dict(writer.record_start(start_weights(config, VISION, LANGUAGE)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "parts").iterdir())


def test_a_checkpoint_is_found_from_inside_its_own_directory(run, monkeypatch):
    directory, _, engine = run
    for inside, path in (("checkpoints/step_0000004", "."), ("checkpoints", "step_0000004"), (".", "checkpoints/step_0000004")):
        monkeypatch.chdir(directory / inside)
        assert as_bytes(open_checkpoint(Path(path)).tensors("model")) == as_bytes(engine.tensors("model"))


def test_a_checkpoint_of_a_later_format_is_refused(run):
    path = run[0] / "checkpoints/step_0000004/state.json"
    state = json.loads(path.read_text())
    del state["sha256"]
    state["format"] = 2
    path.write_text(json.dumps({"sha256": run_module._state_digest(state)} | state))
    with pytest.raises(ValueError, match=r"state\.json.*\b2\b.*\b1\b"):
        open_checkpoint(path.parent)


@pytest.mark.parametrize(
    "section, key, value",
    [("train", "log_every", 3), ("train", "keep_checkpoints", 9), ("data", "workers", 2), ("eval", "every", 7),
     ("runtime", "jit_level", "O1"), ("runtime", "device", "cpu"), ("train", "micro_batch", 1), ("runtime", "recompute", True)],
)  # fmt: skip
def test_what_enters_no_weight_may_change(run, section, key, value):
    config = run_config(**{section: {key: value}})
    changes = check_same_run(newest_checkpoint(run[0]), config, VISION, LANGUAGE, 1)
    assert [c for c in changes if c.startswith(f"{section}.{key}: ") and c.endswith(f" -> {value}")]


def test_the_number_of_ranks_may_change_and_is_not_known_of_an_old_checkpoint(run):
    checkpoint = newest_checkpoint(run[0])
    assert check_same_run(checkpoint, run[1], VISION, LANGUAGE, 4) == ["ranks: 1 -> 4"]
    assert check_same_run(replace(checkpoint, ranks=None), run[1], VISION, LANGUAGE, 4) == []


def test_what_divides_the_batch_is_fixed_where_each_device_has_its_own_mean(run):
    """`train.loss_reduction: per_device`: micro-batches and ranks enter the result there."""
    checkpoint = newest_checkpoint(run[0])
    averaged = checkpoint.config.model_copy(
        update={"train": checkpoint.config.train.model_copy(update={"loss_reduction": "per_device"})}
    )
    smaller = averaged.model_copy(update={"train": averaged.train.model_copy(update={"micro_batch": 1})})
    checkpoint = replace(checkpoint, config=averaged)
    assert check_same_run(checkpoint, averaged, VISION, LANGUAGE, 1) == []
    with pytest.raises(ValueError, match=r"train\.micro_batch: \d+ -> 1"):
        check_same_run(checkpoint, smaller, VISION, LANGUAGE, 1)
    with pytest.raises(ValueError, match="ranks: 1 -> 2"):
        check_same_run(checkpoint, averaged, VISION, LANGUAGE, 2)


def test_another_precision_is_resumed_only_where_the_command_states_it(run):
    checkpoint, config = newest_checkpoint(run[0]), run_config(train={"keep_checkpoints": 2}, runtime={"compute": "bfloat16"})
    with pytest.raises(ValueError, match=r"runtime\.compute: float32 -> bfloat16.*runtime\.compute=bfloat16"):
        check_same_run(checkpoint, config, VISION, LANGUAGE, 1)
    changes = check_same_run(checkpoint, config, VISION, LANGUAGE, 1, ["runtime.compute"])
    assert changes == ["runtime.compute: float32 -> bfloat16"]


def test_a_checkpoint_from_before_ranks_and_fingerprints_were_kept_is_read(run):
    path = run[0] / "checkpoints/step_0000004/state.json"
    state = json.loads(path.read_text())
    for key in ("sha256", "ranks", "fingerprints"):
        del state[key]
    path.write_text(json.dumps({"sha256": run_module._state_digest(state)} | state))
    checkpoint = open_checkpoint(path.parent)
    assert (checkpoint.ranks, checkpoint.fingerprints) == (None, {})
    check_same_data(checkpoint, {"store": "1"})


@pytest.mark.parametrize(
    "section, key, value",
    [("optimizer", "lr", 0.5), ("train", "steps", 9), ("distill", "alpha", 0.5), ("data", "mix", {"global": 1.0})],
)
def test_what_enters_a_weight_may_not_change(run, section, key, value):
    config = run_config(**{section: {key: value}})
    with pytest.raises(ValueError, match=rf"{section}\.{key}.*--fresh"):
        check_same_run(newest_checkpoint(run[0]), config, VISION, LANGUAGE, 1)


def test_another_architecture_names_the_first_keys_that_differ(run):
    wider = VisionConfig(**{**VISION.model_dump(), "mlp": 48})
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.mlp\.fc1\.weight.*\[32, 16\].*\[48, 16\]"):
        check_same_run(newest_checkpoint(run[0]), run[1], wider, LANGUAGE, 1)


def test_a_run_starts_from_another_runs_newest_checkpoint(run):
    directory, _, engine = run
    config = run_config(stage="stage2", model={"init_from": str(directory)})
    assert as_bytes(start_weights(config, VISION, LANGUAGE)) == as_bytes(engine.tensors("model"))
    wider = VisionConfig(**{**VISION.model_dump(), "mlp": 48})
    with pytest.raises(ValueError, match=r"model\.init_from.*mlp\.fc1"):
        start_weights(config, wider, LANGUAGE)
    with pytest.raises(ValueError, match=r"nowhere.*scripts/stage1\.py.*model\.init_from=null"):
        start_weights(run_config(stage="stage2", model={"init_from": str(directory / "nowhere")}), VISION, LANGUAGE)


def test_large_sets_are_sharded_and_every_dtype_survives(tmp_path):
    rng = np.random.default_rng(0)
    kinds = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
    arrays = {f"t{i}": rng.normal(size=(3, 5)).astype(kind) for i, kind in enumerate(kinds)}
    arrays["scalar"] = np.float32(2.5).reshape(())
    shapes = {name: array.shape for name, array in arrays.items()}
    with TensorWriter(tmp_path, "model", shapes, shard_bytes=70) as writer:
        for name in reversed(arrays):
            writer.add(name, arrays[name])
        writer.finish()
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    read = TensorSet(tmp_path, checked=True)
    assert as_bytes((name, read.read(name)) for name in arrays) == as_bytes(arrays.items())
    next(tmp_path.glob("model-00001-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="model-00001-of-"):
        TensorSet(tmp_path)


def test_an_index_cannot_point_outside_its_directory(tmp_path):
    write_set(tmp_path, "secret", {"a": (1,)}, [("a", np.ones(1, np.float32))])
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="not in"):
        TensorSet(inside)

