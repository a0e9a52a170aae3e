"""The scores of a probe, in numpy: classification of region features, agreement with crops, and bootstrap intervals."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 5
DRAWS = 1000  # bootstrap samples
FEWEST_IMAGES = 20  # no interval is stated for fewer: with 20 the bootstrap's is one of about 93% instead of 95%
RIDGES = 10.0 ** np.arange(-4, 3)  # penalties tried, relative to the number of training regions
COLLAPSED = 1e-4  # if 1 - cosine of mismatched pairs is below this, all features are taken to be one vector
_CHUNK = 1024  # test regions whose similarities are computed at a time


@dataclass(frozen=True)
class Score:
    """A score over `regions` regions of `images` images, and its value in each bootstrap sample, float64 `[DRAWS]`."""

    regions: int
    images: int
    value: float
    draws_D: np.ndarray

    @property
    def has_interval(self) -> bool:
        """Whether there are images enough for an interval to be stated."""
        return self.images >= FEWEST_IMAGES

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval: the 2.5th and 97.5th percentiles of the bootstrap samples."""
        return _percentiles(self.draws_D)

    def minus(self, other: "Score") -> tuple[float, float, float]:
        """The difference to another encoder's score on the same regions, with its 95% interval, whose ends are NaN where none is
        stated. Both scores were computed on the same bootstrap samples, so the interval is that of a paired comparison."""
        if isinstance(other, SeedScore):
            value, low, high = other.minus(self)
            return -value, -high, -low
        ends = _percentiles(self.draws_D - other.draws_D) if self.has_interval else (np.nan, np.nan)
        return self.value - other.value, *ends


