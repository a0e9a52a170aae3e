"""The report of a probe: one table for the console and report.md, a self-contained report.html with a plot, and probe.json."""
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from granvit.probe.scores import FEWEST_IMAGES, Score, SeedScore

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}th,td{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}"
    "td:nth-child(n+3){text-align:right;white-space:nowrap}tr:nth-child(even){background:#f6f6f6}svg{max-width:100%;height:auto}"
)
COLOURS = ("#7f7f7f", "#1f5fbf", "#c0392b", "#2e8b57", "#8e44ad", "#e08e0b")


@dataclass(frozen=True)
class Quantity:
    """One kind of score. Values are multiplied by `scale` where they are shown, with `decimals` decimals. `better` is 1 if higher
    values are better, -1 if lower values are, 0 if neither (such a row is shown in the table and not in the plot)."""

    key: str
    title: str
    scale: float
    decimals: int
    better: int

    def show(self, value: float, signed: bool = False) -> str:
        return f"{value * self.scale:{'+' if signed else ''}.{self.decimals}f}"


QUANTITIES = (
    Quantity("nearest", "kNN accuracy, %", 100, 1, 1),
    Quantity("linear", "Linear probe accuracy, %", 100, 1, 1),
    Quantity("agreement", "Region-crop agreement, relative, %", 100, 1, 1),
    Quantity("matched", "Cosine with the region's own crop", 1, 3, 0),
    Quantity("mismatched", "Cosine with other crops of the image", 1, 3, 0),
    Quantity("loss", "Bbox2Caption loss, nats per token", 1, 4, -1),
)


@dataclass(frozen=True)
class Probe:
    """All results. `scores` maps an encoder's name to its scores by (key of the quantity, group of regions); `facts` are the
    lines about store, classes and settings below the table; `settings` is what probe.json records of them. `unpaired` has the
    reason why an encoder's caption loss cannot be compared with that of the first, by name."""

    encoders: tuple[str, ...]
    scores: dict[str, dict[tuple[str, str], Score]]
    facts: tuple[str, ...]
    settings: dict[str, Any]
    unpaired: dict[str, str] = field(default_factory=dict)

    def difference(self, quantity: Quantity, scores: Sequence[Score | None], number: int) -> tuple[float, float, float] | None:
        """The score of encoder `number` minus that of the first, with its interval. None for the first, and where either is
        missing or cannot be compared."""
        first, own = scores[0], scores[number]
        if number == 0 or first is None or own is None:
            return None
        unpaired = quantity.key == "loss" and self.encoders[number] in self.unpaired
        return None if unpaired else own.minus(first)

    def rows(self) -> list[tuple[Quantity, str, list[Score | None]]]:
        """Every quantity and group that an encoder has, with the scores of all encoders (None: not computed)."""
        groups = dict.fromkeys(key for found in self.scores.values() for key in found)
        return [(quantity, group, [self.scores[name].get((quantity.key, group)) for name in self.encoders])
                for quantity in QUANTITIES for key, group in groups if key == quantity.key]  # fmt: skip


