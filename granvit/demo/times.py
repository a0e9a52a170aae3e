"""Where a run's time went, from its log, its metrics and the seconds that its process took.

The log of rank 0 has a time on every line, metrics.jsonl the seconds of every step, and an evaluation ends with a line. From that
follow the times of the first step, the other steps and the evaluations. Not in the log are the seconds before its first line, in
which the framework is loaded, and those after its last one, in which the process ends.
"""
import re
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from granvit.logs import read_metrics

KINDS = ("starting and leaving", "loading, until the first step", "first step, with compiling", "other steps",
         "evaluation and saving")  # fmt: skip
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) [A-Z]+ (.*)")
_SET_UP_ENDS = re.compile(r"step \d+|checkpoint |left out: |skipped |asked to stop")
_EVALUATED = re.compile(r"step (\d+) held-out ")
_BREAK = 60.0  # longer times in which no run is active are cut out of the timeline


@dataclass(frozen=True)
class Span:
    """Seconds since the start of the demo in which a part did one kind of work (of `KINDS`; None: not known)."""

    start: float
    end: float
    kind: str | None


@dataclass(frozen=True)
class PartTimes:
    """One part's spans in order, and the mean seconds of a step without the first. `running`: the log has no end yet."""

    spans: list[Span]
    step_seconds: float | None
    running: bool

    def of_kind(self, kind: str) -> float:
        return sum(span.end - span.start for span in self.spans if span.kind == kind)


@dataclass(frozen=True)
class Times:
    """The parts that can be drawn on one axis of seconds, in the order of their starts, when the first run's log begins, and why
    other parts are left out."""

    parts: dict[str, PartTimes]
    began: datetime | None
    left_out: list[str]


def read_times(root: Path, names: list[str], seconds: dict[str, float]) -> Times:
    """The times of the runs `names` in `root`. `seconds` is what the process of each finished part took, start and end included.

    A run that was interrupted and resumed is left out. The part `data` has no log; it is drawn before the first run.
    """
    logs, left_out = {}, []
    for name in names:
        lines = _log_lines(root / name / "log" / "rank_00000.txt")
        written = (lines[-1][0] - lines[0][0]).total_seconds() if lines else 0.0
        if not lines:
            left_out.append(f"{name}: it has no log")
        elif written > seconds.get(name, written) + 1:  # 1 s: the two clocks differ
            left_out.append(f"{name}: it was interrupted and resumed, so that its log covers more than one process")
        else:
            logs[name] = lines
    if not logs:
        return Times({}, None, left_out)
    began = min(lines[0][0] for lines in logs.values())
    parts = {name: _split(lines, began, root / name / "metrics.jsonl", seconds.get(name)) for name, lines in logs.items()}
    if "data" in seconds:
        first = min(part.spans[0].start for part in parts.values())
        parts["data"] = PartTimes([Span(first - seconds["data"], first, None)], None, False)
    parts = dict(sorted(parts.items(), key=lambda item: item[1].spans[0].start))
    return Times(_without_breaks(parts), began, left_out)


def _log_lines(path: Path) -> list[tuple[datetime, str]]:
    """The dated lines of a log; none if there is no file."""
    if not path.exists():
        return []
    found = (_LINE.fullmatch(line) for line in path.read_text(errors="replace").splitlines())
    return [(datetime.fromisoformat(f"{match[1]}.{match[2]}"), match[3]) for match in found if match]


def _split(lines: list[tuple[datetime, str]], began: datetime, metrics: Path, seconds: float | None) -> PartTimes:
    """Spans of one run in order. An evaluation takes the time between the end of the step before it and its last line."""
    at = [(time - began).total_seconds() for time, _ in lines]
    running = not any(text.endswith("is complete") for _, text in lines)
    set_up = next((number for number, (_, text) in enumerate(lines) if _SET_UP_ENDS.match(text)), len(lines))
    evaluated: dict[int, float] = {}  # step -> time of its last line
    for time, (_, text) in zip(at, lines, strict=True):
        if match := _EVALUATED.match(text):
            evaluated[int(match[1])] = time
    of_step = {record["step"]: record["seconds"] for _, record in read_metrics(metrics, sys.maxsize) if "seconds" in record}
    spans, now, done = [], at[max(set_up - 1, 0)], 0
    if seconds is not None and seconds > at[-1] - at[0]:
        spans.append(Span(at[0] - (seconds - (at[-1] - at[0])), at[0], KINDS[0]))
    spans.append(Span(at[0], now, KINDS[1]))
    for step in sorted({*evaluated, max(of_step, default=0)}):
        trained = [number for number in of_step if done < number <= step]
        for kind, own in ((KINDS[2], [n for n in trained if n == 1]), (KINDS[3], [n for n in trained if n > 1])):
            if own:
                spans.append(Span(now, now + sum(of_step[n] for n in own), kind))
                now = spans[-1].end
        done = step
        if step in evaluated:
            spans.append(Span(now, max(evaluated[step], now), KINDS[4]))
            now = spans[-1].end
    later = [value for step, value in of_step.items() if step > 1]
    return PartTimes(spans, sum(later) / len(later) if later else None, running)


def _without_breaks(parts: dict[str, PartTimes]) -> dict[str, PartTimes]:
    """The parts with the first start at 0 and without long times in which none is active (the demo was continued later)."""
    shift, reached = 0.0, -np.inf
    moved = {}
    for name, part in parts.items():
        start, end = part.spans[0].start, part.spans[-1].end
        if start > reached + _BREAK:
            shift = start if reached == -np.inf else shift + start - reached
        reached = max(reached, end)
        spans = [Span(span.start - shift, span.end - shift, span.kind) for span in part.spans]
        moved[name] = PartTimes(spans, part.step_seconds, part.running)
    return moved
