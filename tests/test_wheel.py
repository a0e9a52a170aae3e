"""The wheel: what is in it, and that configurations and commands are found from any directory."""
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

from granvit.config import CONFIGS, find_config
from granvit.train import any_train_command

pytest.importorskip("setuptools", minversion="70.1")  # makes wheels by itself
ROOT = Path(__file__).resolve().parents[1]
LOAD = """
import sys
from granvit.config import CONFIGS, load_config, read_yaml, resolve_models, find_config, vision_config, language_config
from granvit.ablation.grid import read_grid
from granvit.data.gran.config import read_build
from pathlib import Path
assert str(CONFIGS).startswith(sys.argv[1]), CONFIGS
for path in CONFIGS.rglob("*.yaml"):
    if path.parent.name == "models":
        (vision_config if "patch_size" in read_yaml(path) else language_config)(path.stem)
    elif path.parent.name == "ablations":
        for stage in read_grid(path).stages.values():
            load_config(find_config(stage.config), stage.overrides)
    elif path.name.startswith("gran"):
        read_build(path)
    else:
        resolve_models(load_config(find_config(Path("configs") / path.relative_to(CONFIGS))))
        print(path.relative_to(CONFIGS))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The wheel's contents, built without the network from a copy of what a checkout holds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("granvit", "ms_granvit", "pt_granvit", "parity", "configs", "tests", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=leave_out)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    shutil.rmtree(source)
    return folder / "site"


def test_a_wheel_holds_what_a_checkout_runs(unpacked):
    for package in ("granvit", "ms_granvit", "pt_granvit", "parity"):
        expected = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")} | {Path("parity/page.html")}
        assert not {path for path in expected if not (unpacked / path).is_file()}
    pair = [path.relative_to(ROOT) for path in (ROOT / "granvit/demo/pair").rglob("*") if path.is_file()]
    assert len(pair) == 7 and all((unpacked / path).read_bytes() == (ROOT / path).read_bytes() for path in pair)
    there = {path.relative_to(ROOT) for path in CONFIGS.rglob("*.yaml")}
    assert {path.relative_to(unpacked / "granvit") for path in (unpacked / "granvit/configs").rglob("*.yaml")} == there
    folders = sorted(path.name for path in unpacked.iterdir() if path.suffix != ".dist-info")
    assert folders == ["granvit", "ms_granvit", "parity", "pt_granvit"]  # nothing else is put beside other people's packages


def test_every_console_command_leads_to_a_function(unpacked):
    parser = configparser.ConfigParser()
    parser.read(next(unpacked.glob("*.dist-info")) / "entry_points.txt")
    commands = dict(parser["console_scripts"])
    names = "train predict probe store conversations build view plan demo ablate export convert check"
    assert sorted(commands) == sorted(f"granvit-{name}" for name in names.split())
    for target in commands.values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function)), target


def test_every_shipped_configuration_loads_from_an_unpacked_wheel(unpacked, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, "-c", LOAD, unpacked], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stage1.yaml" in done.stdout and "demo/stage2.yaml" in done.stdout


def test_a_configuration_of_ones_own_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/stage1.yaml") == CONFIGS / "stage1.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "stage1.yaml").write_text("")
    assert find_config("configs/stage1.yaml") == Path("configs/stage1.yaml")
    with pytest.raises(ValueError, match=f"configs/stage9.yaml: no such file, nor {CONFIGS}"):
        find_config("configs/stage9.yaml")


def test_granvit_train_hands_its_arguments_on(capsys):
    with pytest.raises(SystemExit):
        any_train_command(["stage2", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert "usage: granvit-train stage2" in help_text
    assert "torchrun --nproc_per_node 2 $(command -v granvit-train) stage2" in help_text
    with pytest.raises(SystemExit):
        any_train_command(["stage3"])
    assert "invalid choice: 'stage3'" in capsys.readouterr().err
