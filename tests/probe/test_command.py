"""The command: several encoders side by side, the same numbers in both frameworks, and refusals in one line."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from granvit.checkpoint.export import main as export_command
from granvit.checkpoint.run import newest_checkpoint, state_digest
from granvit.data.chat import load_chat
from granvit.data.store_writer import write_store
from granvit.evaluate import Evaluator
from granvit.launch import load_engine_class
from granvit.models import VisionConfig, vision_shapes
from granvit.probe import command
from granvit.probe.command import main, short_names
from tests.conftest import random_record
from tests.probe.conftest import VISION, values, write_encoder, write_run

pytest.importorskip("torch")
pytest.importorskip("matplotlib")


def probe(encoders, names, store, out, *options, framework="torch") -> int:
    return main([*(str(encoders / name) for name in names), "--source", str(store), "--out", str(out), "--framework", framework,
                 "--device", "cpu", "--label", "last-word", "--sizes", "0.03", "0.05", *options])  # fmt: skip


@pytest.fixture(scope="module")
def reported(encoders, regions, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert probe(encoders, ["start", "run", "wide", "constant"], regions.path, out) == 0
    return out, json.loads((out / "probe.json").read_text())


def by_key(tree, name) -> dict[tuple[str, str], dict]:
    return {(entry["score"], entry["group"]): entry for entry in tree["encoders"][name]}


def test_encoders_of_several_widths_are_side_by_side(reported):
    out, tree = reported
    assert list(tree["encoders"]) == ["start", "run", "wide", "constant"]
    scores = {name: by_key(tree, name) for name in tree["encoders"]}
    keys = {(score, group) for score in ("nearest", "linear", "agreement", "matched", "mismatched")
            for group in ("all", "small", "medium", "large")}  # fmt: skip
    assert set(scores["start"]) == keys and set(scores["run"]) == keys | {("loss", "all")}
    assert scores["start"]["matched", "all"]["regions"] == 60 and scores["start"]["matched", "all"]["images"] == 24
    for key, entry in scores["start"].items():
        assert "minus_first" not in entry
        other = scores["run"][key]
        assert other["minus_first"]["value"] == pytest.approx(other["value"] - entry["value"])
        if entry["images"] < 20:  # no interval
            assert entry["low"] is entry["high"] is other["minus_first"]["low"] is None
        else:
            assert entry["low"] <= entry["value"] <= entry["high"]
    assert {entry["images"] < 20 for entry in scores["start"].values()} == {True, False}
    assert scores["start"]["nearest", "all"]["value"] > 0.6  # of three colours
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert "| start | run | wide | constant | run minus start |" in markdown
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
        "http://purl.org", "").replace("http://creativecommons.org", "")  # fmt: skip


def test_a_constant_encoder_is_not_called_good(reported):
    scores = by_key(reported[1], "constant")
    assert scores["matched", "all"]["value"] == pytest.approx(1, abs=1e-5)
    assert scores["agreement", "all"]["value"] == scores["agreement", "all"]["high"] == 0
    assert scores["nearest", "all"]["value"] < 0.6 and scores["linear", "all"]["value"] < 0.6


def test_both_frameworks_give_the_same_numbers(reported, encoders, regions, tmp_path, capsys):
    pytest.importorskip("mindspore")
    assert probe(encoders, ["run"], regions.path, tmp_path, framework="mindspore") == 0
    kernels = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kernels: ")]
    assert len(kernels) == 2 and "cross_entropy: " not in kernels[0] and "cross_entropy: " in kernels[1]  # encoder, whole model
    theirs, ours = by_key(reported[1], "run"), by_key(json.loads((tmp_path / "probe.json").read_text()), "run")
    assert set(ours) == set(theirs)
    for key, entry in ours.items():
        for part in ("value", "low", "high"):
            expected = theirs[key][part]  # None: too few images for an interval
            assert entry[part] == (expected if expected is None else pytest.approx(expected, rel=1e-4, abs=1e-4)), (key, part)
        assert entry["regions"] == theirs[key]["regions"]


def test_the_loss_is_that_of_an_evaluation_of_all_questions(reported, encoders, regions, tmp_path):
    """The evaluator packs the same questions in other rows and batches."""
    checkpoint = newest_checkpoint(encoders / "run")
    config = checkpoint.config.model_copy(update={
        "eval": checkpoint.config.eval.model_copy(update={"source": str(regions.path), "rows": 100, "tasks": ()}),
        "data": checkpoint.config.data.model_copy(update={"mix": {"bbox2caption": 1.0}}),
    })  # fmt: skip
    Engine = load_engine_class("torch")
    engine = Engine(config, checkpoint.vision, checkpoint.language, checkpoint.tensors("model"))
    chat = load_chat(config, checkpoint.language)
    found = Evaluator(engine, config, checkpoint.vision, chat, tmp_path)(1)
    mine = by_key(reported[1], "run")["loss", "all"]
    assert found.held_out["questions"] == mine["regions"] == 66
    assert mine["value"] == pytest.approx(found.held_out["loss_caption"], rel=1e-5)


@pytest.mark.parametrize("level", ["penultimate", "final"])
def test_an_export_for_transformers_scores_what_its_run_scores(level, regions, trained_on, tmp_path):
    vision = VisionConfig(**{**VISION.model_dump(exclude={"built_level"}), "level": level})
    write_run(tmp_path / "run", vision, trained_on)
    top = ["--top", "blank"] if level == "penultimate" else []
    assert export_command([str(tmp_path / "run"), str(tmp_path / "export"), "--as", "encoder", *top]) == 0
    trees = []
    for name in ("run", "export"):
        assert probe(tmp_path, [name], regions.path, tmp_path / "out", "--no-loss", "--images", "12") == 0
        trees.append(json.loads((tmp_path / "out" / "probe.json").read_text()))
    assert trees[0]["settings"]["level"] == trees[1]["settings"]["level"] == [level]
    assert trees[0]["encoders"]["run"] == trees[1]["encoders"]["export"]


def test_runs_of_several_seeds_are_one_column(encoders, regions, trained_on, tmp_path):
    for weight in (0.0, 1.0):
        for seed in (1, 2):
            write_run(tmp_path / f"w{weight:g}" / f"s{seed}", VISION, trained_on, seed=seed, weight=weight)
    runs = [tmp_path / f"w{weight}" / f"s{seed}" for weight in (0, 1) for seed in (1, 2)]
    assert probe(encoders, ["start", *runs], regions.path, tmp_path / "out", "--no-loss") == 0
    tree = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert list(tree["encoders"]) == ["start", "distill.weight=0.0", "distill.weight=1.0"]
    assert probe(encoders, ["start", *runs[:1]], regions.path, tmp_path / "alone", "--no-loss") == 0
    start = by_key(tree, "start")
    alone = by_key(json.loads((tmp_path / "alone" / "probe.json").read_text()), "s1")
    for key, entry in by_key(tree, "distill.weight=0.0").items():
        assert entry["by_seed"]["1"] == alone[key]["value"] and set(entry["by_seed"]) == {"1", "2"}
        assert entry["value"] == pytest.approx(np.mean(list(entry["by_seed"].values())))
        assert entry["minus_first"]["value"] == pytest.approx(entry["value"] - start[key]["value"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "distill.weight=0.0: the mean of w0/s1 (seed 1), w0/s2 (seed 2)" in text


def test_names_are_as_short_as_they_can_be():
    assert short_names([Path("a/stage1"), Path("b/stage1"), Path("/x/start")]) == ["a/stage1", "b/stage1", "start"]
    with pytest.raises(ValueError, match="named twice"):
        short_names([Path("a"), Path("./a")])


def refusal(capsys, status: int) -> str:
    assert status == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_projector_of_another_width_is_refused_with_both_numbers(encoders, regions, tmp_path, capsys):
    shutil.copytree(encoders / "run", tmp_path / "run")
    path = newest_checkpoint(tmp_path / "run").path / "state.json"
    state = json.loads(path.read_text())
    del state["sha256"]
    state["vision"]["width"] = 24
    path.write_text(json.dumps({"sha256": state_digest(state)} | state))
    line = refusal(capsys, probe(tmp_path, ["run"], regions.path, tmp_path / "out"))
    assert "its projector expects features of width 16" in line and "has 24" in line


def test_what_is_no_model_and_no_region_store_is_refused(encoders, regions, chat_store, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    for directory, reason in (("empty", "nor a run's checkpoint"), ("begun", "no checkpoint"), ("missing", "no such")):
        line = refusal(capsys, probe(tmp_path, [directory], regions.path, tmp_path / "out"))
        assert directory in line and reason in line
    assert "conversations" in refusal(capsys, probe(encoders, ["start"], chat_store.path, tmp_path / "out"))
    write_store([random_record(f"i{i}", 4, i) for i in range(6)], tmp_path / "unique")
    line = refusal(capsys, probe(encoders, ["start"], tmp_path / "unique", tmp_path / "out", "--label", "caption"))
    assert "fewer images than classes" in line
    line = refusal(capsys, probe(encoders, ["start"], regions.path, tmp_path / "out", "--images", "1"))
    assert "one image with regions" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, named", [
    (("--images", "0"), "--images"), (("--batch", "0"), "--batch"), (("--sizes", "0.5", "0.1"), "--sizes"),
    (("--crop-size", "20"), "--crop-size 20"), (("--level", "final"), "--level"), (("--label", "["), "--label"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(encoders, regions, tmp_path, capsys, options, named):
    assert named in refusal(capsys, probe(encoders, ["start"], regions.path, tmp_path / "out", *options))


def test_out_of_memory_names_the_batch(encoders, regions, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(command, "compute_features", full)
    assert "--batch 4 or --regions 4" in refusal(capsys, probe(encoders, ["start"], regions.path, tmp_path / "out"))
    line = refusal(capsys, probe(encoders, ["start"], regions.path, tmp_path / "out", "--batch", "1", "--regions", "1"))
    assert "--crop-size" in line


def test_damaged_weights_are_refused(encoders, regions, tmp_path, capsys):
    broken = values(vision_shapes(VISION), 1)
    broken["vision.embeddings.patch_embedding.bias"][:] = np.nan
    write_encoder(tmp_path / "broken", VISION, broken)
    assert "not finite" in refusal(capsys, probe(tmp_path, ["broken"], regions.path, tmp_path / "out"))
