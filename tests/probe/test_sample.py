"""The choice of regions, their classes, the split by image, and groups by size."""
from dataclasses import replace

import numpy as np
import pytest

from granvit.data.records import Region
from granvit.data.store import Store
from granvit.data.store_writer import write_store
from granvit.probe.sample import choose, labels, size_groups, split
from tests.conftest import random_record


def test_all_regions_are_chosen_in_order_and_images_without_regions_are_not(regions):
    sample = choose(regions, images=100, regions=8, seed=0)
    assert sample.images == tuple(range(30)) and sample.left_out == 0 and sample.most_regions == 3
    records = [regions.record(image) for image in sample.images]
    assert list(sample.captions_R) == [region.caption for record in records for region in record.regions]
    for area, region in zip(sample.area_R, (region for record in records for region in record.regions), strict=True):
        x1, y1, x2, y2 = region.box
        assert area == pytest.approx((x2 - x1) * (y2 - y1))
    np.testing.assert_array_equal(sample.image_R, np.repeat(np.arange(30), [len(record.regions) for record in records]))


def test_fewer_images_and_regions_are_spread_seeded_and_counted(regions):
    sample = choose(regions, images=7, regions=2, seed=0)
    assert sample.images[0] == 0 and sample.images[-1] == 29 and len(sample.images) == 7
    assert all(len(kept) <= 2 for kept in sample.regions_of)
    assert sample.left_out == sum(max(len(regions.record(image).regions) - 2, 0) for image in sample.images) > 0
    assert choose(regions, 7, 2, seed=0).regions_of == sample.regions_of
    assert any(choose(regions, 30, 1, seed=s).regions_of != choose(regions, 30, 1, seed=0).regions_of for s in (1, 2))


def test_label_rules():
    captions = ["A small  Red circle", 'the word "exit" in red.', "..."]
    assert labels(captions, "caption") == ["a small red circle", 'the word "exit" in red.', "..."]
    assert labels(captions, "last-word") == ["circle", "red", None]
    assert labels(captions, "red|blue") == ["red", "red", None]
    assert labels(captions, r'word "(\w+)"') == [None, "exit", None]
    with pytest.raises(ValueError, match=r"--label '\(red'"):
        labels(captions, "(red")


def test_an_image_is_in_one_half_and_rare_classes_are_left_out(regions):
    sample = choose(regions, 100, 8, 0)
    division = split(sample, "last-word", seed=0)
    assert division.names == ("blue", "green", "red") and division.distinct == 3
    assert not set(sample.image_R[division.train_R]) & set(sample.image_R[division.test_R])
    assert len(set(sample.image_R[division.train_R])) == len(set(sample.image_R[division.test_R])) == 15
    for number, name in enumerate(division.names):
        assert all(sample.captions_R[r].endswith(name) for r in np.flatnonzero(division.class_R == number))
    rare = split(sample, r"(tall|flat box, (?:blue|green))", seed=0)
    assert rare.distinct >= len(rare.names) and (split(sample, "last-word", 1).train_R != division.train_R).any()


def test_captions_that_are_no_classes_are_refused_with_counts(tmp_path):
    write_store([random_record(f"i{i}", 4, i) for i in range(6)], tmp_path / "unique")
    sample = choose(Store(tmp_path / "unique"), 100, 8, 0)
    with pytest.raises(ValueError, match=r"fewer images than classes: --label caption gives 24 classes \('i0-0.* in 6 images.*"
                       r"0 classes have.*--label last-word"):  # fmt: skip
        split(sample, "caption", 0)
    for images, few in ((1, "one image"), (4, "4 images")):
        with pytest.raises(ValueError, match=f"{few} with regions; the probe needs at least 5: .*Raise --images"):
            split(choose(Store(tmp_path / "unique"), images, 8, 0), "caption", 0)


def test_as_many_training_images_as_classes_are_needed(tmp_path):
    """Every image has a region of each of four classes: with 7 images 4 train, with 6 there are 3."""
    regions = tuple(Region((0, 0, 0.5, 0.5), caption) for caption in ("cat", "dog", "cow", "hen"))
    write_store([replace(random_record(f"i{i}", 1, i), regions=regions) for i in range(7)], tmp_path / "zoo")
    assert len(split(choose(Store(tmp_path / "zoo"), 7, 8, 0), "caption", 0).names) == 4
    with pytest.raises(ValueError, match=r"fewer images than classes.* 4 classes .* in 6 images, 3 of them for training"):
        split(choose(Store(tmp_path / "zoo"), 6, 8, 0), "caption", 0)


def test_stores_without_regions_are_refused(tmp_path, chat_store):
    with pytest.raises(ValueError, match=r"is a granvit-conversations store.*name a region store"):
        choose(chat_store, 10, 8, 0)
    write_store([random_record("global", 0, 0)], tmp_path / "globals")
    with pytest.raises(ValueError, match="holds no regions"):
        choose(Store(tmp_path / "globals"), 10, 8, 0)


def test_groups_by_size_cover_all_regions_once():
    areas = np.array([0.001, 0.01, 0.05, 0.05, 0.5])
    groups = size_groups(areas, 0.01, 0.05)
    assert {name: mask.tolist() for name, mask in groups.items()} == {
        "all": [True] * 5, "small": [True, False, False, False, False], "medium": [False, True, False, False, False],
        "large": [False, False, True, True, True],
    }  # fmt: skip
    assert set(size_groups(areas, 0.06, 0.06)) == {"all", "small", "large"}
