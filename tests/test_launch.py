"""Starting and ending: locks, ports, signals, dead ranks and dead launchers, with real msrun and torchrun processes.

The ranks are `tests/toy.py`: a whole training command with a numpy engine, so that nothing heavy is imported or compiled.
"""
import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from granvit.checkpoint.run import newest_checkpoint
from granvit.launch import Launch, RunLock, check_launcher, check_port, detect_launch, load_engine_class
from granvit.watcher import other_failure, write_marker

ROOT = Path(__file__).resolve().parents[1]
TOY = str(ROOT / "tests" / "toy.py")
MSRUN = shutil.which("msrun", path=str(Path(sys.executable).parent))
needs_msrun = pytest.mark.skipif(MSRUN is None, reason="MindSpore is not installed")
WAIT = 180  # seconds; the machine may be busy


@pytest.fixture(scope="module")
def configuration(store, tmp_path_factory):
    """A run of two ranks with a row each."""
    path = tmp_path_factory.mktemp("launch") / "run.yaml"
    tree = {
        "stage": "stage1",
        "output": "unset",
        "model": {"vision": "tiny-vision", "language": "tiny-language", "init": "random", "weights_language": "none"},
        "data": {"sources": [{"path": str(store.path)}], "buckets": [{"length": 512, "answers": 160}]},
        "train": {"global_batch": 2, "micro_batch": 1, "steps": 100_000, "checkpoint_every": 10},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def steps_of(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


class Job:
    """A started job; `members` are the processes that belong to it."""

    def __init__(self, directory: Path, configuration: Path, launcher: str | None, join: bool = True, port: int | None = None,
                 overrides: tuple[str, ...] = (), **environment: str):  # fmt: skip
        self.directory, self.run, self.launcher = directory, directory / "run", launcher
        self.run.mkdir(exist_ok=True)
        exchange = directory / f"exchange{time.monotonic_ns()}"
        exchange.mkdir()
        script = [TOY, "--config", str(configuration), f"output={self.run}", *overrides]
        port = port or free_port()
        if launcher == "msrun":
            command = [MSRUN, "--worker_num=2", "--local_worker_num=2", f"--master_port={port}", "--join", str(join)]
            command += ["--log_dir", str(directory / "msrun"), *script]
        elif launcher == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", *script]
            command += ["--framework", "torch"]
        else:
            command = [sys.executable, *script]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # msrun starts the first `python` in it
        environment |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOY_EXCHANGE": str(exchange)}
        self.output = open(directory / "output.txt", "a+")  # noqa: SIM115 (read after the process)
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=self.output, stderr=self.output, cwd=directory
        )

    def members(self) -> dict[int, str]:
        """pid -> command line of every living process of the job but zombies."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().decode().replace("\0", " ")
            except OSError:
                continue
            if str(self.directory) in command and int(folder.name) != os.getpid():
                found[int(folder.name)] = command
        return found

    def pid(self, role: str) -> int:
        """The process of `launcher`, `scheduler`, `rank 0` or `rank 1`."""
        for pid, command in self.members().items():
            if "msrun" in command.split(TOY)[0] or "torch.distributed.run" in command:
                if role == "launcher":
                    return pid
                continue
            try:
                environ = dict(e.split("=", 1) for e in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in e)
            except OSError:
                continue
            scheduler = environ.get("MS_ROLE") == "MS_SCHED"
            rank = environ.get("RANK_ID", environ.get("RANK"))
            if TOY in command and "watcher" not in command and role == ("scheduler" if scheduler else f"rank {rank}"):
                return pid
        raise AssertionError(f"no {role} among {self.members()}\n{self.said()}")

    def reach(self, steps: int) -> None:
        deadline = time.monotonic() + WAIT
        while steps_of(self.run) < steps:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def end(self) -> int:
        """Waits until every process of the job is gone; the launcher's exit status."""
        try:
            status = self.process.wait(WAIT)
            deadline = time.monotonic() + WAIT
            while self.members():
                assert time.monotonic() < deadline, f"left over: {self.members()}\n{self.said()}"
                time.sleep(0.1)
            return status
        finally:
            for pid in self.members():
                os.kill(pid, signal.SIGKILL)

    def said(self) -> str:
        """Everything that anybody printed or logged."""
        self.output.flush()
        files = [self.directory / "output.txt", *self.directory.glob("msrun/*.log"), *self.run.glob("log/*.txt")]
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files if file.exists())


MSRUN_JOIN = pytest.param("msrun", True, marks=needs_msrun, id="msrun-join")
MSRUN_NO_JOIN = pytest.param("msrun", False, marks=needs_msrun, id="msrun-no-join")
TORCHRUN = pytest.param("torchrun", True, id="torchrun")


