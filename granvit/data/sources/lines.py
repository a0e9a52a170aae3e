"""JSON lines: one image per line."""
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from granvit.data.sources.annotated import Annotated, Refused
from granvit.data.sources.inputs import CUT


def parse_line(line: bytes) -> Any:
    """A line's JSON; `ValueError` with the reason if it is not valid."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise ValueError("line is not valid JSON") from None


def json_lines(path: Path, read: Callable[[dict[str, Any], str], Annotated]) -> Iterator[Annotated | Refused]:
    """`read(mapping, place)` for each line that is not blank. A line for which it raises `ValueError` is refused with that
    reason.

    The last item is a `Refused` with the file's name if the last line is cut off. `ValueError` if the file does not start with a
    mapping.
    """
    with open(path, "rb") as file:
        started = False
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if not started and not line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
                raise ValueError(f"{path}: is not JSON lines of mappings")
            started = True
            try:
                tree = parse_line(line)
            except ValueError as error:
                cut = not line.endswith(b"\n")
                yield Refused(path.name, CUT) if cut else Refused(f"line {number}", str(error))
                continue
            try:
                if not isinstance(tree, dict):
                    raise ValueError("line is not a mapping")
                yield read(tree, f"line {number}")
            except ValueError as error:
                yield Refused(f"line {number}", str(error))


def stated_size(tree: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height of a mapping with these keys; None if they are not two whole numbers."""
    width, height = tree.get("width"), tree.get("height")
    if isinstance(width, bool) or isinstance(height, bool) or not isinstance(width, int) or not isinstance(height, int):
        return None
    return width, height
