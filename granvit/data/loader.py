"""Which questions form which row at which step, and the Grain pipeline that turns them into batches.

`Plan` is a pure function of the stores, the tokenizer, the seed and the step; it knows nothing of ranks.
- An epoch asks a region question iff a counter-based hash of (seed, epoch, region, task) falls below the task's share times
  the source's rate; so a conversation; a global question has no source rate.
- The asked questions of one image, both tasks together and in an order drawn per epoch, are cut into chunks of
  K = `data.regions_per_row`. The global question joins an image's first chunk; where K is 1 it is a row of its own. So is a
  conversation, always.
- Rows follow a global shuffle that needs no memory. A window of 32 steps is cut into global batches as `stratified` says: each
  holds every kind of row in the window's share, and long rows of all kinds meet in few of them. A step's lengths are therefore
  more alike than in plain sampling; the paper says nothing on the order. The order of a window's steps is drawn again.
- The rows of a global batch are sorted by bucket and dealt out round by round (micro-batch m of all ranks is round m). A round
  has the largest bucket of its rows, the same on all ranks: the step waits for the longest of them anyway, and no rank compiles
  a graph while the others wait.
- An epoch's last batch is filled up with rows of weight zero, so nothing is lost.

`Loader` gives each rank its micro-batches of every step. Its position is the global step: nothing else need be saved.
"""
import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import grain
import numpy as np
from grain.experimental import index_shuffle

from granvit.config import Bucket, RunConfig
from granvit.data.batch import Batch, Packer, PromptBatch, Question, join, picture, prompt_batch
from granvit.data.chat import Chat
from granvit.data.images import image_tokens, to_views
from granvit.data.lengths import PrefixLengths, TurnLengths
from granvit.data.prompts import Box
from granvit.data.records import Conversation, ImageRecord
from granvit.data.store import CONVERSATIONS, MAX_PIXELS, REGIONS, Store
from granvit.models import VisionConfig
from granvit.stages import TASKS, Task

WINDOW = 32  # steps among which rows are shared out
_CHUNK = 1 << 20  # regions hashed at a time
_THREADS = 4  # that read and decode, in each process
_AHEAD = 8  # micro-batches prepared ahead, in each process
_GOLDEN = 0x9E3779B97F4A7C15
Compose = Callable[[Packer, ImageRecord, Sequence[Question], Bucket], Batch]


def splitmix64(counters: np.ndarray, *key: int) -> np.ndarray:
    """uint64 hash of each counter under a key: output number `counter` of the SplitMix64 generator seeded by the key."""
    state = 0
    for part in key:
        state = int(_finish(np.array([(state ^ part) & (2**64 - 1)], np.uint64))[0])
    with np.errstate(over="ignore"):
        return _finish(np.uint64(state) + counters.astype(np.uint64) * np.uint64(_GOLDEN))


