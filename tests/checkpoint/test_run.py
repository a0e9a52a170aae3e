"""A run's checkpoints: complete or absent, exact, and refused if a byte has changed."""
import errno
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from granvit.checkpoint import run_writer
from granvit.checkpoint.pretrained import start_weights
from granvit.checkpoint.run import newest_checkpoint, open_checkpoint, state_digest
from granvit.checkpoint.run_writer import CheckpointNotSaved, CheckpointWriter
from granvit.checkpoint.tensors import TensorSet
from granvit.models import VisionConfig, parameter_shapes, part_of
from tests.checkpoint.conftest import LANGUAGE, VISION, as_bytes, engine_after
from tests.helpers import run_config

GROUPS = ("model", "teacher", "first_moment", "second_moment")


def resumed_writer(directory: Path, config) -> CheckpointWriter:
    start = {name: part.start for name, part in newest_checkpoint(directory).parts.items()}
    return CheckpointWriter(directory, config, VISION, LANGUAGE, start)


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


def test_frozen_parts_are_hashed_once_by_each_process(run, monkeypatch):
    directory, config, engine = run
    hashed = []
    digest = run_writer.tensor_digest
    monkeypatch.setattr(run_writer, "tensor_digest", lambda array: hashed.append(array.size) or digest(array))
    writer = resumed_writer(directory, config)
    writer.save(engine, 6, {})
    assert len(hashed) == sum(part_of(name) == "language" for name in parameter_shapes(VISION, LANGUAGE))
    writer.save(engine, 8, {})
    assert len(hashed) == sum(part_of(name) == "language" for name in parameter_shapes(VISION, LANGUAGE))


def test_a_frozen_part_that_changes_after_the_first_checkpoint_is_noticed_at_the_last_step(run):
    directory, config, engine = run
    writer = resumed_writer(directory, config)
    writer.save(engine, 6, {})
    engine.weights["language.model.norm.weight"][3] += 1e-3
    with pytest.raises(RuntimeError, match="'language'"):
        writer.save(engine, 8, {}, last=True)
    assert newest_checkpoint(directory).step == 6


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
    synced = run_writer.os.fsync

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
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # like a full disk, it refuses every later write
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
    state["format"] = 3
    path.write_text(json.dumps({"sha256": state_digest(state)} | state))
    with pytest.raises(ValueError, match="checkpoint format 3"):
        open_checkpoint(path.parent)


def test_a_run_starts_from_another_runs_newest_checkpoint(run):
    directory, _, engine = run
    config = run_config(stage="stage2", model={"init_from": str(directory)})
    assert as_bytes(start_weights(config, VISION, LANGUAGE)) == as_bytes(engine.tensors("model"))
    wider = VisionConfig(**{**VISION.model_dump(), "mlp": 48})
    with pytest.raises(ValueError, match=r"model\.init_from.*mlp\.fc1"):
        start_weights(config, wider, LANGUAGE)
    with pytest.raises(ValueError, match=r"nowhere.*scripts/stage1\.py.*model\.init_from=null"):
        start_weights(run_config(stage="stage2", model={"init_from": str(directory / "nowhere")}), VISION, LANGUAGE)
