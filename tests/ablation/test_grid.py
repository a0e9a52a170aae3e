"""Grid files: what is refused, which runs are shared, what a run's key depends on; and the grids that are shipped."""
import json
import shutil
from pathlib import Path

import pytest

from granvit.ablation.grid import check_tasks, compared_stores, expand, naming, read_grid
from granvit.ablation.run_cells import unique_runs
from granvit.config import CONFIGS, load_config, read_yaml
from granvit.data.store_writer import write_store
from tests.ablation.conftest import grid_tree, write_grid
from tests.conftest import random_record

SHIPPED = sorted((CONFIGS / "ablations").glob("*.yaml"))


def cells_of(tmp_path, tree: dict, framework="torch"):
    return expand(read_grid(write_grid(tmp_path / "grid.yaml", tree)), framework, tmp_path / "out")


A = {"stage1": []}  # a setting
METRIC = "bbox2caption/exact_match"
MISTAKES = [
    ({"sedes": [1]}, "unknown key 'sedes'; did you mean 'seeds'"),
    ({"stages": {"stage1": {"confg": "x"}}}, "unknown key 'stages.stage1.confg'; did you mean 'stages.stage1.config'"),
    ({"directions": [{"metrc": "x"}]}, "unknown key 'directions.0.metrc'; did you mean 'directions.0.metric'"),
    ({"settings": {"a": A, "b": {"stge1": []}}}, "settings.b: stage 'stge1' does not exist; did you mean 'stage1'"),
    ({"settings": {"a": A, "b": {}}}, "settings.b: no stage"),
    ({"settings": {"a": A}}, "settings: .*at least 2"),
    ({"metrics": ["bbox2caption/exact_mach"]}, "did you mean 'bbox2caption/exact_match'"),
    ({"stages": {"stage 1": {"config": "x"}}}, "the name 'stage 1' is also that of directories"),
    ({"seeds": [0, 0]}, "seeds lists a value twice"),
    ({"directions": [{"metric": METRIC, "above": "wth", "below": "with", "paper": ""}]}, "did you mean 'with'"),
    ({"directions": [{"metric": METRIC, "above": "with", "below": "with", "paper": ""}]}, "the same setting"),
    ({"settings": {"a": A, "b": {"stage1": ["distill.wait=1"]}}}, "'distill.wait'; did you mean 'distill.weight'"),
    ({"settings": {"a": A, "b": {"stage1": ["seed=3"]}}}, "the grid sets seed"),
    ({"settings": {"a": A, "b": {**A, "stage2": ["model.init_from=x"]}}}, "the grid sets model.init_from"),
    ({"settings": {"a": A, "b": {"stage1": ["eval.source=null"]}}}, "settings.b: stage1 has no eval.source"),
    ({"settings": {"a": A, "b": {"stage1": ["eval.tasks=[bbox2caption]"]}}}, "settings.b: .*lacks caption2bbox"),
    ({"settings": {"a": A, "b": {"stage1": ["eval.images=3"]}}}, "settings 'a' and 'b' are evaluated differently"),
    ({"settings": {"a": A, "b": {"stage1": ["distill.grid=3"]}}}, "settings.b.stage1: distill.grid 3"),
    ({"stages": {"stage1": {"config": "configs/demo/stge1.yaml"}}, "settings": {"a": A, "b": A}}, "demo/stge1.yaml: no such"),
]


@pytest.mark.parametrize("change, message", MISTAKES)
def test_a_mistake_in_a_grid_file_is_named(tmp_path, base, change, message):
    with pytest.raises(ValueError, match=message):
        cells_of(tmp_path, grid_tree(base, **({"directions": []} | change)))


