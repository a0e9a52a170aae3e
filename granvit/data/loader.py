"""The Grain pipeline that builds each rank's micro-batches in the order that `granvit.data.sampler` determines.

The rows of a global batch are sorted by bucket and split into rounds: round m has micro-batch m of every rank. All rows of a
round are padded to the largest bucket among them, on all ranks alike: a step waits for the slowest rank anyway, and with one
shape no rank compiles a graph while the others wait.

The loader's only state is the global step, so no further position is saved in a checkpoint.
"""
import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial

import grain

from granvit.config import Bucket, RunConfig
from granvit.data.batch import Batch, Packer, Question, join
from granvit.data.chat import Chat
from granvit.data.images import image_tokens
from granvit.data.lengths import PrefixLengths, TurnLengths
from granvit.data.records import Conversation, ImageRecord
from granvit.data.sampler import Plan
from granvit.data.store import Store
from granvit.models import VisionConfig
from granvit.stages import TASKS

_THREADS = 4  # reading and decoding threads per process
_AHEAD = 8  # micro-batches prepared ahead per process
Compose = Callable[[Packer, ImageRecord, Sequence[Question], Bucket], Batch]


class _Assembler:
    """Maps the number of one of a rank's micro-batches to its arrays. Sent to the reading processes."""

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

    `steps` is the number of steps of the run (`train.steps`, or that of all epochs). `compose` builds a row from a record and its
    questions; the default is `Packer.row`. The set of rows of a step does not depend on the number of ranks or on
    `train.micro_batch`; neither does what is left out of them, because each row gets at least the bucket it needs. The length
    that rows are padded to does depend on both.

    `ValueError` if `data.mix`, `data.buckets` and `data.sources` do not fit each other or the model.
    """

    def __init__(
        self, config: RunConfig, vision: VisionConfig, chat: Chat, rank: int, world: int, compose: Compose = Packer.row
    ):
        stage = config.stage_spec
        out_of_range = {task: share for task, share in stage.mix.items() if not 0 <= share <= 1}
        if out_of_range:
            raise ValueError(f"data.mix: shares must be between 0 and 1, not {out_of_range}")
        for which, bucket, tokens in (("shortest", 0, int(image_tokens(1, 1, vision))), ("longest", -1, vision.image_tokens)):
            length, prefix = config.data.buckets[bucket].length, chat.prefix_length(tokens)
            if length <= prefix:
                raise ValueError(
                    f"data.buckets: the {which}, {length} tokens, leaves no room after the prefix of {prefix} ({tokens} of them "
                    f"image tokens); raise its length"
                )
        answers = [bucket.answers for bucket in config.data.buckets]
        if answers != sorted(answers):
            raise ValueError(f"data.buckets: a longer bucket must not have fewer answers: {answers}")
        stores = [Store(source.path) for source in config.data.sources]
        asked = frozenset(task for task, share in stage.mix.items() if share > 0)
        for store in stores:
            if asked and not asked.intersection(store.kind.tasks):
                kind = store.kind.format
                raise ValueError(f"data.sources: {store.path} is a {kind} store and holds none of the tasks mixed: {stage.mix}")
        tasks_held = {
            task
            for store, source in zip(stores, config.data.sources, strict=True)
            for task in store.kind.tasks
            if source.count is None or source.count.get(task, 0) > 0
        }
        if never_asked := [task for task in TASKS if task in asked - tasks_held]:
            paths = ", ".join(str(store.path) for store in stores)
            raise ValueError(
                f"data.mix asks {', '.join(never_asked)}, which no store of data.sources ({paths}) holds or states a count for; "
                f"name a store that does, or set the share to 0"
            )
        self.plan = Plan(
            stores,
            [TurnLengths(store, chat, asked) for store in stores],
            config.data.sources,
            stage.mix,
            config.data.regions_per_row,
            config.train.global_batch,
            config.data.buckets,
            [PrefixLengths(store, chat, vision) for store in stores],
            config.seed,
        )
        self.steps = config.train.steps or self.plan.steps(config.train.epochs)
        self.micro_batches = config.local_micro_batches(world)
        self._workers = config.data.workers
        boxes, crop_size = config.boxes_per_row, config.crop_size(vision)
        packer = Packer(vision, chat, boxes, crop_size, config.distill.crop_scale, config.data.max_pixels)
        self._assemble = _Assembler(self.plan, packer, compose, rank, world, config.train.micro_batch, self.micro_batches)

    def batches(self, start_step: int = 0) -> Generator[list[Batch], None, None]:
        """Yields the micro-batches of steps `start_step`, `start_step` + 1, ... up to the last; reads and decodes ahead.

        The reading processes end when the iterator is exhausted or closed, and when this process ends.
        """
        if start_step >= self.steps:
            return
        dataset = grain.MapDataset.range(start_step * self.micro_batches, self.steps * self.micro_batches).map(self._assemble)
        reading = dataset.to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD))
        reading = reading.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=self._workers), worker_init_fn=partial(_reading_process, os.getpid())
        )
        elements = iter(reading)
        atexit.register(elements.close)  # an open iterator must be closed before the interpreter shuts down
        try:
            for _ in range(start_step, self.steps):
                yield [Batch(**next(elements)) for _ in range(self.micro_batches)]
        finally:
            elements.close()
            atexit.unregister(elements.close)


def _reading_process(parent: int, index: int, count: int) -> None:
    """Set-up of a reading process: it ends when its parent ends for any reason, and ignores Ctrl-C and SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
