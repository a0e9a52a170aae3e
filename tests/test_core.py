"""Rules for the whole source tree, and the configuration."""
import ast
from pathlib import Path

import numpy as np
import pytest
import yaml

from granvit.config import (
    CONFIGS,
    differences,
    dump_config,
    language_config,
    load_config,
    parse_config,
    resolve_models,
    vision_config,
)
from granvit.init import initial_values
from granvit.models import VisionConfig, parameter_shapes
from granvit.stages import STAGES
from tests.helpers import run_config

ROOT = Path(__file__).resolve().parents[1]


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    "package, foreign",
    [("granvit", {"torch", "mindspore"}), ("ms_granvit", {"torch", "pt_granvit"}), ("pt_granvit", {"mindspore", "ms_granvit"})],
)
def test_packages_do_not_import_each_others_framework(package, foreign):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & foreign, path


def test_the_twins_have_the_same_files():
    """But for the cache of compiled graphs, which PyTorch does not have, and for kernels of one kind of device."""
    ours, theirs = ({str(p.relative_to(ROOT / d)) for p in (ROOT / d).rglob("*.py")} for d in ("ms_granvit", "pt_granvit"))
    alone = {"compile_cache.py", "ops/native_small.py", *(p for p in ours if p.startswith("ops/ascendc/"))}
    assert ours - alone == theirs - {"ops/flex.py", "ops/triton_roi_align.py"}


def test_full_size_rows_have_the_published_parameter_counts():
    """SigLIP2-So400m has 428.8M with the 27th block, the closing norm and the MAP head, which are not built; Qwen2.5-1.5B has
    1.544B."""
    vision, language = vision_config("siglip2-so400m-patch16-512"), language_config("qwen2.5-1.5b")
    count = {"vision": 0, "language": 0, "projector": 0}
    for name, shape in parameter_shapes(vision, language).items():
        count[name.split(".")[0]] += int(np.prod(shape))
    block = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    head = block - 1152  # one norm fewer, and the probe
    assert round((count["vision"] + block + 2 * 1152 + head) / 1e6, 1) == 428.8
    assert round(count["language"] / 1e9, 3) == 1.544


def test_start_values_depend_on_seed_and_name_alone():
    shapes = parameter_shapes(vision_config("tiny-vision"), language_config("tiny-language"))
    whole = initial_values(shapes, 7)
    name = "vision.encoder.layers.1.mlp.fc1.weight"
    np.testing.assert_array_equal(initial_values({name: shapes[name]}, 7)[name], whole[name])
    assert not np.array_equal(initial_values({name: shapes[name]}, 8)[name], whole[name])


def test_unknown_keys_are_named_with_the_nearest_valid_one(tmp_path):
    path = tmp_path / "run.yaml"
    tree = yaml.safe_load(dump_config(run_config()))
    tree["optimizer"]["learning_rat"] = 1
    tree["trian"] = {"steps": 3}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"'optimizer\.learning_rat'.*'trian'.*'train'"):
        load_config(path)
    with pytest.raises(ValueError, match=r"'train\.step'.*'train\.steps'"):
        parse_config({**yaml.safe_load(dump_config(run_config())), "train": {"step": 3}}, "run.yaml")


def test_overrides_bases_and_round_trip(tmp_path):
    (tmp_path / "base.yaml").write_text(dump_config(run_config()))
    (tmp_path / "run.yaml").write_text("base: base.yaml\ntrain: {steps: 9}\n")
    config = load_config(tmp_path / "run.yaml", ["optimizer.lr=3e-4", "data.mix={bbox2caption: 0.5}", "distill.grid=2"])
    assert (config.train.steps, config.train.micro_batch, config.optimizer.lr) == (9, 2, 3e-4)
    assert config.stage_spec.mix == {"bbox2caption": 0.5}
    assert parse_config(yaml.safe_load(dump_config(config)), "again") == config
    assert differences(run_config(), config)[:1] == ["data.mix: None -> {'bbox2caption': 0.5}"]
    with pytest.raises(ValueError, match="key=value"):
        load_config(tmp_path / "run.yaml", ["train.steps"])
    with pytest.raises(ValueError, match=r"'train\.freeze=\[vision'"):
        load_config(tmp_path / "run.yaml", ["train.freeze=[vision"])
    with pytest.raises(ValueError, match=r"train\.steps"):
        load_config(tmp_path / "run.yaml", ["train.steps=0"])


