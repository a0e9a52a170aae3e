"""Data parallelism under msrun: the process group, and sums over ranks."""
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication, nn, ops

from granvit.cost import host_memory

ASCEND_910B = 64 * 10**9  # bytes
# Timeouts in seconds. In a collective: CANN's default, 1836, could end a run while rank 0 writes large start weights. (With AIV
# expansion CANN allows at most 1091, whatever is set.) When connecting: the default, 120, is too short where ranks need unequal
# time to compile the first step's graph. A rank that has died is detected by granvit.watcher, not by these timeouts.
HCCL_TIMEOUTS = {"HCCL_EXEC_TIMEOUT": "17340", "HCCL_CONNECT_TIMEOUT": "7200"}
ROW, SHORT = 1024, 65536  # elements of one partial sum; longest vector that is summed in one reduction
CHUNK = 1 << 26  # elements in one joined all-reduce (256 MiB of float32)


def choose_device(name: str) -> str:
    """The device to use: cpu or npu. `auto` is the accelerator if there is one. `ValueError` if a named one is missing."""
    if name == "cuda":
        raise ValueError("runtime.device cuda: MindSpore runs on cpu and npu here; for CUDA use --framework torch")
    if name == "cpu":
        return "cpu"
    found = ms.get_context("device_target") == "Ascend"  # the default is what the installation supports
    if name == "npu" and not found:
        raise ValueError("runtime.device npu: MindSpore finds no Ascend device; install CANN or use runtime.device=cpu")
    return "npu" if found else "cpu"


def use_device(name: str) -> str:
    """Chooses a device as `choose_device` does and makes it MindSpore's device for this process."""
    device = choose_device(name)
    target = "Ascend" if device == "npu" else "CPU"
    if ms.get_context("device_target") != target:  # set_device fails once a kernel has run, even for the same device
        ms.set_device(target)
    return device


def memory(name: str) -> int:
    """Memory of the device that `name` chooses, in bytes. For cpu it is the machine's memory, which all its ranks share. For npu
    it is that of a 910B, because MindSpore reports a device's memory only once the device is in use."""
    return host_memory() if choose_device(name) == "cpu" else ASCEND_910B


class Ranks:
    """`granvit.engine.Ranks` over msrun's process group. `sum` is the graph that sums small vectors (None for a single rank)."""

    def __init__(self, rank: int, world: int, device: str):
        self.rank, self.world, self.device = rank, world, device
        self.sum = AllSum() if world > 1 else None

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small float32 vector over the ranks; compiled once for each length."""
        values = values.astype(np.float32)
        return values if self.sum is None else self.sum(Tensor(values)).asnumpy()

    def leave(self) -> None:
        """Leaves the process group. MindSpore does the rest when the interpreter exits."""
        if self.world > 1:
            communication.release()
            _other_threads_first(self.rank)


def join(name: str) -> Ranks:
    """Selects the device that `name` chooses. In a process that msrun started, joins its process group."""
    device = choose_device(name)
    if device == "npu":
        ms.set_device("Ascend")
    elif ms.get_context("device_target") != "CPU":  # set_device fails once a kernel has run, even for the same device
        ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
    if "MS_WORKER_NUM" not in os.environ:
        return Ranks(0, 1, device)
    if device == "npu":
        for variable, seconds in HCCL_TIMEOUTS.items():
            os.environ.setdefault(variable, seconds)
    with _more_than_one_core():
        communication.init()
    return Ranks(communication.get_rank(), communication.get_group_size(), device)


@contextmanager
def _more_than_one_core() -> Iterator[None]:
    """Inside the block, a process that is bound to one core (`msrun --bind_core` on a small machine) may use all cores. A process
    with several cores is left alone.

    According to its log, MindSpore accepts a connection only if the main thread registers it before the event loop handles it. On
    a single core this mostly fails, and each failed attempt costs half a second.
    """
    bound = os.sched_getaffinity(0)
    if len(bound) > 1:
        yield
        return
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield
    for thread in os.listdir("/proc/self/task"):  # also those started inside the block
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), bound)


def _other_threads_first(rank: int) -> None:
    """From here on, this thread waits for the other threads of the process: all share one core, and a `SCHED_BATCH` thread does
    not interrupt another one when it wakes up.

    When the interpreter exits, MindSpore's main thread leaves the cluster and deletes its connection as soon as the scheduler's
    answer is there, even if the thread that received the answer is still inside its handler. That thread then reads freed memory:
    of 17 pairs of ranks that only joined and left, on two busy cores, 4 ended with a segmentation fault; with this, none of 37.
    """
    cores = sorted(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended, or the container does not allow this
            os.sched_setaffinity(int(thread), {cores[rank % len(cores)]})
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def chunks(sizes: list[int]) -> tuple[tuple[int, ...], ...]:
    """Indices of consecutive tensors in groups of at most `CHUNK` elements; a larger tensor forms a group of its own."""
    groups, filled = [[]], 0
    for i, size in enumerate(sizes):
        if groups[-1] and filled + size > CHUNK:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += size
    return tuple(tuple(group) for group in groups)


class AllSum(nn.Cell):
    """Sum of one vector over at least two ranks."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.reduce = ops.AllReduce()

    def construct(self, vector: Tensor) -> Tensor:
        return self.reduce(vector)


