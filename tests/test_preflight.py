"""Ranks that start with different files or settings, and runs that are resumed after a change, in real processes.

The ranks run `tests/toy.py`. Its second rank may use another directory: the same relative paths, other files.
"""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from granvit.checkpoint.pretrained import write_pretrained
from granvit.checkpoint.run import newest_checkpoint
from granvit.config import language_config, vision_config
from granvit.data.chat import byte_tokenizer
from granvit.data.store_writer import write_store
from granvit.init import initial_values
from granvit.models import language_shapes, vision_shapes
from tests.test_launch import MSRUN_JOIN, ROOT, TORCHRUN, TOY, WAIT, Job, free_port, steps_of

VISION, LANGUAGE = vision_config("tiny-vision"), language_config("tiny-language")
LAUNCHERS = [MSRUN_JOIN, TORCHRUN]


def tree(**model) -> dict:
    """The configuration of a run with two questions per step and relative paths."""
    return {
        "stage": "stage1",
        "output": "unset",
        "model": {"vision": "tiny-vision", "language": "tiny-language", "tokenizer": "tokenizer.json", **model},
        "data": {"sources": [{"path": "store"}], "buckets": [{"length": 512, "answers": 160}]},
        "train": {"global_batch": 2, "micro_batch": 1, "steps": 100_000, "checkpoint_every": 10},
        "eval": {"source": None},
    }


PUBLISHED = {"init": "pretrained", "weights_vision": "weights/vision", "weights_language": "weights/language"}


@pytest.fixture(scope="module")
def files(store, tmp_path_factory):
    """The files of one node: configuration, tokenizer, store, published weights."""
    disk = tmp_path_factory.mktemp("files")
    (disk / "run.yaml").write_text(yaml.safe_dump(tree(**PUBLISHED)))
    byte_tokenizer("qwen2.5").save(str(disk / "tokenizer.json"))
    shutil.copytree(store.path, disk / "store", ignore=shutil.ignore_patterns("lengths"))
    for part, shapes in (("vision", vision_shapes(VISION)), ("language", language_shapes(LANGUAGE))):
        configs = (VISION, None) if part == "vision" else (None, LANGUAGE)
        write_pretrained(disk / "weights" / part, *configs, shapes, initial_values(shapes, 0).items())
    return disk


@pytest.fixture
def disks(files, tmp_path):
    """The directories of rank 0 (which is also the job's directory) and of rank 1."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    shutil.copytree(files, tmp_path / "disk1")
    return tmp_path, tmp_path / "disk1"


def other_weights(disk: Path) -> None:
    """Changes one number of one tensor of the encoder, as another revision of the weights would."""
    values = initial_values(vision_shapes(VISION), 0)
    name = list(values)[-1]
    values[name] = values[name].copy()
    values[name].flat[0] = np.nextafter(values[name].flat[0], np.float32(9))
    write_pretrained(disk / "weights/vision", VISION, None, vision_shapes(VISION), values.items())


def other_configuration(disk: Path) -> None:
    changed = tree(**PUBLISHED) | {"optimizer": {"lr": 0.5}}
    (disk / "run.yaml").write_text(yaml.safe_dump(changed))


def other_tokenizer(disk: Path) -> None:
    tokenizer = byte_tokenizer("qwen2.5")
    tokenizer.add_tokens(["word"])
    tokenizer.save(str(disk / "tokenizer.json"))


def rebuild_store(disk: Path, records) -> None:
    shutil.rmtree(disk / "store")
    write_store(records[1:], disk / "store")


def two_ranks(directory: Path, *arguments: str, **environment: str) -> list[subprocess.CompletedProcess]:
    """Two ranks without a launcher's process around them; what each printed."""
    exchange = directory / f"exchange{time.monotonic_ns()}"
    exchange.mkdir()
    command = [sys.executable, TOY, "--framework", "torch", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "TOY_EXCHANGE": str(exchange), "WORLD_SIZE": "2", **environment}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, env={**os.environ, **environment, "RANK": str(rank)}, cwd=directory, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=WAIT) for process in started]
    return [subprocess.CompletedProcess(command, p.returncode, *out) for p, out in zip(started, said, strict=True)]