@pytest.mark.parametrize("launcher, join", [MSRUN_NO_JOIN, TORCHRUN])
def test_a_rank_killed_ends_all_and_the_log_says_which(tmp_path, configuration, launcher, join):
    job = Job(tmp_path, configuration, launcher, join, TOY_PAUSE="0.05")
    job.reach(3)
    os.kill(job.pid("rank 1"), signal.SIGKILL)
    status = job.end()
    assert status != 0 or not join  # msrun without --join has left long before
    markers = [json.loads(p.read_text())["reason"] for p in job.run.glob(".failure-*rank_00001.json")]
    assert len(markers) == 1 and "killed" in markers[0]
    if not join:
        assert "rank_00000 is stopped because rank_00001" in (job.run / "log/rank_00000.txt").read_text()


@pytest.mark.parametrize("launcher, join", [MSRUN_JOIN, MSRUN_NO_JOIN])
def test_a_rank_that_raises_ends_all_and_the_log_says_why(tmp_path, configuration, launcher, join):
    job = Job(tmp_path, configuration, launcher, join, TOY_PAUSE="0.05", TOY_FAIL="1:4")
    status = job.end()
    assert status != 0 or not join
    assert "planted fault" in (job.run / "log/rank_00001.txt").read_text()
    assert steps_of(job.run) == 3
    reasons = [json.loads(p.read_text())["reason"] for p in job.run.glob(".failure-*rank_00001.json")]
    assert reasons == ["failed: RuntimeError: planted fault"]


@pytest.mark.parametrize("launcher, join", [MSRUN_JOIN, TORCHRUN])
def test_sigterm_to_a_worker_saves_the_next_step_and_all_exit_0(tmp_path, configuration, launcher, join):
    job = Job(tmp_path, configuration, launcher, join, TOY_PAUSE="0.05")
    job.reach(3)
    os.kill(job.pid("rank 1"), signal.SIGTERM)
    assert job.end() == 0
    assert newest_checkpoint(job.run).step == steps_of(job.run)
    assert "asked to stop: saved step" in (job.run / "log/rank_00000.txt").read_text()
    assert not list(job.run.glob(".failure-*"))


@pytest.mark.parametrize(
    "launcher, how",
    [
        pytest.param("msrun", signal.SIGTERM, marks=needs_msrun),
        pytest.param("msrun", signal.SIGKILL, marks=needs_msrun),
        ("torchrun", signal.SIGTERM),
    ],
)
def test_the_launchers_end_is_a_checkpoint_and_nobody_is_left(tmp_path, configuration, launcher, how):
    """msrun orphans workers, scheduler and `tail -f` on SIGTERM; torchrun passes SIGTERM on."""
    job = Job(tmp_path, configuration, launcher, TOY_PAUSE="0.05", TOY_SCHEDULER="2")
    job.reach(3)
    os.kill(job.pid("launcher"), how)
    job.end()
    saved = newest_checkpoint(job.run)
    assert saved.step == steps_of(job.run) >= 3
    assert not list(job.run.glob(".failure-*"))


