"""The rows of the selftest: what was checked and how it went, as a table for the terminal and as JSON."""
import math
import textwrap
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

PASSED, FAILED, ABSENT, NOT_RUN, NOTED = "passed", "FAILED", "not here", "not run", "noted"
Result = Literal["passed", "FAILED", "not here", "not run", "noted"]
WIDTH = 130  # of the table
COLUMNS = ("framework", "check", "what", "result", "figure", "limit")


@dataclass(frozen=True)
class Row:
    """One check. `figure` and `limit` are texts; `note` says more, or why it failed or was not done. `traceback`: of an
    exception, or what a dead process printed last. `details`: numbers for the JSON."""

    check: str
    what: str
    result: Result
    figure: str = ""
    limit: str = ""
    note: str = ""
    framework: str = ""
    traceback: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The row as JSON types; numbers that are not finite are texts."""
        return finite(asdict(self))


def finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def first_line(error: BaseException) -> str:
    """The type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def failure(check: str, what: str, error: BaseException) -> Row:
    """The row of a check that raised an exception."""
    return Row(check, what, FAILED, note=first_line(error), traceback="".join(traceback.format_exception(error)))


def verdict(check: str, what: str, figure: float, limit: float, note: str = "", **details: Any) -> Row:
    """A row that fails where the figure exceeds the limit or is not a number."""
    result: Result = PASSED if figure <= limit else FAILED
    return Row(check, what, result, short(figure), short(limit), note, details={"figure": figure, "limit": limit, **details})


def short(number: float) -> str:
    if not math.isfinite(number):
        return str(number)
    return f"{number:.3g}" if abs(number) < 10_000 else f"{number:.1e}"


def table(rows: Sequence[Row]) -> str:
    """All rows with aligned columns. A note is behind the figures if it fits, in their place if there are none, else below."""
    cells = [(row.framework, row.check, row.what, row.result, row.figure, row.limit) for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    padded = lambda texts: "  ".join(map(str.ljust, texts, widths))  # noqa: E731
    margin = " " * (sum(widths[:4]) + 2 * 4)
    lines = [padded(COLUMNS).rstrip(), padded(["-" * width for width in widths])]
    for row, texts in zip(rows, cells, strict=True):
        line = padded(texts) if row.figure else padded(texts[:4])
        if len(line) + 2 + len(row.note) <= WIDTH:
            lines.append(f"{line}  {row.note}".rstrip())
            continue
        first, *rest = textwrap.wrap(row.note, max(WIDTH - len(margin), 40))
        lines += [line.rstrip(), margin + first] if row.figure else [f"{line}  {first}"]
        lines += [margin + note for note in rest]
    return "\n".join(lines)


def summary(rows: Iterable[Row]) -> str:
    """How many rows have each result."""
    counts = Counter(row.result for row in rows)
    return ", ".join(f"{counts[result]} {result}" for result in get_args(Result) if counts[result])