def _cells(probe: Probe) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table."""
    first, *others = probe.encoders
    header = ["Score", "Regions", *probe.encoders, *(f"{name} minus {first}" for name in others)]
    rows = []
    for quantity, group, scores in probe.rows():
        counts = dict.fromkeys(str(score.regions) for score in scores if score is not None)
        cells = [quantity.title if group == "all" else f"{quantity.title}: {group}", " / ".join(counts)]
        for score in scores:
            if score is None:
                cells.append("-")
            else:
                limits = ", ".join(map(quantity.show, score.interval)) if score.has_interval else "-"
                cells.append(f"{quantity.show(score.value)} [{limits}]")
        for number in range(1, len(scores)):
            found = probe.difference(quantity, scores, number)
            if found is None:
                cells.append("-")
            else:
                value, low, high = (quantity.show(part, signed=True) for part in found)
                cells.append(f"{value} [{low}, {high}]" if np.isfinite(found[1]) else f"{value} [-]")
        rows.append(cells)
    return header, rows


NOTE = ("In brackets: 95% intervals, bootstrap over images. A difference is computed on the same regions and bootstrap samples "
        "for both encoders; if its interval holds 0, the probe does not tell the two apart.")  # fmt: skip
SEEDS_NOTE = ("A column of several seeds has the mean over its runs; its intervals, and those of its differences, count both "
              "seeds and images as samples. Differences of two such columns are paired by seed.")  # fmt: skip


def _note(probe: Probe) -> str:
    """`NOTE`, what columns of several seeds are, and why scores have no interval, if some have none."""
    scores = [score for *_, row in probe.rows() for score in row if score is not None]
    lines = [NOTE]
    if any(isinstance(score, SeedScore) for score in scores):
        lines.append(SEEDS_NOTE)
    if any(not score.has_interval for score in scores):
        lines.append(f"[-]: the score is over fewer than {FEWEST_IMAGES} images, too few for an interval.")
    return " ".join(lines)


def markdown(probe: Probe) -> str:
    """The table, and the facts below it."""
    header, rows = _cells(probe)
    row = lambda cells: f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"  # noqa: E731
    lines = [row(header), "|---|" + "---:|" * (len(header) - 1), *map(row, rows), "", _note(probe), ""]
    return "\n".join([*lines, *(f"- {fact}" for fact in probe.facts), ""])


def _page(probe: Probe) -> str:
    header, rows = _cells(probe)
    cells = lambda tag, values: "<tr>" + "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values) + "</tr>"  # noqa: E731
    facts = "".join(f"<li>{html.escape(fact)}</li>" for fact in probe.facts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Region probe</title><style>{STYLE}</style>'
        f"<h1>Region probe</h1>{_plot(probe)}<table>{cells('th', header)}{''.join(cells('td', row) for row in rows)}</table>"
        f"<p>{html.escape(_note(probe))}</p><ul>{facts}</ul></html>\n"
    )


def _plot(probe: Probe) -> str:
    """The scores with their intervals as inline SVG: one panel per quantity, groups of regions along x, encoders by colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown: dict[Quantity, list[tuple[str, list[Score | None]]]] = {}
    for quantity, group, scores in probe.rows():
        if quantity.better:
            shown.setdefault(quantity, []).append((group, scores))
    with matplotlib.rc_context({"svg.hashsalt": "probe", "font.size": 10}):
        figure, panels = plt.subplots(1, len(shown), figsize=(3.5 * len(shown), 3.8), squeeze=False)
        for axes, (quantity, groups) in zip(panels[0], shown.items(), strict=True):
            for number, name in enumerate(probe.encoders):
                points = [(x, scores[number]) for x, (_, scores) in enumerate(groups)]
                drawn = [(x, score) for x, score in points if score is not None]
                shift = (number - (len(probe.encoders) - 1) / 2) * 0.6 / len(probe.encoders)
                values = [score.value * quantity.scale for _, score in drawn]
                limits = [score.interval if score.has_interval else (np.nan, np.nan) for _, score in drawn]
                ends = [(low * quantity.scale, high * quantity.scale) for low, high in limits]
                spans = [[max(v - low, 0) for v, (low, _) in zip(values, ends, strict=True)],
                         [max(high - v, 0) for v, (_, high) in zip(values, ends, strict=True)]]  # fmt: skip
                colour = COLOURS[number % len(COLOURS)]
                seeds = [(x + shift, own.value * quantity.scale) for x, score in drawn if isinstance(score, SeedScore)
                         for own in score.by_seed.values()]  # fmt: skip
                axes.scatter(*zip(*seeds, strict=True), s=12, alpha=0.35, color=colour, linewidths=0) if seeds else None
                axes.errorbar([x + shift for x, _ in drawn], values, yerr=spans, fmt="o", capsize=4, label=name, color=colour)
            axes.set_xticks(range(len(groups)), [f"{group}\n{_count(scores)}" for group, scores in groups])
            axes.set_xlim(-0.6, len(groups) - 0.4)
            axes.set_title(f"{quantity.title}\n({'higher' if quantity.better > 0 else 'lower'} is better)", fontsize=10)
            axes.grid(axis="y", alpha=0.3)
        handles, names = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="lower center", ncols=min(len(names), 4), frameon=False)
        figure.tight_layout(rect=(0, 0.06 + 0.05 * ((len(names) - 1) // 4), 1, 1))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _count(scores: Sequence[Score | None]) -> str:
    regions = next(score.regions for score in scores if score is not None)
    return f"{regions} regions"


def _tree(probe: Probe) -> dict[str, Any]:
    """The content of probe.json: settings, and for each encoder a list of scores, not scaled; `low` and `high` are null without
    an interval."""
    tree: dict[str, Any] = {"settings": probe.settings, "encoders": {name: [] for name in probe.encoders}}
    for quantity, group, scores in probe.rows():
        for number, (name, score) in enumerate(zip(probe.encoders, scores, strict=True)):
            if score is None:
                continue
            found = probe.difference(quantity, scores, number)
            low, high = score.interval if score.has_interval else (None, None)
            entry = {"score": quantity.key, "group": group, "regions": score.regions, "images": score.images,
                     "value": score.value, "low": low, "high": high}  # fmt: skip
            if isinstance(score, SeedScore):
                entry["by_seed"] = {str(seed): own.value for seed, own in score.by_seed.items()}
            if found is not None:
                value, *ends = found
                low, high = ends if np.isfinite(ends[0]) else (None, None)
                entry["minus_first"] = {"value": value, "low": low, "high": high}
            elif quantity.key == "loss" and name in probe.unpaired:
                entry["no_difference"] = probe.unpaired[name]
            tree["encoders"][name].append(entry)
    return tree


def write_report(probe: Probe, folder: Path) -> None:
    """Writes report.md, report.html and probe.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(f"# Region probe\n\n{markdown(probe)}")
    (folder / "report.html").write_text(_page(probe))
    (folder / "probe.json").write_text(json.dumps(_tree(probe), indent=1, allow_nan=False) + "\n")
