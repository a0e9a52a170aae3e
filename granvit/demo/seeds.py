"""Mean and spread of the demo's scores over seeds: `scripts/demo.py compare --seeds 0 1 2`."""
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from granvit.demo.results import ROWS, columns, percent, read_runs


def compare_seeds(roots: Mapping[int, Path]) -> str:
    """A table in Markdown over demos that are finished: for each score and column the mean over the seeds in percent, the
    standard deviation (with S - 1 below the sum of squares), and each seed's value. `roots`: seed -> directory, at least two.

    `ValueError` names a directory that is not a finished demo, or in which other columns are.
    """
    if len(roots) < 2:
        raise ValueError("--seeds: name at least two; one seed shows no spread")
    values: dict[tuple[str, str], list[float]] = {}
    titles: list[str] | None = None
    for root in roots.values():
        runs = read_runs(root)
        if unfinished := [name for name, run in runs.items() if not run.finished]:
            raise ValueError(f"{root / unfinished[0]}: is not finished; `python scripts/demo.py --out {root}` continues it")
        found = columns(runs)
        titles = titles or [column.title for column in found]
        if [column.title for column in found] != titles:
            raise ValueError(f"{root}: has the columns {', '.join(column.title for column in found)}, and the others "
                             f"{', '.join(titles)}")  # fmt: skip
        for score in ROWS:
            for column in found:
                values.setdefault((score, column.title), []).append(percent(column.evaluation, score).value)
    assert titles is not None
    lines = [f"| %, mean (standard deviation; seeds {', '.join(map(str, roots))}) | {' | '.join(titles)} |",
             "|---|" + "---|" * len(titles)]  # fmt: skip
    for score, (_, row_title) in ROWS.items():
        cells = [_cell(values[score, title]) for title in titles]
        lines.append(f"| {row_title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(of_seeds: list[float]) -> str:
    each = ", ".join(f"{value:.1f}" for value in of_seeds)
    return f"{np.mean(of_seeds):.1f} ({np.std(of_seeds, ddof=1):.1f}; {each})"
