"""The output of a check: a table on the terminal, report.json (every number), report.html (one self-contained file)."""
import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parity.compare import CARRIED_FACTOR, FLOOR_UNITS, RATIO, ROUNDOFF, Row, Verdict, verdicts

SCHEMA = 1
EQUAL, DIVERGED, COULD_NOT_TELL = 0, 1, 2
OUTCOMES = {EQUAL: "equal", DIVERGED: "diverged", COULD_NOT_TELL: "could not tell"}


@dataclass
class Report:
    """The results of one check. `notes` says what was not checked, and why; `faults` is the table of planted faults."""

    candidate: str
    peer: str
    compute: str
    rows: list[Row]
    environment: dict[str, str]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    false_alarms: dict[str, Any] | None = None
    seconds: float = 0.0

    @property
    def status(self) -> int:
        """Exit status: 0 equal, 1 diverged, 2 could not tell (nothing was compared, or a fault was missed)."""
        missed = [f for f in self.faults if not (f["detected"] and f["located"])]
        if missed or (self.false_alarms or {}).get("alarms") or (not self.rows and not self.faults):
            return COULD_NOT_TELL
        return DIVERGED if any(not row.passed for row in self.rows) else EQUAL

    def verdicts(self) -> list[Verdict]:
        return verdicts(self.rows)


def describe(row: Row, where: str) -> str:
    """One failed row in words: the tensor, its error, and the class that made it (`where`)."""
    far = row.reason
    if row.reason == "diverged":
        far = f"off by {row.error[0]:.1e} (limit {row.limit[0]:.1e}, peer {row.peer_error[0]:.1e})"
    return f"{row.kind} {row.name}: {far}{f'; made by {where}' if where else ''}"


OUTCOME_COLUMNS = ("tensors", "worst error", "of limit", "where", "verdict", "seconds")


def outcome(report: Report) -> tuple[str, ...]:
    """A report in one line of a table, by `OUTCOME_COLUMNS`."""
    found, verdict = report.verdicts(), OUTCOMES[report.status]
    if report.faults:
        verdict = f"{sum(f['detected'] and f['located'] for f in report.faults)} of {len(report.faults)} faults located"
    if report.false_alarms is not None:
        verdict += f", {len(report.false_alarms['alarms'])} false alarms"
    cells = ("", "", "", "")
    if found:
        v = max(found, key=lambda v: (v.failed > 0, v.worst.badness))
        cells = (str(sum(v.compared for v in found)), f"{v.worst.error[0]:.1e}", f"{v.worst.badness:.2f}",
                 f"{v.suite}: {v.worst.kind} {v.worst.name}")  # fmt: skip
    return *cells, verdict, f"{report.seconds:.0f}"


def print_report(report: Report, sources: dict[str, str], console: Console) -> None:
    """Prints the table and the first failure of each suite. `sources` maps a tensor's name to the class and file that made it."""
    table = Table(title=f"{report.candidate} against {report.peer}, {report.compute}; golden reference: PyTorch, float64")
    for column in ("suite", "tensors", "worst error", "of limit", "where", "verdict"):
        table.add_column(column, justify="right" if column in ("tensors", "worst error", "of limit") else "left")
    for v in report.verdicts():
        worst = v.worst
        table.add_row(v.suite, str(v.compared), f"{worst.error[0]:.1e}", f"{worst.badness:.2f}", f"{worst.kind} {worst.name}",
                      "[green]equal[/]" if not v.failed else f"[red]{v.failed} diverged[/]")  # fmt: skip
    if report.rows:
        console.print(table)
    for v in report.verdicts():
        if v.first is not None:
            console.print(f"[red]{v.suite}[/]: first {describe(v.first, sources.get(v.first.name, ''))}", highlight=False)
    if report.faults:
        faults = Table(title="planted faults")
        for column in ("fault", "planted in", "suite", "verdict", "first failure"):
            faults.add_column(column)
        for f in report.faults:
            colour = "green" if f["detected"] and f["located"] else "red"
            verdict = "located" if f["located"] else "detected, wrong place" if f["detected"] else "MISSED"
            faults.add_row(f["name"], f["framework"], f["suite"], f"[{colour}]{verdict}[/]", f["first"])
        console.print(faults)
        found = sum(f["detected"] and f["located"] for f in report.faults)
        console.print(f"{found} of {len(report.faults)} faults detected and located")
    if report.false_alarms is not None:
        a = report.false_alarms
        alarms = f"{len(a['alarms'])} false alarm(s) {a['alarms'] or ''}"
        console.print(f"{a['seeds']} seeds without a fault: {alarms}; worst {a['worst']:.2f} of its limit")
    for note in report.notes:
        console.print(f"[yellow]not checked[/]: {note}", highlight=False)
    console.print(f"[bold]{OUTCOMES[report.status]}[/] ({report.seconds:.0f} s)")


