"""Every shipped YAML against the script that takes it, and the error messages of the commands."""
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from granvit.config import CONFIGS, differences, dump_config, load_config, parse_config, resolve_models
from granvit.data.chat import Chat, byte_tokenizer
from granvit.stages import STAGES, WITH_SCRIPTS, StageName
from granvit.train import train_command

ROOT = Path(__file__).resolve().parents[1]
RUNS = sorted(
    p for p in CONFIGS.rglob("*.yaml") if not {"models", "ablations"}.intersection(p.parts) and not p.name.startswith("gran")
)
SCRIPTS = ("projector", "stage1", "stage2", "continued", "sft")
PAPER = [CONFIGS / f"{name}.yaml" for name in (*SCRIPTS, "stage1_packed", "stage2_packed")]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_configuration_loads_and_survives_a_round_trip(path):
    config = load_config(path)
    resolve_models(config)
    assert parse_config(yaml.safe_load(dump_config(config)), "dumped") == config


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_the_papers_runs_are_the_papers(path):
    """Section 5.1: AdamW, 1e-5, one epoch, 256 on 128 devices, lambda 1, alpha 0.9, SigLIP2-So400m/16-512, Qwen2.5-1.5B. The
    projector's learning rate is LLaVA's."""
    config = load_config(path)
    vision, language = resolve_models(config)
    assert (vision.name, language.name) == ("siglip2-so400m-patch16-512", "qwen2.5-1.5b")
    assert config.optimizer.lr == (1e-3 if config.stage == "projector" else 1e-5)
    assert config.train.epochs == 1 and config.train.steps is None
    assert (config.runtime.compute, config.runtime.recompute) == ("bfloat16", config.stage in ("sft", "continued"))
    assert config.local_micro_batches(128) == 1
    if config.stage == "stage1":
        assert (config.distill.weight, config.distill.alpha) == (1.0, 0.9)
    if not path.stem.endswith("packed"):
        assert (config.train.global_batch, config.data.regions_per_row) == (256, 1)
    chat = Chat(byte_tokenizer(language.chat), language.chat, plain=config.stage_spec.plain)
    prefix = chat.prefix_length(vision.patches)
    assert config.data.buckets[0].length > prefix


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_each_stages_script_takes_its_own_configurations_and_refuses_the_others(path, tmp_path, capsys, monkeypatch):
    """Weights and data are missing: the right script stops only at that point."""
    monkeypatch.chdir(tmp_path)
    stage = load_config(path).stage
    for script in WITH_SCRIPTS:
        status = train_command(script, ["--config", str(path), "--framework", "torch", f"output={tmp_path}/run"])
        said = capsys.readouterr().err
        assert status == 2
        if stage == script:
            assert "model.init_from" in said or "model.weights_" in said, said
        else:
            assert repr(stage) in said and repr(script) in said, said


def test_every_stage_is_in_all_lists_of_stages():
    assert tuple(STAGES) == get_args(StageName)
    for stage in WITH_SCRIPTS:
        assert (ROOT / "scripts" / f"{stage}.py").is_file() and load_config(CONFIGS / f"{stage}.yaml").stage == stage


def test_each_stage_trains_what_the_paper_trains():
    """The paper's section 4.1; Table 10 freezes the encoder in sft; A.8 puts continued pretraining between stage 2 and sft."""
    trains = {name: set(load_config(CONFIGS / f"{name}.yaml").stage_spec.trains) for name in SCRIPTS}
    everything = {"vision", "projector", "language"}
    assert trains == {
        "projector": {"projector"}, "stage1": {"vision", "projector"}, "stage2": {"projector", "language"},
        "continued": everything, "sft": everything,
    }  # fmt: skip
    frozen = load_config(CONFIGS / "sft.yaml", ["train.freeze=[vision]"])
    assert frozen.stage_spec.trains == {"projector", "language"}
    assert differences(load_config(CONFIGS / "sft.yaml"), frozen) == ["train.freeze: [] -> ['vision']"]
    assert [load_config(CONFIGS / f"{name}.yaml").model.init_from for name in SCRIPTS] == [
        None, "runs/projector", "runs/stage1", "runs/stage2", "runs/stage2",
    ]  # fmt: skip


