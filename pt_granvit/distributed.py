"""Data parallelism under torchrun: the process group, and sums over ranks.

Gradients are summed on the devices. Small vectors of the host (counts, flags) are summed by gloo, so that they neither wait for
the device nor are copied to it.
"""
import os
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from granvit.cost import host_memory

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


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


def initialise(device: str) -> tuple[int, int]:
    """Joins torchrun's process group where there is one; returns rank and number of ranks."""
    if device != "cpu":
        getattr(torch, device).set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    dist.init_process_group(BACKENDS[device])
    return dist.get_rank(), dist.get_world_size()


def all_sum_(tensor: Tensor) -> Tensor:
    """Sums over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_sum(values: np.ndarray) -> np.ndarray:
    """Sum of a small float32 vector of the host over the ranks, which call it together."""
    values = torch.from_numpy(values.astype(np.float32))
    if dist.is_initialized():
        dist.all_reduce(values, group=_host_group())
    return values.numpy()


@cache
def _host_group() -> dist.ProcessGroup | None:
    """The group of all ranks that sums on the host; None, which means the default one, where that one does."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def finalise() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        _host_group.cache_clear()
        dist.destroy_process_group()
