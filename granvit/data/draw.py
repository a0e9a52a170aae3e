"""Draws an exact number of a store's questions of one task, by a seed: a view of the store, not a copy.

Chosen are the questions with the smallest hashes of (seed, task, number). Different questions have different hashes, so the count
is exact. The choice depends on the store, the task, the seed and the count alone; a smaller count gives a part of a larger one.
"""
from collections.abc import Iterator

import numpy as np

from granvit.data.splitmix import splitmix64
from granvit.data.store import Store
from granvit.stages import TASKS, Task

WHOLE: tuple[Task, ...] = ("global", "conversation")  # tasks about a whole record instead of a region
_CHUNK = 1 << 20  # questions hashed at a time


def available(store: Store, task: Task) -> int:
    """The number of questions of a task that a store has."""
    if task not in store.kind.tasks:
        return 0
    return {"global": store.globals, "conversation": store.records}.get(task, store.regions)


def has_whole(store: Store, records: np.ndarray) -> np.ndarray:
    """bool: whether the records with these indices have a global caption, or are conversations."""
    number = store.region_starts[records] + records
    return store.text_ends[number + 1] > store.text_ends[number]


class Draw:
    """`wanted` questions of a task. `ValueError` if the store has fewer. Reads the store's index once; memory: about 8 bytes for
    each question of a chunk."""

    def __init__(self, store: Store, task: Task, wanted: int, seed: int):
        self._store, self._task, self._seed = store, task, seed
        there = available(store, task)
        if wanted > there:
            raise ValueError(
                f"data.sources: {store.path} has {there:,} questions of {task}, fewer than its count {wanted:,}; lower the count"
            )
        self._all, self._limit = wanted == there, None if wanted == 0 else np.uint64(2**64 - 1)
        if 0 < wanted < there:
            self._limit = self._smallest(wanted, there)

    def includes(self, numbers: np.ndarray) -> np.ndarray:
        """bool: whether questions are drawn, by the numbers of their regions in the store (tasks in `WHOLE`: of the records)."""
        if self._all or self._limit is None:
            return np.full(len(numbers), self._all)
        return self._hashes(numbers) <= self._limit

    def _hashes(self, numbers: np.ndarray) -> np.ndarray:
        return splitmix64(numbers, self._seed, TASKS.index(self._task))

    def _all_hashes(self) -> Iterator[np.ndarray]:
        """The hashes of all questions of the task, in chunks."""
        whole = self._task in WHOLE
        total = self._store.records if whole else self._store.regions
        for first in range(0, total, _CHUNK):
            numbers = np.arange(first, min(first + _CHUNK, total))
            yield self._hashes(numbers[has_whole(self._store, numbers)] if whole else numbers)

    def _smallest(self, wanted: int, there: int) -> np.uint64:
        """The hash that is number `wanted` in ascending order. Only hashes near its expected place are kept and sorted."""
        margin = 8 * there**0.5
        while True:
            low, high = (
                np.uint64(min(int(min(max((wanted + side * margin) / there, 0.0), 1.0) * 2**64), 2**64 - 1)) for side in (-1, 1)
            )
            below, near = 0, []
            for hashes in self._all_hashes():
                below += int((hashes < low).sum())
                near.append(hashes[(hashes >= low) & (hashes <= high)])
            candidates = np.sort(np.concatenate(near))
            if below < wanted <= below + len(candidates):
                return candidates[wanted - below - 1]
            margin *= 8  # eight standard deviations were not enough
