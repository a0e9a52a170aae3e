"""scripts/stage1.py with a framework's engine whose loss is NaN on one rank in some steps: `POISON=RANK:STEP,STEP,...`."""
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np

from granvit import launch, train
from granvit.data.batch import Batch
from granvit.data.loader import Loader


class PoisonedLoader(Loader):
    """A loader that keeps in `step` the step of its newest batches."""

    def batches(self, start_step: int = 0) -> Iterator[list[Batch]]:
        with closing(super().batches(start_step)) as inner:
            for PoisonedLoader.step, batches in enumerate(inner, start_step + 1):
                yield batches


def poisoned_engine_class(framework: str):
    """The framework's engine, which multiplies the answers' weights by NaN in the given steps. The counts of tokens, which the
    trainer passes, are not changed."""
    of_rank, _, steps = os.environ["POISON"].partition(":")

    class Engine(launch.load_engine_class(framework)):
        def step(self, micro_batches, step_inputs):
            if self.rank == int(of_rank) and str(PoisonedLoader.step) in steps.split(","):
                micro_batches = [replace(batch, answer_weights_BA=batch.answer_weights_BA * np.nan) for batch in micro_batches]
            return super().step(micro_batches, step_inputs)

    return Engine


if __name__ == "__main__":
    train.Loader, train.load_engine_class = PoisonedLoader, poisoned_engine_class
    sys.exit(train.train_command("stage1", sys.argv[1:]))
