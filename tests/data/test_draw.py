"""Exact counts of questions: `count` of a source, and mixes that state counts."""
from collections import Counter

import numpy as np
import pytest
import yaml

from granvit.config import load_config
from granvit.data.draw import Draw
from granvit.data.loader import Loader
from granvit.data.splitmix import splitmix64
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from granvit.stages import TASKS
from tests.conftest import random_record
from tests.data.test_loader import run
from tests.data.test_sampler import questions_in

IMAGES, REGIONS = 200, 6


@pytest.fixture(scope="module")
def drawn_from(tmp_path_factory):
    """A store of 200 images with 6 regions each, every other one with a global caption."""
    path = tmp_path_factory.mktemp("draw") / "s"
    write_store([random_record(f"r{i}", REGIONS, i, i % 2 == 0) for i in range(IMAGES)], path)
    return path


def with_counts(path, counts, **keys):
    return run(path, data={"sources": [{"path": str(path), "count": counts}]}, **keys)


@pytest.mark.parametrize("wanted", [0, 1, 17, 700, 1199, 1200])
def test_a_draw_has_exactly_the_questions_with_the_smallest_hashes(drawn_from, wanted):
    everything = np.arange(IMAGES * REGIONS)
    hashes = splitmix64(everything, 5, TASKS.index("bbox2caption"))
    chosen = Draw(Store(drawn_from), "bbox2caption", wanted, 5).includes(everything)
    assert chosen.sum() == wanted
    assert sorted(everything[chosen]) == sorted(np.argsort(hashes)[:wanted])


def test_hashes_outside_the_expected_range_are_found(drawn_from, monkeypatch):
    """If all hashes are small, the search goes on in a wider range."""
    monkeypatch.setattr("granvit.data.draw.splitmix64", lambda numbers, *key: numbers.astype(np.uint64))
    assert Draw(Store(drawn_from), "bbox2caption", 700, 0).includes(np.arange(1200)).tolist() == [True] * 700 + [False] * 500


@pytest.mark.parametrize("regions_per_row", [1, 3])
def test_every_epoch_asks_the_same_questions_as_many_as_stated(drawn_from, vision, chat, regions_per_row):
    counts, mix = {"bbox2caption": 333, "global": 40}, {"global": 1, "bbox2caption": 1}
    keys = {"mix": mix, "regions_per_row": regions_per_row}
    loader = Loader(with_counts(drawn_from, counts, **keys), vision, chat, 0, 1)
    first, second = (questions_in(loader, epoch) for epoch in (0, 1))
    assert first == second and max(first.values()) == 1
    assert Counter(task for _, _, task, _ in first) == counts


def test_the_choice_depends_on_the_draw_alone(drawn_from, tmp_path, vision, chat):
    """Not on the seed of the run, nor on the stores before it; fewer questions are part of more."""

    def asked(count, draw=0, before=(), seed=3):
        sources = [*before, {"path": str(drawn_from), "count": {"bbox2caption": count}, "draw": draw}]
        config = run(drawn_from, data={"sources": sources}, mix={"bbox2caption": 1}).model_copy(update={"seed": seed})
        loader = Loader(config, vision, chat, 0, 1)
        return {(image, region) for source, image, _, region in questions_in(loader, 0) if source == len(before)}

    write_store([random_record("first", 3, 1)], tmp_path / "before")
    usual = asked(300)
    assert usual == asked(300, seed=7) == asked(300, before=[{"path": str(tmp_path / "before")}])
    assert usual < asked(500)
    other = asked(300, draw=1)
    assert len(other) == 300 and len(other & usual) < 150  # 75 expected


def test_a_count_above_what_is_there_is_refused(drawn_from, vision, chat):
    with pytest.raises(ValueError, match=r"has 1,200 questions of bbox2caption, fewer than its count 1,201; lower the count"):
        Loader(with_counts(drawn_from, {"bbox2caption": 1201}, mix={"bbox2caption": 1}), vision, chat, 0, 1)
    with pytest.raises(ValueError, match=r"data.mix asks global, which no store .* states a count for"):
        Loader(with_counts(drawn_from, {"bbox2caption": 5}, mix={"bbox2caption": 1, "global": 1}), vision, chat, 0, 1)


def test_a_mix_is_read_from_its_file(drawn_from, tmp_path):
    folder = tmp_path / "mixes"
    folder.mkdir()
    entry = {"path": "../s", "count": {"bbox2caption": 10}}
    (folder / "m.yaml").write_text(yaml.safe_dump({"sources": [entry]}))
    config = load_config("configs/stage1.yaml", [f"data.sources={folder / 'm.yaml'}"])
    assert [(s.path, s.count) for s in config.data.sources] == [(str(tmp_path / "s"), {"bbox2caption": 10})]
    (folder / "m.yaml").write_text("stores: []")
    with pytest.raises(ValueError, match=r"m.yaml: is not a mix: it needs a list `sources`"):
        load_config("configs/stage1.yaml", [f"data.sources={folder / 'm.yaml'}"])


def test_a_source_has_a_rate_or_counts():
    sources = "data.sources=[{path: s, rate: 0.5, count: {global: 1}}]"
    with pytest.raises(ValueError, match="rate and count both choose questions"):
        load_config("configs/stage1.yaml", [sources])
    with pytest.raises(ValueError, match=r"mix.global is 0.5, but a source states a count for it"):
        load_config("configs/stage1.yaml", ["data.sources=[{path: s, count: {global: 1}}]", "data.mix.global=0.5"])
