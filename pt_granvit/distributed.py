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

BACKENDS = {"cuda": "nccl", "npu": "hccl"}
# How long a rank waits for another in a collective. The defaults (10 and 30 minutes; HCCL: 1836 s) could end a run whose rank 0
# writes large start weights; a rank that has died is noticed by the watchers (granvit.watcher), not by this.
WAIT = timedelta(days=1)
HCCL_EXEC_TIMEOUT = "17340"  # seconds; the most that every Ascend device takes


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
    """`granvit.engine.Ranks` over torch.distributed. Small vectors are summed on the host, by gloo, whatever the device."""

    def __init__(self, rank: int, world: int, device: str):
        self.rank, self.world, self.device = rank, world, device

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of a small float32 vector over the ranks."""
        return all_sum_(torch.from_numpy(values.astype(np.float32))).numpy()

    def leave(self) -> None:
        """Leaves the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join(name: str) -> Ranks:
    """Selects the device that `name` chooses and joins torchrun's process group where there is one.

    The group has gloo for tensors of the host beside the device's own library.
    """
    device = choose_device(name)
    if device != "cpu":
        getattr(torch, device).set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, device)
    if device == "npu":
        os.environ.setdefault("HCCL_EXEC_TIMEOUT", HCCL_EXEC_TIMEOUT)
    backends = "gloo" if device == "cpu" else f"cpu:gloo,{device}:{BACKENDS[device]}"
    dist.init_process_group(backends, timeout=WAIT)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def all_sum_(tensor: Tensor) -> Tensor:
    """Sums over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
