"""The scores against direct implementations and known distributions."""
from collections import Counter

import numpy as np
import pytest

from granvit.probe import scores
from granvit.probe.report import Probe, _tree, markdown
from granvit.probe.scores import (
    NEIGHBOURS,
    RIDGES,
    Score,
    SeedScore,
    bootstrap,
    linear_classes,
    mean,
    nearest_classes,
    pair_cosines,
    relative_agreement,
)


def planted(rng, per_class: int, classes: int, width: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Features around one random centre per class, with a large common offset, and their classes."""
    centres = np.random.default_rng(7).normal(size=(classes, width)) + 3
    class_R = np.tile(np.arange(classes), per_class)
    return centres[class_R] + spread * rng.normal(size=(len(class_R), width)), class_R


def test_neighbours_vote_as_in_a_direct_implementation():
    rng = np.random.default_rng(0)
    train, classes = planted(rng, 20, 4, 6, 1.5)
    test, _ = planted(rng, 20, 4, 6, 1.5)
    expected = []
    for feature in test:
        cosines = [feature @ other / np.sqrt((feature @ feature) * (other @ other)) for other in train]
        nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:NEIGHBOURS]
        votes = Counter(classes[i] for i in nearest)
        expected.append(next(classes[i] for i in nearest if votes[classes[i]] == max(votes.values())))
    found = nearest_classes(train, classes, test)
    np.testing.assert_array_equal(found, expected)
    assert len(set(expected)) == 4 and (found != np.tile(np.arange(4), 20)).any()  # some are wrong: the task is not trivial


def test_chunks_of_test_features_change_nothing(monkeypatch):
    train, classes = planted(np.random.default_rng(0), 10, 3, 5, 1.0)
    test, _ = planted(np.random.default_rng(1), 10, 3, 5, 1.0)
    whole = nearest_classes(train, classes, test)
    monkeypatch.setattr(scores, "_CHUNK", 7)
    np.testing.assert_array_equal(nearest_classes(train, classes, test), whole)


def fitted(x: np.ndarray, targets: np.ndarray, ridge: float, rows: int) -> np.ndarray:
    """Weights of ridge regression with a free intercept (the last row), by the normal equations."""
    augmented = np.hstack([x, np.ones((len(x), 1))])
    penalty = ridge * rows * np.eye(augmented.shape[1])
    penalty[-1, -1] = 0
    return np.linalg.solve(augmented.T @ augmented + penalty, augmented.T @ targets)


@pytest.mark.parametrize("width", [4, 40])  # fewer and more channels than regions
def test_the_linear_probe_is_ridge_regression_with_the_best_left_out_error(width):
    rng = np.random.default_rng(0)
    train, classes = planted(rng, 12, 3, width, 2.0)
    test, _ = planted(rng, 12, 3, width, 2.0)
    train[:, 0], test[:, 0] = 5, rng.normal(size=len(test))  # constant in training: it must not count
    centre, spread = train.mean(0), train.std(0)
    spread[0] = np.inf
    x, x_test, targets = (train - centre) / spread, (test - centre) / spread, np.eye(3)[classes]
    errors = []
    for ridge in RIDGES:  # leave one out by fitting again without it
        kept = [np.arange(len(x)) != row for row in range(len(x))]
        errors.append(sum(np.square(targets[row] - np.append(x[row], 1) @ fitted(x[keep], targets[keep], ridge, len(x))).sum()
                          for row, keep in enumerate(kept)))  # fmt: skip
    best = RIDGES[int(np.argmin(errors))]
    found, penalty = linear_classes(train, classes, test, 3)
    assert penalty == best
    outputs = np.hstack([x_test, np.ones((len(x_test), 1))]) @ fitted(x, targets, best, len(x))
    np.testing.assert_array_equal(found, outputs.argmax(1))


def test_separable_features_score_everything_and_random_ones_chance():
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(150), 4)
    for spread, inside in ((0.01, lambda s: s.value == 1.0), (None, lambda s: s.interval[0] < 0.2 < s.interval[1])):
        train, classes = planted(rng, 120, 5, 12, spread or 1.0)
        test, expected = planted(rng, 120, 5, 12, spread or 1.0)
        if spread is None:
            train, test = rng.normal(size=train.shape), rng.normal(size=test.shape)
        for found in (nearest_classes(train, classes, test), linear_classes(train, classes, test, 5)[0]):
            assert inside(bootstrap(mean, images, found == expected, seed=0)), (spread, (found == expected).mean())


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    """Four rows of one image share its random effect: taking rows for independent would cover far too rarely."""
    rng = np.random.default_rng(0)
    images, covered, naive = np.repeat(np.arange(60), 4), 0, 0
    for seed in range(300):
        rows = np.repeat(rng.normal(size=60), 4) + 0.3 * rng.normal(size=240)
        low, high = bootstrap(mean, images, rows, seed=seed).interval
        covered += low < 0 < high
        naive += abs(rows.mean()) < 1.96 * rows.std() / np.sqrt(240)
    assert 0.90 < covered / 300 < 0.98  # 0.95 expected; the spread over 300 repeats is 0.013
    assert naive / 300 < 0.8


def test_an_interval_of_independent_rows_is_that_of_the_normal_distribution():
    rows = np.random.default_rng(0).normal(2, 3, 2000)
    score = bootstrap(mean, np.arange(2000), rows, seed=0)
    assert score.value == pytest.approx(rows.mean()) and (score.regions, score.images) == (2000, 2000)
    assert np.diff(score.interval)[0] == pytest.approx(2 * 1.96 * rows.std() / np.sqrt(2000), rel=0.1)


@pytest.mark.parametrize("images", [1, 19, 20])
def test_few_images_have_no_interval_in_the_report(images, tmp_path):
    rows = np.arange(float(images))
    scores = {name: {("matched", "all"): bootstrap(mean, np.arange(images), rows + shift, seed=0)}
              for name, shift in (("a", 0), ("b", 1))}  # fmt: skip
    probe = Probe(("a", "b"), scores, (), {})
    text, tree = markdown(probe), _tree(probe)
    entry = tree["encoders"]["b"][0]
    stated = [entry["low"], entry["high"], entry["minus_first"]["low"], entry["minus_first"]["high"]]
    assert entry["minus_first"]["value"] == 1
    if images < 20:
        assert f"| {rows.mean():.3f} [-] |" in text and "| +1.000 [-] |" in text and stated == [None] * 4
        assert "[-]: the score is over fewer than 20 images" in text
    else:
        assert "[-]" not in text and "| +1.000 [+1.000, +1.000] |" in text and None not in stated


def test_a_paired_difference_is_narrower_than_its_parts_and_zero_for_equals():
    rng = np.random.default_rng(0)
    images, rows = np.arange(100), rng.normal(size=100)
    one = bootstrap(mean, images, rows, seed=0)
    assert one.minus(one) == (0, 0, 0)
    value, low, high = bootstrap(mean, images, rows + 0.1 + 0.01 * rng.normal(size=100), seed=0).minus(one)
    assert 0.09 < low < value < high < 0.11 < np.diff(one.interval)[0]


def test_agreement_compares_own_crops_with_other_crops():
    cosines = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.0], [0.5, 0.4, 0.7]])
    matched, mismatched = pair_cosines(cosines)
    np.testing.assert_allclose(matched, [0.9, 0.8, 0.7])
    np.testing.assert_allclose(mismatched, [0.2, 0.1, 0.45])
    assert relative_agreement(np.array(0.6), np.array(0.2)) == pytest.approx(0.5)
    assert relative_agreement(np.array(1.0), np.array(0.2)) == 1
    assert relative_agreement(np.array(0.3), np.array(0.3)) == 0
    assert relative_agreement(np.array(1.0), np.array(1.0)) == 0  # every feature is one vector: not called good
    assert relative_agreement(np.array(1.0), np.array(1 - 1e-7)) == 0  # the same, rounded


def scored(values_SI: np.ndarray, seed: int = 0) -> SeedScore:
    """The scores of several seeds, with one region per image."""
    return SeedScore.of({number: bootstrap(mean, np.arange(len(row)), row, seed=seed) for number, row in enumerate(values_SI)})


@pytest.mark.parametrize("spread", [(1.0, 0.0, 0.5), (0.3, 1.0, 1.0), (0.0, 2.0, 0.1)], ids=["seeds", "both", "images"])
def test_intervals_over_seeds_cover_the_true_mean(spread, monkeypatch):
    """With normal effects of seed, image and rest, 95% intervals hold the true mean, 0, in at least 93% of the trials."""
    monkeypatch.setattr(scores, "DRAWS", 200)
    of_seed, of_image, rest = spread
    rng, trials, held = np.random.default_rng(3), 300, 0
    for trial in range(trials):
        values_SI = of_seed * rng.normal(size=(4, 1)) + of_image * rng.normal(size=(1, 60)) + rest * rng.normal(size=(4, 60))
        low, high = scored(values_SI, trial).interval
        held += low <= 0 <= high
    assert held >= 0.93 * trials


def test_differences_are_paired_by_seed():
    rng = np.random.default_rng(5)
    own = rng.normal(size=(3, 30)) * np.array([[0.0], [1.0], [5.0]])
    a, b = scored(own + 0.5), scored(own)
    value, low, high = a.minus(b)  # every seed and image differs by 0.5: no width
    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5))
    assert b.minus(a) == pytest.approx((-0.5, -0.5, -0.5))
    one = bootstrap(mean, np.arange(30), own[0], seed=0)
    value, low, high = one.minus(a)
    assert value == pytest.approx(one.value - a.value) and low < value < high
    assert a.minus(one) == pytest.approx((-value, -high, -low))


def test_one_common_seed_gives_a_difference_without_interval():
    rng = np.random.default_rng(5)
    scores_of = {seed: bootstrap(mean, np.arange(30), rng.normal(size=30), seed=0) for seed in range(3)}
    a, b = SeedScore.of({0: scores_of[0], 1: scores_of[1]}), SeedScore.of({1: scores_of[2], 2: scores_of[0]})
    value, low, high = a.minus(b)
    assert value == pytest.approx(scores_of[1].value - scores_of[2].value) and np.isnan(low) and np.isnan(high)
    assert isinstance(a, Score) and a.has_interval
