"""The plots of an ablation: the mean of every setting, and the differences to the first setting, with 95% intervals."""
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

POINT, SEED, ZERO = "#1f5fbf", "#9db9de", "#888888"


def draw_means(found: dict[str, Any], metrics: tuple[str, ...], path: Path) -> None:
    """Draws, for each metric, the mean of every setting in percent with its interval, and below it the scores of single seeds as
    dots."""
    settings = found["settings"]
    figure, grid = _panels(len(metrics), len(settings))
    for metric, axes in zip(metrics, grid, strict=True):
        for row, setting in enumerate(settings):
            summary = setting["metrics"].get(metric)
            if summary is None:
                _missing(axes, row)
                continue
            values = [100 * value for value in summary["per_seed"].values()]
            axes.plot(values, [row + 0.22] * len(values), "o", color=SEED, markersize=4)
            _interval(axes, row, summary)
        _finish(axes, [setting["name"] for setting in settings], f"{metric}, %")
    figure.savefig(path)
    plt.close(figure)


def draw_differences(found: dict[str, Any], metrics: tuple[str, ...], path: Path) -> None:
    """Draws, for each metric, the paired difference of every setting to the first one in percentage points."""
    differences = found["differences"]
    names = list(dict.fromkeys(each["setting"] for each in differences))
    figure, grid = _panels(len(metrics), len(names))
    for metric, axes in zip(metrics, grid, strict=True):
        axes.axvline(0, color=ZERO, linewidth=1, linestyle="--", zorder=0)
        for each in differences:
            if each["metric"] == metric:
                row = names.index(each["setting"])
                if each["mean"] is None:
                    _missing(axes, row)
                else:
                    _interval(axes, row, each)
        _finish(axes, names, f"{metric}, points above {found['settings'][0]['name']!r}")
    figure.savefig(path)
    plt.close(figure)


def _panels(metrics: int, rows: int) -> tuple[plt.Figure, list[plt.Axes]]:
    """One panel above the other, so that long names of settings have room."""
    figure, grid = plt.subplots(metrics, 1, figsize=(8, metrics * (1.0 + 0.38 * rows)), dpi=110, squeeze=False)
    figure.set_layout_engine("constrained")
    return figure, list(grid[:, 0])


def _interval(axes: plt.Axes, row: int, summary: dict[str, Any]) -> None:
    if summary["low"] is not None:
        axes.plot([100 * summary["low"], 100 * summary["high"]], [row, row], color=POINT, linewidth=2)
    axes.plot([100 * summary["mean"]], [row], "D", color=POINT, markersize=6)


def _missing(axes: plt.Axes, row: int) -> None:
    axes.annotate("no finished seed", (0.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)


def _finish(axes: plt.Axes, names: list[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
