"""The stages on conversations: what they train, and whole runs of them through their scripts."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from granvit.checkpoint.run_writer import CheckpointWriter
from granvit.config import resolve_models
from granvit.data.batch import join
from granvit.data.chat import Chat, byte_tokenizer
from granvit.data.loader import Loader
from granvit.models import part_of
from granvit.predict import predict_command
from parity.fixture import start_values
from tests.conftest import encoded_image
from tests.helpers import run_config
from tests.test_twins import step_inputs

ROOT = Path(__file__).resolve().parents[1]
BUCKETS = [{"length": 200, "answers": 40}, {"length": 400, "answers": 160}]
STEPS = 3


def conversation_run(stage: str, store, output="unused", model=None, **train):
    return run_config(
        stage=stage,
        output=str(output),
        model=model or {},
        data={"sources": [{"path": str(store.path)}], "regions_per_row": 1, "buckets": BUCKETS},
        train={"global_batch": 4, "micro_batch": 2, "steps": STEPS, "checkpoint_every": 2, **train},
    )


@pytest.fixture(scope="module", params=["torch", "mindspore"])
def engine(request, chat_store):
    """An engine of the sft stage that never clips: its first moment is 0.1 times the gradient."""
    pytest.importorskip(request.param)
    if request.param == "torch":
        from pt_granvit.engine import Engine
    else:
        from ms_granvit.engine import Engine
    config = conversation_run("sft", chat_store).model_copy(
        update={"optimizer": run_config(optimizer={"clip_norm": 1e9}).optimizer}
    )
    vision, language = resolve_models(config)
    return Engine(config, vision, language, start_values(vision, language, seed=0).items())


def gradient_norms(engine, batch) -> dict[str, float]:
    """Norm of each part's gradients from the start weights."""
    engine.load("model", start_values(*resolve_models(engine.config), seed=0).items())
    for group in ("first_moment", "second_moment"):
        engine.load(group, [(name, np.zeros_like(value)) for name, value in engine.tensors(group)])
    engine.step([batch], step_inputs(1, batch))
    norms = dict.fromkeys(("vision", "projector", "language"), 0.0)
    for name, moment in engine.tensors("first_moment"):
        norms[part_of(name)] += float(np.linalg.norm(moment)) * 10
    return norms


def test_only_conversations_about_an_image_reach_the_encoder(engine, chat_store):
    config = engine.config
    chat = Chat(byte_tokenizer("qwen2.5"), "qwen2.5")
    loader = Loader(config, resolve_models(config)[0], chat, 0, 1)
    records = [chat_store.record(image) for image in range(6)]
    rows = [loader._assemble.packer.conversation_row(record, config.data.buckets[1]) for record in records]
    text, about = ([row for row in rows if row.image_weights_B[0] == weight] for weight in (0, 1))
    talk = join(text[:2])
    alone = gradient_norms(engine, talk)
    assert alone["language"] > 1e-3 and alone["vision"] == alone["projector"] == 0
    elsewhere = replace(talk, image_positions_BN=talk.image_positions_BN + 30)  # in the answers: their tokens must not change
    assert gradient_norms(engine, elsewhere) == pytest.approx(alone, rel=1e-5)
    assert min(gradient_norms(engine, join(about[:2])).values()) > 1e-3
    assert min(gradient_norms(engine, join([text[0], about[0]])).values()) > 1e-3
    assert engine.compilations.get("micro_batch", 1) == 1  # a row with and one without an image are the same graph


def test_a_bfloat16_run_hands_on_what_it_froze_as_it_came(tmp_path):
    """The engine computes with a bfloat16 copy of frozen weights; the saved weights must not be rounded."""
    from pt_granvit.engine import Engine

    config = run_config(stage="stage2", runtime={"compute": "bfloat16"})
    vision, language = resolve_models(config)
    start = start_values(vision, language, seed=0)
    writer = CheckpointWriter(tmp_path, config, vision, language)
    engine = Engine(config, vision, language, writer.record_start(start.items()))
    assert {str(array.dtype) for name, array in engine.tensors("model") if part_of(name) == "vision"} == {"bfloat16"}
    handed_on = dict(writer.save(engine, 1, {}).tensors("model"))
    for name, value in start.items():
        assert handed_on[name].dtype == np.float32
        np.testing.assert_array_equal(handed_on[name], value, err_msg=name)


def run_stage(framework: str, stage: str, config, folder: Path) -> dict:
    """Runs a stage's script; returns the newest checkpoint's state."""
    path = folder / f"{Path(config.output).name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, str(ROOT / "scripts" / f"{stage}.py"), "--framework", framework, "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((Path(config.output) / "checkpoints" / f"step_{STEPS:07d}" / "state.json").read_text())


def moved(state: dict) -> set[str]:
    return {part for part, entry in state["parts"].items() if entry["hash"] != entry["start"]}


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_stages_follow_each_other_and_train_what_they_should(chat_store, caption_store, tmp_path, capsys):
    """projector -> continued -> sft with the encoder frozen, in PyTorch; the last is then resumed in MindSpore."""
    pytest.importorskip("mindspore")
    projector = conversation_run("projector", caption_store, tmp_path / "projector")
    first = run_stage("torch", "projector", projector, tmp_path)
    assert moved(first) == {"projector"}
    picture = tmp_path / "picture.png"
    picture.write_bytes(encoded_image(40, 20))
    asked = ["--run", projector.output, "--framework", "torch", str(picture)]
    assert predict_command([*asked, "--text", "a cup"]) == 2
    assert "leave out --box and --text" in capsys.readouterr().err
    assert predict_command(asked) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kernels: ")]
    assert "attention: " in line

    continued = conversation_run("continued", chat_store, tmp_path / "continued", {"init_from": projector.output})
    second = run_stage("torch", "continued", continued, tmp_path)
    assert moved(second) == {"vision", "projector", "language"}
    assert {part: entry["start"] for part, entry in second["parts"].items()} == {p: e["hash"] for p, e in first["parts"].items()}

    sft = conversation_run("sft", chat_store, tmp_path / "sft", {"init_from": continued.output}, freeze=["vision"])
    third = run_stage("torch", "sft", sft, tmp_path)
    assert moved(third) == {"projector", "language"}
    assert third["parts"]["vision"]["hash"] == second["parts"]["vision"]["hash"]
    assert third["config"]["train"]["freeze"] == ["vision"]

    expected = losses(tmp_path / "sft")
    shutil.rmtree(tmp_path / "sft" / "checkpoints" / f"step_{STEPS:07d}")  # as if interrupted after step 2
    again = run_stage("mindspore", "sft", sft, tmp_path)
    assert len(expected) == STEPS and losses(tmp_path / "sft") == pytest.approx(expected, rel=1e-4)
    assert moved(again) == {"projector", "language"} and again["parts"]["vision"] == third["parts"]["vision"]