@pytest.mark.parametrize(
    "fault, named",
    [
        ("TOY_VERSION", ["version of numpy 1.2.3 on rank 1, {numpy} on rank 0"]),
        (other_configuration, ["optimizer.lr 0.5 ({disk1}/run.yaml) on rank 1, 1e-05 ({disk0}/run.yaml) on rank 0"]),
        (other_tokenizer, ["tokenizer ", "(tokenizer.json) on rank 1"]),
        (lambda disk: shutil.rmtree(disk / "weights/vision"), ["model.weights_vision: no directory weights/vision", "{disk1}"]),
    ],
    ids=["version", "configuration", "tokenizer", "missing"],
)
def test_a_rank_with_something_else_stops_all_with_one_line_before_the_first_step(disks, fault, named):
    disk0, disk1 = disks
    environment = {"TOY_DISK": f"1:{disk1}"}
    if fault == "TOY_VERSION":
        environment[fault] = "1:numpy:1.2.3"
    else:
        fault(disk1)
    run = disk0 / "run"
    ranks = two_ranks(disk0, "--config", "run.yaml", f"output={run}", **environment)
    assert [rank.returncode for rank in ranks] == [2, 2], ranks
    (line,) = [line for line in ranks[0].stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1 on ")
    for words in named:
        assert words.format(disk0=disk0.resolve(), disk1=disk1.resolve(), numpy=np.__version__) in line
    assert "error" not in ranks[1].stderr  # the console shows the line once
    for rank in range(2):
        assert line in (run / f"log/rank_0000{rank}.txt").read_text()
    assert steps_of(run) == 0


@pytest.mark.parametrize("launcher, join", LAUNCHERS)
def test_weights_of_another_revision_on_one_rank_stop_all(disks, launcher, join):
    """With the frameworks' own engines and collectives."""
    disk0, disk1 = disks
    other_weights(disk1)
    leaving = {"MS_RETRY_INTERVAL_LOWER": "0", "MS_RETRY_INTERVAL_UPPER": "1"}  # MindSpore's ranks: 2 s instead of 7 to 10
    job = Job(disk0, Path("run.yaml"), launcher, join, TOY_DISK=f"1:{disk1}", TOY_ENGINE="real", **leaving)
    assert job.end() != 0
    for rank in range(2):
        log = (job.run / f"log/rank_0000{rank}.txt").read_text()
        assert "ERROR error: rank 1 on " in log and "weights of vision " in log and "weights of language" not in log, job.said()
        assert f"({disk1.resolve()}/weights/vision) on rank 1" in log and f"({disk0.resolve()}/weights/vision) on rank 0" in log
    assert steps_of(job.run) == 0


@pytest.fixture(scope="module")
def begun(files, tmp_path_factory):
    """A run of one rank and two rows a micro-batch that was asked to stop after more than two checkpoints."""
    directory = tmp_path_factory.mktemp("begun")
    shutil.copytree(files, directory, dirs_exist_ok=True)
    job = Job(directory, Path("run.yaml"), None, overrides=("train.micro_batch=2",))
    job.reach(25)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0
    return directory


@pytest.mark.parametrize("launcher, join", LAUNCHERS)
def test_rank_0_chooses_the_checkpoint_and_ranks_and_micro_batch_may_change(begun, tmp_path, launcher, join):
    """Rank 1's listing lacks the newest checkpoint."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    saved = newest_checkpoint(tmp_path / "run").step
    if launcher == "torchrun":
        refused = two_ranks(tmp_path, "--config", "run.yaml", f"output={tmp_path}/run", "train.micro_batch=2")
        assert [rank.returncode for rank in refused] == [2, 2] and "train.micro_batch=1 does" in refused[0].stderr
    job = Job(tmp_path, Path("run.yaml"), launcher, join, TOY_STALE="1:")
    job.reach(saved + 5)
    os.kill(job.pid("rank 1"), signal.SIGTERM)
    assert job.end() == 0, job.said()
    logs = [(job.run / f"log/rank_0000{rank}.txt").read_text() for rank in range(2)]
    for log in logs:
        assert f"resumed from {tmp_path}/run/checkpoints/step_{saved:07d}" in log
        assert "resumed with ranks: 1 -> 2" in log and "resumed with train.micro_batch: 2 -> 1" in log
        assert "all 2 ranks hold the same" in log
    assert newest_checkpoint(job.run).ranks == 2


def test_a_store_or_tokenizer_that_changed_is_refused_on_resume(begun, records, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    before = newest_checkpoint(tmp_path / "run").fingerprints
    rebuild_store(tmp_path, records)
    other_tokenizer(tmp_path)
    job = Job(tmp_path, Path("run.yaml"), None, overrides=("train.micro_batch=2",))
    assert job.end() == 2
    (line,) = [line for line in (tmp_path / "output.txt").read_text().splitlines() if line.startswith("error: ")]
    assert "store has fingerprint " in line and f"the run was trained on {before['store store']}" in line
    assert "tokenizer has fingerprint " in line and f"the run was trained on {before['tokenizer']}" in line


def test_out_of_memory_is_one_line_and_its_override_goes_on_with_the_same_results(files, tmp_path):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    overrides = ("train.steps=8", "train.checkpoint_every=3")
    (tmp_path / "whole").mkdir()
    shutil.copytree(files, tmp_path / "whole", dirs_exist_ok=True)
    whole = Job(tmp_path / "whole", Path("run.yaml"), None, overrides=(*overrides, "train.micro_batch=2"))
    ends = Job(tmp_path, Path("run.yaml"), None, overrides=(*overrides, "train.micro_batch=2"), TOY_FAIL="0:5",
               TOY_RAISES="CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")  # fmt: skip
    assert ends.end() == 1
    (line,) = (line for line in (tmp_path / "output.txt").read_text().splitlines() if "out of memory" in line)
    assert line == (
        "stopped: out of memory in step 5 (CUDA out of memory. Tried to allocate 2.00 GiB.): the same command with "
        "train.micro_batch=1 or runtime.recompute=true resumes from step 3, with the same results up to rounding"
    )
    resumed = Job(tmp_path, Path("run.yaml"), None, overrides=(*overrides, "train.micro_batch=1", "runtime.recompute=true"))
    assert (resumed.end(), whole.end()) == (0, 0), resumed.said()
    assert "resumed with runtime.recompute: False -> True" in resumed.said()
    weights = [
        {f.name: f.read_bytes() for f in newest_checkpoint(job.run).path.glob("*.safetensors")} for job in (resumed, whole)
    ]
    assert weights[0] == weights[1]