def _finish(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = z + np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


WHOLE = ("global", "conversation")  # tasks about a whole record, not a region of it
_ASK, _ORDER, _SHUFFLE, _BATCHES = range(4)  # what a hash is drawn for


def stratified(classes: np.ndarray, buckets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An order of rows, int64, in which any rows that follow each other hold each class in its share of all, to about one row.

    `classes` and `buckets` are integers per row. Row r of the n of its class, sorted by bucket (what is equal stays in its
    order), stands at (r + u) / n, with u drawn per class: the shortest rows of all classes come first, the longest last.
    """
    by_class = np.lexsort((buckets, classes))
    _, counts = np.unique(classes, return_counts=True)
    place = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_class[np.argsort((place + np.repeat(rng.random(len(counts)), counts)) / np.repeat(counts, counts), kind="stable")]


class Plan:
    """The order of the data: rows, buckets and global batches of every epoch.

    `rates` are the sources' shares, `mix` the tasks'. `rows_per_step` counts rows of the global batch. A row's number is its
    place in the epoch's unshuffled order; -1 is a row of weight zero. Memory: one int64 per image and epoch held (two at most).
    """

    def __init__(
        self,
        stores: Sequence[Store],
        lengths: Sequence[TurnLengths],
        rates: Sequence[float],
        mix: dict[Task, float],
        regions_per_row: int,
        rows_per_step: int,
        buckets: Sequence[Bucket],
        prefixes: Sequence[PrefixLengths],
        seed: int,
    ):
        self._arguments = (stores, lengths, rates, mix, regions_per_row, rows_per_step, buckets, prefixes, seed)
        self.stores, self.lengths, self.prefixes, self.rates, self.mix = stores, lengths, prefixes, rates, mix
        self.K, self.rows_per_step, self.buckets, self.seed = regions_per_row, rows_per_step, buckets, seed
        self._image_starts = np.cumsum([0] + [store.images for store in stores])
        self._region_starts = np.cumsum([0] + [store.regions for store in stores])
        self._tasks = [(index, task) for index, task in enumerate(TASKS) if mix.get(task, 0) > 0]
        self._lock = threading.RLock()  # the reading threads share the tables below
        self._epochs: dict[int, np.ndarray] = {}
        self._epoch_steps: list[int] = []
        self._windows: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def __reduce__(self):
        return Plan, self._arguments

    def steps(self, epochs: int) -> int:
        """Global steps of the first `epochs` epochs."""
        return sum(self.epoch_steps(epoch) for epoch in range(epochs))

    def epoch_steps(self, epoch: int) -> int:
        """Global steps of one epoch; `ValueError` where it asks no question at all."""
        with self._lock:
            while len(self._epoch_steps) <= epoch:
                rows = int(self._row_starts(len(self._epoch_steps))[-1])
                if not rows:
                    paths = ", ".join(str(store.path) for store in self.stores)
                    raise ValueError(f"data.sources ({paths}) hold no question of the tasks mixed: {self.mix}")
                self._epoch_steps.append(-(-rows // self.rows_per_step))
            return self._epoch_steps[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a global step (counted from 0), and the step within it."""
        epoch = 0
        while step >= (steps := self.epoch_steps(epoch)):
            step, epoch = step - steps, epoch + 1
        return epoch, step

    def batch(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Global step -> epoch, and two int64 `[rows_per_step]` of the global batch: the smallest bucket that holds each row (an
        index, rising) and the row numbers."""
        epoch, step = self.locate(step)
        rows, buckets = self._window(epoch, step // WINDOW)
        return epoch, buckets[step % WINDOW], rows[step % WINDOW]

    def contents(self, epoch: int, rows: np.ndarray) -> list[tuple[int, int, list[Question]]]:
        """For each row number: source, image in that source, and its questions in order."""
        source, image = self._images(epoch, rows)[:2]
        row, task, region = self._questions(epoch, rows)
        questions: list[list[Question]] = [[] for _ in rows]
        for r, t, g in zip(row.tolist(), task.tolist(), region.tolist(), strict=True):
            questions[r].append(Question(TASKS[t], None if g < 0 else g))
        return list(zip(source.tolist(), image.tolist(), questions, strict=True))

    def _asked(self, epoch: int, task: int, counters: np.ndarray, rate: float) -> np.ndarray:
        """bool: whether the epoch asks this task about the regions (global task: images) with these global numbers."""
        share = self.mix[TASKS[task]] * rate
        if share >= 1:
            return np.ones(len(counters), bool)
        return (splitmix64(counters, self.seed, epoch, task, _ASK) >> np.uint64(11)) * 2.0**-53 < share

    def _whole_task(self, source: int) -> Task:
        """What is asked about a whole record of a source."""
        return "conversation" if self.stores[source].kind == CONVERSATIONS else "global"

    def _asked_whole(self, epoch: int, source: int, images: np.ndarray) -> np.ndarray:
        """bool: whether the epoch asks the global question, or the conversation, of these images of one source."""
        store, task = self.stores[source], self._whole_task(source)
        if self.mix.get(task, 0) <= 0:
            return np.zeros(len(images), bool)
        number = store.region_starts[images] + images
        present = store.text_ends[number + 1] > store.text_ends[number]
        rate = self.rates[source] if task == "conversation" else 1.0
        return present & self._asked(epoch, TASKS.index(task), self._image_starts[source] + images, rate)

    def _row_starts(self, epoch: int) -> np.ndarray:
        """int64 `[images + 1]`: the epoch's first row of each image, over all sources."""
        with self._lock:
            if epoch not in self._epochs:
                while len(self._epochs) >= 2:
                    self._epochs.pop(next(iter(self._epochs)))
                counts = [self._count_rows(epoch, source) for source in range(len(self.stores))]
                self._epochs[epoch] = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
            return self._epochs[epoch]

    def _count_rows(self, epoch: int, source: int) -> np.ndarray:
        """int64 `[images]`: rows of each image of one source."""
        store, rate = self.stores[source], self.rates[source]
        asked, whole = np.zeros(store.images, np.int64), np.zeros(store.images, bool)
        first = 0
        while first < store.images:
            limit = int(store.region_starts[first]) + _CHUNK
            last = max(int(np.searchsorted(store.region_starts, limit, "right")) - 1, first + 1)
            starts = store.region_starts[first : last + 1].astype(np.int64)
            counters = np.arange(starts[0], starts[-1]) + self._region_starts[source]
            for task, name in self._tasks:
                if name not in WHOLE:
                    running = np.concatenate([[0], np.cumsum(self._asked(epoch, task, counters, rate))])
                    asked[first:last] += np.diff(running[starts - starts[0]])
            whole[first:last] = self._asked_whole(epoch, source, np.arange(first, last))
            first = last
        return asked + whole if self.K == 1 else np.maximum(-(-asked // self.K), whole)

    def _images(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each row number: source, image in it, and the chunk of that image's questions."""
        row_starts = self._row_starts(epoch)
        image = np.searchsorted(row_starts, rows, "right") - 1
        source = np.searchsorted(self._image_starts, image, "right") - 1
        return source, image - self._image_starts[source], rows - row_starts[image]

    def _questions(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All questions of some rows, sorted by row: index into `rows`, task, region in the image (-1: none, always last)."""
        sources, images, chunks = self._images(epoch, rows)
        found = []
        for source in np.unique(sources):
            store, members = self.stores[source], np.flatnonzero(sources == source)
            image, chunk = images[members], chunks[members]
            starts = store.region_starts[image].astype(np.int64)
            counts = store.region_starts[image + 1].astype(np.int64) - starts
            at = np.repeat(np.arange(len(members)), counts)  # row of each region
            region = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
            counters = self._region_starts[source] + starts[at] + region
            candidates = []
            for index, name in self._tasks:
                if name not in WHOLE:
                    asked = self._asked(epoch, index, counters, self.rates[source])
                    order = splitmix64(counters[asked], self.seed, epoch, index, _ORDER)
                    candidates.append((at[asked], np.full(asked.sum(), index), region[asked], order))
            asked = np.zeros(len(members), np.int64)  # region questions of each row's image
            if candidates:
                at, task, region, order = map(np.concatenate, zip(*candidates, strict=True))
                sort = np.lexsort((order, at))
                at, task, region = at[sort], task[sort], region[sort]
                asked = np.bincount(at, minlength=len(members))
                place = np.arange(len(at)) - np.repeat(np.cumsum(asked) - asked, asked)
                mine = place // self.K == chunk[at]
                found.append((members[at[mine]], task[mine], region[mine]))
            whole = self._asked_whole(epoch, source, image) & (chunk == (asked if self.K == 1 else 0))
            index = TASKS.index(self._whole_task(source))
            found.append((members[whole], np.full(whole.sum(), index), np.full(whole.sum(), -1)))
        row, task, region = map(np.concatenate, zip(*found, strict=True))
        sort = np.argsort(row, kind="stable")
        return row[sort], task[sort], region[sort]

    def _kinds(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each row its class (a number: its source, whether it has an image, and how often it asks each task) and the index
        of the smallest bucket that holds it; the largest where none does (what is too long is counted there)."""
        sources, images, _ = self._images(epoch, rows)
        row, task, region = self._questions(epoch, rows)
        tokens, answers, pictured = (np.zeros(len(rows), np.int64) for _ in range(3))
        for source in np.unique(sources):
            own = sources == source
            tokens[own], pictured[own] = self.prefixes[source].of(images[own]), self.prefixes[source].pictured(images[own])
            mine = sources[row] == source
            image = images[row[mine]]
            text = self.stores[source].region_starts[image] + image + 1 + region[mine]  # region -1: the global caption
            turn_tokens, turn_answers = self.lengths[source].of(task[mine], text)
            np.add.at(tokens, row[mine], turn_tokens)
            np.add.at(answers, row[mine], turn_answers)
        asked = np.bincount(row * len(TASKS) + task, minlength=len(rows) * len(TASKS)).reshape(len(rows), -1)
        classes = np.unique(np.column_stack([sources, pictured, asked]), axis=0, return_inverse=True)[1].reshape(-1)
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
        steps = np.append(rng.permutation(whole), np.arange(whole, len(rows)))[:, None]  # what is filled up stays the last
        sort = np.argsort(buckets[steps[:, 0]], axis=1, kind="stable")
        return rows[steps, sort], np.maximum(buckets[steps, sort], 0)


class _Assembler:
    """Number of a micro-batch of one rank -> its arrays. Goes to the reading processes."""

    def __init__(self, plan: Plan, packer: Packer, compose: Compose, rank: int, world: int, micro_batch: int, micro_batches: int):
        self.plan, self.packer, self.compose = plan, packer, compose
        self.rank, self.world, self.micro_batch, self.micro_batches = rank, world, micro_batch, micro_batches

    def __call__(self, number: int) -> dict:
        step, micro = divmod(int(number), self.micro_batches)
        epoch, buckets, rows = self.plan.batch(step)
        each = self.micro_batch
        in_round = slice(micro * self.world * each, (micro + 1) * self.world * each)
        bucket = self.plan.buckets[int(buckets[in_round].max())]
        rows = rows[in_round][self.rank * each : (self.rank + 1) * each]
        present = rows[rows >= 0]
        contents = iter(self.plan.contents(epoch, present) if len(present) else [])
        return vars(join([self._row(*next(contents), bucket) if row >= 0 else self.packer.empty(bucket) for row in rows]))

    def _row(self, source: int, image: int, questions: list[Question], bucket: Bucket) -> Batch:
        store = self.plan.stores[source]
        try:
            record = store.record(image)
        except ValueError as error:
            return self.packer.empty(bucket, ((f"{store.path} image {image}", str(error)),))
        if isinstance(record, Conversation):
            return self.packer.conversation_row(record, bucket)
        return self.compose(self.packer, record, questions, bucket)


class Loader:
    """This rank's micro-batches of every global step.

    `steps` is the run's number of steps (`train.steps`, or all of the epochs). `compose` makes a row of a record and its
    questions; the default packs the image. Over all ranks, a step's rows are the same for any number of ranks and any
    `train.micro_batch`, and so is what is left out of them: each is packed in at least its own bucket. How far they are padded
    is not.
    """

    def __init__(
        self, config: RunConfig, vision: VisionConfig, chat: Chat, rank: int, world: int, compose: Compose = Packer.row
    ):
        stage = config.stage_spec
        wrong = {task: share for task, share in stage.mix.items() if not 0 <= share <= 1}
        if wrong:
            raise ValueError(f"data.mix states shares between 0 and 1, not {wrong}")
        for which, bucket, tokens in (("shortest", 0, int(image_tokens(1, 1, vision))), ("longest", -1, vision.image_tokens)):
            length, prefix = config.data.buckets[bucket].length, chat.prefix_length(tokens)
            if length <= prefix:
                raise ValueError(
                    f"data.buckets: the {which}, {length} tokens, leaves no room after the prefix of {prefix} ({tokens} of them "
                    f"the image's)"
                )
        answers = [bucket.answers for bucket in config.data.buckets]
        if answers != sorted(answers):
            raise ValueError(f"data.buckets: answers must not fall as length rises: {answers}")
        stores = [Store(source.path) for source in config.data.sources]
        asked = frozenset(task for task, share in stage.mix.items() if share > 0)
        for store in stores:
            if asked and not asked.intersection(store.kind.tasks):
                kind = store.kind.format
                raise ValueError(f"data.sources: {store.path} is a {kind} store and holds none of the tasks mixed: {stage.mix}")
        held = {task for store in stores for task in store.kind.tasks}
        if never := [task for task in TASKS if task in asked - held]:
            paths = ", ".join(str(store.path) for store in stores)
            raise ValueError(
                f"data.mix asks {', '.join(never)}, which no store of data.sources ({paths}) holds; name a store that does, or "
                f"set the share to 0"
            )
        self.plan = Plan(
            stores,
            [TurnLengths(store, chat, asked) for store in stores],
            [source.rate for source in config.data.sources],
            stage.mix,
            config.data.regions_per_row,
            config.train.global_batch // config.data.regions_per_row,
            config.data.buckets,
            [PrefixLengths(store, chat, vision) for store in stores],
            config.seed,
        )
        self.steps = config.train.steps or self.plan.steps(config.train.epochs)
        self.micro_batches = config.local_micro_batches(world)
        self._workers = config.data.workers
        self._assemble = _Assembler(
            self.plan,
            Packer(
                *(vision, chat, config.boxes_per_row, config.crop_size(vision)), config.distill.crop_scale, config.data.max_pixels
            ),
            *(compose, rank, world, config.train.micro_batch, self.micro_batches),
        )

    def batches(self, start_step: int = 0) -> Generator[list[Batch], None, None]:
        """Micro-batches of steps `start_step`, `start_step` + 1, ... to the last, read and decoded ahead.

        Close the iterator (or let it run out) to end its reading processes; they also end when this process is gone.
        """
        if start_step >= self.steps:
            return
        dataset = grain.MapDataset.range(start_step * self.micro_batches, self.steps * self.micro_batches).map(self._assemble)
        reading = dataset.to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD))
        reading = reading.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=self._workers), worker_init_fn=partial(_reading_process, os.getpid())
        )
        elements = iter(reading)
        atexit.register(elements.close)  # an iterator left open at exit is ended before Python takes itself apart
        try:
            for _ in range(start_step, self.steps):
                yield [Batch(**next(elements)) for _ in range(self.micro_batches)]
        finally:
            elements.close()
            atexit.unregister(elements.close)


def _reading_process(parent: int, index: int, count: int) -> None:
    """A reading process ends with its parent, however that ends, and leaves Ctrl-C and SIGTERM to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


HeldOut = tuple[str, Task, str, str, Box | None]  # record id, task, question, reference answer, box


def held_out(
    store: Store,
    tasks: Sequence[Task],
    chat: Chat,
    vision: VisionConfig,
    batch: int,
    images: int,
    rank: int = 0,
    world: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[PromptBatch, list[HeldOut]]]:
    """Every question of `tasks` about `images` images spread evenly over the store, in batches of one shape.

    Batch b goes to rank b mod `world`. The last batch is filled up by repeating its last question; its list is shorter than the
    arrays. `ValueError` names a record that cannot be read: a score over fewer questions would not be comparable.
    """
    if store.kind != REGIONS:
        raise ValueError(f"eval.source {store.path} is a {store.kind.format} store; held-out questions are about regions")
    chosen = np.unique(np.linspace(0, store.images - 1, min(images, store.images)).round().astype(int)).tolist()
    items: list[tuple[int, HeldOut]] = []
    sizes: dict[int, tuple[int, int]] = {}
    for image in chosen:
        record = _held_out_record(store, image)
        sizes[image] = record.width, record.height
        for task in tasks:
            if task == "global":
                asked = [Question(task)] if record.global_caption is not None else []
            else:
                asked = [Question(task, region) for region in range(len(record.regions))]
            for question in asked:
                box = None if question.region is None else record.regions[question.region].box
                items.append((image, (record.id, task, *question.turn(record), box)))
    if not items:
        raise ValueError(f"store {store.path}: no question of the tasks {list(tasks)} to evaluate")
    lengths = chat.question_lengths([item[2] for _, item in items])
    tokens = {image: int(image_tokens(*size, vision)) for image, size in sizes.items()}
    length = max(chat.prefix_length(tokens[image]) + question for (image, _), question in zip(items, lengths, strict=True))
    for first in range(rank * batch, len(items), world * batch):
        part = items[first : first + batch]
        rows = part + [part[-1]] * (batch - len(part))
        pixels = {}
        for image, (record_id, *_) in part:
            if image not in pixels:
                try:
                    pixels[image] = to_views(picture(_held_out_record(store, image), max_pixels), vision)
                except ValueError as error:
                    raise ValueError(f"store {store.path}: held-out record {record_id}: {error}") from None
        pixels_B3RR = np.stack([pixels[image] for image, _ in rows])
        shown, questions = [sizes[image] for image, _ in rows], [item[2] for _, item in rows]
        yield prompt_batch(pixels_B3RR, questions, chat, vision, length, shown), [item for _, item in part]


def _held_out_record(store: Store, image: int) -> ImageRecord:
    try:
        record = store.record(image)
    except ValueError as error:
        raise ValueError(f"store {store.path}: held-out image {image}: {error}") from None
    assert isinstance(record, ImageRecord)  # the store is one of regions
    return record
