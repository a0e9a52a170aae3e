"""A device's memory: a model that does not fit is refused; what says that memory ran out is known by its words, with the override
that cures it."""
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from granvit.checkpoint.run import newest_step
from granvit.config import RunConfig, largest_divisor
from granvit.cost import state_bytes
from granvit.models import LanguageConfig, VisionConfig
from granvit.trainer import TrainingStopped

OUT_OF_MEMORY = re.compile(
    r"out of memory|memory isn't enough|memory not enough|(can't|cannot) allocate memory|alloc.{0,40}failed", re.IGNORECASE
)


def check_memory(config: RunConfig, vision: VisionConfig, language: LanguageConfig, memory: int) -> None:
    """`ValueError` where a device's `memory` (bytes) does not even hold weights and optimizer."""
    stage, compute = config.stage_spec, {"float64": 8, "float32": 4}.get(config.runtime.compute, 2)
    needed = state_bytes(vision, language, stage.trains, stage.distill, compute)
    if needed > memory:
        raise ValueError(
            f"{config.stage} of {vision.name!r} with {language.name!r} needs about {needed / 1e9:.0f} GB a device for weights, "
            f"gradients and AdamW's moments, all replicated, and this device has {memory / 1e9:.0f} GB. Sharded optimizer states "
            f"are not here yet: take a smaller model.language, or devices with more memory"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or a framework ran out of memory. They have no type in common: PyTorch raises one by device, MindSpore a
    RuntimeError. The words are theirs."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


NOTHING_SMALLER = (
    "train.micro_batch is 1 (or fixed by train.loss_reduction per_device) and runtime.recompute true already; "
    "take shorter data.buckets or a smaller model"
)


def smaller_steps(config: RunConfig, ranks: int) -> list[str]:
    """The overrides with which a step takes less memory and gives the same results to rounding: not `train.micro_batch` where
    losses are averaged by micro-batch (`train.loss_reduction: per_device`)."""
    rows = config.train.micro_batch * config.local_micro_batches(ranks)
    overrides = []
    if config.train.micro_batch > 1 and config.train.loss_reduction == "global":
        overrides.append(f"train.micro_batch={largest_divisor(rows, config.train.micro_batch // 2)}")
    if not config.runtime.recompute:
        overrides.append("runtime.recompute=true")
    return overrides


@contextmanager
def memory_errors(where: Callable[[], str], run: Path, overrides: list[str], nothing_smaller: str) -> Iterator[None]:
    """Turns what says that memory ran out into `TrainingStopped` with one line: where, which override cures it, and the step that
    the run then goes on from; without `overrides`, `nothing_smaller`."""
    try:
        yield
    except TrainingStopped:  # of an inner `memory_errors`: it has named the place already
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = (str(error).strip() or "MemoryError").splitlines()[0]
        saved = newest_step(run)
        resumes_from = "the start" if saved is None else f"step {saved}"
        remedy = f"the same command with {' or '.join(overrides)} goes on from {resumes_from}, with the same results to rounding"
        raise TrainingStopped(f"out of memory {where()} ({message}): {remedy if overrides else nothing_smaller}") from error
