"""Whole grids with the toy engine: reports, failing cells, kill -9 in the middle, refused starts."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from granvit.ablation.command import main
from granvit.ablation.grid import expand, read_grid
from granvit.ablation.run_cells import Launching
from granvit.config import CONFIGS
from granvit.data.store_writer import write_store
from tests.ablation.conftest import grid_tree, write_grid
from tests.conftest import random_record

ROOT = Path(__file__).resolve().parents[2]
TOY = str(Path(__file__).with_name("toy_ablate.py"))
SETTINGS = {
    "without": {"stage1": ["distill.weight=0"]},
    "with": {"stage1": []},
    "and stage 2": {"stage1": [], "stage2": []},
    "broken": {"stage1": [], "stage2": ["data.buckets=[{length: 8, answers: 4}]"]},
    "after broken": {"stage1": [], "stage2": ["data.buckets=[{length: 8, answers: 4}]"], "stage1_again": []},
}
WAIT = 120  # seconds; the machine may be busy


def command(grid: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, TOY, str(grid), "--framework", "torch", "--out", str(out), *options]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def grid(base, tmp_path_factory) -> Path:
    tree = grid_tree(base, settings=SETTINGS)
    tree["stages"]["stage1_again"] = tree["stages"]["stage1"]
    return write_grid(tmp_path_factory.mktemp("grid") / "toy.yaml", tree)


@pytest.fixture(scope="module")
def finished(grid, tmp_path_factory):
    """The grid, run once without interruption: its directory and the process's result."""
    out = tmp_path_factory.mktemp("finished")
    return out, run(grid, out)


def test_a_failing_cell_is_named_and_the_others_go_on(finished):
    out, done = finished
    assert done.returncode == 1, done.stderr
    failed = json.loads((out / "toy" / "results.json").read_text())["failed"]
    assert [(each["setting"], each["seed"]) for each in failed] == [
        (setting, seed) for seed in (0, 1) for setting in ("broken", "after broken")
    ]
    # The stage that failed and the last line of its log, for the cell that only starts from it too.
    assert all(each["reason"].startswith("stage2: error: data.buckets: the shortest, 8 tokens") for each in failed)
    report = (out / "toy" / "report.md").read_text()
    assert "**4 cells failed" in report and "- broken, seed 1: stage2: error: data.buckets" in report
    assert "| broken | - | - | 0 of 2 |" in report
    assert done.stderr.count("FAILED 'broken'") == 2


def test_the_table_has_the_evaluations_means(finished):
    """The means against those that the training command wrote itself."""
    out, _ = finished
    found = json.loads((out / "toy" / "results.json").read_text())
    means = {setting["name"]: setting["metrics"] for setting in found["settings"]}
    of_runs = []
    for folder in (out / "cells").glob("stage2-*"):
        for path in (folder / "eval").glob("*.json"):
            of_runs.append(json.loads(path.read_text())["table"]["bbox2caption"]["exact_match"])
    assert len(of_runs) == 2
    assert means["and stage 2"]["bbox2caption/exact_match"]["mean"] == pytest.approx(sum(of_runs) / 2)
    assert sorted(means["and stage 2"]["bbox2caption/exact_match"]["per_seed"].values()) == pytest.approx(sorted(of_runs))
    first = found["directions"][0]
    assert first["mean"] == pytest.approx(means["with"][first["metric"]]["mean"] - means["without"][first["metric"]]["mean"])
    assert first["verdict"] in ("reproduced", "within noise") and first["seeds"] == 2 and first["mean"] > 0


