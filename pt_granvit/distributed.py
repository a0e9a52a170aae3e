"""Data parallelism under torchrun: the process group, and sums over ranks.

Gradients are summed on the devices. Small vectors on the host (counts, flags) are summed with gloo, so that they need no copy to
the device and do not wait for it.
"""
import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from granvit.cost import host_memory

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
# Timeout of a sum of host vectors, in which the other ranks wait while rank 0 writes large weights. Sums on devices keep their
# library's own timeout, because in a step all ranks arrive at about the same time. A rank that has died is detected by
# granvit.watcher, a host that has died only by these timeouts.
WAIT = timedelta(hours=4)


def choose_device(name: str) -> str:
    """The device to use: cpu, cuda or npu. `auto` is the accelerator if there is one. `ValueError` if a named one is missing."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return "cuda"
    if name == "npu" or (name == "auto" and os.environ.get("ASCEND_HOME_PATH")):
        try:
            import torch_npu  # noqa: F401 (registers torch.npu)
        except (ImportError, RuntimeError, OSError) as error:
            raise ValueError(f"runtime.device {name}: torch_npu cannot be imported ({error}); install it with CANN") from None
        return "npu"
    if name == "cuda":
        raise ValueError("runtime.device cuda: PyTorch finds no CUDA device; use runtime.device=cpu or a CUDA build of torch")
    return "cpu"


def memory(name: str) -> int:
    """Memory of the device that `name` chooses, in bytes. For cpu it is the machine's memory, which all its ranks share."""
    device = choose_device(name)
    return host_memory() if device == "cpu" else getattr(torch, device).get_device_properties(0).total_memory


class Ranks:
    """`granvit.engine.Ranks` over torch.distributed. `host` is the gloo group that sums small vectors on the host, for every kind
    of device (None for a single rank)."""

    def __init__(self, rank: int, world: int, device: str, host: dist.ProcessGroup | None = None):
        self.rank, self.world, self.device, self.host = rank, world, device, host

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small float32 vector over the ranks."""
        summed = torch.from_numpy(values.astype(np.float32))
        if self.host is not None:
            dist.all_reduce(summed, group=self.host)
        return summed.numpy()

    def leave(self) -> None:
        """Leaves the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join(name: str) -> Ranks:
    """Selects the device that `name` chooses. In a process that torchrun started, joins its process group.

    A first sum connects the devices, so that a broken network is detected before any long work.
    """
    device = choose_device(name)
    if device != "cpu":
        getattr(torch, device).set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, device)
    dist.init_process_group(BACKENDS[device])
    host = dist.new_group(backend="gloo", timeout=WAIT)
    all_sum_(torch.zeros(1, device=device))
    return Ranks(dist.get_rank(), dist.get_world_size(), device, host)


def all_sum_(tensor: Tensor) -> Tensor:
    """Sums over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
