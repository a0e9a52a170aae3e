"""Intervals for a mean score over seeds and held-out images, and the verdict on a stated direction.

The data are the scores of S seeds on the same I images: x_si is the sum of the scores (or of the differences between two
settings, paired by seed and image) of seed s on image i, n_i the number of questions about image i. The estimate is the mean over
seeds of the score per question, m = mean_s(m_s) with m_s = sum_i(x_si) / sum_i(n_i), as in the evaluation's table.

V, the variance of m, is estimated in a crossed random-effects model, in which seeds and images are both random samples and each
has an effect (two-way layout without replication; Searle, Casella & McCulloch, "Variance Components", 1992, chapter 4):

    y_si = I * (x_si - m * n_i) / sum(n)                     linearised ratio: the mean of y_si over i is m_s - m
    MS_seeds  = I * sum_s(ybar_s^2) / (S - 1)
    MS_images = S * sum_i(ybar_i^2) / (I - 1)
    MS_rest   = sum_si((y_si - ybar_s - ybar_i)^2) / ((S - 1) * (I - 1))
    V = V_seeds + V_images,  V_seeds = max(MS_seeds, MS_rest) / (S * I),  V_images = max(MS_images - MS_rest, 0) / (S * I)

The interval, two-sided with level 95%, is

    m +- sqrt(t(S - 1)^2 * V_seeds + t(I - 1)^2 * V_images)         t(df): the 97.5% quantile of Student's t

Without V_images this is the t-interval over the seeds' means; V_images adds that the images are a sample too. Each variance gets
the quantile of its own degrees of freedom (S. K. Banerjee, "Approximate confidence interval for linear functions of means of k
populations", Sankhya 22, 1960), which is wider than needed rather than too narrow; with Satterthwaite's common degrees of freedom
the coverage fell to 92% with three seeds. The maximum in V_seeds keeps the interval from collapsing where the seeds' means happen
to be equal, which coarse scores (right or wrong) can cause.

Why not the percentile bootstrap over seeds and images: with few seeds it is too narrow. Its variance is too small by the factor
(S - 1) / S, and its quantiles are those of a normal distribution where Student's t is needed (t is 4.3 instead of 1.96 for three
seeds). tests/ablation/test_statistics.py measures both methods; docs/ablations.md has the numbers.
"""
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
MIN_IMAGES = 20  # the quantiles of t hold for means that are about normal; scores of an image are few values, such as 0 and 1
Verdict = Literal["reproduced", "not reproduced", "within noise", "no verdict"]


@dataclass(frozen=True)
class Interval:
    """A mean over `seeds` seeds and `images` images with its 95% interval. Where no interval is claimed, it is infinite and
    `no_interval` says why."""

    mean: float
    low: float
    high: float
    seeds: int
    images: int
    no_interval: str | None = None


def interval(sums_SI: np.ndarray, counts_I: np.ndarray) -> Interval:
    """The mean score and its interval: `sums_SI` are x_si, `counts_I` are n_i (see the top of this file).

    No interval is claimed with one seed, which shows no spread, and with fewer than `MIN_IMAGES` images. `ValueError` if there is
    no seed, no image or no question.
    """
    seeds, images = sums_SI.shape
    questions = float(counts_I.sum())
    if not seeds or not questions:
        raise ValueError(f"no interval can be computed of {seeds} seeds and {questions:g} questions")
    sums_SI = sums_SI.astype(np.float64)
    mean = float(sums_SI.sum() / questions / seeds)
    if seeds == 1 or images < MIN_IMAGES:
        few = f"{images} image{'s' * (images > 1)}, and at least {MIN_IMAGES} are needed"
        return Interval(mean, -np.inf, np.inf, seeds, images, "one seed shows no spread over seeds" if seeds == 1 else few)
    y_SI = images * (sums_SI - mean * counts_I) / questions
    of_seed_S, of_image_I = y_SI.mean(1), y_SI.mean(0)
    from_seeds = images * (of_seed_S**2).sum() / (seeds - 1)
    from_images = seeds * (of_image_I**2).sum() / (images - 1)
    rest = ((y_SI - of_seed_S[:, None] - of_image_I) ** 2).sum() / ((seeds - 1) * (images - 1))
    v_seeds = max(from_seeds, rest) / (seeds * images)
    v_images = max(from_images - rest, 0.0) / (seeds * images)
    quantile = 0.5 + LEVEL / 2
    half = float(np.sqrt(stdtrit(seeds - 1, quantile) ** 2 * v_seeds + stdtrit(images - 1, quantile) ** 2 * v_images))
    return Interval(mean, mean - half, mean + half, seeds, images)


def verdict(above_minus_below: Interval) -> Verdict:
    """The verdict on the direction "the first setting is above the second", from the interval of their paired difference."""
    if above_minus_below.no_interval is not None:
        return "no verdict"
    if above_minus_below.low > 0:
        return "reproduced"
    return "not reproduced" if above_minus_below.high < 0 else "within noise"