class SumOfSquares(nn.Cell):
    """Sum of the squares of a vector, always added in the same order.

    On CPU, MindSpore's reduction times several partitions of its work and keeps the fastest. The sum of a long vector (more than
    100,000 elements) therefore changes in its last bit from launch to launch. So on CPU the vector is first summed in rows, whose
    order of additions is fixed.
    """

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.in_rows = ms.get_context("device_target") == "CPU"

    def construct(self, vector: Tensor) -> Tensor:
        values, rest = ops.square(vector), 0.0
        if self.in_rows and values.shape[0] > SHORT:
            values, rest = self.fold(values)
            if values.shape[0] > SHORT:
                values, more = self.fold(values)
                rest = rest + more
        return ops.sum(values) + rest

    def fold(self, values: Tensor) -> tuple[Tensor, Tensor | float]:
        """Sums of rows of `ROW` elements, and the sum of the remaining elements."""
        whole = values.shape[0] // ROW * ROW
        if whole == values.shape[0]:  # a slice of the whole vector would be copied, slowly
            return ops.sum(values.reshape(-1, ROW), -1), 0.0
        return ops.sum(values[:whole].reshape(-1, ROW), -1), ops.sum(values[whole:])


class ReduceGradients(nn.Cell):
    """Sums over the ranks the accumulated gradients, in place and joined into few large all-reduces, and a vector of loss terms.

    Returns a vector of the summed terms followed by the global norm of the gradients, so that the host reads only once; and the
    norm again as a scalar.
    """

    def __init__(self, gradients: ms.ParameterTuple, world: int):
        super().__init__(auto_prefix=False)
        self.gradients = gradients
        self.reduce = ops.AllReduce() if world > 1 else None
        self.sum_of_squares = SumOfSquares()
        self.chunks = chunks([g.size for g in gradients])

    def construct(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        squares = 0.0
        if self.reduce is None:
            for i in range(len(self.gradients)):
                squares = squares + self.sum_of_squares(self.gradients[i].reshape(-1))
            norm = ops.sqrt(squares)
            return ops.cat((terms, norm.reshape(1))), norm
        for chunk in self.chunks:
            joined = ()
            for i in chunk:
                joined += (self.gradients[i].reshape(-1),)
            flat = self.reduce(ops.cat(joined))
            squares = squares + self.sum_of_squares(flat)
            first = 0
            for i in chunk:
                ops.assign(self.gradients[i], flat[first : first + self.gradients[i].size].reshape(self.gradients[i].shape))
                first += self.gradients[i].size
        norm = ops.sqrt(squares)
        return ops.cat((self.reduce(terms), norm.reshape(1))), norm
