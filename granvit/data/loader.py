"""The Grain pipeline that turns the order of the data (`granvit.data.sampler`) into each rank's micro-batches.

The rows of a global batch are sorted by bucket and dealt out round by round (micro-batch m of all ranks is round m). A round has
the largest bucket of its rows, the same on all ranks: the step waits for the longest of them anyway, and no rank compiles a graph
while the others wait.

`Loader` gives each rank its micro-batches of every step. Its position is the global step: nothing else need be saved.
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

_THREADS = 4  # that read and decode, in each process
_AHEAD = 8  # micro-batches prepared ahead, in each process
Compose = Callable[[Packer, ImageRecord, Sequence[Question], Bucket], Batch]


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
        out_of_range = {task: share for task, share in stage.mix.items() if not 0 <= share <= 1}
        if out_of_range:
            raise ValueError(f"data.mix states shares between 0 and 1, not {out_of_range}")
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
        tasks_held = {task for store in stores for task in store.kind.tasks}
        if never_asked := [task for task in TASKS if task in asked - tasks_held]:
            paths = ", ".join(str(store.path) for store in stores)
            raise ValueError(
                f"data.mix asks {', '.join(never_asked)}, which no store of data.sources ({paths}) holds; name a store that "
                f"does, or set the share to 0"
            )
        self.plan = Plan(
            stores,
            [TurnLengths(store, chat, asked) for store in stores],
            [source.rate for source in config.data.sources],
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
