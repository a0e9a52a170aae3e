"""Out-of-memory errors are recognised by their messages, and the proposed micro-batch divides the batch."""
import re

import numpy as np
import pytest
import torch

from granvit.config import language_config, vision_config
from granvit.memory import NOTHING_SMALLER, check_memory, is_out_of_memory, memory_errors, smaller_steps
from granvit.trainer import TrainingStopped
from tests.helpers import run_config


@pytest.mark.parametrize("make", [lambda: torch.empty(1 << 55), lambda: np.empty(1 << 58)], ids=["torch", "numpy"])
def test_what_is_raised_here_is_known(make):
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        make()
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Device(id:0) memory isn't enough and alloc failed, kernel name: MatMul-op1, alloc size: 4294967296B."),
        RuntimeError("Memory not enough: alloc size[34359738368] is bigger than available memory"),
        RuntimeError("Allocate memory failed, alloc size 1024"),
        RuntimeError("Out of Memory!!! Request memory size: 34359738368B"),
    ],
)
def test_what_the_frameworks_say_on_devices_is_known(error):
    assert is_out_of_memory(error)


def test_another_error_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shapes do not match"), memory_errors(lambda: "", tmp_path, ["x=1"], ""):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    "rows, micro, ranks, recompute, cures",
    [
        (24, 6, 2, False, ["train.micro_batch=3", "runtime.recompute=true"]),
        (30, 5, 2, False, ["train.micro_batch=1", "runtime.recompute=true"]),  # 2 does not divide 15
        (24, 1, 2, False, ["runtime.recompute=true"]),
        (24, 1, 2, True, []),
    ],
)
def test_the_cure_divides_the_batch(rows, micro, ranks, recompute, cures, tmp_path):
    config = run_config(
        data={"regions_per_row": 1}, train={"global_batch": rows, "micro_batch": micro}, runtime={"recompute": recompute}
    )
    assert smaller_steps(config, ranks) == cures
    averaged = config.model_copy(update={"train": config.train.model_copy(update={"loss_reduction": "per_device"})})
    assert smaller_steps(averaged, ranks) == [cure for cure in cures if "micro_batch" not in cure]
    said = re.escape(" or ".join(cures) if cures else NOTHING_SMALLER)
    with (
        pytest.raises(TrainingStopped, match=rf"step 3\b.*{said}"),
        memory_errors(lambda: "in step 3", tmp_path, smaller_steps(config, ranks), NOTHING_SMALLER),
    ):
        raise MemoryError


def test_an_evaluation_out_of_memory_keeps_its_own_cure(tmp_path):
    with (
        pytest.raises(TrainingStopped, match=r"evaluation.*step 2\b.*eval\.batch=4") as raised,
        memory_errors(lambda: "in step 2", tmp_path, ["train.micro_batch=1"], NOTHING_SMALLER),
        memory_errors(lambda: "in the evaluation after step 2", tmp_path, ["eval.batch=4"], "none"),
    ):
        raise MemoryError
    assert "micro_batch" not in str(raised.value)


@pytest.mark.parametrize(
    "ranks, micro, remedy", [(256, 2, r"train\.micro_batch=1\b"), (64, 3, r"train\.micro_batch=2\b"), (3, 2, "256")]
)
def test_a_micro_batch_that_does_not_divide_names_the_one_that_does(ranks, micro, remedy):
    config = run_config(data={"regions_per_row": 1}, train={"global_batch": 256, "micro_batch": micro})
    with pytest.raises(ValueError, match=remedy):
        config.local_micro_batches(ranks)
    fitting = run_config(data={"regions_per_row": 1}, train={"global_batch": 256, "micro_batch": 1})
    assert fitting.local_micro_batches(256) == 1


def test_a_model_that_no_device_here_holds_is_refused_with_the_sum():
    config = run_config(stage="stage2", model={"language": "qwen2.5-7b"}, runtime={"compute": "bfloat16"})
    encoder, decoder = vision_config("siglip2-so400m-patch16-512"), language_config("qwen2.5-7b")
    with pytest.raises(ValueError, match=r"needs about 123 GB a device .* this device has 64 GB"):
        check_memory(config, encoder, decoder, 64 * 10**9)
    check_memory(config, encoder, language_config("qwen2.5-1.5b"), 64 * 10**9)