def test_a_key_twice_is_refused_and_the_grid_file_named(tmp_path, base):
    path = write_grid(tmp_path / "grid.yaml", grid_tree(base))
    path.write_text(path.read_text() + "seeds: [3]\n")
    lines = path.read_text().splitlines()
    with pytest.raises(ValueError, match=f"{path}: not valid YAML: line {len(lines)}: the key 'seeds' is there twice"):
        read_grid(path)
    path.write_text("settings:\n  a: {stage1: []}\n  b: {stage1: [], stage1: [seed=1]}\n")
    with pytest.raises(ValueError, match="line 3: the key 'stage1' is there twice"):
        read_grid(path)


def test_merged_keys_may_be_replaced(tmp_path):
    path = tmp_path / "tree.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n'1': 5\n1: 6\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}, "1": 5, 1: 6}


def test_errors_name_the_grid_file_once(tmp_path):
    for text in ("settings.b: no stage", "a.yaml: settings.b: no stage"):
        with pytest.raises(ValueError, match=r"^a\.yaml: settings\.b: no stage$"), naming(Path("a.yaml")):
            raise ValueError(text)


def test_ranks_and_micro_batch_change_a_run_only_with_losses_per_device(tmp_path, base):
    def key(ranks, *own):
        settings = {"a": {"stage1": list(own)}, "b": {"stage1": ["distill.weight=0"]}}
        path = write_grid(tmp_path / "grid.yaml", grid_tree(base, settings=settings, directions=[]))
        return expand(read_grid(path), "torch", tmp_path, ranks)[0].runs[0].key

    assert len({key(1), key(2), key(1, "train.micro_batch=1")}) == 1
    per_device = "train.loss_reduction=per_device"
    assert len({key(1), key(1, per_device), key(2, per_device), key(1, per_device, "train.micro_batch=1")}) == 4


def test_a_held_out_store_without_the_metrics_questions_is_refused(tmp_path, base, caption_store):
    write_store([random_record(f"a{i}", 0, i) for i in range(3)], tmp_path / "no regions")
    write_store([random_record(f"a{i}", 1, i, global_caption=False) for i in range(3)], tmp_path / "no captions")
    for source, metric, message in (
        (tmp_path / "no regions", METRIC, "has no such question; it has global"),
        (tmp_path / "no captions", "global/rouge_l", "has no such question; it has bbox2caption, caption2bbox"),
        (caption_store.path, METRIC, "has no such question; it has no regions and no global captions"),
    ):
        tree = grid_tree(base, metrics=[metric], directions=[])
        tasks = f"eval.tasks=[{metric.partition('/')[0]}]"
        tree["stages"]["stage1"]["overrides"] = [f"eval.source={json.dumps(str(source))}", tasks]
        grid = read_grid(write_grid(tmp_path / "grid.yaml", tree))
        with pytest.raises(ValueError, match=f"metric {metric}: eval.source {source} {message}"):
            check_tasks(grid, expand(grid, "torch", tmp_path))
    grid = read_grid(write_grid(tmp_path / "grid.yaml", grid_tree(base)))
    check_tasks(grid, expand(grid, "torch", tmp_path))


def test_cells_share_the_beginning_of_their_chains(tmp_path, base):
    settings = {"one": A, "two": {**A, "stage2": []}, "other": {"stage1": ["distill.weight=0.5"], "stage2": []}}
    cells = cells_of(tmp_path, grid_tree(base, settings=settings, directions=[]))
    assert [(cell.setting, cell.seed) for cell in cells] == [(name, seed) for seed in (0, 1) for name in settings]
    one, two, other = cells[:3]
    assert one.runs[0].key == two.runs[0].key != other.runs[0].key
    assert two.runs[1].key != other.runs[1].key  # equal configurations, but other runs before them
    assert cells[3].runs[0].key != one.runs[0].key  # the seed
    assert len(unique_runs(cells)) == 8
    assert two.runs[1].config.model.init_from == two.runs[0].config.output
    assert two.runs[0].config.model.init_from is None and two.runs[1].config.seed == 0
    assert two.runs[0].directory.parent == tmp_path / "out" / "cells"