def write_report(report: Report, sources: dict[str, str], directory: Path) -> None:
    """Writes report.json and report.html."""
    directory.mkdir(parents=True, exist_ok=True)
    tree = {
        "schema": SCHEMA,
        "outcome": OUTCOMES[report.status],
        "candidate": report.candidate,
        "peer": report.peer,
        "golden": "PyTorch, float64",
        "compute": report.compute,
        "ratio": RATIO,
        "floor": [units * ROUNDOFF[report.compute] for units in FLOOR_UNITS[report.compute]],
        "seconds": report.seconds,
        "environment": report.environment,
        "settings": report.settings,
        "notes": report.notes,
        "faults": report.faults,
        "false_alarms": report.false_alarms,
        "rows": [{**asdict(row), "passed": row.passed, "made_by": sources.get(row.name, "")} for row in report.rows],
    }
    (directory / "report.json").write_text(json.dumps(_finite(tree), indent=1))
    (directory / "report.html").write_text(_html(report, sources))


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by strings."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


PLOTTED = {
    "forward": "Forward: error of each activation, in order of execution",
    "backward": "Backward: error of the gradient at each activation, in order of execution",
}


def _html(report: Report, sources: dict[str, str]) -> str:
    candidate, peer = html.escape(report.candidate), html.escape(report.peer)
    floor, largest = (units * ROUNDOFF[report.compute] for units in FLOOR_UNITS[report.compute])
    parts = [
        f"<h1>Parity: {candidate} against {peer}</h1>",
        f'<p class="outcome {OUTCOMES[report.status].replace(" ", "-")}">{OUTCOMES[report.status]}</p>',
        f"<p>Errors are relative to the golden reference, PyTorch in float64. A tensor of {candidate} passes where its error is "
        f"at most {RATIO:g} times {peer}'s own at {report.compute}, or below the floor of {floor:.1e} (largest element: "
        f"{largest:.1e}; {CARRIED_FACTOR:g} times as much for gradients that went through the whole model and for the "
        f"results of many steps).</p>",
        _summary(report, sources),
    ]
    for suite in dict.fromkeys(row.suite for row in report.rows):
        for kind, title in PLOTTED.items():
            rows = [row for row in report.rows if row.suite == suite and row.kind == kind]
            if suite not in ("ops",) and len(rows) > 8:
                parts.append(f"<h3>{html.escape(suite)}</h3>" + _plot(rows, title, report))
    parts += [_fault_table(report), _table(report, sources), _environment(report)]
    page = Path(__file__).with_name("page.html").read_text()
    return page.replace("{title}", f"Parity: {candidate}").replace("{body}", "\n".join(filter(None, parts)))


def _summary(report: Report, sources: dict[str, str]) -> str:
    lines = []
    for v in report.verdicts():
        first = ""
        if v.first is not None:
            first = f"<br><small>first: {html.escape(describe(v.first, sources.get(v.first.name, '')))}</small>"
        state = "equal" if not v.failed else f"{v.failed} diverged"
        where = html.escape(f"{v.worst.kind} {v.worst.name}")
        cells = (html.escape(v.suite), v.compared, f"{v.worst.error[0]:.1e}", f"{v.worst.badness:.2f}", where, state + first)
        lines.append(f'<tr class="{"bad" if v.failed else ""}">' + "".join(f"<td>{cell}" for cell in cells) + "</tr>")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    head = "<tr><th>suite<th>tensors<th>worst error<th>of its limit<th>where<th>verdict</tr>"
    return f"<table>{head}{''.join(lines)}</table>" + (f"<p>Not checked:</p><ul>{notes}</ul>" if notes else "")


