"""The cache of compiled graphs: never a wrong graph, whatever the order; damaged and unwritable files; what names a file."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mindspore")

from granvit.config import resolve_models
from ms_granvit.compile_cache import CompileCache
from ms_granvit.engine import graph_settings
from ms_granvit.ops.table import PLAIN
from tests.helpers import run_config

ROOT = Path(__file__).resolve().parents[2]


def launched(directory: Path, *factors: int) -> tuple[dict, str]:
    """Runs tests/ms/cached_graphs.py, checks its results, and returns its counts and its log."""
    command = [sys.executable, str(ROOT / "tests/ms/cached_graphs.py"), str(directory), *map(str, factors)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results, counts = json.loads(done.stdout.splitlines()[-1])
    assert results == [[f + weight] * size for f in factors for weight in (f, 7) for size in (2, 3)]
    return counts, done.stderr


def test_graphs_are_loaded_in_any_order_and_a_damaged_file_is_replaced(tmp_path):
    assert launched(tmp_path, 3, 5)[0] == {"loaded": 0, "compiled": 4}
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4 and max(file.stat().st_size for file in files) < 100_000  # the 1.2 MB of weights are not in them
    assert launched(tmp_path, 5, 3)[0] == {"loaded": 4, "compiled": 0}
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-1])
    counts, log = launched(tmp_path, 3, 5)
    assert counts["compiled"] > 0 and f"graph {files[0]} is damaged" in log
    assert launched(tmp_path, 3, 5)[0] == {"loaded": 4, "compiled": 0}


def test_a_directory_that_cannot_be_written_is_reported_and_the_run_goes_on(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    counts, log = launched(tmp_path / "file" / "graphs", 3)
    assert counts == {"loaded": 0, "compiled": 2} and f"graph {tmp_path / 'file' / 'graphs'}" in log and "cannot be" in log


class Watched:
    """Stands for a configuration; notes which of its attributes are read."""

    def __init__(self, value, read: set[str]):
        self._value, self._read = value, read

    def __getattr__(self, name: str):
        self._read.add(name)
        return getattr(self._value, name)


def test_the_engine_reads_no_setting_that_does_not_name_its_graphs():
    from granvit.init import initial_values
    from granvit.models import parameter_shapes
    from ms_granvit.engine import Engine

    config = run_config()
    vision, language = resolve_models(config)
    read: set[str] = set()
    Engine(Watched(config, read), vision, language, initial_values(parameter_shapes(vision, language), 0).items())
    named = set(graph_settings(config, vision, language, config.stage_spec, PLAIN))
    # Made of `stage`, of `distill` and `vision`; and the number of logits, which decides `kernels`.
    assert "distill" in read and read - named <= {"stage_spec", "crop_size", "data", "train"}


@pytest.mark.parametrize(
    "change", [{"distill": {"weight": 3.0}}, {"distill": {"crop_size": 16}}, {"stage": "stage2"}, {"stage": "guesser"},
               {"runtime": {"recompute": True}}, {"optimizer": {"weight_decay": 0.1}}, {"model": {"language": "demo-language"}},
               {"model": {"vision": "tiny-clip"}}, {"train": {"freeze": ["projector"]}}],
)  # fmt: skip
def test_what_changes_a_graph_changes_the_name_of_its_file(change, tmp_path):
    def path(config):
        models = resolve_models(config)
        return CompileCache(str(tmp_path), 0, graph_settings(config, *models, config.stage_spec, PLAIN)).path("update", ("(3,)",))

    assert path(run_config()) == path(run_config(output="elsewhere", data={"workers": 3}))
    assert path(run_config()) != path(run_config(**change))


def test_inputs_and_settings_of_the_compiler_change_the_name_of_a_file(tmp_path, monkeypatch):
    cache = CompileCache(str(tmp_path), 0, {})
    first = cache.path("update", ("Float32(3,)",))
    assert len({first, cache.path("update", ("Float32(4,)",)), cache.path("ema", ("Float32(3,)",))}) == 3
    monkeypatch.setenv("MS_DEV_ANYTHING", "1")
    assert cache.path("update", ("Float32(3,)",)) != first
