"""ms_granvit.distributed: the cores of a process that joins, groups of gradients, and the order of the norm's sum."""
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("mindspore")

SCRIPT = """
import os, threading
import granvit
from ms_granvit.distributed import _more_than_one_core

core = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {core})
done = threading.Event()
with _more_than_one_core():
    assert len(os.sched_getaffinity(0)) > 1
    thread = threading.Thread(target=done.wait)
    thread.start()
assert os.sched_getaffinity(0) == os.sched_getaffinity(thread.native_id) == {core}
done.set()
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs at least two cores")
def test_a_rank_on_one_core_is_lent_more_and_it_and_its_new_threads_are_bound_again():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


def test_gradients_are_joined_until_a_group_is_full(monkeypatch):
    from ms_granvit import distributed

    monkeypatch.setattr(distributed, "CHUNK", 10)
    assert distributed.chunks([4, 4, 2, 1, 10, 11, 3, 3]) == ((0, 1, 2), (3,), (4,), (5,), (6, 7))


def test_the_gradient_norm_is_summed_in_one_order_at_every_launch():
    """A plain sum of this vector changes in its last bit within the first fifteen launches."""
    mindspore = pytest.importorskip("mindspore")
    from ms_granvit.distributed import SumOfSquares

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    values = np.random.default_rng(0).normal(size=900_001).astype(np.float32)
    cell, vector = SumOfSquares(), mindspore.Tensor(values)
    found = {float(cell(vector).asnumpy()) for _ in range(30)}
    assert len(found) == 1
    np.testing.assert_allclose(found.pop(), np.square(values.astype(np.float64)).sum(), rtol=1e-6)
