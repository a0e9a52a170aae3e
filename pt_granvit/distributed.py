"""Data parallelism under torchrun: the process group, and sums over ranks.

Gradients are summed on the devices. Small vectors of the host (counts, flags) are summed by gloo, so that they neither wait for
the device nor are copied to it.
"""
import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from granvit.cost import host_memory

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
# How long a rank waits for another in a sum of host vectors, where it waits while rank 0 writes large weights. Sums on devices
# keep their library's own timeout: in a step all ranks arrive together. A rank that died is noticed by the watchers
# (granvit.watcher), a host that died by these timeouts alone.
WAIT = timedelta(hours=4)


def choose_device(name: str) -> str:
    """cpu, cuda or npu; `auto` takes the accelerator that is there. `ValueError` where the named one is not."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return "cuda"
    if name == "npu" or (name == "auto" and os.environ.get("ASCEND_HOME_PATH")):
        try:
            import torch_npu  # noqa: F401 (registers torch.npu)
        except (ImportError, RuntimeError, OSError) as error:
            raise ValueError(f"runtime.device {name}: torch_npu cannot be imported ({error}); install it with CANN") from None
        return "npu"
    if name == "cuda":
        raise ValueError("runtime.device cuda: PyTorch sees no CUDA device; use runtime.device=cpu or a CUDA build of torch")
    return "cpu"


def memory(name: str) -> int:
    """Bytes of the device that `name` chooses; of the machine for cpu, whose ranks share them."""
    device = choose_device(name)
    return host_memory() if device == "cpu" else getattr(torch, device).get_device_properties(0).total_memory


class Ranks:
    """`granvit.engine.Ranks` over torch.distributed. `host` is the gloo group that sums small vectors on the host, whatever the
    device (None: one rank alone)."""

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
    """Selects the device that `name` chooses and joins torchrun's process group where there is one.

    The devices are connected here, by a first sum, so that a network that does not work is met before any long work.
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
