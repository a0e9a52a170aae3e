"""The smallest shipped grid of the demo's size, for two steps: both settings are trained in PyTorch, answer, and are compared."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from granvit.ablation.grid import read_grid
from granvit.config import CONFIGS
from granvit.data.store_writer import write_store
from granvit.demo.pair import SHIPPED
from granvit.demo.scenes import scene
from tests.ablation.conftest import write_grid

ROOT = Path(__file__).resolve().parents[2]
GRID = CONFIGS / "ablations" / "packing.yaml"


def test_the_packing_grid_runs_for_two_steps(tmp_path):
    pytest.importorskip("torch")
    for name, first, images in (("train", 1000, 24), ("heldout", 0, 4)):
        write_store((scene(name, first, index) for index in range(images)), tmp_path / name)
    tree = yaml.safe_load(GRID.read_text())
    tree["seeds"] = [0]
    for chain in tree["settings"].values():
        chain["stage1"] += ["train.global_batch=8", "train.micro_batch=8"]
    tree["stages"]["stage1"]["overrides"] = [
        f"model.weights_vision={SHIPPED / 'vision'}", f"model.weights_language={SHIPPED / 'language'}",
        f"data.sources=[{{path: {tmp_path / 'train'}}}]", f"eval.source={tmp_path / 'heldout'}", "runtime.device=cpu",
        "train.steps=2", "eval.start=false", "eval.every=0", "eval.rows=0", "eval.images=4", "eval.batch=16",
        "eval.tasks=[bbox2caption]", "eval.max_new_tokens=2",
    ]  # fmt: skip
    grid, out = write_grid(tmp_path / "packing.yaml", tree), tmp_path / "out"
    done = subprocess.run([sys.executable, ROOT / "scripts" / "ablate.py", grid, "--framework", "torch", "--out", out],
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "packing" / "results.json").read_text())
    assert [setting["name"] for setting in found["settings"]] == list(read_grid(GRID).settings) and not found["failed"]
    for setting in found["settings"]:
        for metric in tree["metrics"]:
            assert setting["metrics"][metric]["seeds"] == 1 and setting["metrics"][metric]["images"] == 4
    trained = [(path.parent / "metrics.jsonl").read_text().splitlines() for path in (out / "cells").glob("*/finished.json")]
    assert len(trained) == 2 and all(json.loads(lines[1])["step"] == 2 for lines in trained)