def test_an_override_of_one_share_leaves_the_others_of_the_mix(tmp_path):
    """For a configuration without `mix` and for a dumped one, which has `mix: null`: both mean the stage's default mix."""
    (tmp_path / "dumped.yaml").write_text(dump_config(run_config()))
    for path in (CONFIGS / "stage1.yaml", tmp_path / "dumped.yaml"):
        assert load_config(path, ["data.mix.global=0.5"]).stage_spec.mix == {"global": 0.5, "bbox2caption": 1.0}
    (tmp_path / "stated.yaml").write_text(dump_config(run_config(data={"mix": {"caption2bbox": 1.0}})))
    stated = load_config(tmp_path / "stated.yaml", ["data.mix.global=0.5", "data.mix.bbox2caption=0.25"])
    assert stated.stage_spec.mix == {"caption2bbox": 1.0, "global": 0.5, "bbox2caption": 0.25}
    assert STAGES["stage1"].mix == {"global": 1.0, "bbox2caption": 1.0}


def test_files_that_are_not_configurations(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"list\.yaml"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        load_config(tmp_path / "bad.yaml")


def test_a_model_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="'siglip2-so400m-patch16-512'"):
        vision_config("siglip2-so400m")
    with pytest.raises(ValueError, match=r"tiny-language.*VisionConfig"):
        vision_config("tiny-language")


@pytest.mark.parametrize(
    "key, message",
    [
        ("name: mine", r"mine\.yaml.*'name'"),
        ("tiles: 4", r"mine\.yaml.*'tiles'.*vision\.tiling"),
    ],
)
def test_what_a_models_file_does_not_state_is_named_with_the_remedy(tmp_path, key, message):
    path = tmp_path / "mine.yaml"
    path.write_text((CONFIGS / "models" / "tiny-vision.yaml").read_text())
    assert vision_config(str(path)).name == "mine"
    path.write_text(f"{path.read_text()}{key}\n")
    with pytest.raises(ValueError, match=message):
        vision_config(str(path))


@pytest.mark.parametrize("path", sorted((CONFIGS / "models").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_models_load(path):
    try:
        assert vision_config(path.stem).name == path.stem
    except ValueError as error:
        assert "VisionConfig" in str(error)
        assert language_config(path.stem).name == path.stem


def test_levels_say_how_many_blocks_exist():
    row = vision_config("tiny-vision").model_dump(exclude={"built_level"})
    for level, blocks in (("penultimate", 2), ("last", 3), ("final", 3)):
        assert VisionConfig(**{**row, "level": level}).built_layers == blocks
    with pytest.raises(ValueError, match="below"):
        VisionConfig(**{**row, "level": "last", "built_level": "penultimate"})


def test_the_former_key_top_is_still_read(tmp_path):
    row = vision_config("tiny-vision").model_dump(mode="json", exclude={"name", "tiles", "built_level"})
    for level, top, built in (("penultimate", None, "penultimate"), ("penultimate", "last", "last"), ("last", None, "last")):
        path = tmp_path / "encoder.yaml"
        path.write_text(yaml.safe_dump({**row, "level": level, "top": top}))
        assert vision_config(str(path)).built_level == built
    with pytest.raises(ValueError, match="top"):
        VisionConfig(name="both", **row, top="last", built_level="last")


def test_a_global_batch_that_does_not_divide_says_so():
    with pytest.raises(ValueError, match=r"\b3 .*train\.micro_batch 2"):
        run_config().local_micro_batches(3)
    assert run_config(train={"global_batch": 16}).local_micro_batches(2) == 4


def test_crops_and_grids_that_do_not_fit_the_encoder_say_so():
    with pytest.raises(ValueError, match=r"distill\.crop_size 30"):
        resolve_models(run_config(distill={"crop_size": 30}))
    with pytest.raises(ValueError, match=r"distill\.grid 3\b.*4 x 4"):
        resolve_models(run_config(distill={"grid": 3}))