@needs_msrun
@pytest.mark.parametrize("join", [True, False])
def test_msrun_on_a_port_in_use_is_an_error_not_a_hang(tmp_path, configuration, join):
    """The scheduler must report it: workers without a scheduler wait forever, MindSpore's and the toy's (in its first sum)."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        job = Job(tmp_path, configuration, "msrun", join, port=taken.getsockname()[1], TOY_PAUSE="0.1")
        status = job.end()
    assert status != 0 or not join
    assert f"port {taken_port(job)} on 127.0.0.1" in job.said()


def taken_port(job: Job) -> str:
    return next(word.partition("=")[2] for word in job.process.args if word.startswith("--master_port="))


def test_torchrun_on_a_port_in_use_is_an_error_not_a_hang(tmp_path, configuration):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        job = Job(tmp_path, configuration, "torchrun", port=taken.getsockname()[1])
        assert job.end() != 0
    assert "in use" in job.said()


def test_kill_9_and_the_same_command_again_is_exact(tmp_path, configuration):
    """One process, killed three times at arbitrary points; the final weights equal those of an undisturbed run."""
    overrides = ("train.steps=60",)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = Job(tmp_path / "whole", configuration, None, overrides=overrides)
    for steps in (5, 17, 41):
        job = Job(tmp_path / "killed", configuration, None, overrides=overrides, TOY_PAUSE="0.02")
        job.reach(steps)
        job.process.kill()
        job.end()
    resumed = Job(tmp_path / "killed", configuration, None, overrides=overrides)
    assert whole.end() == 0 and resumed.end() == 0, resumed.said()
    assert "resumed from" in resumed.said()
    files = [{f.name: f.read_bytes() for f in newest_checkpoint(j.run).path.glob("*.safetensors")} for j in (whole, resumed)]
    assert files[0] == files[1]
    losses = [[json.loads(line)["loss"] for line in (j.run / "metrics.jsonl").read_text().splitlines()] for j in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 60


def test_ctrl_c_stops_after_the_step(tmp_path, configuration):
    job = Job(tmp_path, configuration, None, TOY_PAUSE="0.05")
    job.reach(3)
    job.process.send_signal(signal.SIGINT)
    assert job.end() == 0
    assert newest_checkpoint(job.run).step == steps_of(job.run)


def test_a_second_run_in_a_directory_is_refused_and_names_the_owner(tmp_path, configuration):
    first = Job(tmp_path, configuration, None, TOY_PAUSE="0.05")
    first.reach(3)
    second = subprocess.run(
        [sys.executable, TOY, "--config", str(configuration), f"output={first.run}", "--fresh"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=WAIT, check=False,
    )  # fmt: skip
    assert second.returncode == 2
    assert f"in use by process {first.process.pid} on {socket.gethostname()}" in second.stderr
    assert second.stderr.count("\n") == 1
    before = steps_of(first.run)
    first.reach(before + 1)
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == 0


def test_the_lock_goes_with_its_process(tmp_path):
    single = Launch(None, False, 0, 1, None, 0)
    lock = RunLock(tmp_path, single)
    with pytest.raises(ValueError, match=f"process {os.getpid()}"):
        RunLock(tmp_path, single)
    lock.release()
    RunLock(tmp_path, single).release()


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    """Lustre that is mounted without `-o flock` answers ENOSYS."""
    code = errno.ENOSYS

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(logging.getLogger("granvit"), "propagate", True)  # an earlier test may have called `to_console`
    single = Launch(None, False, 0, 1, None, 0)
    RunLock(tmp_path, single).release()
    assert any(f"two runs in {tmp_path} would not notice each other" in line for line in caplog.messages)
    code = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        RunLock(tmp_path, single)


def test_fresh_puts_the_earlier_run_aside(tmp_path, configuration):
    overrides = ("train.steps=3",)
    assert Job(tmp_path, configuration, None, overrides=overrides).end() == 0
    changed = (*overrides, "optimizer.lr=0.5")
    refused = Job(tmp_path, configuration, None, overrides=changed)
    assert refused.end() == 2 and "optimizer.lr: 1e-05 -> 0.5" in refused.said()
    assert Job(tmp_path, configuration, None, overrides=(*changed, "--fresh")).end() == 0
    (aside,) = (tmp_path / "run").glob("replaced-*")
    assert newest_checkpoint(aside).config.optimizer.lr == 1e-5
    assert newest_checkpoint(tmp_path / "run").config.optimizer.lr == 0.5


def test_a_run_that_distils_no_region_is_told_so(tmp_path, configuration):
    for share, said in (("0", True), ("0.5", False)):
        (tmp_path / share).mkdir()
        job = Job(tmp_path / share, configuration, None, overrides=("train.steps=1", f"data.mix.bbox2caption={share}"))
        assert job.end() == 0
        assert ("WARNING self-distillation" in job.said()) == said


def test_environments():
    single = detect_launch({})
    assert (single.launcher, single.rank, single.world) == (None, 0, 1)
    msrun = {"MS_ROLE": "MS_WORKER", "MS_SCHED_HOST": "h", "MS_SCHED_PORT": "1", "MS_WORKER_NUM": "4", "RANK_ID": "3"}
    worker = detect_launch(msrun)
    assert (worker.launcher, worker.scheduler, worker.rank, worker.world, worker.address) == ("msrun", False, 3, 4, "h:1")
    assert detect_launch(msrun | {"MS_ROLE": "MS_SCHED"}).scheduler
    with pytest.raises(ValueError, match="--node_rank"):
        detect_launch({k: v for k, v in msrun.items() if k != "RANK_ID"})
    torchrun = detect_launch({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "5"})
    assert (torchrun.launcher, torchrun.rank, torchrun.world, torchrun.address) == ("torchrun", 1, 2, "h:5")
    with pytest.raises(ValueError, match="--framework torch"):
        check_launcher(torchrun, "mindspore")
    with pytest.raises(ValueError, match="torchrun"):
        check_launcher(worker, "torch")
    check_launcher(single, "torch")


def test_only_who_will_listen_checks_the_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match="in use"):
            check_port(Launch("msrun", True, 0, 2, address, 0))
        check_port(Launch("msrun", False, 0, 2, address, 0))
    check_port(Launch("msrun", True, 0, 2, address, 0))


def test_a_framework_that_is_not_installed_is_one_line_with_the_command(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("granvit.launch.importlib.import_module", missing)
    with pytest.raises(ValueError, match=r"MindSpore is not installed.*pip install -e '\.\[mindspore\]'"):
        load_engine_class("mindspore")


def test_markers_of_an_earlier_job_on_the_same_port_do_not_count(tmp_path):
    write_marker(tmp_path, "host_1", "rank_00001", started=1000.0, reason="old")
    assert other_failure(tmp_path, "host_1", "rank_00000", started=1060.0) is None
    assert "old" in other_failure(tmp_path, "host_1", "rank_00000", started=1001.0)
    assert other_failure(tmp_path, "host_2", "rank_00000", started=1001.0) is None
    assert other_failure(tmp_path, "host_1", "rank_00001", started=1001.0) is None
