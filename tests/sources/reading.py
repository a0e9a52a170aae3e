"""Helpers of the readers' tests."""
import json
from pathlib import Path

from granvit.data.sources.annotated import Annotated, Refused


def everything(reader) -> list[Annotated | Refused]:
    """All items of all parts, in order."""
    return [item for part in reader.parts() for item in reader.read(part)]


def write_json(path: Path, tree, drop: int = 0) -> Path:
    """Writes `tree`, without its last `drop` bytes."""
    data = json.dumps(tree).encode()
    path.write_bytes(data[: len(data) - drop])
    return path
