"""Tensors that a foreign layout stores concatenated, or with leading axes of length one.

In a layout's table `name@k/n` stands for part k (from 0) of n equal parts of the tensor `name` along its first axis (for example
queries, keys and values in one matrix). `name@[1,1]` stands for the tensor `name` without two leading axes of length one.
"""
import re
from collections.abc import Iterable, Sequence

import numpy as np

from granvit.checkpoint.layouts import Layout, match
from granvit.checkpoint.tensors import StoredTensors

_PART, _AXES = re.compile(r"@(\d+)/(\d+)$"), re.compile(r"@\[([1,]+)\]$")


def name_in_file(name: str) -> str:
    """The name of the tensor in the file."""
    return name.partition("@")[0]


def count_parts(name: str) -> int:
    """The number of parts of the tensor in the file that `name` is a part of; 1 if `name` is the whole tensor."""
    found = _PART.search(name)
    return int(found[2]) if found else 1


def shape_in_file(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor in the file, if `name` has the shape `shape`."""
    if axes := _AXES.search(name):
        return (1,) * len(axes[1].split(",")) + shape
    return (count_parts(name) * shape[0], *shape[1:]) if count_parts(name) > 1 else shape


def combine(shape: tuple[int, ...], parts: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor of this shape from its parts in order."""
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(shape)


def part_names(names: Iterable[str], layout: Layout) -> list[str]:
    """The names in a file as the layout's table writes them: a combined tensor gives one name per part."""
    suffixes: dict[str, list[str]] = {}
    for pattern in (foreign for spelling in layout.spellings for foreign, _ in spelling.rows if "@" in foreign):
        suffixes.setdefault(name_in_file(pattern), []).append(pattern.partition("@")[2])
    found = []
    for name in names:
        parts = next((parts for pattern, parts in suffixes.items() if match(pattern, name) is not None), None)
        found += [f"{name}@{part}" for part in parts] if parts else [name]
    return found


class SeparatedTensors(StoredTensors):
    """A file's tensors under the names of a layout's table, with combined tensors split into their parts.

    Construction reads no tensor. `ValueError` names a tensor whose shape cannot be split so.
    """

    def __init__(self, tensors: StoredTensors, layout: Layout):
        self.tensors, self.dtypes = tensors, tensors.dtypes
        names = part_names(tensors.entries, layout)
        self.entries = {name: _entry_of_part(name, tensors.entries[name_in_file(name)]) for name in names}

    def read(self, name: str) -> np.ndarray:
        return self.tensors.read(name) if name in self.tensors.entries else super().read(name)


def _entry_of_part(name: str, entry: dict) -> dict:
    """The entry (shape, spans of bytes) of the part called `name`; `entry` is that of the tensor in the file."""
    if "@" not in name:
        return entry
    shape, count = entry["shape"], count_parts(name)
    tensor = f"{entry['path']}: tensor {name_in_file(name)!r} is {list(shape)}"
    if axes := _AXES.search(name):
        ones = len(axes[1].split(","))
        if shape[:ones] != (1,) * ones:
            raise ValueError(f"{tensor}, expected {ones} leading axes of length 1")
        return entry | {"shape": shape[ones:]}
    if not shape or shape[0] % count:
        raise ValueError(f"{tensor}, which cannot be split into {count} equal parts")
    part = _PART.search(name)
    assert part is not None, name
    total, number = sum(length for _, length in entry["spans"]), int(part[1])
    first, last = number * total // count, (number + 1) * total // count
    return entry | {"shape": (shape[0] // count, *shape[1:]), "spans": list(_between(entry["spans"], first, last))}


def _between(spans: Iterable[tuple[int, int]], first: int, last: int) -> Iterable[tuple[int, int]]:
    """The spans (offset, length) in the file of the tensor's bytes from `first` to `last` (exclusive)."""
    start = 0  # index of the span's first byte in the tensor
    for offset, length in spans:
        low, high = max(first, start), min(last, start + length)
        if low < high:
            yield offset + low - start, high - low
        start += length
