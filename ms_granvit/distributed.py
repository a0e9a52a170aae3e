"""Data parallelism under msrun: the process group, and sums over ranks."""
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication, nn, ops

from granvit.cost import host_memory

ASCEND_910B = 64 * 10**9  # bytes
# Seconds that a rank waits for another: in a collective (CANN's default, 1836, could end a run whose rank 0 writes large start
# weights; with its AIV expansion CANN allows 1091 at most, whatever is set), and to connect (default 120: ranks compile the first
# step's graph for unlike times). A rank that has died is noticed by the watchers (granvit.watcher), not by this.
HCCL_TIMEOUTS = {"HCCL_EXEC_TIMEOUT": "17340", "HCCL_CONNECT_TIMEOUT": "7200"}
ROW, SHORT = 1024, 65536  # numbers in a row; vectors of so many are summed at once
CHUNK = 1 << 26  # elements that one all-reduce joins (256 MiB of float32)


def choose_device(name: str) -> str:
    """cpu or npu; `auto` takes the accelerator that is there. `ValueError` where the named one is not."""
    if name == "cuda":
        raise ValueError("runtime.device cuda: MindSpore runs on cpu and npu here; for CUDA use --framework torch")
    if name == "cpu":
        return "cpu"
    found = ms.get_context("device_target") == "Ascend"  # the default is what the installation supports
    if name == "npu" and not found:
        raise ValueError("runtime.device npu: MindSpore sees no Ascend device; install CANN or use runtime.device=cpu")
    return "npu" if found else "cpu"


def use_device(name: str) -> str:
    """Chooses a device as `choose_device` does and makes it MindSpore's."""
    device = choose_device(name)
    target = "Ascend" if device == "npu" else "CPU"
    if ms.get_context("device_target") != target:  # refused once a kernel has run, even where nothing would change
        ms.set_device(target)
    return device


def memory(name: str) -> int:
    """Bytes of the device that `name` chooses; of the machine for cpu, whose ranks share them. For npu those of a 910B: MindSpore
    knows a device's only once it is in use."""
    return host_memory() if choose_device(name) == "cpu" else ASCEND_910B


class Ranks:
    """`granvit.engine.Ranks` over msrun's process group. `sum` is the graph that sums small vectors (None: one rank alone)."""

    def __init__(self, rank: int, world: int, device: str):
        self.rank, self.world, self.device = rank, world, device
        self.sum = AllSum() if world > 1 else None

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small float32 vector over the ranks; compiled once for each length."""
        values = values.astype(np.float32)
        return values if self.sum is None else self.sum(Tensor(values)).asnumpy()

    def leave(self) -> None:
        """Leaves the process group."""
        if self.world > 1:
            communication.release()


def join(name: str) -> Ranks:
    """Selects the device that `name` chooses and joins msrun's process group where there is one."""
    device = choose_device(name)
    if device == "npu":
        ms.set_device("Ascend")
    elif ms.get_context("device_target") != "CPU":  # refused once a kernel has run, even where nothing would change
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
    """Lends all cores to a process that is kept on one (`msrun --bind_core` on a small machine); several are left as they are.

    By MindSpore's log a connection counts only if the main thread has noted it before the event loop does. On one core it
    mostly has not, and every attempt lost costs half a second.
    """
    bound = os.sched_getaffinity(0)
    if len(bound) > 1:
        yield
        return
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield
    for thread in os.listdir("/proc/self/task"):  # those that were started meanwhile, too
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), bound)


def chunks(sizes: list[int]) -> tuple[tuple[int, ...], ...]:
    """Indices of consecutive tensors grouped until a group holds `CHUNK` elements."""
    groups, filled = [[]], 0
    for i, size in enumerate(sizes):
        if groups[-1] and filled + size > CHUNK:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += size
    return tuple(tuple(group) for group in groups)


class AllSum(nn.Cell):
    """Sum of one vector over the ranks, of which there are at least two."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.reduce = ops.AllReduce()

    def construct(self, vector: Tensor) -> Tensor:
        return self.reduce(vector)


class SumOfSquares(nn.Cell):
    """Sum of the squares of a vector, always in the same order.

    MindSpore's reduction on CPU times itself with several partitions and keeps the fastest: the sum of a long vector (more than
    100,000 numbers) changes in its last bit from launch to launch. There rows are summed first, whose order is fixed.
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
        """Sums of rows of `ROW` numbers, and the sum of what is left over."""
        whole = values.shape[0] // ROW * ROW
        rest = 0.0 if whole == values.shape[0] else ops.sum(values[whole:])
        return ops.sum(values[:whole].reshape(-1, ROW), -1), rest


class ReduceGradients(nn.Cell):
    """Sums the accumulated gradients over the ranks, in place, joined into few large all-reduces, and a vector of loss terms.

    Returns one vector for the host to read, the summed terms and then the gradients' global norm; and that norm by itself.
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
