"""The stand-in for Ascend C notices kernels that break its rules: a test of the tests in test_roi_align.py."""
import subprocess

import pytest

from .harness import SANITIZE, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

FAULTS = {
    "UB overflow": "UB overflow",
    "too many buffers": "too many buffers",
    "misaligned operand": "misaligned",
    "copy of 12 bytes": "misaligned",
    "buffer overrun": "buffer overrun",
    "uninitialised operand": "uninitialised",
    "uninitialised sum": "uninitialised",
    "overlap": "overlap",
    "no buffer": "tensor without a buffer",
    "rounding of Cast": "round mode",
    "copy of half a number": "copy parameters",
    "wide padding": "copy parameters",
    "copy to VECCALC": "wrong position",
    "read before dequeue": "queue discipline",
    "read while enqueued": "queue discipline",
    "copy out before dequeue": "queue discipline",
    "write while copied": "queue discipline",
    "dequeue of nothing": "queue discipline",
    "no free buffer": "queue discipline",
    "freed twice": "queue discipline",
    "never freed": "queue discipline",
    "use after free": "tensor used after FreeTensor",
    "queue depth": "queue depth exceeded",
    "read out of range": "global memory out of range",
    "write out of range": "global memory out of range",
    "write to input": "write to an input",
    "nothing written": "output not written",
    "two writers": "two blocks write one address",
    "no synchronisation": "global memory read without synchronisation",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return build("broken.cpp", tmp_path_factory.mktemp("ascendc") / "broken", *SANITIZE)


def test_a_sound_kernel_passes(broken):
    assert subprocess.run([broken, "none"]).returncode == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_breaks_a_rule_is_stopped(broken, fault):
    done = subprocess.run([broken, fault], capture_output=True, text=True)
    assert (done.returncode, done.stderr.split(":")[0]) == (3, FAULTS[fault])
