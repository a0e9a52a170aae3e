"""Whole runs of the real engines through the real scripts: two frameworks, one and two ranks, kill -9, SIGTERM, resume.

One 12-step run per launcher is made once (`finished`); tests that damage a run work on a copy.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from granvit.models import part_of
from tests.helpers import run_config

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
STEPS, EVERY = 12, 4
LIMIT = 240  # seconds after which a run counts as hung


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(framework: str, ranks: int, config: Path, logs: Path, *overrides: str, port: int | None = None,
            script: str = "scripts/stage1.py") -> list[str]:  # fmt: skip
    script = [str(ROOT / script), "--framework", framework, "--config", str(config), *overrides]
    port = port or free_port()
    if ranks == 1:
        return [sys.executable, *script]
    if framework == "torch":
        return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(port), *script]
    return [str(BIN / "msrun"), "--worker_num", str(ranks), "--local_worker_num", str(ranks), "--master_port", str(port),
            "--bind_core", "True", "--join", "True", "--log_dir", str(logs), *script]  # fmt: skip


def environment() -> dict[str, str]:
    leaving = {"MS_RETRY_INTERVAL_LOWER": "0", "MS_RETRY_INTERVAL_UPPER": "1"}  # MindSpore's ranks: 2 s instead of 7 to 10
    return {**os.environ, **leaving, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


def launch(*args, **kwargs) -> subprocess.Popen:
    line = command(*args, **kwargs)
    return subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def run(*args, **kwargs) -> str:
    process = launch(*args, **kwargs)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output[-4000:]
    return output


def metrics(directory: Path) -> list[dict]:
    """The deterministic part of metrics.jsonl."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_curves_agree(a: list[dict], b: list[dict], relative: float) -> None:
    assert [x["step"] for x in a] == [x["step"] for x in b] == list(range(1, len(a) + 1))
    for x, y in zip(a, b, strict=True):
        assert (x["tokens"], x["boxes"], x["questions"]) == (y["tokens"], y["boxes"], y["questions"])
        for key in ("loss", "loss_caption", "loss_distill"):
            assert x[key] == pytest.approx(y[key], rel=relative), (x["step"], key)


def checkpoint_bytes(directory: Path) -> dict[str, bytes]:
    newest = sorted((directory / "checkpoints").glob("step_*"))[-1]
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def wait_for_step(directory: Path, step: int) -> None:
    """Until metrics.jsonl shows that `step` is done."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        path = directory / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"{directory} did not reach step {step}")


def processes_of(named: Path) -> list[str]:
    """Command lines of live processes that name a path."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode().replace("\0", " ")
        except OSError:
            continue
        if str(named) in line and int(folder.name) != os.getpid():
            found.append(line)
    return found


