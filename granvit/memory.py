"""Device memory: a check before the start that the model fits, and error messages for out-of-memory errors that name the
overrides with which a step needs less memory."""
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from granvit.checkpoint.run import newest_step
from granvit.config import RunConfig, largest_divisor
from granvit.cost import NUMBERS_IN_UPDATE, activation_bytes, state_bytes
from granvit.models import LanguageConfig, VisionConfig, parameter_shapes, part_of
from granvit.trainer import TrainingStopped

OUT_OF_MEMORY = re.compile(
    r"out of memory|memory isn't enough|memory not enough|(can't|cannot) allocate memory|alloc.{0,40}failed", re.IGNORECASE
)
_COMPUTE_BYTES = {"float64": 8, "float32": 4}  # of the others 2


def predicted_memory(config: RunConfig, vision: VisionConfig, language: LanguageConfig, framework: str) -> tuple[int, int]:
    """Bytes on every device, by formula: weights, gradients and moments; and the peak of a training step on `train.micro_batch`
    rows of the largest bucket. The peak is that of forward and backward pass or of the update. PyTorch's update needs one float32
    array of `NUMBERS_IN_UPDATE`, MindSpore's one of the size of the trained weights. See docs/memory.md."""
    stage, bucket = config.stage_spec, config.data.buckets[-1]
    state = state_bytes(vision, language, stage.trains, stage.distill, _COMPUTE_BYTES.get(config.runtime.compute, 2))
    passes = activation_bytes(
        *(vision, language, stage.trains, config.train.micro_batch, bucket.length, bucket.answers),
        recompute=config.runtime.recompute,
        framework=framework,
    )
    shapes = parameter_shapes(vision, language)
    trained = sum(math.prod(shape) for name, shape in shapes.items() if part_of(name) in stage.trains)
    update = 4 * (min(trained, NUMBERS_IN_UPDATE) if framework == "torch" else trained)
    return state, state + max(sum(passes), update)


def check_memory(config: RunConfig, vision: VisionConfig, language: LanguageConfig, memory: int) -> None:
    """`ValueError` if weights, gradients and optimizer states alone exceed a device's `memory` (bytes)."""
    stage, compute = config.stage_spec, _COMPUTE_BYTES.get(config.runtime.compute, 2)
    needed = state_bytes(vision, language, stage.trains, stage.distill, compute)
    if needed > memory:
        raise ValueError(
            f"{config.stage} of {vision.name!r} with {language.name!r} needs about {needed / 1e9:.0f} GB a device for weights, "
            f"gradients and AdamW's moments, all replicated, and this device has {memory / 1e9:.0f} GB. Sharding them is "
            f"not implemented: take a smaller model.language, or devices with more memory"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error says that memory ran out. There is no common type (PyTorch's differs by device, MindSpore raises
    RuntimeError), so the message is compared with the frameworks' wordings."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


NOTHING_SMALLER = (
    "train.micro_batch is 1 already (or fixed by train.loss_reduction=per_device) and runtime.recompute is true already; "
    "take shorter data.buckets or a smaller model"
)


def smaller_steps(config: RunConfig, ranks: int) -> list[str]:
    """Overrides with which a step needs less memory and gives the same results up to rounding. With `train.loss_reduction:
    per_device` results depend on `train.micro_batch`, so it is not among them."""
    rows = config.train.micro_batch * config.local_micro_batches(ranks)
    overrides = []
    if config.train.micro_batch > 1 and config.train.loss_reduction == "global":
        overrides.append(f"train.micro_batch={largest_divisor(rows, config.train.micro_batch // 2)}")
    if not config.runtime.recompute:
        overrides.append("runtime.recompute=true")
    return overrides


@contextmanager
def memory_errors(where: Callable[[], str], run: Path, overrides: list[str], nothing_smaller: str) -> Iterator[None]:
    """Turns an out-of-memory error into `TrainingStopped` with one line: where it happened, which of `overrides` need less
    memory, and the step from which the run then resumes. Without `overrides` the line ends with `nothing_smaller`."""
    try:
        yield
    except TrainingStopped:  # raised by an inner `memory_errors`, with its own place and remedy
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = (str(error).strip() or "MemoryError").splitlines()[0]
        saved = newest_step(run)
        resumes_from = "the start" if saved is None else f"step {saved}"
        options = " or ".join(overrides)
        remedy = f"the same command with {options} resumes from {resumes_from}, with the same results up to rounding"
        raise TrainingStopped(f"out of memory {where()} ({message}): {remedy if overrides else nothing_smaller}") from error
