"""The order of the data: which questions form a row, and which rows form a step.

`Plan` is a pure function of the stores, the tokenizer, the configuration, the seed and the step. It does not depend on ranks.
- Selection: an epoch includes a region question iff a counter-based hash of (seed, epoch, region, task), scaled to 0..1, is below
  the task's share times the source's rate. The same holds for conversations. For global questions the threshold is the share.
  Where a source states counts, every epoch includes the same questions, exactly as many (`granvit.data.draw`).
- Rows: the included region questions of one image, of both tasks and in random order, are cut into chunks of K =
  `data.regions_per_row`. Each chunk is a row. The global question belongs to the image's first row; with K = 1 it is a row of its
  own. A conversation is always a row of its own.
- Batches: rows are permuted by a shuffle that needs no memory. The rows of a window of 32 steps are then divided into global
  batches by `stratified`: each batch has every class of rows in the same proportion as the window, and the long rows of all
  classes are collected in few batches. The lengths within a batch vary less than with plain shuffling (the paper does not
  specify the order). The steps of a window are shuffled again.
- The rows of a global batch are sorted by bucket.
- The last batch of an epoch is filled with rows of weight zero, so that no row is dropped.
"""
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from grain.experimental import index_shuffle

from granvit.config import Bucket, Source
from granvit.data.batch import Question
from granvit.data.draw import WHOLE, Draw, has_whole
from granvit.data.lengths import PrefixLengths, TurnLengths
from granvit.data.splitmix import splitmix64
from granvit.data.store import CONVERSATIONS, Store
from granvit.stages import TASKS, Task

WINDOW = 32  # steps whose rows are divided into batches together
_CHUNK = 1 << 20  # regions hashed at a time
_ASK, _ORDER, _SHUFFLE, _BATCHES = range(4)  # last part of a hash key: what the random number is used for