def _plot(rows: Sequence[Row], heading: str, report: Report) -> str:
    """A plot of the relative errors of both frameworks and of the limit by depth, on a logarithmic axis."""
    width, height, left, bottom, top = 1040, 260, 62, 28, 14
    finite = [e for row in rows for e in (row.error[0], row.peer_error[0], row.limit[0]) if math.isfinite(e) and e > 0]
    low, high = math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite)))
    x = lambda i: left + (width - left - 12) * (i + 0.5) / len(rows)  # noqa: E731
    y = lambda e: top + (height - top - bottom) * (high - math.log10(max(e, 10.0**low))) / (high - low)  # noqa: E731
    sides = ((report.candidate, "#b8431f", [row.error[0] for row in rows]),
             (report.peer, "#2b5f8a", [row.peer_error[0] for row in rows]))  # fmt: skip
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(heading)}">']
    for power in range(low, high + 1):
        out.append(f'<line x1="{left}" x2="{width - 12}" y1="{y(10.0**power):.1f}" y2="{y(10.0**power):.1f}" class="grid"/>'
                   f'<text x="{left - 8}" y="{y(10.0**power) + 4:.1f}" text-anchor="end">1e{power}</text>')  # fmt: skip
    limits = " ".join(f"{x(i):.1f},{y(row.limit[0]):.1f}" for i, row in enumerate(rows))
    out.append(f'<polyline points="{limits}" class="limit"/>')
    for who, colour, errors in sides:
        values = [(i, e, row) for i, (e, row) in enumerate(zip(errors, rows, strict=True)) if math.isfinite(e)]
        points = " ".join(f"{x(i):.1f},{y(e):.1f}" for i, e, _ in values)
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        for i, e, row in values:
            title = html.escape(f"{row.name}: {who} {e:.2e}, limit {row.limit[0]:.1e}")
            radius = 2.6 if row.passed else 5
            out.append(f'<circle cx="{x(i):.1f}" cy="{y(e):.1f}" r="{radius}" fill="{colour}"><title>{title}</title></circle>')
    legend = "".join(f'<tspan fill="{colour}" dx="14">● {html.escape(who)}</tspan>' for who, colour, _ in sides)
    legend += '<tspan dx="14" class="limit-label">- - limit</tspan>'
    out.append(f'<text x="{left}" y="{height - 8}">{html.escape(heading)}{legend}</text></svg>')
    return "".join(out)


def _fault_table(report: Report) -> str:
    if not report.faults:
        return ""
    lines = []
    for f in report.faults:
        good = f["detected"] and f["located"]
        state = "located" if good else "detected, wrong place" if f["detected"] else "missed"
        cells = "".join(f"<td>{html.escape(str(f[key]))}" for key in ("name", "framework", "suite", "expected", "first"))
        lines.append(f'<tr class="{"" if good else "bad"}">{cells}<td>{state}</tr>')
    head = "<tr><th>planted fault<th>in<th>suite<th>expected at<th>first failure<th>verdict</tr>"
    alarms = ""
    if report.false_alarms is not None:
        a = report.false_alarms
        counted = f"{a['seeds']} seeds without a fault: {len(a['alarms'])} false alarms"
        alarms = f"<p>{counted}; worst error {a['worst']:.2f} of its limit.</p>"
    return f"<h2>Planted faults</h2><table>{head}{''.join(lines)}</table>{alarms}"


def _table(report: Report, sources: dict[str, str]) -> str:
    columns = ("suite", "kind", "name", "shape", report.candidate, report.peer, "limit", "of limit", "verdict", "made by")
    head = "".join(f'<th><button type="button">{html.escape(c)}</button>' for c in columns)
    lines = []
    for row in report.rows:
        numbers = [f"{e[0]:.2e}" for e in (row.error, row.peer_error, row.limit)]
        shape, state = "x".join(map(str, row.shape)) or "1", "equal" if row.passed else row.reason
        cells = [row.suite, row.kind, row.name, shape, *numbers, f"{row.badness:.3f}", state, sources.get(row.name, "")]
        lines.append(f'<tr class="{"" if row.passed else "bad"}">' + "".join(f"<td>{html.escape(c)}" for c in cells) + "</tr>")
    table = f"<table id='rows'><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f"<h2>Every tensor</h2><p>Click a heading to sort.</p>{table}"


def _environment(report: Report) -> str:
    shown = ("seed", "steps", "weights", "batches", "kernels")
    entries = report.environment | {k: str(v) for k, v in report.settings.items() if k in shown}
    lines = "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(v)}</tr>" for k, v in entries.items())
    return f"<h2>Environment</h2><table>{lines}</table>"