def assert_nobody_left(named: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while processes_of(named):
        assert time.monotonic() < deadline, processes_of(named)
        time.sleep(0.2)


ONE_BUCKET = {"buckets": [{"length": 480, "answers": 128}]}  # one graph less to compile


@pytest.fixture(scope="module")
def home(tmp_path_factory, store):
    """A directory with the run's YAML: what `configuration` writes for each run."""
    return tmp_path_factory.mktemp("runs")


def configuration(home: Path, name: str, store, **sections) -> tuple[Path, Path]:
    """Writes the YAML of a tiny run called `name`; returns it and the run's directory."""
    base = {
        "output": str(home / name),
        "data": {"sources": [{"path": str(store.path)}], "regions_per_row": 2, "workers": 0,
                 "buckets": [{"length": 400, "answers": 96}, {"length": 480, "answers": 128}]},  # both are met
        "train": {"global_batch": 4, "micro_batch": 2, "steps": STEPS, "checkpoint_every": EVERY, "log_every": 4},
        "optimizer": {"lr": 5e-3},
        "runtime": {"compile_cache": str(home / "graphs")},
    }  # fmt: skip
    tree = run_config(**base).model_dump(mode="json")
    for key, value in sections.items():
        tree[key].update(value)
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path, home / name


@pytest.fixture(scope="module")
def finished(home, store):
    """`finished(framework, ranks)`: the directory of a run of STEPS steps that nothing disturbed, made once."""
    made: dict[tuple[str, int], tuple[Path, str]] = {}

    def make(framework: str, ranks: int) -> tuple[Path, str]:
        if (framework, ranks) not in made:
            config, directory = configuration(home, f"{framework}{ranks}", store)
            made[framework, ranks] = directory, run(framework, ranks, config, home / "logs" / directory.name)
        return made[framework, ranks]

    return make


def copy_run(source: Path, destination: Path) -> None:
    """A copy whose checkpoints and metrics end at step 2 * EVERY, as if the run had been interrupted there."""
    shutil.copytree(source, destination)
    for path in (destination / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > 2 * EVERY:
            shutil.rmtree(path)


@pytest.mark.parametrize("framework", ["torch", "mindspore"])
def test_two_ranks_equal_one(framework, finished):
    one = finished(framework, 1)[0]  # first, because it fills the cache of compiled graphs
    assert_curves_agree(metrics(finished(framework, 2)[0]), metrics(one), 1e-5)


@pytest.mark.parametrize("framework", ["torch", "mindspore"])
def test_an_orderly_end_is_no_failure_of_anyone(framework, finished, home):
    """MindSpore's scheduler exits without returning to Python when the workers have ended; that is no failure."""
    directory, output = finished(framework, 2)
    assert not list(directory.glob(".failure-*"))
    logs = "".join(path.read_text() for path in (home / "logs" / directory.name).glob("*.log"))
    assert "killed (process" not in output + logs and (framework == "torch" or "is complete" in logs)


def test_the_frameworks_agree_at_every_step(finished):
    pytest.importorskip("mindspore")
    torch_run, mindspore_run = finished("torch", 2)[0], finished("mindspore", 2)[0]
    assert_curves_agree(metrics(mindspore_run), metrics(torch_run), 1e-4)
    start = [json.loads((d / "checkpoints" / f"step_{STEPS:07d}" / "state.json").read_text()) for d in (torch_run, mindspore_run)]
    for part in ("vision", "projector", "language"):
        assert start[0]["parts"][part]["start"] == start[1]["parts"][part]["start"]


@pytest.mark.parametrize("framework", ["torch", "mindspore"])
def test_stage_1_trains_the_encoder_and_leaves_the_decoder(framework, finished):
    directory, _ = finished(framework, 1)
    state = json.loads((directory / "checkpoints" / f"step_{STEPS:07d}" / "state.json").read_text())
    moved = {part: entry["hash"] != entry["start"] for part, entry in state["parts"].items()}
    assert moved == {"vision": True, "projector": True, "language": False}
    trained = load_file(directory / "checkpoints" / f"step_{STEPS:07d}" / "model.safetensors")
    assert {part_of(name) for name in trained} == {"vision", "projector"}


def test_one_compilation_per_bucket_counted_and_printed(finished):
    pytest.importorskip("mindspore")
    _, output = finished("mindspore", 1)
    assert "'micro_batch': 2" in output, output[-2000:]
    assert "graph micro_batch" in output


@pytest.mark.parametrize("framework, ranks", [("torch", 1), ("torch", 2), ("mindspore", 2)])
def test_kill_9_of_a_rank_ends_all_and_the_same_command_gives_the_uninterrupted_run_bit_for_bit(
    framework, ranks, home, store, finished
):
    config, directory = configuration(home, f"killed-{framework}{ranks}", store)
    process = launch(framework, ranks, config, home / "logs" / directory.name)
    wait_for_step(directory, int(np.random.default_rng().integers(EVERY + 1, 2 * EVERY)))
    os.kill(int((directory / ".lock").read_text().split()[1]), signal.SIGKILL)  # rank 0 owns the lock
    died = time.monotonic()
    process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert_nobody_left(config, seconds=30 - (time.monotonic() - died))
    if ranks > 1:
        log = "".join(path.read_text() for path in (directory / "log").glob("*.txt"))
        assert "rank_00000: killed" in log, log
    run(framework, ranks, config, home / "logs" / directory.name)
    whole = finished(framework, ranks)[0]
    if framework == "mindspore":
        log = (directory / "log" / "rank_00001.txt").read_text()
        assert "graph micro_batch loaded" in log, log
    assert metrics(directory) == metrics(whole)
    assert checkpoint_bytes(directory) == checkpoint_bytes(whole)


@pytest.mark.parametrize("begun, ended", [("mindspore", "torch"), ("torch", "mindspore")])
def test_what_ran_on_two_ranks_resumes_on_one_in_either_framework(begun, ended, home, store, finished):
    whole = finished(begun, 2)[0]
    train, runtime = {"micro_batch": 4}, {"recompute": True}  # neither changes a result
    config, directory = configuration(home, f"{begun}-then-{ended}", store, train=train, runtime=runtime)
    copy_run(whole, directory)
    output = run(ended, 1, config, home / "logs" / directory.name)
    for change in ("ranks: 2 -> 1", "train.micro_batch: 2 -> 4", "runtime.recompute: False -> True"):
        assert f"resumed with {change}" in output
    assert f"step_{2 * EVERY:07d}" in output
    assert_curves_agree(metrics(directory), metrics(whole), 1e-4)


@pytest.mark.parametrize("framework", ["torch", "mindspore"])
def test_a_launcher_that_is_ended_leaves_a_checkpoint_and_nobody_and_ranks_without_a_box_do_not_hang(framework, home, store):
    """By SIGTERM; tests/test_launch.py kills msrun with an engine that needs no compiling."""
    endless = {"steps": 4000, "checkpoint_every": 4000}
    config, directory = configuration(home, f"ended-{framework}", store, train=endless,
                                      data={"mix": {"global": 1.0}, **ONE_BUCKET})  # fmt: skip
    process = launch(framework, 2, config, home / "logs" / directory.name)
    wait_for_step(directory, 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT)
    assert_nobody_left(config)
    steps = metrics(directory)
    assert {(line["boxes"], line["loss_distill"]) for line in steps} == {(0, 0.0)}
    state = json.loads((directory / "checkpoints" / f"step_{len(steps):07d}" / "state.json").read_text())
    assert state["step"] == len(steps) < 4000


@pytest.mark.parametrize("framework", ["torch", "mindspore"])
def test_steps_that_are_not_finite_on_one_rank_are_left_out_on_all_and_the_run_recovers(framework, home, store, monkeypatch):
    """Step 2 by itself; then one more in a row than is allowed, which stops the run. The same command completes it, here in
    PyTorch on one rank."""
    monkeypatch.setenv("POISON", "1:2,4,5,6")
    allowed = {"steps": 8, "skip_non_finite": 2}
    config, directory = configuration(home, f"nan-{framework}", store, train=allowed, data=ONE_BUCKET)
    logs = home / "logs" / directory.name
    process = launch(framework, 2, config, logs, script="tests/poisoned.py")
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "step 6: loss nan" in output and "rank(s) 1" in output and "saved as step 6" in output, output[-4000:]
    log = (directory / "log" / "rank_00001.txt").read_text()
    assert "left out: step 2: loss nan" in log and "; records of rank 1: image" in log
    assert [line["step"] for line in metrics(directory) if "loss" not in line] == [2, 4, 5, 6]
    run("torch", 1, config, logs, script="tests/poisoned.py")
    lines = metrics(directory)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "non_finite" in line] == [2, 4, 5, 6]
    state = json.loads((directory / "checkpoints" / "step_0000008" / "state.json").read_text())
    assert state["counters"]["non_finite"] == 4


def test_per_device_is_the_same_on_two_ranks_as_in_two_micro_batches(home, store, finished):
    """Its first loss also differs from that of `global` on the same data and start weights."""
    curves = []
    for ranks in (1, 2):
        config, directory = configuration(home, f"per_device{ranks}", store, train={"steps": 3, "loss_reduction": "per_device"})
        run("torch", ranks, config, home / "logs" / directory.name)
        curves.append(metrics(directory))
    assert_curves_agree(curves[1], curves[0], 1e-5)
    of_global = metrics(finished("torch", 1)[0])
    assert curves[0][0]["tokens"] == of_global[0]["tokens"]
    assert abs(curves[0][0]["loss_caption"] / of_global[0]["loss_caption"] - 1) > 1e-4