def stratified(classes: np.ndarray, buckets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation of the rows, int64, in which every stretch of consecutive rows has each class in the same proportion as the
    whole, to within about one row.

    `classes` and `buckets` are integers per row. Within each class rows are sorted by bucket (stable). The r-th of the n rows of
    a class gets the key (r + u) / n with a random u in 0..1 per class, and all rows are sorted by key: the shortest rows of every
    class come first, the longest last.
    """
    by_class = np.lexsort((buckets, classes))
    _, counts = np.unique(classes, return_counts=True)
    place = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_class[np.argsort((place + np.repeat(rng.random(len(counts)), counts)) / np.repeat(counts, counts), kind="stable")]


@dataclass(eq=False)
class Plan:
    """The order of the data: rows, buckets and global batches of every epoch.

    `lengths`, `sources` and `prefixes` have one entry per store: token lengths, sampling rate or counts, prefix lengths. `mix`
    maps tasks to shares. `rows_per_step` is the global batch size. A row's number is its index in the unshuffled order of the
    epoch; -1 stands for a row of weight zero. Memory: one int64 per image for each of the last two epochs.
    """

    stores: Sequence[Store]
    lengths: Sequence[TurnLengths]
    sources: Sequence[Source]
    mix: dict[Task, float]
    regions_per_row: int
    rows_per_step: int
    buckets: Sequence[Bucket]
    prefixes: Sequence[PrefixLengths]
    seed: int

    def __post_init__(self) -> None:
        self._record_starts = np.cumsum([0] + [store.records for store in self.stores])
        self._region_starts = np.cumsum([0] + [store.regions for store in self.stores])
        self._tasks = [(index, task) for index, task in enumerate(TASKS) if self.mix.get(task, 0) > 0]
        self._draws = {
            (number, task): Draw(store, task, source.count.get(task, 0), source.draw)
            for number, (store, source) in enumerate(zip(self.stores, self.sources, strict=True))
            for _, task in self._tasks
            if source.count is not None
        }
        self._lock = threading.RLock()  # reading threads share the tables
        self._epochs: dict[int, np.ndarray] = {}
        self._epoch_steps: list[int] = []
        self._windows: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def __reduce__(self):
        return Plan, tuple(getattr(self, field.name) for field in fields(self))

    def steps(self, epochs: int) -> int:
        """Number of global steps of the first `epochs` epochs."""
        return sum(self.epoch_steps(epoch) for epoch in range(epochs))

    def epoch_steps(self, epoch: int) -> int:
        """Number of global steps of one epoch; `ValueError` if the epoch has no question."""
        with self._lock:
            while len(self._epoch_steps) <= epoch:
                rows = int(self._row_starts(len(self._epoch_steps))[-1])
                if not rows:
                    paths = ", ".join(str(store.path) for store in self.stores)
                    raise ValueError(f"data.sources ({paths}) have no question of the tasks in data.mix: {self.mix}")
                self._epoch_steps.append(-(-rows // self.rows_per_step))
            return self._epoch_steps[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a global step (counted from 0), and the step within it."""
        epoch = 0
        while step >= (steps := self.epoch_steps(epoch)):
            step, epoch = step - steps, epoch + 1
        return epoch, step

    def batch(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Global step -> epoch, and two int64 `[rows_per_step]` for its global batch: for each row the index of the smallest
        bucket that it fits (ascending), and its number."""
        epoch, step = self.locate(step)
        rows, buckets = self._window(epoch, step // WINDOW)
        return epoch, buckets[step % WINDOW], rows[step % WINDOW]

    def contents(self, epoch: int, rows: np.ndarray) -> list[tuple[int, int, list[Question]]]:
        """For each row number: index of the source, index of the image in the source, and its questions in order."""
        source, image = self._images(epoch, rows)[:2]
        row, task, region = self._questions(epoch, rows)
        questions: list[list[Question]] = [[] for _ in rows]
        for r, t, g in zip(row.tolist(), task.tolist(), region.tolist(), strict=True):
            questions[r].append(Question(TASKS[t], None if g < 0 else g))
        return list(zip(source.tolist(), image.tolist(), questions, strict=True))

    def _asked(self, epoch: int, source: int, task: int, numbers: np.ndarray) -> np.ndarray:
        """bool: whether the epoch includes this task for the regions with these numbers in a source (tasks in `WHOLE`: for its
        records)."""
        name = TASKS[task]
        if (source, name) in self._draws:
            return self._draws[source, name].includes(numbers)
        share = self.mix[name] * (1.0 if name == "global" else self.sources[source].rate)
        if share >= 1:
            return np.ones(len(numbers), bool)
        counters = numbers + (self._record_starts if name in WHOLE else self._region_starts)[source]
        return (splitmix64(counters, self.seed, epoch, task, _ASK) >> np.uint64(11)) * 2.0**-53 < share

    def _whole_task(self, source: int) -> Task:
        """The task about whole records of a source."""
        return "conversation" if self.stores[source].kind == CONVERSATIONS else "global"

    def _asked_whole(self, epoch: int, source: int, images: np.ndarray) -> np.ndarray:
        """bool: whether the epoch includes the global question, or the conversation, of these images of one source."""
        store, task = self.stores[source], self._whole_task(source)
        if self.mix.get(task, 0) <= 0:
            return np.zeros(len(images), bool)
        return has_whole(store, images) & self._asked(epoch, source, TASKS.index(task), images)

    def _row_starts(self, epoch: int) -> np.ndarray:
        """int64 `[images + 1]`: number of each image's first row in the epoch, over all sources; the last entry is the total."""
        with self._lock:
            if epoch not in self._epochs:
                while len(self._epochs) >= 2:
                    self._epochs.pop(next(iter(self._epochs)))
                counts = [self._count_rows(epoch, source) for source in range(len(self.stores))]
                self._epochs[epoch] = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
            return self._epochs[epoch]

    def _count_rows(self, epoch: int, source: int) -> np.ndarray:
        """int64 `[images]`: number of rows of each image of one source."""
        store = self.stores[source]
        asked, whole = np.zeros(store.records, np.int64), np.zeros(store.records, bool)
        first = 0
        while first < store.records:
            limit = int(store.region_starts[first]) + _CHUNK
            last = max(int(np.searchsorted(store.region_starts, limit, "right")) - 1, first + 1)
            starts = store.region_starts[first : last + 1].astype(np.int64)
            numbers = np.arange(starts[0], starts[-1])
            for task, name in self._tasks:
                if name not in WHOLE:
                    running = np.concatenate([[0], np.cumsum(self._asked(epoch, source, task, numbers))])
                    asked[first:last] += np.diff(running[starts - starts[0]])
            whole[first:last] = self._asked_whole(epoch, source, np.arange(first, last))
            first = last
        return asked + whole if self.regions_per_row == 1 else np.maximum(-(-asked // self.regions_per_row), whole)

    def _images(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each row number: index of the source, of the image in the source, and of the chunk of the image's questions."""
        row_starts = self._row_starts(epoch)
        image = np.searchsorted(row_starts, rows, "right") - 1
        source = np.searchsorted(self._record_starts, image, "right") - 1
        return source, image - self._record_starts[source], rows - row_starts[image]

    def _questions(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All questions of some rows, sorted by row: index into `rows`, index of the task, index of the region in the image.

        The region is -1 for the question about the whole record, which is the last of its row.
        """
        sources, images, chunks = self._images(epoch, rows)
        questions = []
        for source in np.unique(sources):
            store, members = self.stores[source], np.flatnonzero(sources == source)
            image, chunk = images[members], chunks[members]
            starts = store.region_starts[image].astype(np.int64)
            counts = store.region_starts[image + 1].astype(np.int64) - starts
            member = np.repeat(np.arange(len(members)), counts)  # for each region: index into `members`
            region = np.arange(len(member)) - np.repeat(np.cumsum(counts) - counts, counts)
            numbers = starts[member] + region
            candidates = []
            for index, name in self._tasks:
                if name not in WHOLE:
                    asked = self._asked(epoch, source, index, numbers)
                    order = splitmix64(self._region_starts[source] + numbers[asked], self.seed, epoch, index, _ORDER)
                    candidates.append((member[asked], np.full(asked.sum(), index), region[asked], order))
            asked_regions = np.zeros(len(members), np.int64)  # number of region questions of each row's image
            if candidates:
                member, task, region, order = map(np.concatenate, zip(*candidates, strict=True))
                sort = np.lexsort((order, member))
                member, task, region = member[sort], task[sort], region[sort]
                asked_regions = np.bincount(member, minlength=len(members))
                place = np.arange(len(member)) - np.repeat(np.cumsum(asked_regions) - asked_regions, asked_regions)
                in_chunk = place // self.regions_per_row == chunk[member]
                questions.append((members[member[in_chunk]], task[in_chunk], region[in_chunk]))
            whole = self._asked_whole(epoch, source, image) & (chunk == (asked_regions if self.regions_per_row == 1 else 0))
            whole_task = TASKS.index(self._whole_task(source))
            questions.append((members[whole], np.full(whole.sum(), whole_task), np.full(whole.sum(), -1)))
        row, task, region = map(np.concatenate, zip(*questions, strict=True))
        sort = np.argsort(row, kind="stable")
        return row[sort], task[sort], region[sort]

    def _kinds(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each row the number of its class (rows of one class have the same source, both or neither an image, and the same
        count of questions of each task), and the index of the smallest bucket that it fits; the largest if it fits none."""
        sources, images, _ = self._images(epoch, rows)
        row, task, region = self._questions(epoch, rows)
        tokens, answers, has_image = (np.zeros(len(rows), np.int64) for _ in range(3))
        for source in np.unique(sources):
            own = sources == source
            tokens[own] = self.prefixes[source].tokens_of(images[own])
            has_image[own] = self.prefixes[source].has_image(images[own])
            of_source = sources[row] == source
            image = images[row[of_source]]
            text = self.stores[source].region_starts[image] + image + 1 + region[of_source]  # region -1: the global caption
            turn_tokens, turn_answers = self.lengths[source].tokens_of(task[of_source], text)
            np.add.at(tokens, row[of_source], turn_tokens)
            np.add.at(answers, row[of_source], turn_answers)
        asked = np.bincount(row * len(TASKS) + task, minlength=len(rows) * len(TASKS)).reshape(len(rows), -1)
        classes = np.unique(np.column_stack([sources, has_image, asked]), axis=0, return_inverse=True)[1].reshape(-1)
        fits = [(tokens <= bucket.length) & (answers <= bucket.answers) for bucket in self.buckets]
        return classes, np.argmax([*fits[:-1], np.ones(len(rows), bool)], axis=0)

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers and bucket indices, int64 `[steps, rows_per_step]`, of one window of steps."""
        with self._lock:
            if (epoch, window) not in self._windows:
                while len(self._windows) >= 2:
                    self._windows.pop(next(iter(self._windows)))
                self._windows[epoch, window] = self._order_window(epoch, window)
            return self._windows[epoch, window]

    def _order_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        total, span = int(self._row_starts(epoch)[-1]), WINDOW * self.rows_per_step
        assert total < 2**32, "index_shuffle permutes 32-bit numbers"
        shuffle_seed, batch_seed = (int(splitmix64(np.zeros(1), self.seed, epoch, use)[0]) for use in (_SHUFFLE, _BATCHES))
        places = range(window * span, min((window + 1) * span, total))
        rows = np.array([index_shuffle(p, total - 1, shuffle_seed % 2**31, 4) for p in places], np.int64)
        rng = np.random.default_rng((batch_seed, window))
        classes, buckets = self._kinds(epoch, rows)
        order = stratified(classes, buckets, rng)
        fill = np.full(-len(rows) % self.rows_per_step, -1)
        rows, buckets = (np.append(x[order], fill).reshape(-1, self.rows_per_step) for x in (rows, buckets))
        whole = len(rows) - (len(fill) > 0)
        steps = np.append(rng.permutation(whole), np.arange(whole, len(rows)))[:, None]  # the filled batch stays last
        sort = np.argsort(buckets[steps[:, 0]], axis=1, kind="stable")
        return rows[steps, sort], np.maximum(buckets[steps, sort], 0)