def test_shared_runs_are_trained_once_and_the_html_page_is_self_contained(finished):
    out, _ = finished
    assert len(list((out / "cells").glob("stage1-*"))) == 4  # two settings x two seeds, for five settings
    for output in (out / "cells").glob("*/output.txt"):
        assert output.read_text().count("\n$ ") + output.read_text().startswith("$ ") == 1
    page = (out / "toy" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2 and not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<table>" in page


def test_the_same_command_again_trains_nothing_and_gives_the_same_table(grid, finished):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*/finished.json")}
    table = (out / "toy" / "results.json").read_bytes()
    listed = run(grid, out, "--dry-run")
    assert listed.returncode == 0 and listed.stdout.count("(finished)") == 2 * (1 + 1 + 2 + 1 + 1)
    assert "10 cells, 10 different runs, 4 of them not finished" in listed.stdout
    again = run(grid, out)
    assert again.returncode == 1 and "10 runs for 10 cells, 6 of them finished before" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*/finished.json")} == before
    assert (out / "toy" / "results.json").read_bytes() == table


def test_a_grid_killed_in_the_middle_goes_on_and_ends_with_the_same_table(grid, finished, tmp_path):
    """kill -9 while one run is finished and others are not; its children must end with it."""
    process = subprocess.Popen(command(grid, tmp_path, "--jobs", "2"), env=environment(TOY_PAUSE="0.4"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    cells, deadline = tmp_path / "cells", time.monotonic() + WAIT

    def half_done() -> bool:
        complete = {path.parent for path in cells.glob("*/finished.json")}
        return bool(complete) and any(path.parent not in complete for path in cells.glob("*/metrics.jsonl"))

    while not half_done():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    complete = {path: path.stat().st_mtime_ns for path in cells.glob("*/finished.json")}
    while children_of(tmp_path):
        assert time.monotonic() < deadline, children_of(tmp_path)
        time.sleep(0.05)
    assert not (tmp_path / "toy" / "results.json").exists()
    done = run(grid, tmp_path)
    assert f"10 runs for 10 cells, {len(complete)} of them finished before" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in complete} == complete
    assert (tmp_path / "toy" / "results.json").read_bytes() == (finished[0] / "toy" / "results.json").read_bytes()


def test_a_run_that_was_asked_to_stop_is_not_finished(base, tmp_path):
    """SIGTERM to one run (a cluster's preemption): it saves, ends with status 0, and the same command continues it."""
    grid = write_grid(tmp_path / "grid.yaml", grid_tree(base, seeds=[0]))
    process = subprocess.Popen(command(grid, tmp_path, "--jobs", "1"), env=environment(TOY_PAUSE="0.5"),
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    deadline = time.monotonic() + WAIT
    while not (steps := list((tmp_path / "cells").glob("*/metrics.jsonl"))) or not steps[0].read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    number = next(path.name for path in Path("/proc").glob("[0-9]*") if is_trainer(path, tmp_path))
    os.kill(int(number), signal.SIGTERM)
    printed, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 1 and "FAILED: stopped before its last step" in printed
    assert len(list((tmp_path / "cells").glob("*/finished.json"))) == 1  # the other setting's
    assert run(grid, tmp_path).returncode == 0


def is_trainer(process: Path, out: Path) -> bool:
    try:
        return f'output="{out}' in (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False


def children_of(out: Path) -> list[str]:
    """The ids of running processes that train a cell in `out`."""
    return [path.name for path in Path("/proc").glob("[0-9]*") if is_trainer(path, out)]


def test_leakage_is_refused_before_anything_is_trained(base, stores, tmp_path):
    write_store([random_record("copy", 2, 3), random_record("other", 2, 400)], tmp_path / "leaking")  # seed 3 is image t3
    tree = grid_tree(base)
    tree["stages"]["stage1"]["overrides"] = [f"eval.source={tmp_path / 'leaking'}"]
    done = run(write_grid(tmp_path / "leak.yaml", tree), tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert f"{tmp_path / 'leaking'} shares 1 of its 2 images with {stores['train']}" in done.stderr
    assert "copy equals t3" in done.stderr and not (tmp_path / "out" / "cells").exists()


def test_a_grid_without_its_data_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(CONFIGS / "ablations" / "table3.yaml"), "--framework", "torch"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no cell of" in said and "sft: model.weights_vision: no weights in runs/demo" in said
    assert not list(tmp_path.iterdir())


def test_runs_of_several_ranks_start_under_the_frameworks_launcher(base, tmp_path):
    run = expand(read_grid(write_grid(tmp_path / "grid.yaml", grid_tree(base))), "torch", tmp_path)[0].runs[0]
    for framework, launcher, option in (("mindspore", "msrun", "--worker_num"), ("torch", "torchrun", "--nproc_per_node")):
        words = Launching(Path("ablate.py"), framework, 4, bind_cores=True).words(run)
        assert Path(words[0]).name == launcher and words[words.index(option) + 1] == "4"
        assert words[words.index("ablate.py") :][:3] == ["ablate.py", "rank", "stage1"]
        assert words[-2:] == ["--framework", framework]
        assert f'output="{run.directory}"' in words and "seed=0" in words and "distill.weight=0" in words


def test_an_unknown_key_is_one_line_and_status_2(base, tmp_path):
    done = run(write_grid(tmp_path / "grid.yaml", grid_tree(base, metrcs=[])), tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "did you mean 'metrics'" in done.stderr
