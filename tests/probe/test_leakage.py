"""A probe's store is compared with the training data of the runs and of those that they started from."""
import shutil
from dataclasses import replace

import pytest

from granvit.checkpoint.run import newest_checkpoint
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from granvit.probe import leakage
from granvit.probe.command import main
from granvit.probe.leakage import not_held_out
from tests.probe.conftest import VISION, coloured, write_run


@pytest.fixture(scope="module")
def runs(regions, trained_on, tmp_path_factory):
    """`first` was trained on a store that shares two images with the probe's; `second` started from it and `third` from `second`,
    both with other images."""
    folder = tmp_path_factory.mktemp("runs")
    copies = [replace(regions.record(image), id=f"copy{image}") for image in (3, 7)]
    write_store([coloured("other", 500, 2), *copies], folder / "leaky")
    write_run(folder / "first", VISION, Store(folder / "leaky"))
    write_run(folder / "second", VISION, trained_on, init_from=folder / "first")
    write_run(folder / "third", VISION, trained_on, init_from=folder / "second")
    return folder


def reasons(store, *paths) -> list[list[str]]:
    checkpoints = [newest_checkpoint(path) for path in paths]
    found = not_held_out(checkpoints, store)
    return [found[checkpoint.path] for checkpoint in checkpoints]


def test_other_images_are_no_reason(encoders, regions):
    assert reasons(regions, encoders / "run") == [[]]


def test_images_of_a_run_far_back_in_the_chain_are_found(runs, regions, monkeypatch):
    compared = []
    shared_images = leakage.shared_images
    monkeypatch.setattr(leakage, "shared_images", lambda *stores: compared.append(stores) or shared_images(*stores))
    for (reason,) in reasons(regions, runs / "third", runs / "first"):
        assert reason.startswith(f"{runs / 'first'}: store {regions.path} shares 2 of its 31 images with {runs / 'leaky'}")
        assert "r3 equals copy3; r7 equals copy7" in reason
    assert len(compared) == 2  # each training store once


def test_a_store_that_was_trained_on_is_named_even_where_it_lies_elsewhere(regions, tmp_path):
    shutil.copytree(regions.path, tmp_path / "copy")
    write_run(tmp_path / "run", VISION, Store(tmp_path / "copy"))
    shutil.rmtree(tmp_path / "copy")
    ((reason,),) = reasons(regions, tmp_path / "run")
    assert reason == f"{tmp_path / 'run'}: store {regions.path} is also trained on"


def test_training_data_that_cannot_be_compared_are_a_reason(regions, trained_on, tmp_path):
    write_store([coloured("gone", 600, 1)], tmp_path / "gone")
    write_run(tmp_path / "missing", VISION, Store(tmp_path / "gone"))
    shutil.rmtree(tmp_path / "gone")
    write_run(tmp_path / "changed", VISION, trained_on, recorded="0" * 16)
    write_run(tmp_path / "orphan", VISION, trained_on, init_from=tmp_path / "nowhere")
    (missing,), (changed,), (orphan,) = reasons(regions, *(tmp_path / name for name in ("missing", "changed", "orphan")))
    assert "gone: no such directory" in missing and "has changed since" in changed
    assert f"no checkpoint in {tmp_path / 'nowhere'} (model.init_from)" in orphan


def test_the_command_refuses_and_the_flag_overrides(runs, regions, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    command = [str(runs / "second"), "--source", str(regions.path), "--out", str(tmp_path / "out"), "--framework", "torch",
               "--device", "cpu", "--label", "last-word", "--no-loss"]  # fmt: skip
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "shares 2 of its 31 images" in line and "--allow-leakage" in line and not (tmp_path / "out").exists()
    assert main([*command, "--allow-leakage"]) == 0
    said = f"second: NOT KNOWN TO BE HELD-OUT IMAGES (--allow-leakage): {runs / 'first'}: store {regions.path} shares 2 of its 31"
    assert said in capsys.readouterr().out and said in (tmp_path / "out" / "report.md").read_text()