@pytest.mark.parametrize("config, output", [("stage1", "projector"), ("stage1_packed", "projector"),
                                            ("stage1_highres", "projector_highres")])  # fmt: skip
def test_stage_1_starts_from_the_projectors_run_or_says_how_to_do_without(config, output, tmp_path, capsys, monkeypatch):
    """Section 5.1. While the previous run is missing, no published weights are opened."""
    monkeypatch.chdir(tmp_path)
    assert load_config(CONFIGS / f"{output}.yaml").output == f"runs/{output}"
    command = ["--config", str(CONFIGS / f"{config}.yaml"), "--framework", "torch", f"output={tmp_path}/run"]
    assert train_command("stage1", command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"model.init_from runs/{output}: no checkpoint in runs/{output}/checkpoints" in said
    assert "scripts/projector.py makes it" in said
    assert "model.init_from=null starts without it, from weights/siglip2-so400m-patch16-512, weights/Qwen2.5" in said
    assert train_command("stage1", [*command, f"output={tmp_path}/other", "model.init_from=null"]) == 2
    assert "model.weights_vision: no directory weights/siglip2-so400m-patch16-512" in capsys.readouterr().err


def test_a_part_has_the_rates_it_states_and_else_the_others():
    stated = ["optimizer.parts.vision.lr=2e-6", "optimizer.parts.language.weight_decay=0.1"]
    rates = load_config(CONFIGS / "sft.yaml", stated).optimizer
    assert [rates.of_part(part) for part in ("vision", "projector", "language")] == [(2e-6, 0.0), (1e-5, 0.0), (1e-5, 0.1)]


@pytest.mark.parametrize(
    "stage, override, message",
    [
        ("stage2", "train.freeze=[vision]", "vision.*stage2.*projector, language"),
        ("projector", "train.freeze=[projector]", r"train\.freeze.*projector"),
        ("stage1", "train.freeze=[vision]", r"distill\.weight=0"),
        ("sft", "train.freeze=[teacher]", r"train\.freeze\.0.*'vision', 'projector' or 'language'"),
        ("stage2", "optimizer.parts.vision.lr=1e-6", r"optimizer\.parts\.vision.*stage2.*projector, language"),
        ("sft", "optimizer.parts={vison: {lr: 1e-6}}", "'optimizer.parts.vison'.*'optimizer.parts.vision'"),
        ("projector", "data.mix={global: 1.0, bbox2caption: 0.1}", r"data\.mix.*bbox2caption"),
        ("projector", "eval.source=data_store/held_out", r"eval\.tasks.*bbox2caption, caption2bbox"),
        ("sft", "eval.tasks=[conversation]", r"eval\.tasks\.0"),
    ],
)
def test_what_a_stage_cannot_do_is_said(stage, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(CONFIGS / f"{stage}.yaml", [override])


def script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_scripts_help():
    said = script("stage1.py", "--help").stdout
    for word in ("--config", "--framework", "--fresh", "key=value", "configs/stage1.yaml", "msrun", "torchrun"):
        assert word in said


def test_a_mistake_is_one_line_without_a_traceback(tmp_path):
    done = script("stage1.py", "--framework", "torch", f"output={tmp_path}", "optimizer.weight_decey=1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert "'optimizer.weight_decey'" in done.stderr and "'optimizer.weight_decay'" in done.stderr


def test_the_log_has_the_traceback_of_a_mistake(tmp_path):
    done = script("projector.py", "--framework", "torch", f"output={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "model.init=random" in done.stderr
    assert "Traceback" in (tmp_path / "log/rank_00000.txt").read_text()