@dataclass(frozen=True)
class SeedScore(Score):
    """The mean of one score over runs of several seeds, on the same regions and bootstrap samples. `by_seed` has each seed's.

    The interval counts both seeds and images as samples, as that of scripts/ablate.py does (docs/ablations.md). With S seeds, the
    values v_s and the bootstrap samples d_sD of their scores, and I images, it is

        mean(v_s) +- sqrt(t(S - 1)^2 * var(v_s) / S + t(I - 1)^2 * var_D(mean_s(d_sD)))         t(df): the 97.5% quantile of t

    Noise that belongs to a seed and an image together is in both terms: the interval is wider than needed, not too narrow.
    """

    by_seed: Mapping[int, Score]

    @staticmethod
    def of(by_seed: Mapping[int, Score]) -> "SeedScore":
        """The mean of the scores of at least two seeds."""
        each = list(by_seed.values())
        draws_D = np.mean([score.draws_D for score in each], axis=0)
        return SeedScore(each[0].regions, each[0].images, float(np.mean([score.value for score in each])), draws_D, by_seed)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval over seeds and images."""
        _, low, high = self._over_seeds(np.array([score.value for score in self.by_seed.values()]), self.draws_D)
        return low, high

    def minus(self, other: Score) -> tuple[float, float, float]:
        """The difference to another score, with its 95% interval: over the seeds that both have, paired by seed, or of each seed
        to the one other score. The ends are NaN where no interval is stated: with one common seed, and with few images."""
        if not isinstance(other, SeedScore):
            pairs = [(own, other) for own in self.by_seed.values()]
        else:
            pairs = [(own, other.by_seed[seed]) for seed, own in self.by_seed.items() if seed in other.by_seed]
        if not pairs:
            return self.value - other.value, np.nan, np.nan
        values_S = np.array([own.value - theirs.value for own, theirs in pairs])
        return self._over_seeds(values_S, np.mean([own.draws_D - theirs.draws_D for own, theirs in pairs], axis=0))

    def _over_seeds(self, values_S: np.ndarray, draws_D: np.ndarray) -> tuple[float, float, float]:
        """The mean of the values of the seeds, and the ends of its interval."""
        from scipy.special import stdtrit  # imported here: a probe without several seeds does not need scipy

        mean_value, seeds = float(values_S.mean()), len(values_S)
        if seeds == 1 or not self.has_interval:
            return mean_value, np.nan, np.nan
        from_seeds = stdtrit(seeds - 1, 0.975) ** 2 * values_S.var(ddof=1) / seeds
        half = float(np.sqrt(from_seeds + stdtrit(self.images - 1, 0.975) ** 2 * draws_D.var()))
        return mean_value, mean_value - half, mean_value + half


def _percentiles(draws_D: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws_D, (2.5, 97.5))
    return float(low), float(high)


def bootstrap(statistic: Callable[..., np.ndarray], image_R: np.ndarray, *columns_R: np.ndarray, seed: int,
              regions: int | None = None) -> Score:  # fmt: skip
    """`statistic` of the means of columns over regions (or other rows), with a bootstrap over images.

    `image_R` names the image of each row: a sample draws as many images as there are, with replacement, each with all of its
    rows. Equal `image_R` and `seed` give equal samples. `statistic` gets one array of means per column. `regions` is the number
    that the score states, by default that of rows.
    """
    images, index_R = np.unique(image_R, return_inverse=True)
    count = len(images)
    rows_I = np.bincount(index_R, minlength=count)
    weights_DI = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)
    sums = [np.bincount(index_R, column, minlength=count) for column in columns_R]
    value = statistic(*(np.asarray(sum_I.sum() / rows_I.sum()) for sum_I in sums))
    draws_D = statistic(*(weights_DI @ sum_I / (weights_DI @ rows_I) for sum_I in sums))
    return Score(len(image_R) if regions is None else regions, count, float(value), draws_D)


def mean(values: np.ndarray) -> np.ndarray:
    """The statistic of a plain mean."""
    return values


def nearest_classes(train_RC: np.ndarray, class_R: np.ndarray, test_RC: np.ndarray) -> np.ndarray:
    """The class of each test feature by a vote of its `NEIGHBOURS` nearest training features by cosine, int64 `[tests]`.

    Of several classes with the most votes, the one with the nearest neighbour is taken.
    """
    train_RC, test_RC = _unit(train_RC), _unit(test_RC)
    count = min(NEIGHBOURS, len(train_RC))
    found = []
    for first in range(0, len(test_RC), _CHUNK):
        nearest = np.argsort(-(test_RC[first : first + _CHUNK] @ train_RC.T), axis=1, kind="stable")[:, :count]
        votes = class_R[nearest]
        equal = (votes[:, :, None] == votes[:, None, :]).sum(2)  # how many of the neighbours have the class of neighbour k
        found.append(votes[np.arange(len(votes)), equal.argmax(1)])  # argmax: the first, so the nearest, of the largest
    return np.concatenate(found)


def _unit(features_RC: np.ndarray) -> np.ndarray:
    features_RC = np.asarray(features_RC, np.float64)
    return features_RC / np.maximum(np.linalg.norm(features_RC, axis=1, keepdims=True), 1e-12)


def linear_classes(train_RC: np.ndarray, class_R: np.ndarray, test_RC: np.ndarray, classes: int) -> tuple[np.ndarray, float]:
    """The class of each test feature by a linear classifier, int64 `[tests]`, and the penalty that was chosen.

    Ridge regression to one-hot targets in closed form, on features standardised by the training regions, with an intercept that
    is not penalised: it minimises the summed squared error + penalty * regions * |weights|^2. Of `RIDGES`, the penalty with the
    smallest squared leave-one-out error over the training regions is taken.
    """
    train_RC = np.asarray(train_RC, np.float64)
    centre_C, spread_C = train_RC.mean(0), train_RC.std(0)
    scale_C = np.where(spread_C > 1e-6 * (np.abs(centre_C) + 1e-6), spread_C, np.inf)  # a constant channel says nothing
    x_RC, x_test_RC = (train_RC - centre_C) / scale_C, (np.asarray(test_RC, np.float64) - centre_C) / scale_C
    targets_RK = np.eye(classes)[class_R]
    shares_K = targets_RK.mean(0)
    left, values, right = np.linalg.svd(x_RC, full_matrices=False)
    projected = left.T @ (targets_RK - shares_K)
    rows = len(x_RC)
    errors = []
    for ridge in RIDGES:
        shrink = values**2 / (values**2 + ridge * rows)
        residuals_RK = targets_RK - shares_K - (left * shrink) @ projected
        leverage_R = (left**2 * shrink).sum(1) + 1 / rows  # 1 / rows: that of the intercept
        errors.append(np.square(residuals_RK / np.maximum(1 - leverage_R, 1e-9)[:, None]).sum())
    ridge = float(RIDGES[np.argmin(errors)])
    weights_CK = right.T @ ((values / (values**2 + ridge * rows))[:, None] * projected)
    return (x_test_RC @ weights_CK + shares_K).argmax(1), ridge


def pair_cosines(cosines_KK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the cosines of the regions of one image (rows) with the crops of the same regions (columns): each region's cosine with
    its own crop, and its mean cosine with the crops of the other regions. The image needs at least two regions."""
    matched_K = np.diagonal(cosines_KK)
    return matched_K, (cosines_KK.sum(1) - matched_K) / (len(cosines_KK) - 1)


def relative_agreement(matched: np.ndarray, mismatched: np.ndarray) -> np.ndarray:
    """`(matched - mismatched) / (1 - mismatched)` of mean cosines: 0 if a region is no closer to its own crop than to other crops
    of the image, 1 if it equals its crop. It is 0 if all features are one vector (see `COLLAPSED`)."""
    room = 1 - mismatched
    return np.where(room > COLLAPSED, (matched - mismatched) / np.maximum(room, COLLAPSED), 0.0)
