"""The order of the demo's parts: what is kept, resumed, replaced, and what an interruption or a failure leaves.

A stand-in for the training command writes what the real one writes and these parts look at: its log and exit status.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from granvit.demo import command
from granvit.demo.command import OTHERS, Demo
from granvit.launch import RunLock, detect_launch

# Trains in `$STEPS` steps of 0.1 s; fails in the parts of $FAILING. A start without --fresh resumes.
TRAINING = '''
import os, pathlib, signal, sys, time
part, output = sys.argv[2], next(word for word in sys.argv if word.startswith("output=")).partition("=")[2]
run, asked = pathlib.Path(output), []
(run / "log").mkdir(parents=True, exist_ok=True)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: asked.append(1))
with open(run / "log" / "rank_00000.txt", "a") as log, open(run / "starts.txt", "a") as starts:
    print(os.getpid(), file=starts, flush=True)
    print(f"{part} in toy on cpu, 1 rank(s), 5 steps, tokenizer", file=log, flush=True)
    for _ in range(int(os.environ["STEPS"])):
        time.sleep(0.1)
        if part in os.environ["FAILING"].split():
            sys.exit(3)
        if asked:
            break
    print(f"run {run} is not complete" if asked else f"run {run} is complete", file=log, flush=True)
'''


@pytest.fixture
def script(tmp_path, monkeypatch):
    path = tmp_path / "training.py"
    path.write_text(TRAINING)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.setenv("STEPS", "1")
    monkeypatch.setenv("FAILING", "")
    monkeypatch.setattr(Demo, "make", lambda self, part: None)
    return path


def demo(root: Path, seed: int = 0) -> Demo:
    root.mkdir(exist_ok=True)
    return Demo(root, seed, "torch")


def starts(root: Path, part: str) -> int:
    path = root / part / "starts.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_finished_parts_are_kept(script, tmp_path):
    root = tmp_path / "demo"
    demo(root).run([OTHERS])
    again = demo(root)
    again.run([OTHERS])
    assert [starts(root, part) for part in ("stage2", "stage1_mixed", "guesser")] == [1, 1, 1]
    assert set(again.seconds) == {"stage2", "stage1_mixed", "guesser"}


def test_a_part_whose_start_has_changed_is_made_again_from_nothing(script, tmp_path, monkeypatch):
    root = tmp_path / "demo"
    demo(root).run([OTHERS])
    monkeypatch.setattr(command, "read_sums", lambda path: {"vision": "other weights"})
    later = demo(root)
    assert not later.seconds
    later.run([OTHERS])
    assert [starts(root, part) for part in ("stage2", "stage1_mixed", "guesser")] == [1, 1, 1]  # of new directories


def test_a_failure_is_named_and_ends_the_other_lane(script, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILING", "stage2")
    monkeypatch.setenv("STEPS", "100")
    root = tmp_path / "demo"
    with pytest.raises(SystemExit, match="stage2 failed"):
        demo(root).run([OTHERS])
    assert starts(root, "guesser") == 0 and not demo(root).seconds  # stage1_mixed was asked to stop: it is not finished
    monkeypatch.setenv("FAILING", "")
    monkeypatch.setenv("STEPS", "1")
    demo(root).run([OTHERS])
    assert [starts(root, part) for part in ("stage2", "stage1_mixed", "guesser")] == [2, 2, 1]  # resumed where they were


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_process_and_no_finished_part(script, tmp_path, number):
    root = tmp_path / "demo"
    body = (
        "import signal, sys; from pathlib import Path; from granvit.demo.command import OTHERS, Demo\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"sys.argv = [{str(script)!r}]\nDemo(Path({str(root)!r}), 0, 'torch').run([OTHERS])\n"
    )
    root.mkdir()
    environment = {**os.environ, "STEPS": "600"}
    process = subprocess.Popen([sys.executable, "-c", body], env=environment, stderr=subprocess.PIPE, text=True)
    paths = [root / part / "starts.txt" for part in ("stage2", "stage1_mixed")]
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text().strip() for path in paths):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and (number == signal.SIGKILL or "the same command continues" in said)
    time.sleep(0.2)  # for the kernel, after SIGKILL
    for path in paths:
        assert not is_running(int(path.read_text()))
    assert not demo(root).seconds and starts(root, "guesser") == 0
    if number != signal.SIGKILL:  # asked once, so that the runs save their checkpoints
        assert "is not complete" in (root / "stage2" / "log" / "rank_00000.txt").read_text()


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_damaged_list_of_parts_is_named(script, tmp_path):
    root = tmp_path / "demo"
    demo(root).run([OTHERS])
    path = root / "parts.json"
    assert json.loads(path.read_text())
    path.write_text(path.read_text()[:30])
    with pytest.raises(ValueError, match=r"parts\.json"):
        demo(root)


def test_two_demos_in_one_directory_are_refused(tmp_path, capsys, monkeypatch):
    held = RunLock(tmp_path / "demo", detect_launch())
    monkeypatch.setattr(sys, "argv", ["demo.py", "prepare", "--out", str(tmp_path / "demo")])
    assert command.main() == 2
    assert "is in use by" in capsys.readouterr().err
    held.release()


def test_runs_are_on_the_cpu(tmp_path):
    """The recipe and its times are those of a CPU, and stage 1 has two ranks even where there is one accelerator."""
    assert demo(tmp_path / "demo").config("stage1").runtime.device == "cpu"
