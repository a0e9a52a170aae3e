"""Tensors that a foreign layout holds together, or behind axes of length one.

In a layout's table `name@k/n` is part k of n equal parts of the tensor `name` along its first axis (queries, keys and values in
one matrix), and `name@[1,1]` the tensor `name` without that many leading axes of length one.
"""
import re
from collections.abc import Iterable, Sequence

import numpy as np

from granvit.checkpoint.layouts import Layout, pattern_matches
from granvit.checkpoint.tensors import StoredTensors

_PART, _AXES = re.compile(r"@(\d+)/(\d+)$"), re.compile(r"@\[([1,]+)\]$")


def whole(name: str) -> str:
    """The name of the tensor in the file."""
    return name.partition("@")[0]


def parts_of(name: str) -> int:
    """Of how many parts the tensor consists that `name` is a part of."""
    found = _PART.search(name)
    return int(found[2]) if found else 1


def whole_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of the tensor that `name` of this shape belongs to."""
    if axes := _AXES.search(name):
        return (1,) * len(axes[1].split(",")) + shape
    return (parts_of(name) * shape[0], *shape[1:]) if parts_of(name) > 1 else shape


def assemble(shape: tuple[int, ...], pieces: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor of this shape from its parts in order."""
    return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).reshape(shape)


def piece_names(names: Iterable[str], layout: Layout) -> list[str]:
    """A file's names as the layout's table has them."""
    suffixes: dict[str, list[str]] = {}
    for pattern in (foreign for spelling in layout.spellings for foreign, _ in spelling.rows if "@" in foreign):
        suffixes.setdefault(whole(pattern), []).append(pattern.partition("@")[2])
    found = []
    for name in names:
        parts = next((parts for pattern, parts in suffixes.items() if pattern_matches(pattern, name)), None)
        found += [f"{name}@{part}" for part in parts] if parts else [name]
    return found


class Pieces(StoredTensors):
    """The same tensors under the names of a layout's table; nothing is read. `ValueError` for one that cannot be parted so."""

    def __init__(self, tensors: StoredTensors, layout: Layout):
        self.tensors, self.dtypes = tensors, tensors.dtypes
        self.entries = {name: _piece(name, tensors.entries[whole(name)]) for name in piece_names(tensors.entries, layout)}

    def read(self, name: str) -> np.ndarray:
        return self.tensors.read(name) if name in self.tensors.entries else super().read(name)


def _piece(name: str, entry: dict) -> dict:
    if "@" not in name:
        return entry
    shape, count = entry["shape"], parts_of(name)
    if axes := _AXES.search(name):
        ones = len(axes[1].split(","))
        if shape[:ones] != (1,) * ones:
            raise ValueError(f"{entry['path']}: tensor {whole(name)!r} is {list(shape)}, expected {[1] * ones} before the rest")
        return entry | {"shape": shape[ones:]}
    if not shape or shape[0] % count:
        raise ValueError(f"{entry['path']}: tensor {whole(name)!r} is {list(shape)}, which has no {count} equal parts")
    part = _PART.search(name)
    assert part is not None, name
    total, number = sum(length for _, length in entry["spans"]), int(part[1])
    first, last = number * total // count, (number + 1) * total // count
    return entry | {"shape": (shape[0] // count, *shape[1:]), "spans": list(_between(entry["spans"], first, last))}


def _between(spans: Iterable[tuple[int, int]], first: int, last: int) -> Iterable[tuple[int, int]]:
    """Where the tensor's bytes from `first` to `last` lie."""
    at = 0
    for offset, length in spans:
        low, high = max(first, at), min(last, at + length)
        if low < high:
            yield offset + low - at, high - low
        at += length
