"""The report of a grid: report.md, report.html (one file, with its plots inside), results.json and the plots."""
import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import markdown

from granvit.ablation.grid import Cell, Grid
from granvit.ablation.plots import draw_differences, draw_means
from granvit.ablation.results import Table, results
from granvit.ablation.run_cells import finished_seconds, unique_runs
from granvit.checkpoint.tensors import write_synced

STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}img{max-width:100%}code{background:#f3f3f3;padding:0 .2rem}"
)


def write_report(grid: Grid, cells: list[Cell], scores: Table, problems: Mapping[Cell, str], root: Path, name: str,
                 command: str) -> str:  # fmt: skip
    """Writes the report of a grid into `root` and returns its tables as text. `problems` are the cells that failed, `scores`
    those of the others, and `command` repeats the grid."""
    found = results(grid, scores, problems, name)
    draw_means(found, grid.metrics, root / "means.png")
    draw_differences(found, grid.metrics, root / "differences.png")
    tables = _tables(grid, found)
    text = "\n".join([
        f"# Ablation `{name}`", "", grid.question, "", *([grid.note, ""] if grid.note else []), *tables,
        "## Plots", "",
        "![means of all settings with 95% intervals; light dots are single seeds](means.png)", "",
        "![differences to the first setting with 95% intervals](differences.png)", "",
        *_about(grid, cells, command),
    ])  # fmt: skip
    _write(root / "results.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    _write(root / "report.md", text)
    _write(root / "report.html", _html(text, name, root))
    return "\n".join(tables)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write_synced(temporary, text)
    os.replace(temporary, path)


def _tables(grid: Grid, found: dict[str, Any]) -> list[str]:
    """The failed cells, verdicts, scores and differences, as lines of Markdown."""
    lines = []
    if found["failed"]:
        lines += [f"**{len(found['failed'])} cells failed; the numbers below are without them.**", ""]
        lines += [f"- {_cell(each['setting'])}, seed {each['seed']}: {_cell(each['reason'])}" for each in found["failed"]]
        lines += [""]
    if found["directions"]:
        lines += ["## Stated directions", "",
                  "| Metric | Should be above | Should be below | Source | Difference here (95%) | Seeds | Verdict |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {each['metric']} | {_cell(each['above'])} | {_cell(each['below'])} | {_cell(each['paper'])} | "
            f"{_points(each)} | {each['seeds']} | **{each['verdict']}** |"
            for each in found["directions"]
        ]
        lines += [""]
    else:
        lines += ["No direction is stated for this comparison.", ""]
    lines += ["## Scores", "", "Mean over seeds in percent, with its 95% interval.", "",
              "| Setting | " + " | ".join(grid.metrics) + " | Seeds |", "|---|" + "---|" * (len(grid.metrics) + 1)]  # fmt: skip
    for setting in found["settings"]:
        of_metrics = [setting["metrics"].get(metric) for metric in grid.metrics]
        seeds = max((summary["seeds"] for summary in of_metrics if summary), default=0)
        missing = f"{seeds} of {len(grid.seeds)}" if seeds < len(grid.seeds) else str(seeds)
        values = " | ".join("-" if summary is None else _percent(summary) for summary in of_metrics)
        lines.append(f"| {_cell(setting['name'])} | {values} | {missing} |")
    reference = found["settings"][0]["name"]
    lines += ["", f"## Differences to {_cell(reference)}", "",
              "Percentage points, paired by seed and image, with the 95% interval.", "",
              "| Setting | Metric | Difference | Seeds | Verdict |", "|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {_cell(each['setting'])} | {each['metric']} | {_points(each)} | {each['seeds']} | {each['verdict']} |"
        for each in found["differences"]
    ]
    measured = [summary for setting in found["settings"] for summary in setting["metrics"].values()]
    measured += [each for each in found["differences"] if each["mean"] is not None]
    reasons = dict.fromkeys(each["no_interval"] for each in measured if each["no_interval"])
    if reasons:
        lines += ["", f"(-): no interval is claimed. Reason: {'; '.join(reasons)}."]
    return [*lines, ""]


def _about(grid: Grid, cells: list[Cell], command: str) -> list[str]:
    """The settings with their overrides, and how the numbers were made."""
    seconds = {run.key: finished_seconds(run) or 0.0 for run in unique_runs(cells)}
    lines = ["## Settings", "", "| Setting | Stages, with the keys that differ | Hours of its cells |", "|---|---|---|"]
    for name, chain in grid.settings.items():
        stages = [f"{stage} ({', '.join(own)})" if own else stage for stage, own in chain.items()]
        of_cells = sum(seconds.get(run.key, 0.0) for cell in cells if cell.setting == name for run in cell.runs)
        lines.append(f"| {_cell(name)} | {_cell(', then '.join(stages))} | {of_cells / 3600:.2f} |")
    lines += ["", "| Stage | Configuration | Keys that all settings change |", "|---|---|---|"]
    lines += [f"| {name} | {entry.config} | {_cell(', '.join(entry.overrides)) or '-'} |" for name, entry in grid.stages.items()]
    lines += [
        "", "## How it was made", "", f"`{command}`", "",
        f"{len(cells)} cells (settings x seeds {', '.join(map(str, grid.seeds))}), {len(seconds)} different runs, "
        f"{sum(seconds.values()) / 3600:.2f} hours in all: runs at the same time are added up, a run that cells share counts "
        "once here and for each of its cells in the table above, and of an interrupted run only the last process counts.", "",
        "Verdicts: *reproduced* means that the 95% interval of the paired difference lies above zero, *not reproduced* that it "
        "lies below, *within noise* that it contains zero, *no verdict* that no interval is claimed. Each verdict has its own 5% "
        "risk; there is no correction for their number. The intervals count both seeds and images as samples "
        "(docs/ablations.md).", "",
    ]  # fmt: skip
    return lines


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _percent(summary: dict[str, Any]) -> str:
    low, high = summary["low"], summary["high"]
    ends = "-" if low is None else f"{100 * max(low, 0):.1f} to {100 * min(high, 1):.1f}"
    return f"{100 * summary['mean']:.1f} ({ends})"


def _points(difference: dict[str, Any]) -> str:
    if difference["mean"] is None:
        return "-"
    ends = "-" if difference["low"] is None else f"{100 * difference['low']:+.1f} to {100 * difference['high']:+.1f}"
    return f"{100 * difference['mean']:+.1f} ({ends})"


def _html(text: str, name: str, root: Path) -> str:
    """The Markdown text as one HTML page; plots become data URIs."""
    body = markdown.markdown(text, extensions=["tables"])
    for plot in ("means.png", "differences.png"):
        data = base64.b64encode((root / plot).read_bytes()).decode()
        body = body.replace(f'src="{plot}"', f'src="data:image/png;base64,{data}"')
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Ablation {name}</title><style>{STYLE}</style>'
            f"</head><body>{body}</body></html>\n")  # fmt: skip
