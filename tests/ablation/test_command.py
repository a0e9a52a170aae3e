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
from granvit.ablation.run_cells import Launching, finished_seconds, unique_runs
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
REPORT = ("report", "plots", "results", "statistics")  # the modules that need the packages of `.[ablate]`
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
    assert first["verdict"] in ("reproduced", "within noise") and first["no_interval"] is None
    assert first["seeds"] == 2 and first["mean"] > 0


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
    report = (out / "toy" / "report.md").read_text()
    seconds = {path.parent.name: json.loads(path.read_text())["seconds"] for path in before}
    assert f"{sum(seconds.values()) / 3600:.2f} hours in all" in report
    shown = f"python scripts/ablate.py {grid} --framework torch --out {out}"
    assert f"`{shown}`" in report  # as it was given
    listed = run(grid, out, "--dry-run")
    assert listed.returncode == 0 and listed.stdout.count("(finished)") == 2 * (1 + 1 + 2 + 1 + 1)
    assert "10 cells, 10 different runs, 4 of them not finished" in listed.stdout
    again = run(grid, out, "--ranks", "1", "--jobs", "3")
    assert again.returncode == 1 and "10 runs for 10 cells, 6 of them finished before" in again.stdout
    assert f"`{shown.replace('--out', '--jobs 3 --out')}`" in (out / "toy" / "report.md").read_text()
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*/finished.json")} == before
    assert (out / "toy" / "results.json").read_bytes() == table


def test_a_grid_killed_in_the_middle_goes_on_and_ends_with_the_same_table(base, finished, tmp_path):
    """kill -9 while one run is finished and others are not; its children must end with it. The grid has two of the settings."""
    grid = write_grid(tmp_path / "part.yaml", grid_tree(base))
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
    assert not (tmp_path / "part" / "results.json").exists()
    done = run(grid, tmp_path)
    counted = int(re.search(r"4 runs for 4 cells, (\d+) of them finished before", done.stdout)[1])
    assert len(complete) <= counted <= len(complete) + 2  # a run may be complete whose end the killed grid did not see
    assert {path: path.stat().st_mtime_ns for path in complete} == complete
    whole, part = (json.loads((out / "results.json").read_text()) for out in (finished[0] / "toy", tmp_path / "part"))
    assert part["settings"] == whole["settings"][:2] and part["directions"] == whole["directions"]


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


def test_a_run_completed_outside_of_the_grid_is_finished_whatever_the_ranks(base, tmp_path):
    """As on a cluster: a command that --dry-run prints, run alone. A grid of two ranks finds it complete and trains nothing."""
    grid = write_grid(tmp_path / "grid.yaml", grid_tree(base, seeds=[0]))
    cells = expand(read_grid(grid), "torch", tmp_path / "out")
    for each in unique_runs(cells):
        assert finished_seconds(each) is None
        words = Launching(Path(TOY), "torch", 1, bind_cores=False).words(each)
        subprocess.run(words, env=environment(), check=True, capture_output=True, timeout=WAIT)
        assert finished_seconds(each) > 0
    done = run(grid, tmp_path / "out", "--ranks", "2")
    assert done.returncode == 0 and "2 runs for 2 cells, 2 of them finished before" in done.stdout
    first = unique_runs(cells)[0]
    (path,) = (first.directory / "eval").glob("*.json")
    path.unlink()  # an evaluation is missing: the same command repeats it
    assert finished_seconds(first) is None


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_leakage_is_refused_before_anything_is_trained(base, stores, tmp_path, options):
    write_store([random_record("copy", 2, 3), random_record("other", 2, 400)], tmp_path / "leaking")  # seed 3 is image t3
    tree = grid_tree(base)
    tree["stages"]["stage1"]["overrides"] = [f"eval.source={tmp_path / 'leaking'}"]
    done = run(write_grid(tmp_path / "leak.yaml", tree), tmp_path / "out", *options)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and f"error: {tmp_path / 'leak.yaml'}: " in done.stderr
    assert f"{tmp_path / 'leaking'} shares 1 of its 2 images with {stores['train']}" in done.stderr
    assert "copy equals t3" in done.stderr and not (tmp_path / "out" / "cells").exists()


def test_what_earlier_runs_were_trained_on_is_compared_too(base, stores, tmp_path):
    """A grid whose first stage starts from a run: its store is not among those of the grid."""
    earlier = tmp_path / "earlier"
    config = ["--config", str(base / "stage1.yaml"), f"output={earlier}", f"data.sources=[{{path: {stores['held']}}}]",
              "eval.source=null", "--framework", "torch"]  # fmt: skip
    subprocess.run([sys.executable, TOY, "rank", "stage1", *config], env=environment(), check=True, capture_output=True)
    tree = grid_tree(base)
    tree["stages"]["stage1"]["overrides"] = [f"model.init_from={earlier}"]
    done = run(write_grid(tmp_path / "leak.yaml", tree), tmp_path / "out")
    assert done.returncode == 2 and f"{stores['held']} is also trained on" in done.stderr and str(earlier) in done.stderr
    assert not (tmp_path / "out" / "cells").exists()


def test_a_directory_that_cannot_be_used_fails_its_cell_alone(base, tmp_path):
    grid, out = write_grid(tmp_path / "grid.yaml", grid_tree(base, seeds=[0])), tmp_path / "out"
    first, second = (cell.runs[0].directory for cell in expand(read_grid(grid), "torch", out))
    (first / ".grid_lock").mkdir(parents=True)  # a lock that cannot be opened
    done = run(grid, out)
    assert done.returncode == 1, done.stderr
    failed = json.loads((out / "grid" / "results.json").read_text())["failed"]
    assert [each["setting"] for each in failed] == ["without"] and ".grid_lock" in failed[0]["reason"]
    assert (second / "finished.json").exists()


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


@pytest.mark.parametrize("package", ["matplotlib", "scipy.special", "markdown"])
def test_a_missing_package_is_named_before_anything_is_trained(base, tmp_path, capsys, monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith("granvit.ablation.") and name.rpartition(".")[2] in REPORT]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    grid = write_grid(tmp_path / "grid.yaml", grid_tree(base))
    assert main([str(grid), "--framework", "torch", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and package in said and "pip install scipy matplotlib markdown" in said
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_a_setting_names_the_grid_file(base, tmp_path, capsys):
    settings = {"a": {"stage1": []}, "b": {"stage1": ["distill.wait=1"]}}
    grid = write_grid(tmp_path / "grid.yaml", grid_tree(base, settings=settings, directions=[]))
    assert main([str(grid), "--framework", "torch", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {grid}: settings.b.stage1: ")


def test_more_ranks_than_devices_are_refused_before_anything_is_trained(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    grid = write_grid(tmp_path / "grid.yaml", grid_tree(base))
    arguments = [str(grid), "--framework", "torch", "--out", str(tmp_path / "out"), "--jobs", "2", "--ranks", "2"]
    assert main(arguments) == 2
    assert "--jobs 2 x --ranks 2 = 4 ranks need a device each, and 2 are there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--dry-run"]) == 0  # the commands for a cluster, without a launcher of this machine
    listed = capsys.readouterr().out
    assert "Put your launcher before each command" in listed and "torchrun" not in listed and " rank stage1 --config " in listed