@pytest.mark.parametrize("name", ["a path", "a: b", "a #b", "a'b", 'a"b', "null", "[a", "größe"])
def test_any_path_can_be_the_output(tmp_path, base, name):
    settings = {"one": {**A, "stage2": []}, "two": {"stage1": ["distill.weight=0"], "stage2": []}}
    grid = read_grid(write_grid(tmp_path / "grid.yaml", grid_tree(base, settings=settings, directions=[])))
    first, second = expand(grid, "torch", Path(name))[0].runs
    assert first.directory.parent == second.directory.parent == Path(name) / "cells"
    assert second.config.model.init_from == first.config.output
    _, config, *overrides = second.command_line
    assert load_config(config, overrides) == second.config  # what the run's process reads


def test_a_runs_key_depends_on_start_files_stores_and_framework(tmp_path, base):
    """An equal grid has equal keys, in another directory too."""
    store, weights = tmp_path / "store", tmp_path / "language"
    write_store([random_record("a", 2, 1)], store)
    weights.mkdir()
    (weights / "tokenizer.json").write_text("{}")
    own = [f"data.sources=[{{path: {store}}}]", f"model.weights_language={weights}"]
    tree = grid_tree(base, settings={"a": {"stage1": own}, "b": {"stage1": [*own, "distill.weight=0"]}}, directions=[])

    def key(framework="torch", folder=tmp_path):
        return expand(read_grid(write_grid(tmp_path / "grid.yaml", tree)), framework, folder)[0].runs[0].key

    first = key()
    assert key() == first == key(folder=tmp_path / "elsewhere") != key("mindspore")
    (weights / "tokenizer.json").write_text("{ }")
    second = key()
    shutil.rmtree(store)
    write_store([random_record("a", 2, 2)], store)
    assert len({first, second, key()}) == 3


def test_a_missing_start_file_is_the_problem_of_its_cells_alone(tmp_path, base):
    settings = {
        "good": {"stage1": []},
        "no weights": {"stage1": ["model.init=pretrained", "model.weights_vision=nowhere"]},
        "no store": {"stage1": [], "stage2": ["data.sources=[{path: nothing}]"]},
        "no run": {"stage1": ["model.init_from=no/run"]},
    }
    cells = cells_of(tmp_path, grid_tree(base, settings=settings, directions=[]))
    problems = {cell.setting: cell.problem for cell in cells}
    assert problems["good"] is None
    assert problems["no weights"] == "stage1: model.weights_vision: no weights in nowhere"
    assert problems["no store"].startswith("stage2: store nothing: no such directory")
    assert problems["no run"] == "stage1: model.init_from no/run: no checkpoint there"
    assert len(unique_runs(cells)) == 2  # of the good setting; the stage 1 of a cell that cannot end is not trained


def test_every_training_store_of_a_chain_is_compared_with_the_held_out_one(tmp_path, base, stores):
    write_store([random_record("a", 2, 1)], tmp_path / "second")
    settings = {"a": {"stage1": []}, "b": {"stage1": [], "stage2": [f"data.sources=[{{path: {tmp_path / 'second'}}}]"]}}
    cells = cells_of(tmp_path, grid_tree(base, settings=settings, directions=[]))
    assert compared_stores(cells) == {stores["held"]: {stores["train"], str(tmp_path / "second")}}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_grid_expands(path, tmp_path, monkeypatch):
    """With start files and stores stood in for: what is checked are its keys, names, chains and evaluation."""
    monkeypatch.setattr("granvit.ablation.grid.start_files", lambda config, first: "")
    grid = read_grid(path)
    cells = expand(grid, "mindspore", tmp_path)
    assert len(cells) == len(grid.seeds) * len(grid.settings) and not any(cell.problem for cell in cells)
    demo = not path.stem.endswith("_paper")
    assert all(entry.config.startswith("configs/demo/") == demo for entry in grid.stages.values())
    assert demo == (path.with_stem(f"{path.stem}_paper") in SHIPPED)  # every grid at both sizes
